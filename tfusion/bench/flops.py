"""Model FLOPs of a training step, and the rate at which this machine multiplies matrices.

Legend: B rows, T positions, D width, F hidden width of the feed-forward, V vocabulary, N labelled positions, I images.
"""

from __future__ import annotations

import torch
from torch import nn

from tfusion.bench.setting import DEVICE, seconds
from tfusion.models.transfusion import Transfusion


def forward_flops(model: Transfusion, rows: int, positions: int, labels: int, images: int) -> int:
    """Of one forward over B rows of T positions, a multiply-add being 2.

    Counted: every linear layer where it runs (the blocks' at all B T positions, the text head's at N labels, the
    patch layers' at I P patches, the timestep's at I images), and both products of attention over the whole T x T
    square, as SDPA computes it, though the mask hides about half. Not counted: norms, softmax, rotary, embedding,
    loss.
    """
    trunk, encoder, decoder = model.transformer, model.patch_encoder, model.patch_decoder
    width = trunk.num_heads * trunk.head_dim
    blocks = 2 * _weights(trunk) * rows * positions + len(trunk.blocks) * 4 * rows * positions**2 * width
    patches = 2 * (encoder.proj.weight.numel() + decoder.proj.weight.numel()) * images * model.num_patches
    return blocks + patches + 2 * _weights(encoder.timestep) * images + 2 * model.text_head.weight.numel() * labels


def training_flops(model: Transfusion, rows: int, positions: int, labels: int, images: int) -> int:
    """Of forward and backward: 3 x the forward (each product has two in the backward). Nothing for the optimizer."""
    return 3 * forward_flops(model, rows, positions, labels, images)


def matmul_rate(dtype: torch.dtype, size: int | None = None, repeats: int = 5) -> float:
    """FLOPs a second of one square product, the best of several."""
    n = size or (8192 if DEVICE.type == "cuda" else 2048)
    draws = torch.Generator(DEVICE).manual_seed(0)
    a, b = (torch.randn(n, n, generator=draws, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(repeats))


def _weights(module: nn.Module) -> int:
    """Of the linear layers."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
