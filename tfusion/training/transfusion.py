"""`TransfusionModule`: the model, its noise process, its two losses and its optimizer, for Lightning.

Losses are means over the whole optimizer step, all ranks and micro-batches (eq. 4), so how rows are divided changes
nothing. With EMA on, `ema_model` stands beside `model`: training uses the one, everything else the other.

Legend: N labelled positions, I image slots, A micro-batches a step, W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from tfusion.denoising import check_settings
from tfusion.diffusion import NoiseProcess, PredictionType, TimestepSampling
from tfusion.generation import Generator
from tfusion.losses import image_mse
from tfusion.models.flops import training_flops
from tfusion.models.transfusion import Transfusion
from tfusion.requests import GenerationConfig
from tfusion.sequence import Batch
from tfusion.tokenizers import ImageTokenizer, PixelTokenizer
from tfusion.training.compatibility import architecture_of
from tfusion.training.multimodal import MultimodalModule
from tfusion.training.step_sums import metrics_of, micro_batch_sums
from tfusion.training.warm_start import InitFrom


class TransfusionModule(MultimodalModule):
    """Train a Transfusion.

    Args:
        model: the multimodal transformer.
        noise_scheduler: diffusers' `DDPMScheduler` (the paper's) or `FlowMatchEulerDiscreteScheduler`; None only where
            the model makes no images.
        image_tokenizer: pixels <-> latents, frozen; pixels as they are by default.
        prediction_type: what the network predicts (paper: epsilon).
        timestep_sampling: distribution of timesteps (paper: uniform; Stable Diffusion 3: logit_normal).
        logit_mean: of logit_normal.
        logit_std: of logit_normal.
        diffusion_loss_weight: lambda of eq. 4 (paper: 5).
        lr: highest learning rate (paper: 3e-4).
        betas: of AdamW (paper: 0.9, 0.95).
        eps: of AdamW (paper: 1e-8).
        weight_decay: of matrices (paper: 0.1).
        warmup_steps: steps of linear warm-up (paper: 4000).
        final_lr_share: the learning rate's share that is left at the last step (paper: 0.05).
        ema: keep an average of the weights for evaluation (BAGEL, JanusFlow; the paper does not say).
        generation: default settings for samples and predictions.
        seed: of the initial weights.
        init_from: another run, whose weights a fresh `fit` starts from; None = from random weights.
        compile_blocks: compile the trunk's blocks in `fit`, and in `predict` of many samples: faster, after a minute
            of compiling at most.
    """

    def __init__(
        self,
        model: Transfusion,
        noise_scheduler: SchedulerMixin | None = None,
        image_tokenizer: ImageTokenizer | None = None,
        prediction_type: PredictionType = "epsilon",
        timestep_sampling: TimestepSampling = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        diffusion_loss_weight: float = 5.0,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        warmup_steps: int = 4000,
        final_lr_share: float = 0.05,
        ema: bool = True,
        generation: GenerationConfig | None = None,
        seed: int = 0,
        init_from: InitFrom | None = None,
        compile_blocks: bool = False,
    ) -> None:
        optimizer = (lr, betas, eps, weight_decay, warmup_steps, final_lr_share)
        super().__init__(model, image_tokenizer, *optimizer, ema, generation, seed, init_from, compile_blocks)
        if hasattr(self.image_tokenizer, "codebook_size"):
            raise ValueError(
                f"got an image_tokenizer of {self.image_tokenizer.codebook_size} ids, which no noise can be added to: "
                "give one of latents (VAETokenizer), or train ChameleonModule"
            )
        pixels = isinstance(self.image_tokenizer, PixelTokenizer)
        if noise_scheduler is None and model.latent_shape is not None:
            raise ValueError(
                "got no noise_scheduler for a model of images: give diffusers.DDPMScheduler (the paper's, as in "
                "configs/transfusion.yaml) or diffusers.FlowMatchEulerDiscreteScheduler"
            )
        self.process = NoiseProcess(
            noise_scheduler or FlowMatchEulerDiscreteScheduler(),  # (of a model of text alone: there is no noise)
            prediction_type,
            timestep_sampling,
            logit_mean,
            logit_std,
            latents_are_pixels=pixels,
        )
        if diffusion_loss_weight < 0:
            raise ValueError(f"got diffusion_loss_weight {diffusion_loss_weight}, expected 5 (the paper's), or 0: none")
        self.diffusion_loss_weight = diffusion_loss_weight
        check_settings(self.process, self.generation)

    image_measure = "diffusion_loss"
    noise_steps = property(lambda self: self.process.num_train_timesteps)
    predicts_images = property(lambda self: self.model.latent_shape is not None)

    def architecture(self) -> dict[str, Any]:
        """What weights depend on and their shapes do not show."""
        return architecture_of(self.model, self.process)

    def check_data(self, data: Any) -> None:
        """Refuse data that leave nothing to learn."""
        if not self.predicts_text and (data.text_corpora or data.choices):
            raise ValueError(
                "got a model with predict_text false and data.text_corpora or data.choices: their text would fill rows "
                "and have no loss; set both to null, as configs/diffusion_only.yaml"
            )
        if not self.predicts_text and data.caption_first == 0 and data.image_first_noise_limit == 0:
            raise ValueError(
                "got a model with predict_text false, data.caption_first 0 and data.image_first_noise_limit 0: no "
                "picture would have a loss; set data.caption_first to 1, as configs/diffusion_only.yaml"
            )

    def training_flops(self, rows: int, positions: int, labels: int, images: int) -> int:
        """See `models/flops.py`."""
        return training_flops(self.model, rows, positions, labels, images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that the step's gradient is that of the global means."""
        nll, errors, timesteps, valid = self._losses(self.model, batch)
        counts = self.counts_of_step(batch, batch_idx).clamp(min=1)  # an absent modality gives loss 0
        text_loss, diffusion_loss = nll.sum() / counts[0], errors.sum() / counts[1]
        loss = text_loss + self.diffusion_loss_weight * diffusion_loss
        losses = torch.stack([text_loss, diffusion_loss])
        sums = micro_batch_sums(batch, losses, errors.detach(), timesteps, valid, self.process.num_train_timesteps)
        return self.add_micro_batch(loss, sums, batch_idx)

    def _losses(self, model: Transfusion, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each label (N,) and each image (I,), with the images' timesteps (I,) and which of them count (I,)."""
        if model.latent_shape is None:
            nothing = batch.noise_limits.new_zeros(0)
            return model(batch, None, None, text_losses=True)[0], nothing, nothing, nothing.bool()
        clean = batch.noise_limits == 0  # given, not predicted: no loss
        with torch.no_grad(), torch.autocast(batch.token_ids.device.type, enabled=False):
            x_0 = batch.latents
            if x_0 is None:
                x_0 = self.image_tokenizer.encode(batch.images.float() / 127.5 - 1)  # (I, C, h, w)
            x_0, valid = self._finite(x_0, batch)
            timesteps = self.process.sample_timesteps(batch.time_uniforms, batch.noise_limits)
            x_t = self.process.add_noise(x_0, batch.noise, timesteps, clean)
            target = self.process.target(x_0, batch.noise, timesteps)
        nll, model_output = model(batch, x_t, timesteps, text_losses=True)
        if nll is None:  # captions read, not predicted
            nll = model_output.new_zeros(batch.text_labels.shape, dtype=torch.float32)
        return nll, image_mse(model_output, target, valid & ~clean), timesteps, valid

    def _finite(self, x_0: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Latents without NaN or infinity, and which images have a loss; pixels are spared the look."""
        if isinstance(self.image_tokenizer, PixelTokenizer) and batch.latents is None:
            return x_0, batch.image_valid
        finite = x_0.isfinite().flatten(1).all(1)  # (I,)
        if self.training:
            self.latent_checks.append((batch.image_valid & ~finite, batch.image_keys))
        return torch.where(finite[:, None, None, None], x_0, 0), batch.image_valid & finite

    def metrics_of_step(self, sums: Tensor) -> dict[str, float]:
        """What is logged, from the global sums."""
        kinds = {"text": self.predicts_text, "images": self.predicts_images}
        return metrics_of(sums, self.process.num_train_timesteps, self.diffusion_loss_weight, **kinds)

    def loss_weights(self, tokens: float, images: float) -> tuple[float, float]:
        """Of text and image loss in the sum of both, however many there are of either."""
        return 1.0, self.diffusion_loss_weight

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Losses of each label and image, for the metrics callback."""
        nll, errors, timesteps, valid = self._losses(self.evaluation_model, batch)
        return {
            "nll": nll,
            "labels": batch.text_labels,
            "errors": errors,
            "timesteps": timesteps,
            "valid": valid,
        }

    def _generator(self, model: Transfusion) -> Generator:
        return Generator(model, self.process, self._text_tokenizer(), self.image_tokenizer)
