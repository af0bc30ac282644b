"""The paper's sizes, at tiny ones: each way is what it says, a table of all, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tfusion.bench import sizes

FLAGS = ["--rows", "2", "--seq-len", "320", "--rounds", "1", "--warmup", "1"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "0.16b", (32, 2, 2))


def test_each_way(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "sizes.md"
    sizes.main([*FLAGS, "--only", "0.16b", "--ways", "sdpa_eager", "text", "--table", str(file)])
    eager, text = map(json.loads, capsys.readouterr().out.splitlines())
    assert (eager["size"], eager["way"], eager["compiled"], eager["attention"]) == (
        "0.16b",
        "sdpa_eager",
        False,
        "sdpa",
    )
    assert (eager["dim"], eager["vocab"], eager["image_patches"], eager["images_a_row"]) == (32, 32_000, 256, 1)
    assert (text["compiled"], text["text_only"], text["images_a_row"]) == (True, True, 0)
    assert eager["positions"] == text["positions"] == 640
    heading, _, first, second = file.read_text().splitlines()
    assert heading.count("|") == first.count("|") == second.count("|") == 11
    assert f"| {eager['step_s']:.3f} | {eager['tokens_per_s']:,.0f} |" in first


def test_what_does_not_fit_is_a_line(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB")

    monkeypatch.setattr(sizes, "measure", full)
    file = tmp_path / "sizes.md"
    sizes.main([*FLAGS, "--only", "0.16b", "--ways", "flex", "--table", str(file)])
    assert json.loads(capsys.readouterr().out) == {"size": "0.16b", "way": "flex", "error": "CUDA out of memory"}
    assert file.read_text().splitlines()[-1].endswith("| CUDA out of memory |")


def test_a_file_nowhere_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        sizes.main(["--table", str(tmp_path / "nowhere" / "sizes.md")])
    assert "expected a file in a folder that exists" in capsys.readouterr().err
