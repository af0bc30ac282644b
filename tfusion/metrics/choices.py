"""Accuracy of ranked choice: how often the right continuation of a context is the likeliest one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric


class ChoiceAccuracy(Metric):
    """Sums of log-likelihood by choice, added over batches and ranks.

    `compute` gives `questions`, how many there are of which every choice was scored, and of them `right`, where the
    answer has the highest log-likelihood divided by characters, the normalisation of the LLaMA papers' suite (Touvron
    et al. 2023, section 3, after Gao et al. 2021), and `right_unnormalised`, where it has the highest as it is. The
    first of equals counts as the highest.

    Legend: Q questions, S choices of all questions, N labelled tokens.

    Args:
        choices: of each of the Q questions. Characters are counted without the space around a choice, which only
            parts it from its context.
        answers: (Q,) the number of the right one.
    """

    full_state_update = False

    def __init__(self, choices: Sequence[Sequence[str]], answers: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(map(len, choices))
        characters = [len(choice.strip()) for some in choices for choice in some]
        self.register_buffer("characters", torch.tensor(characters, dtype=torch.float64), persistent=False)
        self.register_buffer("answers", torch.tensor(answers), persistent=False)
        for name in ("log_likelihoods", "tokens"):
            self.add_state(name, torch.zeros(len(characters), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, choice_ids: Tensor) -> None:
        """Add (N,) losses in nats of tokens of the choices (N,), -1 where a token counts for none."""
        counted = (choice_ids >= 0).double()
        choice_ids = choice_ids.clamp(min=0)
        self.log_likelihoods.index_add_(0, choice_ids, -nll.double() * counted)
        self.tokens.index_add_(0, choice_ids, counted)

    def compute(self) -> dict[str, int]:
        scored = self._by_question(self.tokens, 1.0).gt(0).all(1)  # not all are, where validation is cut short
        right = self._best(self.log_likelihoods / self.characters) & scored
        unnormalised = self._best(self.log_likelihoods) & scored
        return {
            "questions": int(scored.sum()),
            "right": int(right.sum()),
            "right_unnormalised": int(unnormalised.sum()),
        }

    def _best(self, scores: Tensor) -> Tensor:
        """(Q,) whether the answer's score is the highest, from (S,) scores."""
        return self._by_question(scores, -torch.inf).argmax(1) == self.answers

    def _by_question(self, values: Tensor, padding: float) -> Tensor:
        """(S,) -> (Q, most choices)."""
        return pad_sequence(list(values.split(self.sizes)), batch_first=True, padding_value=padding)
