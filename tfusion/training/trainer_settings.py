"""Settings of Lightning's Trainer: what they are where nobody says, and which would do something else than they say."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)
TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # the data module divides rows among ranks itself
    "max_epochs": -1,  # the training data has no end: max_steps stops a run
    "check_val_every_n_epoch": None,  # val_check_interval counts over the whole run
    "gradient_clip_val": 1.0,  # the paper's
    "num_sanity_val_steps": 0,  # the first validation must not depend on a rehearsal
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # it would list the model twice, once as its average
}


def check_trainer(config: Any) -> None:
    """Refuse settings of the Trainer that would do something else than they say."""
    check_precision(config.precision)
    if config.precision not in (None, "32-true", "32", 32, "bf16-mixed"):
        raise ValueError(f"got trainer.precision {config.precision!r}, expected 32-true or bf16-mixed")
    if config.max_steps < 1:
        raise ValueError("trainer.max_steps is not set: training data has no end, so say where to stop")
    if config.limit_train_batches not in (None, 1.0) or config.overfit_batches:
        raise ValueError(
            "got trainer.limit_train_batches or overfit_batches, but training data has no epochs to cut short: "
            "use trainer.max_steps"
        )


def check_precision(precision: Any) -> None:
    """Refuse weights in half precision: torch's AdamW has no fp32 copy of them, and would lose its updates.

    A weight in bf16 has 8 bits: what is smaller than its 512th part rounds to nothing, and lr 3e-4 times a step of size
    1 is smaller beside every weight above 0.15; so is all weight decay.
    """
    if precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"got trainer.precision {precision!r}: weights would be kept in half precision, in which small updates "
            "round to nothing; expected bf16-mixed, which computes in bf16 and learns in fp32, and with more than one "
            "process FSDP2 (--config configs/trainer/fsdp2.yaml) so that each holds only its share of the fp32 weights"
        )


@functools.cache
def has_bf16(device_type: str) -> bool:
    """Whether bf16 is of use there: a CPU without instructions for it takes 12 (convolutions) to 45 times (products) as
    long as in fp32 (measured: AMD Zen 3, which has AVX2 and no more).
    """
    mkldnn = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return device_type != "cpu" or mkldnn()


def precision_on(device_type: str, precision: Any) -> Any:
    """A run's precision, or 32-true for bf16-mixed where bf16 is of no use; that is said."""
    if precision != "bf16-mixed" or has_bf16(device_type):
        return precision
    if rank_zero_only.rank == 0:
        log.warning(
            "precision: torch finds no instructions for bf16 in this CPU (such as AVX-512 or AMX), which would take 12 "
            "to 45 times as long in bf16-mixed as in 32-true: that is taken in its place"
        )
    return "32-true"


def check_validation_interval(config: Any) -> None:
    """Refuse intervals at which validation would never run, or run between micro-batches of a step."""
    interval, accumulate = config.val_check_interval, config.accumulate_grad_batches
    if config.limit_val_batches == 0:
        return
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        raise ValueError(
            f"got trainer.val_check_interval {interval}, expected a number of batches, for training data is "
            "endless; set it, or trainer.limit_val_batches to 0 to go without validation"
        )
    if interval % accumulate:
        nearest = max(accumulate, round(interval / accumulate) * accumulate)
        raise ValueError(
            f"got trainer.val_check_interval {interval} with trainer.accumulate_grad_batches {accumulate}; "
            "Lightning counts micro-batches, so it would validate in the middle of an optimizer step; "
            f"expected a multiple, such as {nearest}"
        )
    if 0 < (micro_batches := config.max_steps * accumulate) < interval:
        log.warning(
            "trainer.val_check_interval %d is more than the %d micro-batches of this run: nothing is validated, and "
            "there will be no best.ckpt; set it to %d to validate at the end",
            *(interval, micro_batches, micro_batches),
        )
