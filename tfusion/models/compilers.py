"""Is there a compiler? `torch.compile` needs one where it runs, on CUDA as well."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
import sysconfig
from pathlib import Path

log = logging.getLogger(__name__)


def compilers(device_type: str) -> list[str]:
    """Those of which one is needed: inductor's of C++ for a CPU, elsewhere Triton's of C, which builds what launches
    kernels; both as they look for it.
    """
    if device_type == "cpu":
        return [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    return [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]


@functools.cache
def has_compiler(device_type: str) -> bool:
    """Whether `torch.compile` finds what it needs there; where not, that is said."""
    needed = compilers(device_type)
    missing = [] if any(map(shutil.which, needed)) else [" or ".join(needed)]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():  # what is compiled is called from Python
        missing.append("Python.h (of Debian's python3-dev)")
    if missing:
        log.warning(
            "there is no %s here, so nothing is compiled for %s (blocks, flex attention), which is slower; install it",
            *(" and no ".join(missing), device_type),
        )
    return not missing
