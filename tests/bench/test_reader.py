"""The reader's bench: what it distorts is as said, and on true pictures the reader is exact."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from tfusion.bench import reader
from tfusion.data.scene_prompts import KINDS
from tfusion.data.shapes import describe, sample_scene


def lines(capsys: pytest.CaptureFixture, *flags: str) -> list[dict]:
    capsys.readouterr()
    reader.main(list(flags))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("image_size", ["32", "64"])
def test_the_reader_is_exact_on_true_pictures(capsys, image_size):
    [line] = lines(capsys, "--image_size", image_size, "--scenes", "500", "--distortions", "none")
    assert line["n"]["all"] == 1000 and (line["image_size"], line["distortion"]) == (int(image_size), "none")
    assert line["accuracy"]["all"] >= 0.999
    assert set(line["accuracy"]) == set(KINDS) and min(line["accuracy"].values()) >= 0.99
    # By words: one object is said with "a" alone.
    captions = [describe(sample_scene(split, index)[0]) for split in ("val", "test") for index in range(500)]
    one = sum(len(caption.split()) == 4 and caption.startswith("a ") for caption in captions)
    assert line["n"]["one_object"] == line["n"]["color"] == one
    assert line["n"]["count"] == sum(len(caption.split()) == 4 for caption in captions) - one


def test_each_setting_is_a_line_and_more_distortion_is_never_much_better(capsys):
    made = lines(capsys, "--scenes", "60", "--distortions", "blur", "noise")
    assert [(m["distortion"], m["amount"]) for m in made] == [
        (distortion, amount) for distortion in ("blur", "noise") for amount in reader.AMOUNTS[distortion]
    ]
    for distortion in ("blur", "noise"):
        scores = [m["accuracy"]["all"] for m in made if m["distortion"] == distortion]
        assert scores[0] == 1 and scores[-1] < 0.7
        assert all(later <= earlier + 0.05 for earlier, later in itertools.pairwise(scores))


def test_distortions_are_what_they_say():
    gray = np.full((3, 64, 64), 128, np.uint8)
    noisy = reader.distorted(gray, "noise", 16, 0).astype(float) - 128
    assert abs(noisy.std() - 16) < 0.5 and abs(noisy.mean()) < 0.5
    assert (reader.distorted(gray, "noise", 16, 0) == noisy + 128).all()
    assert (reader.distorted(gray, "noise", 16, 1) != noisy + 128).any()
    moved = np.stack([reader.distorted(gray, "color", 24, index)[:, 0, 0].astype(int) - 128 for index in range(64)])
    assert set(abs(moved).ravel()) == {24} and len({tuple(row) for row in moved}) == 8
    assert (reader.distorted(np.full_like(gray, 250), "color", 24, 0) >= 226).all()
    # An edge becomes the normal distribution's integral.
    edge = np.zeros((3, 64, 64), np.uint8)
    edge[:, :, 32:] = 255
    blurred = reader.distorted(edge, "blur", 0.05, 0)
    assert abs(blurred[0, 20] - 255 * stats.norm.cdf(np.arange(64) - 31.5, scale=0.05 * 64)).max() < 2
    picture = next(reader.true_pictures(64, 1))[0]
    assert (reader.distorted(picture, "none", 0, 0) == picture).all()
    errors = [abs(reader.distorted(picture, "jpeg", quality, 0) - picture.astype(float)).mean() for quality in (95, 10)]
    assert 0 < errors[0] < errors[1]


def test_bad_flags_are_refused(capsys):
    for flag, value, expected in (("--image_size", "8", "expected at least 16"), ("--scenes", "0", "at least 1")):
        with pytest.raises(SystemExit):
            reader.main([flag, value])
        assert expected in capsys.readouterr().err
