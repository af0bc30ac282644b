"""Images <-> latents behind one interface: the identity (pixels), and diffusers' `AutoencoderKL` and `VQModel`, frozen.

Plain classes, not `nn.Module`s: an attribute of a LightningModule that is no Module is not registered, so a
frozen network never gets into a checkpoint, the averaged weights, DDP's buckets or the optimizer.

Shapes: images (I, 3, H, W) in [-1, 1], latents (I, C, h, w).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from tfusion.quantization import nearest_codes
from tfusion.tokenizers.autoencoder_folder import fingerprint_of, load_config, load_frozen


class ImageTokenizer(ABC):
    """What turns images into the latents that are diffused, and back."""

    path: str = ""  # where its weights lie, if there are any

    def __str__(self) -> str:
        """As messages name it."""
        return in_words(self.fingerprint, self.path)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What its latents mean: equal for tokenizers whose latents may be mixed; 16 hex digits, or a word."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (I, 3, H, W), float in [-1, 1], as latents (I, C, h, w), float32, of about unit variance."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (I, C, h, w) as images (I, 3, H, W), clamped to [-1, 1]."""

    @abstractmethod
    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image, `image_size` pixels a side; ValueError if it cannot be encoded."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move the weights, if there are any; returns itself."""


def in_words(fingerprint: str, path: str) -> str:
    """An image tokenizer, as messages name it."""
    return repr(fingerprint) + (f" (of {path!r})" if path else "")


class PixelTokenizer(ImageTokenizer):
    """The identity: latents are pixels."""

    fingerprint = "pixels"

    def encode(self, images: Tensor) -> Tensor:
        """Return the images themselves."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Clamp to [-1, 1]."""
        return latents.clamp(-1, 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(3, image_size, image_size)."""
        if image_size < 1:
            raise ValueError(f"got image_size {image_size}, expected at least 1 pixel")
        return 3, image_size, image_size

    def to(self, device: torch.device | str) -> Self:
        """Do nothing: there are no weights."""
        return self


class AutoencoderTokenizer(ImageTokenizer):
    """A pretrained autoencoder of diffusers, frozen; what kinds of it have in common.

    Weights are read at the first use or at `.to(device)`; config and folder are checked at construction.
    """

    kind: ClassVar[str]  # the class in diffusers

    def __init__(
        self,
        path: str,
        subfolder: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        chunk_size: int = 32,
    ) -> None:
        """Check that `path` holds an autoencoder of this kind.

        Args:
            path: folder with `config.json` and weights, or a name on the Hugging Face hub (needs the network
                once).
            subfolder: folder inside `path`, such as `vae` of a pipeline.
            dtype: of weights and activations, whatever the trainer's precision is; several published
                autoencoders overflow in float16.
            chunk_size: images encoded or decoded at a time; bounds the memory.
        """
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"got dtype {dtype!r}, expected float32, bfloat16 or float16")
        if chunk_size < 1:
            raise ValueError(f"got chunk_size {chunk_size}, expected at least 1 image")
        self.path, self.subfolder, self.chunk_size = path, subfolder, chunk_size
        self.dtype = getattr(torch, dtype)
        self.config, self._said = load_config(path, subfolder, self.kind)  # of the network; of config.json
        self.factor = 2 ** (len(self.config["block_out_channels"]) - 1)  # pixels a latent position, each side
        self._network: Any = None
        self._device: torch.device | None = None

    @property
    @abstractmethod
    def channels(self) -> int:
        """C of its latents."""

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """Of a chunk, in `dtype`."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """Of a chunk, latents in float32."""

    @cached_property
    def fingerprint(self) -> str:
        """Of config.json and of the weights' bytes. Not of `dtype`, which only rounds: rounded weights may find other
        ids of a picture, but ids mean the same. Reads the weights once.
        """
        return fingerprint_of(self.path, self.subfolder, self._said)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, image_size / factor, image_size / factor); an error names the nearest sizes that fit."""
        if image_size < self.factor or image_size % self.factor:
            below = image_size // self.factor * self.factor
            nearest = " or ".join(str(size) for size in (below, below + self.factor) if size > 0)
            raise ValueError(
                f"got image_size {image_size}, expected a multiple of {self.factor} "
                f"(the factor of {self.path!r}); nearest: {nearest}"
            )
        return self.channels, image_size // self.factor, image_size // self.factor

    def to(self, device: torch.device | str) -> Self:
        """Load the weights if need be, and move them.

        Raises:
            ValueError: the autoencoder is no longer the one that was checked, as where it is still being trained.
        """
        if self._network is None:
            self._network = load_frozen(self.path, self.subfolder, self.kind, self.dtype)
            self._check_unchanged()
        self._network.to(device)
        self._device = torch.device(device)
        return self

    def _check_unchanged(self) -> None:
        """Config, weights and fingerprint are of one autoencoder: the checkpoint will name it."""
        before = self.__dict__.pop("fingerprint", None)
        said = load_config(self.path, self.subfolder, self.kind)[1] if os.path.exists(self.path) else self._said
        if said != self._said or (before or self.fingerprint) != self.fingerprint:
            raise ValueError(
                f"the autoencoder {self.path!r} has changed since this command began: wait until the run that trains "
                "it has ended, then start again"
            )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents, float32."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(
                f"got images of shape {tuple(images.shape)}, expected (I, 3, H, W) "
                f"with H and W multiples of {self.factor}"
            )
        size = images.shape[2] // self.factor, images.shape[3] // self.factor
        if len(images) == 0:
            return images.new_empty((0, self.channels, *size), dtype=torch.float32)
        self._follow(images.device)
        # Autocast would put part of the network in bfloat16, whatever dtype says.
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._encode(x) for x in images.to(self.dtype).split(self.chunk_size)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, clamped; float32."""
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"got latents of shape {tuple(latents.shape)}, expected (I, {self.channels}, h, w)")
        if len(latents) == 0:
            size = latents.shape[2] * self.factor, latents.shape[3] * self.factor
            return latents.new_empty((0, 3, *size), dtype=torch.float32)
        self._follow(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            chunks = [self._decode(z) for z in latents.float().split(self.chunk_size)]
            return torch.cat(chunks).float().clamp(-1, 1)

    def _follow(self, device: torch.device) -> None:
        """Lightning moves modules behind our back."""
        if self._device != device:
            self.to(device)


class VAETokenizer(AutoencoderTokenizer):
    """A pretrained diffusers `AutoencoderKL`, frozen and deterministic (mode of the posterior, not a sample).

    Latents are normalised as in diffusers' pipelines: `(mode - shift_factor) * scaling_factor`, or with
    `latents_mean` and `latents_std` where the config has them.
    """

    kind = "AutoencoderKL"

    @property
    def channels(self) -> int:
        """C of its latents."""
        return self.config["latent_channels"]

    def to(self, device: torch.device | str) -> Self:
        """Load the weights if need be, and move them and the latents' statistics."""
        super().to(device)
        shape = 1, self.channels, 1, 1
        shift = self.config.get("latents_mean") or self.config.get("shift_factor") or 0.0
        std = torch.tensor(self.config.get("latents_std") or 1.0).expand(self.channels).reshape(shape)
        self._shift = torch.tensor(shift, dtype=torch.float32).expand(self.channels).reshape(shape).to(device)
        self._scale = (self.config["scaling_factor"] / std).to(device)
        return self

    def _encode(self, images: Tensor) -> Tensor:
        """Mode of the posterior, normalised."""
        return (self._network.encode(images).latent_dist.mode().float() - self._shift) * self._scale

    def _decode(self, latents: Tensor) -> Tensor:
        """Undo the normalisation, decode."""
        return self._network.decode((latents / self._scale + self._shift).to(self.dtype)).sample


class VQTokenizer(AutoencoderTokenizer):
    """A pretrained diffusers `VQModel`, frozen: latents are the ids of the nearest codes.

    One channel of whole numbers 0 ... codebook_size - 1 in float32, (I, 1, h, w), so that what holds latents (batches,
    the packer, caches) holds ids, too. They are names, not amounts: nothing may be added to them, and bfloat16 would
    round those above 256.
    """

    kind, channels = "VQModel", 1

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.config["num_vq_embeddings"]

    def to(self, device: torch.device | str) -> Self:
        """Load the weights if need be, and move them; codes are compared in float32."""
        super().to(device)
        self._network.quantize.float()
        return self

    def _encode(self, images: Tensor) -> Tensor:
        """Ids of the nearest codes."""
        vectors = self._network.encode(images).latents.float()  # (n, D, h, w)
        ids = nearest_codes(vectors.movedim(1, -1).flatten(0, -2), self._network.quantize.embedding.weight)  # (n h w,)
        return ids.view(len(vectors), 1, *vectors.shape[2:]).float()

    def _decode(self, latents: Tensor) -> Tensor:
        """Look the codes up, decode."""
        ids = latents[:, 0].long()  # (n, h, w)
        if bool(((latents[:, 0] != ids) | (ids < 0) | (ids >= self.codebook_size)).any()):
            raise ValueError(
                f"got ids from {latents.min():g} to {latents.max():g}, expected whole numbers from 0 to "
                f"{self.codebook_size - 1}, of the codebook of {self.path!r}"
            )
        codes = self._network.quantize.embedding(ids).permute(0, 3, 1, 2).to(self.dtype)  # (n, D, h, w)
        normalised_by = codes if self.config["norm_type"] == "spatial" else None  # MoVQ
        return self._network.decoder(self._network.post_quant_conv(codes), normalised_by)
