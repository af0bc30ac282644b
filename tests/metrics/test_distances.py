"""Kernel distance against a loop and clean-fid; reference features on disk, cached or written on purpose."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid

from tfusion.data.corpora import CaptionedImage
from tfusion.metrics import ImageDistances, distances
from tfusion.metrics.distances import cached_path, keep, read_cached, read_reference_file, write_features
from tfusion.metrics.kernel import kernel_distance
from tfusion.metrics.measurement import share


def features(count: int, size: int, seed: int, spread: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """(N, D) fp32."""
    draws = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, size, generator=draws) + shift


def naive(x: torch.Tensor, y: torch.Tensor) -> float:
    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() @ b.double() / len(a) + 1) ** 3)

    within = [np.mean([k(a, b) for a, b in combinations(some, 2)]) for some in (x, y)]
    return within[0] + within[1] - 2 * np.mean([k(a, b) for a in x for b in y])


@pytest.mark.parametrize("rows", [3, 2048])
def test_kernel_distance_is_the_loop(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("tfusion.metrics.kernel.ROWS", rows)
    x, y = features(11, 5, 0), features(7, 5, 1, 1.4, 0.3)
    assert kernel_distance(x, y)[0] == pytest.approx(naive(x, y), rel=1e-12)


def test_kernel_distance_is_clean_fids_where_its_subsets_are_all_there_is() -> None:
    x, y = features(200, 16, 0), features(200, 16, 1, 1.1, 0.1)
    assert kernel_distance(x, y)[0] == pytest.approx(cleanfid.kernel_distance(x.numpy(), y.numpy()), rel=1e-4)


def test_kernel_distance_is_unbiased_and_its_error_is_the_spread() -> None:
    """Over 200 draws: the mean is that of many pictures at any number, the error the standard deviation."""
    values, errors = zip(
        *(kernel_distance(features(150, 4, n), features(200, 4, n + 1000, 1.3, 0.5)) for n in range(200)), strict=True
    )
    long_run = kernel_distance(features(4000, 4, 1), features(4000, 4, 2, 1.3, 0.5))
    assert np.mean(values) == pytest.approx(long_run[0], abs=3 * np.hypot(np.std(values) / 200**0.5, long_run[1]))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)
    with pytest.raises(ValueError, match="got 1 and 40 pictures"):
        kernel_distance(features(1, 4, 0), features(40, 4, 1))


def test_distances_keep_the_reference_and_forget_the_rest() -> None:
    real, fake, other = features(30, 6, 0), features(20, 6, 1), features(25, 6, 2, 2.0)
    distance = ImageDistances(6)
    distance.update(real[:7], real=True)
    distance.update(real[7:], real=True)
    distance.update(other, real=False)
    assert distance.compute().generated == 25
    distance.reset()
    distance.update(torch.empty(0, 6), real=False)
    distance.update(fake, real=False)
    found = distance.compute()
    assert (found.generated, found.reference) == (20, 30)
    assert found.kernel == kernel_distance(fake, real)[0]


# Files


def pictures(*values: int) -> list[CaptionedImage]:
    return [
        CaptionedImage(str(n), torch.full((3, 2, 2), value, dtype=torch.uint8), ("",)) for n, value in enumerate(values)
    ]


def test_the_file_is_named_by_the_content_of_pictures_and_network() -> None:
    path = cached_path("network", pictures(1, 2))
    assert path == cached_path("network", pictures(1, 2))
    wide = [CaptionedImage("0", torch.tensor([1] * 12 + [2] * 12, dtype=torch.uint8).view(3, 2, 4), ("",))]
    others = [
        cached_path("other", pictures(1, 2)),
        cached_path("network", pictures(1, 3)),
        cached_path("network", pictures(2, 1)),
        cached_path("network", pictures(1)),
        cached_path("network", wide),  # the same bytes in another shape
    ]
    assert path not in others
    assert len(set(others)) == 5


def test_features_come_back_as_they_were_but_not_of_another_network_or_half_a_file(tmp_path: Path) -> None:
    real, path = features(30, 6, 0), tmp_path / "features" / "x.safetensors"
    assert read_cached(path, real[:1]) is None
    keep(path, real)
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]
    assert torch.equal(read_cached(path, real[:1]), real)
    assert read_cached(path, real[1:2]) is None  # what the network makes of the first picture has changed
    assert read_cached(path, real[:1, :5]) is None
    assert torch.equal(read_cached(path, real[:1] * (1 + 1e-4)), real)  # another device's arithmetic
    path.write_bytes(path.read_bytes()[:-100])
    assert read_cached(path, real[:1]) is None


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "features").write_text("a file where the folder should be")
    keep(tmp_path / "features" / "x.safetensors", features(3, 2, 0))
    assert "not kept" in caplog.text


def test_a_reference_of_another_network_or_resolution_is_refused(tmp_path: Path) -> None:
    path, real = tmp_path / "reference.safetensors", features(30, 6, 0)
    write_features(path, {"fd_x": real}, {"fd_x.fingerprint": "abc", "image_size": "32"})
    assert torch.equal(read_reference_file(path, "fd_x", "abc", 32), real)
    for arguments, message in [
        (("fd_x", "abc", 64), "of pictures of 32 pixels a side, expected 64"),
        (("fd_x", "abd", 32), "network with fingerprint 'abc', this one has 'abd'"),
        (("fid", "abc", 32), r"has features of \['fd_x'\], expected fid"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_reference_file(path, *arguments)
    with pytest.raises(ValueError, match="cannot be read"):
        read_reference_file(tmp_path / "none.safetensors", "fid", "abc", 32)


def test_a_share_of_none_or_all_has_an_error_too() -> None:
    none, half = share("x", 0, 40), share("x", 20, 40)
    assert (none.value, half.value) == (0.0, 0.5)
    assert half.standard_error == pytest.approx((0.25 / 40) ** 0.5)
    assert 0 < none.standard_error < half.standard_error


def test_names() -> None:
    assert [distances.kernel_name(name) for name in ("fid", "fd_reference")] == ["kid", "kd_reference"]
