"""The kernel distance of two sets of features (KID, Binkowski et al. 2018), unbiased at any number of pictures.

The squared maximum mean discrepancy under k(x, y) = (x . y / D + 1)^3: the mean of k over pairs of different x, plus
that over pairs of different y, less twice the mean over pairs of an x and a y.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 2048  # of the kernel's matrix at a time


def kernel_distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Squared MMD of (M, D) to (N, D) features, M, N >= 2, and its standard error.

    All pairs are used, where clean-fid takes random subsets of 1,000: the same expectation, less noise. The error is
    that of a U-statistic's first order: 4 var(h_x) / M + 4 var(h_y) / N with h_x(i) = mean k(x_i, other x) - mean
    k(x_i, y), and h_y likewise; too small where both sets are of one distribution, for then h is constant.

    Args:
        x: of generated pictures.
        y: of reference pictures.

    Raises:
        ValueError: fewer than 2 of either.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"got {len(x)} and {len(y)} pictures, a kernel distance needs 2 or more of each")
    x, y = x.double(), y.double()
    xy, yx = _sums(x, y)
    h_x, h_y = _within(x) - xy / len(y), _within(y) - yx / len(x)
    value = h_x.mean() + h_y.mean()
    error = (4 * h_x.var() / len(x) + 4 * h_y.var() / len(y)).sqrt()
    return float(value), float(error)


def _sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) sum of k(x_i, y_j) over j, and (N,) over i."""
    over_y, over_x = [], torch.zeros(len(y), dtype=x.dtype, device=x.device)
    for some in x.split(ROWS):
        kernel = (some @ y.T / x.shape[1] + 1) ** 3
        over_y.append(kernel.sum(1))
        over_x += kernel.sum(0)
    return torch.cat(over_y), over_x


def _within(x: Tensor) -> Tensor:
    """(M,) mean of k(x_i, x_j) over j other than i."""
    own = (x.square().sum(1) / x.shape[1] + 1) ** 3
    return (_sums(x, x)[0] - own) / (len(x) - 1)
