"""`Validation`: what was validated and what came out, as the table in the terminal and as `validation.json`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tfusion.metrics.measurement import Example, Measurement

COLUMNS = ("metric", "value", "n", "network", "standard error")


@dataclass
class Validation:
    """One validation.

    Attributes:
        run: the run folder's name.
        step: of the weights; None where there is no checkpoint that says it.
        checkpoint: path, relative to the run folder where it is inside it; empty where there is none.
        date: when it ended.
        versions: package name to version.
        precision: the trainer's.
        processes: how many took part.
        measurements: all numbers.
        examples: pictures with their texts.
        seconds: wall time of each part, by a name for people.
        total_seconds: wall time of the whole validation.
    """

    run: str
    step: int | None
    checkpoint: str
    date: datetime
    versions: dict[str, str]
    precision: str
    processes: int
    measurements: list[Measurement] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    total_seconds: float = 0.0

    def by_corpus(self) -> dict[str, list[Measurement]]:
        """The measurements of each corpus, those of all corpora together (`val/loss`) first, under ''."""
        groups: dict[str, list[Measurement]] = {"": []}
        for measurement in self.measurements:
            groups.setdefault(corpus_of(measurement.name), []).append(measurement)
        return {corpus: rows for corpus, rows in groups.items() if rows}


def corpus_of(name: str) -> str:
    """The corpus in a metric's name: `val/openmoji/fid` -> `openmoji`; '' for `val/loss`."""
    parts = name.split("/")
    return parts[1] if len(parts) > 2 else ""


def number(value: float) -> str:
    """Four decimals, or three digits of what they would not show."""
    if math.isfinite(value) and (abs(value) >= 1e7 or 0 < abs(value) < 0.01):
        return f"{value:.3g}"
    return f"{value:.4f}"


def cells(measurement: Measurement) -> tuple[str, str, str, str, str]:
    """A measurement's row, in the order of COLUMNS; what is not known is empty."""
    error = measurement.standard_error
    return (
        measurement.name,
        number(measurement.value),
        "" if measurement.n is None else f"{measurement.n}",
        measurement.network,
        "" if error is None else f"{error:.2g}",
    )


def as_table(validation: Validation) -> str:
    """Lines of columns that line up, and a line of seconds; nothing is cut, however narrow the terminal."""
    rows = [cells(row) for rows in validation.by_corpus().values() for row in rows]
    if not rows:
        return "nothing was measured\n"
    widths = [max(len(row[column]) for row in [COLUMNS, *rows]) for column in range(len(COLUMNS))]
    lines = []
    for row in [COLUMNS, *rows]:
        name, value, n, network, error = (
            cell.rjust(width) if column in ("value", "n", "standard error") else cell.ljust(width)
            for cell, width, column in zip(row, widths, COLUMNS, strict=True)
        )
        lines.append("  ".join((name, value, n, network, error)).rstrip())
    parts = [f"{part} {seconds:.1f}" for part, seconds in validation.seconds.items()]
    lines.append("seconds: " + ", ".join([*parts, f"in all {validation.total_seconds:.1f}"]))
    return "\n".join(lines) + "\n"


def as_json(validation: Validation) -> str:
    """The numbers and what they are of; `null` where a number is not finite or not known."""
    return (
        json.dumps(
            {
                "run": validation.run,
                "step": validation.step,
                "checkpoint": validation.checkpoint or None,
                "date": validation.date.isoformat(timespec="seconds"),
                "versions": validation.versions,
                "precision": validation.precision,
                "processes": validation.processes,
                "measurements": [
                    {
                        "name": measurement.name,
                        "value": _finite(measurement.value),
                        "n": measurement.n,
                        "network": measurement.network or None,
                        "standard_error": _finite(measurement.standard_error),
                    }
                    for measurement in validation.measurements
                ],
                "seconds": {part: _finite(seconds) for part, seconds in validation.seconds.items()},
                "total_seconds": _finite(validation.total_seconds),
            },
            indent=2,
            ensure_ascii=False,
            allow_nan=False,
        )
        + "\n"
    )


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
