"""What a logging step reports: sums over its micro-batches and ranks, kept on the device until they are read.

Those of `TransfusionModule`:

0, 1    text and diffusion loss, each divided by the step's count
2, 3, 4 positions in use, images, positions
5 - 12  diffusion errors, then noised images, by quarter of the noise range
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfusion.sequence import Batch

NUM_QUARTERS = 4  # the diffusion loss is also logged by quarter of the noise range


def noise_quarter(timesteps: Tensor, num_timesteps: int) -> Tensor:
    """(I,) which quarter of the noise range a timestep (I,) is in, 0 the one of least noise."""
    return (timesteps / num_timesteps * NUM_QUARTERS).long().clamp(max=NUM_QUARTERS - 1)


def quarter_name(quarter: int, num_timesteps: int) -> str:
    """Such as `t0-250`."""
    start, end = (n * num_timesteps // NUM_QUARTERS for n in (quarter, quarter + 1))
    return f"t{start}-{end}"


@torch.no_grad()
def micro_batch_sums(
    batch: Batch, losses: Tensor, errors: Tensor, timesteps: Tensor, valid: Tensor, num_timesteps: int
) -> Tensor:
    """(13,) of one micro-batch, from its losses (2,) and each image's error, timestep and whether it counts (I,)."""
    quarter = noise_quarter(timesteps, num_timesteps)
    by_quarter = errors.new_zeros(2, NUM_QUARTERS)
    noised = valid & (batch.noise_limits > 0)
    by_quarter.index_add_(1, quarter, torch.stack([errors, noised.float()]))
    return torch.cat([losses.detach(), row_sums(batch), by_quarter.flatten()])


def row_sums(batch: Batch) -> Tensor:
    """(3,) positions in use, images, positions."""
    used = (batch.document_ids >= 0).float()
    # (new_full: made on the device, a tensor made here would have to be sent)
    return torch.stack([used.sum(), batch.image_valid.sum().float(), used.new_full((), used.numel())])


def row_metrics(used: float, images: float, positions: float) -> dict[str, float]:
    """What is logged of `row_sums`."""
    return {"train/utilization": used / positions, "train/positions": used, "train/images": images}


def metrics_of(
    sums: Tensor, num_timesteps: int, diffusion_loss_weight: float, text: bool = True, images: bool = True
) -> dict[str, float]:
    """What is logged, from the global sums, of a model that predicts `text` and `images`; waits for the device."""
    text_loss, diffusion_loss, used, num_images, positions, *by_quarter = sums.tolist()
    losses = {"train/text_loss": text_loss} if text else {}
    losses |= {"train/diffusion_loss": diffusion_loss} if images else {}
    metrics = {
        "train/loss": text_loss + diffusion_loss_weight * diffusion_loss,
        **losses,
        **row_metrics(used, num_images, positions),
    }
    for q in range(NUM_QUARTERS):
        total, count = by_quarter[q], by_quarter[NUM_QUARTERS + q]
        if count:
            metrics[f"train/diffusion_loss_{quarter_name(q, num_timesteps)}"] = total / count
    return metrics
