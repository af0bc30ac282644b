"""The built-in corpus `shapes`: generated scenes whose captions say exactly what is in them.

A scene is one group of equal objects ("three small blue squares"), or two groups and how they lie ("a big
red circle left of two small black crosses"). Captions and scenes translate into each other exactly, so a
generated picture can be marked right or wrong by reading it (`shapes_reader.py`). No scene of val or test,
whichever way round it is said, is in train.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch

from tfusion.data.corpora import CaptionedImage, Split, check_split, split_of
from tfusion.randomness import generator

MIN_IMAGE_SIZE = 16
HELD_OUT_IMAGES = 1000
DRAWING_VERSION = 1  # raise it when pixels or captions change: what was encoded, or half trained, is then told apart

# On white their (255 - RGB) point in clearly different directions, which blur and antialiasing leave alone.
COLORS = {
    "red": (225, 30, 40),
    "orange": (245, 135, 20),
    "yellow": (250, 220, 30),
    "green": (30, 160, 60),
    "cyan": (40, 200, 225),
    "blue": (40, 70, 220),
    "purple": (140, 50, 190),
    "black": (25, 25, 25),
}
# Side of an object's bounding box, as a share of the image's side.
SIDES = {"small": 0.21, "big": 0.36}
SHAPES = ("circle", "square", "triangle", "cross")
# Each relation with the one that says the same of the two groups exchanged.
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_COUNT_WORDS = {1: "a", 2: "two", 3: "three", 4: "four"}
_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
# White around each object, so that no two touch; a share of the image's side.
_MARGIN = 0.04
_PAIR_SHARE = 0.75


@dataclass(frozen=True)
class Group:
    """One to four equal objects."""

    count: int
    size: str
    color: str
    shape: str

    @property
    def kind(self) -> tuple[str, str, str]:
        """All but the count; the two groups of a scene differ in it."""
        return self.size, self.color, self.shape


@dataclass(frozen=True)
class Scene:
    """One group, or two groups of at most two objects: `first` is `relation` `second`."""

    first: Group
    relation: str | None = None
    second: Group | None = None

    def canonical(self) -> Scene:
        """The same scene with its relation said as "left of" or "above"."""
        if self.relation in ("right of", "below"):
            return Scene(self.second, RELATIONS[self.relation], self.first)
        return self


@dataclass(frozen=True)
class Placed:
    """One object: centre and side of its bounding box, as shares of the image's side, y downwards."""

    shape: str
    color: str
    x: float
    y: float
    side: float


class Shapes:
    """Scenes of one to four objects on white, drawn when asked for; picture i depends on (split, i) alone.

    Args:
        image_size: height and width in pixels, at least 16; the reader is exact from 32 on.
        num_images: number of pictures in the train split; val and test have 1,000 each.
    """

    name = "shapes"
    scenes = True  # what is in a picture can be read from it

    def __init__(self, image_size: int = 32, num_images: int = 20000) -> None:
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(f"got image_size={image_size}, expected at least {MIN_IMAGE_SIZE} pixels")
        if num_images < 1:
            raise ValueError(f"got num_images={num_images}, expected at least 1")
        self.image_size = image_size
        self.num_images = num_images

    def load(self, split: Split) -> Sequence[CaptionedImage]:
        """The split's pictures, each captioned by `describe`."""
        check_split(split)
        return _Scenes(split, self.num_images if split == "train" else HELD_OUT_IMAGES, self.image_size)


class _Scenes(Sequence[CaptionedImage]):
    def __init__(self, split: Split, length: int, image_size: int) -> None:
        self.split = split
        self.length = length
        self.image_size = image_size
        self.content = f"{split}-{image_size}-{DRAWING_VERSION}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> CaptionedImage:
        index = range(self.length)[index]
        scene, objects = sample_scene(self.split, index)
        image = torch.from_numpy(draw(objects, self.image_size))
        return CaptionedImage(f"{self.split}-{index:06d}", image, (describe(scene),))


def describe(scene: Scene) -> str:
    """The caption of a scene; `parse_caption` is its inverse."""
    if scene.second is None:
        return _phrase(scene.first)
    return f"{_phrase(scene.first)} {scene.relation} {_phrase(scene.second)}"


def _phrase(group: Group) -> str:
    noun = group.shape if group.count == 1 else _PLURALS[group.shape]
    return f"{_COUNT_WORDS[group.count]} {group.size} {group.color} {noun}"


_RELATION_WORDS = re.compile(f" ({'|'.join(RELATIONS)}) ")


def parse_caption(caption: str) -> Scene | None:
    """The scene that `describe` gives this caption, or None if there is none."""
    phrases = _RELATION_WORDS.split(caption)
    if len(phrases) == 1:
        first = _parse_phrase(caption)
        return Scene(first) if first else None
    if len(phrases) != 3:
        return None
    first, second = _parse_phrase(phrases[0]), _parse_phrase(phrases[2])
    if first is None or second is None or first.kind == second.kind or max(first.count, second.count) > 2:
        return None
    return Scene(first, phrases[1], second)


def _parse_phrase(phrase: str) -> Group | None:
    words = phrase.split(" ")
    if len(words) != 4:
        return None
    counts = {word: count for count, word in _COUNT_WORDS.items()}
    shapes = {plural: shape for shape, plural in _PLURALS.items()}
    count, size, color = counts.get(words[0]), words[1], words[2]
    shape = words[3] if count == 1 else shapes.get(words[3])
    if count is None or size not in SIDES or color not in COLORS or shape not in SHAPES:
        return None
    return Group(count, size, color, shape)


def sample_scene(split: Split, index: int) -> tuple[Scene, list[Placed]]:
    """Scene `index` of the split and where its objects lie; a pure function of both."""
    random = _uniforms(generator("shapes", split, index))
    while True:
        scene = _random_scene(random)
        # Either way of saying a relation belongs to one split.
        if split_of(describe(scene.canonical())) == split:
            return scene, _place(scene, random)


def _uniforms(generator: torch.Generator) -> Iterator[float]:
    """Endless numbers in [0, 1)."""
    for _ in repeat(None):
        yield from torch.rand(64, generator=generator, dtype=torch.float64).tolist()


def _choose(random: Iterator[float], options: Sequence[str]) -> str:
    return options[int(next(random) * len(options))]


def _random_group(random: Iterator[float], max_count: int) -> Group:
    count = 1 + int(next(random) * max_count)
    return Group(count, *(_choose(random, tuple(options)) for options in (SIDES, COLORS, SHAPES)))


def _random_scene(random: Iterator[float]) -> Scene:
    if next(random) >= _PAIR_SHARE:
        return Scene(_random_group(random, max_count=4))
    first = second = _random_group(random, max_count=2)
    while second.kind == first.kind:
        second = _random_group(random, max_count=2)
    return Scene(first, _choose(random, tuple(RELATIONS)), second)


def _place(scene: Scene, random: Iterator[float]) -> list[Placed]:
    """Put each object somewhere in a cell of its own; cells are (left, top, right, bottom)."""
    if scene.second is None:
        quarters = [(x, y, x + 0.5, y + 0.5) for y in (0.0, 0.5) for x in (0.0, 0.5)]
        shuffled = sorted(range(4), key=lambda _: next(random))
        cells = [(0.0, 0.0, 1.0, 1.0)] if scene.first.count == 1 else [quarters[i] for i in shuffled]
        return [_put(scene.first, cell, random) for cell in cells[: scene.first.count]]

    scene = scene.canonical()
    placed = []
    for group, start in ((scene.first, 0.0), (scene.second, 0.5)):
        # Along the other axis a single object stays in the middle, so that only one relation can be meant.
        for low in (0.25,) if group.count == 1 else (0.0, 0.5):
            left, top = (start, low) if scene.relation == "left of" else (low, start)
            placed.append(_put(group, (left, top, left + 0.5, top + 0.5), random))
    return placed


def _put(group: Group, cell: tuple[float, float, float, float], random: Iterator[float]) -> Placed:
    side = SIDES[group.size]
    reach = side / 2 + _MARGIN
    left, top, right, bottom = cell
    x = left + reach + next(random) * (right - left - 2 * reach)
    y = top + reach + next(random) * (bottom - top - 2 * reach)
    return Placed(group.shape, group.color, x, y, side)


def draw(objects: Sequence[Placed], image_size: int) -> np.ndarray:
    """Paint the objects on white, antialiased; uint8, (3, image_size, image_size)."""
    image = np.full((3, image_size, image_size), 255.0)
    for placed in objects:
        color = np.array(COLORS[placed.color], dtype=np.float64)[:, None, None]
        # Only the pixels that the bounding box meets.
        low_x, low_y = (max(0, int((c - placed.side / 2) * image_size)) for c in (placed.x, placed.y))
        size = int(placed.side * image_size) + 2
        window = image[:, low_y : low_y + size, low_x : low_x + size]
        x, y = placed.x * image_size - low_x, placed.y * image_size - low_y
        covered = coverage(placed.shape, x, y, placed.side * image_size, window.shape[1:])
        window += covered * (color - window)
    return np.rint(image).astype(np.uint8)


def coverage(shape: str, x: float, y: float, side: float, size: tuple[int, int]) -> np.ndarray:
    """The share of each pixel that the shape covers, (height, width) in [0, 1]; x, y, side in pixels."""
    height, width = size
    right = abs(np.arange(width) + 0.5 - x)[None, :]
    down = (np.arange(height) + 0.5 - y)[:, None]
    half = side / 2
    # How far outside the shape each pixel's centre is, in pixels; negative inside.
    if shape == "circle":
        outside = np.hypot(right, down) - half
    elif shape == "square":
        outside = np.maximum(right, abs(down)) - half
    elif shape == "triangle":
        outside = np.maximum((2 * right - down - half) / np.sqrt(5), down - half)
    elif shape == "cross":
        arm = half / 3
        outside = np.minimum(np.maximum(right - arm, abs(down) - half), np.maximum(right - half, abs(down) - arm))
    else:
        raise ValueError(f"got shape {shape!r}, expected one of {SHAPES}")
    return np.clip(0.5 - outside, 0.0, 1.0)
