"""The codes of a VQ autoencoder in training: how many are used, and dead ones restarted; alike on any layout.

Legend: N codes, D numbers a code, I image slots, A micro-batches a step, W ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tfusion.models.autoencoder import Autoencoder, Coded, VQAutoencoder


def use_of(coded: Coded, valid: Tensor, codebook_size: int) -> Tensor:
    """(N,) int64 positions of each code, in the pictures that are `valid` (I,)."""
    weights = valid[:, None, None].expand_as(coded.ids).flatten()
    use = torch.zeros(codebook_size, dtype=torch.int64, device=valid.device)
    return use.index_add_(0, coded.ids.flatten(), weights.long())


def statistics(use: Tensor) -> dict[str, float]:
    """Of (N,) counts: `codebook_use`, the share of codes used at all, and `codebook_perplexity`, exp of the entropy."""
    shares = use.double() / use.sum().clamp(min=1)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return {"codebook_use": float((use > 0).double().mean()), "codebook_perplexity": float(entropy.exp())}


class StepCodes:
    """Codes and vectors of an optimizer step, micro-batch by micro-batch; at its end dead codes are restarted.

    Which vectors they are put on is a function of seed, step and the step's pictures, not of how these are divided
    among ranks and micro-batches: vectors are numbered as one process would.

    Args:
        seed: of the choice.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.use: Tensor | None = None  # (N,) of the step, at its end of all ranks
        self._vectors: list[Tensor] = []  # of each micro-batch (I, D, h, w)
        self._valid: list[Tensor] = []  # (I,)

    def add(self, coded: Coded, valid: Tensor, codebook_size: int, first: bool) -> None:
        """Add a micro-batch; `first` of its step."""
        use = use_of(coded, valid, codebook_size)
        if first or self.use is None:
            self.use, self._vectors, self._valid = torch.zeros_like(use), [], []
        self.use += use
        self._vectors.append(coded.means.detach())
        self._valid.append(valid)

    @torch.no_grad()
    def restart_dead(
        self, model: VQAutoencoder, average: Autoencoder | None, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """Between backward and the optimizer's step; collective, and it waits for no device.

        What the average and the optimizer's moments know of a code that jumps is of where it was: the average jumps
        too, moments become 0. So, having no gradient either, a code stays where it is put until it is used.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.use)
        moved = model.restart(model.count_use(self.use), *self._whole_step(), ("codes", self.seed, step))
        self._vectors, self._valid = [], []
        weight = model.network.quantize.embedding.weight
        moments = optimizer.state.get(weight, {})  # none before the first step
        for name in {"exp_avg", "exp_avg_sq"} & moments.keys():
            moments[name].masked_fill_(moved[:, None], 0)
        if average is not None:
            averaged = average.network.quantize.embedding.weight
            averaged.copy_(torch.where(moved[:, None], weight, averaged))

    def _whole_step(self) -> tuple[Tensor, Tensor]:
        """Vectors (M, D) and which of them count (M,): micro-batch by micro-batch, each rank by rank, as rows are."""
        vectors, valid = [], []
        for own, own_valid in zip(self._vectors, self._valid, strict=True):
            some = _gathered(own).movedim(1, -1)  # (I, h, w, D)
            vectors.append(some.flatten(0, -2))
            valid.append(_gathered(own_valid)[:, None, None].expand(some.shape[:-1]).flatten())
        return torch.cat(vectors), torch.cat(valid)


def _gathered(own: Tensor) -> Tensor:
    """Concatenated over ranks, which have tensors of equal sizes; collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return own
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts)
