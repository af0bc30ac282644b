"""The losses as sums: of Transfusion, which become `L_LM + lambda L_DDPM` (eq. 4), and Chameleon's z-loss.

Sums and counts are kept apart, because the mean is over the whole optimizer step: all ranks, all micro-batches.

Legend: N labelled positions, V vocabulary, I image slots, C, h, w latent size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tfusion.sequence import IGNORE_INDEX


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each label, 0 where it is ignored; (N, V), (N,) -> (N,) in fp32."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")


def squared_log_z(logits: Tensor, labels: Tensor) -> Tensor:
    """log^2 Z of each label's softmax, Z = sum exp(logits), 0 where it is ignored; (N, V), (N,) -> (N,) in fp32.

    Chameleon (arXiv 2405.09818, §2.3) adds 1e-5 of it to the loss, against logits that drift together.
    """
    return torch.where(labels != IGNORE_INDEX, logits.float().logsumexp(-1).square(), 0)


def image_mse(model_output: Tensor, target: Tensor, image_valid: Tensor) -> Tensor:
    """Mean square over each image, 0 in empty slots; (I, C, h, w) twice, (I,) bool -> (I,) in fp32 (eq. 3)."""
    errors = (model_output.float() - target.float()).square().flatten(1).mean(1)
    return errors * image_valid
