"""The report in a real browser, as wide as a phone and as a screen; skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.report import made_up

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

# Elements whose text, measured as it is drawn, reaches out of them. A box that scrolls holds what it scrolls.
OUTSIDE = """() => {
  const found = [];
  for (const element of document.querySelectorAll("th, td, dt, dd, p, h1, h2, h3, h4, figcaption, summary, a")) {
    const box = element.getBoundingClientRect();
    const range = document.createRange();
    range.selectNodeContents(element);
    for (const text of range.getClientRects()) {
      if (text.left < box.left - 1 || text.right > box.right + 1 || text.bottom > box.bottom + 4) {
        found.push(element.tagName + ": " + element.textContent.slice(0, 60));
      }
    }
  }
  return found;
}"""
# Pairs of labels of a chart that lie over each other, and labels that are cut off at its edge.
LABELS = """() => {
  const found = [];
  for (const chart of document.querySelectorAll("svg.chart")) {
    const edge = chart.getBoundingClientRect();
    const labels = [...chart.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    labels.forEach(([name, a], i) => {
      if (a.left < edge.left - 1 || a.right > edge.right + 1 || a.top < edge.top - 1 || a.bottom > edge.bottom + 1)
        found.push("cut: " + name);
      for (const [other, b] of labels.slice(i + 1))
        if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
          found.push(name + " over " + other);
    });
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[390, 1280])
def shown(request, browser, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """The page at one width, with what the browser asked for and complained of."""
    path: Path = tmp_path_factory.mktemp("run") / "report.html"
    path.write_text(made_up.page(path.parent), encoding="utf-8")
    requests: list[str] = []
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.on("request", lambda one: requests.append(one.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))  # the prompt with a script
    page.goto(path.as_uri())
    yield SimpleNamespace(page=page, url=path.as_uri(), requests=requests, complaints=complaints, width=request.param)
    page.close()


def test_the_page_does_not_scroll_sideways(shown) -> None:
    for element in shown.page.query_selector_all("details"):
        element.evaluate("one => one.open = true")  # the configuration has a line of 400 characters
    assert shown.page.evaluate("window.innerWidth") == shown.width
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= shown.width
    wide = shown.page.evaluate(
        "[...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll, pre, svg')"
        " && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80))"
    )
    assert wide == []


def test_every_picture_is_decoded_and_shown_in_its_shape(shown) -> None:
    sizes = shown.page.evaluate(
        "[...document.images].map(one => [one.naturalWidth, one.naturalHeight, one.width, one.height])"
    )
    assert len(sizes) == 31 + 1 + 3 + 7 + 16 + 4
    for natural_width, natural_height, width, height in sizes:
        assert natural_width > 0 and natural_height > 0
        assert width >= 80 and width * natural_height == pytest.approx(height * natural_width, rel=0.05)


def test_nothing_is_asked_for_but_the_file(shown) -> None:
    assert [url for url in shown.requests if not url.startswith("data:")] == [shown.url]
    assert shown.complaints == []


def test_headings_are_seen(shown) -> None:
    assert shown.page.locator("h1").inner_text() == made_up.validation().run
    assert shown.page.locator("h2").all_inner_texts() == [
        *("Measurements", "Curves", "Loss by timestep", "Pictures made", "Captions written", "Best and worst"),
        *("Time", "Configuration"),
    ]
    assert all(one.is_visible() for one in shown.page.locator("h1, h2, h3").all())


def test_no_text_reaches_out_of_its_place(shown) -> None:
    assert shown.page.evaluate(OUTSIDE) == []
    assert shown.page.evaluate(LABELS) == []


def test_charts_are_large_enough_to_read(shown) -> None:
    heights = shown.page.evaluate(
        "[...document.querySelectorAll('svg.chart text')].map(one => Math.min("
        "one.getBoundingClientRect().height, one.getBoundingClientRect().width))"
    )
    assert len(heights) > 30
    smallest = shown.page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg.chart')].map(one => one.getBoundingClientRect().width"
        " / one.viewBox.baseVal.width)) * 11"
    )
    assert smallest >= 9.5  # pixels of a label's font
