"""Charts as SVG: the data at the places the axes say, and fit to stand beside others in one page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np

from tfusion.report.charts import VARIABLES, draw, style_of
from tfusion.report.curves import Chart, Line

SVG = "{http://www.w3.org/2000/svg}"


def chart(y: list[float], name: str = "train") -> Chart:
    return Chart("loss", "step", "nats", [Line(name, np.arange(len(y)) * 10.0, np.array(y))])


def points(root: ElementTree.Element) -> list[tuple[float, float]]:
    """Of the only path in the first line's colour."""
    [path] = [one for one in root.iter(f"{SVG}path") if "var(--s1)" in one.get("style", "")]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))]


def ticks(root: ElementTree.Element, axis: int) -> dict[float, float]:
    """Label -> place of the labels of an axis (1: x, 2: y)."""
    [group] = [one for one in root.iter(f"{SVG}g") if (one.get("id") or "").endswith(f"matplotlib.axis_{axis}")]
    labels = [one for one in group.iter(f"{SVG}text") if re.fullmatch(r"[\d.]+k?", one.text or "")]
    key = "x" if axis == 1 else "y"
    return {float((one.text or "").replace("k", "e3")): float(one.get(key, "nan")) for one in labels}


def test_a_point_is_where_the_axes_say() -> None:
    root = ElementTree.fromstring(draw(chart([1.0, 3.0, 2.0, 3.0]), "a"))
    (x0, y0), (x1, y1), *_ = points(root)
    across, up = ticks(root, 1), ticks(root, 2)
    left, right = min(across), max(across)
    per_step = (across[right] - across[left]) / (right - left)
    np.testing.assert_allclose([x0, x1 - x0], [across[left] - left * per_step, 10 * per_step], atol=0.1)
    low, high = min(up), max(up)  # labels' places are off by half a line, the same for all
    scale = (up[high] - up[low]) / (high - low)
    np.testing.assert_allclose(y1 - y0, 2 * scale, rtol=1e-3)


def test_values_far_apart_get_a_logarithmic_axis() -> None:
    root = ElementTree.fromstring(draw(chart([1.0, 10.0, 100.0, 1000.0]), "a"))
    heights = [y for _, y in points(root)]
    np.testing.assert_allclose(np.diff(heights), (heights[-1] - heights[0]) / 3, rtol=1e-3)
    root = ElementTree.fromstring(draw(chart([0.0, 10.0, 20.0, 1000.0]), "a"))  # 0 has no logarithm
    heights = [y for _, y in points(root)]
    np.testing.assert_allclose(heights[1] - heights[0], heights[2] - heights[1], rtol=1e-3)


def test_a_chart_leaks_nothing_into_its_page() -> None:
    first, second = (draw(chart([1.0, 2.0]), name) for name in ("a", "b"))
    ids = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    for svg, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg)) <= own
        assert "<style" not in svg
        assert "font-family" not in svg
        assert not any(color in svg for color in VARIABLES)
        colors = set(re.findall(r"(?:stroke|fill): ([^;\"]*)", svg))
        assert colors <= {"none", *(f"var({variable})" for variable in VARIABLES.values())}
    assert draw(chart([1.0, 2.0]), "a") == first


def test_text_is_escaped_and_no_formula() -> None:
    evil = '<b>$x_1$ & "y"'
    svg = draw(Chart(evil, "step", evil, [Line(evil, np.array([0.0, 1.0]), np.array([1.0, 2.0]))]), "a")
    root = ElementTree.fromstring(svg)
    assert evil in [one.text for one in root.iter(f"{SVG}text")]
    assert root.get("aria-label") == f"{evil} over step: {evil} from 1 to 2"


def test_twelve_lines_differ() -> None:
    assert len({style_of(n) for n in range(12)}) == 12
