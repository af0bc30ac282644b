"""The Frechet distance against its closed form, scipy and clean-fid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from scipy import linalg

from tfusion.metrics import FrechetDistance


def features(count: int, size: int, seed: int, spread: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Correlated (N, D) fp32."""
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(99))
    return spread * torch.randn(count, size, generator=draws) @ mixing + shift


def distance_of(real: torch.Tensor, fake: torch.Tensor) -> float:
    distance = FrechetDistance(real.shape[1])
    for some in real.split(7):
        distance.update(some, real=True)
    for some in fake.split(5):
        distance.update(some, real=False)
    return distance.compute().item()


def test_closed_form_of_one_feature() -> None:
    real, fake = torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([[-1.0], [0.0]])
    expected = (4 - -0.5) ** 2 + (13.0**0.5 - 0.5**0.5) ** 2  # means 4, -0.5; variances 13, 0.5 (n - 1)
    assert distance_of(real, fake) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_equals_scipy_and_clean_fid() -> None:
    real, fake = features(120, 40, 0, shift=100.0), features(90, 40, 1, 1.3, shift=100.2)
    means = [x.double().numpy().mean(0) for x in (real, fake)]
    covariances = [np.cov(x.double().numpy(), rowvar=False) for x in (real, fake)]
    value = distance_of(real, fake)
    root = np.trace(linalg.sqrtm(covariances[0] @ covariances[1])).real
    scipys = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * root
    assert value == pytest.approx(scipys, rel=1e-6)
    assert value == pytest.approx(cleanfid.frechet_distance(means[0], covariances[0], means[1], covariances[1]), 1e-6)
    assert distance_of(real, real) == pytest.approx(0, abs=1e-6 * np.trace(covariances[0]))


def test_no_features_change_nothing_and_a_reset_keeps_the_reference() -> None:
    real, fake, other = features(30, 6, 0), features(20, 6, 1), features(20, 6, 2, 2.0)
    distance = FrechetDistance(6)
    distance.update(torch.empty(0, 6), real=True)
    distance.update(real, real=True)
    distance.update(other, real=False)
    assert distance.compute().item() == pytest.approx(distance_of(real, other), rel=1e-12)
    distance.reset()
    distance.update(torch.empty(0, 6), real=False)
    distance.update(fake, real=False)
    assert distance.compute().item() == pytest.approx(distance_of(real, fake), rel=1e-12)
