"""An image tokenizer of ids that one can follow: the mean colour of each block of pixels, a few levels a channel."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tfusion.tokenizers import ImageTokenizer


class BlockIds(ImageTokenizer):
    """Blocks of `side` x `side` pixels; of `levels` L a channel there are L^3 ids: red L^2 + green L + blue."""

    def __init__(self, side: int, levels: int) -> None:
        self.side, self.levels = side, levels
        self.codebook_size = levels**3

    @property
    def fingerprint(self) -> str:
        """What its ids mean."""
        return f"blocks-{self.side}-{self.levels}"

    def encode(self, images: Tensor) -> Tensor:
        """(I, 3, H, W) in [-1, 1] -> (I, 1, h, w) whole numbers."""
        means = (F.avg_pool2d(images, self.side) + 1) / 2  # (I, 3, h, w) in [0, 1]
        red, green, blue = (means * (self.levels - 1)).round().clamp(0, self.levels - 1).unbind(1)
        return ((red * self.levels + green) * self.levels + blue)[:, None].float()

    def decode(self, latents: Tensor) -> Tensor:
        """(I, 1, h, w) -> (I, 3, H, W), blocks of one colour."""
        ids = latents[:, 0].long()
        assert ((ids >= 0) & (ids < self.codebook_size)).all() and (ids == latents[:, 0]).all()
        colors = torch.stack([ids // self.levels**2, ids // self.levels % self.levels, ids % self.levels], 1)
        return F.interpolate(2 * colors.float() / (self.levels - 1) - 1, scale_factor=self.side, mode="nearest")

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(1, h, w)."""
        if image_size % self.side:
            raise ValueError(f"got image_size {image_size}, expected a multiple of {self.side}")
        return 1, image_size // self.side, image_size // self.side

    def to(self, device: torch.device | str) -> Self:
        """Do nothing: there are no weights."""
        return self
