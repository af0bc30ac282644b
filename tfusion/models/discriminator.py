"""The patch discriminator: says of each patch of a picture whether it looks real (Isola et al. 2017, §3.2.2)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """Convolutions of 4 x 4, halving the picture `num_layers` times; one logit a patch that overlaps its neighbours.

    Norms are over groups of channels, not over the batch: a picture's logits depend on no other picture, so that
    neither empty slots nor the number of processes change them.

    Args:
        base_channels: of the first layer; doubled at each, up to 8 times as many.
        num_layers: 3 sees patches of 70 x 70 pixels (Isola et al.; Esser et al. 2021), 2 of 34 x 34.
    """

    def __init__(self, base_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        if num_layers < 1 or base_channels < 1:
            raise ValueError(f"got num_layers {num_layers}, base_channels {base_channels}; expected at least 1 of each")
        if num_layers > 1 and base_channels % NORM_GROUPS:
            raise ValueError(f"got base_channels {base_channels} of the discriminator, expected a multiple of 8")
        sizes = [3, *(base_channels * min(2**n, 8) for n in range(num_layers + 1))]
        self.num_layers = num_layers
        with torch.device("meta"):  # shapes only; the autoencoder's `materialize` fills them in
            self.convs = nn.ModuleList(
                nn.Conv2d(before, after, 4, stride=1 if n == num_layers else 2, padding=1)
                for n, (before, after) in enumerate(pairwise(sizes))
            )
            self.norms = nn.ModuleList(nn.GroupNorm(NORM_GROUPS, size) for size in sizes[2:])
            self.conv_out = nn.Conv2d(sizes[-1], 1, 4, padding=1)

    def check_size(self, image_size: int) -> None:
        """Raise ValueError for pictures so small that no patch of them is seen."""
        if image_size // 2**self.num_layers < 3:  # two more convolutions take one pixel each
            raise ValueError(
                f"got a discriminator of num_layers {self.num_layers} for pictures of {image_size} pixels, expected at "
                f"least {3 * 2**self.num_layers}: set fewer layers"
            )

    def forward(self, images: Tensor) -> Tensor:
        """(I, 1, p, p) logits, high where real, of (I, 3, H, H) pictures in [-1, 1]."""
        x = F.leaky_relu(self.convs[0](images), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.conv_out(x)
