"""Read a scene of `shapes` back from its pixels: exactly if drawn, tolerantly if generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from tfusion.data.shapes import COLORS, RELATIONS, SHAPES, SIDES, Group, Scene, coverage, parse_caption

# What each shape covers of its bounding box, and how far below the box's centre its centroid lies, in sides.
_FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 1 / 2, "cross": 5 / 9}
_SINK = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6, "cross": 0.0}
# An object this much smaller than a small one is a speck, and overlooked (a share of the small box's area).
_SPECK = 0.12
# Of a shape's area, how much an object may differ from every shape and still count as the nearest one.
_MAX_MISFIT = 0.1
# Cosine between an object's colour and the nearest of COLORS, both taken from the background.
_MIN_COLOR_MATCH = 0.93
# The strength of a colour that is none of COLORS is this quantile of its pixels'.
_FULLEST = 0.9
# Pixels are smoothed by this much against noise (standard deviation, share of the image's side); ideal shapes
# by as much and more, for generated pictures are somewhat blurred.
_SMOOTHING = 0.5 / 32
_BLURS = (0.5 / 32, 0.8 / 32, 1.1 / 32)


@dataclass(frozen=True)
class SeenObject:
    """One thing that stands on the background.

    Attributes:
        shape: one of SHAPES, or None where it is like none of them.
        color: one of COLORS, or None.
        size: one of SIDES, or None where the shape is None: a box is known by its shape.
        x: its centroid, as a share of the image's side.
        y: the same downwards; a triangle's lies a sixth of its side below the middle of its box.
    """

    shape: str | None
    color: str | None
    size: str | None
    x: float
    y: float


def composition_correct(image: torch.Tensor | np.ndarray, caption: str) -> bool:
    """Whether the picture shows what the caption says, and nothing else.

    Args:
        image: uint8, (3, H, W).
        caption: one that `shapes.parse_caption` understands; any other raises ValueError.
    """
    return read_scene(image) == scene_of_caption(caption)


def scene_of_caption(caption: str) -> Scene:
    """The scene that a caption says, in canonical form; ValueError if it is no caption of this corpus."""
    scene = parse_caption(caption)
    if scene is None:
        raise ValueError(f"got caption {caption!r}, expected one of the form that shapes.describe writes")
    return scene.canonical()


def read_scene(image: torch.Tensor | np.ndarray) -> Scene | None:
    """The scene in a uint8 (3, H, W) picture, in canonical form; None if it shows no scene of this corpus."""
    return scene_of(read_objects(image))


def read_objects(image: torch.Tensor | np.ndarray) -> list[SeenObject]:
    """All things in a uint8 (3, S, S) picture, known or not; none where the background is not light.

    A speck is overlooked, and so is what is less than half as strong as the nearest of COLORS. Things that touch
    are one thing.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.shape[1] != image.shape[2]:
        raise ValueError(f"got {image.dtype} {image.shape}, expected uint8 (3, size, size)")
    size = image.shape[1]
    pixels = image.astype(np.float64)
    # No object touches the frame, so the frame is background.
    frame = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    background = np.median(frame, axis=1)
    if background.min() < 200:
        return []
    blur = _SMOOTHING * size
    ink = ndimage.gaussian_filter(background[:, None, None] - pixels, (0, blur, blur))

    # How much of each pixel is covered, by its nearest colour; half covered is inside.
    inks = background - np.array(list(COLORS.values()), dtype=np.float64)
    norms = np.linalg.norm(inks, axis=1)
    along = np.einsum("kc,chw->khw", inks / norms[:, None], ink)
    nearest = along.argmax(0)
    covered = along.max(0) / norms[nearest]
    labels, number = ndimage.label(covered > 0.5)
    # Each object with the soft edge around it: the pixels within reach of it, and of no other.
    reach = max(2, round(size / 16))
    distance, (near_y, near_x) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    territory = np.where(distance <= reach, labels[near_y, near_x], 0)

    objects = []
    for label, window in enumerate(ndimage.find_objects(territory, number), start=1):
        inside = labels[window] == label
        if inside.sum() < _SPECK * (SIDES["small"] * size) ** 2:
            continue
        mine = territory[window] == label
        left, top = window[1].start, window[0].start
        objects.append(_identify(ink[:, *window], mine, inside, inks, left, top, size))
    return objects


def _identify(
    ink: np.ndarray, mine: np.ndarray, inside: np.ndarray, inks: np.ndarray, left: int, top: int, size: int
) -> SeenObject:
    """Name one object as far as it is known.

    Args:
        ink: a window of the picture, (3, h, w), what each pixel lacks of the background.
        mine: (h, w) bool, the object and the soft edge around it.
        inside: (h, w) bool, the pixels of it that are at least half covered.
        inks: (colours, 3), what each of COLORS lacks of the background.
        left: the window's first column; `top` its first row.
        size: the picture's side, in pixels.
    """
    total = ink[:, mine].sum(1)
    match = inks @ total / (np.linalg.norm(inks, axis=1) * np.linalg.norm(total))
    nearest = int(match.argmax())
    color = list(COLORS)[nearest] if match[nearest] >= _MIN_COLOR_MATCH else None
    # What covers a pixel fully; of an unknown colour, what its fullest pixels have.
    full = inks[nearest]
    if color is None:
        own = total / np.linalg.norm(total)
        full = own * np.quantile(np.einsum("c,chw->hw", own, ink)[inside], _FULLEST)

    # The object as the share of each pixel it covers; then its area and centroid, and the shape that differs
    # least when it has the same.
    covered = np.where(mine, np.einsum("c,chw->hw", full, ink) / (full @ full), 0.0)
    rows, columns = np.arange(mine.shape[0]) + 0.5, np.arange(mine.shape[1]) + 0.5
    area = covered.sum()
    if area > 0:
        y, x = covered.sum(1) @ rows / area, covered.sum(0) @ columns / area
        sides = {shape: np.sqrt(area / _FILL[shape]) for shape in SHAPES}
        ideals = np.stack([coverage(s, x, y - _SINK[s] * side, side, mine.shape) for s, side in sides.items()])
        blurred = [ndimage.gaussian_filter(ideals, (0, b * size, b * size), mode="constant") for b in _BLURS]
        misfits = np.min([((covered - ideal) ** 2).sum((1, 2)) for ideal in blurred], axis=0) / area
        best = int(misfits.argmin())
        if misfits[best] <= _MAX_MISFIT:
            shape = SHAPES[best]
            share = sides[shape] / size
            nearest_size = min(SIDES, key=lambda name: abs(np.log(share / SIDES[name])))
            return SeenObject(shape, color, nearest_size, float(x + left) / size, float(y + top) / size)
    y, x = inside.sum(1) @ rows / inside.sum(), inside.sum(0) @ columns / inside.sum()
    return SeenObject(None, color, None, float(x + left) / size, float(y + top) / size)


def scene_of(objects: Sequence[SeenObject]) -> Scene | None:
    """The scene that these objects are, in canonical form; None if one is unknown or they are none of this corpus."""
    groups: dict[tuple[str | None, ...], list[SeenObject]] = {}
    for seen in objects:
        groups.setdefault((seen.size, seen.color, seen.shape), []).append(seen)
    if any(None in kind for kind in groups):
        return None
    if len(groups) == 1:
        ((kind, members),) = groups.items()
        return Scene(Group(len(members), *kind)) if len(members) <= 4 else None
    if len(groups) != 2 or max(map(len, groups.values())) > 2:
        return None
    (one, two), (first, second) = groups.values(), (Group(len(members), *kind) for kind, members in groups.items())
    relation = relation_of(one, two)
    return Scene(first, relation, second).canonical() if relation else None


def relation_of(one: Sequence[SeenObject], two: Sequence[SeenObject]) -> str | None:
    """How `one` lie to `two`, one of RELATIONS, by their centroids; None if they lie mixed.

    The axis is that along which the means of both are farther apart.
    """
    apart_x = np.mean([seen.x for seen in two]) - np.mean([seen.x for seen in one])
    apart_y = np.mean([seen.y for seen in two]) - np.mean([seen.y for seen in one])
    (relation, axis), apart = (("left of", "x"), apart_x) if abs(apart_x) > abs(apart_y) else (("above", "y"), apart_y)
    before, after = (one, two) if apart > 0 else (two, one)
    # Every object of the one lies on that side of every object of the other.
    if max(getattr(seen, axis) for seen in before) >= min(getattr(seen, axis) for seen in after):
        return None
    return relation if before is one else RELATIONS[relation]
