"""Validation: perplexity, bits per byte and image loss of each view, and `val/loss`, which `best` follows."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
from torch import Tensor

from tfusion.data.validation import GIVEN_IMAGE
from tfusion.metrics import DiffusionLoss, TextLoss, standard_error_of_mean, token_bytes
from tfusion.metrics.measurement import Findings, Measurement
from tfusion.sequence import EOS_ID, NUM_SPECIAL_IDS
from tfusion.training.step_sums import NUM_QUARTERS, noise_quarter, quarter_name
from tfusion.training.validation_log import log_validation


class Perplexity(L.Callback):
    """Measure the evaluation weights on every validation view.

    Counted are text tokens and EOS, never BOI; before an image (captions alone) neither BOI nor EOS. Logged:
    `val/<view>/perplexity`, `val/<view>/bits_per_byte`, `val/text_loss` (over the tokens of all views), the image loss
    by the module's `image_measure` and, of `noise_steps`, by quarter of the noise range (`_t0-250`, ...), and
    `val/loss`, the sum of text and image loss by the module's `loss_weights`; nothing of what model or data lacks.

    ===================  ================================  ===================================
    module               image loss                        `val/loss`
    ===================  ================================  ===================================
    `TransfusionModule`  `val/<corpus>/diffusion_loss`     text loss + weight x diffusion loss
    `ChameleonModule`    `val/<corpus>/image_nll`, an id   the mean over all labelled ids
    ===================  ================================  ===================================

    `findings` holds them with the tokens or images they are of and standard errors, as if these were independent:
    those of perplexity and bits per byte by the delta method, at the text's number of bytes.
    """

    def __init__(self) -> None:
        self.findings = Findings()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.text, self.image = {}, {}
        if not hasattr(pl_module, "image_measure"):
            return  # another kind of model: it measures itself
        data, device = trainer.datamodule, pl_module.device
        sizes = token_bytes(data.tokenizer)
        images = [view for view in data.val_views if view + GIVEN_IMAGE in data.val_views]
        predicted = data.val_views if pl_module.predicts_text else []
        self.text = {view: TextLoss(sizes).to(device) for view in predicted}
        self.image = {view: DiffusionLoss().to(device) for view in images}
        quarters = NUM_QUARTERS if pl_module.noise_steps else 0
        self.quarters = {view: [DiffusionLoss().to(device) for _ in range(quarters)] for view in images}
        self._start = self._end = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx >= len(trainer.datamodule.val_views) or not (self.text or self.image):
            return  # of ranked choice, or another kind of model
        view = trainer.datamodule.val_views[dataloader_idx]
        labels = outputs["labels"]
        counted = labels >= NUM_SPECIAL_IDS
        if view in self.image:
            errors, valid = outputs["errors"], outputs["valid"]
            self.image[view].update(errors, valid)
            for number, loss in enumerate(self.quarters[view]):
                quarter = noise_quarter(outputs["timesteps"], pl_module.noise_steps)
                loss.update(errors, valid & (quarter == number))
        else:
            counted = counted | (labels == EOS_ID)
        if view in self.text:
            self.text[view].update(outputs["nll"], labels, counted)
        self._end = time.monotonic()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum over ranks, log and keep."""
        if not self.text and not self.image:
            return
        found: list[Measurement] = []
        nats = tokens = nats_squares = total = images = squares = 0.0
        for view, text in self.text.items():
            values = text.compute()
            found += _of_text(view, values)
            nats, tokens = nats + values["nll"] * values["tokens"], tokens + values["tokens"]
            nats_squares += values["squares"]
        for view, loss in self.image.items():
            values = loss.compute()
            name = f"val/{view}/{pl_module.image_measure}"
            found.append(_of_images(name, values))
            for number, part in enumerate(self.quarters[view]):
                quarter = quarter_name(number, pl_module.noise_steps)
                found += [_of_images(f"{name}_{quarter}", some) for some in [part.compute()] if some["images"]]
            total, images = total + values["loss"] * values["images"], images + values["images"]
            squares += values["squares"]
        errors = [standard_error_of_mean(nats, nats_squares, tokens), standard_error_of_mean(total, squares, images)]
        losses, weights = (nats / max(tokens, 1), total / max(images, 1)), pl_module.loss_weights(tokens, images)
        known = [error * weight for error, weight in zip(errors, weights, strict=True) if error is not None]
        loss_error = math.hypot(*known) if known else None
        if self.text:
            found.append(Measurement("val/text_loss", losses[0], int(tokens), standard_error=errors[0]))
        if self.image:
            name = f"val/{pl_module.image_measure}"
            found.append(Measurement(name, losses[1], int(images), standard_error=errors[1]))
        loss = sum(weight * part for weight, part in zip(weights, losses, strict=True))
        found.append(Measurement("val/loss", loss, int(tokens + images), "", loss_error))
        metrics = {one.name: one.value for one in found}
        self.findings = Findings([one for one in found if one.n], [], {"losses": self._end - self._start})
        log_validation(trainer, pl_module, metrics)


def _of_text(view: str, values: dict[str, float]) -> list[Measurement]:
    """Perplexity and bits per byte; the error of f(nll) is |f'(nll)| x that of nll."""
    nll, tokens = values["nll"], values["tokens"]
    error = standard_error_of_mean(nll * tokens, values["squares"], tokens)
    slopes = {"perplexity": values["perplexity"], "bits_per_byte": values["bits_per_byte"] / nll if nll else 0.0}
    return [
        Measurement(f"val/{view}/{name}", values[name], int(tokens), "", None if error is None else slope * error)
        for name, slope in slopes.items()
    ]


def _of_images(name: str, values: dict[str, float]) -> Measurement:
    images = values["images"]
    error = standard_error_of_mean(values["loss"] * images, values["squares"], images)
    return Measurement(name, values["loss"], int(images), standard_error=error)
