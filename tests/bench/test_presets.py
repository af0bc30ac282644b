"""The bench of presets: what it asks of a model, and that a perfect and an empty one are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.callbacks.test_caption_metrics import drawn
from tfusion.bench import presets
from tfusion.data import Shapes
from tfusion.requests import GenerationConfig

GENERATION = Path(__file__).parents[2] / "configs/generation"


class Painter:
    """Draws what it is asked for where it is given steps enough, else nothing."""

    generation = GenerationConfig(max_new_tokens=7)

    def __init__(self) -> None:
        self.asked, self.held = [], False

    def hold_generation_model(self) -> None:
        self.held = True

    def generate(self, requests):
        self.asked += requests
        white = Image.new("RGB", (32, 32), "white")
        return [
            SimpleNamespace(segments=[drawn(*r.segments) if r.config.num_inference_steps > 50 else white])
            for r in requests
        ]


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    painter = Painter()
    corpus = SimpleNamespace(
        scenes=True, name="shapes", load=lambda split: [Shapes(32).load(split)[i] for i in range(60)]
    )
    monkeypatch.setattr(presets, "load", lambda run: painter)
    monkeypatch.setattr(presets, "load_data", lambda run: SimpleNamespace(image_corpora=[corpus]))
    return painter


def test_lines(painter: Painter, capsys: pytest.CaptureFixture) -> None:
    files = [str(GENERATION / f"{name}.yaml") for name in ("ablation", "fast")]
    presets.main([*files, "--run", "runs/x", "--scenes", "30", "--images", "60", "--seeds", "2", "--batch-size", "16"])
    slow, fast = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (slow["preset"], slow["evaluations"], slow["scenes"], slow["composition"]) == ("ablation", 250, 28, 1.0)
    assert (fast["preset"], fast["evaluations"], fast["scenes"], fast["composition"]) == ("fast", 25, 28, 0.0)
    assert slow["composition_error"] == 0 and slow["faster"] == 1 and fast["faster"] > 1
    # drawn anew elsewhere the held-out pictures are near themselves, white ones are not; white is white for any seed
    assert len(slow["fd_reference"]) == 2 and max(slow["fd_reference"]) < 0.3 * min(fast["fd_reference"])
    assert fast["fd_range"] == [fast["fd_reference"][0]] * 2
    assert painter.held

    config = painter.asked[-1].config
    assert (config.sampler, config.guidance_scale, config.guidance_interval) == ("dpmpp", 3.0, (0.2, 0.8))
    assert config.max_new_tokens == 7  # what the preset does not say is the run's
    timed = painter.asked[16 : 16 + 28 + 120]
    assert all(request.config.guidance_interval == (0.0, 1.0) for request in timed)
    assert len({request.seed for request in timed}) == 28 + 120  # each picture has a seed of its own
    held_out = [picture.captions[0] for picture in Shapes(32).load("val")][:60]
    assert [request.segments[0] for request in timed[28:]] == held_out * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "1"], "expected at least 2"),
        (["no-such.yaml"], "no such preset: no-such.yaml"),
    ],
)
def test_refusals(painter: Painter, flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        presets.main(["--run", "runs/x", str(GENERATION / "fast.yaml"), *flags])
    assert message in capsys.readouterr().err
    assert not painter.asked
