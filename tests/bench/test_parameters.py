"""The adapters' sizes are those that were published, and the table says what each model holds."""

from __future__ import annotations

import json

import pytest

from tests.test_sizes import GOLDEN
from tfusion.bench import parameters
from tfusion.models.transfusion import Transfusion


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str, int], dict]:
    found = [parameters.row(size, adapter, k) for size in parameters.SIZES for adapter, k in parameters.ADAPTERS]
    return {(row["size"], row["adapter_name"], row["patch_size"]): row for row in found}


def test_each_row_is_whole(rows: dict, capsys: pytest.CaptureFixture) -> None:
    parameters.main([])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == list(rows.values())
    assert len(rows) == 30
    for (size, adapter, k), row in rows.items():
        trunk, embeddings, linear = GOLDEN[size]
        assert row["trunk"] == trunk
        assert row["embedding"] + row["text_head"] == embeddings
        assert row["total"] == trunk + embeddings + row["adapter"]
        assert row["percent"] == pytest.approx(100 * row["adapter"] / (trunk + embeddings), abs=0.01)
        assert row["patches"] == (32 // k) ** 2
        if adapter == "linear":
            assert row["adapter"] == linear
            assert row["percent"] == pytest.approx(row["paper_percent"], abs=0.06)


@pytest.mark.parametrize(("size", "paper"), [("0.37b", 0.264), ("0.76b", 0.270), ("1.4b", 0.270), ("7b", 0.266)])
def test_the_unet_is_the_papers(rows: dict, size: str, paper: float) -> None:
    """0.27B, hardly more at other patch sides."""
    row = rows[size, "unet", 2]
    assert row["adapter"] / 1e9 == pytest.approx(paper, rel=0.1)
    assert row["adapter"] / 1e9 == pytest.approx(0.27, rel=0.1)
    assert row["paper"] / 1e9 == pytest.approx(paper, abs=6e-4)
    for k, most in ((1, 1.0), (4, 1.1), (8, 1.1)):
        assert 0.75 * row["adapter"] < rows[size, "unet", k]["adapter"] < most * row["adapter"]


def test_the_convolutional_adapter_is_janusflows(rows: dict) -> None:
    assert rows["1.4b", "conv", 2]["adapter"] / 1e6 == pytest.approx(70, rel=0.02)


@pytest.mark.parametrize("adapter", ["unet", "conv"])
def test_one_dial_scales_it(adapter: str) -> None:
    """Four times the parameters for twice the channels."""
    counts = []
    for channels in (64, 128, 256):
        model = Transfusion(40, (8, 16, 16), 2, 32, 1, 2, adapter=adapter, adapter_channels=channels)
        parts = (model.patch_encoder, model.patch_decoder)
        counts.append(sum(parameter.numel() for part in parts for parameter in part.parameters()))
    assert 3 < counts[1] / counts[0] < counts[2] / counts[1] < 4
