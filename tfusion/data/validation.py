"""Validation rows: held-out documents packed in file order, without mixture, drop or chance.

A text corpus gives one view, whole documents. A corpus of pictures gives two: `name`, the caption before the image,
for the diffusion loss and the caption alone, and `name/given_image`, the clean image before its caption.
Each row's timesteps and noise are fixed by (seed, view, row), so two validations differ by the weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import Dataset

from tfusion.data.corpora import CaptionedImage
from tfusion.sequence import Batch, Document, Image, RowShape, collate, pack
from tfusion.tokenizers.text import TextTokenizer

GIVEN_IMAGE = "/given_image"


def text_documents(texts: Sequence[str], tokenizer: TextTokenizer, most: int) -> Iterator[Document]:
    """Whole texts, the first `most` characters of them."""
    for text in texts:
        if most <= 0:
            return
        yield Document((tokenizer.encode(text[:most]),), eos=len(text) <= most)
        most -= len(text)


def caption_documents(
    pictures: Sequence[CaptionedImage], tokenizer: TextTokenizer | None, image_first: bool, most: int
) -> Iterator[Document]:
    """Each picture with its first caption, or without a tokenizer alone; the first `most` of them."""
    for index in range(min(len(pictures), most)):
        picture = pictures[index]
        image = Image(picture.data(), noise_limit=0.0 if image_first else 1.0)
        if tokenizer is None:
            yield Document((image,))
            continue
        caption = tokenizer.encode(picture.captions[0])
        yield Document((image, caption) if image_first else (caption, image))


class ValidationRows(Dataset):
    """The rows of one view, whole batches of them on every rank: rank r has rows r, r + W, ...; the last are empty.

    Whole batches, so that every batch of a run has one shape and nothing is compiled again.

    Args:
        view: its name.
        documents: in file order.
        shape: of a row.
        seed: of timesteps and noise.
        rank, ranks: r and W.
        batch_rows: rows a batch.
    """

    def __init__(
        self,
        view: str,
        documents: Iterator[Document],
        shape: RowShape,
        seed: int,
        rank: int,
        ranks: int,
        batch_rows: int = 1,
    ) -> None:
        self.view, self.shape, self.seed = view, shape, seed
        rows = list(self.pack(documents))
        padding: list[list[Document]] = [[] for _ in range(-len(rows) % (ranks * batch_rows))]
        self.rows = list(enumerate(rows + padding))[rank::ranks]

    def pack(self, documents: Iterator[Document]) -> Iterator[list[Document]]:
        """Rows of documents."""
        return pack(documents, self.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, list[Document]]:
        return self.rows[index]

    def collate(self, rows: list[tuple[int, list[Document]]]) -> Batch:
        """Rows of a batch; timesteps and noise depend on the row, not on the batch."""
        seeds = [("validation", self.seed, self.view, row) for row, _ in rows]
        return collate([documents for _, documents in rows], self.shape, seeds)
