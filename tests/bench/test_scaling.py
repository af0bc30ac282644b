"""The bench of scaling: its points, its law against closed forms, its lines, table and plot."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tfusion.bench import scaling
from tfusion.bench.scaling import Point, Timing, flops_a_position, measure, points_of

EAGER = Timing("fp32", compiled=False, rounds=2, warmup=1)
TINY = Point(seq_len=128, rows=2, dim=32, layers=1, heads=2)


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """The bench silences loggers, which other tests listen to."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "tfusion")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


def test_points() -> None:
    """One thing changes along an axis, and no step has more positions than allowed."""
    assert [(p.seq_len, p.rows) for p in points_of("T", 4096)] == [(512, 8), (1024, 4), (2048, 2), (4096, 1)]
    assert [p.seq_len for p in points_of("T", 16384)] == list(scaling.LENGTHS)
    for axis in ("images", "batch", "size", "processes"):
        points = points_of(axis, 16384)
        changes = {
            "images": {"images_a_row"},
            "batch": {"rows"},
            "size": {"dim", "layers", "heads"},
            "processes": {"processes"},
        }[axis]
        changed = {name for name in Point.__dataclass_fields__ if len({getattr(p, name) for p in points}) > 1}
        assert changed == changes and len(points) >= 2
    assert all(p.positions <= 2048 for axis in scaling.AXES for p in points_of(axis, 2048))


def test_the_law_of_the_length() -> None:
    """Twice as long: as many more FLOPs a position as attention over T more keys takes, 3 x 2 x 2 of the width."""
    short, long = (Point(seq_len=T, images_a_row=0, rows=4, dim=32, layers=3, heads=2) for T in (512, 1024))
    grown = flops_a_position(long, EAGER) - flops_a_position(short, EAGER)
    head = 3 * 2 * 32 * 261 * (1 / 512 - 1 / 1024)  # a row's last position has no label
    assert grown == pytest.approx(3 * 3 * 2 * 2 * 512 * 32 + head, rel=1e-9)
    assert flops_a_position(dataclasses.replace(long, rows=1), EAGER) == pytest.approx(flops_a_position(long, EAGER))


def check(lines: list[dict], axis: str) -> None:
    """What the docstring says of the lines of an axis."""
    first = lines[0]
    assert first["over_expected"] == pytest.approx(1)
    for line in lines:
        assert line["axis"] == axis
        assert line["positions"] == line["seq_len"] * line["rows"] * line["processes"]
        assert line["s_per_position"] == pytest.approx(line["step_s"] / line["positions"])
        law = line["flops_per_position"] / first["flops_per_position"] * first["processes"] / line["processes"]
        assert line["expected_s_per_position"] == pytest.approx(first["s_per_position"] * law)
        assert line["over_expected"] == pytest.approx(line["s_per_position"] / line["expected_s_per_position"])


def test_lines_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"T": [TINY, dataclasses.replace(TINY, seq_len=256, rows=1)], "batch": [TINY] * 2}
    monkeypatch.setattr(scaling, "points_of", lambda axis, most: points[axis])
    files = [tmp_path / "scaling.png", tmp_path / "scaling.md"]
    flags = ["--eager", "--dtype", "fp32", "--rounds", "2", "--warmup", "1", "--only", "T", "batch"]
    scaling.main([*flags, "--plot", str(files[0]), "--table", str(files[1])])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4
    check(lines[:2], "T")
    check(lines[2:], "batch")
    assert (lines[0]["images_a_row"], lines[1]["seq_len"], lines[0]["compiled"]) == (1, 256, False)
    assert files[0].read_bytes().startswith(b"\x89PNG")
    table = files[1].read_text().splitlines()
    assert len(table) == 2 + 4 and table[0].startswith("| axis | T |")
    assert len({row.count("|") for row in table}) == 1


@pytest.mark.slow
@pytest.mark.multi
def test_two_processes() -> None:
    lines = list(measure("processes", [dataclasses.replace(TINY, processes=n) for n in (1, 2)], EAGER))
    check(lines, "processes")
    assert lines[1]["expected_s_per_position"] == pytest.approx(lines[0]["s_per_position"] / 2)


def test_too_few_positions_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--only", "T", "--most-positions", "600"])
    assert "leaves 1 points of T" in capsys.readouterr().err
