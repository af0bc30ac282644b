"""`BadRecordReport`: what a run left out of its corpora, said at the start and the end and written down.

`bad_records.jsonl` in the run folder names every record, `data/bad_records` in metrics.csv counts them. Latents that
an autoencoder made NaN or infinite of a sound picture are found during training: it has no loss, and is counted
as a bad record at the next logging step.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from tfusion.data.records import BadRecord

log = logging.getLogger(__name__)
NOT_FINITE = "latents not finite"


class BadRecordReport(L.Callback):
    """Report the datamodule's `bad_records`; Lightning calls it before TrainingMetrics, which logs their number."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer, "left out of training")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 or step == trainer.max_steps:
            self._take_latents(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer, "left out of this run")

    def _take_latents(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Names of the pictures whose latents were not finite since the last time; waits for the device."""
        checks = pl_module.latent_checks
        if not checks:  # pixels always are: no rank has any
            return
        wrong = torch.stack([mask for mask, _ in checks]).cpu()
        keys = {
            key for row, (_, names) in zip(wrong, checks, strict=True) for key, w in zip(names, row, strict=True) if w
        }
        checks.clear()
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(gathered, keys)
            keys = set().union(*gathered)
        new = sorted(keys - self._known)
        if new:
            self._known |= set(new)
            corpus = "+".join(corpus.name for corpus in trainer.datamodule.image_corpora)
            found = [
                BadRecord(corpus, NOT_FINITE, key, key, "the autoencoder made NaN or infinity of it") for key in new
            ]
            bad = trainer.datamodule.bad_records
            bad.add(
                found, corpus, len(trainer.datamodule.mixture.images.pictures) if len(self._known) == len(new) else 0
            )
            log.warning("%d pictures have latents that are not finite, such as %s: no loss on them", len(new), new[0])
            bad.check()

    @staticmethod
    def _report(trainer: L.Trainer, what: str) -> None:
        bad = trainer.datamodule.bad_records
        path = Path(trainer.default_root_dir, "bad_records.jsonl")
        if not trainer.is_global_zero or trainer.fast_dev_run or not len(bad):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        bad.write(path)
        log.warning("%d bad records %s (all in %s):\n%s", len(bad), what, path, bad.summary())
