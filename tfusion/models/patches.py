"""Patch adapters: latents (I, C, h, w) <-> P vectors of width D an image (Transfusion §3).

Patches are k x k windows in raster order, left to right, top to bottom. The timestep enters here and nowhere else:
its embedding is added to each patch vector (footnote 6). The trunk has no adaptive norms.

Every encoder gives patch vectors and what its decoder wants to see of the way down (`Skip`; the linear one nothing),
every decoder takes patch vectors, that, and the timesteps.

Legend: I images, C, h, w latent channels and size, k patch side, P = (h / k) (w / k) patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Skip = tuple[Tensor, ...]


def num_patches(latent_shape: tuple[int, int, int], patch_size: int) -> int:
    """P; raises ValueError where the patch does not divide the latent."""
    C, h, w = latent_shape
    if patch_size < 1 or h % patch_size or w % patch_size:
        divisors = [str(k) for k in range(1, min(h, w) + 1) if h % k == w % k == 0]
        raise ValueError(
            f"patch_size {patch_size} does not divide the latent size {h} x {w}: take {', '.join(divisors)}, or "
            "another image size"
        )
    return (h // patch_size) * (w // patch_size)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(I, C, h, w) -> (I, P, C k k)."""
    images, C, h, w = x.shape
    k = patch_size
    x = x.reshape(images, C, h // k, k, w // k, k)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(images, (h // k) * (w // k), C * k * k)


def unpatchify(x: Tensor, latent_shape: tuple[int, int, int], patch_size: int) -> Tensor:
    """(I, P, C k k) -> (I, C, h, w), the inverse of `patchify`."""
    C, h, w = latent_shape
    k = patch_size
    x = x.reshape(x.shape[0], h // k, w // k, C, k, k)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, C, h, w)


class TimestepEmbedding(nn.Module):
    """Timesteps (I,) in [0, 1000] -> (I, D): 256 sinusoids, then a two-layer network (as in DiT)."""

    def __init__(self, dim: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.empty(num_frequencies), persistent=False)
        self.in_proj = nn.Linear(2 * num_frequencies, dim)
        self.out_proj = nn.Linear(dim, dim)

    def fill_buffers(self) -> None:
        count = len(self.frequencies)
        self.frequencies.copy_(10_000.0 ** (-torch.arange(count, dtype=torch.float64) / count))

    def forward(self, timesteps: Tensor) -> Tensor:
        # fp32 at least: bf16 cannot tell t = 999 from 1000
        angles = timesteps[:, None].to(self.frequencies.dtype) * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(self.in_proj.weight.dtype)  # (I, 256)
        return self.out_proj(nn.functional.silu(self.in_proj(waves)))


class LinearPatchEncoder(nn.Module):
    """Noised latents and their timesteps -> patch vectors, with a learned vector a place if `positions`."""

    def __init__(self, latent_shape: tuple[int, int, int], patch_size: int, dim: int, positions: bool = False) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(latent_shape[0] * patch_size**2, dim)
        self.timestep = TimestepEmbedding(dim)
        self.positions = nn.Embedding(num_patches(latent_shape, patch_size), dim) if positions else None

    def forward(self, x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Skip]:
        """(I, C, h, w), (I,) -> (I, P, D), nothing to skip."""
        patches = patchify(x_t, self.patch_size).to(self.proj.weight.dtype)  # (I, P, C k k)
        vectors = self.proj(patches) + self.timestep(timesteps)[:, None]
        return vectors if self.positions is None else vectors + self.positions.weight, ()


class LinearPatchDecoder(nn.Module):
    """Patch vectors out of the trunk -> the network's output for the latents."""

    def __init__(self, latent_shape: tuple[int, int, int], patch_size: int, dim: int) -> None:
        super().__init__()
        self.latent_shape, self.patch_size = latent_shape, patch_size
        self.proj = nn.Linear(dim, latent_shape[0] * patch_size**2)

    def forward(self, hidden: Tensor, skip: Skip, timesteps: Tensor) -> Tensor:
        """(I, P, D) -> (I, C, h, w); the others are for decoders that look back."""
        return unpatchify(self.proj(hidden), self.latent_shape, self.patch_size)
