"""The image tokenizers do what diffusers does, frozen, and leave no trace in the module that holds them."""

from __future__ import annotations

import fnmatch
import functools
import inspect
import json
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from tests.conftest import TINY_AUTOENCODER
from tfusion.models.autoencoder import KLAutoencoder
from tfusion.tokenizers import ImageTokenizer, PixelTokenizer, VAETokenizer, VQTokenizer
from tfusion.tokenizers.autoencoder_folder import fingerprint_of, weight_files
from tfusion.training.autoencoder_export import export

TINY_KL = {"image_size": 8, "base_channels": 8, "channel_multipliers": (1, 2), "layers_per_block": 1}
TINY_KL |= {"latent_channels": 3, "attention": False, "norm_num_groups": 4, "vocab_size": 261, "max_seq_len": 64}
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


def _save_vq(path: Path, **changes: object) -> str:
    names = ("block_out_channels", "down_block_types", "up_block_types", "norm_num_groups", "mid_block_add_attention")
    config = {name: TINY_AUTOENCODER[name] for name in names} | {"latent_channels": 6, "vq_embed_dim": 3}
    vq = VQModel(**(config | {"num_vq_embeddings": 300} | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vq.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    vq.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def vq_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save_vq(tmp_path_factory.mktemp("vq"))


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
    assert holder.image_tokenizer._network is None
    latents = holder.image_tokenizer.encode(_images().requires_grad_())
    vae = holder.image_tokenizer.to("cpu")._network
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
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").touch()  # which from_pretrained would not read
    with pytest.raises(ValueError, match="no weights"):
        VAETokenizer(str(tmp_path))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(ValueError, match=r"holds AutoencoderTiny .*: only AutoencoderKL \(VAE.* and VQModel \(VQ"):
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
    with pytest.raises(ValueError, match="no image autoencoder at 'runs/none/autoencoder' .*or train one first"):
        VAETokenizer("runs/none/autoencoder")
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


@pytest.mark.parametrize("exports", [1, 2])
def test_an_autoencoder_that_changes_meanwhile_is_refused(tmp_path: Path, exports: int) -> None:
    """By the run that trains it, which swaps two folders: statistics, weights and fingerprint would be of several."""
    models = [KLAutoencoder(**TINY_KL).materialize("cpu", seed) for seed in range(4)]
    export(models[0], tmp_path / "ae", ([0.0] * 3, [1.0] * 3))
    untouched, named, unread = (VAETokenizer(str(tmp_path / "ae")) for _ in range(3))
    first = named.fingerprint
    untouched.to("cpu")
    for n in range(exports):
        export(models[1 + n], tmp_path / "ae", ([0.0] * 3, [1.0] * 3))  # weights alone
    with pytest.raises(ValueError, match=r"autoencoder '.*/ae' has changed since this command began: wait until"):
        named.to("cpu")
    assert (
        untouched.fingerprint == first != unread.to("cpu").fingerprint == VAETokenizer(str(tmp_path / "ae")).fingerprint
    )
    before = VAETokenizer(str(tmp_path / "ae"))
    export(models[3], tmp_path / "ae", ([0.5] * 3, [1.0] * 3))  # and its statistics, which are read first
    with pytest.raises(ValueError, match="has changed since this command began"):
        before.encode(_images())


def test_fingerprints_are_of_the_files_that_are_read(folder: str, tmp_path: Path) -> None:
    """As diffusers chooses: parts that an index names, else a whole file, else a pickled one."""
    autoencoder = AutoencoderKL.from_pretrained(folder)
    autoencoder.save_pretrained(tmp_path / "parts", max_shard_size="4KB")
    parts = weight_files(tmp_path / "parts")
    assert len(parts) > 1 and parts == sorted((tmp_path / "parts").glob("*-of-*.safetensors"))
    autoencoder.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    [pickled] = weight_files(tmp_path / "pickled")
    assert pickled.name == "diffusion_pytorch_model.bin"
    expected = VAETokenizer(folder).encode(_images())
    for name, read in (("parts", parts), ("pickled", [pickled])):
        path = tmp_path / name
        first = VAETokenizer(str(path)).fingerprint
        decoys = ["diffusion_pytorch_model.fp16.safetensors", "other.safetensors"]
        decoys += ["diffusion_pytorch_model-00001-of-00009.safetensors"]
        decoys += ["diffusion_pytorch_model.bin"] if name == "parts" else []
        for decoy in decoys:
            (path / decoy).write_bytes(b"no weights at all")
        assert VAETokenizer(str(path)).fingerprint == first
        assert torch.equal(VAETokenizer(str(path)).encode(_images()), expected)
        for file in read:
            whole = file.read_bytes()
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            assert VAETokenizer(str(path)).fingerprint != first
            file.write_bytes(whole)


def test_fingerprints_of_hub_and_clone_are_equal(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is downloaded is what is read, whatever lies beside it; also where there is only a `.bin`."""
    autoencoder = AutoencoderKL.from_pretrained(folder)
    autoencoder.save_pretrained(tmp_path / "whole")
    autoencoder.save_pretrained(tmp_path / "parts", max_shard_size="4KB")
    autoencoder.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "rich")
    for decoy in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "other.safetensors"):
        (tmp_path / "rich" / decoy).write_bytes(b"else")

    def download(name: str, allow_patterns: list[str]) -> str:
        snapshot = tmp_path / "cache" / name / "vae"
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in (tmp_path / name).iterdir():
            if any(fnmatch.fnmatch(f"vae/{file.name}", pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = {name: fingerprint_of(name, "vae", {"x": 1}) for name in ("whole", "parts", "pickled", "rich")}
    for name, fingerprint in found.items():
        assert fingerprint_of(str(tmp_path / name), None, {"x": 1}) == fingerprint
    assert found["rich"] == found["whole"] and len(set(found.values())) == 3


def test_a_later_diffusers_with_more_arguments_keeps_fingerprints(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = VAETokenizer(folder).fingerprint
    own = AutoencoderKL.__init__

    @functools.wraps(own)
    def later(self, *args, in_a_later_version: int = 3, **kwargs):
        own(self, *args, **kwargs)

    signature = inspect.signature(own)
    extra = inspect.Parameter("in_a_later_version", inspect.Parameter.KEYWORD_ONLY, default=3)
    later.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])
    monkeypatch.setattr(AutoencoderKL, "__init__", later)
    assert VAETokenizer(folder).config["in_a_later_version"] == 3
    assert VAETokenizer(folder).fingerprint == first
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads(Path(folder, "config.json").read_text())
    notes = {"_diffusers_version": "9.9.9", "_name_or_path": "elsewhere"}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | notes))
    assert VAETokenizer(str(tmp_path / "copy")).fingerprint == first


@pytest.mark.parametrize("norm_type", ["group", "spatial"])
def test_vq_ids_are_those_of_a_loop_and_decode_as_diffusers_does(tmp_path: Path, norm_type: str) -> None:
    changes = {"block_out_channels": (32, 32), "latent_channels": 3}  # what SpatialNorm and its caller need
    path = _save_vq(tmp_path, norm_type=norm_type, **changes)
    tokenizer, images = VQTokenizer(path, chunk_size=2), _images()
    vq = VQModel.from_pretrained(path).eval()
    with torch.no_grad():
        vectors = vq.encode(images).latents
        decoded = vq.decode(vectors).sample.clamp(-1, 1)  # by the nearest codes, too
    ids = tokenizer.encode(images)
    assert ids.shape == (5, 1, 4, 4)
    assert ids.shape[1:] == tokenizer.latent_shape(8)
    assert ids.dtype == torch.float32
    codes = vq.quantize.embedding.weight.detach()
    for i, y, x in ((0, 0, 0), (1, 3, 2), (4, 2, 1)):
        distances = [float((vectors[i, :, y, x] - code).square().sum()) for code in codes]
        assert ids[i, 0, y, x] == distances.index(min(distances))
    assert len(ids.unique()) > 5
    torch.testing.assert_close(tokenizer.decode(ids), decoded)


def test_vq_is_an_image_tokenizer(vq_folder: str) -> None:
    tokenizer, images = VQTokenizer(vq_folder), _images()
    assert isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.codebook_size, tokenizer.factor) == (300, 2)
    assert tokenizer.fingerprint == VQTokenizer(vq_folder, dtype="bfloat16").fingerprint
    ids = tokenizer.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), ids)
    half = VQTokenizer(vq_folder, dtype="bfloat16")
    assert half.encode(images).dtype == half.decode(ids).dtype == torch.float32
    assert (half.encode(images) == ids).float().mean() > 0.5
    empty = tokenizer.encode(torch.zeros(0, 3, 8, 8))
    assert empty.shape == (0, 1, 4, 4)
    assert tokenizer.decode(empty).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="got image_size 9, expected a multiple of 2"):
        tokenizer.latent_shape(9)


@pytest.mark.parametrize("wrong", [300.0, -1.0, 0.5])
def test_ids_that_are_no_codes_are_refused(vq_folder: str, wrong: float) -> None:
    tokenizer = VQTokenizer(vq_folder)
    assert tokenizer.decode(torch.full((1, 1, 4, 4), 299.0)).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="expected whole numbers from 0 to 299"):
        tokenizer.decode(torch.full((1, 1, 4, 4), wrong))


def test_each_tokenizer_names_the_one_that_reads_the_other_kind(folder: str, vq_folder: str) -> None:
    with pytest.raises(ValueError, match="holds VQModel .* expected AutoencoderKL for VAETokenizer: take VQTokenizer"):
        VAETokenizer(vq_folder)
    with pytest.raises(ValueError, match="holds AutoencoderKL .* expected VQModel for VQTokenizer: take VAETokenizer"):
        VQTokenizer(folder)
