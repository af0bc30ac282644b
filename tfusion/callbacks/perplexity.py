"""Validation: perplexity, bits per byte and diffusion loss of each view, and `val/loss`, which `best` follows."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from tfusion.data.validation import GIVEN_IMAGE
from tfusion.metrics import DiffusionLoss, TextLoss, token_bytes
from tfusion.sequence import EOS_ID, NUM_SPECIAL_IDS


class Perplexity(L.Callback):
    """Measure the evaluation weights on every validation view.

    Counted are text tokens and EOS, never BOI; before an image (captions alone) neither BOI nor EOS. Logged:
    `val/<view>/perplexity`, `val/<view>/bits_per_byte`, `val/<corpus>/diffusion_loss`, `val/text_loss` (over the
    tokens of all views), `val/diffusion_loss`, and `val/loss` = text loss + diffusion loss weight x diffusion loss.
    """

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.text, self.image = {}, {}
        if not hasattr(pl_module, "generate"):
            return  # no model of sequences: it measures itself
        data = trainer.datamodule
        sizes = token_bytes(data.tokenizer)
        images = [view for view in data.val_views if view + GIVEN_IMAGE in data.val_views]
        self.text = {view: TextLoss(sizes).to(pl_module.device) for view in data.val_views}
        self.image = {view: DiffusionLoss().to(pl_module.device) for view in images}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        view = trainer.datamodule.val_views[dataloader_idx]
        if view not in self.text:
            return
        labels = outputs["labels"]
        counted = labels >= NUM_SPECIAL_IDS
        if view in self.image:
            self.image[view].update(outputs["errors"], outputs["valid"])
        else:
            counted = counted | (labels == EOS_ID)
        self.text[view].update(outputs["nll"], labels, counted)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.text:
            return
        metrics: dict[str, float] = {}
        nats = tokens = total = images = 0.0
        for view, text in self.text.items():
            values = text.compute()
            metrics[f"val/{view}/perplexity"] = values["perplexity"]
            metrics[f"val/{view}/bits_per_byte"] = values["bits_per_byte"]
            nats, tokens = nats + values["nll"] * values["tokens"], tokens + values["tokens"]
        for view, loss in self.image.items():
            values = loss.compute()
            metrics[f"val/{view}/diffusion_loss"] = values["loss"]
            total, images = total + values["loss"] * values["images"], images + values["images"]
        metrics["val/text_loss"] = nats / max(tokens, 1)
        metrics["val/diffusion_loss"] = total / max(images, 1)
        weight = pl_module.diffusion_loss_weight
        metrics["val/loss"] = metrics["val/text_loss"] + weight * metrics["val/diffusion_loss"]
        # where `best` and `tfusion validate` read them; Lightning itself would log them at global_step - 1
        pl_module.log_dict(metrics, logger=False, sync_dist=False)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
