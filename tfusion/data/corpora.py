"""What a corpus is, and the fixed split by hash that all built-in corpora of pictures share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch

Split = Literal["train", "val", "test"]
VAL_PERCENT = 5
TEST_PERCENT = 5


@dataclass(frozen=True)
class CaptionedImage:
    """A picture with the texts that describe it.

    Attributes:
        key: names the picture in its corpus, on every machine.
        image: uint8, (3, H, W), RGB.
        captions: one or more, each of which describes the picture by itself.
        flip: whether training may mirror it.
    """

    key: str
    image: torch.Tensor
    captions: tuple[str, ...]
    flip: bool = False

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.image.shape[-1]

    def data(self, mirrored: bool = False) -> torch.Tensor:
        """What a document holds of it; of pictures that have been encoded (`tfusion.data.Latents`), latents."""
        return self.image.flip(-1) if mirrored else self.image


class TextCorpus(Protocol):
    """Texts. The constructor only keeps and checks arguments; `load` does the work."""

    name: str

    def load(self, split: Split) -> Sequence[str]:
        """Whole documents, always the same in the same order."""
        ...


class ImageCorpus(Protocol):
    """Captioned square pictures. The constructor only keeps and checks arguments; `load` does the work."""

    name: str
    image_size: int

    def load(self, split: Split) -> Sequence[CaptionedImage]:
        """Captioned pictures with cheap random access, always the same in the same order."""
        ...


def split_of(key: str) -> Split:
    """The split that `key` belongs to, for ever: 90 % train, 5 % val, 5 % test."""
    percent = int.from_bytes(_digest(key)[8:16], "little") % 100
    if percent < VAL_PERCENT:
        return "val"
    if percent < VAL_PERCENT + TEST_PERCENT:
        return "test"
    return "train"


def hash_rank(key: str) -> int:
    """Sorting by this number gives the order in which "the first N" are taken; independent of the split."""
    return int.from_bytes(_digest(key)[:8], "little")


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is the name of a split."""
    if split not in get_args(Split):
        raise ValueError(f"got split {split!r}, expected one of {get_args(Split)}")


def cache_folder() -> Path:
    """Where built corpora are kept: $TFUSION_CACHE, else ~/.cache/tfusion. Not created here."""
    return Path(os.environ.get("TFUSION_CACHE") or "~/.cache/tfusion").expanduser()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
