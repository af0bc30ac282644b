"""Is my loss normal? A run's curves beside those of three seeds.

    python -m tfusion.bench.curve --run runs/quickstart
    python -m tfusion.bench.curve --run runs/mine --reference quickstart
    python -m tfusion.bench.curve --make quickstart --runs runs/q0 runs/q1 runs/q2

A run of `configs/quickstart.yaml` or `configs/shapes.yaml` is recognised by its config.yaml; another one is told what
differs, and compared where --reference says with which. For each curve that both have (train/ and val/ of loss,
text_loss, diffusion_loss) one line says `within the band of 3 seeds up to step 2600` or `outside from step 740: 0.31,
band 0.12 to 0.15`, and `curve.png` in the run folder shows it. A run is compared as far as it has come, while it
trains, too. Ends with 0 where all curves are within, 1 where one is outside, 2 where there is nothing to compare.

The band is the 99 % prediction interval of one more seed for the mean log loss over 100 steps; outside is what stays
out of it for three windows in a row on one side, a validation outside it, or a loss that is no positive number.
Formula, source and assumptions: `tfusion/bench/curve_band.py`.

`--make` writes a reference from runs that differ in their seeds alone: a shipped one, or with `--out mine.json` one of
your own, given later as `--reference mine.json`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tfusion.bench import curve_reference
from tfusion.bench.curve_band import IN_A_ROW, WINDOW, Comparison, Curve, compare
from tfusion.bench.curve_reference import ReferenceCurves


def compare_all(curves: dict[str, Curve], reference: ReferenceCurves) -> dict[str, Comparison]:
    """Each curve that both have, by column; a validation is a window of its own."""
    return {
        name: compare(
            curves[name], reference.curves[name], *((None, 1) if name.startswith("val/") else (WINDOW, IN_A_ROW))
        )
        for name in reference.curves
        if name in curves
    }


def verdict(comparison: Comparison, seeds: int) -> str:
    """One curve in words."""

    def at(window: int) -> str:
        value, low, high = (array[window] for array in (comparison.values, comparison.low, comparison.high))
        return f"{value:.3g}, band {low:.3g} to {high:.3g}"

    outside = comparison.outside()
    if outside is not None:
        first, last = outside
        start, end = comparison.steps[first, 0], comparison.steps[last, 1]
        where = f"from step {start}"
        if last < len(comparison.values) - 1:  # it came back
            where = f"at step {start}" if start == end else f"from step {start} to step {end}"
        return f"outside {where}: {at(first)}"
    if comparison.bad_step is not None:
        return f"outside from step {comparison.bad_step}: {comparison.bad_loss:g}, expected a positive number"
    if not len(comparison.values):
        return "nothing to compare yet"
    words = f"within the band of {seeds} seeds up to step {comparison.steps[-1, 1]}"
    few = comparison.last_outside()
    if few:
        words += f", but outside from step {comparison.steps[-few, 0]}, too few steps to say: {at(-1)}"
    return words


def draw(
    curves: dict[str, Curve], reference: ReferenceCurves, comparisons: dict[str, Comparison], title: str
) -> Figure:
    """A panel a curve: band, seeds, the run's losses and its means over windows."""
    columns = 2 if len(comparisons) > 3 else 1
    rows = -(-len(comparisons) // columns)
    figure = Figure(figsize=(7 * columns, 3.2 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False).T.flat  # training left, validation right
    for name, panel in zip(comparisons, panels, strict=False):
        _draw_curve(panel, curves[name], reference.curves[name], comparisons[name])
        panel.set_title(f"{name}: {verdict(comparisons[name], reference.seeds)}", fontsize=8)
    for panel in panels:  # those left over
        panel.set_visible(False)
    return figure


def _draw_curve(panel: Axes, run: Curve, reference: Curve, comparison: Comparison) -> None:
    middle = comparison.steps.mean(1)
    seeds = panel.plot(reference.steps, reference.losses.T, color="0.75", linewidth=0.6)
    seeds[0].set_label("seeds of the reference")
    shown = np.isfinite(run.losses) & (run.losses > 0)
    panel.plot(run.steps[shown], run.losses[shown], color="tab:blue", linewidth=0.6, alpha=0.5)
    if comparison.in_a_row > 1:
        panel.fill_between(middle, comparison.low, comparison.high, color="tab:green", alpha=0.25, label="band")
    else:
        half = np.stack([comparison.low, comparison.high])
        panel.vlines(middle, *half, color="tab:green", alpha=0.4, linewidth=8, label="band")
    panel.plot(middle, comparison.values, color="tab:blue", marker=".", label="this run")
    out = comparison.sides != 0
    if out.any():
        panel.plot(middle[out], comparison.values[out], color="tab:red", marker="o", linestyle="none", label="outside")
    if comparison.bad_step is not None:
        panel.axvline(comparison.bad_step, color="tab:red", label="no positive number")
    panel.set_yscale("log")
    panel.set_xlabel("step")
    panel.legend(fontsize=7)


def report(run: Path, reference: str | None, out: Path | None) -> bool:
    """Print and draw; say whether all is within.

    Raises:
        ValueError: no such run or reference, or nothing that both have.
    """
    curves = curve_reference.read_curves(run)
    if reference is None:
        chosen = curve_reference.recognise(run)
    else:
        chosen = curve_reference.read(reference)
        differing = curve_reference.differences(curve_reference.settings_of(run), chosen.settings)
        for key, (own, theirs) in differing.items():
            sys.stdout.write(f"other than {chosen.name}: {key} is {own!r}, not {theirs!r}\n")
    comparisons = compare_all(curves, chosen)
    if not any(len(c.values) or c.is_outside for c in comparisons.values()):
        last = max(int(curve.steps[-1]) for curve in curves.values())
        first = min(int(curve.steps[0]) for curve in chosen.curves.values())
        raise ValueError(
            f"{run} has nothing to compare with {chosen.name}: it has come to step {last}, the reference begins at "
            f"step {first}, and the curves that both have are {', '.join(comparisons) or 'none'}"
        )
    sys.stdout.write(f"{run} beside {chosen.name}, {chosen.seeds} seeds\n")
    for name in chosen.curves:
        words = verdict(comparisons[name], chosen.seeds) if name in comparisons else "not in metrics.csv (yet)"
        sys.stdout.write(f"{name:<22} {words}\n")
    out = out or run / "curve.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, chosen, comparisons, f"{run} beside {chosen.name}, {chosen.seeds} seeds").savefig(out, dpi=110)
    sys.stdout.write(f"plot: {out}\n")
    return not any(comparison.is_outside for comparison in comparisons.values())


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="the run folder")
    what.add_argument("--make", metavar="NAME", help="make reference curves of this name")
    parser.add_argument("--reference", help="shipped curves (quickstart, shapes), or a .json file of --make")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="with --make: runs of different seeds")
    parser.add_argument("--out", type=Path, help="the plot; with --make the file. Default: curve.png in the run folder")
    options = parser.parse_args(args)
    try:
        if options.run is not None:
            return 0 if report(options.run, options.reference, options.out) else 1
        out = options.out or curve_reference.FOLDER / f"{options.make}.json"
        curve_reference.write(curve_reference.make(options.make, options.runs), out)
        sys.stdout.write(f"written: {out}\n")
        return 0
    except ValueError as error:
        sys.stderr.write(f"tfusion: error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
