"""AdamW as in the paper, its two groups, and its learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay, vectors (norms, biases) do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def parameter_names(module: nn.Module, groups: Iterable[dict]) -> list[list[str]]:
    """What the module calls the parameters of each group, in their order."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in groups]


def adamw(groups: Iterable[dict], lr: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """One kernel for all parameters."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def clip_gradients(parameters: Iterable[nn.Parameter], most: float | None, algorithm: str | None) -> Tensor:
    """Clip by global norm, of sharded gradients too (collective), and return the norm before; None and 0 = do not."""
    if algorithm not in (None, "norm"):
        raise ValueError(f"trainer.gradient_clip_algorithm is {algorithm!r}, expected 'norm'")
    norm = nn.utils.clip_grad_norm_(parameters, most or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def lr_factor(step: int, warmup_steps: int, max_steps: int, final: float) -> float:
    """Linear warm-up, then a cosine down to `final` at `max_steps` (paper: 4000 steps, 3e-4 to 1.5e-5 = 5 %)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
