"""Light convolutional patch adapters: two ConvNeXt blocks each way and one long skip (JanusFlow, arXiv 2411.07975).

With 70M parameters they do there what the U-Net's 270M do here. Two things are not JanusFlow's: the timestep is added
to the patches, as in the other adapters, and is no token of its own; and the last linear layer stands before the pixel
shuffle, with weights for each place in the patch, so that any width goes with any patch side.

Legend: I images, C, h, w latent channels and size, k patch side, P = (h / k) (w / k) patches, D width, c channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfusion.models.patches import Skip, TimestepEmbedding, num_patches, patchify, unpatchify

JANUSFLOW_CHANNELS = 1376  # 70M in both adapters at D = 2048
BLOCKS = 2  # each way


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022 (arXiv 2201.03545), figure 4: depthwise 7 x 7, norm, four times the width and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up_proj = nn.Linear(channels, 4 * channels)
        self.down_proj = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(I, P, c) -> the same, its P patches being a grid of (h / k, w / k)."""
        hidden = self.depthwise(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return x + self.down_proj(F.gelu(self.up_proj(self.norm(hidden))))


class ConvPatchEncoder(nn.Module):
    """Noised latents and their timesteps -> patch vectors, and the features before the last layer.

    Args:
        latent_shape: (C, h, w).
        patch_size: k.
        dim: D.
        channels: c.
        positions: add a learned vector for each place.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        patch_size: int,
        dim: int,
        channels: int = JANUSFLOW_CHANNELS,
        positions: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.grid = latent_shape[1] // patch_size, latent_shape[2] // patch_size
        self.in_proj = nn.Linear(latent_shape[0] * patch_size**2, channels)
        self.timestep = TimestepEmbedding(channels)
        self.blocks = nn.ModuleList(ConvNeXtBlock(channels) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(channels)
        self.proj = nn.Linear(channels, dim)
        self.positions = nn.Embedding(num_patches(latent_shape, patch_size), dim) if positions else None

    def forward(self, x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Skip]:
        """(I, C, h, w), (I,) -> (I, P, D), and one (I, P, c) to skip."""
        patches = patchify(x_t, self.patch_size).to(self.in_proj.weight.dtype)  # (I, P, C k k)
        x = self.in_proj(patches) + self.timestep(timesteps)[:, None]
        for block in self.blocks:
            x = block(x, self.grid)
        vectors = self.proj(self.norm(x))
        return vectors if self.positions is None else vectors + self.positions.weight, (x,)


class ConvPatchDecoder(nn.Module):
    """Patch vectors out of the trunk and the encoder's features -> the network's output for the latents.

    Args: as the encoder's.
    """

    def __init__(
        self, latent_shape: tuple[int, int, int], patch_size: int, dim: int, channels: int = JANUSFLOW_CHANNELS
    ) -> None:
        super().__init__()
        self.latent_shape, self.patch_size = latent_shape, patch_size
        self.grid = latent_shape[1] // patch_size, latent_shape[2] // patch_size
        self.in_proj = nn.Linear(dim + channels, channels)
        self.blocks = nn.ModuleList(ConvNeXtBlock(channels) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(channels)
        self.proj = nn.Linear(channels, latent_shape[0] * patch_size**2)

    def forward(self, hidden: Tensor, skip: Skip, timesteps: Tensor) -> Tensor:
        """(I, P, D) and (I, P, c) -> (I, C, h, w); the timestep is in what was skipped."""
        (features,) = skip
        x = self.in_proj(torch.cat([hidden, features.to(hidden.dtype)], -1))  # (I, P, c)
        for block in self.blocks:
            x = block(x, self.grid)
        return unpatchify(self.proj(self.norm(x)), self.latent_shape, self.patch_size)
