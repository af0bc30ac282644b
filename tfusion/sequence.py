"""The one vocabulary that all code speaks: special ids, `Document`, `Row`, `Batch`, and how one becomes the next.

A document is `[BOS] elements [EOS]`; an element is text (ids) or an image, `[BOI] patch x P [EOI]` (Transfusion §3).
Rows of exactly T positions hold whole documents; only plain text is cut, and goes on in the next row as a new
document without BOS whose first id is the label of the last position before the cut: no target is lost.

Labels: the id of the next position; none where the input is BOI or a patch (paper, footnote 8), on padding, and
across documents. EOI is never a label: decoding appends it.

Legend of the package: B rows, T positions, D width, H heads, K head dim, I image slots in a batch, P patches an
image, C, h, w latent channels and size, V vocabulary, N labelled text positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tfusion.randomness import generator

PAD_ID, BOS_ID, EOS_ID, BOI_ID, EOI_ID = range(5)
NUM_SPECIAL_IDS = 5  # a tokenizer's own ids come after these
IGNORE_INDEX = -100  # torch's: a label without loss
ALIGNED = 64  # bytes, of tensors that travel together
LABEL_MULTIPLE = 256  # N is padded to a multiple of this, so it takes few values


@dataclass(frozen=True, eq=False)
class Image:
    """An image element: `data` is uint8 (3, H, W), or float latents (C, h, w) from a cache.

    `noise_limit` is the upper end of the noise range for this image as a fraction: 1 = whole range, 0 = clean.
    `key` names it in reports.
    """

    data: Tensor
    noise_limit: float = 1.0
    key: str = ""


@dataclass(frozen=True, eq=False)
class Document:
    """`[BOS] elements [EOS]`, or a part of one: `bos` / `eos` say which ends are there.

    `next_id` labels the last position where the text goes on in another row or piece (then `eos` is False).
    """

    elements: tuple[Sequence[int] | Image, ...]
    bos: bool = True
    eos: bool = True
    next_id: int | None = None

    @functools.cached_property
    def images(self) -> tuple[Image, ...]:
        return tuple(e for e in self.elements if isinstance(e, Image))

    @functools.cached_property
    def _num_ids(self) -> int:
        return sum(2 if isinstance(e, Image) else len(e) for e in self.elements) + self.bos + self.eos

    def length(self, num_patches: int) -> int:
        """Positions it takes, markers included."""
        return self._num_ids + num_patches * len(self.images)

    def cut(self, room: int) -> tuple[Document, Document | None]:
        """The first `room` positions and the rest, which is None when only EOS is left: it is the head's label."""
        assert not self.images and 0 < room < self.length(0), "only plain text longer than the room is cut"
        ids = [i for element in self.elements for i in element]  # type: ignore[union-attr]
        at = room - self.bos
        head_label = ids[at] if at < len(ids) else EOS_ID
        head = Document((ids[:at],), self.bos, False, head_label)
        if at == len(ids):
            return head, None
        return head, Document((ids[at:],), False, self.eos, self.next_id)


@dataclass(frozen=True)
class RowShape:
    """The static sizes of a row: what makes every batch of a run the same shape.

    Args:
        seq_len: T.
        num_patches: P.
        max_images: K, image slots a row, at most floor(T / (P + 2)).
        latent_shape: (C, h, w), what noise is drawn for, and without `image_shape` what rows hold.
        image_shape: (3, H, W) of the pictures before the image tokenizer; None = documents hold latents.
    """

    seq_len: int
    num_patches: int
    max_images: int
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int] | None

    def __post_init__(self) -> None:
        most = self.seq_len // (self.num_patches + 2)
        if not 0 <= self.max_images <= most:
            raise ValueError(
                f"max_images_per_row is {self.max_images}, but a row of {self.seq_len} positions holds at most {most} "
                f"images of {self.num_patches} patches: lower it, or raise seq_len or the patch size"
            )


@dataclass
class Row:
    """A row being filled."""

    shape: RowShape
    documents: list[Document] = field(default_factory=list)
    used: int = 0
    num_images: int = 0

    @property
    def room(self) -> int:
        return self.shape.seq_len - self.used

    def fits(self, document: Document) -> bool:
        """Whether it can be added whole."""
        images = self.num_images + len(document.images)
        return document.length(self.shape.num_patches) <= self.room and images <= self.shape.max_images

    def add(self, document: Document) -> Document | None:
        """Add it, text cut at the end of the row; returns what is left over for a later row."""
        rest = None
        if not self.fits(document):
            document, rest = document.cut(self.room)
        self.documents.append(document)
        self.used += document.length(self.shape.num_patches)
        self.num_images += len(document.images)
        return rest


def pack(documents: Iterable[Document], shape: RowShape) -> Iterator[list[Document]]:
    """Rows in the order of the documents: text is cut and carried on, a document with an image moves whole.

    Raises:
        ValueError: a document with an image is longer than a row.
    """
    row = Row(shape)
    for document in documents:
        if document.images and not Row(shape).fits(document):
            raise ValueError(
                f"a document takes {document.length(shape.num_patches)} positions and {len(document.images)} images, "
                f"but a row has {shape.seq_len} positions and {shape.max_images} image slots: raise either"
            )
        rest: Document | None = document
        while rest is not None:
            if row.room == 0 or (rest.images and not row.fits(rest)):
                yield row.documents
                row = Row(shape)
            rest = row.add(rest)
    if row.documents:
        yield row.documents


@dataclass
class Batch:
    """Packed rows on one device; every size but N is fixed over a run.

    An image slot is `row * K + n` for the n-th image of a row. Flat positions are `row * T + position`.
    """

    token_ids: Tensor  # (B, T) int64; PAD_ID at patches and padding
    document_ids: Tensor  # (B, T) int64; counts up in a row, -1 on padding
    image_ids: Tensor  # (B, T) int64; the slot at patches, -1 elsewhere
    position_ids: Tensor  # (B, T) int64; restarts at 0 in each document
    hidden: Tensor  # (B, T) bool; keys that only their own image sees (noised copies beside clean ones)
    text_positions: Tensor  # (N,) int64 flat positions with a label, padded with 0
    text_labels: Tensor  # (N,) int64, padded with IGNORE_INDEX
    image_valid: Tensor  # (I,) bool
    image_rows: Tensor  # (I,) int64
    image_starts: Tensor  # (I,) int64; position of the first patch in its row
    noise_limits: Tensor  # (I,) float32; 0 = clean
    time_uniforms: Tensor  # (I,) float32 in [0, 1)
    noise: Tensor  # (I, C, h, w) float32; 0 in empty slots
    step_counts: Tensor  # (2,) float32; this rank's labelled tokens and noised images in the whole optimizer step
    images: Tensor | None = None  # (I, 3, H, W) uint8, or
    latents: Tensor | None = None  # (I, C, h, w) float32
    position: tuple | None = None  # of the data after this step; only on the last micro-batch of a step
    image_keys: tuple[str, ...] = ()  # (I,) names for reports, "" in empty slots
    choice_ids: Tensor | None = None  # (N,) int64, in ranked choice: which choice a label is of, -1 of none

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A copy on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, which knows no dataclasses."""
        return self._map(Tensor.pin_memory)

    def __reduce__(self) -> tuple:
        """Pickled, and copied by `copy`, in one piece: from a loader's worker each tensor alone would be a file and a
        connection, which together take longer than making the batch.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tensors = {name: values.pop(name) for name in list(values) if isinstance(values[name], Tensor)}
        places, end = [], 0
        for name, tensor in tensors.items():
            places.append((name, tensor.dtype, tensor.shape, end))
            end += -(-tensor.nbytes // ALIGNED) * ALIGNED
        whole = torch.empty(end, dtype=torch.uint8, device=self.token_ids.device)
        for name, part in _parts(whole, places):
            part.copy_(tensors[name])
        return _whole_batch, (whole, places, values)

    def _map(self, function) -> Batch:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{k: function(v) if isinstance(v, Tensor) else v for k, v in values.items()})


def _whole_batch(whole: Tensor, places: list[tuple], values: dict) -> Batch:
    """What `Batch.__reduce__` took apart."""
    return Batch(**dict(_parts(whole, places)), **values)


def _parts(whole: Tensor, places: list[tuple]) -> Iterator[tuple[str, Tensor]]:
    """Views of the bytes (n,) by name, type, shape and first byte."""
    for name, dtype, shape, start in places:
        yield name, whole[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def collate(rows: Sequence[Sequence[Document]], shape: RowShape, seeds: Sequence[tuple[int | str, ...]]) -> Batch:
    """Rows of documents as tensors, with the rows' random numbers.

    Args:
        rows: B lists of documents; an empty list is a row of padding.
        shape: the static sizes.
        seeds: what row b's generator is seeded by, such as (seed, global step, global row).
    """
    B, T, P, K = len(rows), shape.seq_len, shape.num_patches, shape.max_images
    assert len(seeds) == B, "one seed a row"
    token_ids = np.full((B, T), PAD_ID, np.int64)
    labels = np.full((B, T), IGNORE_INDEX, np.int64)
    document_ids = np.full((B, T), -1, np.int64)
    image_ids = np.full((B, T), -1, np.int64)
    position_ids = np.zeros((B, T), np.int64)
    starts = np.zeros(B * K, np.int64)
    valid = np.zeros(B * K, bool)
    limits = np.ones(B * K, np.float32)
    keys = [""] * (B * K)
    held = torch.uint8 if shape.image_shape else torch.float32
    pictures = torch.zeros((B * K, *(shape.image_shape or shape.latent_shape)), dtype=held)
    indices = np.arange(T)

    for b, documents in enumerate(rows):
        at, slot = 0, b * K
        for d, document in enumerate(documents):
            begin = at
            for element in _pieces(document):
                if not isinstance(element, Image):
                    token_ids[b, at : at + len(element)] = element
                    at += len(element)
                    continue
                if element.data.shape != pictures.shape[1:] or element.data.dtype != held:
                    raise ValueError(
                        f"an image is {element.data.dtype} {tuple(element.data.shape)}, rows of this run hold "
                        f"{held} {tuple(pictures.shape[1:])}: convert the corpus's images"
                    )
                pictures[slot] = element.data
                starts[slot], valid[slot], limits[slot], keys[slot] = at + 1, True, element.noise_limit, element.key
                token_ids[b, at], token_ids[b, at + P + 1] = BOI_ID, EOI_ID
                image_ids[b, at + 1 : at + P + 1] = slot
                slot, at = slot + 1, at + P + 2
            if at == begin:
                continue
            document_ids[b, begin:at], position_ids[b, begin:at] = d, indices[: at - begin]
            labels[b, begin : at - 1] = token_ids[b, begin + 1 : at]
            labels[b, at - 1] = IGNORE_INDEX if document.next_id is None else document.next_id
        assert at <= T and slot <= (b + 1) * K, "a row holds more than its shape allows"
    labels[(token_ids == BOI_ID) | (image_ids >= 0)] = IGNORE_INDEX  # no loss at BOI (Transfusion, fn. 8) and patches

    uniforms, noise = _draw(shape, seeds, valid.reshape(B, K).sum(1))
    positions = np.flatnonzero(labels.reshape(-1) != IGNORE_INDEX)
    padding = -len(positions) % LABEL_MULTIPLE if len(positions) else LABEL_MULTIPLE
    text_labels = np.pad(labels.reshape(-1)[positions], (0, padding), constant_values=IGNORE_INDEX)
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        document_ids=torch.from_numpy(document_ids),
        image_ids=torch.from_numpy(image_ids),
        position_ids=torch.from_numpy(position_ids),
        hidden=torch.zeros(B, T, dtype=torch.bool),
        text_positions=torch.from_numpy(np.pad(positions, (0, padding))),
        text_labels=torch.from_numpy(text_labels),
        image_valid=torch.from_numpy(valid),
        image_rows=torch.arange(B).repeat_interleave(K),
        image_starts=torch.from_numpy(starts),
        noise_limits=torch.from_numpy(limits),
        time_uniforms=uniforms,
        noise=noise,
        step_counts=torch.tensor([len(positions), (valid & (limits > 0)).sum()], dtype=torch.float32),
        images=pictures if shape.image_shape else None,
        latents=None if shape.image_shape else pictures,
        image_keys=tuple(keys),
    )


def _pieces(document: Document) -> Iterator[Sequence[int] | Image]:
    """What stands in a row, one after another."""
    if document.bos:
        yield (BOS_ID,)
    yield from document.elements
    if document.eos:
        yield (EOS_ID,)


def _draw(shape: RowShape, seeds: Sequence[tuple[int | str, ...]], images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Each row's K uniforms, and noise for the images it has, from its own generator: (I,) and (I, C, h, w)."""
    K = shape.max_images
    uniforms, noise = [], torch.zeros(len(seeds) * K, *shape.latent_shape)
    for b, parts in enumerate(seeds):
        row = generator(*parts)
        uniforms.append(torch.rand(K, generator=row))
        noise[b * K : b * K + images[b]] = torch.randn(int(images[b]), *shape.latent_shape, generator=row)
    return torch.cat(uniforms), noise
