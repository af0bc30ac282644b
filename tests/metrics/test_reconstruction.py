"""PSNR and SSIM against their formulas, written with numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from tfusion.metrics import Reconstruction


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth ones, (count, 3, 16, 16) in [0, 1]."""
    noise = np.random.default_rng(seed).random((count, 3, 16, 16))
    return torch.from_numpy(np.clip(3 * gaussian_filter(noise, (0, 0, 1.5, 1.5)) - 1, 0, 1)).float()


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    return 10 * np.log10(1 / np.mean((x - y) ** 2))


def ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, with Gaussian windows of 11 x 11, each channel by itself, mirrored at the edges."""

    def mean(z: np.ndarray) -> np.ndarray:
        return gaussian_filter(z, (0, 1.5, 1.5), mode="mirror", truncate=3.5)

    c1, c2 = 0.01**2, 0.03**2
    covariance = mean(x * y) - mean(x) * mean(y)
    variances = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    numerator = (2 * mean(x) * mean(y) + c1) * (2 * covariance + c2)
    return float((numerator / ((mean(x) ** 2 + mean(y) ** 2 + c1) * (variances + c2))).mean())


def measured(reconstructed: torch.Tensor, truth: torch.Tensor, batch: int = 99) -> dict[str, float]:
    metric = Reconstruction()
    for some, true in zip(reconstructed.split(batch), truth.split(batch), strict=True):
        metric.update(some, true)
    metric.update(torch.empty(0, 3, 16, 16), torch.empty(0, 3, 16, 16))
    return metric.compute()


@pytest.mark.parametrize(("batch", "autocast"), [(1, False), (3, False), (99, False), (3, True)])
def test_means_over_pictures_are_those_of_the_formulas(batch: int, autocast: bool) -> None:
    """Inside a module's mixed precision, too."""
    truth = pictures(7)
    spread = torch.linspace(0.01, 0.3, 7).view(-1, 1, 1, 1)
    other = (truth + spread * (pictures(7, seed=1) - 0.5)).clamp(0, 1)
    pairs = list(zip(other.double().numpy(), truth.double().numpy(), strict=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = measured(other, truth, batch)
    for name, formula, tolerance in (("psnr", psnr, 1e-5), ("ssim", ssim, 1e-4)):
        each = np.array([formula(*pair) for pair in pairs])
        assert each.std() > 0.01
        assert values[name] == pytest.approx(each.mean(), rel=tolerance)
        assert values[f"{name}_squares"] == pytest.approx((each**2).sum(), rel=2 * tolerance)
    assert values["images"] == 7


def test_the_same_picture_is_perfect_and_blur_makes_it_worse() -> None:
    truth = pictures(3)
    blurred = [torch.from_numpy(gaussian_filter(truth.numpy(), (0, 0, s, s))) for s in (0, 0.5, 1, 2, 4)]
    found = [measured(some, truth) for some in blurred]
    assert found[0]["psnr"] == 100
    assert found[0]["ssim"] == pytest.approx(1, abs=1e-6)
    for name in ("psnr", "ssim"):
        values = [one[name] for one in found]
        assert values == sorted(values, reverse=True)
        assert len(set(values)) == len(values)
