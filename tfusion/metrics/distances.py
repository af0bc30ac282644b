"""Frechet and kernel distance of generated pictures to reference ones, by one network's features.

Features are kept whole (4 D bytes a picture), for kernel distances need pairs; reference features also on disk.

Legend: N pictures, D features a picture.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics import Metric

from tfusion.data.corpora import CaptionedImage, cache_folder
from tfusion.metrics.frechet import FrechetDistance
from tfusion.metrics.kernel import kernel_distance
from tfusion.metrics.measurement import Measurement
from tfusion.metrics.networks import ImageFeatures, label_of

log = logging.getLogger(__name__)
PROBE_TOLERANCE = 1e-2  # of the features' scale: more than devices differ by, less than networks do


class Distances(NamedTuple):
    """Of `generated` pictures to `reference` ones."""

    frechet: float
    kernel: float
    kernel_error: float
    generated: int
    reference: int


class ImageDistances(Metric):
    """`update(features, real)` adds (N, D) features, none included; `reset` keeps those of the reference pictures.

    Every rank has to update both at least once, if only with (0, D): `compute` gathers them.
    """

    full_state_update = False

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.add_state("generated", default=[], dist_reduce_fx="cat")
        self.add_state("reference", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Add (N, D) features; `real` of reference pictures."""
        (self.reference if real else self.generated).append(features.float().view(-1, self.num_features))

    def reset(self) -> None:
        """Forget the generated pictures."""
        reference = list(self.reference)  # torchmetrics empties the list itself
        super().reset()
        self.reference = reference

    def compute(self) -> Distances:
        generated, reference = _whole(self.generated), _whole(self.reference)
        frechet = FrechetDistance(self.num_features, sync_on_compute=False).to(generated.device)  # these are all
        frechet.update(reference, real=True)
        frechet.update(generated, real=False)
        kernel, error = kernel_distance(generated, reference)
        return Distances(float(frechet.compute()), kernel, error, len(generated), len(reference))


def _whole(features: Tensor | list[Tensor]) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(features)


def measurements_of(distance: ImageDistances, network: ImageFeatures, prefix: str = "") -> list[Measurement]:
    """Both distances by their names, gathered over ranks; collective.

    Of no more pictures than features the covariance is not known: the Frechet distance is called `_biased`.
    """
    found, label = distance.compute(), label_of(network)
    biased = "_biased" if min(found.generated, found.reference) <= network.num_features else ""
    return [
        Measurement(f"{prefix}{network.name}{biased}", found.frechet, found.generated, label),
        Measurement(f"{prefix}{kernel_name(network.name)}", found.kernel, found.generated, label, found.kernel_error),
    ]


def kernel_name(frechet_name: str) -> str:
    """`kid` beside `fid`, `kd_<name>` beside `fd_<name>`."""
    return "kid" if frechet_name == "fid" else frechet_name.replace("fd_", "kd_", 1)


def cached_path(network_fingerprint: str, pictures: Sequence[CaptionedImage]) -> Path:
    """Where these pictures' features under this network are kept: named by the content of both."""
    digest = hashlib.sha256(network_fingerprint.encode())
    for picture in pictures:
        digest.update(str(tuple(picture.image.shape)).encode())
        digest.update(picture.image.contiguous().numpy())
    return cache_folder() / "features" / f"{digest.hexdigest()[:32]}.safetensors"


def read_cached(path: Path, probe: Tensor) -> Tensor | None:
    """(N, D) features kept in a file, if they are there and the network is still the one that made them.

    Weights say little about what a module's code does with them, so the features of one picture are compared too.

    Args:
        path: of `cached_path`.
        probe: (1, D) features of the first picture.
    """
    try:
        features = load_file(path)["features"]
    except (OSError, SafetensorError):  # not there, or not whole (written by another program)
        return None
    first, probe = features[:1].double(), probe.double().cpu()
    if first.shape != probe.shape or (first - probe).norm() > PROBE_TOLERANCE * probe.norm():
        return None
    return features


def write_features(path: Path, features: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write (N, D) features by name, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: one.cpu().contiguous() for name, one in features.items()}, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep(path: Path, features: Tensor) -> None:
    """The same for the cache: where it cannot be written, training goes on without."""
    try:
        write_features(path, {"features": features})
    except (OSError, SafetensorError) as error:  # the latter is safetensors' word for a full disk
        log.warning("the reference pictures' features are not kept in %s (%s)", path, error)


def read_reference_file(path: Path, name: str, fingerprint: str, image_size: int) -> Tensor:
    """(N, D) features of reference pictures that `python -m tfusion.bench.folder --write` wrote.

    Raises:
        ValueError: no such file, or features of another network or of pictures of another size.
    """
    advice = "write it anew: python -m tfusion.bench.folder --reference FOLDER --write FILE"
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, sorted(file.keys())
            features = file.get_tensor(name) if name in names else None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"reference {str(path)!r} cannot be read ({error}); {advice}") from error
    if features is None:
        raise ValueError(f"reference {str(path)!r} has features of {names}, expected {name} among them; {advice}")
    if metadata.get(f"{name}.fingerprint") != fingerprint:
        raise ValueError(
            f"reference {str(path)!r}: its {name} is of a network with fingerprint "
            f"{metadata.get(f'{name}.fingerprint')!r}, this one has {fingerprint!r}; {advice}"
        )
    if metadata.get("image_size") != str(image_size):
        raise ValueError(
            f"reference {str(path)!r} is of pictures of {metadata.get('image_size')} pixels a side, expected "
            f"{image_size}, as the generated ones; {advice} --image_size {image_size}"
        )
    return features
