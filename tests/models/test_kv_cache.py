"""Cached equals uncached: text, images, denoising beside the cache, rows of different lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.reference.attention import loop_mask
from tfusion.models.kv_cache import KVCache
from tfusion.models.transformer import Transformer

D, LAYERS, HEADS, KV_HEADS, T = 32, 3, 4, 2, 14


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def trunk() -> Transformer:
    """A trunk in float64 whose attention is far from uniform."""
    model = Transformer(D, LAYERS, HEADS, KV_HEADS, max_seq_len=64).double().requires_grad_(False)
    for i, parameter in enumerate(model.parameters()):
        if parameter.ndim == 2:
            parameter.copy_(normal(*parameter.shape, seed=100 + i) * 2 / parameter.shape[1] ** 0.5)
    model.rotary.fill_buffers()
    return model


def make_cache(rows: int, capacity: int = 32) -> KVCache:
    return KVCache(LAYERS, rows, KV_HEADS, D // HEADS, capacity, torch.device("cpu"), torch.float64)


def full(trunk: Transformer, x: Tensor, image_ids: list[int]) -> Tensor:
    """One document (T, D) without a cache -> (T, D)."""
    images = torch.tensor([image_ids])
    mask = loop_mask(torch.zeros_like(images), images, torch.zeros_like(images, dtype=torch.bool))
    return trunk(x[None], torch.arange(len(x))[None], mask[:, None])[0]


def step(
    trunk: Transformer, cache: KVCache, x: list[Tensor], image_ids: list[list[int]], write: bool = True
) -> list[Tensor]:
    """Forward each row's new vectors, short rows filled with rubbish that is not counted."""
    counts = [len(row) for row in x]
    longest = max(counts)
    padded = torch.stack([torch.cat([row, 1e3 * normal(longest - len(row), D, seed=7)]) for row in x])
    images = torch.tensor([row + [-1] * (longest - len(row)) for row in image_ids], dtype=torch.long)
    view = cache.view(images, write)
    out = trunk(padded, view.index, cache=view)
    if write:
        cache.advance(counts)
    return [out[b, :count] for b, count in enumerate(counts)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


IMAGES = [-1, -1, 2, 2, 2, 2, -1, -1, 8, 8, 8, -1, -1, -1]  # T = 14: two images between text


@pytest.mark.parametrize(
    "chunks",
    [
        [14],
        [2, 4, 2, 3, 3],  # whole images, as generation writes them
        [1, 5, 1, 5, 1, 1],  # an image together with text before and after
        [1, 1, 4, 1, 1, 3, 1, 1, 1],  # one token at a time
    ],
)
def test_chunks_equal_the_whole(trunk: Transformer, chunks: list[int]) -> None:
    x = normal(T, D)
    cache, outputs, at = make_cache(1), [], 0
    for count in chunks:
        outputs += step(trunk, cache, [x[at : at + count]], [IMAGES[at : at + count]])
        at += count
    assert cache.row_lengths == [T]
    assert cache.lengths.tolist() == [T]
    assert cache.longest == T
    close(torch.cat(outputs), full(trunk, x, IMAGES))


# Three rows that write different amounts each time, as text, image or both.
ROWS = [IMAGES, [-1] * 9 + [9] * 5, [-1, 1, 1, 1, -1, 5, 5, 5, 5, 5, 5, 5, -1, -1]]
COUNTS = [[2, 4, 1], [4, 5, 3], [5, 0, 9], [3, 5, 1]]  # rows 0 to 2, at four writes; one writes nothing once


def fill(trunk: Transformer, rows: list[int]) -> tuple[KVCache, list[list[Tensor]]]:
    """The rows' cache after all writes, and their outputs at each."""
    cache, outputs, at = make_cache(len(rows)), [], [0] * len(rows)
    for counts in COUNTS:
        if not any(counts[row] for row in rows):
            continue  # alone, this row has nothing to write
        spans = [slice(at[n], at[n] + counts[row]) for n, row in enumerate(rows)]
        x = [normal(T, D, seed=row)[span] for row, span in zip(rows, spans, strict=True)]
        outputs.append(step(trunk, cache, x, [ROWS[row][span] for row, span in zip(rows, spans, strict=True)]))
        at = [span.stop for span in spans]
    return cache, outputs


def test_rows_of_different_lengths_equal_each_alone_and_uncached(trunk: Transformer) -> None:
    """What short rows write past their end is never seen, neither now nor after it is written over."""
    cache, outputs = fill(trunk, [0, 1, 2])
    assert cache.row_lengths == [T] * 3 == cache.lengths.tolist()
    for row in range(3):
        together = torch.cat([step_outputs[row] for step_outputs in outputs])
        alone = torch.cat([step_outputs[0] for step_outputs in fill(trunk, [row])[1]])
        close(together, alone)
        close(together, full(trunk, normal(T, D, seed=row), ROWS[row]))


def prefixes(trunk: Transformer, lengths: list[int]) -> KVCache:
    """Rows of `IMAGES` cut at their lengths, written at once, and rubbish wherever nothing was written."""
    cache = make_cache(len(lengths))
    cache.keys.normal_(generator=torch.Generator().manual_seed(1)).mul_(100)
    cache.values.normal_(generator=torch.Generator().manual_seed(2)).mul_(100)
    cache.image_ids[:] = torch.tensor(lengths)[:, None]  # rubbish that would pass for an image written next
    step(trunk, cache, [normal(T, D)[:n] for n in lengths], [IMAGES[:n] for n in lengths])
    return cache


def test_denoising_behind_the_rows_equals_the_whole(trunk: Transformer) -> None:
    """An image after prefixes of several lengths, earlier images among them; up to the longest row's end the cache is
    left as it was, also the rubbish in it."""
    lengths = [8, 2, 13]
    cache = prefixes(trunk, lengths)
    before = {name: getattr(cache, name).clone() for name in ("keys", "values", "image_ids", "lengths")}
    view = cache.view(cache.lengths[:, None].expand(-1, 5), write=False)
    assert view.index.tolist() == [list(range(n, n + 5)) for n in lengths]
    for seed in (50, 51):  # one view serves all denoising steps
        patches = normal(3, 5, D, seed=seed)
        out = trunk(patches, view.index, cache=view)
        for row, n in enumerate(lengths):
            whole = full(trunk, torch.cat([normal(T, D)[:n], patches[row]]), IMAGES[:n] + [n] * 5)
            close(out[row], whole[n:])
    for name, value in before.items():
        untouched = getattr(cache, name)
        if name in ("keys", "values"):
            value, untouched = value[:, :, :, : max(lengths)], untouched[:, :, :, : max(lengths)]
        assert torch.equal(untouched, value)
    assert cache.row_lengths == lengths


def test_clean_image_is_written_after_denoising_and_text_goes_on(trunk: Transformer) -> None:
    lengths = [8, 2]
    cache = prefixes(trunk, lengths)
    trunk(
        normal(2, 5, D, seed=50),
        (view := cache.view(cache.lengths[:, None].expand(-1, 5), False)).index,
        cache=view,
    )
    new = [normal(8, D, seed=60 + row) for row in range(2)]
    out = step(trunk, cache, [x[:5] for x in new], [[n] * 5 for n in lengths])
    out = [torch.cat(pair) for pair in zip(out, step(trunk, cache, [x[5:] for x in new], [[-1] * 3] * 2), strict=True)]
    for row, n in enumerate(lengths):
        whole = full(trunk, torch.cat([normal(T, D)[:n], new[row]]), IMAGES[:n] + [n] * 5 + [-1] * 3)
        close(out[row], whole[n:])


def test_the_first_rows_are_the_same_memory(trunk: Transformer) -> None:
    """What is denoised beside some rows alone is what is denoised beside them among all."""
    cache = prefixes(trunk, [8, 2, 5])
    some = cache.first(2)
    assert some.row_lengths == [8, 2] == some.lengths.tolist() and some.capacity == cache.capacity
    assert some.keys.data_ptr() == cache.keys.data_ptr() and some.values.data_ptr() == cache.values.data_ptr()
    x, outs = normal(3, 5, D, seed=50), []
    for rows in (some, cache, some):
        view = rows.view(rows.lengths[:, None].expand(-1, 5), False)
        outs.append(trunk(x[: len(rows.row_lengths)], view.index, cache=view)[:2])
    close(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_select_is_a_copy_and_put_writes_back(trunk: Transformer) -> None:
    """Rows go their own way and come back; the others never notice."""
    cache = prefixes(trunk, [8, 2, 13])
    chosen = cache.select([2, 0])
    assert chosen.row_lengths == [13, 8] == chosen.lengths.tolist()
    assert chosen.capacity == cache.capacity
    before = cache.keys.clone()
    new = [normal(2, D, seed=70 + row) for row in range(2)]
    step(trunk, chosen, new, [[-1] * 2] * 2)
    assert torch.equal(cache.keys, before)
    assert cache.row_lengths == [8, 2, 13] == cache.lengths.tolist()

    cache.put([2], chosen, [0])
    assert cache.row_lengths == [8, 2, 15] == cache.lengths.tolist()
    assert torch.equal(cache.keys[:, :2], before[:, :2])
    assert torch.equal(cache.image_ids[2], chosen.image_ids[0])
    last = [normal(1, D, seed=80 + row) for row in range(3)]
    out = step(trunk, cache, last, [[-1]] * 3)
    wholes = [normal(T, D)[:8], normal(T, D)[:2], torch.cat([normal(T, D)[:13], new[0]])]
    images = [IMAGES[:8], IMAGES[:2], IMAGES[:13] + [-1] * 2]
    for row in range(3):
        close(out[row], full(trunk, torch.cat([wholes[row], last[row]]), [*images[row], -1])[-1:])


def test_capacity_is_checked_before_anything_is_written(trunk: Transformer) -> None:
    cache = make_cache(2, capacity=10)
    step(trunk, cache, [normal(6, D), normal(3, D)], [[-1] * 6, [-1] * 3])
    before = cache.image_ids.clone()
    for write in (True, False):
        with pytest.raises(ValueError, match="holds 10 positions a row, 11 are needed"):
            cache.view(torch.full((2, 5), 3), write=write)
    assert torch.equal(cache.image_ids, before)
    step(trunk, cache, [normal(4, D)] * 2, [[-1] * 4] * 2)  # exactly full
    assert cache.row_lengths == [10, 7]


def test_a_cache_in_bf16_gives_outputs_in_the_queries_type(trunk: Transformer) -> None:
    cache = KVCache(LAYERS, 1, KV_HEADS, D // HEADS, 16, torch.device("cpu"), torch.bfloat16)
    x = normal(6, D)
    out = torch.cat([*step(trunk, cache, [x[:5]], [[-1] * 5]), *step(trunk, cache, [x[5:]], [[-1]])])
    assert out.dtype == torch.float64
    assert cache.keys.dtype == torch.bfloat16
    torch.testing.assert_close(out, full(trunk, x, [-1] * 6), rtol=0.1, atol=0.1)
