"""From corpora to what a run trains on: loaded, tokenised, checked against the model, before any time is spent."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Protocol

from tfusion.data.bad_records import BadRecords
from tfusion.data.corpora import CaptionedImage, ImageCorpus, TextCorpus
from tfusion.data.sources import Concatenated, captions_of, load_split
from tfusion.sequence import RowShape
from tfusion.tokenizers.text import TextTokenizer

log = logging.getLogger(__name__)

CAPTIONS_FOR_TOKENIZER = 10_000  # pictures of all corpora whose captions a tokenizer is trained on
BYTES_FOR_TOKENIZER = 50_000_000  # of all texts; more change little


class Sizes(Protocol):
    """What a LightningModule says of its model to the data; `noise_shape`, too, where that is not `latent_shape`."""

    max_seq_len: int
    num_patches: int
    latent_shape: tuple[int, int, int] | None
    model_vocab_size: int
    image_tokenizer: Any


def load_texts(corpora: Sequence[TextCorpus]) -> list[Sequence[str]]:
    """The training texts of each corpus."""
    loaded = []
    for corpus in corpora:
        texts = load_split(corpus, "train")
        stored = hasattr(texts, "utf8")  # checked when it was read
        if not stored and not any(texts):
            raise ValueError(f"corpus {corpus.name!r} has only empty texts in its split 'train': give it more data")
        loaded.append(texts)
    return loaded


def count_bad_records(corpora: Sequence[ImageCorpus | TextCorpus], max_share: float) -> BadRecords:
    """Those of corpora of files; raises ValueError where they are too many."""
    found = BadRecords(max_share)
    for corpus in corpora:
        for table in corpus.tables() if hasattr(corpus, "tables") else []:
            found.add(table.bad, corpus.name, len(table.dataset))
            if not len(table.rows):
                raise ValueError(
                    f"corpus {corpus.name!r}: all {len(table.dataset)} records are bad:\n{found.summary(corpus.name)}"
                )
    found.check()
    return found


def make_tokenizer(
    file: str | None, texts: Sequence[Sequence[str]], pictures: Sequence[CaptionedImage], vocab_size: int
) -> TextTokenizer:
    """A tokenizer from a file, or trained on enough of the corpora to learn from."""
    if file is not None:
        return TextTokenizer.from_file(file)
    # Reading a caption may mean drawing its picture.
    captions = [c for some in first_captions(pictures, CAPTIONS_FOR_TOKENIZER) for c in some]
    some, room = [], BYTES_FOR_TOKENIZER
    for corpus in texts:
        room_here = room // max(1, len(texts))
        for text in corpus:
            if room_here <= 0:
                break
            some.append(text if len(text) <= room_here else text[:room_here])
            room_here -= len(text)
    return TextTokenizer.train([*some, *captions], vocab_size)


def first_captions(pictures: Sequence[CaptionedImage], most: int) -> list[tuple[str, ...]]:
    """Captions of the first pictures of each corpus, at most so many pictures in all."""
    parts = pictures.parts if isinstance(pictures, Concatenated) else [pictures]
    return [captions_of(part, i) for part in parts for i in range(min(len(part), most // len(parts)))]


def check_vocab_size(tokenizer: TextTokenizer, wanted: int) -> None:
    """Raise ValueError unless tokenizer and model agree."""
    if tokenizer.vocab_size != wanted:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {wanted}: "
            f"set model vocab_size to {tokenizer.vocab_size}, or data.vocab_size to {wanted}"
        )


def row_shape(
    seq_len: int, image_size: int | None, max_images_per_row: int | None, sizes: Sizes, encoded: bool = False
) -> RowShape:
    """The static sizes of a row, of latents where pictures are `encoded`; ValueError where model and data differ."""
    if seq_len > sizes.max_seq_len:
        raise ValueError(
            f"data.seq_len {seq_len} is longer than the model's max_seq_len {sizes.max_seq_len}: make them equal"
        )
    if image_size is not None and sizes.latent_shape is None:
        raise ValueError(
            "data.image_corpora are given, but the model has no latent_shape, so it is one of text alone: leave them "
            "out (in an overlay: data.image_corpora null), or give the model a latent_shape and patch_size"
        )
    latents = None if image_size is None else tuple(sizes.image_tokenizer.latent_shape(image_size))
    if latents is not None and latents != sizes.latent_shape:
        raise ValueError(
            f"pictures of {image_size} x {image_size} become latents of {latents}, the model's latent_shape is "
            f"{sizes.latent_shape}: make them equal"
        )
    most = most_images(seq_len, sizes.num_patches)
    if image_size is not None and most == 0:
        raise ValueError(
            f"data.seq_len {seq_len} is shorter than one image of {sizes.num_patches} patches and its "
            f"markers: take at least {sizes.num_patches + 4} plus the longest caption, or larger patches"
        )
    slots = most if max_images_per_row is None else max_images_per_row
    image_shape = None if image_size is None or encoded else (3, image_size, image_size)
    noise_shape = getattr(sizes, "noise_shape", sizes.latent_shape) or (0, 0, 0)
    return RowShape(seq_len, sizes.num_patches, slots if image_size else 0, noise_shape, image_shape)


def drop_long_captions(
    pictures: Concatenated, tokenizer: TextTokenizer, shape: RowShape, bad: BadRecords
) -> Concatenated:
    """Without captions that fit no row, where a corpus can tell without reading its pictures."""
    most = shape.seq_len - shape.num_patches - 4  # BOS, BOI, EOI, EOS
    parts = []
    for part in pictures.parts:
        if hasattr(part, "drop_long_captions"):
            part, records = part.drop_long_captions(
                most, lambda captions: list(map(len, tokenizer.encode_batch(captions)))
            )
            bad.add(records)
        parts.append(part)
    bad.check()
    return Concatenated(parts)


def check_some_left(corpora: Sequence[ImageCorpus], pictures: Concatenated, shape: RowShape, bad: BadRecords) -> None:
    """Raise ValueError for a corpus of whose captions none fits a row."""
    for corpus, part in zip(corpora, pictures.parts, strict=True):
        if not len(part):
            raise ValueError(
                f"corpus {corpus.name!r}: no caption fits a row of data.seq_len {shape.seq_len}: raise it, or take "
                f"larger patches:\n{bad.summary(corpus.name)}"
            )


def mean_length(
    pictures: Concatenated, tokenizer: TextTokenizer, shape: RowShape, weights: Sequence[float] | None
) -> float:
    """Positions of an image document on average, over the first pictures of each corpus.

    Averages are of captions and corpora as training takes them (`weights`; None = by their sizes).

    Raises:
        ValueError: one of the first thousand documents fits no row.
    """
    around = shape.num_patches + 4  # BOS, BOI, EOI, EOS
    means = []
    for part in pictures.parts:
        captions = first_captions(part, 1000 // len(pictures.parts))
        lengths = [list(map(len, tokenizer.encode_batch(of_picture))) for of_picture in captions]
        longest = around + max(map(max, lengths))
        if longest > shape.seq_len:
            raise ValueError(
                f"an image document takes {longest} positions, data.seq_len is {shape.seq_len}: "
                f"raise it to at least {longest}, or take larger patches"
            )
        means.append(fmean(map(fmean, lengths)))
    return around + fmean(means, weights or list(map(len, pictures.parts)))


def fit_rows(shape: RowShape, mean: float, image_share: float, alone: bool, given: bool) -> tuple[RowShape, RowShape]:
    """The rows of training and of validation, with image slots for what stands in them.

    Every slot costs an encoder and an adapter, full or empty. Where their number is not `given`, it is in training half
    as many again as the share of images takes on average, for streams to catch up behind long texts; in validation,
    whose rows hold one kind of document, as many as fit on average. Where pictures are `alone`, as many as can fit at
    all, for then text does not fill the rest of a row. `mean`: positions of an image document (`mean_length`).

    Raises:
        ValueError: the slots given are fewer than fit, and too few for the share.
    """
    most = most_images(shape.seq_len, shape.num_patches)
    validation = shape
    if not given and not alone:
        fitting = shape.seq_len / mean
        validation = dataclasses.replace(shape, max_images=min(most, math.ceil(fitting)))
        shape = dataclasses.replace(shape, max_images=min(most, math.ceil(1.5 * image_share * fitting)))
    if shape.max_images < most and shape.max_images * mean / shape.seq_len < 0.9 * image_share:
        lower = "" if alone else ", or lower the latter"
        raise ValueError(
            f"data.max_images_per_row {shape.max_images} fills about {shape.max_images * mean / shape.seq_len:.0%} of "
            f"a row, data.image_share asks for {image_share:.0%}: raise the former (null: as many as it takes){lower}"
        )
    reached = max(1, min(shape.max_images, shape.seq_len // mean)) * mean / shape.seq_len  # documents are whole
    if reached < 0.9 * image_share:
        log.info(
            "image documents, whole and of %d positions on average, fill about %.0f %% of rows of %d, where %.0f %% is "
            "asked for; %s; a longer data.seq_len holds more (check_data packs some rows and says how they are filled)",
            *(mean, 100 * reached, shape.seq_len, 100 * image_share),
            "the rest stays empty" if alone else "text fills the rest",
        )
    return shape, validation


def most_images(seq_len: int, num_patches: int) -> int:
    """As many images with their markers as fit a row."""
    return seq_len // (num_patches + 2)
