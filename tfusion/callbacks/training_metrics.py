"""Training metrics, logged before checkpoints are written, so that a checkpoint never precedes its own rows."""

from __future__ import annotations

import time
from typing import Any

import lightning as L


class TrainingMetrics(L.Callback):
    """Log the global losses of a step every `trainer.log_every_n_steps` optimizer steps, and at the last.

    `train/tokens_per_s` and `train/images_per_s` are this step's positions and images times the steps a second since
    the last logged step; `train/seconds` is training time so far, without validation and start-up, kept over resumes.
    Between logged steps nothing waits for the device.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer)

    def _start(self, trainer: L.Trainer) -> None:
        self.logged_step, self.logged_time = trainer.global_step, time.perf_counter()
        self.stopped = False

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Go on after validation, and after what other callbacks do behind it: samples, checkpoints."""
        if self.stopped:
            self._start(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % trainer.log_every_n_steps == 0 or step == trainer.max_steps
        if step == self.logged_step or not due:
            return
        metrics = pl_module.step_metrics()
        now = time.perf_counter()
        self.seconds += now - self.logged_time
        rate = (step - self.logged_step) / (now - self.logged_time)  # steps are of one size
        metrics["train/tokens_per_s"] = metrics.pop("train/positions") * rate
        metrics["train/images_per_s"] = metrics.pop("train/images") * rate
        metrics["train/seconds"] = self.seconds
        metrics["data/bad_records"] = len(trainer.datamodule.bad_records)
        self.logged_step, self.logged_time = step, now
        pl_module.latest_metrics = metrics
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is not training time."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.seconds += time.perf_counter() - self.logged_time
            self.stopped = True

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.seconds = state_dict["seconds"]
