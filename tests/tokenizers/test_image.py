"""The image tokenizers do what diffusers does, frozen, and leave no trace in the module that holds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from diffusers import AutoencoderKL

from tests.conftest import TINY_AUTOENCODER
from tfusion.tokenizers import PixelTokenizer, VAETokenizer

CONFIG = TINY_AUTOENCODER | {"shift_factor": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save(tmp_path_factory.mktemp("vae"))


def _save(path: Path, **changes: object) -> str:
    vae = AutoencoderKL(**(CONFIG | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    vae.save_pretrained(path)
    return str(path)


def _images(number: int = 5, size: int = 8) -> torch.Tensor:
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_pixels_are_the_identity() -> None:
    tokenizer, images = PixelTokenizer().to("cpu"), _images()
    assert torch.equal(tokenizer.encode(images), images)
    assert torch.equal(tokenizer.decode(images * 3), (images * 3).clamp(-1, 1))
    assert tokenizer.latent_shape(32) == (3, 32, 32)


@pytest.mark.parametrize("chunk_size", [2, 32])
def test_vae_equals_diffusers(folder: str, chunk_size: int) -> None:
    tokenizer, images = VAETokenizer(folder, chunk_size=chunk_size), _images()
    vae = AutoencoderKL.from_pretrained(folder).eval()
    with torch.no_grad():
        latents = (vae.encode(images).latent_dist.mode() - 0.3) * 0.4
        decoded = vae.decode(latents / 0.4 + 0.3).sample
    assert decoded.abs().max() > 1  # else clamping is not seen
    torch.testing.assert_close(tokenizer.encode(images), latents)
    torch.testing.assert_close(tokenizer.decode(latents), decoded.clamp(-1, 1))
    assert latents.shape[1:] == tokenizer.latent_shape(8) == (5, 4, 4)


def test_statistics_by_channel_and_missing_settings(tmp_path: Path) -> None:
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 2.0, 3.0, 4.0, 5.0]
    path = _save(tmp_path, latents_mean=mean, latents_std=std, shift_factor=None)
    images, vae = _images(), AutoencoderKL.from_pretrained(path).eval()
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
    mean, std = (torch.tensor(x).reshape(1, 5, 1, 1) for x in (mean, std))
    torch.testing.assert_close(VAETokenizer(path).encode(images), (mode - mean) / std * 0.4)

    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("latents_mean", "latents_std", "shift_factor", "scaling_factor"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(VAETokenizer(path).encode(images), mode * 0.18215)  # the constructor's default


def test_frozen_unregistered_and_lazy(folder: str) -> None:
    class Holder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)
            self.image_tokenizer = VAETokenizer(folder)

    holder = Holder()
    assert holder.image_tokenizer._vae is None
    latents = holder.image_tokenizer.encode(_images().requires_grad_())
    vae = holder.image_tokenizer.to("cpu")._vae
    assert not latents.requires_grad
    assert not holder.image_tokenizer.decode(latents).requires_grad
    assert not vae.training
    assert not any(p.requires_grad for p in vae.parameters())
    holder.train()
    assert not vae.training
    assert list(holder.state_dict()) == ["linear.weight", "linear.bias"]
    assert len(list(holder.parameters())) == 2
    assert len(list(holder.modules())) == 2


def test_precision_is_its_own(folder: str) -> None:
    images, plain = _images(), VAETokenizer(folder)
    expected = plain.encode(images)
    decoded = plain.decode(expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain.encode(images), expected)
        assert torch.equal(plain.decode(expected), decoded)
    assert torch.equal(plain.encode(images.double()), plain.encode(images.double().float()))
    half = VAETokenizer(folder, dtype="bfloat16")
    latents = half.encode(images)
    assert latents.dtype == half.decode(latents).dtype == torch.float32
    assert not torch.equal(latents, expected)
    torch.testing.assert_close(latents, expected, atol=0.1, rtol=0.1)


def test_no_images(folder: str) -> None:
    tokenizer = VAETokenizer(folder)
    latents = tokenizer.encode(torch.zeros(0, 3, 8, 8))
    assert latents.shape == (0, 5, 4, 4)
    assert tokenizer.decode(latents).shape == (0, 3, 8, 8)


def test_sizes_that_do_not_fit_are_refused(folder: str) -> None:
    tokenizer = VAETokenizer(folder)
    with pytest.raises(ValueError, match=r"got image_size 9, expected a multiple of 2 .* nearest: 8 or 10"):
        tokenizer.latent_shape(9)
    with pytest.raises(ValueError, match="nearest: 2"):
        tokenizer.latent_shape(1)
    with pytest.raises(ValueError, match=r"\(1, 3, 9, 8\).*multiples of 2"):
        tokenizer.encode(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 4\), expected \(I, 5, h, w\)"):
        tokenizer.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="image_size 0"):
        PixelTokenizer().latent_shape(0)


def test_wrong_folders_are_refused(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no config\.json.*save_pretrained"):
        VAETokenizer(str(tmp_path))
    config = json.loads(Path(folder, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no weights"):
        VAETokenizer(str(tmp_path))
    (tmp_path / "x.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(ValueError, match="holds a AutoencoderTiny, expected an AutoencoderKL"):
        VAETokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"in_channels": 1}))
    with pytest.raises(ValueError, match="1 image channels, expected 3"):
        VAETokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        VAETokenizer(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no/such-vae.*give a folder"):
        VAETokenizer("no/such-vae")
    for wrong in ({"dtype": "int8"}, {"chunk_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VAETokenizer(folder, **wrong)


def test_subfolder_of_a_pipeline(folder: str) -> None:
    path = Path(folder)
    tokenizer = VAETokenizer(str(path.parent), subfolder=path.name)
    assert torch.equal(tokenizer.encode(_images()), VAETokenizer(folder).encode(_images()))


def test_the_fingerprint_is_of_what_latents_mean(folder: str, tmp_path: Path) -> None:
    """Not of where the folder lies, of its name or of the precision."""
    first = VAETokenizer(folder).fingerprint
    assert len(first) == 16
    int(first, 16)
    shutil.copytree(folder, tmp_path / "copy")
    assert VAETokenizer(str(tmp_path / "copy"), dtype="bfloat16", chunk_size=1).fingerprint == first
    assert PixelTokenizer().fingerprint == "pixels"

    (weights,) = (tmp_path / "copy").glob("*.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert VAETokenizer(str(tmp_path / "copy")).fingerprint != first
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads(Path(folder, "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert VAETokenizer(str(tmp_path / "other")).fingerprint != first
