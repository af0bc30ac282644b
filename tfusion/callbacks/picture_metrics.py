"""Distances and scores of pictures made from captions, and the reference pictures' features that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from tfusion.callbacks.sharing import make, picture_of, pixels_of
from tfusion.data.corpora import CaptionedImage
from tfusion.data.sources import captions_of
from tfusion.metrics import ClipScore, ImageDistances, ImageFeatures, PairScore
from tfusion.metrics.clip_score import pair_scores
from tfusion.metrics.distances import cached_path, keep, kernel_name, read_cached, read_reference_file
from tfusion.metrics.measurement import Example, Measurement
from tfusion.metrics.networks import label_of
from tfusion.requests import GenerationConfig, Request
from tfusion.training.parallel import gather_lists

SHOWN, EXTREMES = 32, 8  # examples kept: the first, and the worst and best by score


class PictureMetrics:
    """What networks say of pictures made from a corpus's captions. Every method is collective.

    Args:
        networks: loaded.
        batch_size: pictures generated, and measured, together on a rank.
        reference: a file of reference features instead of the corpus's own pictures.
    """

    def __init__(self, networks: Sequence[ImageFeatures | PairScore], batch_size: int, reference: str | None) -> None:
        self.networks, self.batch_size, self.reference = networks, batch_size, reference
        self._distances: dict[tuple[str, str], ImageDistances] = {}  # by prefix and network, with their references

    def check_reference(self, pictures: Sequence[CaptionedImage]) -> None:
        """Raise ValueError where the file of reference features is of another network, or of another size."""
        for network in self.networks:
            if self.reference is not None and hasattr(network, "features"):
                self._read_reference(network, pictures)

    def _read_reference(self, network: ImageFeatures, pictures: Sequence[CaptionedImage]) -> Tensor:
        side = pictures[0].image.shape[-1]
        return read_reference_file(Path(self.reference), network.name, network.fingerprint, side)

    def measure(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        prefix: str,
        pictures: Sequence[CaptionedImage],
        number: int,
        config: GenerationConfig,
        seconds: Callable[[str], Any],
    ) -> tuple[list[Measurement], list[Example]]:
        """Make `number` pictures, measure them; sample i has the first caption of picture i (mod their number)."""
        captions = [captions_of(pictures, i % len(pictures))[0] for i in range(number)]
        requests = [Request((caption,), "image", seed=i, config=config) for i, caption in enumerate(captions)]
        with seconds(f"{number} pictures made of {prefix}"):
            made = make(trainer, module, requests, self.batch_size)
        images = [picture_of(generation) for _, generation in made]
        own = [captions[i] for i, _ in made]
        found: list[Measurement] = []
        scores: tuple[str, list[float]] | None = None
        for network in self.networks:
            label = label_of(network)
            if hasattr(network, "features"):
                with seconds(f"{network.name} of {number} pictures of {prefix}"):
                    found += self._distance(trainer, module.device, network, prefix, pictures, images, label)
            if hasattr(network, "cosines"):
                with seconds(f"{network.score_name} of {number} pictures of {prefix}"):
                    score = ClipScore().to(module.device)
                    each: list[float] = []
                    for first in range(0, len(images), self.batch_size):
                        some = slice(first, first + self.batch_size)
                        pixels = torch.stack([pixels_of(image) for image in images[some]]).to(module.device)
                        cosines = network.cosines(pixels, own[some])
                        score.update(cosines)
                        each += pair_scores(cosines).tolist()
                    value, error = score.compute()
                found.append(Measurement(f"{prefix}/{network.score_name}", value, number, label, error))
                scores = scores or (network.score_name, each)
        return found, _examples(prefix.split("/", 1)[1], images, own, scores)

    def _distance(
        self,
        trainer: pl.Trainer,
        device: torch.device,
        network: ImageFeatures,
        prefix: str,
        pictures: Sequence[CaptionedImage],
        images: list[Any],
        label: str,
    ) -> list[Measurement]:
        if (prefix, network.name) not in self._distances:
            self._distances[prefix, network.name] = self._referred(trainer, device, network, pictures)
        distance = self._distances[prefix, network.name]
        distance.reset()
        for features in self._features(network, device, lambda i: pixels_of(images[i]), range(len(images))):
            distance.update(features, real=False)
        found = distance.compute()
        biased = min(found.generated, found.reference) <= network.num_features
        name, kernel = network.name + ("_biased" if biased else ""), kernel_name(network.name)
        return [
            Measurement(f"{prefix}/{name}", found.frechet, found.generated, label),
            Measurement(f"{prefix}/{kernel}", found.kernel, found.generated, label, found.kernel_error),
        ]

    def _referred(
        self, trainer: pl.Trainer, device: torch.device, network: ImageFeatures, pictures: Sequence[CaptionedImage]
    ) -> ImageDistances:
        """Distances that hold the reference pictures: all at rank 0 if they are kept on disk, else a share a rank.

        Rank 0 alone reads and writes the file, so ranks agree whether it is there.
        """

        def read(index: int) -> Tensor:
            return pictures[index].image

        distance = ImageDistances(network.num_features).to(device)
        kept: Tensor | None = None
        if trainer.is_global_zero:
            if self.reference is not None:
                kept = self._read_reference(network, pictures)
            else:
                path = cached_path(network.fingerprint, pictures)
                kept = read_cached(path, network.features(read(0)[None].to(device)))
        if trainer.strategy.broadcast(kept is not None):
            empty = torch.empty(0, network.num_features)
            distance.update((empty if kept is None else kept).to(device), real=True)
            return distance
        mine = range(trainer.global_rank, len(pictures), trainer.world_size)
        for features in self._features(network, device, read, mine):
            distance.update(features, real=True)
        whole = _gathered_in_order(torch.cat(distance.reference), len(pictures), trainer.world_size)
        if trainer.is_global_zero:
            keep(path, whole)
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


def _gathered_in_order(own: Tensor, number: int, ranks: int) -> Tensor:
    """(N, D) from the ranks' shares r, r + W, ...; collective."""
    shares = gather_lists([own.cpu()])
    whole = own.new_empty(number, own.shape[1], device="cpu")
    for rank, part in enumerate(shares):
        whole[rank::ranks] = part
    return whole


def _examples(
    corpus: str, images: list[Any], captions: list[str], scores: tuple[str, list[float]] | None
) -> list[Example]:
    """The first, the worst and the best."""
    name, each = scores if scores is not None else ("", [None] * len(images))
    by_score = sorted(range(len(images)), key=lambda i: each[i] if scores else 0)
    chosen = dict.fromkeys([*range(min(SHOWN, len(images))), *by_score[:EXTREMES], *by_score[-EXTREMES:]])
    return [Example(corpus, "picture", images[i], captions[i], "", each[i], name) for i in chosen]
