"""The table and `validation.json` of one validation."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from tests.report.made_up import NETWORK, validation
from tfusion.metrics.measurement import Measurement
from tfusion.report.validation import COLUMNS, as_json, as_table, number


def test_the_table_has_every_measurement_once_in_columns_that_line_up() -> None:
    head, *lines, seconds = as_table(validation()).splitlines()
    assert re.split(r" {2,}", head) == list(COLUMNS)
    ends = {name: head.index(name) + len(name) for name in COLUMNS}
    start = head.index("network")
    names = [line.split()[0] for line in lines]
    assert sorted(names) == sorted(measurement.name for measurement in validation().measurements)
    by_name = {measurement.name: measurement for measurement in validation().measurements}
    for line in lines:
        measurement = by_name[line.split()[0]]
        assert float(line[: ends["value"]].split()[1]) == pytest.approx(measurement.value, rel=1e-3, nan_ok=True)
        n = line[ends["value"] : ends["n"]].strip()
        assert n == ("" if measurement.n is None else str(measurement.n))
        assert line[start : start + len(NETWORK)].strip() == measurement.network
        error = line[start + len(NETWORK) :].strip()
        assert bool(error) == (measurement.standard_error is not None)
        if error:
            assert float(error) == pytest.approx(measurement.standard_error, rel=0.05, nan_ok=True)
            assert len(line) == ends["standard error"]
        assert line == line.rstrip()
    assert seconds == "seconds: losses 1.2, tiles: pictures 20.5, in all 23.0"


def test_what_is_of_all_corpora_comes_first_and_each_corpus_stays_together() -> None:
    mixed = [Measurement(f"val/{name}", 1.0, 1) for name in ("b/x", "a/x", "loss", "b/given_image/y", "a/y")]
    lines = as_table(replace(validation(), measurements=mixed)).splitlines()[1:-1]
    names = [line.split()[0] for line in lines]
    assert names == ["val/loss", "val/b/x", "val/b/given_image/y", "val/a/x", "val/a/y"]


def test_nothing_measured_is_said() -> None:
    assert as_table(replace(validation(), measurements=[])) == "nothing was measured\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (54.321, "54.3210"),
        (0.031, "0.0310"),
        (0.00123, "0.00123"),
        (-2e-7, "-2e-07"),
        (0.0, "0.0000"),
        (3e9, "3e+09"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_show_what_they_hold(value: float, text: str) -> None:
    assert number(value) == text


def test_json_has_the_numbers_exactly_and_null_for_what_is_none() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads(as_json(validation()), parse_constant=refuse)
    by_name = {one.pop("name"): one for one in read.pop("measurements")}
    assert len(by_name) == len(validation().measurements)
    assert by_name["val/loss"] == {"value": 4.25, "n": None, "network": None, "standard_error": None}
    assert by_name["val/lines/perplexity"] == {
        "value": 54.321,
        "n": 1234,
        "network": None,
        "standard_error": 0.0123,
    }
    assert by_name["val/tiles/kd_reference"] == {
        "value": 0.00123,
        "n": 320,
        "network": NETWORK,
        "standard_error": None,
    }
    assert by_name["val/tiles/broken"]["value"] is None
    assert by_name["val/tiles/broken"]["n"] == 0
    assert by_name["val/tiles/endless"]["value"] is None
    assert read == {
        "run": "a run <1>",
        "step": 12345,
        "checkpoint": "checkpoints/last.ckpt",
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"tfusion": "0.1.0", "torch": "2.14.0"},
        "precision": "bf16-mixed",
        "processes": 2,
        "seconds": {"losses": 1.25, "tiles: pictures": 20.5},
        "total_seconds": 23.0,
    }
