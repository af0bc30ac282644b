"""The page: valid, whole in itself, every text escaped, and only sections that have content."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from tests.report import made_up
from tests.report.made_up import CONFIG, EVIL, validation
from tfusion.metrics.measurement import Example
from tfusion.report.page import render
from tfusion.report.pictures import data_uri

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """Check that every tag is closed in its order, and gather what a test asks for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # tag and text
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        assert "svg" in self.open or tag == "svg", f"<{tag}/> closes nothing in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def said(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made_up.page(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def read(page: str) -> Reader:
    return Reader(page)


def test_sections_and_headings(read: Reader) -> None:
    assert read.said("h1") == ["a run <1>"]
    assert read.said("h2") == [
        "Measurements",
        "Curves",
        "Loss by timestep",
        "Pictures made",
        "Captions written",
        "Best and worst",
        "Time",
        "Configuration",
    ]
    assert read.said("a") == read.said("h2")
    anchors = {attributes.get("id") for attributes in read.all("section")}
    assert {attributes["href"] for attributes in read.all("a")} == {f"#{anchor}" for anchor in anchors}
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_ids_are_unique(read: Reader) -> None:
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) > 100 and len(set(ids)) == len(ids)


def test_it_stands_alone(page: str, read: Reader) -> None:
    assert not read.all("script")
    for _, attributes in read.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href"):
                assert value is not None and value.startswith(("data:", "#")), value
    assert not re.search(r"@import|url\((?!#)", page)


def test_every_text_is_escaped(page: str, read: Reader) -> None:
    assert "<script" not in page and "<b>bold" not in page
    assert read.said("span").count(EVIL) == 1  # a prompt
    assert EVIL in read.said("dd")  # a caption
    assert f"picture made for: {EVIL}" in [attributes["alt"] for attributes in read.all("img")]
    assert CONFIG.strip() in read.said("pre")


def test_the_table(read: Reader) -> None:
    rows = [text for tag, text in read.texts if tag in ("th", "td")]
    start = rows.index("all corpora")
    assert rows[start : start + 9] == [
        *("all corpora", "loss", "4.2500"),
        *("lines", "perplexity", "54.3210", "1,234", "0.012"),
        "tiles",
    ]
    assert rows[rows.index("broken") :][:3] == ["broken", "nan", "0"]


def test_pictures_are_those_of_the_examples_in_their_order(read: Reader) -> None:
    images = read.all("img")
    assert all(attributes["alt"] for attributes in images)
    names = [str(attributes["alt"]) for attributes in images]
    made = [f"picture made for: prompt {n}" for n in range(31)] + [f"picture made for: photo {n}" for n in range(3)]
    given = [f"picture given, of: {text}" for text in (*(f"truth {n}" for n in range(5)), "the truth", "unsaid")]
    best = [f"picture made for: prompt {n}" for n in range(39, 31, -1)]
    worst = [f"picture made for: prompt {n}" for n in range(8)]
    extreme = [f"picture given, of: truth {n}" for n in (4, 3, 0, 1)]  # two and two of five
    assert names == [f"picture made for: {EVIL}", *made, *given, *best, *worst, *extreme]
    assert {"The first 32."} <= set(read.said("p"))
    assert read.said("span").count("9.75") == 1  # the best score


def test_a_picture_is_itself(read: Reader) -> None:
    sources = {str(attributes["alt"]): str(attributes["src"]) for attributes in read.all("img")}
    kind, _, data = sources["picture made for: prompt 3"].partition(";base64,")
    assert kind == "data:image/png"
    shown = PILImage.open(io.BytesIO(base64.b64decode(data)))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(made_up.picture(3)))
    kind, _, data = sources["picture made for: photo 1"].partition(";base64,")
    assert kind == "data:image/jpeg"
    shown = PILImage.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (256, 256)
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(made_up.picture(51, 256))).max() <= 4


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_pictures_of_other_modes(mode: str) -> None:
    data = data_uri(PILImage.new(mode, (4, 4))).partition(";base64,")[2]
    pixel = PILImage.open(io.BytesIO(base64.b64decode(data))).convert("RGB").getpixel((0, 0))
    assert pixel == ((255, 255, 255) if mode in ("RGBA", "LA") else (0, 0, 0))  # transparent: on white


def test_nan_and_a_single_score_are_neither_best_nor_worst() -> None:
    few = [Example("a", "picture", made_up.picture(0), "x", score=1.0), made_up.examples()[0]]
    few.append(Example("a", "picture", made_up.picture(0), "y", score=float("nan")))
    read = Reader(render(replace(validation(), examples=few)))
    assert "Best and worst" not in read.said("h2")
    assert "Pictures made" in read.said("h2")


def test_what_has_no_content_is_left_out() -> None:
    empty = replace(validation(), measurements=[], examples=[], seconds={}, step=None, checkpoint="")
    read = Reader(render(empty))
    assert read.said("h2") == read.said("a") == []
    assert "step" not in read.said("dt") and "checkpoint" not in read.said("dt")
    assert not read.all("footer")
    read = Reader(render(validation(), examples=0))
    assert "Pictures made" not in read.said("h2") and "Captions written" not in read.said("h2")
    assert "Measurements" in read.said("h2") and not read.all("img")


def test_without_pictures_it_says_how_to_get_them() -> None:
    none = replace(validation(), examples=[])
    assert "Pictures made" not in Reader(render(none)).said("h2")  # such as an autoencoder's
    assert "Pictures made" not in Reader(render(none, examples=0, hint=True)).said("h2")
    read = Reader(render(none, hint=True))
    assert "Pictures made" in read.said("h2") and not read.all("img")
    assert "configs/metrics/reference.yaml" in " ".join(map(str, read.said("code")))


def test_attribution_stands_at_the_bottom(page: str, read: Reader) -> None:
    assert read.said("p")[-2:] == ["Tiles by Tiler, CC BY", "Photos by Ann"]
    assert page.rindex("Tiles by Tiler") > page.rindex("</section>")


def test_no_curves_without_metrics(tmp_path: Path) -> None:
    read = Reader(render(validation()))
    assert "Curves" not in read.said("h2")
    assert "Loss by timestep" in read.said("h2")  # as measured
