"""The loss of images: diffusion loss at fixed timesteps and noise, or the mean over an image's ids."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class DiffusionLoss(Metric):
    """`compute` gives `loss`, the mean over images of the per-image loss, and `images`, their number.

    `squares`, the sum of the squared per-image losses, is what `standard_error_of_mean` wants.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "squares", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, errors: Tensor, counted: Tensor) -> None:
        """Add (I,) errors where `counted` (I,) bool."""
        errors = errors.double() * counted
        self.total += errors.sum()
        self.squares += errors.square().sum()
        self.images += counted.sum()

    def compute(self) -> dict[str, float]:
        total, images = self.total.item(), self.images.item()
        return {"loss": total / max(images, 1), "images": images, "squares": self.squares.item()}
