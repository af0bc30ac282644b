"""Training time is that of training: neither of validation nor of what callbacks do behind it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tfusion.callbacks import training_metrics
from tfusion.callbacks.training_metrics import TrainingMetrics


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(training_metrics, "time", clock)
    return clock


def test_seconds_and_rates(clock: Clock) -> None:
    rows: list[tuple[int, dict]] = []
    trainer = SimpleNamespace(
        global_step=0,
        log_every_n_steps=2,
        max_steps=6,
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
        datamodule=SimpleNamespace(bad_records=[]),
        loggers=[SimpleNamespace(log_metrics=lambda metrics, step: rows.append((step, metrics)))],
    )
    module = SimpleNamespace(step_metrics=lambda: {"train/positions": 100.0, "train/images": 3.0})
    metrics = TrainingMetrics()
    metrics.on_train_start(trainer, module)
    for step in range(1, 7):
        metrics.on_train_batch_start(trainer, module, None, step - 1)
        clock.now += 2
        trainer.global_step = step
        metrics.on_train_batch_end(trainer, module, None, None, step - 1)
        if step == 3:
            metrics.on_validation_start(trainer, module)
            clock.now += 50  # validation
            metrics.on_validation_end(trainer, module)
            clock.now += 70  # samples, checkpoints
    assert [(step, row["train/seconds"], row["train/tokens_per_s"]) for step, row in rows] == [
        (2, 4.0, 50.0),
        (4, 8.0, 50.0),
        (6, 12.0, 50.0),
    ]
    again = TrainingMetrics()
    again.load_state_dict(metrics.state_dict())
    assert again.seconds == 12.0
