"""Corpora as the data module reads them: a split that may not be empty, several as one, a picture as PIL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image as PILImage

from tfusion.data.corpora import CaptionedImage, ImageCorpus, TextCorpus


def to_pil(picture: CaptionedImage) -> PILImage.Image:
    """A corpus picture as PIL."""
    return PILImage.fromarray(picture.image.permute(1, 2, 0).numpy())


def load_split(corpus: ImageCorpus | TextCorpus, split: str) -> Sequence[Any]:
    """A corpus's split, which may not be empty."""
    documents = corpus.load(split)  # type: ignore[arg-type]
    if len(documents) == 0:
        raise ValueError(f"corpus {corpus.name!r} has no document in its split {split!r}: give it more data")
    return documents


class Concatenated(Sequence[Any]):
    """Several corpora as one, each as large as it is."""

    def __init__(self, parts: list[Sequence[Any]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
