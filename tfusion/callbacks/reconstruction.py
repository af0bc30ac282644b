"""Validation: PSNR and SSIM of pictures that went through the image autoencoder and back."""

from __future__ import annotations

import time

import lightning as L
import torch
from torch import Tensor

from tfusion.data.validation import GIVEN_IMAGE
from tfusion.metrics import Reconstruction, standard_error_of_mean
from tfusion.metrics.measurement import Findings, Measurement
from tfusion.sequence import Batch
from tfusion.tokenizers import PixelTokenizer
from tfusion.training.validation_log import log_validation


class ReconstructionQuality(L.Callback):
    """Log `val/<corpus>/psnr` and `val/<corpus>/ssim` of decode(encode(x)) where the image tokenizer is not pixels.

    The autoencoder is frozen, so the first validation of a run measures, and the later ones repeat its numbers.
    Pictures without finite latents, which have no loss either, are left out. Of a cache of latents nothing is measured,
    for its rows hold no pictures: the autoencoder's own run has these numbers.
    """

    def __init__(self) -> None:
        self.findings = Findings()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what another run has measured."""
        self.findings = Findings()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        views = trainer.datamodule.val_views
        encoded = any(hasattr(corpus, "codebook_size") for corpus in trainer.datamodule.image_corpora)  # out of a cache
        known = isinstance(pl_module.image_tokenizer, PixelTokenizer) or encoded or self.findings.measurements
        measures = not known and not trainer.sanity_checking  # a rehearsal sees some pictures only
        corpora = [view for view in views if view + GIVEN_IMAGE in views] if measures else []
        self.metrics = {corpus: Reconstruction().to(pl_module.device) for corpus in corpora}
        self._seconds = 0.0

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Tensor],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Encode and decode each picture of a corpus once: the view `<corpus>/given_image` has the same ones."""
        views = trainer.datamodule.val_views
        view = views[dataloader_idx] if dataloader_idx < len(views) else ""  # else of ranked choice
        if view not in self.metrics or batch.images is None:
            return
        start = time.monotonic()
        pictures = batch.images[outputs["valid"]].float() / 255  # (n, 3, H, W)
        tokenizer = pl_module.image_tokenizer
        self.metrics[view].update((tokenizer.decode(tokenizer.encode(2 * pictures - 1)) + 1) / 2, pictures)
        self._seconds += time.monotonic() - start

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum over ranks, log and keep."""
        found = []
        for corpus, metric in self.metrics.items():
            values = metric.compute()
            n = int(values["images"])
            for name in ("psnr", "ssim") if n else ():
                error = standard_error_of_mean(values[name] * n, values[f"{name}_squares"], n)
                found.append(Measurement(f"val/{corpus}/{name}", values[name], n, standard_error=error))
        seconds = {"reconstructions": self._seconds} if found else {}
        self.findings = Findings(found or self.findings.measurements, seconds=seconds)
        if not self.findings.measurements:
            return
        metrics = {one.name: one.value for one in self.findings.measurements}
        log_validation(trainer, pl_module, metrics)
