"""Transfusion: one transformer over text tokens and image patches (Zhou et al. 2024, arXiv 2408.11039, §3).

Unusual here: heads run only where something is wanted (logits at labelled positions, latents at patches); everything
but N is of static shape; parameters are made on the meta device and filled once, by `materialize`.
The model knows no data and no diffusion process, and of losses only its text head's, so that logits need not exist.
The same trunk without images is a language model, without the text head a model of diffusion alone that reads captions:
what Transfusion is compared with.

Legend: B rows, T positions, D width, I image slots, P patches, C, h, w latent size, V vocabulary, N labelled positions.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from tfusion.losses import head_losses
from tfusion.models.attention import Backend, training_mask
from tfusion.models.base import MultimodalModel, image_positions
from tfusion.models.conv_patches import JANUSFLOW_CHANNELS, ConvPatchDecoder, ConvPatchEncoder
from tfusion.models.patches import LinearPatchDecoder, LinearPatchEncoder, num_patches
from tfusion.models.transformer import Checkpointing, Transformer
from tfusion.models.unet_patches import PAPER_CHANNELS, UNetPatchDecoder, UNetPatchEncoder
from tfusion.sequence import Batch

Adapter = Literal["linear", "unet", "conv"]


class Transfusion(MultimodalModel):
    """The multimodal transformer.

    Args:
        vocab_size: V, the 5 special ids and the tokenizer's.
        latent_shape: (C, h, w) of what is noised: pixels (3, H, W) or an autoencoder's latents; None = text only.
        patch_size: k, side of a patch in latent pixels (paper: 2, on 8 x 32 x 32 latents); None where no images are.
        dim: D.
        num_layers: blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; None = num_heads (the paper's).
        hidden_dim: feed-forward width; None = Llama's 8/3 D.
        max_seq_len: T, the longest sequence (paper: 4096).
        adapter: how latents become patch vectors and back: `linear`, `unet` (the paper's two) or `conv` (JanusFlow's).
        adapter_channels: how large a U-Net or a convolutional adapter is: its channels at the patches' resolution;
            None = as published (`unet` 1280: 0.27B, `conv` 1376: 70M). A linear one has nothing to choose.
        patch_positions: add a learned vector for each place in the image to its patches. The paper names none (rotary
            positions alone tell places apart); BAGEL has a table. Small models learn faster with it (LOG.md).
        image_attention: inside an image, `bidirectional` (the paper's) or `causal` (its table 5); of the trunk, for
            adapters that mix patches do so either way, as the paper's U-Net.
        predict_text: False = no text head: captions are read, not predicted.
        qk_norm: RMSNorm on queries and keys (not the paper's; BAGEL and SD3 add it for stability).
        rope_theta: base of the rotary frequencies.
        norm_eps: of every RMSNorm.
        attention_backend: of training; None = flex attention on CUDA, SDPA elsewhere.
        activation_checkpointing: what the backward pass computes again, to need less memory: `none`; `selective`, what
            is cheap (matrix products and attention are kept); or `full`, all of a block but its input, which takes a
            third more time. False and true mean none and full.

    Raises:
        ValueError: sizes that do not divide, or a model that predicts nothing.
    """

    latent_parts = ("patch_encoder", "patch_decoder")

    def __init__(
        self,
        vocab_size: int,
        latent_shape: tuple[int, int, int] | None,
        patch_size: int | None,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        max_seq_len: int = 4096,
        adapter: Adapter = "linear",
        adapter_channels: int | None = None,
        patch_positions: bool = False,
        image_attention: Literal["bidirectional", "causal"] = "bidirectional",
        predict_text: bool = True,
        qk_norm: bool = False,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        attention_backend: Backend | None = None,
        activation_checkpointing: Checkpointing = "none",
    ) -> None:
        super().__init__()
        latent_shape = None if latent_shape is None else tuple(latent_shape)
        if (latent_shape is None) != (patch_size is None):
            raise ValueError(f"got latent_shape {latent_shape} and patch_size {patch_size}: give both, or null twice")
        if latent_shape is None and not predict_text:
            raise ValueError("got no latent_shape and predict_text false: such a model predicts nothing")
        if image_attention not in ("bidirectional", "causal"):
            raise ValueError(f"got image_attention {image_attention!r}, expected 'bidirectional' or 'causal'")
        if adapter not in ("linear", "unet", "conv"):
            raise ValueError(f"got adapter {adapter!r}, expected 'linear', 'unet' or 'conv'")
        if adapter != "linear" and latent_shape is None:
            raise ValueError(f"got adapter {adapter!r} without latent_shape: a model of text alone has no adapters")
        if adapter_channels is not None and (adapter == "linear" or adapter_channels < 1):
            raise ValueError(
                f"got adapter_channels {adapter_channels} for adapter {adapter!r}: it is the size, >= 1, of a unet or "
                "conv adapter, and null for a linear one"
            )
        self.vocab_size, self.latent_shape, self.patch_size = vocab_size, latent_shape, patch_size
        self.adapter = adapter
        self.max_seq_len, self.attention_backend = max_seq_len, attention_backend
        self.image_attention = image_attention
        self.num_patches = 0 if latent_shape is None else num_patches(latent_shape, patch_size)
        with torch.device("meta"):  # shapes only; `materialize` fills them in
            self.embedding = nn.Embedding(vocab_size, dim)
            self.patch_encoder, self.patch_decoder = None, None
            if latent_shape is not None:
                sizes = (latent_shape, patch_size, dim)
                self.patch_encoder = _encoder(adapter, sizes, adapter_channels, patch_positions)
            self.transformer = Transformer(
                dim,
                num_layers,
                num_heads,
                num_kv_heads,
                hidden_dim,
                max_seq_len,
                qk_norm,
                rope_theta,
                norm_eps,
                activation_checkpointing,
            )
            self.text_head = nn.Linear(dim, vocab_size, bias=False) if predict_text else None
            if latent_shape is not None:
                self.patch_decoder = _decoder(adapter, sizes, adapter_channels)

    def forward(
        self, batch: Batch, x_t: Tensor | None, timesteps: Tensor | None, text_losses: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """One training forward.

        Args:
            batch: packed rows.
            x_t: (I, C, h, w) noised latents, zeros in empty slots; None and None for a model of text alone.
            timesteps: (I,) in [0, 1000], 0 = clean.
            text_losses: give each label's loss instead of logits, which then are never there all at once.

        Returns:
            logits (N, V) at the labelled positions, or the labels' negative log-likelihoods (N,); and the network's
            output (I, C, h, w) for the images. None for what the model does not predict.
        """
        B, T = batch.token_ids.shape
        x = self.embedding(batch.token_ids) * (batch.image_ids < 0)[:, :, None]  # (B, T, D)
        mask = training_mask(
            batch.document_ids, self.seen_together(batch.image_ids), batch.hidden, self.attention_backend
        )
        if self.patch_encoder is None:
            x = self.transformer(x, batch.position_ids, mask).view(B * T, -1)
            return self._text(x, batch, text_losses), None

        images, P = batch.image_valid.numel(), self.num_patches
        at_patches = image_positions(batch, P)  # (I P,); empty slots add zeros at position 0
        patches, skip = self.patch_encoder(x_t, timesteps)
        patches = patches * batch.image_valid[:, None, None]  # (I, P, D)
        x = x.view(B * T, -1).index_add(0, at_patches, patches.flatten(0, 1).to(x.dtype))
        x = self.transformer(x.view(B, T, -1), batch.position_ids, mask).view(B * T, -1)

        text = None if self.text_head is None else self._text(x, batch, text_losses)
        hidden = x.index_select(0, at_patches).unflatten(0, (images, P))  # (I, P, D)
        return text, self.patch_decoder(hidden, skip, timesteps)

    def _text(self, x: Tensor, batch: Batch, losses: bool) -> Tensor:
        """Of (B T, D): logits (N, V), or the labels' losses (N,)."""
        hidden = x.index_select(0, batch.text_positions)  # (N, D)
        return head_losses(hidden, self.text_head.weight, batch.text_labels)[0] if losses else self.text_head(hidden)

    @property
    def predicts_text(self) -> bool:
        """Whether there is a text head."""
        return self.text_head is not None

    def seen_together(self, image_ids: Tensor) -> Tensor:
        """(B, T) image ids as the mask wants them: none where attention inside an image is causal."""
        return image_ids if self.image_attention == "bidirectional" else torch.full_like(image_ids, -1)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """What text comes next: (..., D) -> (..., V)."""
        return self.text_head(hidden)

    def image_vectors(self, clean: Tensor) -> Tensor:
        """What clean images (I, C, h, w) are in a row: (I, P, D)."""
        return self.patch_encoder(clean, clean.new_zeros(len(clean)))[0]

    def initial_std(self, name: str, shape: torch.Size) -> float:
        """Of a matrix or a convolution (outputs, inputs, ...).

        ==========================  =============================================
        patch_decoder.proj          0 (the first output is the mean, as in DiT)
        of a U-Net or convolutions  1 / sqrt(inputs); the encoder's last layer a tenth of it, for the same reason as
                                    below: patch vectors are then of std 0.06 at every patch side (a linear encoder's
                                    grow with it, 0.06 to 0.45)
        all others                  the trunk's, also patch_encoder.proj: at unit scale noise would drown what the
                                    blocks write to the stream, and captions are learned late (LOG.md)
        ==========================  =============================================
        """
        if name == "patch_decoder.proj.weight":
            return 0.0
        if name.startswith("patch_") and self.adapter != "linear" and "positions" not in name:
            share = 0.1 if name == "patch_encoder.proj.weight" else 1.0
            return share / math.prod(shape[1:]) ** 0.5
        return super().initial_std(name, shape)


def _encoder(
    adapter: Adapter, sizes: tuple[tuple[int, int, int], int, int], channels: int | None, positions: bool
) -> nn.Module:
    """Of latents (C, h, w) in patches of side k to vectors of width D."""
    if adapter == "unet":
        return UNetPatchEncoder(*sizes, channels or PAPER_CHANNELS, positions)
    if adapter == "conv":
        return ConvPatchEncoder(*sizes, channels or JANUSFLOW_CHANNELS, positions)
    return LinearPatchEncoder(*sizes, positions)


def _decoder(adapter: Adapter, sizes: tuple[tuple[int, int, int], int, int], channels: int | None) -> nn.Module:
    """The way back."""
    if adapter == "unet":
        return UNetPatchDecoder(*sizes, channels or PAPER_CHANNELS)
    if adapter == "conv":
        return ConvPatchDecoder(*sizes, channels or JANUSFLOW_CHANNELS)
    return LinearPatchDecoder(*sizes)
