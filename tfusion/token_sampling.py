"""Choosing the next token of every row of a batch at once: greedy, temperature, top-k, top-p, each row its own."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_tokens(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """Next tokens, (R,) int64.

    Args:
        logits: (R, V) in fp32 at least; -inf where a token may not be, not a whole row.
        temperature: (R,); 0 = greedy.
        top_k: (R,) int; V = all.
        top_p: (R,) in (0, 1]; 1 = all. The smallest set of likeliest tokens whose probability reaches it.
        uniforms: (R,) in [0, 1): the row's draw, looked up in its cumulative distribution.
    """
    scaled = logits / temperature.clamp(min=1e-6)[:, None]
    ordered, tokens = scaled.sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    probabilities = ordered.masked_fill(rank >= top_k[:, None], float("-inf")).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the likelier ones
    probabilities = probabilities.masked_fill((before >= top_p[:, None]) & (rank > 0), 0)
    cumulative = probabilities.double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms.double()[:, None] * cumulative[:, -1:], right=True)
    drawn = tokens.gather(1, drawn.clamp(max=logits.shape[-1] - 1))[:, 0]
    return torch.where(temperature > 0, drawn, logits.argmax(-1))
