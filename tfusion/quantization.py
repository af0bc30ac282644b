"""The nearest code of each vector, in bounded memory.

Legend: M vectors, N codes, D numbers each.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_DISTANCES = 2**26  # held at a time: 256 MiB of float32


@torch.no_grad()
def nearest_codes(vectors: Tensor, codes: Tensor) -> Tensor:
    """Ids (M,) int64 of the codes (N, D) that are nearest to (M, D), both float32.

    Of 128 pictures of 1024 positions all distances to 16,384 codes would be 8 GiB.
    """
    rows = max(1, MOST_DISTANCES // len(codes))
    return torch.cat([torch.cdist(some, codes).argmin(1) for some in vectors.split(rows)])
