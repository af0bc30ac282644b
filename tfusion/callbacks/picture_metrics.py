"""Distances and scores of pictures made from captions, and the reference pictures' features that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image as PILImage
from torch import Tensor

from tfusion.callbacks.sharing import ROUND, make, picture_of, pixels_of, shown
from tfusion.data.corpora import CaptionedImage
from tfusion.data.sources import captions_of
from tfusion.metrics import ClipScore, ImageDistances, ImageFeatures, PairScore
from tfusion.metrics.clip_score import pair_scores
from tfusion.metrics.distances import cached_path, keep, measurements_of, read_cached, read_reference_file
from tfusion.metrics.measurement import Example, Measurement
from tfusion.metrics.networks import label_of
from tfusion.requests import GenerationConfig, Request
from tfusion.training.parallel import gather_lists


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
        side = pictures[0].image_size
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
        """Make `number` pictures, measure them; sample i has the first caption of picture i (mod their number).

        Pictures are made and measured in rounds, and then forgotten but for examples.
        """
        distances = [
            (network, self._distance(trainer, module.device, prefix, network, pictures))
            for network in self.networks
            if hasattr(network, "features")
        ]
        scores = [(network, ClipScore().to(module.device)) for network in self.networks if hasattr(network, "cosines")]
        examples: list[Example] = []
        for first in range(0, number, ROUND * trainer.world_size):
            some = range(first, min(first + ROUND * trainer.world_size, number))
            captions = [captions_of(pictures, i % len(pictures))[0] for i in some]
            requests = [
                Request((caption,), "image", seed=i, config=config) for i, caption in zip(some, captions, strict=True)
            ]
            with seconds(f"{number} pictures made of {prefix}"):
                made = make(trainer, module, requests, self.batch_size, first)
            for start in range(0, len(made), self.batch_size):
                batch = [(picture_of(one), captions[i - first]) for i, one in made[start : start + self.batch_size]]
                pixels = torch.stack([pixels_of(image) for image, _ in batch]).to(module.device)
                for network, distance in distances:
                    with seconds(f"{network.name} of {number} pictures of {prefix}"):
                        distance.update(network.features(pixels), real=False)
                values = []
                for network, score in scores:
                    with seconds(f"{network.score_name} of {number} pictures of {prefix}"):
                        cosines = network.cosines(pixels, [text for _, text in batch])
                        score.update(cosines)
                        values.append(pair_scores(cosines).tolist())
                examples += _examples(prefix, batch, scores[0][0].score_name if scores else "", values)
            examples = [examples[i] for i in shown([example.score for example in examples])]

        found = []
        for network, distance in distances:
            with seconds(f"{network.name} of {number} pictures of {prefix}"):
                found += measurements_of(distance, network, f"{prefix}/")
        for network, score in scores:
            value, error = score.compute()
            found.append(Measurement(f"{prefix}/{network.score_name}", value, number, label_of(network), error))
        return found, examples

    def _distance(
        self,
        trainer: pl.Trainer,
        device: torch.device,
        prefix: str,
        network: ImageFeatures,
        pictures: Sequence[CaptionedImage],
    ) -> ImageDistances:
        """With the reference pictures and nothing else."""
        if (prefix, network.name) not in self._distances:
            self._distances[prefix, network.name] = self._referred(trainer, device, network, pictures)
        distance = self._distances[prefix, network.name]
        distance.reset()
        distance.update(torch.empty(0, network.num_features, device=device), real=False)  # a rank may get no picture
        return distance

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
    prefix: str, batch: list[tuple[PILImage.Image, str]], score_name: str, values: list[list[float]]
) -> list[Example]:
    """Pictures with their captions, by the score of the first network that has one."""
    corpus, of_each = prefix.split("/", 1)[1], values[0] if values else [None] * len(batch)
    return [
        Example(corpus, "picture", image, text, "", value, score_name)
        for (image, text), value in zip(batch, of_each, strict=True)
    ]
