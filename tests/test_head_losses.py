"""The loss in chunks is the whole one, in values and gradients, and the logits of all labels are never there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tfusion import losses
from tfusion.losses import head_losses
from tfusion.sequence import IGNORE_INDEX

N, D, V = 37, 12, 50
SHAPES = (N, D), (V, D), (2, N)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a head, labels of which some are ignored, and what stands in front of each loss."""
    draws = torch.Generator().manual_seed(0)
    hidden, weight, front = (torch.randn(shape, generator=draws, dtype=torch.float64) for shape in SHAPES)
    labels = torch.randint(V, (N,), generator=draws)
    labels[::5], labels[1], labels[2] = IGNORE_INDEX, 0, V - 1
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, front.to(dtype)


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """By torch's cross-entropy and logsumexp."""
    logits = F.linear(hidden, weight)
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    return nll, torch.where(labels == IGNORE_INDEX, 0, logits.logsumexp(-1)).square()


def gradients(function, hidden: Tensor, weight: Tensor, labels: Tensor, front: Tensor) -> list[Tensor]:
    """Both losses, and the gradients of their weighted sum."""
    nll, log_z = function(hidden, weight, labels)
    return [nll, log_z, *torch.autograd.grad((front[0] * nll + 0.01 * front[1] * log_z).sum(), (hidden, weight))]


@pytest.fixture(params=[1, 5, N - 1, N], ids=lambda rows: f"{rows}_rows")
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many rows of logits may be there at once: of N all are."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * V * request.param)
    return request.param


@pytest.fixture(params=[False, True], ids=["as_on_cpu", "aligned"])
def aligned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of logits as wide as there are ids, or up to a multiple of 64, as on CUDA."""
    if request.param:
        pad = lambda weight, dtype: F.pad(weight.to(dtype), (0, 0, 0, -len(weight) % losses.ALIGNED))  # noqa: E731
        monkeypatch.setattr(losses, "_aligned", pad)


def test_they_are_the_whole_losses(rows: int, aligned: None) -> None:
    for ours, theirs in zip(gradients(head_losses, *inputs()), gradients(whole, *inputs()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_in_fp32_they_are_what_they_were_unchunked(rows: int) -> None:
    for ours, theirs in zip(gradients(head_losses, *inputs(torch.float32)), gradients(whole, *inputs()), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=3e-6)


def test_under_autocast_products_are_bf16_and_losses_and_gradients_fp32(rows: int, aligned: None) -> None:
    """Values are exact for the logits that autocast gives; gradients as near as those of the whole loss."""
    hidden, weight, labels, front = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, weight)
        found = gradients(head_losses, hidden, weight, labels, front)
    assert logits.dtype == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in found)
    expected = F.cross_entropy(logits.double(), labels, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[2:], gradients(whole, *inputs())[2:], strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_what_is_ignored_has_no_gradient_however_large_it_is(rows: int) -> None:
    hidden, weight, labels, front = inputs()
    with torch.no_grad():
        hidden[::5] *= 1e4
    nll, log_z, of_hidden, _ = gradients(head_losses, hidden, weight, labels, front)
    assert (nll[::5] == 0).all() and (log_z[::5] == 0).all() and (of_hidden[::5] == 0).all()
    assert (of_hidden[1::5] != 0).all()


class Largest(TorchDispatchMode):
    """The most numbers that any result has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return out


@pytest.mark.parametrize("rows", [8, 37])
def test_the_logits_are_never_there_at_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the forward nor in the backward pass: of 512 labels of 2,000 ids as many as are allowed."""
    hidden, weight = torch.zeros(512, 4, requires_grad=True), torch.zeros(2000, 4, requires_grad=True)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 2000 * rows + 3)
    with Largest() as largest:
        nll, log_z = head_losses(hidden, weight, torch.zeros(512, dtype=torch.long))
        (nll.sum() + log_z.sum()).backward()
    assert largest.numel == rows * 2000 > weight.numel()
