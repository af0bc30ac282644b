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
MOST_CHECKS = 500  # micro-batches that are looked at together, if not logged before


class BadRecordReport(L.Callback):
    """Report the datamodule's `bad_records`; Lightning calls it before TrainingMetrics, which logs their number."""

    def __init__(self) -> None:
        self._known: set[str] = set()  # pictures whose latents were not finite
        self._step = 0

    def state_dict(self) -> dict[str, list[str]]:
        return {"known": sorted(self._known)}

    def load_state_dict(self, state_dict: dict[str, list[str]]) -> None:
        self._known = set(state_dict["known"])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._add(trainer, sorted(self._known))  # of the run that is resumed
        self._report(trainer, "left out of training")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # between two micro-batches
        self._step = step
        due = step % trainer.log_every_n_steps == 0 or step == trainer.max_steps
        if due or len(pl_module.latent_checks) >= MOST_CHECKS:
            self._take_latents(trainer, pl_module)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of a corpus that was encoded; where requests are met, there are none."""
        self._report(trainer, "left out of the latents")

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
            self._add(trainer, new)
            log.warning("%d pictures have latents that are not finite, such as %s: no loss on them", len(new), new[0])
            self._write(trainer)
            trainer.datamodule.bad_records.check()

    @staticmethod
    def _add(trainer: L.Trainer, keys: list[str]) -> None:
        """Count pictures as bad records of the image corpora, which share a limit here if they are several."""
        if not keys:
            return
        bad, corpus = trainer.datamodule.bad_records, "+".join(c.name for c in trainer.datamodule.image_corpora)
        total = 0 if bad.totals[corpus] else len(trainer.datamodule.mixture.images.pictures)
        detail = "the autoencoder made NaN or infinity of it"
        bad.add([BadRecord(corpus, NOT_FINITE, key, key, detail) for key in keys], corpus, total)

    def _report(self, trainer: L.Trainer, what: str) -> None:
        bad = trainer.datamodule.bad_records
        if len(bad) and trainer.is_global_zero and not trainer.fast_dev_run:
            path = self._write(trainer)
            log.warning("%d bad records %s (all in %s):\n%s", len(bad), what, path, bad.summary())

    @staticmethod
    def _write(trainer: L.Trainer) -> Path:
        path = Path(trainer.default_root_dir, "bad_records.jsonl")
        if trainer.is_global_zero and not trainer.fast_dev_run:
            path.parent.mkdir(parents=True, exist_ok=True)
            trainer.datamodule.bad_records.write(path)
        return path
