"""From corpora to rows: documents out of corpora, their mixture, and their packing into rows of exactly T.

The share of positions in image documents (captions and markers included) is kept at its target by deficit, not by
chance: while images are owed positions the next document is an image, else text. An image document moves whole, and
text fills the gap before it; so with a text corpus no position is left empty. Without one, documents are placed best
fit out of a look-ahead of 64. A stream's whole state is `StreamPosition`, a few integers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tfusion.data.corpora import CaptionedImage
from tfusion.data.order import Order
from tfusion.data.sources import Concatenated, captions_of
from tfusion.data.text_pieces import TextPieces
from tfusion.randomness import seed_from, uniform
from tfusion.sequence import Document, Image, Row, RowShape
from tfusion.tokenizers.text import TextTokenizer

logger = logging.getLogger(__name__)
LOOK_AHEAD = 64  # image documents considered for a row where no text fills gaps
UNREAD = torch.empty(0)  # in place of a picture
SHARE_UNIT = 10_000  # deficits are whole numbers of 1 / SHARE_UNIT positions


@dataclass(frozen=True)
class CaptionedDocuments:
    """Captioned pictures as documents, with the paper's random choices made per (seed, epoch, document).

    Args:
        pictures: the corpus.
        tokenizer: of the captions.
        seed: of the choices.
        caption_first: share of documents with the caption before the image (paper: 0.8).
        caption_drop: share of the caption-first documents that lose it, for guidance (JanusFlow, BAGEL: 0.1).
        image_first_noise_limit: upper end of the noise range where the image comes first (paper's table 8: 0.5).
        weights: how often a picture of each corpus is taken, in proportion; None = all once an epoch.
    """

    pictures: Sequence[CaptionedImage]
    tokenizer: TextTokenizer
    seed: int
    caption_first: float
    caption_drop: float
    image_first_noise_limit: float
    weights: tuple[float, ...] | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pictures of each corpus."""
        parts = self.pictures.parts if isinstance(self.pictures, Concatenated) else [self.pictures]
        return tuple(map(len, parts))

    def get(self, epoch: int, index: int) -> Document:
        """The document of a picture in an epoch."""
        picture = self.pictures[index]
        mirrored = picture.flip and uniform("flip", self.seed, epoch, index) < 0.5
        return self._document(epoch, index, picture.captions, picture.data(mirrored), picture.key)

    def outline(self, epoch: int, index: int) -> Document:
        """The same without the picture, which is not read where the corpus knows captions by themselves."""
        return self._document(epoch, index, captions_of(self.pictures, index), UNREAD, "")

    def _document(self, epoch: int, index: int, captions: tuple[str, ...], data: Tensor, key: str) -> Document:
        def chance(what: str) -> float:
            return uniform(what, self.seed, epoch, index)

        def caption() -> list[int]:
            choice = seed_from("caption", self.seed, epoch, index) % len(captions)
            return self.tokenizer.encode(captions[choice])

        if chance("order") >= self.caption_first:
            return Document((Image(data, self.image_first_noise_limit, key), caption()))
        image = Image(data, key=key)
        if chance("drop") < self.caption_drop:
            return Document((image,))
        return Document((caption(), image))


class StreamPosition(NamedTuple):
    """Where a stream stands: all that a resume needs.

    `rows` emitted, `text` and `images` elements taken, `offset` positions of the current text element that earlier
    rows hold, `deficit` owed to images (1 / SHARE_UNIT positions), `pending` image elements looked at, not placed.
    """

    rows: int = 0
    text: int = 0
    offset: int = 0
    images: int = 0
    deficit: int = 0
    pending: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mixture:
    """What all streams share: the two sources and how they are mixed.

    Args:
        texts: pieces; None = no text corpus.
        images: captioned documents; None = no image corpus.
        shape: of a row.
        image_share: target share of positions in image documents (paper: 0.5).
        seed: of the order.
        num_streams: S.
    """

    texts: TextPieces | None
    images: CaptionedDocuments | None
    shape: RowShape
    image_share: float
    seed: int
    num_streams: int
    skipped: set[str] = field(default_factory=set)  # keys of the pictures whose documents fit no row

    def skip(self, stream: int, taken: int, document: Document) -> None:
        """Name a document that fits no row, once, and count it."""
        assert self.images is not None
        _, picture = self._image_order.element(stream + taken * self.num_streams)
        key = self.images.pictures[picture].key
        if key not in self.skipped:
            self.skipped.add(key)
            length = document.length(self.shape.num_patches)
            words = "skipped picture %s: its document takes %d positions, rows have %d (%d skipped so far)"
            logger.warning(words, key, length, self.shape.seq_len, len(self.skipped))

    def text(self, stream: int, taken: int) -> Document:
        """The stream's element number `taken` of the text."""
        assert self.texts is not None
        return self.texts[self._text_order.element(stream + taken * self.num_streams)[1]]

    def image(self, stream: int, taken: int) -> Document:
        """The stream's element number `taken` of the pictures."""
        assert self.images is not None
        return self.images.get(*self._image_order.element(stream + taken * self.num_streams))

    def outline(self, stream: int, taken: int) -> Document:
        """The same without its picture."""
        assert self.images is not None
        return self.images.outline(*self._image_order.element(stream + taken * self.num_streams))

    @functools.cached_property
    def _text_order(self) -> Order:
        return Order("text", self.texts.sizes, self.texts.weights, self.seed)

    @functools.cached_property
    def _image_order(self) -> Order:
        return Order("image", self.images.sizes, self.images.weights, self.seed)


class Stream:
    """One stream of packed rows; `next_row()` moves `position` on by one row."""

    def __init__(self, mixture: Mixture, number: int, position: StreamPosition) -> None:
        self.mixture, self.number, self.position = mixture, number, position
        self._text: Document | None = None  # what is left of the current element, a cache of the position
        self._pending: dict[int, Document] = {}

    def next_row(self) -> list[Document]:
        """Documents that fill a row of T positions."""
        row = Row(self.mixture.shape)
        if self.mixture.texts is None:
            self._fill_best_fit(row)
        else:
            while row.room:
                if not (self.mixture.images and self.position.deficit >= 0 and self._add_image(row)):
                    self._add_text(row)
        self.position = self.position._replace(rows=self.position.rows + 1)
        return row.documents

    def _add_image(self, row: Row) -> bool:
        """Add the next picture's document if it fits."""
        document = self._next_fitting()
        if not row.fits(document):
            return False
        row.add(document)
        self._pending.clear()
        self._count(document.length(self.mixture.shape.num_patches), image=True, images=self.position.images + 1)
        return True

    def _add_text(self, row: Row) -> None:
        position = self.position
        if self._text is None:
            self._text = self.mixture.text(self.number, position.text)
            if position.offset:
                self._text = self._text.cut(position.offset)[1]
        before = row.used
        self._text = row.add(self._text)
        used = row.used - before
        if self._text is None:
            self._count(used, image=False, text=position.text + 1, offset=0)
        else:
            self._count(used, image=False, offset=position.offset + used)

    def _count(self, used: int, image: bool, **changes: int) -> None:
        share = round(self.mixture.image_share * SHARE_UNIT)
        deficit = self.position.deficit + used * (share - SHARE_UNIT if image else share)
        self.position = self.position._replace(deficit=deficit, **changes)

    def _next_fitting(self) -> Document:
        """The next image document that a row can hold; longer ones are skipped and named."""
        for _ in range(1000):
            taken = self.position.images
            document = self._pending.get(taken) or self.mixture.image(self.number, taken)
            if Row(self.mixture.shape).fits(document):
                self._pending[taken] = document
                return document
            self.mixture.skip(self.number, taken, document)
            self.position = self.position._replace(images=taken + 1)
        raise ValueError("1000 image documents in a row are longer than seq_len: raise seq_len or shorten the captions")

    def _fill_best_fit(self, row: Row) -> None:
        """Pictures only: the oldest of the look-ahead, then whatever leaves the least room.

        What waits is outlines: with their pixels, a stream's would take a dozen MB.
        """
        shape = self.mixture.shape
        waiting = {n: self._pending.get(n) or self.mixture.outline(self.number, n) for n in self.position.pending}
        taken = self.position.images
        while True:
            while len(waiting) < LOOK_AHEAD:
                document = self.mixture.outline(self.number, taken)
                if Row(shape).fits(document):
                    waiting[taken] = document
                elif not waiting and taken - self.position.images > 1000:
                    raise ValueError("1000 image documents are longer than seq_len: raise seq_len")
                else:
                    self.mixture.skip(self.number, taken, document)
                taken += 1
            fitting = [n for n, document in waiting.items() if row.fits(document)]
            if not fitting:
                break
            oldest = min(waiting)
            longest = max(fitting, key=lambda n: (waiting[n].length(shape.num_patches), -n))
            placed = oldest if not row.documents else longest
            del waiting[placed]
            row.add(self.mixture.image(self.number, placed))
        self._pending = waiting
        self.position = self.position._replace(images=taken, pending=tuple(sorted(waiting)))
