"""Rows are full, hold their share of images, lose no text, and go on from any position as if never stopped."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tfusion.data.corpora import CaptionedImage
from tfusion.data.mixture import (
    LOOK_AHEAD,
    SHARE_UNIT,
    CaptionedDocuments,
    Mixture,
    Stream,
    StreamPosition,
)
from tfusion.data.order import element
from tfusion.data.text_pieces import TextPieces, cut_text
from tfusion.sequence import BOS_ID, EOS_ID, IGNORE_INDEX, Document, Image, RowShape, collate

P = 4


def shape_of(seq_len: int, max_images: int | None = None) -> RowShape:
    slots = seq_len // (P + 2) if max_images is None else max_images
    return RowShape(seq_len, P, slots, (3, 8, 8), (3, 8, 8))


@pytest.fixture
def make_mixture(byte_tokenizer, pictures, texts):
    """`make_mixture(seq_len=64, image_share=0.5, streams=1, ...)` over the tiny corpora or others."""

    def make(
        seq_len: int = 64,
        image_share: float = 0.5,
        streams: int = 1,
        text: Sequence[str] | None = texts.load("train"),
        images: Sequence[CaptionedImage] | None = pictures.load("train"),
        max_bytes: int = 2048,
        max_images: int | None = None,
        shares: tuple[float, float, float] = (0.8, 0.1, 0.5),
    ) -> Mixture:
        return Mixture(
            None if text is None else TextPieces([text], byte_tokenizer, max_bytes),
            None if images is None else CaptionedDocuments(images, byte_tokenizer, 0, *shares),
            shape_of(seq_len, max_images),
            image_share,
            0,
            streams,
        )

    return make


def rows_of(mixture: Mixture, number: int, count: int, position: tuple = ()) -> tuple[list, list[StreamPosition]]:
    stream, rows, positions = Stream(mixture, number, StreamPosition(*position)), [], []
    for _ in range(count):
        rows.append(stream.next_row())
        positions.append(stream.position)
    return rows, positions


def used(row: Sequence[Document]) -> int:
    return sum(document.length(P) for document in row)


def described(document: Document) -> tuple[Any, ...]:
    """All that a document says, comparable."""
    parts = [
        (hashlib.md5(e.data.numpy().tobytes()).hexdigest(), e.noise_limit) if isinstance(e, Image) else tuple(e)
        for e in document.elements
    ]
    return (*parts, document.bos, document.eos, document.next_id)


# Full rows and the share of images


@pytest.mark.parametrize("image_share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("seq_len", [41, 64, 256])
def test_rows_are_exactly_full(make_mixture, image_share: float, seq_len: int) -> None:
    mixture = make_mixture(seq_len, image_share, streams=3)
    for stream in range(3):
        rows, _ = rows_of(mixture, stream, 100)
        assert {used(row) for row in rows} == {seq_len}


def test_rows_of_text_alone_are_exactly_full(make_mixture) -> None:
    rows, _ = rows_of(make_mixture(64, 0.5, images=None), 0, 100)
    assert {used(row) for row in rows} == {64}


@pytest.mark.parametrize("image_share", [0.1, 0.5, 0.9])
def test_share_of_images_is_within_one_document(make_mixture, image_share: float) -> None:
    """At every row: the deficit is what it says, and no more than a row (a text's part of it) and an image."""
    mixture = make_mixture(256, image_share, streams=2)
    rows, positions = rows_of(mixture, 1, 300)
    images = total = 0
    for row, position in zip(rows, positions, strict=True):
        images += sum(document.length(P) for document in row if document.images)
        total += used(row)
        assert position.deficit == pytest.approx((image_share * total - images) * SHARE_UNIT)
        assert -30 * SHARE_UNIT < position.deficit < (256 + 30) * SHARE_UNIT
    assert images / total == pytest.approx(image_share, abs=0.005)


def test_whole_share_leaves_gaps_to_text_only(make_mixture) -> None:
    """Target 1: text only where the next image document has no room, so at most one of it a row, at its end."""
    rows, _ = rows_of(make_mixture(256, 1.0), 0, 200)
    images = sum(document.length(P) for row in rows for document in row if document.images)
    assert images / (200 * 256) > 0.93
    for row in rows:
        with_images = [bool(document.images) for document in row]
        assert with_images == sorted(with_images, reverse=True)
        assert sum(document.length(P) for document in row if not document.images) < 30


def test_images_are_never_cut_nor_over_the_slots(make_mixture) -> None:
    rows, _ = rows_of(make_mixture(64, 0.9, max_images=2), 0, 200)
    counts = Counter(sum(len(document.images) for document in row) for row in rows)
    assert set(counts) <= {0, 1, 2}
    assert all(document.bos and document.eos for row in rows for document in row if document.images)


# Text


def test_cut_text_keeps_everything_and_cuts_at_line_ends() -> None:
    lines = [f"line {n} é\n" * (n % 4) + "\n" * (n % 3) for n in range(60)]
    for text in (
        "",
        "\n",
        "no end",
        "x" * 500 + "\ny",
        "a\r\nb\r\n\r\nc",
        "".join(lines),
        "".join(lines) + "tail",
    ):
        for most in (1, 7, 64, 10_000):
            data = text.encode()
            spans = cut_text(data, most)
            assert b"".join(data[start:end] for start, end in spans) == data
            for start, end in spans:
                assert 0 < end - start <= max(most, 2), "a character of two bytes is a piece"
                assert data[start:end].decode()
                if end == len(data):
                    continue
                line_end = (data.find(b"\n", end) + 1) or len(data)
                if data[end - 1 : end] == b"\n":
                    assert line_end - start > most, "another line would have fitted"
                else:
                    assert b"\n" not in data[start:end], "only a line that is too long is cut within"
                    assert line_end - start > most


def test_a_line_that_is_too_long_is_cut_at_spaces_or_between_characters() -> None:
    def pieces(text: str, most: int) -> list[str]:
        data = text.encode()
        return [data[start:end].decode() for start, end in cut_text(memoryview(data), most)]

    assert pieces("one two three\nfour\n", 8) == ["one two ", "three\n", "four\n"]
    assert pieces("éééé", 3) == ["é", "é", "é", "é"]
    assert pieces("漢漢", 1) == ["漢", "漢"]
    assert pieces("x" * 10, 4) == ["xxxx", "xxxx", "xx"]


def labelled_pairs(row: Sequence[Document], shape: RowShape, of_texts: bool) -> list[tuple[int, int]]:
    """(input id, label) of all labelled positions in documents without an image (or with one)."""
    batch = collate([row], shape, [("noise", 0)])
    pairs = []
    for position, label in zip(batch.text_positions.tolist(), batch.text_labels.tolist(), strict=True):
        if label != IGNORE_INDEX and (not row[batch.document_ids[0, position]].images) == of_texts:
            pairs.append((batch.token_ids[0, position].item(), label))
    return pairs


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("with_images", [True, False])
def test_no_target_of_a_text_is_lost(make_mixture, byte_tokenizer, texts, streams: int, with_images: bool) -> None:
    """Over an epoch, cut by pieces, rows and images, each text gives the labels of `[BOS] text [EOS]` uncut."""
    source, max_bytes = texts.load("train"), 300
    encoded = [text.encode() for text in source]
    pieces = [(n, data[a:b].decode()) for n, data in enumerate(encoded) for a, b in cut_text(data, max_bytes)]
    overrides = {} if with_images else {"images": None}
    mixture = make_mixture(64, 0.5, streams, max_bytes=max_bytes, **overrides)
    assert len(mixture.texts) == len(pieces) > 15

    emitted: dict[int, list[tuple[int, int]]] = {}
    for stream in range(streams):
        rows, _ = rows_of(mixture, stream, 800 // streams)
        assert all(document.bos or document.elements[0] for row in rows for document in row), "a lone EOS"
        pairs = [pair for row in rows for pair in labelled_pairs(row, mixture.shape, of_texts=True)]
        at = 0
        for index in range(stream, len(pieces), streams):  # the stream's elements of epoch 0
            piece = element("text", len(pieces), 0, index)[1]
            first = piece == 0 or pieces[piece - 1][0] != pieces[piece][0]
            count = len(byte_tokenizer.encode(pieces[piece][1])) + first  # inputs: its tokens, and BOS
            emitted[piece] = pairs[at : at + count]
            at += count
        assert at <= len(pairs), "too few rows for an epoch"

    whole = []
    for text in source:
        ids = [BOS_ID, *byte_tokenizer.encode(text), EOS_ID] if text else []
        whole += itertools.pairwise(ids)
    assert [pair for piece in range(len(pieces)) for pair in emitted[piece]] == whole


def test_pieces_are_a_function_of_their_place(make_mixture, byte_tokenizer) -> None:
    text = "".join(f"{n}\n" for n in range(50))
    pieces = TextPieces([[text, "other\n"]], byte_tokenizer, 40)
    documents = [pieces[n] for n in range(len(pieces))]
    assert [d.bos for d in documents] == [True, *[False] * (len(pieces) - 2), True]
    assert [d.eos for d in documents] == [*[False] * (len(pieces) - 2), True, True]
    for document, following in itertools.pairwise(documents[:-1]):
        assert document.next_id == following.elements[0][0]
    assert documents[-2].next_id is documents[-1].next_id is None


# Captioned pictures


def test_shares_of_caption_first_and_drop(byte_tokenizer, pictures) -> None:
    documents = CaptionedDocuments(pictures.load("train"), byte_tokenizer, 1, 0.8, 0.1, 0.5)
    first = last = dropped = 0
    for epoch in range(600):
        for index in range(11):
            elements = documents.get(epoch, index).elements
            image = next(e for e in elements if isinstance(e, Image))
            if len(elements) == 1:
                dropped += 1
            elif isinstance(elements[1], Image):
                first += 1
            else:
                last += 1
                assert len(elements[1]) > 0, "an image-first document keeps its caption"
            image_first = len(elements) == 2 and elements[0] is image
            assert image.noise_limit == (0.5 if image_first else 1.0)
    total = 600 * 11
    assert (first + dropped) / total == pytest.approx(0.8, abs=0.015)
    assert dropped / (first + dropped) == pytest.approx(0.1, abs=0.012)


def test_shares_at_their_ends(byte_tokenizer, pictures) -> None:
    for shares, kind in (
        ((1.0, 0.0, 1.0), (False, True)),
        ((0.0, 1.0, 1.0), (True, False)),
        ((1.0, 1.0, 1.0), (True,)),
    ):
        documents = CaptionedDocuments(pictures.load("train"), byte_tokenizer, 0, *shares)
        for epoch in range(20):
            elements = documents.get(epoch, 3).elements
            assert tuple(isinstance(e, Image) for e in elements) == kind


def test_caption_is_chosen_by_epoch(byte_tokenizer, pictures) -> None:
    corpus = pictures.load("train")
    documents = CaptionedDocuments(corpus, byte_tokenizer, 0, 1.0, 0.0, 1.0)
    counts = Counter(byte_tokenizer.decode(documents.get(epoch, 2).elements[0]) for epoch in range(400))
    assert set(counts) == set(corpus[2].captions)
    assert min(counts.values()) > 150
    assert described(documents.get(7, 2)) == described(documents.get(7, 2))
    choices = {tuple(len(documents.get(epoch, n).elements[0]) > 8 for n in range(11)) for epoch in range(20)}
    assert len(choices) > 10, "pictures choose apart from each other"


# Positions


@pytest.mark.parametrize("kind", ["both", "text", "images"])
def test_goes_on_from_any_position(make_mixture, kind: str) -> None:
    overrides = {"both": {}, "text": {"images": None}, "images": {"text": None}}[kind]
    mixture = make_mixture(48, 0.5, streams=2, **overrides)
    rows, positions = rows_of(mixture, 1, 120)
    expected = [[described(document) for document in row] for row in rows]
    for done in [1, 2, 3, *range(4, 110, 7)]:
        position = tuple(positions[done - 1])
        again, later = rows_of(mixture, 1, 6, position)
        assert [[described(document) for document in row] for row in again] == expected[done : done + 6]
        assert later == positions[done : done + 6]
    assert all(isinstance(n, int) for n in positions[-1][:5])
    assert positions[-1].rows == 120


# Pictures without text


def test_best_fit_fills_rows_and_loses_no_document(make_mixture) -> None:
    mixture = make_mixture(128, 1.0, streams=2, text=None)
    for stream in range(2):
        rows, positions = rows_of(mixture, stream, 200)
        assert sum(used(row) for row in rows) / (200 * 128) >= 0.95
        assert max(used(row) for row in rows) <= 128
        position = positions[-1]
        assert len(position.pending) < LOOK_AHEAD + 1
        placed = set(range(position.images)) - set(position.pending)
        expected = Counter(described(mixture.image(stream, n)) for n in placed)
        assert Counter(described(document) for row in rows for document in row) == expected
        # each row takes the oldest, so none waits for more than LOOK_AHEAD rows
        assert position.images - min(position.pending) <= LOOK_AHEAD * max(map(len, rows))


class Counted(Sequence):
    """Pictures whose captions are known without them."""

    def __init__(self, pictures: Sequence[CaptionedImage]) -> None:
        self.pictures, self.read = pictures, []

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> CaptionedImage:
        self.read.append(index)
        return self.pictures[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.pictures[index].captions


def test_what_waits_is_not_read(make_mixture, pictures) -> None:
    """A picture is read when it is placed, and none is kept."""
    counted = Counted(pictures.load("train"))
    mixture = make_mixture(128, 1.0, text=None, images=counted)
    stream = Stream(mixture, 0, StreamPosition())
    rows = [stream.next_row() for _ in range(9)]
    assert len(counted.read) == sum(map(len, rows))
    assert all(image.data.numel() == 192 for row in rows for document in row for image in document.images)
    assert len(stream._pending) == LOOK_AHEAD
    assert all(image.data.numel() == 0 for document in stream._pending.values() for image in document.images)


# Documents that no row can hold


def long_caption(number: int, length: int) -> CaptionedImage:
    image = torch.full((3, 8, 8), number, dtype=torch.uint8)
    return CaptionedImage(f"long-{number}", image, ("x" * length,))


@pytest.mark.parametrize("with_text", [True, False])
def test_too_long_documents_are_skipped_and_named(make_mixture, pictures, caplog, with_text: bool) -> None:
    corpus = [*pictures.load("train"), long_caption(200, 57), long_caption(201, 56)]  # 65 and 64 positions
    overrides = {} if with_text else {"text": None}
    mixture = make_mixture(64, 0.5, images=corpus, shares=(1.0, 0.0, 1.0), **overrides)
    with caplog.at_level(logging.WARNING, logger="tfusion"):
        rows, _ = rows_of(mixture, 0, 150)
    values = [d.images[0].data[0, 0, 0].item() for row in rows for d in row if len(d.elements[0]) > 50 and d.images]
    assert values
    assert set(values) == {201}
    assert "skipped picture long-200: its document takes 65 positions, rows have 64" in caplog.text


@pytest.mark.parametrize("with_text", [True, False])
def test_only_too_long_documents_are_refused(make_mixture, with_text: bool) -> None:
    corpus = [long_caption(n, 60) for n in range(3)]
    overrides = {} if with_text else {"text": None}
    mixture = make_mixture(64, 0.5, images=corpus, shares=(1.0, 0.0, 1.0), **overrides)
    with pytest.raises(ValueError, match="image documents.*longer than seq_len.*raise"):
        rows_of(mixture, 0, 1)
