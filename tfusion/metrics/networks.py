"""Networks that turn pictures into features: what the metrics need of one, and any `torch.nn.Module` as one.

They are plain classes: an attribute of a LightningModule or a callback that is no module is in no checkpoint,
no average and no optimizer. Constructors keep and check arguments; `load` does the work.

Legend: N pictures, H their side in pixels, D features a picture.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROBE_SIDE = 32  # pixels


class ImageFeatures(Protocol):
    """A network whose features the Frechet and kernel distances compare.

    Attributes:
        name: of the Frechet distance: `fid`, or `fd_<name>`; the kernel distance's is `kid`, or `kd_<name>`.
        num_features: D; known once loaded.
        fingerprint: the same only for the same weights and preprocessing; known once loaded.
    """

    name: str
    num_features: int
    fingerprint: str

    def load(self, device: torch.device) -> None:
        """Put the network on `device`; raises ValueError, worded for the user, where that cannot be done."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """(N, D) of uint8 RGB pictures (N, 3, H, H)."""
        ...


class PairScore(Protocol):
    """A network that says how well pictures fit their captions.

    Attributes:
        score_name: of the metric.
        fingerprint: the same only for the same weights and preprocessing; known once loaded.
    """

    score_name: str
    fingerprint: str

    def load(self, device: torch.device) -> None:
        """As `ImageFeatures.load`."""
        ...

    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """(N,) cosine of each uint8 RGB picture (N, 3, H, H) and its caption."""
        ...


class FeatureNetwork:
    """Any module as a feature network; its metrics are called `fd_<name>` and `kd_<name>`.

    MobileNetV2 with its weights beside it, as YAML (run with PYTHONPATH=<folder of mobilenet_v2.py>):

        - class_path: tfusion.metrics.FeatureNetwork
          init_args:
            module: mobilenet_v2.MobileNetV2
            name: mobilenet_v2
            image_size: 128
            method: features
            weights: <folder>/mobilenet_v2_1.0_224_folded_fp16.safetensors

    Args:
        module: the network; it computes in fp32, in evaluation mode.
        name: of the metrics, after `fd_` and `kd_`.
        image_size: side that pictures are resized to (bicubic, antialiased), pixels.
        mean: subtracted from values in [0, 1], a channel each.
        std: what is left is divided by; with the mean's default, values in [-1, 1].
        method: the module's method that gives (N, D); None = forward.
        weights: a .safetensors file, or what torch.save wrote of a state dict; None = the module as it is made.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        image_size: int,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        method: str | None = None,
        weights: str | None = None,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(f"got the network name {name!r}, expected letters, digits and _ . - such as mobilenet_v2")
        if image_size < 1:
            raise ValueError(f"network {name!r}: got image_size {image_size}, expected at least 1 pixel")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"network {name!r}: got mean {mean} and std {std}, expected three each, std above 0")
        self.module, self.name = module, f"fd_{name}"
        self.image_size, self.method, self.weights = image_size, method, weights
        self.mean, self.std = tuple(mean), tuple(std)

    def load(self, device: torch.device) -> None:
        """Read the weights, and see that the method gives features."""
        if self.weights is not None:
            self._read_weights(Path(self.weights))
        if not callable(getattr(self.module, self.method or "forward", None)):
            raise ValueError(
                f"network {self.name!r}: got method {self.method!r}, which {type(self.module).__name__} does not have; "
                "expected the name of the method that gives (N, D), or nothing for forward"
            )
        self.module = self.module.float().to(device).eval().requires_grad_(False)
        self.num_features = probe(self, device)
        self.fingerprint = self._fingerprint()

    def _read_weights(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(
                f"network {self.name!r}: got weights {str(path)!r}, which is no file (looked in {Path.cwd()}); "
                "put the file there, or give its path"
            )
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
            self.module.load_state_dict(state)
        except Exception as error:  # each reader has its own kinds
            raise ValueError(
                f"network {self.name!r}: the weights {str(path)!r} cannot be loaded into {type(self.module).__name__} "
                f"({_short(error)}); give a state dict of this class, .safetensors or written by torch.save"
            ) from error

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, D) fp32 of uint8 RGB pictures (N, 3, H, H)."""
        pixels = resized(images, self.image_size)
        mean, std = pixels.new_tensor(self.mean).view(3, 1, 1), pixels.new_tensor(self.std).view(3, 1, 1)
        return getattr(self.module, self.method or "forward")((pixels / 255 - mean) / std)

    def _fingerprint(self) -> str:
        kind = type(self.module)
        settings = [kind.__module__, kind.__qualname__, self.method, self.image_size, self.mean, self.std]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def label_of(network: ImageFeatures | PairScore) -> str:
    """A loaded network in a table: its fingerprint, with hashes cut to 12 digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1", network.fingerprint)


def resized(images: Tensor, side: int) -> Tensor:
    """(N, 3, side, side) float in [0, 255] of uint8 pictures (N, 3, H, H), bicubic, antialiased."""
    pixels = images.float()
    if pixels.shape[-2:] != (side, side):
        # bicubic overshoots; clean-fid cuts it off too
        pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return pixels


def probe(network: ImageFeatures, device: torch.device) -> int:
    """D of a loaded network; raises ValueError where it does not give features of each picture."""
    images = torch.zeros(2, 3, PROBE_SIDE, PROBE_SIDE, dtype=torch.uint8, device=device)
    advice = f"network {network.name!r}: expected features of shape (N, D) for N pictures, "
    try:
        features = network.features(images)
    except Exception as error:  # of whatever the user's module does
        raise ValueError(
            f"{advice}got {_short(error)} for two black ones; check image_size, method and weights"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2 or not features.isfinite().all():
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{advice}got {got} for two black ones (or what is not finite); name another method")
    return features.shape[1]


def _short(error: Exception) -> str:
    """The first lines of an error: a state dict that does not fit fills pages."""
    return f"{type(error).__name__}: {str(error)[:300]}"
