"""The moving average of the weights, `pl_module.ema_model`: what validation, samples and `predict` use.

The LightningModule owns both models, side by side; this callback only updates the average. Weights are never
swapped, so no hook, signal or exception can save the wrong ones.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class EMA(Callback):
    """Update `ema_model` after each optimizer step: average = d * average + (1 - d) * weights.

    d = min(decay, (1 + step) / (10 + step)), so that early averages are not the random initial weights. It
    depends on the global step alone, so a resume is exact and the callback has no state. Parameters only:
    buffers are tables that do not train. Does nothing where the LightningModule's `ema_model` is None.

    Args:
        decay: the average's memory once warm: about 1 / (1 - decay) optimizer steps.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(
                f"got ema.decay {decay}, expected a number between 0 and 1, both excluded; "
                "to train without an average set the model's `ema` to false"
            )
        self.decay = decay
        self._updated_at = 0  # the global step of the last update

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._updated_at = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Average once an optimizer step: under accumulation most batches end without one."""
        step = trainer.global_step
        if pl_module.ema_model is None or step == self._updated_at:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        average, weights = (list(pl_module.ema_model.parameters()), list(pl_module.model.parameters()))
        torch._foreach_lerp_(average, weights, 1.0 - decay)
        self._updated_at = step
