"""A prompts file becomes requests, and a bad one is refused with its name, line and what is expected."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tfusion.data.openmoji import OpenMoji
from tfusion.data.prompts import read_prompts
from tfusion.requests import GenerationConfig, Request

DEFAULTS = GenerationConfig(num_inference_steps=7)
SHIPPED = Path(__file__).parents[2] / "configs" / "prompts.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    Image.new("RGBA", (4, 4), "red").save(tmp_path / "pictures" / "red.png")
    return tmp_path


def _write(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_lines_become_requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        '\ufeff{"segments": [{"text": "red\u2028heart"}], "generate": "image", "n": 3, '
        '"seed": 5, "top_k": 9}\r\n'
        "\n   \n"
        '{"segments": [{"image": "pictures/red.png"}, {"text": "is"}], "generate": "text", '
        '"num_inference_steps": 2}'
    )
    path = _write(folder, lines)
    monkeypatch.chdir("/")  # image paths are relative to the file, not to where one stands
    first, second = read_prompts(path, DEFAULTS)
    assert first == Request(("red\u2028heart",), "image", 3, 5, GenerationConfig(num_inference_steps=7, top_k=9))
    image, text = second.segments
    assert text == "is"
    assert image.mode == "RGB"
    assert image.info["path"] == "pictures/red.png"
    assert image.getpixel((1, 1)) == (255, 0, 0)
    assert (second.generate, second.n, second.seed) == ("text", 1, 0)
    assert second.config == GenerationConfig(num_inference_steps=2)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"segments": ["a"]', "not JSON .*column 19.*one object a line"),
        ('["a"]', "got list, expected an object"),
        ('{"segments": ["a"], "tmperature": 1}', r"unknown keys \['tmperature'\].*temperature"),
        ('{"text": "a", "generate": "image"}', r"unknown keys \['text'\].*the prompt goes into \"segments\""),
        ('{"generate": "text"}', 'key "segments": got None, expected a list'),
        ('{"segments": ["a"], "generate": "picture"}', 'key "generate": got \'picture\', expected "image"'),
        ('{"segments": ["a"], "n": 0}', 'key "n": got 0, expected a whole number'),
        ('{"segments": ["a"], "temperature": "hot"}', "temperature='hot'.*expected a number"),
        ('{"segments": [{"txt": "a"}]}', "expected .*text"),
        ('{"segments": [{"image": "absent.png"}]}', "absent.png.*cannot be read"),
        ('{"segments": [{"image": "prompts.jsonl"}]}', "prompts.jsonl.*cannot be read"),
        ('{"segments": [{"image": "cut.png"}]}', "cut.png.*cannot be read"),
        (b'{"segments": ["\xff"]}', "not UTF-8.*byte 16"),
    ],
)
def test_a_bad_line_is_named(folder: Path, line: str | bytes, expected: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:1000])
    line = line.encode() if isinstance(line, str) else line
    path = _write(folder, b'{"segments": ["fine"]}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"prompts.jsonl, line 3: .*{expected}"):
        read_prompts(path, DEFAULTS)


def test_missing_and_empty_files_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no prompts file .*absent\.jsonl"):
        read_prompts(folder / "absent.jsonl", DEFAULTS)
    with pytest.raises(ValueError, match="no prompts file"):
        read_prompts(folder, DEFAULTS)
    for content in ("", "\n \n"):
        with pytest.raises(ValueError, match="holds no request"):
            read_prompts(_write(folder, content), DEFAULTS)


def test_shipped_prompts_are_of_pictures_that_the_quickstart_trains_on() -> None:
    requests = read_prompts(SHIPPED, DEFAULTS)
    kinds = [(r.generate, isinstance(r.segments[0], str)) for r in requests]
    assert Counter(kinds) == {("image", True): 16, ("text", False): 16, ("text", True): 4}
    corpus = OpenMoji(32).load("train")
    first = [corpus[i] for i in range(300)]
    names = {name for picture in first for name in picture.captions}
    pixels = {picture.image.permute(1, 2, 0).numpy().tobytes() for picture in first}
    assert all(r.segments[0] in names for r in requests if r.generate == "image")
    # Not by bytes: another version of Pillow may draw an edge a shade differently.
    stack = np.stack([np.frombuffer(p, np.uint8) for p in pixels]).astype(np.float32)
    for picture in (np.asarray(r.segments[0]) for r in requests if not isinstance(r.segments[0], str)):
        assert picture.shape == (32, 32, 3)
        assert np.abs(stack - picture.reshape(1, -1)).mean(axis=1).min() < 2
