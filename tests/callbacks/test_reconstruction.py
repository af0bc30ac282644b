"""Reconstructions in validation: each picture once, whatever the ranks; pixels have none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from tests.conftest import BYTES_VOCAB_SIZE, IMAGE_SIZE, TINY_AUTOENCODER, TinyPictures, TinyTexts
from tests.metrics.test_reconstruction import psnr, ssim
from tests.training.processes import RANKS, run_ranks
from tfusion.callbacks.reconstruction import ReconstructionQuality
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.models.transfusion import Transfusion
from tfusion.tokenizers import VAETokenizer
from tfusion.training.transfusion import TransfusionModule


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one: bad, but different for every picture."""
    vae, draws = AutoencoderKL(**TINY_AUTOENCODER), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.5)
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


class Poisoned(VAETokenizer):
    """Whose latents of the second held-out picture are not finite."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        latents, bad = super().encode(images), TinyPictures().load("val")[1].image.float() / 127.5 - 1
        same = (images - bad).abs().flatten(1).amax(1) < 1e-5
        return torch.where(same[:, None, None, None], torch.nan, latents)


def make(tokenizer: VAETokenizer | None) -> tuple[TransfusionModule, MultimodalDataModule]:
    shape = (3, IMAGE_SIZE, IMAGE_SIZE) if tokenizer is None else (5, 4, 4)
    sizes = {"vocab_size": BYTES_VOCAB_SIZE, "latent_shape": shape, "patch_size": shape[-1] // 2}
    sizes |= {"dim": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 64}
    module = TransfusionModule(
        Transfusion(**sizes), FlowMatchEulerDiscreteScheduler(), tokenizer, "flow_prediction", warmup_steps=1
    )
    # rows of two pictures, so that two ranks have some each
    data = MultimodalDataModule(
        [TinyPictures()], [TinyTexts()], vocab_size=BYTES_VOCAB_SIZE, seq_len=32, rows_per_step=2, lanes=2, val_rows=1
    )
    return module, data


def trainer_of(folder: Path, callback: L.Callback, **settings: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "use_distributed_sampler": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=folder, callbacks=[callback], **(quiet | {"devices": 1} | settings))


def measured(folder: Path, tokenizer: VAETokenizer | None, **settings: Any) -> tuple[dict[str, float], list[list[Any]]]:
    """What is logged, and name, value, n and standard error of each finding."""
    callback = ReconstructionQuality()
    trainer = trainer_of(folder, callback, **settings)
    trainer.validate(*make(tokenizer), verbose=False)
    found = [[one.name, one.value, one.n, one.standard_error] for one in callback.findings.measurements]
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, found


def by_hand(autoencoder: Path, numbers: list[int]) -> dict[str, list[float]]:
    """PSNR and SSIM of each held-out picture, one after another, by diffusers and formulas."""
    vae = AutoencoderKL.from_pretrained(autoencoder).eval()
    values: dict[str, list[float]] = {"psnr": [], "ssim": []}
    for number in numbers:
        x = TinyPictures().load("val")[number].image[None].double() / 255
        with torch.no_grad():
            made = vae.decode(vae.encode(2 * x.float() - 1).latent_dist.mode()).sample.clamp(-1, 1).double()
        pair = ((made[0] + 1) / 2).numpy(), x[0].numpy()
        values["psnr"].append(psnr(*pair))
        values["ssim"].append(ssim(*pair))
    return values


@pytest.mark.parametrize(("kind", "numbers"), [(VAETokenizer, [0, 1, 2, 3, 4]), (Poisoned, [0, 2, 3, 4])])
def test_each_picture_counts_once(kind, numbers: list[int], autoencoder: Path, tmp_path: Path) -> None:
    """Those without finite latents not at all."""
    logged, found = measured(tmp_path, kind(str(autoencoder)))
    values = by_hand(autoencoder, numbers)
    assert [one[0] for one in found] == ["val/tiles/psnr", "val/tiles/ssim"]
    for (name, value, n, error), each in zip(found, values.values(), strict=True):
        assert logged[name] == pytest.approx(value)
        assert value == pytest.approx(np.mean(each), rel=1e-4)
        assert n == len(numbers)
        assert error == pytest.approx(np.std(each, ddof=1) / len(each) ** 0.5, rel=1e-3)
        assert error > 0


def test_pixels_have_no_reconstructions(tmp_path: Path) -> None:
    assert measured(tmp_path, None) == ({}, [])


def test_a_run_measures_once_and_logs_at_every_validation(autoencoder: Path, tmp_path: Path) -> None:
    """Not in the sanity check, which sees a part of the pictures."""
    decoded, logged = [], []

    class Counting(VAETokenizer):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            decoded.append(len(latents))
            return super().decode(latents)

    class Listener(ReconstructionQuality):
        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            super().on_validation_epoch_end(trainer, pl_module)
            logged.append([one.n for one in self.findings.measurements])

    settings = {"max_steps": 2, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 1}
    trainer = trainer_of(tmp_path, Listener(), num_sanity_val_steps=1, **settings)
    trainer.fit(*make(Counting(str(autoencoder))))
    assert logged == [[], [5, 5], [5, 5]]
    assert sum(decoded) == 5
    assert "val/tiles/psnr" in trainer.callback_metrics


def be_rank(folder: Path, autoencoder: Path) -> None:
    results = measured(folder, VAETokenizer(str(autoencoder)), strategy="ddp", devices=RANKS)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(results))


@pytest.mark.multi
def test_ranks_change_nothing(autoencoder: Path, tmp_path: Path) -> None:
    logged, found = measured(tmp_path, VAETokenizer(str(autoencoder)))
    run_ranks(tmp_path / "output", be_rank, tmp_path, autoencoder)
    for rank in range(RANKS):
        theirs, of_theirs = json.loads((tmp_path / f"{rank}.json").read_text())
        # fp32 of SSIM's scale, 1: a rank has other batches, and other threads
        assert theirs == pytest.approx(logged, rel=1e-6, abs=1e-6)
        assert [one[2] for one in of_theirs] == [5, 5]
        for one, other in zip(of_theirs, found, strict=True):
            assert one[1:] == pytest.approx(other[1:], rel=1e-6, abs=1e-6)
