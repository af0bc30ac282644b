"""The autoencoders of pictures: diffusers' `AutoencoderKL` and `VQModel` with sizes, seeds and codes that live.

Transfusion §4.1: a convolutional network (Esser et al. 2021) of 86M parameters, 8 times down, 8 channels; for
Chameleon the same with a codebook of 16,384 codes of 8 numbers.

Legend: I pictures, S their side, C, h, w channels and size of latents, N codes, D numbers a code.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from tfusion.models.discriminator import PatchDiscriminator
from tfusion.quantization import nearest_codes
from tfusion.randomness import generator


class Coded(NamedTuple):
    """What the decoder gets, and what the regularisation of latents is of."""

    latents: Tensor  # (I, C, h, w)
    regularisation: Tensor  # (I,) fp32, unweighted
    ids: Tensor | None  # (I, h, w) int64 of codes
    means: Tensor  # (I, C, h, w) fp32: of the posterior, or vectors before they become codes


class Autoencoder(nn.Module):
    """What both kinds have in common. Weights are on the meta device until `materialize`.

    Args:
        image_size: S.
        base_channels: of the convolutions at full size (paper scale: 128).
        channel_multipliers: of each level; the picture is halved between levels, so 2^(levels - 1) is the factor.
        layers_per_block: residual blocks a level of the encoder; the decoder has one more.
        latent_channels: C, or D (paper: 8).
        attention: one attention layer each in the middle of encoder and decoder.
        norm_num_groups: of group norms; divides the channels of every level.
        discriminator: for the adversarial loss; None = without.
        vocab_size: the data's, whose rows are those of any model, though no caption is in them.
        max_seq_len: the longest row.
    """

    kind: str  # the class in diffusers

    def __init__(
        self,
        image_size: int = 256,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 4, 4),
        layers_per_block: int = 2,
        latent_channels: int = 8,
        attention: bool = True,
        norm_num_groups: int = 32,
        discriminator: PatchDiscriminator | None = None,
        vocab_size: int = 320,
        max_seq_len: int = 4096,
        **of_kind: Any,
    ) -> None:
        super().__init__()
        self.factor = 2 ** (len(channel_multipliers) - 1)
        if image_size < self.factor or image_size % self.factor:
            raise ValueError(
                f"got image_size {image_size} with {len(channel_multipliers)} channel_multipliers, which halve it "
                f"{len(channel_multipliers) - 1} times: expected a multiple of {self.factor}"
            )
        if latent_channels > 3 * self.factor**2:
            raise ValueError(f"got latent_channels {latent_channels}, expected at most 3 x {self.factor}^2")
        channels = [base_channels * multiplier for multiplier in channel_multipliers]
        if wrong := [size for size in channels if size % norm_num_groups]:
            raise ValueError(
                f"got levels of {wrong} channels, expected multiples of norm_num_groups {norm_num_groups}: change "
                "base_channels or norm_num_groups"
            )
        if discriminator is not None:
            discriminator.check_size(image_size)
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self.num_patches = 1  # an image is one place in its row: rows only carry pictures
        self.image_size, self.latent_channels = image_size, latent_channels
        self.norm_num_groups = norm_num_groups
        self.latent_shape = (3, image_size, image_size)  # pictures come as they are
        self.coded_shape = (latent_channels, image_size // self.factor, image_size // self.factor)
        import diffusers  # takes seconds to import: only where it is used

        with torch.device("meta"):  # shapes only; `materialize` fills them in
            self.network = getattr(diffusers, self.kind)(
                down_block_types=["DownEncoderBlock2D"] * len(channels),
                up_block_types=["UpDecoderBlock2D"] * len(channels),
                block_out_channels=channels,
                layers_per_block=layers_per_block,
                latent_channels=latent_channels,
                norm_num_groups=norm_num_groups,
                mid_block_add_attention=attention,
                sample_size=image_size,
                scaling_factor=1.0,
                **of_kind,
            )
        self.discriminator = discriminator

    @abstractmethod
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Coded:
        """Of (I, 3, S, S) in [-1, 1]. With noise (I, C, h, w) a sample of the posterior, where there is one."""

    def decode(self, latents: Tensor) -> Tensor:
        """(I, 3, S, S) of (I, C, h, w), in fp32, not clamped."""
        z = self.network.post_quant_conv(latents)
        return self.network.decoder(z).float()

    def materialize(self, device: torch.device | str, seed: int) -> Self:
        """Allocate on a device and draw the weights, each from a generator seeded by (seed, its name)."""
        self.to_empty(device=device)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif parameter.ndim < 2:  # of a norm
                    parameter.fill_(1.0)
                else:
                    draws = (
                        torch.rand(parameter.shape, generator=generator("weights", seed, name), device="cpu") * 2 - 1
                    )
                    parameter.copy_(draws * parameter[0].numel() ** -0.5)  # torch's own: U(+-1 / sqrt(fan in))
        return self


class KLAutoencoder(Autoencoder):
    """diffusers' `AutoencoderKL`: latents are samples of normal distributions (Kingma & Welling 2014)."""

    kind = "AutoencoderKL"

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Coded:
        """Latents: mean + std * noise, or the mean. Regularisation: KL to N(0, 1), summed over latents, in nats."""
        moments = self.network.quant_conv(self.network.encoder(images))
        with torch.autocast(images.device.type, enabled=False):
            mean, log_var = moments.float().chunk(2, dim=1)
            log_var = log_var.clamp(-30, 20)  # as diffusers' DiagonalGaussianDistribution
            latents = mean if noise is None else mean + (0.5 * log_var).exp() * noise
            kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).flatten(1).sum(1)
        return Coded(latents, kl, None, mean)


class VQAutoencoder(Autoencoder):
    """diffusers' `VQModel`: latents are the nearest of N codes (van den Oord et al. 2017).

    A code that no position has used for `restart_after` optimizer steps is dead: `restart` puts it on a vector of the
    encoder. At the beginning that is counted as past: codes that the first step does not use are put on its vectors at
    once, the others learn from where their seed has put them.

    Args:
        codebook_size: N (paper: 16,384).
        commitment: beta, of the term that moves vectors to codes; the one that moves codes weighs 1 (paper: 0.25).
            diffusers' own loss, which is not used, puts it on the other one.
        restart_after: optimizer steps without use.
    """

    kind = "VQModel"

    def __init__(
        self,
        image_size: int = 256,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 4, 4),
        layers_per_block: int = 2,
        latent_channels: int = 8,
        attention: bool = True,
        norm_num_groups: int = 32,
        discriminator: PatchDiscriminator | None = None,
        vocab_size: int = 320,
        max_seq_len: int = 4096,
        codebook_size: int = 16384,
        commitment: float = 0.25,
        restart_after: int = 100,
    ) -> None:
        shape = (image_size, base_channels, tuple(channel_multipliers), layers_per_block, latent_channels, attention)
        rest = (norm_num_groups, discriminator, vocab_size, max_seq_len)
        super().__init__(*shape, *rest, num_vq_embeddings=codebook_size, vq_embed_dim=latent_channels)
        if codebook_size < 2 or restart_after < 1:
            raise ValueError(
                f"got codebook_size {codebook_size} and restart_after {restart_after}, expected at least 2 and 1"
            )
        if not commitment >= 0:
            raise ValueError(f"got commitment {commitment}, expected 0.25 (the paper's), or another number from 0 on")
        self.codebook_size, self.commitment, self.restart_after = codebook_size, commitment, restart_after
        self.register_buffer("unused_steps", torch.empty(codebook_size, dtype=torch.int64, device="meta"))

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Coded:
        """Latents: codes, whose gradient goes straight to the vectors; regularisation: the codebook's loss."""
        vectors = self.network.quant_conv(self.network.encoder(images))  # (I, D, h, w)
        with torch.autocast(images.device.type, enabled=False):
            vectors = vectors.float()
            embedding = self.network.quantize.embedding
            ids = nearest_codes(vectors.movedim(1, -1).flatten(0, -2), embedding.weight)  # (I h w,)
            ids = ids.view(len(images), *vectors.shape[2:])
            codes = embedding(ids).movedim(-1, 1)  # (I, D, h, w)
            latents = vectors + (codes - vectors).detach()
            # van den Oord et al., eq. 3: ||sg[z] - e||^2 + beta ||z - sg[e]||^2
            codebook = (codes - vectors.detach()).square() + self.commitment * (vectors - codes.detach()).square()
        return Coded(latents, codebook.flatten(1).mean(1), ids, vectors)

    def materialize(self, device: torch.device | str, seed: int) -> Self:
        """Every code starts as a dead one."""
        super().materialize(device, seed)
        self.unused_steps.fill_(self.restart_after)
        return self

    @torch.no_grad()
    def count_use(self, use: Tensor) -> Tensor:
        """Note which codes a step used, by the (N,) number of positions of each; returns which are dead (N,) bool."""
        self.unused_steps.add_(1).mul_(use == 0)
        return self.unused_steps >= self.restart_after

    @torch.no_grad()
    def restart(self, dead: Tensor, vectors: Tensor, valid: Tensor, seed: tuple[int | str, ...]) -> Tensor:
        """Put dead codes on vectors drawn from the encoder's, none twice while there are enough.

        All shapes are fixed and nothing waits for the device; vectors that do not count change no choice.

        Args:
            dead: (N,) bool.
            vectors: (M, D).
            valid: (M,) bool, which of them count.
            seed: of the choice.

        Returns:
            (N,) bool, codes that have moved: the dead ones, or none where no vector counts.
        """
        count = valid.sum()
        draws = torch.rand(len(vectors), generator=generator(*seed))
        if vectors.is_cuda:
            draws = draws.pin_memory()  # a copy from pageable memory may wait for the device
        nth = (valid.cumsum(0) - 1).clamp(min=0)  # of those that count
        draws = draws.to(vectors.device, non_blocking=True)[nth]
        order = draws.masked_fill(~valid, torch.inf).argsort(stable=True)
        nth_dead = (dead.cumsum(0) - 1).clamp(min=0)
        chosen = vectors[order[nth_dead % count.clamp(min=1)]]  # (N, D)
        moved = dead & (count > 0)
        weight = self.network.quantize.embedding.weight
        weight.copy_(torch.where(moved[:, None], chosen, weight))
        self.unused_steps.masked_fill_(moved, 0)
        return moved
