"""What the reader says of each thing, against where and what was drawn; it goes on where a thing is unknown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tfusion.data import shapes
from tfusion.data.shapes import RELATIONS, SHAPES, SIDES, Placed, describe, draw, sample_scene
from tfusion.data.shapes_reader import SeenObject, read_objects, read_scene, relation_of, scene_of

WHITE = 255


def as_drawn(placed: Placed) -> tuple:
    """What the reader should say, and where: a triangle's centroid is two thirds down its height."""
    size = {side: name for name, side in SIDES.items()}[placed.side]
    down = placed.side * (2 / 3 - 1 / 2) if placed.shape == "triangle" else 0.0
    return placed.shape, placed.color, size, placed.x, placed.y + down


@pytest.mark.parametrize("image_size", [32, 64])
def test_each_object_is_named_and_found_where_it_was_placed(image_size):
    for index in range(150):
        _, placed = sample_scene("val", index)
        seen = read_objects(draw(placed, image_size))
        expected = sorted(map(as_drawn, placed), key=lambda o: o[3:])
        found = sorted(((s.shape, s.color, s.size, s.x, s.y) for s in seen), key=lambda o: o[3:])
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert one[:3] == two[:3]
            # A twentieth of an object: antialiasing is not quite the covered share.
            assert np.allclose(one[3:], two[3:], atol=0.01)


def test_an_unknown_thing_is_seen_without_hiding_the_others():
    circle = Placed("circle", "red", 0.25, 0.25, SIDES["big"])
    picture = draw([circle], 64)
    # A thin bar: known in colour, none of the shapes.
    picture[:, 46:50, 20:60] = np.array(shapes.COLORS["blue"], np.uint8)[:, None, None]
    known, bar = sorted(read_objects(picture), key=lambda seen: seen.y)
    assert (known.shape, known.color, known.size) == ("circle", "red", "big")
    assert (bar.shape, bar.color, bar.size) == (None, "blue", None)
    assert np.allclose((bar.x, bar.y), (40 / 64, 48 / 64), atol=0.01)
    assert read_scene(picture) is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", [(255, 0, 255), (150, 255, 90)])
@pytest.mark.parametrize("size", SIDES)
def test_of_an_unknown_colour_the_shape_and_size_are_told(shape, color, size, monkeypatch):
    for where in (0.35, 0.512, 0.6):
        with monkeypatch.context() as patched:
            patched.setitem(shapes.COLORS, "other", color)
            picture = draw([Placed(shape, "other", where, 0.47, SIDES[size])], 32)
        [seen] = read_objects(picture)
        assert (seen.shape, seen.color, seen.size) == (shape, None, size)
        assert read_scene(picture) is None


def test_specks_and_dark_backgrounds_have_no_objects():
    picture = np.full((3, 32, 32), WHITE, np.uint8)
    assert read_objects(picture) == []
    picture[:, 10, 10:12] = 0
    assert read_objects(picture) == []
    assert read_objects(np.full((3, 32, 32), 190, np.uint8)) == []
    with pytest.raises(ValueError, match=r"got uint8 \(3, 32, 16\), expected uint8 \(3, size, size\)"):
        read_objects(picture[:, :, :16])


@pytest.mark.filterwarnings("error")
def test_a_faint_thing_in_a_bright_halo_is_unknown():
    picture = np.full((3, 32, 32), 203, np.uint8)
    picture[:, 8:24, 8:24] = WHITE
    picture[:, 15:17, 14:18] = 60
    [seen] = read_objects(picture)
    assert seen.shape is None
    assert np.allclose((seen.x, seen.y), (16 / 32, 16 / 32), atol=0.01)


def test_whatever_the_pixels_every_object_lies_in_the_picture():
    rng = np.random.default_rng(0)
    names = 0
    for _ in range(200):
        coarse = rng.integers(0, 256, (3, 8, 8), dtype=np.uint8)
        picture = np.where(rng.random((8, 8)) < 0.7, WHITE, coarse).astype(np.uint8).repeat(4, 1).repeat(4, 2)
        picture[:, [0, -1]] = picture[:, :, [0, -1]] = 225
        for seen in read_objects(picture):
            assert 0 <= seen.x <= 1 and 0 <= seen.y <= 1
            assert (seen.size is None) == (seen.shape is None)
            names += seen.shape is not None
    assert names > 0


def at(x: float, y: float) -> SeenObject:
    return SeenObject("circle", "red", "big", x, y)


def test_relations_are_those_of_the_centroids():
    middle = at(0.5, 0.5)
    for x, y, expected in ((0.2, 0.4, "left of"), (0.8, 0.6, "right of"), (0.4, 0.2, "above"), (0.6, 0.8, "below")):
        assert relation_of([at(x, y)], [middle]) == expected
        assert relation_of([middle], [at(x, y)]) == RELATIONS[expected]
    assert relation_of([middle], [middle]) is None
    assert relation_of([at(0.2, 0.2), at(0.6, 0.5)], [middle]) is None
    assert relation_of([at(0.2, 0.2), at(0.4, 0.9)], [middle, at(0.6, 0.3)]) == "left of"


def test_a_scene_of_unknown_things_is_none_and_order_does_not_matter():
    for index in range(40):
        scene, placed = sample_scene("test", index)
        seen = read_objects(draw(placed, 32))
        assert scene_of(seen) == scene_of(seen[::-1]) == scene.canonical(), describe(scene)
        for unknown in ({"shape": None, "size": None}, {"color": None}):
            assert scene_of([replace(seen[0], **unknown), *seen[1:]]) is None
    assert scene_of([]) is None
    assert scene_of([at(0.1 * n, 0.5) for n in range(5)]) is None
