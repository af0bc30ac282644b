"""Texts cut into pieces that fit a few rows, the elements that streams take: places are held, texts stay on disk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from tfusion.data.sources import EncodedTexts
from tfusion.sequence import Document
from tfusion.tokenizers.text import TextTokenizer

BEGINNING = 256  # bytes that hold a piece's first token


class TextPieces(Sequence[Document]):
    """Texts cut at line ends into pieces of at most `max_bytes`; each piece is an element.

    Only a text's first piece has BOS, only its last EOS; the last token of a piece is labelled with the first token
    of the next. Pieces are tokenised apart, so a piece is a pure function of its place.

    Args:
        texts: of each corpus.
        tokenizer: of the texts.
        max_bytes: UTF-8 bytes of a piece.
        weights: shares of the corpora, in bytes read; None = each as large as it is.

    Attributes:
        sizes: pieces of each corpus.
        weights: how often a piece of each corpus is taken, in proportion, or None.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[str]],
        tokenizer: TextTokenizer,
        max_bytes: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.corpora = [corpus if hasattr(corpus, "utf8") else EncodedTexts(corpus) for corpus in texts]
        # (text, start, end) of each piece of each corpus: 24 bytes a piece
        self.pieces = [_cut_corpus(corpus, max_bytes) for corpus in self.corpora]
        self.sizes = tuple(map(len, self.pieces))
        self._starts = [0, *accumulate(self.sizes)]
        self.weights = None
        if weights is not None:
            mean_bytes = [float((spans[:, 2] - spans[:, 1]).mean()) for spans in self.pieces]
            self.weights = tuple(weight / size for weight, size in zip(weights, mean_bytes, strict=True))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        corpus = int(np.searchsorted(self._starts, index, side="right")) - 1
        place, pieces = index - self._starts[corpus], self.pieces[corpus]
        text = pieces[place, 0]
        first = place == 0 or pieces[place - 1, 0] != text
        last = place + 1 == len(pieces) or pieces[place + 1, 0] != text
        next_id = None
        if not last:  # of its beginning alone: all of the piece would cost as much as this one
            beginning = self._read(corpus, place + 1)[:BEGINNING].decode(errors="ignore")  # a character may be cut
            next_id = self.tokenizer.encode(beginning)[0]
        ids = self.tokenizer.encode(self._read(corpus, place).decode())
        return Document((ids,), bos=bool(first), eos=bool(last), next_id=next_id)

    def _read(self, corpus: int, place: int) -> bytes:
        text, start, end = map(int, self.pieces[corpus][place])
        return bytes(self.corpora[corpus].utf8(text)[start:end])


def _cut_corpus(corpus: Any, max_bytes: int) -> np.ndarray:
    """(pieces, 3): text, start, end; only texts of more than a piece are read."""
    sizes = corpus.sizes()
    whole = np.flatnonzero((sizes > 0) & (sizes <= max_bytes))
    pieces = [np.stack([whole, np.zeros_like(whole), sizes[whole]], axis=1)]
    for text in np.flatnonzero(sizes > max_bytes):
        spans = np.array(cut_text(corpus.utf8(int(text)), max_bytes), np.int64)
        pieces.append(np.insert(spans, 0, text, axis=1))
    together = np.concatenate(pieces).astype(np.int64, copy=False)
    return together[together[:, 0].argsort(kind="stable")]


def cut_text(data: memoryview | bytes, max_bytes: int) -> list[tuple[int, int]]:
    """(start, end) in bytes of pieces of whole lines, as many lines as fit in `max_bytes`.

    A line that is longer is cut after its last space that fits, else between two characters.
    """
    spans, start = [], 0
    while start < len(data):
        end = len(data)
        if end - start > max_bytes:
            end = start + bytes(data[start : start + max_bytes]).rfind(b"\n") + 1
            end = end if end > start else _cut_line(data, start, max_bytes)
        spans.append((start, end))
        start = end
    return spans


def _cut_line(data: memoryview | bytes, start: int, max_bytes: int) -> int:
    """Where to cut a line that is too long."""
    space = bytes(data[start : start + max_bytes]).rfind(b" ")
    if space > 0:
        return start + space + 1
    end = start + max_bytes
    while end > start and data[end] & 0xC0 == 0x80:  # within a character
        end -= 1
    if end == start:  # a character of more bytes than a piece
        end = start + 1
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end += 1
    return end
