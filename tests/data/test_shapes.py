"""Captions and scenes are inverse, scenes pure, splits disjoint, and the reader reads what was drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from tfusion.data.shapes import (
    COLORS,
    RELATIONS,
    SHAPES,
    SIDES,
    Group,
    Placed,
    Scene,
    Shapes,
    coverage,
    describe,
    draw,
    parse_caption,
    sample_scene,
)
from tfusion.data.shapes_reader import composition_correct, read_scene

KINDS = list(itertools.product(SIDES, COLORS, SHAPES))


def test_caption_of_each_kind_of_scene():
    heart = Group(1, "big", "red", "circle")
    crosses = Group(2, "small", "black", "cross")
    assert describe(Scene(heart)) == "a big red circle"
    assert describe(Scene(Group(3, "small", "blue", "square"))) == "three small blue squares"
    assert describe(Scene(heart, "left of", crosses)) == "a big red circle left of two small black crosses"
    assert describe(Scene(crosses, "below", heart)) == "two small black crosses below a big red circle"


def test_describe_and_parse_are_inverse_for_every_scene():
    captions = set()
    scenes = [Scene(Group(count, *kind)) for count in (1, 2, 3, 4) for kind in KINDS]
    for one, two in itertools.permutations(KINDS[::3], 2):
        for counts, relation in zip(itertools.product((1, 2), (1, 2)), RELATIONS, strict=True):
            scenes.append(Scene(Group(counts[0], *one), relation, Group(counts[1], *two)))
    for scene in scenes:
        assert parse_caption(describe(scene)) == scene
        captions.add(describe(scene))
    assert len(captions) == len(scenes)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "a big red circles",
        "two big red circle",
        "five big red circles",
        "a big pink circle",
        "a huge red circle",
        "a big red star",
        "A big red circle",
        "a big red circle ",
        "a  big red circle",
        "a big red circle left of",
        "a big red circle near a big blue circle",
        "three big red circles above a big blue circle",
        "a big red circle above two big red circles",
        "a big red circle above a big blue circle above a big cyan circle",
    ],
)
def test_other_captions_are_no_scene(caption):
    assert parse_caption(caption) is None


def test_canonical_says_the_same_and_exchanges_the_groups():
    one, two = Group(1, "big", "red", "circle"), Group(2, "small", "red", "circle")
    assert Scene(one, "right of", two).canonical() == Scene(two, "left of", one)
    assert Scene(one, "below", two).canonical() == Scene(two, "above", one)
    for scene in (Scene(one), Scene(one, "left of", two), Scene(one, "above", two)):
        assert scene.canonical() == scene


def test_a_scene_is_a_function_of_split_and_index_alone():
    forwards = [sample_scene("val", index) for index in range(50)]
    torch.manual_seed(1)
    backwards = [sample_scene("val", index) for index in reversed(range(50))][::-1]
    assert forwards == backwards
    assert len({describe(scene) for scene, _ in forwards}) > 40
    state = torch.random.get_rng_state()
    few, many = Shapes(32, num_images=10).load("train"), Shapes(32, num_images=99).load("train")
    assert torch.equal(few[7].image, many[7].image) and few[7].captions == many[7].captions
    assert torch.equal(state, torch.random.get_rng_state())
    assert (len(few), len(many), len(Shapes(32, num_images=10).load("val"))) == (10, 99, 1000)
    assert torch.equal(few[-1].image, few[9].image)
    content = {part.content for part in (Shapes(32).load("train"), Shapes(32).load("val"), Shapes(64).load("val"))}
    assert len(content) == 3
    with pytest.raises(IndexError):
        few[10]


def test_no_scene_of_one_split_is_in_another_whichever_way_round():
    seen = {}
    for split, number in (("train", 5000), ("val", 1000), ("test", 1000)):
        scenes = [sample_scene(split, index)[0] for index in range(number)]
        # Which group lies on which side, in whatever words.
        seen[split] = {
            frozenset([(scene.first, scene.relation), (scene.second, RELATIONS.get(scene.relation))])
            for scene in scenes
        }
    assert not (seen["train"] & seen["val"] or seen["train"] & seen["test"] or seen["val"] & seen["test"])


def test_all_kinds_counts_and_relations_are_drawn_about_equally():
    scenes = [sample_scene("train", index)[0] for index in range(4000)]
    pairs = [scene for scene in scenes if scene.second]
    assert abs(len(pairs) / 4000 - 0.75) < 0.04
    for relation in RELATIONS:
        assert abs(sum(scene.relation == relation for scene in pairs) / len(pairs) - 0.25) < 0.04
    groups = [group for scene in scenes for group in (scene.first, scene.second) if group]
    for index, options in enumerate((SIDES, COLORS, SHAPES)):
        shares = [sum(group.kind[index] == option for group in groups) / len(groups) for option in options]
        assert np.allclose(shares, 1 / len(options), atol=0.04)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_what_pillow_draws_32_times_larger(shape):
    x, y, side, fine = 8.3, 7.6, 11.5, 32
    left, top, right, bottom = ((c + sign * side / 2) * fine for sign in (-1, 1) for c in (x, y))
    sheet = Image.new("L", (16 * fine, 16 * fine))
    pen = ImageDraw.Draw(sheet)
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=255)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=255)
    elif shape == "triangle":
        pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=255)
    else:
        third = side * fine / 3
        pen.rectangle((left + third, top, right - third, bottom), fill=255)
        pen.rectangle((left, top + third, right, bottom - third), fill=255)
    expected = np.asarray(sheet.reduce(fine), dtype=np.float64) / 255
    covered = coverage(shape, x, y, side, (16, 16))
    # The distance to the nearest edge is not quite the covered share at corners.
    assert abs(covered - expected).max() < 0.25 and abs(covered - expected).mean() < 0.01
    assert abs(covered.sum() - expected.sum()) < 0.02 * expected.sum()


def test_objects_keep_apart_and_lie_as_the_caption_says():
    for index in range(500):
        scene, objects = sample_scene("train", index)
        for one, two in itertools.combinations(objects, 2):
            gap = max(abs(one.x - two.x), abs(one.y - two.y)) - (one.side + two.side) / 2
            assert gap > 0.07
        assert all(c - o.side / 2 >= 0 and c + o.side / 2 <= 1 for o in objects for c in (o.x, o.y))
        if scene.second is None:
            assert len(objects) == scene.first.count
            continue
        parts = {}
        for group in (scene.first, scene.second):
            parts[group] = [o for o in objects if (o.side, o.color, o.shape) == (SIDES[group.size], *group.kind[1:])]
            assert len(parts[group]) == group.count
        for one, two in itertools.product(parts[scene.first], parts[scene.second]):
            signed = {"left of": two.x - one.x, "right of": one.x - two.x}
            signed |= {"above": two.y - one.y, "below": one.y - two.y}
            assert signed[scene.relation] > 0


@pytest.mark.parametrize(
    ("image_size", "noise", "blur"),
    [(32, 0, 0), (32, 8, 0), (32, 16, 0), (32, 8, 0.6), (64, 0, 0), (64, 16, 1.2)],
)
def test_the_reader_reads_the_scene(image_size, noise, blur):
    rng = np.random.default_rng(0)
    pictures = Shapes(image_size, num_images=120).load("train")
    for picture in pictures:
        pixels = ndimage.gaussian_filter(picture.image.numpy().astype(float), (0, blur, blur))
        pixels = np.clip(np.rint(pixels + rng.normal(0, noise, pixels.shape)), 0, 255).astype(np.uint8)
        expected = parse_caption(picture.captions[0]).canonical()
        assert read_scene(pixels) == expected, picture.captions
        assert composition_correct(torch.from_numpy(pixels), picture.captions[0])


def test_a_picture_is_wrong_if_anything_of_its_caption_is():
    circle, square = Placed("circle", "red", 0.25, 0.5, 0.36), Placed("square", "blue", 0.75, 0.5, 0.21)
    picture = draw([circle, square], 32)
    right = {"a big red circle left of a small blue square", "a small blue square right of a big red circle"}
    wrong = {
        "a small red circle left of a small blue square",
        "a big orange circle left of a small blue square",
        "a big red cross left of a small blue square",
        "two big red circles left of a small blue square",
        "a big red circle right of a small blue square",
        "a big red circle above a small blue square",
        "a big red circle",
        "a small blue square",
    }
    assert {caption for caption in right | wrong if composition_correct(picture, caption)} == right
    extra = draw([circle, square, Placed("cross", "black", 0.5, 0.15, 0.21)], 32)
    assert not any(composition_correct(extra, caption) for caption in right | wrong)
    with pytest.raises(ValueError, match="got caption 'a dog', expected one of the form"):
        composition_correct(picture, "a dog")


def test_what_is_no_scene_is_none():
    rng = np.random.default_rng(0)
    assert read_scene(np.full((3, 32, 32), 255, np.uint8)) is None
    assert read_scene(np.zeros((3, 32, 32), np.uint8)) is None
    assert read_scene(rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)) is None
    # Two squares that touch, a frame, and an object in a colour that is none.
    touching = draw([Placed("square", "red", 0.3, 0.5, 0.36), Placed("square", "red", 0.66, 0.5, 0.36)], 32)
    assert read_scene(touching) is None
    frame = np.full((3, 32, 32), 255, np.uint8)
    frame[:, 8:24, 8:24] = 25
    frame[:, 11:21, 11:21] = 255
    assert read_scene(frame) is None
    magenta = np.full((3, 32, 32), 255, np.uint8)
    magenta[1, 10:22, 10:22] = 0
    assert read_scene(magenta) is None
    # Two groups of which neither lies beside the other.
    crossed = [("red", 0.25, 0.25), ("red", 0.75, 0.75), ("blue", 0.75, 0.25), ("blue", 0.25, 0.75)]
    assert read_scene(draw([Placed("circle", color, x, y, 0.36) for color, x, y in crossed], 32)) is None


def test_bad_arguments_are_refused_with_what_is_expected():
    with pytest.raises(ValueError, match="image_size=15, expected at least 16"):
        Shapes(image_size=15)
    with pytest.raises(ValueError, match="num_images=0, expected at least 1"):
        Shapes(num_images=0)
    with pytest.raises(ValueError, match="got split 'dev'"):
        Shapes().load("dev")
    with pytest.raises(ValueError, match=r"got float32 \(3, 32, 32\), expected uint8"):
        read_scene(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="got shape 'star', expected one of"):
        coverage("star", 8, 8, 8, (16, 16))
