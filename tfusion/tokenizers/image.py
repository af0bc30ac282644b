"""Images <-> latents behind one interface: the identity (pixels) and a frozen diffusers `AutoencoderKL`.

Plain classes, not `nn.Module`s: an attribute of a LightningModule that is no Module is not registered, so a
frozen network never gets into a checkpoint, the averaged weights, DDP's buckets or the optimizer.

Shapes: images (I, 3, H, W) in [-1, 1], latents (I, C, h, w).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor


class ImageTokenizer(ABC):
    """What turns images into the latents that are diffused, and back."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What its latents mean: equal for tokenizers whose latents may be mixed; hex of 16 characters, or a word."""

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


class VAETokenizer(ImageTokenizer):
    """A pretrained diffusers `AutoencoderKL`, frozen and deterministic (mode of the posterior, not a sample).

    Latents are normalised as in diffusers' pipelines: `(mode - shift_factor) * scaling_factor`, or with
    `latents_mean` and `latents_std` where the config has them. Weights are read at the first use or at
    `.to(device)`; config and folder are checked at construction.
    """

    def __init__(
        self,
        path: str,
        subfolder: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        chunk_size: int = 32,
    ) -> None:
        """Check that `path` holds an AutoencoderKL.

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
        self.path, self.subfolder, self.dtype, self.chunk_size = (
            path,
            subfolder,
            getattr(torch, dtype),
            chunk_size,
        )
        self.config = _load_config(path, subfolder)
        self.factor = 2 ** (len(self.config["block_out_channels"]) - 1)  # pixels a latent position, each side
        channels = self.config["latent_channels"]
        shift = self.config.get("latents_mean") or self.config.get("shift_factor") or 0.0
        std = self.config.get("latents_std") or 1.0
        self._shift = torch.tensor(shift, dtype=torch.float32).expand(channels).reshape(1, channels, 1, 1)
        self._scale = self.config["scaling_factor"] / torch.tensor(std).expand(channels).reshape(1, channels, 1, 1)
        self._vae: torch.nn.Module | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of the configuration and of the weights' bytes; not of `dtype`, which only rounds. Reads the weights once."""
        return _fingerprint_of(self.path, self.subfolder, self.config)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, image_size / factor, image_size / factor); an error names the nearest sizes that fit."""
        if image_size < self.factor or image_size % self.factor:
            below = image_size // self.factor * self.factor
            nearest = " or ".join(str(size) for size in (below, below + self.factor) if size > 0)
            raise ValueError(
                f"got image_size {image_size}, expected a multiple of {self.factor} "
                f"(the factor of {self.path!r}); nearest: {nearest}"
            )
        return self.config["latent_channels"], image_size // self.factor, image_size // self.factor

    def to(self, device: torch.device | str) -> Self:
        """Load the weights if need be, and move them."""
        if self._vae is None:
            self._vae = _load_frozen(self.path, self.subfolder, self.dtype)
        self._vae.to(device)
        self._shift, self._scale = self._shift.to(device), self._scale.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Mode of the posterior, normalised, float32."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(
                f"got images of shape {tuple(images.shape)}, expected (I, 3, H, W) "
                f"with H and W multiples of {self.factor}"
            )
        size = images.shape[2] // self.factor, images.shape[3] // self.factor
        if len(images) == 0:
            return images.new_empty((0, self.config["latent_channels"], *size), dtype=torch.float32)
        vae = self._loaded(images.device)
        # Autocast would put part of the network in bfloat16, whatever dtype says.
        with torch.autocast(images.device.type, enabled=False):
            chunks = [vae.encode(x).latent_dist.mode() for x in images.to(self.dtype).split(self.chunk_size)]
            return (torch.cat(chunks).float() - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Undo the normalisation, decode, clamp; float32."""
        channels = self.config["latent_channels"]
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"got latents of shape {tuple(latents.shape)}, expected (I, {channels}, h, w)")
        if len(latents) == 0:
            size = latents.shape[2] * self.factor, latents.shape[3] * self.factor
            return latents.new_empty((0, 3, *size), dtype=torch.float32)
        vae = self._loaded(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            z = (latents.float() / self._scale + self._shift).to(self.dtype)
            return torch.cat([vae.decode(x).sample for x in z.split(self.chunk_size)]).float().clamp(-1, 1)

    def _loaded(self, device: torch.device) -> Any:
        if self._vae is None or self._shift.device != device:  # Lightning moves modules behind our back
            self.to(device)
        return self._vae


def _load_config(path: str, subfolder: str | None) -> dict[str, Any]:
    from diffusers import AutoencoderKL  # takes seconds to import: only where it is used

    folder = Path(path, subfolder or "")
    if Path(path).exists():
        _check_folder(folder)
    try:
        config = AutoencoderKL.load_config(path, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the config of the image autoencoder {path!r} (subfolder {subfolder!r}) could not be read, here "
            "or from the Hugging Face hub; give a folder that AutoencoderKL.save_pretrained wrote, or a name "
            f"on the hub that this machine can download. The cause: {error}"
        ) from error
    kind = config.get("_class_name")
    if kind != "AutoencoderKL":
        raise ValueError(f"{str(folder)!r} holds a {kind}, expected an AutoencoderKL (see _class_name in config.json)")
    # What an older config does not say is the constructor's default, as when the weights are loaded.
    defaults = {name: argument.default for name, argument in inspect.signature(AutoencoderKL).parameters.items()}
    config = defaults | AutoencoderKL.extract_init_dict(config)[0]
    if config["in_channels"] != 3 or config["out_channels"] != 3:
        raise ValueError(f"{str(folder)!r} works on {config['in_channels']} image channels, expected 3 (RGB)")
    return config


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} has no config.json; give a folder that AutoencoderKL.save_pretrained wrote "
            "(of a pipeline, its subfolder vae)"
        )
    if not any((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        raise ValueError(f"{str(folder)!r} has a config.json but no weights (*.safetensors or *.bin)")


def _load_frozen(path: str, subfolder: str | None, dtype: torch.dtype) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(path, subfolder=subfolder, torch_dtype=dtype)
    return vae.eval().requires_grad_(False)


def _fingerprint_of(path: str, subfolder: str | None, config: dict[str, Any]) -> str:
    """16 characters of the sha256 of the configuration and of the weights' files, in the order of their names."""
    if Path(path).exists():
        folder = Path(path, subfolder or "")
    else:
        from huggingface_hub import snapshot_download

        prefix = f"{subfolder}/" if subfolder else ""
        patterns = [f"{prefix}diffusion_pytorch_model.safetensors", f"{prefix}diffusion_pytorch_model-*-of-*.safetensors"]
        folder = Path(snapshot_download(path, allow_patterns=patterns), subfolder or "")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
    # the same order of preference as from_pretrained's
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        with file.open("rb") as weights:
            while block := weights.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
