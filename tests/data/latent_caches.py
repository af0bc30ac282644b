"""Latent caches for tests: a tiny autoencoder, tiny ids, a corpus that may be mirrored, and how they become shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tests.conftest import IMAGE_SIZE, TINY_AUTOENCODER, picture
from tfusion.callbacks.bad_records import BadRecordReport
from tfusion.data import Latents
from tfusion.data.corpora import CaptionedImage, Split
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.tokenizers import ImageTokenizer, VAETokenizer
from tfusion.training.encoding import CorpusEncoder

LATENT_SHAPE = (5, IMAGE_SIZE // 2, IMAGE_SIZE // 2)


class Tiles:
    """11 pictures to train on, which may be mirrored, 5 and 2 others held out."""

    name, image_size, attribution = "tiles", IMAGE_SIZE, "Tiles of nobody"
    flip = True

    def load(self, split: Split) -> Sequence[CaptionedImage]:
        numbers = {"train": range(11), "val": range(11, 16), "test": range(16, 18)}[split]
        return [dataclasses.replace(picture(n), flip=self.flip) for n in numbers]


class Halves(ImageTokenizer):
    """Ids: the brightest channel's mean over each 2 x 2 pixels, in 300 levels."""

    fingerprint, codebook_size = "halves", 300

    def encode(self, images: Tensor) -> Tensor:
        means = torch.nn.functional.avg_pool2d(images.amax(1, keepdim=True), 2)
        return ((means + 1) / 2 * 299).round()

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / 299 * 2 - 1).repeat_interleave(2, -1).repeat_interleave(2, -2).expand(-1, 3, -1, -1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        return 1, image_size // 2, image_size // 2

    def to(self, device: torch.device | str) -> Halves:
        return self


class Broken(ImageTokenizer):
    """Halved pixels, NaN where the first pixel's red is above 200."""

    fingerprint = "broken"

    def encode(self, images: Tensor) -> Tensor:
        latents = images / 2
        latents[images[:, 0, 0, 0] > 200 / 127.5 - 1] = torch.nan
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        return (2 * latents).clamp(-1, 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        return 3, image_size, image_size

    def to(self, device: torch.device | str) -> Broken:
        return self


def save_autoencoder(folder: Path, seed: int = 0) -> str:
    """A folder of `AutoencoderKL.save_pretrained`."""
    autoencoder = AutoencoderKL(**TINY_AUTOENCODER)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.5)
    autoencoder.save_pretrained(folder)
    return str(folder)


def one_by_one(folder: str) -> VAETokenizer:
    """The autoencoder, a picture at a time: what becomes of a picture then depends on no other, to the bit."""
    return VAETokenizer(folder, chunk_size=1)


def encode(
    root: Path,
    tokenizer: ImageTokenizer,
    corpora: Sequence[Any] | None = None,
    batch_size: int = 2,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **settings: Any,
) -> CorpusEncoder:
    """Encode `Tiles`, or other corpora, into `root / "latents"`, 4 pictures a shard."""
    module = CorpusEncoder(tokenizer, **{"shard_size": 4} | settings)
    corpora = [Tiles()] if corpora is None else list(corpora)
    pictures = MultimodalDataModule(corpora, predict_batch_size=batch_size, **data or {})
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    here = {"accelerator": "cpu", "devices": 1, "default_root_dir": root, "use_distributed_sampler": False}
    trained = L.Trainer(callbacks=[BadRecordReport()], **quiet | here | (trainer or {}))
    trained.predict(module, pictures, return_predictions=False)
    return module


def cache(root: Path, tokenizer: ImageTokenizer, **settings: Any) -> Latents:
    """The corpus of what `encode` wrote."""
    encode(root, tokenizer, **settings)
    return Latents(str(root / "latents"))
