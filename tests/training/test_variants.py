"""Every variant trains through the module, in one process and in two; what a run logs of its FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.conftest import BYTES_VOCAB_SIZE, IMAGE_SIZE, TinyPictures, TinyTexts
from tests.training.processes import run_ranks
from tests.training.test_equivalence import differences
from tests.training.test_parallel import trainer_of
from tfusion.callbacks.ema import EMA
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.models.flops import training_flops
from tfusion.models.transfusion import Transfusion
from tfusion.training.transfusion import TransfusionModule

STEPS = 20
UNET = {"adapter": "unet", "adapter_channels": 16}
TEXT = {"latent_shape": None, "patch_size": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "unet": UNET,
    "conv": {"adapter": "conv", "adapter_channels": 12, "patch_positions": True},
    "causal": {"image_attention": "causal"},
    "text alone": TEXT,
    "images alone": {"predict_text": False},
}


class Recorder(L.Callback):
    """What is logged of each step; saves at step `stop` and ends there."""

    def __init__(self, stop: int | None = None) -> None:
        self.rows: list[dict[str, float]] = []
        self.labels: list[float] = []
        self.stop = stop
        self.picture = torch.zeros(0)  # from the averaged weights of the last step; under FSDP2 of a gathered copy

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, *args: Any) -> None:
        if trainer.global_step == self.seen:
            return
        self.seen = trainer.global_step
        self.labels.append(float(batch.step_counts[0]))
        self.rows.append(pl_module.step_metrics())
        if self.seen == STEPS and pl_module.predicts_images:
            wanted = {"segments": ["red"], "generate": "image", "num_inference_steps": 2, "guidance_scale": 2.0}
            [generation] = pl_module.generate([wanted])
            self.picture = torch.tensor(list(generation.segments[0].tobytes()))
        if self.seen == self.stop:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "half.ckpt")
            trainer.should_stop = True


def fit(
    folder: Path,
    strategy_name: str = "auto",
    stop: int | None = None,
    resume: Path | None = None,
    accumulate: int = 1,
    precision: str = "32-true",
    steps: int = STEPS,
    **model: Any,
) -> tuple[Recorder, TransfusionModule]:
    sizes = {"vocab_size": BYTES_VOCAB_SIZE, "latent_shape": (3, IMAGE_SIZE, IMAGE_SIZE), "patch_size": 4}
    sizes |= {"dim": 36, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}
    noise = FlowMatchEulerDiscreteScheduler() if model.get("latent_shape", ()) is not None else None
    module = TransfusionModule(
        Transfusion(**(sizes | model)), noise, prediction_type="sample", lr=1e-2, warmup_steps=2, seed=3
    )
    images = [] if noise is None else [TinyPictures()]
    texts = [] if model.get("predict_text") is False else [TinyTexts()]
    rows = {"vocab_size": BYTES_VOCAB_SIZE, "seq_len": 64, "rows_per_step": 4, "lanes": 2}
    recorder = Recorder(stop)
    settings = {"max_steps": steps, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    trainer = trainer_of(folder, strategy_name, callbacks=[EMA(0.9), recorder], precision=precision, **settings)
    trainer.fit(module, MultimodalDataModule(images, texts, **rows), ckpt_path=resume, weights_only=True)
    if trainer.is_global_zero:
        torch.save((recorder.rows, recorder.picture), folder / "rows.pt")
    return recorder, module


@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns_and_logs_what_it_predicts(name: str, tmp_path: Path) -> None:
    recorder, module = fit(tmp_path, **VARIANTS[name])
    first, last = recorder.rows[0], recorder.rows[-1]
    kinds = {"text": module.model.text_head is not None, "diffusion": module.model.latent_shape is not None}
    for kind, there in kinds.items():
        assert (f"train/{kind}_loss" in last) == there
        if there:
            losses = [row[f"train/{kind}_loss"] for row in recorder.rows]
            assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert last["train/grad_norm"] > 0
    assert last["train/flops"] == pytest.approx(20 * first["train/flops"], rel=0.2)
    learned, fresh = module.model.state_dict(), module.ema_model.state_dict()
    assert all(not torch.equal(learned[key], fresh[key]) for key in learned)  # no parameter stands still


@pytest.mark.parametrize("name", ["unet", "conv"])
def test_bf16_mixed_is_finite_and_recomputing_changes_nothing(name: str, tmp_path: Path) -> None:
    mixed, _ = fit(tmp_path, precision="bf16-mixed", steps=5, **VARIANTS[name])
    assert all(value == value and abs(value) != float("inf") for row in mixed.rows for value in row.values())
    whole, _ = fit(tmp_path, steps=5, **VARIANTS[name])
    again, _ = fit(tmp_path, steps=5, activation_checkpointing=True, **VARIANTS[name])
    assert again.rows == whole.rows
    assert mixed.rows != whole.rows


LOSSES = ("train/loss", "train/text_loss", "train/diffusion_loss")


def losses_of(rows: list[dict[str, float]]) -> list[list[float]]:
    return [[row[key] for key in LOSSES if key in row] for row in rows]


@pytest.mark.parametrize("name", VARIANTS)
def test_micro_batches_and_a_resume_change_nothing(name: str, tmp_path: Path) -> None:
    """Losses of micro-batches to 1e-5; of a resume from the middle losses and state to the bit; FLOPs are counted.

    FLOPs are those of the steps, however divided; steps between logs are counted, too.
    """
    recorder, module = fit(tmp_path, **VARIANTS[name])
    slots = 0 if name == "text alone" else module.step_shape[2]
    a_step = training_flops(module.model, 4, 64, 0, slots)
    a_label = training_flops(module.model, 0, 0, 1, 0)
    assert slots == 0 if name == "text alone" else slots > 0
    assert (a_label == 0) == (name == "images alone")
    labels = 0
    for step, (row, count) in enumerate(zip(recorder.rows, recorder.labels, strict=True), 1):
        labels += int(count)
        assert row["train/flops"] == step * a_step + labels * a_label
    half = STEPS // 2
    first, _ = fit(tmp_path, stop=half, accumulate=2, **VARIANTS[name])
    rest, _ = fit(tmp_path, resume=tmp_path / "half.ckpt", accumulate=4, **VARIANTS[name])
    divided = first.rows + rest.rows
    assert [r["train/flops"] for r in divided] == [r["train/flops"] for r in recorder.rows]
    for ours, theirs in zip(losses_of(divided), losses_of(recorder.rows), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    fit(tmp_path, stop=half, **VARIANTS[name])
    rest, again = fit(tmp_path, resume=tmp_path / "half.ckpt", **VARIANTS[name])
    assert losses_of(rest.rows) == losses_of(recorder.rows[half:])
    assert differences(again.state_dict(), module.state_dict()) == []
    assert differences(again.optimizers().state_dict(), module.optimizers().state_dict()) == []


def all_of_a_rank(root: Path) -> None:
    for name, settings in VARIANTS.items():
        for strategy in ("DDP", "FSDP2"):
            fit(root / f"{name} {strategy}", strategy, **settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, cache_folder: None) -> Path:
    root = tmp_path_factory.mktemp("variants")
    run_ranks(root / "output", all_of_a_rank, root)
    return root


@pytest.mark.multi
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_are_one(root: Path, tmp_path: Path, name: str, strategy: str) -> None:
    """20 losses, FLOPs and a picture; a gradient's norm is rounded more, by convolutions most."""
    rows, picture = torch.load(root / f"{name} {strategy}" / "rows.pt", weights_only=True)
    one, _ = fit(tmp_path, **VARIANTS[name])
    assert len(rows) == STEPS
    torch.testing.assert_close(picture, one.picture, rtol=0, atol=1)
    for ours, theirs in zip(one.rows, rows, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["train/flops"] == theirs["train/flops"]
        for key, value in ours.items():
            # (fp32 convolutions of half as many images: 1.04e-5 on a CPU with AVX2)
            rel = 1e-4 if key == "train/grad_norm" else 3e-5
            assert theirs[key] == pytest.approx(value, rel=rel), key
