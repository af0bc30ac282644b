"""The Frechet distance against its closed form, scipy and clean-fid; the file of the reference's sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from scipy import linalg

from tfusion.data.corpora import CaptionedImage
from tfusion.metrics import FrechetDistance
from tfusion.metrics.frechet import read_reference, reference_path, write_reference


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


# The file of the reference sums


def pictures(*values: int) -> list[CaptionedImage]:
    return [
        CaptionedImage(str(n), torch.full((3, 2, 2), value, dtype=torch.uint8), ("",)) for n, value in enumerate(values)
    ]


def test_the_file_is_named_by_the_content_of_pictures_and_network() -> None:
    path = reference_path("network", pictures(1, 2))
    assert path == reference_path("network", pictures(1, 2))
    wide = [CaptionedImage("0", torch.tensor([1] * 12 + [2] * 12, dtype=torch.uint8).view(3, 2, 4), ("",))]
    others = [
        reference_path("other", pictures(1, 2)),
        reference_path("network", pictures(1, 3)),
        reference_path("network", pictures(2, 1)),
        reference_path("network", pictures(1)),
        reference_path("network", wide),  # the same bytes in another shape
    ]
    assert path not in others
    assert len(set(others)) == 5


def test_sums_come_back_as_they_were(tmp_path: Path) -> None:
    real, fake = features(30, 6, 0), features(20, 6, 1)
    kept, taken, path = FrechetDistance(6), FrechetDistance(6), tmp_path / "statistics" / "x.safetensors"
    kept.update(real, real=True)
    assert not read_reference(taken, path, real[:1])
    write_reference(kept, path, real[:1])
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]
    assert read_reference(taken, path, real[:1])
    for distance in (kept, taken):
        distance.update(fake, real=False)
    assert torch.equal(kept.compute(), taken.compute())


def test_sums_of_another_network_or_half_a_file_are_not_taken(tmp_path: Path) -> None:
    real, path, distance = features(30, 6, 0), tmp_path / "x.safetensors", FrechetDistance(6)
    distance.update(real, real=True)
    write_reference(distance, path, real[:1])
    fresh = FrechetDistance(6)
    assert not read_reference(fresh, path, real[1:2])  # what the network makes of the first picture has changed
    assert not read_reference(fresh, path, real[:1, :5])
    assert read_reference(fresh, path, real[:1] * (1 + 1e-4))  # another device's arithmetic
    path.write_bytes(path.read_bytes()[:-100])
    assert not read_reference(FrechetDistance(6), path, real[:1])


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "statistics").write_text("a file where the folder should be")
    distance = FrechetDistance(6)
    distance.update(features(30, 6, 0), real=True)
    write_reference(distance, tmp_path / "statistics" / "x.safetensors", torch.zeros(1, 6))
    assert "not kept" in caplog.text
