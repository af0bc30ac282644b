"""Chameleon on two processes is that of one, under DDP and FSDP2: losses, validation, resumes, predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.conftest import BYTES_VOCAB_SIZE, TinyPictures, TinyTexts
from tests.reference.ids import BlockIds
from tests.training.processes import run_ranks
from tests.training.test_parallel import REQUESTS, trainer_of
from tfusion.callbacks.ema import EMA
from tfusion.callbacks.perplexity import Perplexity
from tfusion.callbacks.samples import SampleGrid
from tfusion.callbacks.writer import PredictionWriter
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.models.chameleon import Chameleon
from tfusion.requests import GenerationConfig
from tfusion.training.chameleon import ChameleonModule
from tfusion.training.parallel import gather_lists

STEPS, HALF = 20, 10
FITS = {"ddp": ("DDP", 1), "ddp_accumulated": ("DDP", 2), "fsdp": ("FSDP2", 1), "fsdp_accumulated": ("FSDP2", 2)}
LOSSES = ("loss", "text_loss", "image_loss", "z_loss", "grad_norm")


def make(prompts: Path | None = None) -> tuple[ChameleonModule, MultimodalDataModule]:
    model = Chameleon(BYTES_VOCAB_SIZE, 27, (1, 2, 2), dim=36, num_layers=2, num_heads=2, max_seq_len=64)
    generation = GenerationConfig(guidance_scale=2.0, max_new_tokens=4)
    module = ChameleonModule(
        model, BlockIds(4, 3), z_loss_weight=1e-3, lr=5e-3, warmup_steps=2, generation=generation, seed=3
    )
    data = MultimodalDataModule(
        [TinyPictures()],
        [TinyTexts()],
        vocab_size=BYTES_VOCAB_SIZE,
        seq_len=64,
        rows_per_step=4,
        lanes=2,
        val_rows=2,
        prompts=None if prompts is None else str(prompts),
        predict_batch_size=1,
    )
    return module, data


class Recorder(L.Callback):
    """Keep the losses of each step and the metrics of each validation, and save the states at HALF and at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.losses, self.metrics, self.counts, self.seen = folder, [], {}, [], 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, *args: Any) -> None:
        if trainer.global_step == self.seen:
            return
        self.seen = trainer.global_step
        self.counts.append(gather_lists([batch.step_counts.tolist()]))
        metrics = pl_module.step_metrics()
        self.losses.append([metrics[f"train/{name}"] for name in LOSSES])
        if self.seen in (HALF, STEPS):
            trainer.save_checkpoint(self.folder / f"{self.seen}.ckpt")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.metrics[trainer.global_step] = {name: float(value) for name, value in trainer.callback_metrics.items()}


def fit(folder: Path, strategy: str = "auto", accumulate: int = 1, ckpt_path: Path | None = None) -> None:
    recorder = Recorder(folder)
    trainer = trainer_of(
        folder,
        strategy,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        val_check_interval=HALF * accumulate,
        callbacks=[EMA(0.9), Perplexity(), SampleGrid(HALF, 3, 2, 1), recorder],
    )
    trainer.fit(*make(), ckpt_path=ckpt_path, weights_only=True)
    if trainer.is_global_zero:
        kept = {"losses": torch.tensor(recorder.losses), "metrics": recorder.metrics, "counts": recorder.counts}
        torch.save(kept, folder / "result.pt")


def predict(folder: Path, strategy: str, root: Path) -> None:
    trainer = trainer_of(folder, strategy, callbacks=[PredictionWriter()])
    module, data = make(root / "prompts.jsonl")
    last = root / "one" / f"{STEPS}.ckpt"
    trainer.predict(module, data, ckpt_path=last, return_predictions=False, weights_only=True)


def all_of_a_rank(root: Path) -> None:
    """What each of two processes does, one after another."""
    for name, (strategy, accumulate) in FITS.items():
        fit(root / name, strategy, accumulate)
    fit(root / "fsdp_from_one", "FSDP2", ckpt_path=root / "one" / f"{HALF}.ckpt")
    for strategy in ("DDP", "FSDP2"):
        predict(root / f"predicted_{strategy}", strategy, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, cache_folder: None) -> Path:
    """The folders of all runs."""
    root = tmp_path_factory.mktemp("parallel")
    (root / "prompts.jsonl").write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    fit(root / "one")
    run_ranks(root / "output", all_of_a_rank, root)
    fit(root / "one_from_fsdp", ckpt_path=root / "fsdp" / f"{HALF}.ckpt")
    predict(root / "predicted_auto", "auto", root)
    return root


def result(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "result.pt", weights_only=True)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Losses within 1e-5; norms of gradients, which move apart first, within 1e-4."""
    torch.testing.assert_close(found[:, :-1], expected[:, :-1], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-4, atol=0)


pytestmark = pytest.mark.multi


@pytest.mark.parametrize("name", FITS)
def test_every_loss_is_that_of_one_process(root: Path, name: str) -> None:
    """And every gradient's norm; ranks have unequal counts of labels and images."""
    losses = result(root / "one")["losses"]
    assert losses.shape == (STEPS, len(LOSSES))
    assert losses[-1, 0] < 0.8 * losses[0, 0]
    close(result(root / name)["losses"], losses)
    for kind in (0, 1):
        assert any(one[kind] != other[kind] for one, other in result(root / name)["counts"])


@pytest.mark.parametrize("name", FITS)
def test_validation_and_samples_are_those_of_one_process(root: Path, name: str) -> None:
    metrics, expected = result(root / name)["metrics"], result(root / "one")["metrics"]
    assert metrics.keys() == expected.keys() == {HALF, STEPS}
    for step, values in expected.items():
        assert {"val/loss", "val/tiles/image_nll"} < set(values)
        assert metrics[step] == pytest.approx(values, rel=1e-4)
    names = sorted(path.name for path in (root / "one" / "samples").iterdir())
    assert names == sorted(path.name for path in (root / name / "samples").iterdir())
    assert len(names) == 4


@pytest.mark.parametrize("name", ["fsdp_from_one", "one_from_fsdp"])
def test_a_state_loads_on_any_layout(root: Path, name: str) -> None:
    """Losses go on as if nothing had happened."""
    close(result(root / name)["losses"], result(root / "one")["losses"][HALF:])


@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_predictions_are_those_of_one_process(root: Path, strategy: str) -> None:
    """Bit for bit, for the weights are the same."""
    one = root / "predicted_auto" / "predictions"
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert {"predictions.jsonl", "000000-0-0.png", "000000-1-0.png"} < set(files)
    assert {
        path.name: path.read_bytes() for path in (root / f"predicted_{strategy}" / "predictions").iterdir()
    } == files
