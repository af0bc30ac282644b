"""`TrainedModule`: what every LightningModule here has in common, whatever its model and loss.

Weights and their average side by side, AdamW with its schedule and clipping, the tokenizer in the checkpoint, and
refusals in words of checkpoints that do not fit.

Legend: A micro-batches a step, W ranks.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tfusion.sequence import Batch
from tfusion.tokenizers import ImageTokenizer, PixelTokenizer, TextTokenizer
from tfusion.training.compatibility import (
    check_architecture,
    check_image_tokenizer,
    check_state_dict,
    name_optimizer_state,
    number_optimizer_state,
    recount_micro_batches,
)
from tfusion.training.optim import adamw, clip_gradients, lr_factor, parameter_groups, parameter_names
from tfusion.training.trainer_settings import check_precision
from tfusion.training.warm_start import InitFrom, WarmStart, read_checkpoint

log = logging.getLogger(__name__)


class TrainedModule(L.LightningModule):
    """A model on the meta device, with `materialize(device, seed)`, and how it is optimized.

    Subclasses give `training_step`, `validation_step`, `step_metrics` (of the step that just ended) and
    `architecture` (what weights depend on and their shapes do not show). Those that model sequences count them in
    `training_step` (`count_step`), give `training_flops` and log `flops_so_far()`.

    Args:
        model: what is trained.
        image_tokenizer: pixels <-> latents; None = pixels as they are.
        lr, betas, eps, weight_decay, warmup_steps, final_lr_share: of AdamW and its schedule.
        ema: keep an average of the weights.
        seed: of the initial weights.
        init_from: another run, whose weights a fresh `fit` starts from; None = from random weights.
    """

    def __init__(
        self,
        model: nn.Module,
        image_tokenizer: ImageTokenizer | None,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        warmup_steps: int,
        final_lr_share: float,
        ema: bool,
        seed: int,
        init_from: InitFrom | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.ema_model = copy.deepcopy(model).requires_grad_(False) if ema else None
        self.image_tokenizer = image_tokenizer or PixelTokenizer()  # a plain class: never in a checkpoint
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        self.warmup_steps, self.final_lr_share = warmup_steps, final_lr_share
        self.seed, self.init_from = seed, init_from
        self.ckpt_path: str | None = None  # what this command goes on from; the command line says it
        self._warm_start: WarmStart | None = None  # until its weights are filled in
        self._resumes = False  # from a checkpoint, in place of the warm start
        self._caption_drop: float | None = None  # of the checkpoint
        self.text_tokenizer: TextTokenizer | None = None  # of the checkpoint, else the datamodule's
        self.latest_metrics: dict[str, float] = {}  # last logged, for the progress bar
        # not finite (I,) and keys of each micro-batch since the last logging step
        self.latent_checks: deque[tuple[Tensor, tuple[str, ...]]] = deque(maxlen=1000)
        self.grad_norm: Tensor | None = None
        self._counts = torch.zeros(2)  # of the step at hand, all ranks
        self.step_shape = (0, 0, 0)  # rows, positions a row and image slots of the whole step, all ranks
        self.labels_seen: Tensor | int = 0  # labelled positions of all steps so far, all ranks; on the device
        self.precision = "32-true"  # of generation without a trainer
        self._materialized = False

    reads_captions = True  # else the datamodule leaves them out, whatever its settings of them

    # What the datamodule checks itself against.
    model_vocab_size = property(lambda self: self.model.vocab_size)
    max_seq_len = property(lambda self: self.model.max_seq_len)
    num_patches = property(lambda self: self.model.num_patches)
    latent_shape = property(lambda self: self.model.latent_shape)

    @property
    def evaluation_model(self) -> nn.Module:
        """Averaged weights where there are any."""
        return self.model if self.ema_model is None else self.ema_model

    @property
    def image_fingerprint(self) -> str | None:
        """Of the image tokenizer, whose latents the weights mean; None where the model has no images."""
        return self.image_tokenizer.fingerprint

    @property
    def caption_drop(self) -> float | None:
        """Share of pictures that training shows or has shown without their caption, in front of which they stand;
        None where that is not known, or there are none.
        """
        if self._trainer is None or self.trainer.state.fn != "fit":
            return self._caption_drop
        data = self.trainer.datamodule
        return data.caption_first * data.caption_drop if getattr(data, "image_corpora", None) else None

    def architecture(self) -> dict[str, Any]:
        """What weights depend on and their shapes do not show."""
        raise NotImplementedError

    def check_init_from(self) -> None:
        """Take the text tokenizer of the weights to start from, and refuse those that do not fit.

        Before anything is read of the data, which are set up with it, or allocated.

        Raises:
            ValueError: `init_from` names no checkpoint that fits.
        """
        if self.init_from is not None and self._warm_start is None:
            tokenizer = None if self.image_fingerprint is None else self.image_tokenizer
            sizes = (self.architecture(), self.model_vocab_size, tokenizer)
            self._warm_start = WarmStart(self.init_from, self.model, *sizes)
            self.text_tokenizer = self._warm_start.text_tokenizer

    def take_text_tokenizer(self) -> None:
        """Of a run with `init_from`: take the tokenizer of the weights to come, before data are set up with it.

        A command with `--ckpt_path` takes that checkpoint's, and needs the other run no more. From Python Lightning
        tells a module of `fit(ckpt_path=...)` too late: set `trainer.ckpt_path` instead, and call `fit` without.
        """
        if self._materialized:
            return
        ckpt_path = self.ckpt_path or self.trainer.ckpt_path
        self._resumes = ckpt_path is not None
        if self._resumes:
            saved = read_checkpoint(Path(ckpt_path))
            self.text_tokenizer = TextTokenizer.from_json(saved["text_tokenizer"])
        elif self.trainer.state.fn == "fit":
            self.check_init_from()

    def _fill_from_warm_start(self) -> None:
        """At a fresh fit's first step: training and averaged weights both are those of the other run."""
        if self._resumes and self.trainer.ckpt_path is None:
            raise ValueError("this Trainer has resumed another fit before, which hid init_from: give a fresh Trainer")
        if self._warm_start is not None and self.trainer.ckpt_path is None:
            self._warm_start.fill([self.model] if self.ema_model is None else [self.model, self.ema_model])
            if self.trainer.is_global_zero:
                log.info("%s", self._warm_start.report(self.model))
        self._warm_start = None  # and its file

    def training_flops(self, rows: int, positions: int, labels: int, images: int) -> int:
        """Model FLOPs, forward and backward, of B rows of T positions, N labels and I image slots; linear in N."""
        raise NotImplementedError

    def global_counts(self, batch: Batch, batch_idx: int) -> Tensor:
        """(2,) labelled text tokens and predicted images of the whole optimizer step; collective at its first
        micro-batch, whose counts are those of the step.
        """
        if self.is_first(batch_idx):
            self._counts = batch.step_counts.clone()
            if self.trainer.world_size > 1:
                dist.all_reduce(self._counts)
        return self._counts

    def is_first(self, batch_idx: int) -> bool:
        """Whether a micro-batch is the first of its step."""
        return batch_idx % self.trainer.accumulate_grad_batches == 0

    def scaled(self, loss: Tensor) -> Tensor:
        """A micro-batch's part of the step's loss so that, once Lightning and DDP have divided it, parts add up."""
        # Lightning divides by A, DDP and FSDP2 by W
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def count_step(self, micro_batch: Batch, labels: Tensor) -> None:
        """Take note of a step at its first micro-batch; `labels`, on the device, are those of the whole step."""
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        rows, positions = micro_batch.token_ids.shape
        self.step_shape = (rows * parts, positions, len(micro_batch.image_valid) * parts)
        self.labels_seen = self.labels_seen + labels.long()

    def flops_so_far(self) -> int:
        """Model FLOPs from step 0: steps are of one shape, labels are counted; waits for the device.

        Neither the layout nor a resume changes it. Image slots count empty or not, for they run; labels without the
        padding of N. Checkpoints that do not say how many labels there were (older ones) count 0: after a resume from
        one, the heads' FLOPs are those since.
        """
        a_step = self.training_flops(self.step_shape[0], self.step_shape[1], 0, self.step_shape[2])
        return self.trainer.global_step * a_step + self.training_flops(0, 0, int(self.labels_seen), 0)

    def configure_model(self) -> None:
        """Allocate and fill the weights on the device, once."""
        self.check_precision()
        if not self._materialized:
            self.materialize(self.trainer.strategy.root_device)

    def check_precision(self) -> None:
        """Refuse to train weights in half precision, where the command line has not: a Trainer made in Python."""
        if self.trainer.state.fn == "fit":
            check_precision(self.trainer.precision)

    def materialize(self, device: torch.device | str) -> None:
        """The same without a trainer."""
        self.model.materialize(device, self.seed)
        if self.ema_model is not None:
            self.ema_model.materialize(device, self.seed)  # equal weights: they depend on seed and name alone
        self.image_tokenizer.to(device)
        self._materialized = True

    def cpu(self) -> TrainedModule:
        """What Lightning calls to clean up after a refusal too, when there is no data to move yet."""
        return super().cpu() if self._materialized else self

    def _text_tokenizer(self) -> TextTokenizer:
        if self.text_tokenizer is None and self._trainer is not None:
            self.text_tokenizer = self.trainer.datamodule.tokenizer
        if self.text_tokenizer is None:
            raise ValueError("no text tokenizer: give a checkpoint with --ckpt_path (it holds its tokenizer)")
        return self.text_tokenizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; its learning rate is set before each step."""
        return adamw(parameter_groups(self.model, self.weight_decay), self.lr, self.betas, self.eps)

    def on_train_start(self) -> None:
        """The configuration is the truth on a resume too: the checkpoint's optimizer settings give way."""
        if self.trainer.max_steps < 1:
            raise ValueError("trainer.max_steps is not set: the learning rate falls to its end there")
        fresh = parameter_groups(self.model, self.weight_decay)
        for group, new in zip(self.optimizers().param_groups, fresh, strict=True):
            group.update(betas=self.betas, eps=self.eps, weight_decay=new["weight_decay"])
        self._fill_from_warm_start()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        step = self.trainer.global_step
        factor = lr_factor(step, self.warmup_steps, self.trainer.max_steps, self.final_lr_share)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * factor

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by global norm, and keep the norm; Lightning's own refuses fused AdamW under bf16-mixed."""
        self.grad_norm = clip_gradients(self.model.parameters(), gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step, and its gradients freed: Lightning would keep them through the next forward.

        Under DDP with gradients as views of buckets (configs/trainer/ddp.yaml) the buckets stay.
        """
        super().optimizer_step(*args, **kwargs)
        self.optimizers(use_pl_optimizer=False).zero_grad()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The tokenizer belongs to the weights, and moments to parameters by name, on every layout."""
        checkpoint["text_tokenizer"] = self._text_tokenizer().to_json()
        checkpoint["architecture"] = self.architecture()
        checkpoint["caption_drop"] = self.caption_drop
        checkpoint["image_tokenizer"] = self.image_fingerprint
        checkpoint["labels_seen"] = int(self.labels_seen)
        name_optimizer_state(checkpoint, self._optimizer_names())

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError for weights of another architecture or image tokenizer; else take note of its caption drop,
        against which guidance is checked before Lightning loads it.
        """
        if "state_dict" in checkpoint:  # Lightning's FSDP2 has already loaded it, and the optimizer
            check_state_dict(self.state_dict(), checkpoint["state_dict"])
        if "text_tokenizer" not in checkpoint:
            raise ValueError("the checkpoint has no text tokenizer: give one that `tfusion fit` wrote")
        check_architecture(self.architecture(), checkpoint["architecture"])
        if self.image_fingerprint is not None:
            check_image_tokenizer(self.image_tokenizer, checkpoint.get("image_tokenizer"))
        self._caption_drop = checkpoint.get("caption_drop")  # older ones do not say

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the tokenizer; refuse weights that do not fit in words."""
        self.check_checkpoint(checkpoint)
        self.text_tokenizer = TextTokenizer.from_json(checkpoint["text_tokenizer"])
        self.labels_seen = checkpoint.get("labels_seen", 0)  # older checkpoints counted none
        if self._trainer is not None and self.trainer.state.fn == "fit":
            recount_micro_batches(checkpoint, self.trainer.accumulate_grad_batches)
            number_optimizer_state(checkpoint, self._optimizer_names())
            if checkpoint["global_step"] > self.trainer.max_steps > 0:
                log.warning(
                    "the checkpoint is of step %d, past trainer.max_steps %d: nothing is trained (config.yaml is of "
                    "the first fit: give --trainer.max_steps again)",
                    *(checkpoint["global_step"], self.trainer.max_steps),
                )

    def _optimizer_names(self) -> list[list[str]]:
        return parameter_names(self, parameter_groups(self.model, self.weight_decay))
