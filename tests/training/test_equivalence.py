"""Through Lightning: micro-batches, workers and resumes change neither losses nor, bit for bit, the state."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tfusion.callbacks.ema import EMA

STEPS = 10


class Recorder(L.Callback):
    """Keep some metrics of every step; at step `stop` save and end, as an interrupted run does."""

    def __init__(
        self, path: Path, stop: int | None = None, names: Sequence[str] = ("text_loss", "diffusion_loss")
    ) -> None:
        self.path, self.stop, self.names = path, stop, names
        self.losses: list[tuple[float, ...]] = []
        self.seen = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.seen:
            return
        self.seen = trainer.global_step
        metrics = pl_module.step_metrics()
        self.losses.append(tuple(metrics[f"train/{name}"] for name in self.names))
        if self.seen in (self.stop, trainer.max_steps):
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.fixture
def fit(tiny_module, tiny_data, tiny_trainer, tmp_path):
    """`fit(workers, accumulate, stop, resume, **data)` -> losses, path of the last state."""
    count = iter(range(100))

    def run(
        workers: int = 0,
        accumulate: int = 1,
        stop: int | None = None,
        resume: Path | None = None,
        **data: Any,
    ):
        recorder = Recorder(tmp_path / f"{next(count)}.ckpt", stop)
        trainer = tiny_trainer(STEPS, accumulate_grad_batches=accumulate, callbacks=[EMA(0.9), recorder])
        module = tiny_module(seed=3)
        trainer.fit(module, tiny_data(num_workers=workers, **data), ckpt_path=resume, weights_only=True)
        return torch.tensor(recorder.losses, dtype=torch.float64), recorder.path

    return run


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nested states differ, to the bit."""
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: keys"]
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{path}: length"]
        return [d for n, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{path}/{n}")]
    return [] if one == other else [f"{path}: {one} / {other}"]


def state_of(path: Path) -> dict[str, Any]:
    """Weights, averaged weights, optimizer and the data's position."""
    checkpoint = torch.load(path, weights_only=True)
    names = {name.split(".")[0] for name in checkpoint["state_dict"]}
    assert names == {"model", "ema_model"}
    kept = {name: checkpoint[name] for name in ("state_dict", "optimizer_states", "global_step", "text_tokenizer")}
    kept["data"] = checkpoint["MultimodalDataModule"]
    assert kept["data"]["step"] == kept["global_step"]
    return kept


def test_learns_and_the_average_differs(fit) -> None:
    """Without this the equalities below could be those of nothing."""
    losses, path = fit()
    assert losses.shape == (STEPS, 2)
    assert losses[-3:, 0].mean() < 0.8 * losses[0, 0]
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert differences(state_of(path), state_of(fit(seed=1)[1])) != []
    assert not torch.equal(weights["model.text_head.weight"], weights["ema_model.text_head.weight"])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_no_loss(fit, accumulate: int) -> None:
    one, _ = fit(image_share=0.3)
    divided, _ = fit(accumulate=accumulate, image_share=0.3)
    torch.testing.assert_close(divided, one, rtol=1e-5, atol=0)


def test_workers_change_no_bit(fit) -> None:
    losses, path = fit(workers=0)
    others, other_path = fit(workers=2)
    assert torch.equal(losses, others)
    assert differences(state_of(path), state_of(other_path)) == []


def test_workers_end_with_the_fit(fit) -> None:
    """Left to the garbage collector they idle on, and then take 5 seconds each to end."""
    before = set(multiprocessing.active_children())
    fit(workers=2)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_a_resume_changes_no_bit(fit, workers: int, accumulate: int) -> None:
    losses, whole = fit(workers, accumulate)
    before, half = fit(workers, accumulate, stop=5)
    after, resumed = fit(workers, accumulate, resume=half)
    assert torch.equal(torch.cat([before, after]), losses)
    assert differences(state_of(resumed), state_of(whole)) == []


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
@pytest.mark.parametrize("stop", [5, 6])
def test_a_resume_with_other_micro_batches_changes_no_loss(fit, before: int, after: int, stop: int) -> None:
    whole, _ = fit()
    first, half = fit(accumulate=before, stop=stop)
    rest, _ = fit(accumulate=after, resume=half)
    torch.testing.assert_close(torch.cat([first, rest]), whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("absent", ["image_corpora", "text_corpora"])
def test_one_kind_of_corpus_is_enough(fit, absent: str) -> None:
    losses, path = fit(**{absent: []})
    assert losses.isfinite().all()
    half = fit(**{absent: []}, stop=4)[1]
    assert differences(state_of(fit(**{absent: []}, resume=half)[1]), state_of(path)) == []
    if absent == "image_corpora":
        assert (losses[:, 1] == 0).all()


def test_the_global_generator_changes_nothing(fit) -> None:
    state = torch.get_rng_state()
    losses, path = fit()
    torch.manual_seed(12345)
    others, other_path = fit()
    torch.set_rng_state(state)
    assert torch.equal(losses, others)
    assert differences(state_of(path), state_of(other_path)) == []
