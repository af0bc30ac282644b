"""Inception-v3 as clean-fid has it: the only network whose Frechet distance is called `fid`."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from tfusion.metrics.networks import probe

FILE = "inception-2015-12-05.pt"
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE}"


class Inception:
    """clean-fid's Inception-v3 (mode "clean": PIL's bicubic to 299, no rounding), 2,048 features.

    Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation". Compare values only
    with values of as many pictures against the same reference pictures.

    Args:
        weights: path of `inception-2015-12-05.pt`; None = where clean-fid has it, downloaded if it is not there.
    """

    name = "fid"

    def __init__(self, weights: str | None = None) -> None:
        self.weights = weights

    def load(self, device: torch.device) -> None:
        """Read the TorchScript file; download it first where no path was given and it is not there yet."""
        from cleanfid.resize import build_resizer

        path = Path(self.weights) if self.weights is not None else _downloaded()
        if not path.is_file():
            raise ValueError(
                f"Inception: got weights {str(path)!r}, which is no file (looked in {Path.cwd()}); "
                f"download {URL} and give its path"
            )
        self.resize = build_resizer("clean")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of TorchScript itself, in which the file is written
                self.layers = torch.jit.load(path, map_location=device).eval().layers
        except (RuntimeError, AttributeError) as error:
            raise ValueError(
                f"Inception: {str(path)!r} is not clean-fid's TorchScript file ({type(error).__name__}: "
                f"{str(error)[:200]}); delete it, download {URL} and give its path"
            ) from error
        self.device = device
        self.num_features = probe(self, device)
        with open(path, "rb") as file:
            self.fingerprint = f"clean-fid clean {hashlib.file_digest(file, 'sha256').hexdigest()}"

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 2048) fp32 of uint8 RGB pictures (N, 3, H, H)."""
        # As cleanfid.inception_torchscript.InceptionV3W, which takes a folder and no file.
        resized = [torch.from_numpy(self.resize(image)) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        pixels = torch.stack(resized).permute(0, 3, 1, 2).contiguous().to(self.device)
        return self.layers.forward((pixels - 128) / 128).view(len(images), -1)


def _downloaded() -> Path:
    """The file where clean-fid keeps it; whole even if several processes fetch it at once or one is killed."""
    from cleanfid.downloads_helper import check_download_inception

    folder = _clean_fid_folder()
    path = folder / FILE
    if path.is_file():
        return path
    try:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            os.replace(check_download_inception(own), path)
    except OSError as error:
        raise ValueError(
            f"Inception: got no weights, and {URL} cannot be downloaded to {str(path)!r} ({error}); "
            f"put the file there, or give its path as weights"
        ) from error
    return path


def _clean_fid_folder() -> Path:
    """As in cleanfid.features."""
    return Path("." if os.name == "nt" else "/tmp")
