"""`TransfusionModule`: the model, its noise process, its two losses and its optimizer, for Lightning.

Losses are means over the whole optimizer step, all ranks and micro-batches (eq. 4), so how rows are divided changes
nothing. With EMA on, `ema_model` stands beside `model`: training uses the one, everything else the other.

Legend: N labelled positions, I image slots, A micro-batches a step, W ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from tfusion.diffusion import NoiseProcess, PredictionType, TimestepSampling
from tfusion.generation import Generator, by_columns
from tfusion.losses import image_mse, token_nll
from tfusion.models.flops import training_flops
from tfusion.models.transfusion import Transfusion
from tfusion.requests import Generation, GenerationConfig, Request, parse_request
from tfusion.samplers import Sampler
from tfusion.sequence import Batch
from tfusion.tokenizers import ImageTokenizer, PixelTokenizer
from tfusion.training.base import TrainedModule
from tfusion.training.compatibility import architecture_of
from tfusion.training.parallel import check_strategy, shard, whole_model
from tfusion.training.step_sums import metrics_of, micro_batch_sums


class TransfusionModule(TrainedModule):
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
    ) -> None:
        optimizer = (lr, betas, eps, weight_decay, warmup_steps, final_lr_share)
        super().__init__(model, image_tokenizer, *optimizer, ema, seed)
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
        self.diffusion_loss_weight = diffusion_loss_weight
        self.generation = generation or GenerationConfig()
        Sampler(self.process, self.generation.sampler, self.generation.num_inference_steps)  # refuses what cannot run
        self.step_sums: Tensor | None = None
        self._blank: list[Transfusion] = []  # under FSDP2 one, on meta: in a list, so not a part of this module
        self._whole: list[Transfusion] = []  # while predicting, what generates

    predicts_text = property(lambda self: self.model.text_head is not None)
    predicts_images = property(lambda self: self.model.latent_shape is not None)

    def architecture(self) -> dict[str, Any]:
        """What weights depend on and their shapes do not show."""
        return architecture_of(self.model, self.process)

    def training_flops(self, rows: int, positions: int, labels: int, images: int) -> int:
        """See `models/flops.py`."""
        return training_flops(self.model, rows, positions, labels, images)

    def configure_model(self) -> None:
        """Allocate and fill the weights on the device, once; under FSDP2 each rank its shards of them."""
        check_strategy(self.trainer.strategy, self.trainer.world_size)
        if self._materialized:
            if self.device_mesh is not None and not self._blank:
                raise ValueError("FSDP2 shards a model before its weights are allocated: give the Trainer a fresh one")
            return
        if self.device_mesh is not None:
            self._blank.append(copy.deepcopy(self.model))
            for model in (self.model, self.ema_model):
                if model is not None:
                    shard(model, self.device_mesh["data_parallel"], self._computes_in_bf16())
        self.materialize(self.trainer.strategy.root_device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that the step's gradient is that of the global means."""
        nll, errors, timesteps, _ = self._losses(self.model, batch)
        counts = batch.step_counts.clone()
        if self.trainer.world_size > 1:
            dist.all_reduce(counts)
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if first:
            self.count_step(batch, counts[0])
        counts = counts.clamp(min=1)  # an absent modality gives loss 0
        text_loss, diffusion_loss = nll.sum() / counts[0], errors.sum() / counts[1]
        loss = text_loss + self.diffusion_loss_weight * diffusion_loss
        losses = torch.stack([text_loss, diffusion_loss])
        sums = micro_batch_sums(batch, losses, errors.detach(), timesteps, self.process.num_train_timesteps)
        self.step_sums = sums if first or self.step_sums is None else self.step_sums + sums
        # Lightning divides by A, DDP and FSDP2 by W
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def _losses(self, model: Transfusion, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each label (N,) and each image (I,), with the images' timesteps (I,) and which of them count (I,)."""
        if model.latent_shape is None:
            logits, _ = model(batch, None, None)
            nothing = batch.noise_limits.new_zeros(0)
            return token_nll(logits, batch.text_labels), nothing, nothing, nothing.bool()
        clean = batch.noise_limits == 0  # given, not predicted: no loss
        with torch.no_grad(), torch.autocast(batch.token_ids.device.type, enabled=False):
            x_0 = batch.latents
            if x_0 is None:
                x_0 = self.image_tokenizer.encode(batch.images.float() / 127.5 - 1)  # (I, C, h, w)
            x_0, valid = self._finite(x_0, batch)
            timesteps = self.process.sample_timesteps(batch.time_uniforms, batch.noise_limits)
            x_t = self.process.add_noise(x_0, batch.noise, timesteps, clean)
            target = self.process.target(x_0, batch.noise, timesteps)
        logits, model_output = model(batch, x_t, timesteps)
        nll = model_output.new_zeros(batch.text_labels.shape, dtype=torch.float32)  # captions read, not predicted
        if logits is not None:
            nll = token_nll(logits, batch.text_labels)
        return nll, image_mse(model_output, target, valid & ~clean), timesteps, valid

    def _finite(self, x_0: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Latents without NaN or infinity, and which images have a loss; pixels are spared the look."""
        if isinstance(self.image_tokenizer, PixelTokenizer) and batch.latents is None:
            return x_0, batch.image_valid
        finite = x_0.isfinite().flatten(1).all(1)  # (I,)
        if self.training:
            self.latent_checks.append((batch.image_valid & ~finite, batch.image_keys))
        return torch.where(finite[:, None, None, None], x_0, 0), batch.image_valid & finite

    def step_metrics(self) -> dict[str, float]:
        """Of the step that just ended, global; collective, and it waits for the device: at logging steps only."""
        sums = self.step_sums.clone()
        if self.trainer.world_size > 1:
            dist.all_reduce(sums)
        kinds = {"text": self.predicts_text, "images": self.predicts_images}
        metrics = metrics_of(sums, self.process.num_train_timesteps, self.diffusion_loss_weight, **kinds)
        metrics["train/flops"] = float(self.flops_so_far())
        metrics["train/grad_norm"] = float(self.grad_norm)
        metrics["train/lr"] = self.optimizers().param_groups[0]["lr"]
        return metrics

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

    def predict_step(self, batch: list[tuple[int, Request]], batch_idx: int) -> list[Generation]:
        """Samples for numbered requests."""
        return self.generate([request for _, request in batch], [number for number, _ in batch])

    def generate(
        self,
        requests: Sequence[Request | dict[str, Any]],
        numbers: list[int] | None = None,
        batch_size: int | None = None,
    ) -> list[Generation]:
        """Samples from the evaluation weights, in bf16 where the trainer computes in bf16.

        Under FSDP2 every rank has to call it, if only with no requests: gathering the weights is a collective.

        Args:
            requests: as in `prompts.jsonl`; what a request leaves out comes from `generation`.
            numbers: what the requests are called; None = 0, 1, ...
            batch_size: requests decoded together; None = all.

        Raises:
            ValueError: a request that cannot be met, before any work.
        """
        parsed = [parse_request(request, self.generation) for request in requests]
        numbers = list(range(len(parsed))) if numbers is None else numbers
        self.check_requests(parsed, numbers)
        model = self._whole[0] if self._whole else self._generation_model()
        weight = model.embedding.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and any(r.generate != "image" for r in parsed):
            model = by_columns(model)  # text is one vector times every matrix, token after token
        generations: list[Generation] = []
        with torch.autocast(model.embedding.weight.device.type, enabled=False):  # predict_step runs inside Lightning's
            generator = self._generator(model)
            for start in range(0, len(parsed), batch_size or max(1, len(parsed))):
                chunk = slice(start, start + (batch_size or len(parsed)))
                generations += generator.generate(parsed[chunk], numbers[chunk])
        return generations

    def check_requests(self, requests: Sequence[Request], numbers: list[int] | None = None) -> None:
        """Raise ValueError for a request that cannot be met; with all requests on every rank, so all refuse."""
        self._generator(self.evaluation_model).check(list(requests), numbers)

    def _generation_model(self) -> Transfusion:
        return whole_model(self.evaluation_model, self._blank, self._computes_in_bf16())

    def _computes_in_bf16(self) -> bool:
        return "bf16" in str(self.precision if self._trainer is None else self.trainer.precision)

    def _generator(self, model: Transfusion) -> Generator:
        return Generator(model, self.process, self._text_tokenizer(), self.image_tokenizer)

    def on_predict_start(self) -> None:
        """All requests are refused or accepted before the first is met; ranks may have unequal numbers of batches."""
        self.check_requests(self.trainer.datamodule.requests)
        self._whole = [self._generation_model()]

    def on_predict_end(self) -> None:
        self._whole = []
