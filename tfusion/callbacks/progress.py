"""`LossProgressBar`: a bar in a terminal, a line every so many steps in a log; both losses and the speed."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info

# Logged name -> name in the bar; what the run does not log is left out.
SHOWN = {
    "train/text_loss": "text",
    "train/diffusion_loss": "diffusion",
    "train/image_loss": "image",
    "val/loss": "val",
    "train/images_per_s": "images/s",
}


class LossProgressBar(TQDMProgressBar):
    """Count optimizer steps and show `pl_module.latest_metrics`, the plain numbers that were logged last.

    Nothing is computed or copied from the device here. Where standard output is not a terminal, the bars are
    off and a line is logged instead.

    Args:
        refresh_rate: optimizer steps between redraws of the bar.
        line_every_n_steps: optimizer steps between lines, off a terminal.
    """

    def __init__(self, refresh_rate: int = 10, line_every_n_steps: int = 100) -> None:
        super().__init__(refresh_rate=refresh_rate)
        if line_every_n_steps < 1:
            raise ValueError(f"progress: got line_every_n_steps {line_every_n_steps}, expected at least 1")
        self.line_every_n_steps = line_every_n_steps
        self._first_step = self._last_step = 0
        self._started_s = 0.0

    @property
    def is_enabled(self) -> bool:
        """Whether bars are drawn."""
        return super().is_enabled and sys.stdout.isatty()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; a resumed run starts at its step."""
        super().on_train_start(trainer, pl_module)
        self._first_step = self._last_step = trainer.global_step
        self._started_s = time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Make the bar count optimizer steps of the whole run; Lightning's counts micro-batches."""
        super().on_train_epoch_start(trainer, *_)
        bar = self.train_progress_bar
        bar.total = trainer.max_steps if trainer.max_steps > 0 else None
        bar.initial = bar.n = trainer.global_step
        bar.set_description("Training")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Redraw, or write a line, when a whole optimizer step is done and it is time."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        last = step == trainer.max_steps
        if self.is_enabled:
            if last or step % self.refresh_rate == 0:
                self.train_progress_bar.n = step
                self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))
        elif self._enabled and (last or step % self.line_every_n_steps == 0):
            rank_zero_info(self._line(trainer, pl_module))

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float]:
        """The numbers shown, three digits each."""
        latest: dict[str, float] = getattr(pl_module, "latest_metrics", {})
        return {name: f"{latest[key]:.3g}" for key, name in SHOWN.items() if key in latest}

    def _line(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        step = trainer.global_step
        elapsed_s = time.monotonic() - self._started_s
        parts = [f"step {step}"]
        times = _clock(elapsed_s)
        if trainer.max_steps > 0:
            parts[0] += f"/{trainer.max_steps}"
            times += f" < {_clock(elapsed_s / (step - self._first_step) * (trainer.max_steps - step))}"
        parts += [f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items()]
        return " | ".join([*parts, times])


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
