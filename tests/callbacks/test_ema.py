"""The average of the weights equals its closed form, moves once an optimizer step, and survives a resume."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from tfusion.callbacks.ema import EMA


def module_of(weight: float, average: float | None) -> SimpleNamespace:
    """What the callback sees of a LightningModule."""
    models = [None if value is None else torch.nn.Linear(2, 1, bias=False).double() for value in (weight, average)]
    for model, value in zip(models, (weight, average), strict=True):
        if model is not None:
            torch.nn.init.constant_(model.weight, value)
    return SimpleNamespace(model=models[0], ema_model=models[1])


def test_equals_the_closed_form() -> None:
    """After n steps: sum over k of (1 - d_k) w_k prod_{j > k} d_j, plus the start times all d."""
    callback, module, decay = EMA(0.8), module_of(0.0, 5.0), 0.8
    callback.on_train_start(SimpleNamespace(global_step=0), module)
    weights = [float(step * step) for step in range(1, 41)]
    for step, weight in enumerate(weights, start=1):
        torch.nn.init.constant_(module.model.weight, weight)
        callback.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, 0)
    decays = [min(decay, (1 + step) / (10 + step)) for step in range(1, 41)]
    assert decays[0] == 2 / 11
    assert decays[-1] == decay
    expected = 5.0
    for d in decays:
        expected *= d
    for k, weight in enumerate(weights):
        share = 1 - decays[k]
        for d in decays[k + 1 :]:
            share *= d
        expected += share * weight
    assert module.ema_model.weight.tolist() == [[pytest.approx(expected, rel=1e-12)] * 2]
    assert module.model.weight.tolist() == [[1600.0, 1600.0]]  # never touched


def test_moves_once_an_optimizer_step() -> None:
    callback, module = EMA(0.5), module_of(1.0, 0.0)
    callback.on_train_start(SimpleNamespace(global_step=7), module)
    seen = []
    for step in (7, 7, 8, 8, 8, 9):  # 7: micro-batches after a resume, before the next optimizer step
        callback.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, 0)
        seen.append(module.ema_model.weight[0, 0].item())
    assert seen == [0.0, 0.0, 0.5, 0.5, 0.5, 0.75]


def test_averages_parameters_only_and_frozen_ones_too() -> None:
    module = module_of(0.0, 0.0)
    for model, value in ((module.model, 4.0), (module.ema_model, 2.0)):
        model.register_buffer("table", torch.tensor([int(value)]))
        model.register_parameter("frozen", torch.nn.Parameter(torch.tensor([value]), requires_grad=False))
    callback = EMA(0.5)
    callback.on_train_start(SimpleNamespace(global_step=99), module)
    callback.on_train_batch_end(SimpleNamespace(global_step=100), module)
    assert module.ema_model.table.item() == 2
    assert module.ema_model.frozen.item() == 3.0


def test_does_nothing_without_an_average() -> None:
    module = module_of(1.0, None)
    EMA().on_train_batch_end(SimpleNamespace(global_step=1), module)
    assert module.ema_model is None


@pytest.mark.parametrize("decay", [0.0, 1.0, 99.0, -0.1])
def test_refuses_a_decay_that_averages_nothing(decay: float) -> None:
    with pytest.raises(ValueError, match=f"ema.decay {decay}, expected"):
        EMA(decay)


def test_runs_before_checkpoints_whatever_their_order() -> None:
    """A checkpoint holds the average of its own step: Lightning moves checkpoint callbacks to the end."""
    from tfusion.callbacks.checkpoint import Checkpoint

    trainer = pl.Trainer(callbacks=[Checkpoint(), EMA()], logger=False, accelerator="cpu", enable_progress_bar=False)
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert names.index("EMA") < names.index("Checkpoint")
