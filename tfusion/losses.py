"""The losses as sums: of Transfusion, which become `L_LM + lambda L_DDPM` (eq. 4), and Chameleon's z-loss.

Sums and counts are kept apart, because the mean is over the whole optimizer step: all ranks, all micro-batches.

Logits of all labels at once would be the largest tensor of a training step: with 32,000 ids and 16,000 labels 2 GB, a
softmax and two gradients of the same size beside it. Above `CHUNK_BYTES` they exist a few labels at a time, and are
computed again in the backward pass. torch's own `F.linear_cross_entropy` divides them as well, but its loss of each
label is in the type of its inputs (bf16 under autocast, of three digits), and it has no log Z.

Legend: N labelled positions, D width, V vocabulary, I image slots, C, h, w latent size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tfusion.sequence import IGNORE_INDEX

# Of fp32 logits at once: 2,048 labels of 32,000 ids. The gradient of the head is added to once a chunk, which takes as
# long as the products of some hundred labels; and what is smaller than this is not worth being computed twice.
CHUNK_BYTES = 2**28
# Rows of logits on CUDA begin at multiples of so many ids: with 32,005 in a row its kernels for bf16 are those that can
# read any address, several times slower (an H200: 2 ms of 0.4 a product).
ALIGNED = 64


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each label, 0 where it is ignored; (N, V), (N,) -> (N,) in fp32 at least."""
    return F.cross_entropy(wide(logits), labels, ignore_index=IGNORE_INDEX, reduction="none")


def squared_log_z(logits: Tensor, labels: Tensor, nll: Tensor) -> Tensor:
    """log^2 Z of each label's softmax, Z = sum exp(logits), 0 where it is ignored; (N, V), (N,), (N,) -> (N,).

    Chameleon (arXiv 2405.09818, §2.3) adds 1e-5 of it to the loss, against logits that drift together. `nll` is what
    `token_nll` gave, of which log Z is a part: nll = log Z - the label's logit.
    """
    own = wide(logits.gather(1, labels.clamp(min=0)[:, None])[:, 0])
    return torch.where(labels != IGNORE_INDEX, nll + own, 0).square()


def head_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`token_nll` and `squared_log_z` of what a head predicts; where logits are many they are never all there.

    Args:
        hidden: (N, D) that the head reads.
        weight: (V, D) of the head; under autocast the product is in its type.
        labels: (N,), `IGNORE_INDEX` where there is none.

    Returns:
        nll (N,) and log^2 Z (N,), in fp32 at least.
    """
    rows = max(1, CHUNK_BYTES // (4 * len(weight)))
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if len(hidden) <= rows:
        logits = F.linear(hidden, _aligned(weight, dtype))[:, : len(weight)]
        nll = token_nll(logits, labels)
        return nll, squared_log_z(logits, labels, nll)
    nll, log_z = _InChunks.apply(hidden.to(dtype), weight, labels.clamp(min=0), rows)
    labelled = labels != IGNORE_INDEX  # (the others' gradients end here)
    return torch.where(labelled, nll, 0), torch.where(labelled, log_z, 0).square()


class _InChunks(torch.autograd.Function):
    """nll and log Z of every label from (N, D), (V, D) and (N,), so many rows of logits at a time.

    Saved are the inputs alone. With p = softmax(logits), d nll = p - onehot(label) and d log Z = p.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.rows = rows
        V, weight = len(weight), _aligned(weight, hidden.dtype)  # (V', D)
        log_z, own = [], []
        for h, label in zip(hidden.split(rows), labels.split(rows), strict=True):
            logits = wide(F.linear(h, weight)[:, :V])  # (rows, V)
            log_z.append(logits.logsumexp(-1))
            own.append(logits.gather(1, label[:, None])[:, 0])
            del logits  # or they would be there beside the next chunk's
        total = torch.cat(log_z)
        return total - torch.cat(own), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nll_grad: Tensor, log_z_grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, head, labels = ctx.saved_tensors
        V, weight = len(head), _aligned(head, hidden.dtype)  # (V', D)
        hidden_grad, head_grad = torch.empty_like(hidden), torch.zeros_like(head)
        parts = (hidden, labels, nll_grad, log_z_grad, hidden_grad)
        for h, label, of_nll, of_log_z, into in zip(*(part.split(ctx.rows) for part in parts), strict=True):
            grad = F.linear(h, weight)[:, :V].softmax(-1, dtype=nll_grad.dtype)  # (rows, V)
            grad.mul_((of_nll + of_log_z)[:, None]).scatter_add_(1, label[:, None], -of_nll[:, None])
            grad = grad.to(hidden.dtype)
            grad = F.pad(grad, (0, len(weight) - V)) if len(weight) > V else grad  # (rows, V'); padding by 0 copies
            torch.mm(grad, weight, out=into)
            head_grad += (grad.T @ h)[:V]  # summed in the weights' own type, fp32 under autocast
            del grad  # or it would be there beside the next chunk's
        return hidden_grad, head_grad, None, None


def _aligned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, D) in the type of the product, where the device wants rows of logits aligned (V', D), with zeros behind."""
    rest = -len(weight) % ALIGNED if weight.is_cuda else 0
    weight = weight.to(dtype)
    return F.pad(weight, (0, 0, 0, rest)) if rest else weight


def wide(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def image_mse(model_output: Tensor, target: Tensor, image_valid: Tensor) -> Tensor:
    """Mean square over each image, 0 in empty slots; (I, C, h, w) twice, (I,) bool -> (I,) in fp32 (eq. 3)."""
    errors = (model_output.float() - target.float()).square().flatten(1).mean(1)
    return errors * image_valid
