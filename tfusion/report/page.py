"""`report.html`: one validation as a page that stands alone, without a script and without another file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from tfusion.report import pictures
from tfusion.report.charts import draw, style_of
from tfusion.report.curves import Chart, Curves, timestep_charts, training_charts
from tfusion.report.validation import COLUMNS, Validation, cells

NO_PICTURES = (
    "<p>None: the run's settings ask for none. <code>--config configs/metrics/reference.yaml</code> behind its "
    "config.yaml has pictures made and captions written, and measures them (<code>generation_metrics</code>).</p>"
)


def render(
    validation: Validation,
    curves: Curves | None = None,
    config: str = "",
    attribution: str = "",
    examples: int = 32,
    hint: bool = False,
) -> str:
    """The page, whole. Sections without content are left out.

    Args:
        validation: what to show.
        curves: the run's metrics.csv.
        config: the run's config.yaml.
        attribution: what the corpora ask to be written where their pictures appear.
        examples: pictures of a corpus shown, of each kind; 0 = no pictures at all.
        hint: where there are none, say how they are had.
    """
    pictured = validation.examples if examples else []
    missing = NO_PICTURES if hint and examples and not validation.examples else ""
    sections = {
        "Measurements": _table(validation),
        "Curves": _charts(training_charts(curves or {}), "curve"),
        "Loss by timestep": _charts(timestep_charts(curves or {}, validation.measurements), "timestep"),
        "Pictures made": pictures.grids(pictured, examples) or missing,
        "Captions written": pictures.captions(pictured, examples),
        "Best and worst": pictures.extremes(pictured),
        "Time": _times(validation),
        "Configuration": _config(config),
    }
    shown = {title: body for title, body in sections.items() if body}
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in shown)
    body = "\n".join(
        f'<section id="{_anchor(title)}">\n<h2>{title}</h2>\n{content}\n</section>' for title, content in shown.items()
    )
    footer = "".join(f"<p>{escape(line)}</p>" for line in attribution.splitlines() if line)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(validation.run)}: validation</title>
<link rel="icon" href="data:,">
<style>
{files("tfusion.report").joinpath("style.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{escape(validation.run)}</h1>
{_facts(validation)}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{body}
</main>
{f"<footer>{footer}</footer>" if footer else ""}
</body>
</html>
"""


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _facts(validation: Validation) -> str:
    facts = {
        "step": "" if validation.step is None else f"{validation.step:,}",
        "checkpoint": validation.checkpoint,
        "date": validation.date.strftime("%Y-%m-%d %H:%M"),
        "precision": validation.precision,
        "processes": str(validation.processes),
    } | validation.versions
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items() if v)
    return f'<dl class="facts">{rows}</dl>'


def _table(validation: Validation) -> str:
    groups = validation.by_corpus()
    if not groups:
        return ""
    numeric = {"value", "n", "standard error"}
    classes = ['class="number"' if column in numeric else 'class="text"' for column in COLUMNS]
    head = "".join(f'<th scope="col" {kind}>{column}</th>' for column, kind in zip(COLUMNS, classes, strict=True))
    parts = []
    for corpus, rows in groups.items():
        parts.append(f'<tbody>\n<tr><th scope="rowgroup" colspan="5">{escape(corpus or "all corpora")}</th></tr>')
        prefix = f"val/{corpus}/" if corpus else "val/"
        for row in rows:
            name, value, n, network, error = (escape(cell) for cell in cells(row))
            others = (value, f"{row.n:,}" if n else "", network, error)
            tds = "".join(f"<td {kind}>{cell}</td>" for cell, kind in zip(others, classes[1:], strict=True))
            parts.append(f'<tr><th scope="row" {classes[0]}>{name.removeprefix(escape(prefix))}</th>{tds}</tr>')
        parts.append("</tbody>")
    return _scrolling("Measurements", f"<table>\n<thead><tr>{head}</tr></thead>\n{chr(10).join(parts)}\n</table>")


def _charts(charts: Sequence[Chart], name: str) -> str:
    figures = []
    for n, chart in enumerate(charts):
        legend = "".join(
            '<span><svg class="key" viewBox="0 0 20 8" aria-hidden="true"><path d="M0 4H20" '
            f'style="stroke: var(--s{style_of(i)[0]}){_dashes(style_of(i)[1])}"/></svg>{escape(line.name)}</span>'
            for i, line in enumerate(chart.lines)
            if line.name
        )
        caption = f"<figcaption><h3>{escape(chart.title)}</h3>{f'<p>{legend}</p>' if legend else ''}</figcaption>"
        figures.append(f"<figure>{caption}\n{draw(chart, f'{name}{n}')}</figure>")
    return f'<div class="charts">\n{chr(10).join(figures)}\n</div>' if figures else ""


def _dashes(dash: str) -> str:
    """CSS for a line of a legend like matplotlib's."""
    lengths = {"-": "", "--": "6 3", ":": "2 2"}[dash]
    return f"; stroke-dasharray: {lengths}" if lengths else ""


def _times(validation: Validation) -> str:
    if not validation.seconds:
        return ""
    rows = "".join(
        f'<tr><th scope="row" class="text">{escape(part)}</th><td class="number">{seconds:.1f}</td></tr>'
        for part, seconds in validation.seconds.items()
    )
    total = f'<tr><th scope="row">in all</th><td class="number">{validation.total_seconds:.1f}</td></tr>'
    head = '<tr><th scope="col" class="text">part</th><th scope="col" class="number">seconds</th></tr>'
    table = f"<table>\n<thead>{head}</thead>\n<tbody>{rows}</tbody>\n<tfoot>{total}</tfoot>\n</table>"
    return _scrolling("Seconds by part", table)


def _config(config: str) -> str:
    if not config.strip():
        return ""
    return (
        "<details><summary>config.yaml of the run</summary>"
        f'<pre tabindex="0" role="region" aria-label="config.yaml">{escape(config)}</pre></details>'
    )


def _scrolling(label: str, table: str) -> str:
    """A box that scrolls by itself where its table is wider than the page; reachable with the keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{table}</div>'
