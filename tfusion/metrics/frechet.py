"""The Frechet distance of two sets of features.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) with means m and covariances S (Heusel et al. 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance


class FrechetDistance(FrechetInceptionDistance):
    """torchmetrics' distance on features that have been computed already, in float64, for any D.

    `update(features, real)` adds (N, D) features, none included; `reset` keeps those of the reference pictures.
    """

    def __init__(self, num_features: int, sync_on_compute: bool = True) -> None:
        given = torch.nn.Identity()
        given.num_features = num_features  # where torchmetrics looks for D
        super().__init__(feature=given, reset_real_features=False, sync_on_compute=sync_on_compute)
        self.num_features = num_features

    def update(self, features: Tensor, real: bool) -> None:
        """Add (N, D) features; `real` of reference pictures."""
        super().update(features.double().view(-1, self.num_features), real)
