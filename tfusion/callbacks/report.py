"""`ValidationReport`: one table in the terminal, `validation.json` and `report.html` after `tfusion validate`."""

from __future__ import annotations

import os
import sys
import time
from datetime import datetime
from pathlib import Path

import lightning.pytorch as pl
import torch

import tfusion
from tfusion.callbacks.sheets import attribution_of
from tfusion.metrics.measurement import Findings, Measurement
from tfusion.report.curves import read_curves
from tfusion.report.page import render
from tfusion.report.validation import Validation, as_json, as_table
from tfusion.training.run_folder import write_atomically


class ValidationReport(pl.Callback):
    """Show and write what the callbacks that have `findings` found, and all other logged metrics.

    In `validate` only, on rank 0: a table on standard output, then `validation.json` (the numbers) and `report.html`
    (a page with curves and pictures) in the run folder, each replaced whole.

    Args:
        examples: pictures made, and captions written, shown a corpus.
    """

    def __init__(self, examples: int = 32) -> None:
        if examples < 0:
            raise ValueError(f"report.examples is {examples}, expected 0 (no pictures) or more")
        self.examples = examples
        self._started_s = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a run folder that cannot be written before time is spent on measuring."""
        if stage != "validate" or trainer.fast_dev_run:
            return
        root = Path(trainer.default_root_dir)
        there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(
                f"validate writes validation.json and report.html into the run folder {root}, which cannot be "
                "written; pass another one with --trainer.default_root_dir, and the checkpoint by its path"
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started_s = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show, then write; the numbers are out before the page is drawn."""
        if trainer.state.fn != "validate" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        if not trainer.is_global_zero:
            return
        validation = self._gather(trainer)
        sys.stdout.write("\n" + as_table(validation))
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / "validation.json", as_json(validation))
        config = root / "config.yaml"
        page = render(
            validation,
            read_curves(root / "metrics.csv"),
            config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
            attribution_of(trainer.datamodule),  # type: ignore[attr-defined]
            self.examples,
            hint=_makes_pictures(trainer, pl_module),
        )
        write_atomically(root / "report.html", page)
        sys.stdout.write(f"{root / 'validation.json'}\n{root / 'report.html'}\n")
        sys.stdout.flush()

    def _gather(self, trainer: pl.Trainer) -> Validation:
        findings = [getattr(callback, "findings", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
        found = [one for one in findings if isinstance(one, Findings)]
        measurements = [measurement for one in found for measurement in one.measurements]
        known = {measurement.name for measurement in measurements}
        logged = {name: value for name, value in trainer.callback_metrics.items() if name not in known}
        measurements += [Measurement(name, float(value), None) for name, value in sorted(logged.items())]
        seconds: dict[str, float] = {}
        for one in found:
            for part, value in one.seconds.items():
                seconds[part] = seconds.get(part, 0.0) + value
        root, checkpoint = Path(trainer.default_root_dir).absolute(), trainer.ckpt_path
        return Validation(
            run=root.name,
            step=_step_of(checkpoint) if checkpoint else trainer.global_step,
            checkpoint=_relative(Path(checkpoint), root) if checkpoint else "",
            date=datetime.now().astimezone(),
            versions={"tfusion": tfusion.__version__, "torch": torch.__version__},
            precision=str(trainer.precision),
            processes=trainer.world_size,
            measurements=measurements,
            examples=[example for one in found for example in one.examples],
            seconds=seconds,
            total_seconds=time.monotonic() - self._started_s,
        )


def _makes_pictures(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether `configs/metrics/reference.yaml` could have pictures made and captions written."""
    does = all(getattr(module, name, False) for name in ("predicts_images", "predicts_text"))
    return does and bool(trainer.datamodule.image_corpora)  # type: ignore[attr-defined]


def _step_of(checkpoint: str | Path) -> int | None:
    """The optimizer step of a checkpoint; in `validate` Lightning's trainer does not know it."""
    saved = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    step = saved.get("global_step")
    return None if step is None else int(step)


def _relative(path: Path, root: Path) -> str:
    """The path inside the run folder where it is there, however it was written; else as it is."""
    path = path.absolute()
    for one, other in ((path, root), (path.parent.resolve() / path.name, root.resolve())):
        if one.is_relative_to(other):
            return one.relative_to(other).as_posix()
    return str(path)
