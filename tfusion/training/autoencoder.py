"""`AutoencoderModule`: train the autoencoder that images are diffused, or tokenised, in; the same data and commands.

L = L1 + perceptual + 0.5 adversarial + regularisation, which is 1e-6 KL or the codebook's loss (Transfusion §4.1 and
appendix A). One optimizer, one backward: the autoencoder's adversarial term sees a discriminator of fixed weights, the
discriminator's own term sees pictures that are not traced back, so neither's gradient gets into the other; each is
clipped by its own norm.

Legend: I image slots, S a picture's side, C, h, w latents.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from tfusion.data.validation import GIVEN_IMAGE
from tfusion.metrics import Reference
from tfusion.models.autoencoder import Autoencoder, Coded, VQAutoencoder
from tfusion.sequence import Batch
from tfusion.training.autoencoder_export import export
from tfusion.training.autoencoder_losses import VGG_FILE, Perceptual, PerceptualWeights, adversarial, hinge, l1
from tfusion.training.autoencoder_validation import AutoencoderValidation
from tfusion.training.base import TrainedModule
from tfusion.training.codebook import StepCodes, statistics
from tfusion.training.optim import clip_gradients
from tfusion.training.validation_log import log_validation

log = logging.getLogger(__name__)


class AutoencoderModule(TrainedModule):
    """Train a `KLAutoencoder` or a `VQAutoencoder` on the pictures of captioned corpora; captions are not read.

    In fit each validation writes `autoencoder/` in the run folder, which `VAETokenizer` or `VQTokenizer` reads, and
    `samples/step=NNNNNNN.png`, originals above what came back.

    Args:
        model: the autoencoder, with or without a discriminator.
        perceptual: LPIPS: `cached` = if its weights are on this machine, `download`, or `off`. A resume with `cached`
            where that differs from the checkpoint is refused.
        perceptual_weight: of LPIPS; None = the paper's, 1.
        gan_weight: of the adversarial term, of a model with a discriminator; None = the paper's, 0.5.
        gan_start: the step from which on there is one; None = the paper's, 50,000.
        kl_weight: of a `KLAutoencoder`'s KL; None = the paper's, 1e-6. Both it and L1 are means over pictures; of a
            picture, the KL is summed over its C h w latents, in nats, L1 is a mean over its 3 S^2 values. (The paper
            does not say which reading its 1e-6 is of. Latent diffusion's code sums L1, too, so there the same number
            weighs 3 S^2 times less beside L1: 196,608 times at 256 x 256.)
        codebook_weight: of a `VQAutoencoder`'s codebook loss, a mean over vectors; None = the paper's, 1.
        lr, betas, eps, weight_decay, warmup_steps, final_lr_share: as `TransfusionModule`'s; the discriminator's too.
        ema: keep an average of the weights, which is what is validated and exported.
        seed: of the initial weights, and of what dead codes restart from.

    Raises:
        ValueError: a number below 0, or one of a part that the model does not have.
    """

    reads_captions = False

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Of what rows draw for each picture: as many numbers as there are latents, or, of codes, none."""
        return self.model.coded_shape if self.codes is None else (0, 0, 0)

    def __init__(
        self,
        model: Autoencoder,
        perceptual: PerceptualWeights = "cached",
        perceptual_weight: float | None = None,
        gan_weight: float | None = None,
        gan_start: int | None = None,
        kl_weight: float | None = None,
        codebook_weight: float | None = None,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.5, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 1000,
        final_lr_share: float = 0.05,
        ema: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(model, None, lr, betas, eps, weight_decay, warmup_steps, final_lr_share, ema, seed)
        vq, gan = isinstance(model, VQAutoencoder), model.discriminator is not None
        self.regularisation = "codebook" if vq else "kl"  # its name in metrics
        self.weights = {
            "l1": 1.0,
            "perceptual": _own("perceptual_weight", perceptual_weight, 1.0, perceptual != "off", "with perceptual off"),
            "adversarial": _own("gan_weight", gan_weight, 0.5, gan, "of a model without a discriminator"),
            "discriminator": 1.0,  # a task of its own
        }
        kl = _own("kl_weight", kl_weight, 1e-6, not vq, "of a VQAutoencoder, which has no KL")
        codebook = _own("codebook_weight", codebook_weight, 1.0, vq, "of a KLAutoencoder, which has no codebook")
        self.weights[self.regularisation] = codebook if vq else kl
        self.gan_start = _own("gan_start", gan_start, 50_000, gan, "of a model without a discriminator")
        self.perceptual = Perceptual(perceptual)
        self.codes = StepCodes(seed) if vq else None
        self._sums: dict[str, Tensor] = {}  # of the step's micro-batches
        self._network: Reference | None = None
        self._validation: AutoencoderValidation | None = None

    def architecture(self) -> dict[str, Any]:
        """What shapes do not show."""
        model = self.model
        return {"kind": model.kind, "image_size": model.image_size, "norm_num_groups": model.norm_num_groups}

    def check_data(self, data: Any) -> None:
        """Refuse data that is not pictures alone."""
        if data.text_corpora or data.choices or not data.image_corpora:
            raise ValueError("an autoencoder learns from pictures alone: leave out data.text_corpora and data.choices")
        for corpus in data.image_corpora:
            if hasattr(corpus, "codebook_size"):  # of latents or ids out of a cache
                raise ValueError(
                    f"the corpus {corpus.name!r} holds latents; an autoencoder learns from pictures: give the corpus "
                    "that was encoded"
                )
        if data.image_first_noise_limit == 0:
            raise ValueError(
                "got data.image_first_noise_limit 0, which says that such pictures have no loss: leave it out"
            )
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self._check_export()

    def _check_export(self) -> None:
        """Refuse to train past the last validation: the folder would hold older weights, or not be there."""
        steps, batches = self.trainer.max_steps, getattr(self.trainer, "val_check_interval", None)
        if steps < 1 or not isinstance(batches, int) or self.trainer.limit_val_batches == 0:
            return
        if (total := steps * self.trainer.accumulate_grad_batches) % batches:
            last = total - total % batches
            held = f"be that of {last} of {total}" if last else "never be written"
            raise ValueError(
                f"trainer.max_steps {steps} (x {self.trainer.accumulate_grad_batches} micro-batches) is no multiple of "
                f"trainer.val_check_interval {batches} (in micro-batches): the autoencoder, which validation writes, "
                f"would {held}; set the interval to {total}, or a divisor of it"
            )

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.trainer.limit_val_batches == 0:
            log.warning("trainer.limit_val_batches is 0: no autoencoder will be written, which validation does")

    def setup(self, stage: str) -> None:
        """Refuse weights in shards."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError("got FSDP2; an autoencoder is small: train it on one device or with DDP")

    def configure_model(self) -> None:
        """Allocate and fill the weights, and look for LPIPS's, which all processes have to find, or none."""
        super().configure_model()
        found = self.perceptual.load(self.trainer.strategy.root_device)
        everywhere = self.trainer.strategy.reduce_boolean_decision(found, all=True)
        if everywhere != self.trainer.strategy.reduce_boolean_decision(found, all=False):
            raise ValueError(
                f"perceptual is cached, and not all machines have {VGG_FILE}: put it into torch's cache on each, or "
                "set perceptual to off or download"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also whether there is a perceptual loss: `cached` leaves that to the machine."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["perceptual"] = self.perceptual.load(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another loss because this is another machine."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None or self.trainer.state.fn != "fit" or self.perceptual.weights != "cached":
            return
        here = self.perceptual.load(self.trainer.strategy.root_device)
        if checkpoint.get("perceptual", here) != here:  # older ones do not say
            was, remedy = ("without", f"has {VGG_FILE}") if here else ("with", f"has no {VGG_FILE}: put it there")
            raise ValueError(
                f"the checkpoint was trained {was} a perceptual loss, and perceptual is cached on a machine that "
                f"{remedy}. Set perceptual to off to go on without, or to download to go on with it"
            )

    def _pictures(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(I, 3, S, S) in [-1, 1], and normal numbers (I, *noise_shape)."""
        if batch.images is None:
            raise ValueError("the data holds latents; an autoencoder learns from pictures: give corpora of pictures")
        return batch.images.float() / 127.5 - 1, batch.noise

    def _parts(
        self, model: Autoencoder, images: Tensor, noise: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor, Coded]:
        """Each picture's losses (I,), unweighted, by name; what came back (I, 3, S, S); latents."""
        coded = model.encode(images, noise)
        reconstructed = model.decode(coded.latents)
        parts = {"l1": l1(reconstructed, images), self.regularisation: coded.regularisation}
        if self.perceptual.load(images.device):
            parts["perceptual"] = self.perceptual(reconstructed, images)
        return parts, reconstructed, coded

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that the step's gradient is that of the mean over its pictures."""
        images, noise = self._pictures(batch)
        parts, reconstructed, coded = self._parts(self.model, images, noise)
        discriminator = self.model.discriminator
        if discriminator is not None and self.trainer.global_step >= self.gan_start:
            parts["adversarial"] = adversarial(discriminator, reconstructed)
            parts["discriminator"] = hinge(discriminator, reconstructed, images)
        count = self.global_counts(batch, batch_idx)[1].clamp(min=1)
        means = {name: (each * batch.image_valid).sum() / count for name, each in parts.items()}
        loss = sum(self.weights[name] * mean for name, mean in means.items())
        if discriminator is not None and "discriminator" not in parts:
            # before its time it has a gradient of 0, for DDP waits for one
            loss = loss + 0.0 * sum(parameter.sum() for parameter in discriminator.parameters())

        first = self.is_first(batch_idx)
        self._keep(means, loss, batch, first)
        if self.codes is not None:
            self.codes.add(coded, batch.image_valid, self.model.codebook_size, first)
        return self.scaled(loss)

    def _keep(self, means: dict[str, Tensor], loss: Tensor, batch: Batch, first: bool) -> None:
        """Add up what a logging step reports."""
        sums = {name: mean.detach() for name, mean in means.items()} | {"loss": loss.detach()}
        sums |= {"images": batch.image_valid.sum().float(), "positions": (batch.document_ids >= 0).sum().float()}
        self._sums = sums if first else {name: self._sums[name] + value for name, value in sums.items()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate; put dead codes on vectors of this step."""
        super().on_before_optimizer_step(optimizer)
        if self.codes is not None:
            self.codes.restart_dead(self.model, self.ema_model, optimizer, self.trainer.global_step)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip autoencoder and discriminator each by its own norm, and keep the autoencoder's."""
        limits = (gradient_clip_val, gradient_clip_algorithm)
        self.grad_norm = clip_gradients(self.model.network.parameters(), *limits)
        if self.model.discriminator is not None:
            clip_gradients(self.model.discriminator.parameters(), *limits)

    def step_metrics(self) -> dict[str, float]:
        """Of the step that just ended, global; collective, and it waits for the device."""
        values = torch.stack(list(self._sums.values()))
        if self.trainer.world_size > 1:
            dist.all_reduce(values)
        metrics = {f"train/{name}": value for name, value in zip(self._sums, values.tolist(), strict=True)}
        if self.codes is not None:
            metrics |= {f"train/{name}": value for name, value in statistics(self.codes.use).items()}
        metrics["train/grad_norm"] = float(self.grad_norm)
        metrics["train/lr"] = self.optimizers().param_groups[0]["lr"]
        return metrics

    def on_validation_epoch_start(self) -> None:
        if self._network is None:
            self._network = Reference()
            self._network.load(self.device)
        corpora = [corpus.name for corpus in self.trainer.datamodule.image_corpora]
        self._validation = AutoencoderValidation(self.evaluation_model, corpora, self._network, self.device)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Code and decode each held-out picture once, without noise: the view given_image has the same ones.

        In fp32, as image tokenizers do, and features and measures with it.
        """
        view = self.trainer.datamodule.val_views[dataloader_idx]
        if view.endswith(GIVEN_IMAGE):
            return
        with torch.autocast(self.device.type, enabled=False):
            images, _ = self._pictures(batch)
            parts, reconstructed, coded = self._parts(self.evaluation_model, images, None)
            self._validation.update(view, batch.images, reconstructed, parts, coded, batch.image_valid)

    def on_validation_epoch_end(self) -> None:
        """Log; in fit write the sheet and the folder."""
        log_validation(self.trainer, self, self._validation.compute(self.weights))
        trainer = self.trainer
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        self._validation.write_sheet(root / "samples" / f"step={trainer.global_step:07d}.png")
        latents = self._validation.latent_statistics() if self.codes is None else None
        export(self.evaluation_model, root / "autoencoder", latents)
        if trainer.global_step >= trainer.max_steps:
            found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            figures = ", ".join(f"{name.removeprefix('val/')} {value:.4g}" for name, value in found.items())
            log.info("the autoencoder is in %s; %s", root / "autoencoder", figures)


def _own(name: str, given: float | None, default: float, used: bool, why: str) -> float:
    """A setting, or what it is where nothing is said; raises ValueError where it is below 0, or would do nothing."""
    if given is None:
        return default
    if not used:
        raise ValueError(f"got {name} {given} {why}: it would do nothing, leave it out or set it to null")
    if not given >= 0:
        raise ValueError(f"got {name} {given}, expected a number from 0 on, or null for the paper's, {default:g}")
    return given
