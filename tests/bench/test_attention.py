"""The bench of attention: its ways agree with loops, its rows are full, and its lines say what the docstring says."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from tests.reference.attention import loop_attention, loop_mask
from tfusion.bench import attention
from tfusion.bench.packed import packed_batch
from tfusion.models.attention import EXPLICIT_UP_TO

LATENT_SHAPE, PATCH_SIZE, T = (3, 8, 8), 4, 24  # 4 patches


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ways_agree_with_loops(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients."""
    monkeypatch.setattr("tfusion.bench.packed.CAPTION_LEN", 3)
    batch = packed_batch(2, T, LATENT_SHAPE, PATCH_SIZE)
    draws = torch.Generator().manual_seed(1)
    query, key, value, upstream = (torch.randn(2, 2, T, 4, generator=draws) for _ in range(4))
    wanted, *gradients = _with_gradients(
        lambda *x: loop_attention(*x, loop_mask(batch.document_ids, batch.image_ids, batch.hidden)),
        (query, key, value),
        upstream,
    )
    ways = attention.ways_of(attention.masks_of(batch, torch.float32), compiled)
    assert ways.keys() >= {"sdpa_bool", "sdpa_added", "written_out"}
    assert ("written_out_compiled" in ways) == compiled
    for name, way in ways.items():
        found = _with_gradients(way, (query, key, value), upstream)
        for one, other in zip(found, (wanted, *gradients), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)


def _with_gradients(way, inputs, upstream):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = way(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize(("seq_len", "images"), [(24, None), (25, 2), (40, 1), (40, 3), (37, 0), (11, 1), (12, 1)])
def test_rows_are_full_and_alternate(seq_len: int, images: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfusion.bench.packed.CAPTION_LEN", 3)  # an image with its caption takes 11
    batch = packed_batch(2, seq_len, LATENT_SHAPE, PATCH_SIZE, images)
    assert batch.token_ids.shape == (2, seq_len)
    assert (batch.document_ids >= 0).all(), "no padding"
    images = 1 if images is None else images
    assert batch.image_valid.sum() == 2 * images and batch.image_valid.all()
    for ids, slots in zip(batch.document_ids, batch.image_ids, strict=True):
        has_image = [bool((slots[ids == d] >= 0).any()) for d in range(int(ids.max()) + 1)]
        if seq_len >= (11 + 3) * images:  # there is room for a text after each
            assert not any(a and b for a, b in pairwise(has_image))
    assert not torch.equal(batch.token_ids[0], batch.token_ids[1]) or seq_len == 11


def test_a_row_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 images of 4 patches with captions take 80 positions, but a row has 50"):
        packed_batch(1, 50, LATENT_SHAPE, PATCH_SIZE, 2)


@pytest.mark.parametrize(
    ("dtype", "backward", "length", "choice"),
    [
        (torch.float32, True, 16, "sdpa_added"),
        (torch.bfloat16, False, 16, "sdpa_added"),
        (torch.bfloat16, True, 16, "written_out"),
        (torch.bfloat16, True, EXPLICIT_UP_TO + 1, "sdpa_added"),
    ],
)
def test_the_choice_of_attend(dtype: torch.dtype, backward: bool, length: int, choice: str) -> None:
    inputs = [torch.zeros(1, 1, length, 4, dtype=dtype) for _ in range(3)]
    mask = torch.zeros(1, 1, length, length, dtype=dtype)
    assert attention.choice_of_attend(inputs, mask, backward) == choice


def test_lines(capsys: pytest.CaptureFixture) -> None:
    flags = ["--heads", "1", "--head-dim", "8", "--rounds", "2", "--warmup", "1", "--dtypes", "bf16", "--eager"]
    attention.main([*flags, "--seq-lens", "291", "300", "--positions", "600"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ways = ("sdpa_bool", "sdpa_added", "written_out")
    assert [(line["seq_len"], line["pass"], line["way"]) for line in lines] == [
        (length, name, way) for length in (291, 300) for name in ("forward", "forward+backward") for way in ways
    ]
    assert {line["way"] for line in lines if line["chosen"] and line["pass"] == "forward"} == {"sdpa_added"}
    assert {line["way"] for line in lines if line["chosen"] and line["pass"] != "forward"} == {"written_out"}
    for line in lines:
        assert (line["rows"], line["images_a_row"]) == (2, 1)
        assert 0 < line["seen"] < 1 and 0 < line["fastest_s"] <= line["s"]
        assert line["over_products"] == pytest.approx(line["s"] / line["products_s"])
        squares = 6 if line["pass"] != "forward" else 2
        assert line["flops"] == squares * 2 * 2 * 8 * line["seq_len"] ** 2  # rows, a multiply-add is 2
    for start in range(0, len(lines), 3):
        assert min(line["over_best"] for line in lines[start : start + 3]) == 1


def test_a_row_too_short_for_its_image_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        attention.main(["--seq-lens", "200"])
    assert "256 patches" in capsys.readouterr().err
