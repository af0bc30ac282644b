"""Nearest codes against a loop, and the same ids however many distances are held at a time."""

from __future__ import annotations

import pytest
import torch

from tfusion import quantization
from tfusion.quantization import nearest_codes


@pytest.mark.parametrize("most", [1, 40, 41 * 7, 10**9])
def test_nearest_codes(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    vectors, codes = (torch.randn(n, 8, generator=draws) for n in (300, 41))
    monkeypatch.setattr(quantization, "MOST_DISTANCES", most)
    ids = nearest_codes(vectors.requires_grad_(), codes)
    loop = [min(range(41), key=lambda n: float((codes[n] - vector).square().sum())) for vector in vectors.detach()]
    assert ids.tolist() == loop
    assert ids.dtype == torch.int64


def test_no_more_distances_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    held, whole = [], torch.cdist

    def watched(some: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        held.append(len(some) * len(codes))
        return whole(some, codes)

    monkeypatch.setattr(quantization, "MOST_DISTANCES", 100)
    monkeypatch.setattr(torch, "cdist", watched)
    nearest_codes(torch.randn(50, 3), torch.randn(10, 3))
    assert sum(held) == 500 and max(held) <= 100
