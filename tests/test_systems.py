"""Every system trains 20 steps out of its small config, and two processes give the losses of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from tests.conftest import BYTES_VOCAB_SIZE, ROOT, TinyTexts, picture
from tests.test_configs import instantiate, merged
from tests.training.processes import RANKS, end_ranks, start_ranks
from tests.training.test_parallel import trainer_of
from tfusion.data.corpora import CaptionedImage, Split

STEPS = 20
# name -> small base and ablation overlays
SYSTEMS: dict[str, tuple[str, ...]] = {
    "linear": ("transfusion",),
    "unet": ("transfusion", "unet_small"),
    "conv": ("transfusion", "conv_small"),
    "causal": ("transfusion", "causal"),
    "chameleon": ("chameleon",),
    "chameleon_no_stability": ("chameleon", "chameleon_no_stability"),
    "text_only": ("text_only",),
    "diffusion_only": ("diffusion_only",),
}


class Tiles:
    """conftest's pictures at 16 x 16: with an autoencoder of factor 4, latents of 4 x 4."""

    name, image_size = "tiles", 16

    def load(self, split: Split) -> Sequence[CaptionedImage]:
        small = [picture(n) for n in {"train": range(11), "val": range(11, 16), "test": range(16, 18)}[split]]
        return [
            CaptionedImage(p.key, p.image.repeat_interleave(2, 1).repeat_interleave(2, 2), p.captions) for p in small
        ]


class Lines:
    """conftest's texts, with the types that jsonargparse looks for."""

    name = "lines"

    def load(self, split: Split) -> Sequence[str]:
        return TinyTexts().load(split)


def tiny(system: str) -> dict[str, Any]:
    """The system's config and overlays at a size for tests, on tiny corpora."""
    base, *overlays = SYSTEMS[system]
    settings = yaml.safe_load((ROOT / "configs" / "small" / f"{base}.yaml").read_text(encoding="utf-8"))
    for overlay in overlays:
        path = ROOT / "configs" / "ablation" / f"{overlay}.yaml"
        settings = merged(settings, yaml.safe_load(path.read_text(encoding="utf-8")))
    model, data = settings["model"]["init_args"]["model"]["init_args"], settings["data"]
    settings["model"]["init_args"]["compile_blocks"] = system == "linear"  # a minute for all
    model |= {"vocab_size": BYTES_VOCAB_SIZE, "dim": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}
    if model["latent_shape"] is not None:
        model["latent_shape"] = [model["latent_shape"][0], 4, 4]
        data["image_corpora"] = [{"class_path": f"{__name__}.Tiles"}]
    if "text_corpora" in data:
        data["text_corpora"] = [{"class_path": f"{__name__}.Lines"}]
    data |= {"vocab_size": BYTES_VOCAB_SIZE, "seq_len": 64, "rows_per_step": 2}
    return settings


class Recorder(L.Callback):
    """The global losses of each step."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        metrics = pl_module.step_metrics()
        self.losses.append({name: value for name, value in metrics.items() if name.endswith(("_loss", "/loss"))})


def train(folder: Path, strategy: str) -> None:
    """All systems, one after another; in the folder of configs, where their autoencoders are."""
    os.chdir(folder)
    for system in SYSTEMS:
        built, recorder = instantiate(tiny(system)), Recorder()
        sizes = {"max_steps": STEPS, "limit_val_batches": 0, "callbacks": [recorder]}
        trainer = trainer_of(folder / "runs" / f"{system}_{strategy}", strategy, **sizes)
        trainer.fit(built.model, built.data)
        if trainer.is_global_zero:
            torch.save(recorder.losses, folder / f"{system}_{strategy}.pt")


@pytest.fixture(scope="module")
def trained(config_folder: Path) -> Path:
    here = Path.cwd()
    try:
        train(config_folder, "auto")
    finally:
        os.chdir(here)
    output = config_folder / "output"
    codes, text = end_ranks(start_ranks(output, train, config_folder, "DDP"), output, timeout_s=400)
    assert codes == [0] * RANKS, text
    return config_folder


@pytest.mark.multi
@pytest.mark.parametrize("system", SYSTEMS)
def test_trains_and_two_processes_give_the_losses_of_one(trained: Path, system: str) -> None:
    one, two = (torch.load(trained / f"{system}_{strategy}.pt", weights_only=True) for strategy in ("auto", "DDP"))
    assert len(one) == len(two) == STEPS
    for left, right in zip(one, two, strict=True):
        assert right == pytest.approx(left, rel=1e-5)
    losses = [step["train/loss"] for step in one]
    assert sum(losses[-5:]) < sum(losses[:5])
    names = {name.removeprefix("train/") for name in one[0]}
    images = {"image_loss"} if "chameleon" in system else {"diffusion_loss"}
    expected = {"loss"} | (images if system != "text_only" else set())
    expected |= {"text_loss"} if system != "diffusion_only" else set()
    expected |= {"z_loss"} if system == "chameleon" else set()
    assert names == expected
