"""What is recorded for a GPU is what runs elsewhere: here without recording, `test_gpu.py` with it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tfusion import replay
from tfusion.models.kv_cache import KVCache
from tfusion.rows import extend

CONTENTS = [[[7], [8], [9]], [[11], [], [12]], [[13], [14], []], [[15], [16], [17]]]  # step by step, of three rows


@pytest.fixture(params=["transfusion", "chameleon"])
def model(request, tiny_module, tiny_chameleon):
    module = tiny_module() if request.param == "transfusion" else tiny_chameleon()
    model = module.model.materialize("cpu", 0).double().requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.3)
    return model


def filled(model) -> KVCache:
    """Of three rows of unequal length."""
    cache = model.make_cache(3, 48)
    extend(model, cache, [[1, 20, 21, 22], [1, 23], [1, 24, 25]])
    return cache


@pytest.mark.parametrize("columns", [9, 32, 48])
def test_a_step_that_asks_only_the_device(model, columns: int) -> None:
    """With a number of columns given: the same hidden states, cache and lengths, and nothing read of `row_lengths`."""
    cached, static = filled(model), filled(model)
    for contents in CONTENTS:
        expected = extend(model, cached, contents)
        lengths, static.row_lengths = static.row_lengths, [0, 0, 0]
        ids = torch.tensor([content[0] if content else 0 for content in contents])
        hidden = replay._step(model, static, columns, ids)
        static.row_lengths = lengths
        static.advance([len(content) for content in contents])
        for row, content in enumerate(contents):
            if content:
                torch.testing.assert_close(hidden[row], expected[row], rtol=1e-12, atol=1e-12)
    assert static.row_lengths == cached.row_lengths == static.lengths.tolist()
    for row, length in enumerate(cached.row_lengths):
        torch.testing.assert_close(static.keys[:, row, :, :length], cached.keys[:, row, :, :length])


def test_columns_that_are_not_there_are_refused(model) -> None:
    with pytest.raises(ValueError, match="the cache holds 48 positions a row, 49 are needed"):
        replay._step(model, filled(model), 49, torch.zeros(3, dtype=torch.long))


def test_elsewhere_than_on_cuda_it_is_the_call() -> None:
    calls = []
    replayed = replay.Replayed(partial(lambda seen, x: seen.append(x) or x + 1, calls))
    x = torch.zeros(2)
    assert replayed(x).tolist() == [1, 1] and calls[0] is x and replayed.graph is None


def test_columns_are_for_writing(model) -> None:
    with pytest.raises(ValueError, match="got columns without write"):
        filled(model).view(torch.full((3, 1), -1), write=False, columns=9)
