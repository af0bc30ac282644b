"""The Frechet distance of two sets of features, and the reference pictures' side of it kept on disk.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) with means m and covariances S (Heusel et al. 2017).

Legend: N pictures, D features a picture.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from tfusion.data.corpora import CaptionedImage, cache_folder

log = logging.getLogger(__name__)

REFERENCE = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")  # torchmetrics' states
PROBE_TOLERANCE = 1e-2  # of the features' scale: more than devices differ by, less than networks do


class FrechetDistance(FrechetInceptionDistance):
    """torchmetrics' distance on features that have been computed already, in float64, for any D.

    `update(features, real)` adds (N, D) features, none included; `reset` keeps those of the reference pictures.
    """

    def __init__(self, num_features: int) -> None:
        given = torch.nn.Identity()
        given.num_features = num_features  # where torchmetrics looks for D
        super().__init__(feature=given, reset_real_features=False)
        self.num_features = num_features

    def update(self, features: Tensor, real: bool) -> None:
        """Add (N, D) features; `real` of reference pictures."""
        super().update(features.double().view(-1, self.num_features), real)


def reference_path(network_fingerprint: str, pictures: Sequence[CaptionedImage]) -> Path:
    """Where the sums of these pictures' features under this network are kept: named by the content of both."""
    digest = hashlib.sha256(network_fingerprint.encode())
    for picture in pictures:
        digest.update(str(tuple(picture.image.shape)).encode())
        digest.update(picture.image.contiguous().numpy())
    return cache_folder() / "statistics" / f"{digest.hexdigest()[:32]}.safetensors"


def read_reference(distance: FrechetDistance, path: Path, probe: Tensor) -> bool:
    """Take the sums kept in a file, if they are there and the network is still the one that made them.

    Weights say little about what a module's code does with them, so the features of one picture are compared too.

    Args:
        distance: gets the sums.
        path: of `reference_path`.
        probe: (1, D) features of the first picture.
    """
    try:
        kept = load_file(path)
    except (OSError, SafetensorError):  # not there, or not whole (written by another program)
        return False
    probe = probe.double().cpu()
    if kept["probe"].shape != probe.shape or (kept["probe"] - probe).norm() > PROBE_TOLERANCE * probe.norm():
        return False
    for name in REFERENCE:
        setattr(distance, name, kept[name].to(getattr(distance, name).device))
    return True


def write_reference(distance: FrechetDistance, path: Path, probe: Tensor) -> None:
    """Keep the sums, whole or not at all; where they cannot be written, training goes on without."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    kept = {name: getattr(distance, name).cpu().contiguous() for name in REFERENCE}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(kept | {"probe": probe.double().cpu().contiguous()}, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:  # the latter is safetensors' word for a full disk
        log.warning("the reference pictures' features are not kept in %s (%s)", path, error)
