"""Labels equal a per-position loop, packing loses nothing, and a batch's shape is always the same."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tfusion.randomness import generator
from tfusion.sequence import (
    BOI_ID,
    BOS_ID,
    EOI_ID,
    EOS_ID,
    IGNORE_INDEX,
    PAD_ID,
    Batch,
    Document,
    Image,
    Row,
    RowShape,
    collate,
    pack,
)

LATENT, P, T, K = (2, 4, 4), 4, 24, 3
SHAPE = RowShape(T, P, K, LATENT, None)


def picture(seed: int, limit: float = 1.0) -> Image:
    return Image(torch.randn(LATENT, generator=torch.Generator().manual_seed(seed)), limit)


def random_documents(seed: int, count: int, first_id: int = 5) -> list[Document]:
    """Text of any length, images anywhere in short documents, pieces of longer texts; no id occurs twice."""
    rng = np.random.default_rng(seed)
    ids = iter(range(first_id, 10**6))
    documents = []
    for _ in range(count):
        if rng.random() < 0.4:
            elements: list = []
            for _ in range(rng.integers(1, 3)):
                text = [next(ids) for _ in range(rng.integers(0, 4))]
                image = picture(int(rng.integers(1000)), float(rng.choice([0.0, 0.5, 1.0])))
                elements += [text, image] if rng.random() < 0.5 else [image, text]
            documents.append(Document(tuple(elements)))
            continue
        parts = tuple([next(ids) for _ in range(rng.integers(1, 40))] for _ in range(rng.integers(1, 3)))
        eos = bool(rng.random() < 0.6)
        documents.append(Document(parts, bool(rng.random() < 0.6), eos, None if eos else next(ids)))
    return documents


def expand(document: Document) -> list[tuple[str, int]]:
    """(kind, id) of each position: the document read aloud."""
    items = [("bos", BOS_ID)] if document.bos else []
    for element in document.elements:
        if isinstance(element, Image):
            items += [("boi", BOI_ID), *[("patch", PAD_ID)] * P, ("eoi", EOI_ID)]
        else:
            items += [("text", int(i)) for i in element]
    return items + ([("eos", EOS_ID)] if document.eos else [])


def labels_of(document: Document) -> list[int]:
    """The rule, a position at a time."""
    items = expand(document)
    labels = []
    for n, (kind, _) in enumerate(items):
        if kind in ("boi", "patch"):
            labels.append(IGNORE_INDEX)
        elif n + 1 < len(items):
            labels.append(items[n + 1][1])
        else:
            labels.append(IGNORE_INDEX if document.next_id is None else document.next_id)
    return labels


def labels_of_batch(batch: Batch) -> torch.Tensor:
    """(B, T) from the flat positions; each labelled once, padding at position 0 without a label."""
    labels = torch.full((batch.token_ids.numel(),), IGNORE_INDEX)
    real = batch.text_labels != IGNORE_INDEX
    assert len(set(batch.text_positions[real].tolist())) == int(real.sum())
    assert (batch.text_positions[~real] == 0).all()
    assert not (~real).int().diff().lt(0).any()
    labels[batch.text_positions[real]] = batch.text_labels[real]
    return labels.view(batch.token_ids.shape)


def make(rows: list[list[Document]], shape: RowShape = SHAPE) -> Batch:
    return collate(rows, shape, [(0, 0, b) for b in range(len(rows))])


# Layout and labels.


@pytest.mark.parametrize("seed", range(6))
def test_every_position_of_random_rows(seed: int) -> None:
    rows = list(pack(random_documents(seed, 30), SHAPE))
    batch = make(rows)
    labels = labels_of_batch(batch)
    for b, documents in enumerate(rows):
        t, images = 0, 0
        for d, document in enumerate(documents):
            expected = labels_of(document)
            for n, (kind, token) in enumerate(expand(document)):
                if kind == "boi":
                    slot, images = b * K + images, images + 1
                    assert batch.image_valid[slot]
                    assert batch.image_starts[slot] == t + 1
                assert batch.image_ids[b, t] == (slot if kind == "patch" else -1)
                assert batch.token_ids[b, t] == token
                assert batch.document_ids[b, t] == d
                assert batch.position_ids[b, t] == n
                assert labels[b, t] == expected[n]
                t += 1
        assert (batch.document_ids[b, t:] == -1).all()
        assert (batch.token_ids[b, t:] == PAD_ID).all()
        assert (labels[b, t:] == IGNORE_INDEX).all()
        assert (batch.image_ids[b, t:] == -1).all()
        assert (batch.position_ids[b, t:] == 0).all()
        pictures = [image for document in documents for image in document.images]
        assert images == len(pictures)
        for n in range(K):  # slot b K + n is the row's n-th image, the rest is empty
            slot = b * K + n
            assert batch.image_rows[slot] == b
            assert batch.image_valid[slot] == (n < images)
            assert batch.noise_limits[slot] == (pictures[n].noise_limit if n < images else 1)
            assert torch.equal(batch.latents[slot], pictures[n].data if n < images else torch.zeros(LATENT))
    assert not batch.hidden.any()


def test_labels_of_one_document_by_hand() -> None:
    batch = make([[Document(([7, 8], picture(0), [9]))]])
    no = IGNORE_INDEX
    # BOS 7 8 BOI patches EOI 9 EOS: BOI is a label, EOI never is, and EOI predicts what follows
    assert labels_of_batch(batch)[0, :11].tolist() == [7, 8, BOI_ID, no, no, no, no, no, 9, EOS_ID, no]
    assert not (batch.text_labels == EOI_ID).any()


@pytest.mark.parametrize("bos", [True, False])
def test_length_is_the_number_of_positions(bos: bool) -> None:
    for document in [
        *random_documents(1, 20),
        Document(()),
        Document(([],)),
        Document((picture(0), picture(1))),
    ]:
        document = dataclasses.replace(document, bos=bos)
        assert document.length(P) == len(expand(document))


# Cutting and packing.


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("end", [{"eos": True}, {"eos": False, "next_id": 99}, {"eos": False}])
@pytest.mark.parametrize(
    "elements", [([5, 6, 7, 8, 9],), ([5, 6], [7], [8, 9]), ([5],), (np.array([5, 6, 7], np.uint16),)]
)
def test_cut_at_every_place(elements, end: dict, bos: bool) -> None:
    """From just after BOS to just before EOS: the parts in a row say what the whole says, label for label."""
    document = Document(elements, bos=bos, **end)
    items, labels = expand(document), labels_of(document)
    for room in range(1, len(items)):
        head, rest = document.cut(room)
        assert head.length(P) == room
        assert head.bos == bos
        assert not head.eos
        parts = [head] if rest is None else [head, rest]
        seen = [item for part in parts for item in expand(part)]
        said = [label for part in parts for label in labels_of(part)]
        if rest is None:  # EOS alone was left: as input it predicts nothing, as label it is the head's
            assert items[room:] == [("eos", EOS_ID)]
            assert labels[room:] == [IGNORE_INDEX]
            items_left, labels_left = items[:room], labels[:room]
        else:
            assert not rest.bos
            assert rest.eos == document.eos
            assert rest.length(P) == len(items) - room
            items_left, labels_left = items, labels
        assert (seen, said) == (items_left, labels_left), room


def targets(documents: list[Document]) -> Counter:
    """How often each (input id, label) is trained on."""
    pairs: Counter = Counter()
    for document in documents:
        for (_, token), label in zip(expand(document), labels_of(document), strict=True):
            pairs[token, label] += label != IGNORE_INDEX
    return +pairs


@pytest.mark.parametrize("seed", range(6))
def test_packing_loses_nothing_and_keeps_the_order(seed: int) -> None:
    """Pieces put together again are the documents; the batch trains on each target exactly once."""
    documents = random_documents(seed, 60)
    rows = list(pack(documents, SHAPE))
    pieces = iter([piece for row in rows for piece in row])
    cuts = 0
    for document in documents:
        piece = next(pieces)
        if piece is document:
            continue
        assert not document.images
        parts = [piece]
        while not (parts[-1].eos or parts[-1].next_id in (EOS_ID, document.next_id)):
            parts.append(next(pieces))
        cuts += len(parts) - 1
        items = [item for part in parts for item in expand(part)]
        if document.eos and not parts[-1].eos:
            items.append(("eos", EOS_ID))
        assert items == expand(document)
        assert parts[0].bos == document.bos
        assert not any(part.bos for part in parts[1:])
        for a, b in itertools.pairwise(parts):
            assert a.next_id == b.elements[0][0]
            assert not a.eos
    assert next(pieces, None) is None
    assert cuts > 10

    batch = make(rows)
    at = batch.token_ids.view(-1)[batch.text_positions]
    labelled = batch.text_labels != IGNORE_INDEX
    trained = Counter(zip(at[labelled].tolist(), batch.text_labels[labelled].tolist(), strict=True))
    assert trained == targets(documents)


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_full_where_text_follows(seed: int) -> None:
    rows = list(pack(random_documents(seed, 60), SHAPE))
    for row, after in itertools.pairwise(rows):
        used = sum(document.length(P) for document in row)
        assert used <= T
        assert sum(len(document.images) for document in row) <= K
        if not after[0].images:
            assert used == T
        else:  # its slots or positions did not suffice
            filled = Row(SHAPE, list(row), used, sum(len(document.images) for document in row))
            assert not filled.fits(after[0])


@pytest.mark.parametrize("length", [T - 2, T - 1, T, T + 1, 2 * T - 2, 2 * T - 1])
def test_documents_about_as_long_as_a_row(length: int) -> None:
    """EOS may end a row, or be the label of its end; it never starts one."""
    document = Document((list(range(5, 5 + length)),))
    rows = list(pack([document], SHAPE))
    assert len(rows) == (1 if length <= T - 1 else 2)
    assert targets([piece for row in rows for piece in row]) == targets([document])


def test_documents_that_no_row_can_hold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"25 positions and 1 images, but a row has 24 positions and 3 image slots"):
        list(pack([Document(([5] * 17, picture(0)))], SHAPE))
    with pytest.raises(ValueError, match=r"2 images, but a row has 24 positions and 1 image slots"):
        list(pack([Document((picture(0), picture(1)))], dataclasses.replace(SHAPE, max_images=1)))
    fits = [Document(([5] * 16, picture(0)))]
    assert list(pack(fits, SHAPE)) == [fits]


@pytest.mark.parametrize("max_images", [-1, 5, 100])
def test_more_slots_than_a_row_can_hold_are_refused(max_images: int) -> None:
    with pytest.raises(ValueError, match=rf"max_images_per_row is {max_images}, but a row of 24 .* at most 4 images"):
        RowShape(T, P, max_images, LATENT, None)
    assert RowShape(T, P, 4, LATENT, None).max_images == 4


# The batch.


@pytest.mark.parametrize("image_shape", [None, (3, 8, 8)])
def test_shapes_and_types_do_not_depend_on_the_content(image_shape) -> None:
    shape = dataclasses.replace(SHAPE, image_shape=image_shape)
    image = picture(0) if image_shape is None else Image(torch.full((3, 8, 8), 200, dtype=torch.uint8))
    layouts = [
        [[], []],
        [[Document(([5],))], []],
        [[Document(([5], image)), Document((image,))], [Document((image,))]],
    ]
    descriptions = []
    for rows in layouts:
        batch = make(rows, shape)
        values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        descriptions.append({k: (v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for k, v in values.items()})
    assert descriptions[0] == descriptions[1] == descriptions[2]
    long, slots = torch.int64, 2 * K
    pictures = ((slots, 3, 8, 8), torch.uint8) if image_shape else None
    assert descriptions[0] == {
        **dict.fromkeys(("token_ids", "document_ids", "image_ids", "position_ids"), ((2, T), long)),
        "hidden": ((2, T), torch.bool),
        **dict.fromkeys(("text_positions", "text_labels"), ((256,), long)),
        "image_valid": ((slots,), torch.bool),
        **dict.fromkeys(("image_rows", "image_starts"), ((slots,), long)),
        **dict.fromkeys(("noise_limits", "time_uniforms"), ((slots,), torch.float32)),
        "noise": ((slots, *LATENT), torch.float32),
        "step_counts": ((2,), torch.float32),
        "images": pictures,
        "latents": None if image_shape else ((slots, *LATENT), torch.float32),
        "position": None,
        "choice_ids": None,
        "image_keys": ("",) * slots,
    }
    if image_shape:
        assert (batch.images[0] == 200).all()
        assert (batch.images[2] == 0).all()


@pytest.mark.parametrize(("labels", "n"), [(0, 256), (1, 256), (255, 256), (256, 256), (257, 512), (600, 768)])
def test_labelled_positions_are_padded_to_a_multiple(labels: int, n: int) -> None:
    shape = RowShape(1024, P, 0, LATENT, None)
    document = Document(([5] * labels,), bos=False, eos=False, next_id=6 if labels else None)
    batch = make([[document], []] if labels else [[]], shape)
    assert len(batch.text_positions) == n
    assert (batch.text_labels != IGNORE_INDEX).sum() == labels
    assert batch.step_counts.tolist() == [labels, 0]


def test_step_counts_are_labels_and_noised_images() -> None:
    """A clean image (limit 0) is context, not a target of the diffusion loss."""
    rows = [[Document((picture(0, 0.0), [5, 6], picture(1, 0.5)))], [Document(([7], picture(2)))]]
    assert make(rows).step_counts.tolist() == [sum(targets([*rows[0], *rows[1]]).values()), 2] == [8, 2]


def test_a_rows_numbers_are_its_own_generators() -> None:
    """Uniforms, then noises of the images that are there, a call each; no neighbour, place or text changes them, and
    (of sizes that 16 divides, as these) images behind only add theirs.
    """
    rows = [[Document(([5], picture(0)))], [Document(([6],))], [Document(([5], picture(0), picture(1)))]]
    seeds = [("train", 3, n) for n in range(3)]
    batch = collate(rows, SHAPE, seeds)
    for b, images in enumerate((1, 0, 2)):
        row, slots = generator(*seeds[b]), slice(b * K, (b + 1) * K)
        assert torch.equal(batch.time_uniforms[slots], torch.rand(K, generator=row))
        noise = torch.randn(images, *LATENT, generator=row)
        assert torch.equal(batch.noise[slots], torch.cat([noise, torch.zeros(K - images, *LATENT)]))
        alone = collate([[Document(([7, 8], *[picture(2)] * K))]], SHAPE, [seeds[b]])
        assert torch.equal(alone.noise[:images], batch.noise[slots][:images])
        assert torch.equal(alone.time_uniforms, batch.time_uniforms[slots])
    assert len(batch.time_uniforms.unique()) == 3 * K
    assert batch.time_uniforms.min() >= 0
    assert batch.time_uniforms.max() < 1


def test_a_batch_of_rows_is_its_rows() -> None:
    """Micro-batches of one row hold what the whole batch holds, but for slot numbers and flat positions."""
    rows = list(pack(random_documents(9, 20), SHAPE))
    whole = make(rows)
    for b, row in enumerate(rows):
        alone = collate([row], SHAPE, [(0, 0, b)])
        for name in ("token_ids", "document_ids", "position_ids", "hidden"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[b])
        shifted = torch.where(alone.image_ids >= 0, alone.image_ids + b * K, -1)
        assert torch.equal(shifted[0], whole.image_ids[b])
        for name in ("image_valid", "image_starts", "noise_limits", "latents", "noise", "time_uniforms"):
            assert torch.equal(getattr(alone, name), getattr(whole, name)[b * K : (b + 1) * K])
        assert torch.equal(labels_of_batch(alone)[0], labels_of_batch(whole)[b])


def test_moving_a_batch_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = make([[Document(([5], picture(0)))]])
    batch.position = (1, 2)
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        value = getattr(moved, field.name)
        assert value.is_meta if isinstance(value, torch.Tensor) else value == getattr(batch, field.name), field.name
    assert batch.token_ids.device.type == "cpu"
    assert moved.position == (1, 2)


@pytest.mark.parametrize("image_shape", [None, (3, 8, 8)])
def test_a_batch_travels_in_one_piece(image_shape) -> None:
    """From a loader's worker: the same values, types and shapes, also of nothing and of other layouts."""
    image = picture(0) if image_shape is None else Image(torch.full((3, 8, 8), 200, dtype=torch.uint8))
    rows = [[Document(([5, 6], image))], [Document(([7],))]]
    batch = make(rows, dataclasses.replace(SHAPE, image_shape=image_shape))
    batch.position, batch.token_ids = (3, ((0, (1, 2)),)), batch.token_ids.t().contiguous().t()
    batch.noise_limits = batch.noise_limits[:0]
    for arrived in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch)):
        storages = set()
        for field in dataclasses.fields(Batch):
            sent, got = getattr(batch, field.name), getattr(arrived, field.name)
            if isinstance(sent, torch.Tensor):
                assert torch.equal(sent, got) and sent.dtype == got.dtype
                storages.add(got.untyped_storage().data_ptr())
            else:
                assert sent == got
        assert len(storages) == 1
    arrived = next(iter(DataLoader([batch], batch_size=None, num_workers=1)))
    assert torch.equal(arrived.noise, batch.noise) and arrived.position == batch.position
    assert arrived.noise.untyped_storage().data_ptr() == arrived.token_ids.untyped_storage().data_ptr()
    assert arrived.noise.is_shared()
