"""The lines of `bench/scaling.py` and `bench/sizes.py` as a markdown table; of scaling also curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLUMNS = {  # of a line -> how it is headed and written
    "axis": ("axis", "{}"),
    "seq_len": ("T", "{:,}"),
    "images_a_row": ("images a row", "{}"),
    "rows": ("rows", "{}"),
    "dim": ("width", "{}"),
    "layers": ("depth", "{}"),
    "processes": ("processes", "{}"),
    "step_s": ("s a step", "{:.3g}"),
    "s_per_position": ("µs a position", "{:.1f}"),
    "expected_s_per_position": ("expected", "{:.1f}"),
    "over_expected": ("ratio", "{:.2f}"),
}
LABELS = {
    "T": "positions a row",
    "images": "images a row",
    "batch": "rows at once",
    "size": "parameters",
    "processes": "processes",
}


def table(lines: list[dict[str, Any]], columns: dict[str, tuple[str, str]] = COLUMNS) -> str:
    """One row a line; a cell is empty where the line has no such figure."""
    rows = [" | ".join(heading for heading, _ in columns.values()), "|".join("---" for _ in columns)]
    for line in lines:
        values = {name: value * 1e6 if "_per_position" in name else value for name, value in line.items()}
        rows.append(" | ".join(form.format(values[n]) if n in values else "" for n, (_, form) in columns.items()))
    return "".join(f"| {row} |\n" for row in rows)


def draw(lines: list[dict[str, Any]], axes: dict[str, str], file: Path) -> None:
    """One plot an axis, both scales logarithmic; `axes` says what of a line changes along each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    found = [axis for axis in axes if any(line["axis"] == axis for line in lines)]
    figure = Figure(figsize=(3.6 * len(found), 3.2), layout="constrained")
    for axis, plot in zip(found, figure.subplots(1, len(found), squeeze=False)[0], strict=True):
        points = [line for line in lines if line["axis"] == axis]
        x = [point[axes[axis]] for point in points]
        plot.plot(x, [point["s_per_position"] * 1e6 for point in points], "o-", label="measured")
        plot.plot(x, [point["expected_s_per_position"] * 1e6 for point in points], "--", label="expected")
        plot.set_xscale("log")
        plot.set_yscale("log")
        plot.set_xticks(x, [f"{value / 1e6:.1f}M" if value > 100_000 else f"{value}" for value in x], rotation=45)
        plot.xaxis.set_minor_locator(NullLocator())
        plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        plot.yaxis.set_minor_formatter(NullFormatter())
        low, high = plot.get_ylim()
        plot.set_ylim(low / 2, high * 2)  # so that noise does not fill the picture
        plot.set_xlabel(LABELS[axis])
        plot.set_ylabel("µs a position")
        plot.legend()
    figure.savefig(file, dpi=150)
