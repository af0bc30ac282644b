"""Perplexity and bits per byte: sums over labelled tokens, so that neither batches nor ranks change them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from tfusion.sequence import NUM_SPECIAL_IDS
from tfusion.tokenizers import TextTokenizer


class TextLoss(Metric):
    """Sums of negative log-likelihood, its square, tokens and UTF-8 bytes.

    `compute` gives `nll` (nats a token), `perplexity` = exp(nll), `bits_per_byte` = total nats / ln 2 / bytes, and
    `tokens`. Bits per byte do not depend on the vocabulary, so they compare models with different tokenizers.
    `squares`, the sum of squared nats, is what `standard_error_of_mean` wants.

    Args:
        bytes_of_token: (V,) UTF-8 bytes that a token stands for, 0 for special ids; see `token_bytes`.
    """

    full_state_update = False

    def __init__(self, bytes_of_token: Tensor) -> None:
        super().__init__()
        self.register_buffer("bytes_of_token", bytes_of_token, persistent=False)
        for name in ("nats", "squares", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, labels: Tensor, counted: Tensor) -> None:
        """Add (N,) losses in nats of (N,) labels where `counted` (N,) bool."""
        nats = nll.double() * counted
        self.nats += nats.sum()
        self.squares += nats.square().sum()
        self.tokens += counted.sum()
        self.bytes += (self.bytes_of_token[labels.clamp(min=0)] * counted).sum()

    def compute(self) -> dict[str, float]:
        nats, tokens, count = self.nats.item(), self.tokens.item(), self.bytes.item()
        nll = nats / max(tokens, 1)
        return {
            "nll": nll,
            "perplexity": math.exp(min(nll, 700.0)),
            "bits_per_byte": nats / math.log(2) / max(count, 1),
            "tokens": tokens,
            "squares": self.squares.item(),
        }


def standard_error_of_mean(total: float, squares: float, count: float) -> float | None:
    """Of n independent values' mean, sqrt(s^2 / n), from their sum and sum of squares; None of fewer than two.

    Tokens of one text, and pictures of one subject, depend on each other: the error of a new text is larger.
    """
    if count < 2:
        return None
    variance = max(0.0, squares - total**2 / count) / (count - 1)
    return math.sqrt(variance / count)


def token_bytes(tokenizer: TextTokenizer) -> Tensor:
    """(V,) how many UTF-8 bytes each id stands for."""
    sizes = torch.zeros(tokenizer.vocab_size)
    for token_id in range(NUM_SPECIAL_IDS, tokenizer.vocab_size):
        sizes[token_id] = tokenizer.num_bytes(token_id)
    return sizes
