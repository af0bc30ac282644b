"""Checkpoints that survive a kill at any moment: `checkpoints/{last,best,step=NNNNNNN}.ckpt`.

Files are written under a temporary name beside their place and renamed; `last` is a link, renamed the same
way once the file it names is whole, and older files go only after that. Only whole optimizer steps are saved,
with the log rows up to them on disk before, and with a validation that is due done before (or a run killed in
between would skip it). The base is ModelCheckpoint because Lightning calls its subclasses after all others.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint whole or not at all; Lightning's writer may copy across file systems."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO.save_checkpoint takes no storage_options")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # left only by an exception, as of a full disk
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _RunFolderCheckpoint(ModelCheckpoint):
    """What both checkpoint callbacks share: the folder, and none of ModelCheckpoint's occasions to save."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = os.path.join(trainer.default_root_dir, "checkpoints")

    def on_train_batch_end(self, *args: Any) -> None:
        pass

    def on_train_epoch_end(self, *args: Any) -> None:
        pass

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def _write(self, trainer: Trainer, name: str) -> None:
        for logger in trainer.loggers:
            logger.save()  # a checkpoint never outlives the log rows before it
        self._save_checkpoint(trainer, os.path.join(self.dirpath, f"{name}.ckpt"))


class BestCheckpoint(_RunFolderCheckpoint):
    """Keep `best.ckpt`, the state with the best validation score so far; there is none without validation.

    Args:
        monitor: the metric to follow.
        mode: whether less or more of it is better.
    """

    # Added before Checkpoint, so that `last.ckpt` holds the score of the validation just done.

    def __init__(self, monitor: str = "val/loss", mode: Literal["min", "max"] = "min") -> None:
        super().__init__(monitor=monitor, mode=mode)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._should_skip_saving_checkpoint(trainer):
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"got best.monitor {self.monitor!r}, which validation did not log; "
                f"expected one of {sorted(trainer.callback_metrics)}"
            )
        score = float(trainer.callback_metrics[self.monitor])
        if trainer.strategy.reduce_boolean_decision(self._is_better(score)):
            self.best_model_score = score  # before the save: it is part of the state saved
            self._write(trainer, "best")

    def _is_better(self, score: float) -> bool:
        if self.best_model_score is None:
            return not math.isnan(score)
        return score < self.best_model_score if self.mode == "min" else score > self.best_model_score

    def state_dict(self) -> dict[str, Any]:
        return {"best_model_score": self.best_model_score}  # no paths: a run folder may be moved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_model_score = state_dict["best_model_score"]


class Checkpoint(_RunFolderCheckpoint):
    """Save the state of training every so many optimizer steps, and at the end; `last.ckpt` is the newest.

    Args:
        every_n_train_steps: optimizer steps between two checkpoints.
        keep: how many of the newest `step=NNNNNNN.ckpt` stay.
    """

    def __init__(self, every_n_train_steps: int = 1000, keep: int = 1) -> None:
        if every_n_train_steps < 1 or keep < 1:
            raise ValueError(
                f"got checkpoint.every_n_train_steps {every_n_train_steps} and checkpoint.keep {keep}, "
                "expected at least 1 for both"
            )
        super().__init__(every_n_train_steps=every_n_train_steps)
        self.keep = keep
        self._stop_at_whole_step = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            for path in Path(self.dirpath).glob(".*.tmp"):  # of a killed process: the run folder is locked
                path.unlink()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to go on with a run that was stopped by the user or the cluster."""
        stopped = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        if not stopped or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        last = root / "checkpoints" / "last.ckpt"
        if not last.exists():
            log.info("stopped at step %d, before the first checkpoint", trainer.global_step)
            return
        log.info(
            "stopped at step %d; the last checkpoint is %s. Go on: tfusion fit --config %s --ckpt_path last",
            trainer.global_step,
            last.resolve().name,
            root / "config.yaml",
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A state that has just been loaded is not saved again (Lightning keeps this in no checkpoint).
        self._last_global_step_saved = trainer.global_step
        done = trainer.global_step if trainer.ckpt_path else -1
        for logger in trainer.loggers:
            if hasattr(logger, "cut"):
                logger.cut(done)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            # A stop asked for between two micro-batches (max_time, ...) waits for the optimizer step.
            self._stop_at_whole_step |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._stop_at_whole_step
        due = trainer.global_step % self._every_n_train_steps == 0
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        if due or stops or trainer.global_step == trainer.max_steps:
            if _validation_is_due(trainer):
                self._defer_save_until_validation = True
            else:
                self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._defer_save_until_validation:
            self._defer_save_until_validation = False
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)  # a run that ended otherwise, as with its data

    def state_dict(self) -> dict[str, Any]:
        return {}  # what there is to know is in the folder

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def _save(self, trainer: Trainer) -> None:
        if self._should_skip_saving_checkpoint(trainer):
            return
        step = trainer.global_step
        self._write(trainer, f"step={step:07d}")
        if trainer.is_global_zero:
            folder = Path(self.dirpath)
            _link(folder / "last.ckpt", f"step={step:07d}.ckpt")
            # Files of later steps, left by a run that was taken up again further back, are not deleted.
            older = [path for path in folder.glob("step=*.ckpt") if _step_of(path) <= step]
            older.sort(key=_step_of)
            for path in older[: -self.keep]:
                path.unlink()


def _validation_is_due(trainer: Trainer) -> bool:
    """Say whether Lightning will validate after this batch, in its own words (private, so tested)."""
    loop = trainer.fit_loop.epoch_loop
    return sum(trainer.num_val_batches) > 0 and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def _link(path: Path, target: str) -> None:
    """Point the link `path` at its neighbour `target` in one step: it names a whole file at every moment."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    os.symlink(target, temporary)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _step_of(path: Path) -> float:
    with contextlib.suppress(ValueError):
        return int(path.stem.removeprefix("step="))
    return math.inf  # a file the user named so
