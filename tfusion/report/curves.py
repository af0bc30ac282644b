"""`metrics.csv` as curves, and which of them the report shows together: what a chart holds, not how it looks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tfusion.metrics.measurement import Measurement
from tfusion.training.run_folder import read_metrics

MOST_POINTS = 300  # a line of a chart; more could not be told apart
UNITS = {
    "loss": "loss",  # text + weight x diffusion loss, or the mean over all ids
    "text_loss": "nats per token",
    "diffusion_loss": "mean squared error",
    "image_loss": "nats per image id",
    "image_nll": "nats per image id",
    "bits_per_byte": "bits per byte",
}
TIMESTEPS = re.compile(r"(.*)diffusion_loss_t(\d+)(?:-(\d+))?$")  # of a metric's name

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # steps and values of each metric, both (n,)


@dataclass(frozen=True)
class Line:
    """One line of a chart: `x, y (n,)`; `x_error, y_error (n,)` reach to both sides of its points, where given."""

    name: str
    x: np.ndarray
    y: np.ndarray
    marks: bool = False
    x_error: np.ndarray | None = None
    y_error: np.ndarray | None = None


@dataclass(frozen=True)
class Chart:
    """Lines over one x axis."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]


def read_curves(path: Path) -> Curves:
    """Read `metrics.csv`: no file, an empty one, torn lines and cells that are no number are left out."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(path)[1]:
        for name, cell in row.items():
            if name != "step" and cell and (value := _number(cell)) is not None:
                points.setdefault(name, []).append((int(row["step"]), value))
    return {name: (np.array([x for x, _ in xy]), np.array([y for _, y in xy])) for name, xy in points.items()}


def _number(cell: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def training_charts(curves: Curves) -> list[Chart]:
    """The loss and its parts in training and validation, then every other metric by corpus, of any split."""
    charts = []
    for metric in ("loss", "text_loss", "diffusion_loss", "image_loss"):
        lines = [_line("train", curves, f"train/{metric}"), _line("val", curves, f"val/{metric}", marks=True)]
        charts.append(_chart(metric, [line for line in lines if line is not None]))
    metrics: dict[str, list[Line]] = {}
    for name, (steps, _) in curves.items():
        split, _, rest = name.partition("/")
        corpus, _, metric = rest.rpartition("/")
        known = corpus or (split == "val" and f"train/{rest}" not in curves)  # what remembers is measured on `train`
        if known and len(steps) > 1 and not TIMESTEPS.match(name):
            line = _line(corpus if split == "val" else f"{corpus} ({split})", curves, name, marks=True)
            if line is not None:
                metrics.setdefault(metric, []).append(line)
    if len(metrics.get("diffusion_loss", [])) == 1:
        del metrics["diffusion_loss"]  # of the only corpus: shown already
    for metric, lines in metrics.items():
        charts.append(_chart(metric, lines))
    return [chart for chart in charts if any(len(line.x) > 1 for line in chart.lines)]


def timestep_charts(curves: Curves, measurements: Sequence[Measurement]) -> list[Chart]:
    """The diffusion loss by timestep: of each corpus as measured, then of each range over the run."""
    charts = []
    measured: dict[str, list[tuple[int, int, Measurement]]] = {}
    for measurement in measurements:
        if (match := TIMESTEPS.match(measurement.name)) and math.isfinite(measurement.value):
            low, high = int(match[2]), int(match[3] or match[2])
            measured.setdefault(match[1], []).append((low, high, measurement))
    lines = []
    for prefix, ranges in measured.items():
        ranges.sort(key=lambda one: one[0])
        low, high = (np.array([one[end] for one in ranges], dtype=float) for end in (0, 1))
        errors = [one[2].standard_error for one in ranges]
        finite = [error if error is not None and math.isfinite(error) else 0.0 for error in errors]
        values = np.array([one[2].value for one in ranges])
        name = prefix.removeprefix("val/").strip("/")
        lines.append(Line(name, (low + high) / 2, values, True, (high - low) / 2, np.array(finite)))
    if lines:
        label = "timestep (0 clean, 1000 noise)"
        charts.append(Chart("diffusion loss by timestep, measured", label, UNITS["diffusion_loss"], lines))
    over_steps: dict[str, list[tuple[int, Line]]] = {}
    for name in curves:
        if match := TIMESTEPS.match(name):
            label = f"timesteps {match[2]}" + (f" to {match[3]}" if match[3] else "")
            line = _line(label, curves, name, marks=name.startswith("val/"))
            if line is not None and len(line.x) > 1:
                over_steps.setdefault(match[1].strip("/"), []).append((int(match[2]), line))
    for prefix, numbered in over_steps.items():
        numbered.sort(key=lambda one: one[0])
        title = "in training" if prefix == "train" else prefix.removeprefix("val/")
        lines = [line for _, line in numbered]
        charts.append(Chart(f"diffusion loss by timestep, {title}", "step", UNITS["diffusion_loss"], lines))
    return charts


def _chart(metric: str, lines: list[Line]) -> Chart:
    name = metric.replace("_", " ")
    return Chart(name, "step", UNITS.get(metric, name), lines)


def _line(label: str, curves: Curves, name: str, marks: bool = False) -> Line | None:
    """A metric's line, of means over equal numbers of neighbours where it has more than MOST_POINTS points."""
    if name not in curves:
        return None
    x, y = curves[name]
    size = -(-len(x) // MOST_POINTS)
    starts = np.arange(0, len(x), size)
    counts = np.diff([*starts, len(x)])
    return Line(label, np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts, marks)
