"""Terms of an autoencoder's loss beside its regularisation: L1, perceptual, adversarial; each of a picture by itself.

L = L1 + perceptual + 0.5 adversarial + regularisation (Transfusion, appendix A, less its term of Moco features).
"""

from __future__ import annotations

import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.func import functional_call

from tfusion.models.discriminator import PatchDiscriminator

log = logging.getLogger(__name__)
PerceptualWeights = Literal["cached", "download", "off"]
VGG_FILE = "vgg16-397923af.pth"  # torchvision's, which LPIPS looks through; its own weights come with torchmetrics


def l1(reconstructed: Tensor, images: Tensor) -> Tensor:
    """(I,) mean over pixels and channels of the absolute differences of (I, 3, S, S)."""
    return (reconstructed.float() - images).abs().flatten(1).mean(1)


def adversarial(discriminator: PatchDiscriminator, reconstructed: Tensor) -> Tensor:
    """(I,) mean over patches of -D(reconstructed); its gradient reaches the reconstruction, never D's weights."""
    fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return -functional_call(discriminator, fixed, (reconstructed,)).float().flatten(1).mean(1)


def hinge(discriminator: PatchDiscriminator, reconstructed: Tensor, images: Tensor) -> Tensor:
    """(I,) what D minimises (Esser et al. 2021): (max(0, 1 - D(real)) + max(0, 1 + D(made))) / 2, mean over patches."""
    real, made = discriminator(images).float(), discriminator(reconstructed.detach()).float()
    return 0.5 * (F.relu(1 - real) + F.relu(1 + made)).flatten(1).mean(1)


class Perceptual:
    """LPIPS (Zhang et al. 2018; VGG-16), frozen; no part of the model, so in no checkpoint.

    Args:
        weights: `cached` = where VGG-16's are in torch's cache already, else without, said in a log line; `download`
            = from torchvision's server if need be; `off`.
    """

    def __init__(self, weights: PerceptualWeights) -> None:
        if weights not in ("cached", "download", "off"):
            raise ValueError(f"got perceptual {weights!r}, expected cached, download or off")
        self.weights = weights
        self._network: torch.nn.Module | None = None
        self._looked = weights == "off"

    def load(self, device: torch.device) -> bool:
        """Look for the weights, once; whether there is a loss to take."""
        if not self._looked:
            self._looked = True
            path = Path(torch.hub.get_dir(), "checkpoints", VGG_FILE)
            if self.weights == "download" or path.is_file():
                self._network = _lpips().to(device)
            elif rank_zero_only.rank == 0:
                log.warning(
                    "no perceptual loss: %s is not there. Put %s into that folder, or set perceptual to download (or "
                    "to off, to hear no more of it)",
                    *(path, VGG_FILE),
                )
        return self._network is not None

    def __call__(self, reconstructed: Tensor, images: Tensor) -> Tensor:
        """(I,) distances of (I, 3, S, S) in [-1, 1]; fp32, for its features overflow nothing but lose much in bf16."""
        with torch.autocast(images.device.type, enabled=False):
            return self._network(reconstructed.float(), images).flatten(1).mean(1)


def _lpips() -> torch.nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.eval().requires_grad_(False)
    except (OSError, ModuleNotFoundError, RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"perceptual: LPIPS cannot be had ({type(error).__name__}: {str(error)[:200]}); it needs torchvision and "
            f"{VGG_FILE} in torch's cache or the network; set perceptual to off to train without"
        ) from error
