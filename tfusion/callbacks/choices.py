"""Validation: accuracy of ranked choice on the files of `data.choices`."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from torch import Tensor

from tfusion.metrics import ChoiceAccuracy
from tfusion.metrics.measurement import Findings, share
from tfusion.training.validation_log import log_validation


class RankedChoice(L.Callback):
    """Log `val/<name>/accuracy`, by log-likelihood a character, and `val/<name>/accuracy_unnormalised`.

    The choices' rows are loaders of the validation, after the corpora's views; `val/loss` knows nothing of them.
    """

    def __init__(self) -> None:
        self.findings = Findings()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.accuracies = {
            name: ChoiceAccuracy([q.choices for q in questions], [q.answer for q in questions]).to(pl_module.device)
            for name, questions in trainer.datamodule.questions.items()
        }
        self._first = len(trainer.datamodule.val_views)  # of our loaders
        self._start = self._end = 0.0

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == self._first and batch_idx == 0:
            self._start = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx < self._first:
            return
        name = list(self.accuracies)[dataloader_idx - self._first]
        self.accuracies[name].update(outputs["nll"], batch.choice_ids)
        self._end = time.monotonic()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum over ranks, log and keep."""
        self.findings = Findings(seconds={"ranked choice": self._end - self._start} if self.accuracies else {})
        for name, accuracy in self.accuracies.items():
            counts = accuracy.compute()
            if counts["questions"]:
                self.findings.measurements += [
                    share(f"val/{name}/accuracy", counts["right"], counts["questions"]),
                    share(f"val/{name}/accuracy_unnormalised", counts["right_unnormalised"], counts["questions"]),
                ]
        if not self.findings.measurements:
            return
        metrics = {one.name: one.value for one in self.findings.measurements}
        log_validation(trainer, pl_module, metrics)
