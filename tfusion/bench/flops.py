"""The rate at which this machine multiplies matrices, beside which a model's FLOPs (`models/flops.py`) stand."""

from __future__ import annotations

import torch

from tfusion.bench.setting import DEVICE, seconds


def matmul_rate(dtype: torch.dtype, size: int | None = None, repeats: int = 5) -> float:
    """FLOPs a second of one square product, the best of several.

    Args:
        dtype: of both matrices.
        size: of their sides; None = 8192 on CUDA, elsewhere 2048, or 256 where that would take more than a second: a
            CPU without instructions for bf16 does one GFLOP in it.
        repeats: products.
    """
    if size is None and DEVICE.type != "cuda":
        size = 2048 if matmul_rate(dtype, 256) > 2 * 2048**3 else 256
    n = size or 8192
    draws = torch.Generator(DEVICE).manual_seed(0)
    a, b = (torch.randn(n, n, generator=draws, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(repeats))
