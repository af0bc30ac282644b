"""U-Net patch adapters: the way down before the trunk, the way up after it (Transfusion §3; 0.27B in §4.1).

The paper tells little of their insides, so they are those of Dhariwal & Nichol 2021 (arXiv 2105.05233), which it cites,
with plain norms: the timestep's embedding is added within each residual block, never a norm's scale (paper, footnote
7). Each halving of the resolution doubles the channels, up to `channels` where one position is one patch; there every
residual block is followed by attention between all patches, whatever the trunk's mask. So the parameters depend little
on the patch side (at D = 1536 from 212M, k = 1, to 293M, k = 8). What each block of the way down gives, the block of
the way up beside it sees too.

Legend: I images, C, h, w latent channels and size, k patch side, P = (h / k) (w / k) patches, D width, E width of the
timestep's embedding, c, y, x channels and size at one resolution.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfusion.models.attention import attend
from tfusion.models.patches import Skip, TimestepEmbedding, num_patches

PAPER_CHANNELS = 1280  # 0.27B in both adapters
BLOCKS = 2  # residual blocks a resolution, each way


def widths_of(patch_size: int, channels: int) -> list[int]:
    """Channels at each resolution, the latent's first; raises ValueError for sizes that do not halve."""
    halvings = patch_size.bit_length() - 1
    if patch_size != 2**halvings:
        raise ValueError(f"got patch_size {patch_size}: a U-Net halves the resolution, so take 1, 2, 4 or 8")
    if channels < 1 or channels % (4 * patch_size):
        raise ValueError(
            f"got adapter_channels {channels}, expected a multiple of {4 * patch_size} (patch_size {patch_size}, and "
            "norms over groups of 4 channels at least)"
        )
    return [channels // 2**n for n in range(halvings, -1, -1)]


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of at least 4 channels."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3 x 3, same size."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


class ResidualBlock(nn.Module):
    """Two convolutions, the timestep between them: (I, c, y, x), (I, E) -> (I, c', y, x)."""

    def __init__(self, inputs: int, outputs: int, time_dim: int) -> None:
        super().__init__()
        self.norm_1, self.conv_1 = group_norm(inputs), conv(inputs, outputs)
        self.time_proj = nn.Linear(time_dim, outputs)
        self.norm_2, self.conv_2 = group_norm(outputs), conv(outputs, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv_1(F.silu(self.norm_1(x)))
        hidden = hidden + self.time_proj(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv_2(F.silu(self.norm_2(hidden)))


class SelfAttention(nn.Module):
    """Every position of an image sees every other: (I, c, y, x) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head_dim = math.gcd(64, channels)
        self.norm = group_norm(channels)
        self.qkv_proj = nn.Linear(channels, 3 * channels)
        self.o_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        vectors = self.norm(x).flatten(2).transpose(1, 2)  # (I, P, c)
        heads = self.qkv_proj(vectors).unflatten(2, (3, -1, self.head_dim))  # (I, P, 3, H, K)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()  # (I, H, P, K) each
        out = attend(query, key, value, None).transpose(1, 2).flatten(2)  # (I, P, c)
        return x + self.o_proj(out).transpose(1, 2).reshape(x.shape)


class Stage(nn.Module):
    """A residual block, and attention where the resolution is the lowest."""

    def __init__(self, inputs: int, outputs: int, time_dim: int, attention: bool) -> None:
        super().__init__()
        self.residual = ResidualBlock(inputs, outputs, time_dim)
        self.attention = SelfAttention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.attention(self.residual(x, time))


class UNetPatchEncoder(nn.Module):
    """The way down: noised latents and their timesteps -> patch vectors, and each stage's output for the way up.

    Args:
        latent_shape: (C, h, w).
        patch_size: k, a power of two.
        dim: D.
        channels: at the lowest resolution.
        positions: add a learned vector for each place.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        patch_size: int,
        dim: int,
        channels: int = PAPER_CHANNELS,
        positions: bool = False,
    ) -> None:
        super().__init__()
        widths = widths_of(patch_size, channels)
        self.timestep = TimestepEmbedding(2 * channels)
        self.in_conv = conv(latent_shape[0], widths[0])
        self.stages = nn.ModuleList(
            nn.ModuleList(Stage(width, width, 2 * channels, width == channels) for _ in range(BLOCKS))
            for width in widths
        )
        self.downs = nn.ModuleList(conv(a, b, stride=2) for a, b in pairwise(widths))
        self.norm = group_norm(channels)
        self.proj = nn.Linear(channels, dim)
        self.positions = nn.Embedding(num_patches(latent_shape, patch_size), dim) if positions else None

    def forward(self, x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Skip]:
        """(I, C, h, w), (I,) -> (I, P, D), and what each stage gave, the first first."""
        time = self.timestep(timesteps)  # (I, E)
        x, skip = self.in_conv(x_t.to(self.in_conv.weight.dtype)), []
        for level, stages in enumerate(self.stages):
            x = self.downs[level - 1](x) if level else x  # half the size
            for stage in stages:
                x = stage(x, time)
                skip.append(x)
        vectors = self.proj(F.silu(self.norm(x)).flatten(2).transpose(1, 2))  # (I, P, D)
        return vectors if self.positions is None else vectors + self.positions.weight, tuple(skip)


class UNetPatchDecoder(nn.Module):
    """The way up: patch vectors out of the trunk, what the way down gave, and the timesteps -> the output.

    Args: as the encoder's.
    """

    def __init__(
        self, latent_shape: tuple[int, int, int], patch_size: int, dim: int, channels: int = PAPER_CHANNELS
    ) -> None:
        super().__init__()
        widths = widths_of(patch_size, channels)[::-1]
        self.grid = latent_shape[1] // patch_size, latent_shape[2] // patch_size
        self.timestep = TimestepEmbedding(2 * channels)
        self.in_proj = nn.Linear(dim, channels)
        self.stages = nn.ModuleList(
            nn.ModuleList(Stage(2 * width, width, 2 * channels, width == channels) for _ in range(BLOCKS))
            for width in widths  # twice the width comes in: its own and the skip
        )
        self.ups = nn.ModuleList(conv(a, b) for a, b in pairwise(widths))
        self.norm = group_norm(widths[-1])
        self.proj = conv(widths[-1], latent_shape[0])

    def forward(self, hidden: Tensor, skip: Skip, timesteps: Tensor) -> Tensor:
        """(I, P, D), the encoder's skips, (I,) -> (I, C, h, w)."""
        time, left = self.timestep(timesteps), list(skip)
        x = self.in_proj(hidden).transpose(1, 2).unflatten(2, self.grid)  # (I, c, h / k, w / k)
        for level, stages in enumerate(self.stages):
            if level:
                x = self.ups[level - 1](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            for stage in stages:
                x = stage(torch.cat([x, left.pop()], 1), time)
        return self.proj(F.silu(self.norm(x)))
