"""A change to a known scene flips the kinds that ask for it and no other; a naive judge of what was drawn agrees."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tfusion.data.scene_prompts import KINDS, scene_prompts
from tfusion.data.shapes import COLORS, SHAPES, SIDES, Placed, describe, draw, sample_scene
from tfusion.data.shapes_reader import read_objects
from tfusion.metrics.scenes import caption_right, composition_right, objects_right

BIG, SMALL = SIDES["big"], SIDES["small"]
CIRCLE, SQUARE = Placed("circle", "red", 0.27, 0.5, BIG), Placed("square", "blue", 0.73, 0.5, SMALL)
BLOB = Placed("blob", "green", 0.5, 0.13, 0.0)


def picture_of(objects: list[Placed], image_size: int = 64) -> np.ndarray:
    """As `draw`, and a bar that is none of the shapes for a blob."""
    picture = draw([o for o in objects if o.shape != "blob"], image_size)
    for blob in objects:
        if blob.shape == "blob":
            x, y = round(blob.x * image_size), round(blob.y * image_size)
            high, wide = image_size // 32, image_size // 4
            bar = (slice(y - high, y + high), slice(x - wide, x + wide))
            picture[:, *bar] = np.array(COLORS[blob.color], np.uint8)[:, None, None]
    return picture


def right_kinds(objects: list[Placed], caption: str, kinds: tuple[str, ...], image_size: int = 64) -> set[str]:
    picture = picture_of(objects, image_size)
    return {kind for kind in kinds if composition_right(kind, picture, caption)}


PAIR_KINDS = ("two_objects", "position", "color_binding", "all")


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("caption", ["a big red circle left of a small blue square"])
@pytest.mark.parametrize(
    ("objects", "right"),
    [
        ([CIRCLE, SQUARE], {"two_objects", "position", "color_binding", "all"}),
        # Colours exchanged, and one colour changed.
        ([replace(CIRCLE, color="blue"), replace(SQUARE, color="red")], {"two_objects", "position"}),
        ([CIRCLE, replace(SQUARE, color="cyan")], {"two_objects", "position"}),
        # Mirrored, and turned.
        ([replace(CIRCLE, x=0.73), replace(SQUARE, x=0.27)], {"two_objects", "color_binding"}),
        ([replace(CIRCLE, x=0.5, y=0.27), replace(SQUARE, x=0.5, y=0.73)], {"two_objects", "color_binding"}),
        # The size of one.
        ([CIRCLE, replace(SQUARE, side=BIG)], {"two_objects", "position", "color_binding"}),
        # One more, known or not, and one fewer, and none.
        ([CIRCLE, SQUARE, Placed("square", "blue", 0.73, 0.87, SMALL)], set()),
        ([CIRCLE, SQUARE, BLOB], set()),
        ([CIRCLE], set()),
        ([CIRCLE, replace(CIRCLE, x=0.73)], set()),
        ([], set()),
        # A shape replaced.
        ([CIRCLE, replace(SQUARE, shape="cross")], set()),
        ([CIRCLE, replace(BLOB, x=0.73, color="blue")], set()),
    ],
)
def test_one_change_to_a_pair_flips_what_asks_for_it(objects, right, caption, image_size):
    assert right_kinds(objects, caption, PAIR_KINDS, image_size) == right
    same = "a small blue square right of a big red circle"
    assert right_kinds(objects[::-1], same, PAIR_KINDS, image_size) == right


@pytest.mark.parametrize(
    ("objects", "right"),
    [
        ([CIRCLE], {"one_object", "color", "all"}),
        ([replace(CIRCLE, x=0.7, y=0.3)], {"one_object", "color", "all"}),
        ([replace(CIRCLE, side=SMALL)], {"one_object", "color"}),
        ([replace(CIRCLE, color="orange")], {"one_object"}),
        ([replace(CIRCLE, shape="triangle")], set()),
        ([CIRCLE, SQUARE], set()),
        ([CIRCLE, BLOB], set()),
        ([replace(BLOB, y=0.5, color="red")], set()),
        ([], set()),
    ],
)
def test_one_change_to_a_single_object(objects, right):
    assert right_kinds(objects, "a big red circle", ("one_object", "color", "all")) == right


THREE = [Placed("cross", "black", x, y, SMALL) for x, y in ((0.25, 0.25), (0.75, 0.3), (0.25, 0.75))]


@pytest.mark.parametrize(
    ("objects", "right"),
    [
        (THREE, {"count", "all"}),
        ([*THREE[:2], replace(THREE[2], color="red")], {"count"}),
        ([*THREE[:2], replace(THREE[2], side=BIG)], {"count"}),
        ([*THREE[:2], replace(THREE[2], shape="circle")], set()),
        (THREE[:2], set()),
        ([*THREE, replace(THREE[0], x=0.75, y=0.75)], set()),
        ([*THREE, replace(THREE[0], x=0.75, y=0.75, shape="square")], set()),
        ([*THREE, replace(BLOB, x=0.6, y=0.9)], set()),
        ([], set()),
    ],
)
def test_one_change_to_equal_objects(objects, right):
    assert right_kinds(objects, "three small black crosses", ("count", "all")) == right


def test_an_object_in_a_colour_that_is_none_is_still_an_object():
    picture = np.where(picture_of([replace(CIRCLE, color="black")])[:1] < 128, 0, 255).repeat(3, 0).astype(np.uint8)
    picture[[0, 2]] = 255  # magenta
    kinds = ("one_object", "color", "all")
    assert {kind for kind in kinds if composition_right(kind, picture, "a big red circle")} == {"one_object"}


def naive(kind: str, objects: list[Placed], caption: str) -> bool:
    """The same from what was drawn, and the words."""
    words = caption.replace("left of", "left").replace("right of", "right").split()
    if kind in ("one_object", "color"):
        [one] = objects if len(objects) == 1 else [None]
        return one is not None and one.shape == words[3] and (kind == "one_object" or one.color == words[2])
    if kind == "count":
        noun = {"crosses": "cross"}.get(words[3], words[3].removesuffix("s"))
        return len(objects) == ("zero", "a", "two", "three", "four").index(words[0]) and all(
            o.shape == noun for o in objects
        )
    one, two = ([o for o in objects if o.shape == shape] for shape in (words[3], words[8]))
    if len(objects) != 2 or len(one) != 1 or len(two) != 1:
        return False
    (one,), (two,) = one, two
    if kind == "color_binding":
        return (one.color, two.color) == (words[2], words[7])
    if kind == "position":
        signed = {"left": two.x - one.x, "right": one.x - two.x, "above": two.y - one.y, "below": one.y - two.y}
        return max(signed, key=signed.get) == words[4]
    return True


def placed_for(caption: str) -> list[Placed]:
    """Objects that show a caption of one group or two single objects, by its words."""
    found = re.findall(r"(a|two|three|four) (small|big) (\w+) (circle|square|triangle|cross)", caption)
    places = [(0.27, 0.27), (0.73, 0.29), (0.25, 0.73), (0.71, 0.75)]
    if len(found) == 2:
        places = {
            "left of": [(0.27, 0.5), (0.73, 0.5)],
            "right of": [(0.73, 0.5), (0.27, 0.5)],
            "above": [(0.5, 0.27), (0.5, 0.73)],
            "below": [(0.5, 0.73), (0.5, 0.27)],
        }[re.search("left of|right of|above|below", caption)[0]]
    objects = []
    for count, size, color, shape in found:
        for _ in range(("zero", "a", "two", "three", "four").index(count)):
            objects.append(Placed(shape, color, *places[len(objects)], SIDES[size]))
    return objects


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "all"])
def test_a_naive_judge_of_what_was_drawn_agrees(kind, image_size):
    draws = random.Random(f"{kind} {image_size}")
    marks = []
    for caption in scene_prompts(kind, False, 60) + scene_prompts(kind, True, 60):
        objects = placed_for(caption)
        index = draws.randrange(len(objects))
        change = draws.choice(["none", "color", "shape", "size", "swap", "move", "remove"])
        if change == "color":
            objects[index] = replace(objects[index], color=draws.choice(list(COLORS)))
        elif change == "shape":
            objects[index] = replace(objects[index], shape=draws.choice(SHAPES))
        elif change == "size":
            objects[index] = replace(objects[index], side=draws.choice(list(SIDES.values())))
        elif change == "swap":
            colors = [o.color for o in objects]
            objects = [replace(o, color=color) for o, color in zip(objects, colors[::-1], strict=True)]
        elif change == "move":
            objects = [replace(o, x=1 - o.x, y=1 - o.y) for o in objects]
        elif change == "remove":
            del objects[index]
        picture = draw(objects, image_size)
        marks.append(naive(kind, objects, caption))
        assert composition_right(kind, torch.from_numpy(picture), caption) == marks[-1], (caption, change)
        assert objects_right(kind, read_objects(picture), caption) == marks[-1]
    assert 10 < sum(marks) < len(marks) - 10


def test_true_pictures_of_prompts_are_right_for_every_kind():
    for kind in KINDS[:-1]:
        for caption in scene_prompts(kind, False, 20) + scene_prompts(kind, True, 20):
            assert right_kinds(placed_for(caption), caption, (kind, "all"), 32) == {kind, "all"}, caption


def test_captions_are_compared_as_scenes():
    true = "a big red circle left of two small blue squares"
    assert caption_right(true, true)
    assert caption_right("two small blue squares right of a big red circle", true)
    assert caption_right("a big red circle", "a big red circle")
    for wrong in (
        "two small blue squares left of a big red circle",
        "a big red circle right of two small blue squares",
        "a big red circle above two small blue squares",
        "a small red circle left of two small blue squares",
        "a big red circle left of a small blue square",
        "a big red circle",
        # Not of the grammar.
        "",
        "a dog",
        f"{true} ",
        f"{true} above a big red circle",
        "a big red circle left of two small blue square",
    ):
        assert not caption_right(wrong, true), wrong


def said(caption: str) -> frozenset:
    """Which group lies on which side, from the words."""
    first, *rest = re.split(" (left of|right of|above|below) ", caption)
    if not rest:
        return frozenset([first])
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    return frozenset([(first, rest[0]), (rest[1], opposite[rest[0]])])


def test_captions_of_the_corpus_are_right_for_what_they_say_alone():
    captions = [describe(sample_scene("val", index)[0]) for index in range(60)]
    same = 0
    for one in captions:
        for two in captions:
            assert caption_right(one, two) == (said(one) == said(two)), (one, two)
            same += one != two and said(one) == said(two)
    assert same  # the same scene the other way round is among them


def test_what_is_no_prompt_of_the_kind_is_refused():
    picture = picture_of([CIRCLE])
    with pytest.raises(ValueError, match="got caption 'a dog', expected one of the form"):
        composition_right("color", picture, "a dog")
    with pytest.raises(ValueError, match="got caption 'a dog', expected one of the form"):
        caption_right("a big red circle", "a dog")
    with pytest.raises(ValueError, match="got kind 'colour', expected one of one_object"):
        composition_right("colour", picture, "a big red circle")
    for kind, caption in (
        ("one_object", "two big red circles"),
        ("count", "a big red circle"),
        ("position", "a big red circle above a small red circle"),
        ("color_binding", "a big red circle above a big red square"),
        ("two_objects", "two big red circles above a big blue square"),
    ):
        with pytest.raises(ValueError, match=f"got caption '{caption}', expected one of kind '{kind}'"):
            composition_right(kind, picture, caption)
