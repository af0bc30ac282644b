"""Requests shared among ranks, and what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from tfusion.requests import Generation, Request

SHOWN, EXTREMES = 32, 8  # examples kept: the first, and of the others the worst and best by score
ROUND = 1024  # pictures a rank holds at a time


def make(
    trainer: pl.Trainer, module: pl.LightningModule, requests: Sequence[Request], batch_size: int, first: int = 0
) -> list[tuple[int, Generation]]:
    """This rank's share: numbers and generations of requests r, r + W, ...; every rank has to call it.

    (Under FSDP2 gathering the weights is a collective, so a rank without a request takes part.)

    Args:
        trainer, module: of this rank.
        requests: the same on all ranks.
        batch_size: decoded together.
        first: the number of the first request.

    Raises:
        ValueError: a request that cannot be met, whichever rank has it: on all, so that none waits for another.
    """
    module.check_requests(requests)
    mine = slice(trainer.global_rank, None, trainer.world_size)
    numbers = list(range(first, first + len(requests)))[mine]
    made = module.generate(requests[mine], numbers, batch_size=batch_size)
    return list(zip(numbers, made, strict=True))


def picture_of(generation: Generation) -> PILImage.Image:
    """The picture that was asked for."""
    (image,) = (segment for segment in generation.segments if not isinstance(segment, str))
    return image


def text_of(generation: Generation) -> str:
    """The text that was written."""
    return "".join(segment for segment in generation.segments if isinstance(segment, str))


def pixels_of(image: PILImage.Image) -> Tensor:
    """uint8 (3, H, H)."""
    pixels: Any = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def shown(scores: Sequence[float | None]) -> list[int]:
    """Which of many examples are kept: the first, and of the others the worst and the best by score."""
    others = sorted(range(SHOWN, len(scores)), key=lambda i: scores[i] or 0.0)
    ends = others if len(others) <= 2 * EXTREMES else others[:EXTREMES] + others[-EXTREMES:]
    return [*range(min(SHOWN, len(scores))), *ends]
