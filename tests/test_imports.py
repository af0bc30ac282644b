"""What `import tfusion` offers."""

from __future__ import annotations

import subprocess
import sys

import tfusion


def test_what_is_offered_is_listed_and_there():
    assert {"load", "Request", "GenerationConfig", "Transfusion"} < set(dir(tfusion)) == set(tfusion.__all__)
    assert all(getattr(tfusion, name) is not None for name in dir(tfusion))


def test_the_import_alone_costs_nothing():
    code = "import sys, tfusion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
