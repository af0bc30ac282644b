"""A chart drawn by matplotlib as SVG to stand in a page, which gives it its colours and its font."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from tfusion.report.curves import Chart, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_IN = (5.0, 2.9)  # 360 x 209 points, about the width of a phone
# matplotlib knows no CSS variables: it draws in these, which the page then replaces by its own, light or dark.
INK, GRID = "#0000b1", "#0000b2"
SERIES = [f"#0000a{n}" for n in range(1, 7)]
VARIABLES = {INK: "--muted", GRID: "--rule"} | {color: f"--s{n}" for n, color in enumerate(SERIES, 1)}
DASHES = ["-", "--", ":"]  # after six lines the colours come again
LOG_RANGE = 20  # a larger ratio of the largest value to the smallest gets a logarithmic axis


def style_of(n: int) -> tuple[int, str]:
    """Number of the colour (1 to 6) and the dash of a chart's n-th line, for the line and for its legend."""
    return n % len(SERIES) + 1, DASHES[n // len(SERIES) % len(DASHES)]


def draw(chart: Chart, name: str) -> str:
    """The chart as one `<svg>` element without a legend.

    Args:
        chart: what to draw.
        name: put before every id, so that several charts can stand in one page.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": name,
        "font.family": "DejaVu Sans",  # comes with matplotlib; measures the text, wider than the page's
        "font.size": 11,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "axes.axisbelow": True,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.size": 0,
        "xtick.major.pad": 8,  # clear of the lowest label of the y axis
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "grid.color": GRID,
        "text.parse_math": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=SIZE_IN, layout="constrained")
        axes = figure.add_subplot()
        for n, line in enumerate(chart.lines):
            _plot(axes, line, n)
        _scale(axes, chart)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        axes.grid(axis="y", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _for_a_page(file.getvalue(), name, _described(chart))


def _plot(axes: Axes, line: Line, n: int) -> None:
    number, dash = style_of(n)
    color = SERIES[number - 1]
    marker = "o" if (line.marks and len(line.x) <= 30) or len(line.x) == 1 else None
    width = 1.8 if line.marks else 1.3
    if line.x_error is None and line.y_error is None:
        axes.plot(line.x, line.y, dash, color=color, marker=marker, markersize=4, linewidth=width)
        return
    # A range of timesteps is a bar as long as the range; nothing is claimed between the ranges.
    axes.errorbar(line.x, line.y, line.y_error, line.x_error, fmt="o", color=color, markersize=4, linewidth=width)


def _scale(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values = np.concatenate([line.y for line in chart.lines])
    if values.min() > 0 and values.max() > LOG_RANGE * values.min():
        axes.set_yscale("log")
        two_decades = values.max() < 100 * values.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if two_decades else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    largest = max(float(line.x.max()) for line in chart.lines)
    axes.set_xlim(left=0 if largest > 0 else None)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    thousands = largest >= 10_000
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g}k" if thousands and value else f"{value:g}")
    )


def _described(chart: Chart) -> str:
    """The chart in words: where each line begins and ends."""
    lines = [f"{line.name or chart.title} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in chart.lines]
    return f"{chart.title} over {chart.x_label}: " + "; ".join(lines)


def _for_a_page(svg: str, name: str, description: str) -> str:
    """matplotlib's file as an element of a page: ids of its own, no style that leaks, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    start = f'<svg class="chart" role="img" aria-label="{escape(description)}" {box[0]}'
    start += ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return start + svg[svg.index(">") + 1 :].strip()
