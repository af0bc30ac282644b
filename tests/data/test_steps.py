"""Ranks, micro-batches and workers only divide the rows of a step: their contents stay the same to the bit."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re

import pytest
import torch
from torch.utils.data import DataLoader

from tfusion.data.steps import MicroBatches, StepDataset, StepLayout
from tfusion.sequence import IGNORE_INDEX, Batch

ROWS, LANES, STEPS = 4, 2, 6


@pytest.fixture
def mixture(tiny_data, tiny_module, attached):
    return attached(tiny_data(), tiny_module()).mixture


def steps_of(mixture, start: int = 0, positions: dict | None = None, count: int = STEPS, **layout) -> list:
    """`count` steps of one rank, through a DataLoader."""
    layout = StepLayout(ROWS, LANES, **layout)
    dataset = StepDataset(mixture, layout, 9, start, positions or {})
    loader = DataLoader(dataset, batch_size=None, num_workers=layout.workers)
    return list(itertools.islice(loader, count))


def row_digests(batch: Batch) -> list[str]:
    """md5 of all that is in each row; slots and flat positions are counted within the row."""
    B, T = batch.token_ids.shape
    slots = len(batch.image_valid) // B
    digests = []
    for b in range(B):
        mine = slice(b * slots, (b + 1) * slots)
        image_ids = torch.where(batch.image_ids[b] >= 0, batch.image_ids[b] - b * slots, -1)
        here = (batch.text_positions // T == b) & (batch.text_labels != IGNORE_INDEX)
        parts = [batch.token_ids[b], batch.document_ids[b], image_ids, batch.position_ids[b], batch.hidden[b]]
        parts += [batch.text_positions[here] - b * T, batch.text_labels[here], batch.image_rows[mine] - b]
        names = ("image_valid", "image_starts", "noise_limits", "time_uniforms", "noise", "images")
        parts += [getattr(batch, name)[mine] for name in names]
        digests.append(hashlib.md5(b"".join(p.contiguous().numpy().tobytes() for p in parts)).hexdigest())
    return digests


def contents(mixture, micro_batches: int = 1, ranks: int = 1, workers: int = 0, **where) -> dict[tuple[int, int], str]:
    """{(step, global row): digest} over all ranks."""
    table: dict[tuple[int, int], str] = {}
    first = where.get("start", 0)
    for rank in range(ranks):
        layout = {"micro_batches": micro_batches, "ranks": ranks, "rank": rank, "workers": workers}
        for step, batches in enumerate(steps_of(mixture, **layout, **where), start=first):
            assert len(batches) == micro_batches
            for m, batch in enumerate(batches):
                slots = StepLayout(ROWS, LANES, **layout).slots(m)
                for slot, digest in zip(slots, row_digests(batch), strict=True):
                    assert (step, slot) not in table
                    table[step, slot] = digest
    return table


def test_contents_are_the_same_for_every_layout(mixture) -> None:
    expected = contents(mixture)
    assert set(expected) == {(step, row) for step in range(STEPS) for row in range(ROWS)}
    assert len(set(expected.values())) == STEPS * ROWS
    for micro_batches, ranks, workers in [
        (1, 1, 2),
        (1, 2, 0),
        (2, 1, 0),
        (2, 2, 0),
        (2, 2, 2),
        (4, 1, 1),
        (1, 4, 0),
    ]:
        assert contents(mixture, micro_batches, ranks, workers) == expected, (micro_batches, ranks, workers)


@pytest.mark.parametrize(("before", "after"), [((1, 1, 0), (2, 2, 0)), ((2, 2, 0), (1, 1, 2)), ((2, 1, 2), (2, 1, 2))])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_goes_on_in_any_layout(mixture, before: tuple, after: tuple, stop: int) -> None:
    """The positions after a step, of all ranks together, start any other layout at the next."""
    positions: dict[int, tuple] = {}
    for rank in range(before[1]):
        layout = {"micro_batches": before[0], "ranks": before[1], "rank": rank, "workers": before[2]}
        for batches in steps_of(mixture, count=stop, **layout):
            step, table = batches[-1].position
            positions.update(table)
    assert step == stop
    rest = contents(mixture, *after, start=stop, positions=positions, count=STEPS - stop)
    assert rest == {key: digest for key, digest in contents(mixture).items() if key[0] >= stop}


def test_another_seed_changes_the_noise_alone(mixture) -> None:
    dataset = [StepDataset(mixture, StepLayout(ROWS, LANES), seed, 0, {}) for seed in (0, 1)]
    one, other = (next(iter(d))[0] for d in dataset)
    assert torch.equal(one.token_ids, other.token_ids)
    assert torch.equal(one.images, other.images)
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.time_uniforms, other.time_uniforms)


@pytest.mark.parametrize(("micro_batches", "ranks"), [(1, 1), (2, 1), (2, 2)])
def test_counts_and_position_of_a_step(mixture, micro_batches: int, ranks: int) -> None:
    everything = torch.zeros(STEPS, 2)
    for rank in range(ranks):
        for step, batches in enumerate(steps_of(mixture, micro_batches=micro_batches, ranks=ranks, rank=rank)):
            labels = sum((b.text_labels != IGNORE_INDEX).sum() for b in batches)
            noised = sum((b.image_valid & (b.noise_limits > 0)).sum() for b in batches)
            for batch in batches:
                assert batch.step_counts.tolist() == [labels, noised]
            assert [b.position is not None for b in batches] == [False] * (micro_batches - 1) + [True]
            after, table = batches[-1].position
            assert after == step + 1
            size = ROWS // micro_batches // ranks
            slots = [m * ROWS // micro_batches + rank * size + k for m in range(micro_batches) for k in range(size)]
            assert [number for number, _ in table] == [(step % LANES) * ROWS + slot for slot in slots]
            assert {position[0] for _, position in table} == {step // LANES + 1}, "rows emitted"
            everything[step] += batches[0].step_counts
    if (micro_batches, ranks) != (1, 1):
        assert torch.equal(everything, torch.stack([b[0].step_counts for b in steps_of(mixture)]))


def test_micro_batches_flattens_and_starts_anew() -> None:
    flat = MicroBatches([["a", "b"], ["c"], []])
    assert list(flat) == list(flat) == ["a", "b", "c"]
    assert not hasattr(flat, "__len__"), "Lightning must not think it ends"


def test_slots_divide_the_rows_contiguously() -> None:
    layouts = [StepLayout(12, 8, micro_batches=2, ranks=3, rank=rank) for rank in range(3)]
    assert [list(layout.slots(m)) for m in range(2) for layout in layouts] == [
        [0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "micro", "ranks"), [(4, 3, 1), (1, 2, 1), (7, 2, 2), (10, 4, 1), (5, 8, 2), (0, 1, 1)]
)
def test_undivided_rows_are_refused_with_rows_that_fit(rows: int, micro: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"rows_per_step {rows} .*{micro} micro-batches x {ranks} ranks") as error:
        StepLayout(rows, 8, micro, ranks)
    nearest = int(re.search(r"take (\d+) rows", str(error.value))[1])
    StepLayout(nearest, 8, micro, ranks)
    fitting = [n for n in range(1, 100) if n % (micro * ranks) == 0]
    assert abs(nearest - rows) == min(abs(n - rows) for n in fitting)


@pytest.mark.parametrize(("lanes", "workers"), [(8, 3), (8, 5), (8, 7), (8, 16), (6, 4), (1, 2)])
def test_workers_that_do_not_divide_lanes_are_refused_with_workers_that_do(lanes: int, workers: int) -> None:
    with pytest.raises(ValueError, match=f"num_workers {workers} does not divide lanes {lanes}") as error:
        StepLayout(4, lanes, workers=workers)
    nearest = int(re.search(r"take (\d+) ", str(error.value))[1])
    assert nearest >= 1
    StepLayout(4, lanes, workers=nearest)


def test_every_field_of_a_batch_is_compared() -> None:
    """A field added to Batch must be added to `row_digests`."""
    compared = {
        "token_ids",
        "document_ids",
        "image_ids",
        "position_ids",
        "hidden",
        "text_positions",
        "text_labels",
    }
    compared |= {
        "image_valid",
        "image_rows",
        "image_starts",
        "noise_limits",
        "time_uniforms",
        "noise",
        "images",
    }
    assert {f.name for f in dataclasses.fields(Batch)} - compared == {
        "latents",
        "step_counts",
        "position",
        "image_keys",
        "choice_ids",  # of validation alone
    }
