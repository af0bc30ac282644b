"""Validation rows hold all held-out documents in file order, without chance, whatever the ranks and batches."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch

from tfusion.data.validation import GIVEN_IMAGE, ValidationRows, caption_documents, text_documents
from tfusion.sequence import BOS_ID, EOS_ID, IGNORE_INDEX, Image, RowShape

SHAPE = RowShape(28, 4, 4, (3, 8, 8), (3, 8, 8))


def rows_of(batch) -> list[tuple]:
    """Each row's contents, with slots counted within the row."""
    slots = SHAPE.max_images
    rows = []
    for b in range(len(batch.token_ids)):
        mine = slice(b * slots, (b + 1) * slots)
        ids = torch.where(batch.image_ids[b] >= 0, batch.image_ids[b] - b * slots, -1)
        tensors = [batch.token_ids[b], batch.document_ids[b], ids, batch.position_ids[b]]
        tensors += [getattr(batch, n)[mine] for n in ("image_valid", "image_starts", "noise_limits")]
        tensors += [getattr(batch, n)[mine] for n in ("time_uniforms", "noise", "images")]
        rows.append(hashlib.md5(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest())
    return rows


@pytest.fixture
def views(texts, pictures, byte_tokenizer):
    """Makes a view's documents anew."""
    held_out = pictures.load("val")
    return {
        "lines": lambda: text_documents(texts.load("val"), byte_tokenizer, 10**6),
        "tiles": lambda: caption_documents(held_out, byte_tokenizer, False, 100),
        "tiles" + GIVEN_IMAGE: lambda: caption_documents(held_out, byte_tokenizer, True, 100),
    }


def test_documents_are_whole_and_in_file_order(texts, pictures, byte_tokenizer, views) -> None:
    documents = list(views["lines"]())
    assert [byte_tokenizer.decode(d.elements[0]) for d in documents] == texts.load("val")
    assert all(d.bos and d.eos and d.next_id is None for d in documents)
    for view, image_first in (("tiles", False), ("tiles" + GIVEN_IMAGE, True)):
        documents = list(views[view]())
        assert len(documents) == 5
        for document, picture in zip(documents, pictures.load("val"), strict=True):
            image, caption = document.elements if image_first else document.elements[::-1]
            assert isinstance(image, Image)
            assert torch.equal(image.data, picture.image)
            assert image.noise_limit == (0 if image_first else 1)
            assert byte_tokenizer.decode(caption) == picture.captions[0]
    assert len(list(caption_documents(pictures.load("val"), byte_tokenizer, True, 3))) == 3
    alone = [document.elements for document in caption_documents(pictures.load("val"), None, False, 3)]
    assert [len(elements) for elements in alone] == [1, 1, 1]


def test_labels_are_those_of_the_whole_texts(texts, byte_tokenizer, views) -> None:
    """EOS in, no id twice, none lost where a row ends."""
    rows = ValidationRows("lines", views["lines"](), SHAPE, 0, 0, 1)
    batch = rows.collate([rows[n] for n in range(len(rows))])
    labelled = batch.text_labels != IGNORE_INDEX
    inputs = batch.token_ids.flatten()[batch.text_positions][labelled].tolist()
    expected = []
    for text in texts.load("val"):
        ids = [BOS_ID, *byte_tokenizer.encode(text), EOS_ID]
        expected += itertools.pairwise(ids)
    assert list(zip(inputs, batch.text_labels[labelled].tolist(), strict=True)) == expected


@pytest.mark.parametrize("ranks", [2, 3, 50])
@pytest.mark.parametrize("view", ["lines", "tiles", "tiles" + GIVEN_IMAGE])
def test_rows_over_ranks_are_those_of_one(views, view: str, ranks: int) -> None:
    def contents(rank: int, ranks: int, batch_size: int) -> list[tuple]:
        rows = ValidationRows(view, views[view](), SHAPE, 5, rank, ranks)
        numbers = range(0, len(rows), batch_size)
        batches = [rows.collate([rows[n] for n in range(at, min(at + batch_size, len(rows)))]) for at in numbers]
        return [row for batch in batches for row in rows_of(batch)]

    one = contents(0, 1, 100)
    assert len(set(one)) == len(one) >= 2
    assert contents(0, 1, 1) == contents(0, 1, 3) == one
    divided = [contents(rank, ranks, 2) for rank in range(ranks)]
    assert len({len(rows) for rows in divided}) == 1, "a rank with fewer batches would hang the others"
    merged = [divided[n % ranks][n // ranks] for n in range(ranks * len(divided[0]))]
    assert merged[: len(one)] == one
    for rank in range(ranks):  # what is left over is padding, without weight
        rows = ValidationRows(view, views[view](), SHAPE, 5, rank, ranks)
        for number, documents in (rows[n] for n in range(len(rows))):
            assert (number >= len(one)) == (documents == [])
    empty = ValidationRows(view, iter(()), SHAPE, 5, 0, 1).collate([(9, [])])
    assert (empty.text_labels == IGNORE_INDEX).all()
    assert not empty.image_valid.any()


def test_noise_is_fixed_by_seed_view_and_row(views) -> None:
    def noise(view: str, seed: int) -> torch.Tensor:
        rows = ValidationRows(view, views["tiles"](), SHAPE, seed, 0, 1)
        return rows.collate([rows[0], rows[1]]).noise

    assert torch.equal(noise("tiles", 0), noise("tiles", 0))
    rows = [*noise("tiles", 0).chunk(2), noise("tiles", 1)[:4], noise("other", 0)[:4]]
    assert all(not torch.equal(rows[a], rows[b]) for a in range(4) for b in range(a))
