"""Both losses equal loops, and their gradients are zero wherever nothing is wanted."""

from __future__ import annotations

import math

import torch

from tfusion.losses import image_mse, squared_log_z, token_nll
from tfusion.sequence import IGNORE_INDEX


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([3, IGNORE_INDEX, 0, 6, IGNORE_INDEX, 3])


def test_token_nll_equals_the_loop() -> None:
    logits = 5 * normal(6, 7)
    nll = token_nll(logits, LABELS)
    assert nll.shape == (6,)
    assert nll.dtype == torch.float32
    for row, label, value in zip(logits.tolist(), LABELS.tolist(), nll.tolist(), strict=True):
        if label == IGNORE_INDEX:
            assert value == 0
        else:
            total = sum(math.exp(x) for x in row)
            assert math.isclose(value, math.log(total) - row[label], rel_tol=1e-5)


def test_token_nll_has_a_gradient_only_where_there_is_a_label() -> None:
    """softmax minus one-hot there, exactly zero elsewhere."""
    logits = normal(6, 7).requires_grad_()
    token_nll(logits, LABELS).sum().backward()
    labelled = LABELS != IGNORE_INDEX
    expected = logits.detach().softmax(-1)
    expected[labelled, LABELS[labelled]] -= 1
    torch.testing.assert_close(logits.grad[labelled], expected[labelled], rtol=1e-5, atol=1e-6)
    assert (logits.grad[~labelled] == 0).all()


def test_padding_changes_no_sum() -> None:
    logits = normal(6, 7)
    padded = token_nll(torch.cat([logits, 1e4 * normal(250, 7)]), torch.cat([LABELS, LABELS.new_full((250,), -100)]))
    assert torch.equal(padded[:6], token_nll(logits, LABELS))
    assert (padded[6:] == 0).all()


def test_without_any_label_all_is_zero() -> None:
    """Not 0 / 0: the mean is taken elsewhere."""
    logits = normal(4, 7).requires_grad_()
    nll = token_nll(logits, torch.full((4,), IGNORE_INDEX))
    nll.sum().backward()
    assert (nll == 0).all()
    assert (logits.grad == 0).all()


def test_image_mse_equals_the_loop() -> None:
    output, target = normal(4, 2, 3, 5), normal(4, 2, 3, 5, seed=1)
    valid = torch.tensor([True, False, True, True])
    errors = image_mse(output, target, valid)
    assert errors.shape == (4,)
    assert errors.dtype == torch.float32
    for i in range(4):
        squares = [
            float(output[i, c, y, x] - target[i, c, y, x]) ** 2 for c in range(2) for y in range(3) for x in range(5)
        ]
        assert math.isclose(errors[i], sum(squares) / 30 if valid[i] else 0, rel_tol=1e-5)


def test_image_mse_has_a_gradient_only_in_valid_slots() -> None:
    output, target = normal(4, 2, 3, 5).requires_grad_(), normal(4, 2, 3, 5, seed=1)
    valid = torch.tensor([True, False, True, False])
    image_mse(output, target, valid).sum().backward()
    expected = 2 * (output.detach() - target) / 30 * valid[:, None, None, None]
    torch.testing.assert_close(output.grad, expected, rtol=1e-5, atol=1e-7)
    assert (output.grad[~valid] == 0).all()


def test_losses_of_bf16_are_taken_in_fp32() -> None:
    """Each term is exact for the rounded inputs."""
    logits, output, target = (
        5 * normal(6, 7).bfloat16(),
        normal(2, 8, 9, 9).bfloat16(),
        normal(2, 8, 9, 9, seed=1).bfloat16(),
    )
    nll = token_nll(logits, LABELS)
    errors = image_mse(output, target, torch.ones(2, dtype=torch.bool))
    assert nll.dtype == errors.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.double(), LABELS, reduction="none")
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-6)
    expected = (output.double() - target.double()).square().mean((1, 2, 3))
    torch.testing.assert_close(errors.double(), expected, rtol=1e-5, atol=0)


def test_squared_log_z_in_closed_form_with_its_gradient() -> None:
    """log^2 Z; d/dx = 2 log Z softmax; nothing where there is no label."""
    logits = (3 * normal(6, 7)).requires_grad_()
    values = squared_log_z(logits, LABELS, token_nll(logits, LABELS))
    labelled = LABELS != IGNORE_INDEX
    for row, label, value in zip(logits.tolist(), LABELS.tolist(), values.tolist(), strict=True):
        expected = 0.0 if label == IGNORE_INDEX else math.log(sum(math.exp(x) for x in row)) ** 2
        assert math.isclose(value, expected, rel_tol=1e-5)
    values.sum().backward()
    log_z = logits.detach().exp().sum(-1).log()
    expected = 2 * log_z[:, None] * logits.detach().softmax(-1) * labelled[:, None]
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-6)
    half = logits.bfloat16()
    assert values.dtype == torch.float32 == squared_log_z(half, LABELS, token_nll(half, LABELS)).dtype
