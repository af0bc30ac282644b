"""`MultimodalModule`: what the modules that train on and generate text and images share, whatever their losses are.

Weights sharded or whole, sums over the whole optimizer step (all ranks and micro-batches), samples.

Legend: A micro-batches a step, W ranks.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from tfusion.generation import Generator
from tfusion.models.base import MultimodalModel
from tfusion.models.compilers import has_compiler
from tfusion.models.packed_linear import can_be_packed, packed
from tfusion.requests import Generation, GenerationConfig, Request, parse_request
from tfusion.sequence import Batch
from tfusion.tokenizers import ImageTokenizer
from tfusion.training.base import TrainedModule
from tfusion.training.parallel import check_strategy, shard, whole_model
from tfusion.training.warm_start import InitFrom

log = logging.getLogger(__name__)

# Compiled for generation: one or many rows, one or many positions, with and without a mask, written in one place, in
# several or behind all rows. torch's own limit of 8 would be reached, and then a block be eager.
CODES_OF_A_BLOCK = 32
WORTH_COMPILING = 500  # samples of a rank: compiling takes up to a minute, in which a few would long be there


class MultimodalModule(TrainedModule):
    """A `TrainedModule` of a `MultimodalModel`.

    Subclasses also give `metrics_of_step` and `loss_weights`, and say how images are measured in validation.

    Args:
        model: what is trained.
        image_tokenizer, lr, betas, eps, weight_decay, warmup_steps, final_lr_share, ema, seed, init_from:
            `TrainedModule`'s.
        generation: default settings for samples and predictions.
        compile_blocks: compile the trunk's blocks in `fit`, and in `predict` of many samples, where there is a
            compiler.
    """

    image_measure: ClassVar[str]  # the loss of an image in `validation_step`'s "errors", as it is called in metrics
    noise_steps: int | None = None  # the range of "timesteps", where images are noised
    predicts_text = property(lambda self: self.model.predicts_text)
    predicts_images: bool

    def __init__(
        self,
        model: MultimodalModel,
        image_tokenizer: ImageTokenizer | None,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        warmup_steps: int,
        final_lr_share: float,
        ema: bool,
        generation: GenerationConfig | None,
        seed: int,
        init_from: InitFrom | None,
        compile_blocks: bool,
    ) -> None:
        optimizer = (lr, betas, eps, weight_decay, warmup_steps, final_lr_share)
        super().__init__(model, image_tokenizer, *optimizer, ema, seed, init_from)
        self.generation = generation or GenerationConfig()
        self.compile_blocks = compile_blocks
        self.step_sums: Tensor | None = None
        self._blank: list[MultimodalModel] = []  # under FSDP2 one, on meta: in a list, so not a part of this module
        self._held: list[MultimodalModel] = []  # what generates, while predicting

    @property
    def image_fingerprint(self) -> str | None:
        """`TrainedModule`'s."""
        return self.image_tokenizer.fingerprint if self.predicts_images else None

    def metrics_of_step(self, sums: Tensor) -> dict[str, float]:
        """What is logged, from the global sums that `add_micro_batch` was given the parts of."""
        raise NotImplementedError

    def loss_weights(self, tokens: float, images: float) -> tuple[float, float]:
        """Weights of the mean text and the mean image loss in `val/loss`, given how many each is of."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Allocate and fill the weights on the device, once; under FSDP2 each rank its shards of them."""
        check_strategy(self.trainer.strategy, self.trainer.world_size)
        self.check_precision()
        self._held = []
        compiled = self._compiles(self.trainer.strategy.root_device) and self.trainer.state.fn == "fit"
        if self.device_mesh is not None:
            self._check_sharded(compiled)
        if not self._materialized:
            if self.device_mesh is not None:
                self._blank.append(copy.deepcopy(self.model))
                for model in (self.model, self.ema_model):
                    if model is not None:
                        shard(model, self.device_mesh["data_parallel"], self._computes_in_bf16())
            self.materialize(self.trainer.strategy.root_device)
        if compiled:
            self.model.transformer.compile_blocks()

    def _compiles(self, device: torch.device) -> bool:
        return self.compile_blocks and has_compiler(device.type)

    def _check_sharded(self, compiled: bool) -> None:
        """Refuse what FSDP2 cannot do."""
        if self._materialized and not self._blank:
            raise ValueError("FSDP2 shards a model before its weights are allocated: give the Trainer a fresh one")
        if compiled and self.model.transformer.activation_checkpointing == "selective":
            raise ValueError(
                "FSDP2 with compile_blocks and activation_checkpointing selective would compile nothing (torch cannot "
                "leave a compiled block at FSDP2's hooks while it selects): set compile_blocks to false, or "
                "activation_checkpointing to full or none"
            )

    def counts_of_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """`global_counts`, taken note of at a step's first micro-batch; collective."""
        counts = self.global_counts(batch, batch_idx)
        if self.is_first(batch_idx):
            self.count_step(batch, counts[0])
        return counts

    def add_micro_batch(self, loss: Tensor, sums: Tensor, batch_idx: int) -> Tensor:
        """Keep a micro-batch's sums, and scale its part of the step's loss as Lightning and DDP want it."""
        first = self.is_first(batch_idx)
        self.step_sums = sums if first or self.step_sums is None else self.step_sums + sums
        return self.scaled(loss)

    def step_metrics(self) -> dict[str, float]:
        """Of the step that just ended, global; collective, and it waits for the device: at logging steps only."""
        sums = self.step_sums.clone()
        if self.trainer.world_size > 1:
            dist.all_reduce(sums)
        metrics = self.metrics_of_step(sums)
        metrics["train/flops"] = float(self.flops_so_far())
        metrics["train/grad_norm"] = float(self.grad_norm)
        metrics["train/lr"] = self.optimizers().param_groups[0]["lr"]
        return metrics

    def predict_step(self, batch: list[tuple[int, Request]], batch_idx: int) -> list[Generation]:
        """Samples for numbered requests, as many together as the batch is meant to have."""
        together = getattr(self.trainer.datamodule, "predict_batch_size", None)
        return self.generate([request for _, request in batch], [number for number, _ in batch], together)

    def generate(
        self,
        requests: Sequence[Request | dict[str, Any]],
        numbers: list[int] | None = None,
        batch_size: int | None = None,
    ) -> list[Generation]:
        """Samples from the evaluation weights, in bf16 where the trainer computes in bf16.

        Each call copies the weights, unless it is in fp32 on a GPU; `hold_generation_model` does so once for many.
        Under FSDP2 every rank has to call it, if only with no requests: gathering the weights is a collective.

        Args:
            requests: as in `prompts.jsonl`; what a request leaves out comes from `generation`.
            numbers: what the requests are called; None = 0, 1, ...
            batch_size: samples decoded together, of which a request has `n`; None = all.

        Raises:
            ValueError: a request that cannot be met, before any work.
        """
        parsed = [parse_request(request, self.generation) for request in requests]
        numbers = list(range(len(parsed))) if numbers is None else numbers
        self.check_requests(parsed, numbers)
        model = self._held[0] if self._held else self._generation_model()
        device = model.embedding.weight.device.type
        # blocks that training compiled are not for a cache's shapes; predict_step runs inside Lightning's autocast
        stance = torch.compiler.set_stance("default" if self._held else "force_eager")
        limit = torch.compiler.config.patch(recompile_limit=CODES_OF_A_BLOCK)
        with torch.autocast(device, enabled=False), stance, limit:
            return self._generator(model).generate(parsed, numbers, batch_size)

    def check_requests(self, requests: Sequence[Request], numbers: list[int] | None = None) -> None:
        """Raise ValueError for a request that cannot be met; with all requests on every rank, so all refuse."""
        self._generator(self.evaluation_model).check(list(requests), numbers)
        self._check_guidance(requests, numbers)

    def _check_guidance(self, requests: Sequence[Request], numbers: list[int] | None) -> None:
        """Refuse guidance where training has dropped no caption: the prediction without one may mean nothing."""
        if self.caption_drop != 0 or not self.predicts_images:
            return
        for number, request in zip(numbers or range(len(requests)), requests, strict=True):
            scale = request.config.guidance_scale
            if request.generate != "text" and scale != 1:
                raise ValueError(
                    f"request {number} has guidance_scale {scale}, but training with data.caption_drop 0, or with "
                    "data.caption_first 0, leaves out no caption in front of a picture, and pictures without one are "
                    "what guidance leads away from: set guidance_scale to 1 (of the request, or "
                    "generation.guidance_scale of the model), or train with data.caption_first 0.8 and "
                    "data.caption_drop 0.1"
                )

    def hold_generation_model(self, samples: int | None = None) -> None:
        """Copy what generates once for many calls of `generate`, until the next run of a Trainer, and compile it where
        `compile_blocks` says so, which takes up to a minute in the first calls. While a copy in fp32 on a CPU is held,
        whose matrices are packed (`models/packed_linear.py`), the module cannot be pickled.

        Args:
            samples: how many will be generated, where that is known: for a few nothing is compiled.
        """
        model = self._generation_model()
        if model.embedding.weight is self.evaluation_model.embedding.weight:  # so far it shares weights
            model = copy.deepcopy(model)
        if self._compiles(model.embedding.weight.device):
            if samples is None or samples >= WORTH_COMPILING:
                model.transformer.compile_blocks(dynamic=True)
            else:
                log.info("compile_blocks: nothing is compiled for %d samples (from %d on)", samples, WORTH_COMPILING)
        self._held = [model]

    def _generation_model(self) -> MultimodalModel:
        model = whole_model(self.evaluation_model, self._blank, self._computes_in_bf16())
        return packed(model) if can_be_packed(model) else model

    def _computes_in_bf16(self) -> bool:
        return "bf16" in str(self.precision if self._trainer is None else self.trainer.precision)

    def _generator(self, model: MultimodalModel) -> Generator:
        raise NotImplementedError

    def on_predict_start(self) -> None:
        """All requests are refused or accepted before the first is met; ranks may have unequal numbers of batches."""
        requests = self.trainer.datamodule.requests
        self.check_requests(requests)
        self.hold_generation_model(sum(request.n for request in requests) // self.trainer.world_size)

    def on_predict_end(self) -> None:
        self._held = []
