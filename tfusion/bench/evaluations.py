"""How long does one evaluation of a network take while pictures are sampled, and how long without a cache?

An evaluation is timed from one to the next, so all that is done in between counts: guidance, the sampler's step, the
next noised patches in and the prediction out. Beside it stands the plain forward of the same patches: through the same
encoder, trunk and decoder, without gradients, with no prompt, no cache and so no mask; on CUDA replayed, as they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tfusion.bench.setting import DEVICE, wait
from tfusion.models.flops import adapter_flops, trunk_flops
from tfusion.models.transfusion import Transfusion
from tfusion.replay import Replayed


class Evaluations:
    """When a network is evaluated, told by what calls `mark` once an evaluation.

    Attributes:
        counts: evaluations in the last call of each name.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._marks: list[Any] = []
        self._intervals: dict[str, list[list[float]]] = {}

    def mark(self, *_: Any) -> None:
        """Once an evaluation, at the same place in each; also a module's hook."""
        self._marks.append(_mark())

    def watch(self, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call, with its evaluations noted."""

        def run() -> Any:
            self._marks.clear()
            result = call()
            wait()
            self.counts[name] = len(self._marks)
            between = [_seconds(start, end) for start, end in pairwise(self._marks)]
            self._intervals.setdefault(name, []).append(between)
            return result

        return run

    def seconds(self, name: str, warmup: int) -> float:
        """Median from one evaluation to the next, over all calls of the name behind the first `warmup`."""
        return statistics.median(s for intervals in self._intervals[name][warmup:] for s in intervals)


def _mark() -> Any:
    """Now; on CUDA, when the device comes here, without waiting for it."""
    if DEVICE.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def plain_forwards(
    model: Transfusion, images: int, rows: int, repeats: int, mark: Callable[[], None]
) -> Callable[[], None]:
    """Forwards of the patches of `rows` rows, the `images` images and again those that guidance has twice."""
    device = model.embedding.weight.device
    draws = torch.Generator(device).manual_seed(0)
    x_t = torch.randn(images, *model.latent_shape, generator=draws, device=device)
    timesteps = torch.full((images,), 500.0, device=device)
    of_row = torch.arange(rows, device=device) % images
    position_ids = torch.arange(model.num_patches, device=device).expand(rows, -1)

    def forward(x_t: Tensor, timesteps: Tensor) -> Tensor:
        patches, skip = model.patch_encoder(x_t, timesteps)  # (images, P, D)
        hidden = model.transformer(patches[of_row], position_ids)  # (rows, P, D)
        return model.patch_decoder(hidden, tuple(part[of_row] for part in skip), timesteps[of_row])

    forward_as_sampling = Replayed(forward)

    @torch.no_grad()
    def run() -> None:
        for _ in range(repeats):
            mark()
            forward_as_sampling(x_t, timesteps)

    return run


def plain_forward_flops(model: Transfusion, images: int, rows: int) -> int:
    """Of one of them; as `models/flops.py` counts."""
    adapters = images * adapter_flops(model.patch_encoder, model) + rows * adapter_flops(model.patch_decoder, model)
    return trunk_flops(model.transformer, rows, model.num_patches) + adapters
