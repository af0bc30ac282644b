"""How a validation's numbers are logged: at the step whose weights were measured, on every rank the same."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L


def log_validation(trainer: L.Trainer, module: L.LightningModule, metrics: Mapping[str, float]) -> None:
    """Give global numbers to `best`, to `tfusion validate` and to the loggers.

    Lightning itself would log them at global_step - 1.
    """
    module.log_dict(metrics, logger=False, sync_dist=False)  # type: ignore[arg-type]
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), trainer.global_step)
