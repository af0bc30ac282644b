"""CUDA graphs for generation: what one step of it launches is recorded once, and then launched at one go.

A step has a few hundred small kernels, which Python launches more slowly than a GPU runs them. Elsewhere than on CUDA
everything here is the plain call.

Legend: R rows, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tfusion.models.base import MultimodalModel
from tfusion.models.kv_cache import KVCache
from tfusion.rows import Content, extend, rotary_positions
from tfusion.sequence import PAD_ID

# A graph reads as many columns of the cache as it was recorded with: more than there are, up to a multiple of this.
COLUMNS = 256
# A recording takes as long as a few calls, so what is called no more often is not recorded.
PLAIN_CALLS = 2


class Replayed:
    """A function of tensors whose shapes do not change; recorded at its third call.

    Args:
        call: waits for no number of the device, and may be called once more than it was asked for.
    """

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self.call, self.calls = call, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        if not inputs[0].is_cuda or self.calls <= PLAIN_CALLS:
            return self.call(*inputs)
        if self.graph is None:
            with torch.cuda.device(inputs[0].device):
                self._record(inputs)
        for held, new in zip(self.inputs, inputs, strict=True):
            held.copy_(new)
        self.graph.replay()
        return self.output.clone()  # the next replay writes over it

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [value.clone() for value in inputs]
        stream = _stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is compiled or allocated at a first call, before anything is recorded
            self.call(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # other threads (of loaders, of NCCL) may go on with what no recording allows
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.output = self.call(*self.inputs)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One of each device for all recordings: a stream's workspaces are never given back."""
    return torch.cuda.Stream(device)


class TokenSteps:
    """`extend` of a cache by at most one id a row, over and over."""

    def __init__(self, model: MultimodalModel, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.columns = 0
        self.step: Replayed | None = None

    def __call__(self, contents: list[Content]) -> Tensor:
        """Each row's new id, or nothing; hidden state behind it (R, D), rubbish where there is nothing."""
        if not self.cache.keys.is_cuda:
            return extend(self.model, self.cache, contents)
        ids = torch.tensor([content[0] if content else PAD_ID for content in contents])
        return self._replay(ids.to(self.cache.keys.device, non_blocking=True), [len(content) for content in contents])

    def of_all(self, ids: Tensor) -> Tensor:
        """The same of a new id for every row, (R,), which no one waits for."""
        if not self.cache.keys.is_cuda:
            return extend(self.model, self.cache, [[i] for i in ids.tolist()])
        return self._replay(ids, [1] * len(ids))

    def _replay(self, ids: Tensor, counts: list[int]) -> Tensor:
        cache = self.cache
        if cache.longest >= self.columns:
            self.columns = min(-(-(cache.longest + 1) // COLUMNS) * COLUMNS, cache.capacity)
            self.step = Replayed(functools.partial(_step, self.model, cache, self.columns))
        hidden = self.step(ids)
        cache.advance(counts)
        return hidden


def _step(model: MultimodalModel, cache: KVCache, columns: int, ids: Tensor) -> Tensor:
    """(R,) -> (R, D); where rows stand is read on the device."""
    view = cache.view(torch.full_like(ids, -1)[:, None], write=True, columns=columns)
    x = model.embedding(ids[:, None])  # (R, 1, D)
    return model.transformer(x, rotary_positions(model, view.index), cache=view)[:, 0]
