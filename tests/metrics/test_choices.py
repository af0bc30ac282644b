"""Accuracy of ranked choice by hand, and over batches."""

from __future__ import annotations

import pytest
import torch

from tfusion.metrics import ChoiceAccuracy

# Log-likelihoods by choice; characters without the space around: (2, 8), (1, 1, 3), (4, 4)
CHOICES = [("ab", " abcdefgh "), ("a", " b", "abc"), ("yes.", "no no"[:4])]
VALUES = [-3.0, -4.0, -2.0, -1.0, -1.5, -5.0, -5.0]


def metric(answers: list[int]) -> ChoiceAccuracy:
    """With each choice's log-likelihood given in two halves, and tokens that count for none."""
    accuracy = ChoiceAccuracy(CHOICES, answers)
    for numbers in ([0, 1, 2, 3], [4, 5, 6]):
        ids = torch.tensor([n for number in numbers for n in (number, -1, number)])
        nll = torch.tensor([x for number in numbers for x in (-VALUES[number] / 2, 99.0, -VALUES[number] / 2)])
        accuracy.update(nll, ids)
    return accuracy


def test_the_highest_wins_a_character_and_unnormalised() -> None:
    # a character: -1.5, -0.5 | -2, -1, -0.5 | equal, so the first; unnormalised: 0, 1, 0
    assert metric([1, 2, 0]).compute() == {"questions": 3, "right": 3, "right_unnormalised": 1}
    assert metric([0, 1, 0]).compute() == {"questions": 3, "right": 1, "right_unnormalised": 3}
    assert metric([0, 0, 1]).compute() == {"questions": 3, "right": 0, "right_unnormalised": 1}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_question_of_which_a_choice_was_not_scored_does_not_count() -> None:
    accuracy = ChoiceAccuracy(CHOICES, [0, 0, 0])
    assert accuracy.compute() == {"questions": 0, "right": 0, "right_unnormalised": 0}
    accuracy.update(torch.ones(3), torch.tensor([0, 1, 2]))  # of the second question one of three
    assert accuracy.compute() == {"questions": 1, "right": 0, "right_unnormalised": 1}
    accuracy.reset()
    assert accuracy.compute()["questions"] == 0
