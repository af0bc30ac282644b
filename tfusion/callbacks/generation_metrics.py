"""`GenerationMetrics`: FID, other Frechet distances and CLIP score of generated pictures, during validation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from tfusion.data.corpora import CaptionedImage
from tfusion.data.sources import captions_of
from tfusion.metrics import Clip, ClipScore, FrechetDistance, ImageFeatures
from tfusion.metrics.frechet import read_reference, reference_path, write_reference
from tfusion.requests import Generation, Request

log = logging.getLogger(__name__)


class GenerationMetrics(pl.Callback):
    """Measure pictures made from the validation captions of each image corpus, by the evaluation weights.

    Logged are `val/<corpus>/fid` (Inception), `val/<corpus>/fd_<name>` (another network), against all validation
    pictures, and `val/<corpus>/clip_score` (Clip). A distance of no more pictures than the network has features is
    far too large, more so the fewer there are: its name ends in `_biased`.

    Sample i has the first caption of validation picture i (mod their number), seed i and the module's generation
    settings, on whichever rank it is made. Measured are, in fit, the first validation at or after each multiple of
    `every_n_steps`; in validate, always. The reference pictures' features are computed once and kept in the cache
    folder.

    Args:
        networks: what to measure with; none = nothing is generated.
        num_images: samples a corpus (clean-fid, and most papers: 50000 or all of a validation set).
        every_n_steps: optimizer steps between measurements; 1 = at every validation, as `best.monitor` wants it.
        batch_size: pictures generated, and measured, together on a rank.
    """

    def __init__(
        self,
        networks: list[ImageFeatures | Clip] | None = None,
        num_images: int = 1000,
        every_n_steps: int = 1,
        batch_size: int = 64,
    ) -> None:
        least = {"num_images": (num_images, 2), "every_n_steps": (every_n_steps, 1), "batch_size": (batch_size, 1)}
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise ValueError(f"generation_metrics.{name} is {value}, expected at least {smallest}")
        names = [network.name for network in networks or []]
        if len(set(names)) < len(names):
            raise ValueError(f"generation_metrics.networks: got the metrics {names}, expected each name once")
        self.networks = networks or []
        self.num_images, self.every_n_steps, self.batch_size = num_images, every_n_steps, batch_size
        self._distances: dict[tuple[str, str], FrechetDistance] = {}  # by corpus and network, with their references
        self._last_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the networks: one that cannot be loaded stops the run before it has cost anything."""
        self._distances = {}  # of other data, perhaps
        if not self.networks or stage not in ("fit", "validate"):
            return
        if not getattr(trainer.datamodule, "image_corpora", None):
            raise ValueError(
                "generation_metrics.networks are given, but there are no validation captions to make pictures from; "
                "add data.image_corpora, or leave the networks out"
            )
        for network in self.networks:
            network.load(trainer.strategy.root_device)
        for corpus in trainer.datamodule.image_corpora:  # type: ignore[attr-defined]
            pictures = trainer.datamodule.validation_pictures(corpus)  # type: ignore[attr-defined]
            self._check_numbers(trainer.is_global_zero, corpus.name, len(pictures))

    def _check_numbers(self, speaks: bool, corpus: str, pictures: int) -> None:
        """Refuse what has no covariance, and say which distances will be biased."""
        for network in self.networks:
            if isinstance(network, Clip):
                continue
            if pictures < 2:
                raise ValueError(f"corpus {corpus!r} has {pictures} validation picture, {network.name} needs 2 or more")
            if min(self.num_images, pictures) <= network.num_features and speaks:
                log.warning(
                    "val/%s/%s is biased, and will be called %s_biased: it is of %d pictures against %d, and the "
                    "network has %d features; it takes more pictures than features, of both, to compare models",
                    *(corpus, network.name, network.name, self.num_images, pictures, network.num_features),
                )

    def state_dict(self) -> dict[str, int]:
        """A resumed run measures when an unbroken one does."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._last_step = state_dict["last_step"]

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure if it is time; before `best` looks for its metric."""
        if not self.networks or trainer.sanity_checking or trainer.fast_dev_run:
            return
        if trainer.state.fn == "fit":
            if trainer.global_step // self.every_n_steps <= self._last_step // self.every_n_steps:
                return
            self._last_step = trainer.global_step
        metrics: dict[str, float] = {}
        for corpus in trainer.datamodule.image_corpora:  # type: ignore[attr-defined]
            pictures = trainer.datamodule.validation_pictures(corpus)  # type: ignore[attr-defined]
            metrics |= self._measure(trainer, pl_module, corpus.name, pictures)
        # as in Perplexity: where `best` and `tfusion validate` read them
        pl_module.log_dict(metrics, logger=False, sync_dist=False)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, corpus: str, pictures: Sequence[CaptionedImage]
    ) -> dict[str, float]:
        """The metrics of one corpus; collective."""
        start = time.monotonic()
        numbers = list(range(trainer.global_rank, self.num_images, trainer.world_size))
        captions = [captions_of(pictures, i % len(pictures))[0] for i in numbers]
        config = pl_module.generation
        requests = [
            Request((caption,), "image", seed=i, config=config) for i, caption in zip(numbers, captions, strict=True)
        ]
        # one call on every rank, with requests or without: collective under FSDP2
        generations = pl_module.generate(requests, numbers, batch_size=self.batch_size)
        generated = [_pixels(generation) for generation in generations]
        seconds = time.monotonic() - start

        metrics = {}
        for network in self.networks:
            if isinstance(network, Clip):
                name, value = network.name, self._clip_score(network, pl_module.device, generated, captions)
            else:
                name, value = self._distance(trainer, pl_module.device, network, corpus, pictures, generated)
            metrics[f"val/{corpus}/{name}"] = value
        if trainer.is_global_zero:
            log.info(
                "%s: %d pictures generated in %.1f s and measured in %.1f s",
                corpus,
                self.num_images,
                seconds,
                time.monotonic() - start - seconds,
            )
        return metrics

    def _clip_score(self, network: Clip, device: torch.device, generated: list[Tensor], captions: list[str]) -> float:
        score = ClipScore().to(device)
        for first in range(0, len(generated), self.batch_size):
            some = slice(first, first + self.batch_size)
            score.update(network.cosines(torch.stack(generated[some]).to(device), captions[some]))
        return score.compute()

    def _distance(
        self,
        trainer: pl.Trainer,
        device: torch.device,
        network: ImageFeatures,
        corpus: str,
        pictures: Sequence[CaptionedImage],
        generated: list[Tensor],
    ) -> tuple[str, float]:
        """Name and value of a network's metric."""
        if (corpus, network.name) not in self._distances:
            self._distances[corpus, network.name] = self._referred(trainer, device, network, pictures)
        distance = self._distances[corpus, network.name]
        distance.reset()
        for features in self._features(network, device, generated.__getitem__, range(len(generated))):
            distance.update(features, real=False)
        biased = min(self.num_images, len(pictures)) <= network.num_features
        return network.name + ("_biased" if biased else ""), float(distance.compute())

    def _referred(
        self,
        trainer: pl.Trainer,
        device: torch.device,
        network: ImageFeatures,
        pictures: Sequence[CaptionedImage],
    ) -> FrechetDistance:
        """A distance that holds the reference pictures: all at rank 0 if they are kept on disk, else a share a rank.

        Rank 0 alone reads and writes the file, so ranks agree whether it is there; sums over ranks count each once.
        """

        def read(index: int) -> Tensor:
            return pictures[index].image

        distance, found = FrechetDistance(network.num_features).to(device), False
        if trainer.is_global_zero:
            path = reference_path(network.fingerprint, pictures)
            probe = network.features(read(0)[None].to(device))
            found = read_reference(distance, path, probe)
        if trainer.strategy.broadcast(found):
            distance.update(torch.empty(0, network.num_features, device=device), real=True)
            return distance
        for features in self._features(
            network, device, read, range(trainer.global_rank, len(pictures), trainer.world_size)
        ):
            distance.update(features, real=True)
        with distance.sync_context():
            if trainer.is_global_zero:
                write_reference(distance, path, probe)
        return distance

    def _features(
        self, network: ImageFeatures, device: torch.device, read: Callable[[int], Tensor], indices: range
    ) -> Iterator[Tensor]:
        """(n, D) features of the pictures `read(i)`, n at most `batch_size`; (0, D) where there are none."""
        if not indices:
            yield torch.empty(0, network.num_features, device=device)
        for first in range(0, len(indices), self.batch_size):
            some = indices[first : first + self.batch_size]
            yield network.features(torch.stack([read(i) for i in some]).to(device))


def _pixels(generation: Generation) -> Tensor:
    """uint8 (3, H, H) of the picture that was asked for."""
    (image,) = (segment for segment in generation.segments if not isinstance(segment, str))
    pixels: Any = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
