"""Validation: perplexity, bits per byte and diffusion loss of each view, and `val/loss`, which `best` follows."""

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
    `val/<view>/perplexity`, `val/<view>/bits_per_byte`, `val/<corpus>/diffusion_loss`, the same by quarter of the
    noise range (`_t0-250`, ...), `val/text_loss` (over the tokens of all views), `val/diffusion_loss`, and `val/loss` =
    text loss + diffusion loss weight x diffusion loss; nothing of what the model or the data lacks.

    `findings` holds them with the tokens or images they are of and standard errors, as if these were independent:
    those of perplexity and bits per byte by the delta method, at the text's number of bytes.
    """

    def __init__(self) -> None:
        self.findings = Findings()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.text, self.image = {}, {}
        if not hasattr(pl_module, "diffusion_loss_weight"):
            return  # another kind of model: it measures itself
        data, device = trainer.datamodule, pl_module.device
        sizes = token_bytes(data.tokenizer)
        images = [view for view in data.val_views if view + GIVEN_IMAGE in data.val_views]
        predicted = data.val_views if pl_module.predicts_text else []
        self.text = {view: TextLoss(sizes).to(device) for view in predicted}
        self.image = {view: DiffusionLoss().to(device) for view in images}
        self.quarters = {view: [DiffusionLoss().to(device) for _ in range(NUM_QUARTERS)] for view in images}
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
            quarter = noise_quarter(outputs["timesteps"], pl_module.process.num_train_timesteps)
            for number, loss in enumerate(self.quarters[view]):
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
            name = f"val/{view}/diffusion_loss"
            found.append(_of_images(name, values))
            for number, part in enumerate(self.quarters[view]):
                quarter = quarter_name(number, pl_module.process.num_train_timesteps)
                found += [_of_images(f"{name}_{quarter}", some) for some in [part.compute()] if some["images"]]
            total, images = total + values["loss"] * values["images"], images + values["images"]
            squares += values["squares"]
        errors = [standard_error_of_mean(nats, nats_squares, tokens), standard_error_of_mean(total, squares, images)]
        text_loss, diffusion_loss = nats / max(tokens, 1), total / max(images, 1)
        weight = pl_module.diffusion_loss_weight
        known = [error * scale for error, scale in zip(errors, (1.0, weight), strict=True) if error is not None]
        loss_error = math.hypot(*known) if known else None
        if self.text:
            found.append(Measurement("val/text_loss", text_loss, int(tokens), standard_error=errors[0]))
        if self.image:
            found.append(Measurement("val/diffusion_loss", diffusion_loss, int(images), standard_error=errors[1]))
        found.append(Measurement("val/loss", text_loss + weight * diffusion_loss, int(tokens + images), "", loss_error))
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
