"""The reference encoder: a small image-text dual encoder (as CLIP, Radford et al. 2021) to measure with, offline.

Pictures and captions become vectors of one space, so that a pair's cosine says how well they fit; a picture's vector
before it is normalised is what Frechet and kernel distances compare. The tower of pictures keeps places (no global
pooling) and is also asked for a thumbnail of its picture, and how blurred and how noisy it was made: its vectors hold
what pictures look like and whether they are clean, not only what captions say.

Legend: I pictures, H their side, B rows, T positions, E size of a vector.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfusion.models.attention import training_mask
from tfusion.models.transformer import Transformer
from tfusion.randomness import generator

THUMBNAIL = 16  # pixels a side
CHANNELS, BLOCKS = (64, 128, 256), (2, 2, 1)  # of the picture's tower, at 1/4, 1/8 and 1/16 of its side


class ConvBlock(nn.Module):
    """x + conv(gelu(conv(norm(x)))), 3 x 3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.out_conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_conv(F.gelu(self.conv(self.norm(x))))


class ReferenceEncoder(nn.Module):
    """Two towers.

    Args:
        vocab_size: of the captions' tokenizer.
        image_size: side that pictures are resized to, a multiple of 16.
        dim: E.
        text_dim: width of the captions' transformer.
        text_layers: its blocks.
        text_heads: its heads.
        max_seq_len: T, the longest row.
    """

    def __init__(
        self,
        vocab_size: int = 1024,
        image_size: int = 64,
        dim: int = 128,
        text_dim: int = 160,
        text_layers: int = 3,
        text_heads: int = 5,
        max_seq_len: int = 64,
    ) -> None:
        super().__init__()
        if image_size % 16:
            raise ValueError(f"got image_size {image_size}, expected a multiple of 16")
        self.vocab_size, self.image_size, self.max_seq_len, self.dim = vocab_size, image_size, max_seq_len, dim
        self.num_patches = 1  # an image is one place in its row: captions are read, not pictures
        self.latent_shape = (3, image_size, image_size)
        with torch.device("meta"):  # shapes only; `materialize` fills them in
            layers: list[nn.Module] = []
            before, step = 3, 4
            for channels, blocks in zip(CHANNELS, BLOCKS, strict=True):
                layers += [nn.Conv2d(before, channels, step, step), *(ConvBlock(channels) for _ in range(blocks))]
                before, step = channels, 2
            self.image_layers = nn.Sequential(*layers)
            self.image_norm = nn.GroupNorm(8, before)
            self.image_proj = nn.Linear(before * (image_size // 16) ** 2, dim)
            self.thumbnail_proj = nn.Linear(dim, 3 * THUMBNAIL**2)
            self.fault_proj = nn.Linear(dim, 2)
            self.embedding = nn.Embedding(vocab_size, text_dim)
            self.transformer = Transformer(text_dim, text_layers, text_heads, max_seq_len=max_seq_len)
            self.text_proj = nn.Linear(text_dim, dim, bias=False)
            self.logit_scale = nn.Parameter(torch.empty(1))

    def image_features(self, images: Tensor) -> Tensor:
        """(I, E) of pictures (I, 3, H, H) in [-1, 1], H = image_size."""
        x = self.image_layers(images)  # (I, 256, H/16, H/16)
        return self.image_proj(F.gelu(self.image_norm(x)).flatten(1))

    def thumbnails(self, features: Tensor) -> Tensor:
        """(I, 3, 16, 16) in [-1, 1], as far as (I, E) features hold them."""
        return self.thumbnail_proj(features).view(-1, 3, THUMBNAIL, THUMBNAIL)

    def faults(self, features: Tensor) -> Tensor:
        """(I, 2) how blurred and how noisy pictures of (I, E) features are, each 0 (not at all) to 1."""
        return self.fault_proj(features)

    def text_features(
        self, token_ids: Tensor, document_ids: Tensor, position_ids: Tensor, rows: Tensor, positions: Tensor
    ) -> Tensor:
        """(I, E) of captions in packed rows (B, T), each read at its last position: (I,) rows and positions."""
        nothing = torch.full_like(document_ids, -1)
        mask = training_mask(document_ids, nothing, torch.zeros_like(document_ids, dtype=torch.bool))
        x = self.transformer(self.embedding(token_ids), position_ids, mask)  # (B, T, text_dim), causal
        return self.text_proj(x[rows, positions])

    def materialize(self, device: torch.device | str, seed: int) -> ReferenceEncoder:
        """Allocate on a device, draw the weights and fill the tables."""
        self.to_empty(device=device)
        self.init_weights(seed)
        self.transformer.rotary.fill_buffers()
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every weight from a generator seeded by (seed, its name); each block of convolutions starts at 0."""
        for name, parameter in self.named_parameters():
            if name == "logit_scale":
                parameter.fill_(math.log(1 / 0.07))  # CLIP's
            elif name.endswith("bias") or "out_conv" in name:
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                fan_in = parameter[0].numel() if name.startswith("image") else None
                std = (1 / fan_in) ** 0.5 if fan_in else 0.02
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator("weights", seed, name), device="cpu") * std
                )
