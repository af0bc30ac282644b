"""Feature networks: values against torchvision, clean-fid and mobilenet_v2; what cannot be loaded is said in words."""

from __future__ import annotations

import io
import os
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2

from tfusion.data import OpenMoji
from tfusion.metrics import FeatureNetwork, FrechetDistance, Inception

CPU = torch.device("cpu")


class Means(nn.Module):
    """A weight times the mean of each channel."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x.mean((2, 3))

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def firsts(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.amin((1, 2, 3)), x.amax((1, 2, 3))], 1)


def loaded(network):
    network.load(CPU)
    return network


def pictures(count: int, side: int = 24, seed: int = 0) -> torch.Tensor:
    """Uint8 (N, 3, H, H): smooth, for noise is all alike once reduced."""
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    return v2.functional.resize(coarse.to(torch.uint8), [side, side])


# Any module


def test_pixels_are_scaled_as_told() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    plain = loaded(FeatureNetwork(Means(), "means", 32))
    assert plain.name == "fd_means"
    assert plain.num_features == 3
    assert plain.features(images).tolist() == [pytest.approx([-1, -0.6, 1])] * 2
    scaled = loaded(FeatureNetwork(Means(2.0), "means", 32, mean=(0.1, 0.2, 0.0), std=(0.1, 1.0, 2.0)))
    assert scaled.features(images).tolist() == [pytest.approx([2 * -1.0, 0.0, 2 * 0.5], abs=1e-6)] * 2


@pytest.mark.parametrize("side", [9, 40])
def test_pixels_are_resized_as_by_torchvision(side: int) -> None:
    images = pictures(4)
    network = loaded(FeatureNetwork(Means(), "means", side, method="firsts"))
    resized = v2.functional.resize(images.float(), [side, side], v2.InterpolationMode.BICUBIC, antialias=True)
    resized = resized.clamp(0, 255) / 127.5 - 1
    expected = torch.stack([resized.amin((1, 2, 3)), resized.amax((1, 2, 3))], 1)
    torch.testing.assert_close(network.features(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_weights_are_read_and_cast(tmp_path: Path, ending: str) -> None:
    path, state = tmp_path / f"weights.{ending}", {"weight": torch.tensor(3.0, dtype=torch.float16)}
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    network = loaded(FeatureNetwork(Means().half(), "means", 32, weights=str(path)))
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert network.features(white).tolist() == [[3.0, 3.0, 3.0]]
    assert network.features(white).dtype == network.module.weight.dtype == torch.float32
    assert not network.module.training
    assert not any(parameter.requires_grad for parameter in network.module.parameters())


def test_fingerprints_tell_weights_and_preprocessing_apart() -> None:
    def print_of(weight: float = 1.0, size: int = 32, **settings) -> str:
        return loaded(FeatureNetwork(Means(weight), "means", size, **settings)).fingerprint

    assert print_of() == print_of()
    others = [print_of(2.0), print_of(size=33), print_of(method="firsts"), print_of(mean=(0, 0, 0))]
    assert len({print_of(), *others, print_of(std=(1, 1, 1))}) == 6


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    for settings, words in [
        ({"name": "a/b"}, "'a/b', expected letters"),
        ({"image_size": 0}, "image_size 0"),
        ({"std": (1, 1, 0)}, "std above 0"),
        ({"mean": (1,)}, "three each"),
    ]:
        with pytest.raises(ValueError, match=words):
            FeatureNetwork(**({"module": Means(), "name": "means", "image_size": 32} | settings))
    (tmp_path / "other.pt").write_bytes(b"nothing")
    save_file({"bias": torch.zeros(1)}, tmp_path / "other.safetensors")
    for settings, words in [
        ({"method": "features"}, "method 'features', which Means does not have"),
        ({"method": "maps"}, r"got \(2, 3, 32, 32\) for two black ones"),
        ({"module": nn.Linear(5, 5)}, "RuntimeError: .* check image_size, method"),
        ({"module": Means(float("nan"))}, "not finite"),
        ({"weights": str(tmp_path / "none.pt")}, "none.pt', which is no file .*; put the file there"),
        ({"weights": str(tmp_path / "other.pt")}, "other.pt' cannot be loaded into Means"),
        ({"weights": str(tmp_path / "other.safetensors")}, "(?s)cannot be loaded into Means .*weight"),
    ]:
        with pytest.raises(ValueError, match=words):
            loaded(FeatureNetwork(**({"module": Means(), "name": "means", "image_size": 32} | settings)))


@pytest.mark.skipif("TFUSION_DATA" not in os.environ, reason="needs the benchmark data: TFUSION_DATA")
def test_mobilenet_v2_of_the_benchmark_data(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.environ["TFUSION_DATA"], "mobilenet_v2")
    monkeypatch.syspath_prepend(folder)
    weights = str(folder / "mobilenet_v2_1.0_224_folded_fp16.safetensors")
    module = __import__("mobilenet_v2").MobileNetV2
    network = loaded(FeatureNetwork(module(), "mobilenet_v2", 128, method="features", weights=weights))
    assert network.num_features == 1280
    images = pictures(3, side=128)
    features = network.features(images)
    with torch.no_grad():
        expected = network.module.features(images / 127.5 - 1)
    torch.testing.assert_close(features, expected)
    sys.modules.pop("mobilenet_v2")

    # it sees what Inception would: other emoji are nearer than noise of the same colours
    emoji = [picture.image for picture in OpenMoji(32, limit=60).load("train")]
    sets = torch.stack(emoji[:24]), torch.stack(emoji[24:48])
    order = torch.randperm(32 * 32, generator=torch.Generator().manual_seed(0))
    shuffled = sets[1].flatten(2)[:, :, order].view_as(sets[1])
    distance, values = FrechetDistance(1280), []
    distance.update(network.features(sets[0]), real=True)
    for others in (sets[1], shuffled):
        distance.reset()
        distance.update(network.features(others), real=False)
        values.append(distance.compute().item())
    assert values[0] < 0.8 * values[1], values


# Inception: a small TorchScript file with the calls of clean-fid's


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 7, stride=32)
        self.linear = nn.Linear(8 * 10 * 10, 2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).relu().flatten(1))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    with torch.random.fork_rng():
        base = Base()
    with pytest.warns(Warning, match="deprecated"):
        torch.jit.script(base).save(path)
    return path


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_inception_equals_clean_fid_on_folders(tmp_path: Path, inception_file: Path) -> None:
    """Features of the same files, and the distance; of 16 of the features, for scipy takes its time with 2,048."""
    kept = 16
    theirs = InceptionV3W(str(inception_file.parent), download=False)
    network = loaded(Inception(str(inception_file)))
    assert (network.name, network.num_features) == ("fid", 2048)
    distance, folders = FrechetDistance(kept), []
    for seed, real in ((1, True), (2, False)):
        images = pictures(20, seed=seed)
        folders.append(tmp_path / str(seed))
        folders[-1].mkdir()
        for n, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folders[-1] / f"{n:02d}.png")
        features = network.features(images)
        expected = cleanfid.get_folder_features(str(folders[-1]), theirs, num_workers=0, device=CPU, verbose=False)
        np.testing.assert_allclose(features.numpy(), expected, rtol=1e-5, atol=1e-5)
        distance.update(features[:, :kept], real=real)
    value = cleanfid.compare_folders(
        *map(str, folders), lambda x: theirs(x)[:, :kept], "clean", device=CPU, verbose=False
    )
    assert distance.compute().item() == pytest.approx(value, rel=1e-6)
    assert value > 0


def test_inception_that_is_not_there_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"none.pt', which is no file .*; download https://.* and give its path"):
        Inception(str(tmp_path / "none.pt")).load(CPU)
    (tmp_path / "other.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"other.pt' is not clean-fid's TorchScript file"):
        Inception(str(tmp_path / "other.pt")).load(CPU)


class Broken(io.BytesIO):
    """An answer that breaks off."""

    def read(self, *size: int) -> bytes:
        if self.tell():
            raise ConnectionResetError("the line is dead")
        return super().read(*size)


def test_inception_is_downloaded_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inception_file: Path
) -> None:
    monkeypatch.setattr("tfusion.metrics.inception._clean_fid_folder", lambda: tmp_path)

    def unreachable(url: str):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(ValueError, match=r"cannot be downloaded to .*no network.*; put the file there, or give its"):
        Inception().load(CPU)
    monkeypatch.setattr("urllib.request.urlopen", lambda url: Broken(b"a beginning"))
    with pytest.raises(ValueError, match="the line is dead"):
        Inception().load(CPU)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("urllib.request.urlopen", lambda url: io.BytesIO(inception_file.read_bytes()))
    assert loaded(Inception()).fingerprint == loaded(Inception(str(inception_file))).fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["inception-2015-12-05.pt"]
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    Inception().load(CPU)  # it is there now
