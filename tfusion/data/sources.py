"""Corpora as the data module reads them: a split that may not be empty, several as one, a picture as PIL."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from PIL import Image as PILImage

from tfusion.data.corpora import CaptionedImage, ImageCorpus, TextCorpus


def to_pil(picture: CaptionedImage) -> PILImage.Image:
    """A corpus picture as PIL."""
    return PILImage.fromarray(picture.image.permute(1, 2, 0).numpy())


def has_pixels(pictures: Sequence[CaptionedImage]) -> bool:
    """Whether the pictures can be looked at: beside latents they need not have been kept."""
    if isinstance(pictures, Concatenated):
        return all(map(has_pixels, pictures.parts))
    return getattr(pictures, "has_pixels", True)


def load_split(corpus: ImageCorpus | TextCorpus, split: str) -> Sequence[Any]:
    """A corpus's split, which may not be empty."""
    documents = corpus.load(split)  # type: ignore[arg-type]
    if len(documents) == 0:
        raise ValueError(f"corpus {corpus.name!r} has no document in its split {split!r}: give it more data")
    return documents


def captions_of(pictures: Sequence[CaptionedImage], index: int) -> tuple[str, ...]:
    """A picture's captions, without reading the picture where the corpus can."""
    return pictures.captions(index) if hasattr(pictures, "captions") else pictures[index].captions


class Concatenated(Sequence[Any]):
    """Several corpora as one, each as large as it is."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self.parts = list(parts)
        self._starts = [0, *accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Any:
        part, place = self._find(index)
        return part[place]

    def captions(self, index: int) -> tuple[str, ...]:
        """As `captions_of`."""
        return captions_of(*self._find(index))

    def _find(self, index: int) -> tuple[Sequence[Any], int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._starts, index) - 1
        return self.parts[part], index - self._starts[part]


class EncodedTexts:
    """Texts in memory, by their bytes."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = [text.encode() for text in texts]

    def __len__(self) -> int:
        return len(self._texts)

    def sizes(self) -> np.ndarray:
        """(N,) bytes of each text."""
        return np.array([len(text) for text in self._texts], np.int64)

    def utf8(self, index: int) -> memoryview:
        """A text's bytes."""
        return memoryview(self._texts[index])
