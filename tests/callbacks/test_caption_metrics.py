"""Captions written and scenes drawn, by a module that is right where it is told to be; ranks share, nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from pycocoevalcap.cider.cider import Cider

from tfusion.callbacks.caption_metrics import measure_captions, measure_scenes
from tfusion.callbacks.generation_metrics import GenerationMetrics
from tfusion.data.corpora import CaptionedImage
from tfusion.data.scene_prompts import KINDS, scene_prompts
from tfusion.data.shapes import Placed, Shapes, draw, parse_caption
from tfusion.data.sources import to_pil
from tfusion.metrics.captions import caption_tokens
from tfusion.metrics.measurement import Measurement
from tfusion.requests import Generation, GenerationConfig, Request

ALONE = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)


class Answers(pl.LightningModule):
    """Answers each request by a function of it; keeps what it was asked."""

    def __init__(self, answer: Callable[[Request], str | Image.Image]) -> None:
        super().__init__()
        self.answer, self.asked = answer, []
        self.generation = GenerationConfig(temperature=0.7)

    def check_requests(self, requests: list[Request]) -> None:
        pass

    def generate(self, requests: list[Request], numbers: list[int], batch_size: int) -> list[Generation]:
        self.asked += requests
        return [Generation(n, 0, (self.answer(r),)) for n, r in zip(numbers, requests, strict=True)]


def drawn(caption: str) -> Image.Image:
    """The scene as its caption says, at places of our own."""
    scene = parse_caption(caption)
    places = {1: [(0.5, 0.5)], 2: [(0.25, 0.25), (0.75, 0.75)], 3: [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75)]}
    places[4] = [*places[3], (0.75, 0.75)]
    halves = {"left of": ("x", 0), "right of": ("x", 1), "above": ("y", 0), "below": ("y", 1)}
    objects = []

    def put(group, x: float, y: float) -> None:
        side = {"small": 0.21, "big": 0.36}[group.size]
        objects.append(Placed(group.shape, group.color, x, y, side))

    if scene.second is None:
        for x, y in places[scene.first.count]:
            put(scene.first, x, y)
    else:
        axis, first_at = halves[scene.relation]
        for group, at in ((scene.first, first_at), (scene.second, 1 - first_at)):
            along = 0.25 + 0.5 * at
            for across in (0.5,) if group.count == 1 else (0.25, 0.75):
                put(group, *((along, across) if axis == "x" else (across, along)))
    return Image.fromarray(draw(objects, 64).transpose(1, 2, 0))


def of_scenes(answer: Callable[[Request], str | Image.Image], number: int = 6) -> dict[str, float]:
    found, _ = measure_scenes(ALONE, Answers(answer), "val/shapes", number, 4, GenerationConfig())
    return {one.name.removeprefix("val/shapes/composition/"): one for one in found}


def test_what_is_drawn_as_asked_is_right_in_every_kind() -> None:
    found = of_scenes(lambda request: drawn(request.segments[0]))
    assert list(found) == [f"{kind}/{seen}" for kind in KINDS for seen in ("seen", "unseen")]
    assert {one.value for one in found.values()} == {1.0}
    assert {one.n for one in found.values()} == {6}


def test_half_right_is_half_and_nothing_is_nothing() -> None:
    blank = Image.new("RGB", (64, 64), "white")
    found = of_scenes(lambda request: drawn(request.segments[0]) if request.seed % 2 else blank)
    assert {one.value for one in found.values()} == {0.5}
    assert {one.standard_error for one in found.values()} == {(0.25 / 6) ** 0.5}
    assert {one.value for one in of_scenes(lambda _: blank).values()} == {0.0}


def test_prompts_and_seeds_of_scenes_are_fixed() -> None:
    module = Answers(lambda request: drawn(request.segments[0]))
    config = GenerationConfig(num_inference_steps=7)
    _, examples = measure_scenes(ALONE, module, "val/shapes", 3, 4, config)
    prompts = [(c, i) for kind in KINDS for seen in (True, False) for i, c in enumerate(scene_prompts(kind, seen, 3))]
    assert [(r.segments[0], r.seed) for r in module.asked] == prompts
    assert {r.config for r in module.asked} == {config}
    assert [(e.text, e.score) for e in examples] == [(c, 1.0) for c in scene_prompts("all", False, 3)]


PICTURES = [
    CaptionedImage(str(n), torch.full((3, 8, 8), n, dtype=torch.uint8), captions)
    for n, captions in enumerate(
        [("a red car on a road", "a car"), ("two dogs run", "dogs in the snow"), ("a man", "a person on a horse")]
    )
]


def test_captions_are_scored_as_by_pycocoevalcap_and_greedily_written() -> None:
    written = ["a car on a road", "two dogs run", ""]
    module = Answers(lambda request: written[np.asarray(request.segments[0])[0, 0, 0]])
    found, examples = measure_captions(ALONE, module, "val/x", PICTURES, 10, 2, scenes=False)
    by_name = {one.name: one for one in found}
    tokens = {n: [" ".join(caption_tokens(c)) for c in p.captions] for n, p in enumerate(PICTURES)}
    expected, each = Cider().compute_score(tokens, {n: [" ".join(caption_tokens(w))] for n, w in enumerate(written)})
    assert by_name["val/x/cider_d"].value == pytest.approx(expected, rel=1e-12)
    assert by_name["val/x/cider_d"].standard_error == pytest.approx(np.std(each, ddof=1) / 3**0.5)
    assert by_name["val/x/caption_exact"].value == pytest.approx(1 / 3)
    assert by_name["val/x/cider_d"].n == 3
    assert [(e.text, e.truth) for e in examples] == [(w, p.captions[0]) for w, p in zip(written, PICTURES, strict=True)]
    assert {r.config for r in module.asked} == {replace(module.generation, temperature=0.0)}
    assert [np.asarray(r.segments[0]).tolist() for r in module.asked] == [
        np.asarray(to_pil(p)).tolist() for p in PICTURES
    ]


def test_rounds_of_captions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for pictures in (1000, 2):
        monkeypatch.setattr("tfusion.callbacks.caption_metrics.ROUND", pictures)
        module = Answers(lambda request: f"a car {np.asarray(request.segments[0])[0, 0, 0]}")
        measurements, examples = measure_captions(ALONE, module, "val/x", PICTURES * 2, 5, 2, scenes=False)
        found.append((measurements, [(e.text, e.truth, e.score) for e in examples], len(module.asked)))
    assert found[0] == found[1]
    assert found[0][0][0].n == found[0][2] == 5


def test_a_scene_said_the_other_way_round_is_right_and_what_cannot_be_parsed_is_wrong() -> None:
    pictures = [
        replace(PICTURES[n], captions=(caption,))
        for n, caption in enumerate(
            ["a big red circle left of a small blue cross", "two big red circles", "a small red cross"]
        )
    ]
    said = ["a small blue cross right of a big red circle", "two big red circle", "a small red cross"]
    module = Answers(lambda request: said[np.asarray(request.segments[0])[0, 0, 0]])
    found, _ = measure_captions(ALONE, module, "val/shapes", pictures, 3, 2, scenes=True)
    by_name = {one.name.removeprefix("val/shapes/"): one for one in found}
    assert by_name["caption_accuracy"].value == pytest.approx(2 / 3)
    assert by_name["caption_accuracy"].n == 3  # the one that cannot be parsed is counted
    assert by_name["caption_exact"].value == pytest.approx(1 / 3)


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_change_nothing(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks as threads that meet where lists are gathered; five are more than there are pictures."""
    said = ["two dogs run", "a car on a road", "a person"]

    def answer(request: Request) -> str | Image.Image:
        if request.generate == "text":
            return said[np.asarray(request.segments[0])[0, 0, 0]]
        return drawn(request.segments[0] if request.seed % 3 else "a small red cross")

    def measure(rank: int, of: int) -> list[Measurement]:
        trainer = SimpleNamespace(global_rank=rank, world_size=of)
        found = measure_captions(trainer, Answers(answer), "val/x", PICTURES, 3, 2, scenes=False)[0]
        return found + measure_scenes(trainer, Answers(answer), "val/x", 5, 4, GenerationConfig())[0]

    expected = measure(0, 1)
    meeting, place, shared = threading.Barrier(ranks, timeout=60), threading.local(), {}

    def gather(items: list) -> list:
        shared[place.rank] = items
        meeting.wait()
        everything = [item for rank in range(ranks) for item in shared[rank]]
        meeting.wait()
        return everything

    def of_rank(rank: int) -> list[Measurement]:
        place.rank = rank
        return measure(rank, ranks)

    monkeypatch.setattr("tfusion.callbacks.caption_metrics.gather_lists", gather)
    with ThreadPoolExecutor(ranks) as threads:
        assert list(threads.map(of_rank, range(ranks))) == [expected] * ranks
    assert len({one.value for one in expected}) > 3  # none of them is all or nothing


def test_scenes_without_shapes_are_refused(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def __init__(self, *corpora: object) -> None:
            super().__init__()
            self.image_corpora = corpora

        def measured_pictures(self, corpus: object, split: str) -> list[CaptionedImage]:
            return PICTURES

    trainer = pl.Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer._data_connector.attach_data(Answers(str), datamodule=Data(type("Other", (), {"name": "x"})()))
    with pytest.raises(ValueError, match="no corpus is tfusion.data.Shapes"):
        GenerationMetrics(num_scenes=2).setup(trainer, Answers(str), "validate")
    trainer._data_connector.attach_data(Answers(str), datamodule=Data(Shapes()))
    GenerationMetrics(num_scenes=2).setup(trainer, Answers(str), "validate")
