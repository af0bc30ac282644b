"""Read a scene of `shapes` back from its pixels: exactly if drawn, tolerantly if generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from tfusion.data.shapes import COLORS, SHAPES, SIDES, Group, Scene, coverage, parse_caption

# What each shape covers of its bounding box, and how far below the box's centre its centroid lies, in sides.
_FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 1 / 2, "cross": 5 / 9}
_SINK = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6, "cross": 0.0}
# An object this much smaller than a small one is a speck, and overlooked (a share of the small box's area).
_SPECK = 0.12
# Of a shape's area, how much an object may differ from every shape and still count as the nearest one.
_MAX_MISFIT = 0.1
# Cosine between an object's colour and the nearest of COLORS, both taken from the background.
_MIN_COLOR_MATCH = 0.93
# Pixels are smoothed by this much against noise (standard deviation, share of the image's side); ideal shapes
# by as much and more, for generated pictures are somewhat blurred.
_SMOOTHING = 0.5 / 32
_BLURS = (0.5 / 32, 0.8 / 32, 1.1 / 32)


@dataclass(frozen=True)
class _Object:
    kind: tuple[str, str, str]
    x: float
    y: float


def composition_correct(image: torch.Tensor | np.ndarray, caption: str) -> bool:
    """Whether the picture shows what the caption says, and nothing else.

    Args:
        image: uint8, (3, H, W).
        caption: one that `shapes.parse_caption` understands; any other raises ValueError.
    """
    wanted = parse_caption(caption)
    if wanted is None:
        raise ValueError(f"got caption {caption!r}, expected one of the form that shapes.describe writes")
    return read_scene(image) == wanted.canonical()


def read_scene(image: torch.Tensor | np.ndarray) -> Scene | None:
    """The scene in a uint8 (3, H, W) picture, in canonical form; None if it shows no scene of this corpus."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.shape[1] != image.shape[2]:
        raise ValueError(f"got {image.dtype} {image.shape}, expected uint8 (3, size, size)")
    objects = _find_objects(image)
    return None if objects is None else _as_scene(objects)


def _find_objects(image: np.ndarray) -> list[_Object] | None:
    """All objects, or None if something is there that is none."""
    size = image.shape[1]
    pixels = image.astype(np.float64)
    # No object touches the frame, so the frame is background.
    frame = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    background = np.median(frame, axis=1)
    if background.min() < 200:
        return None
    ink = background[:, None, None] - pixels
    ink = np.stack([ndimage.gaussian_filter(channel, _SMOOTHING * size) for channel in ink])

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
        if (labels[window] == label).sum() < _SPECK * (SIDES["small"] * size) ** 2:
            continue
        found = _identify(ink, territory == label, window, inks)
        if found is None:
            return None
        objects.append(found)
    return objects


def _identify(ink: np.ndarray, mine: np.ndarray, window: tuple[slice, slice], inks: np.ndarray) -> _Object | None:
    """Name the one object in `mine`, (H, W) bool, in `window`; `ink` is (3, H, W), `inks` (colours, 3)."""
    size = mine.shape[0]
    ink, mine = ink[(slice(None), *window)], mine[window]
    total = ink[:, mine].sum(1)
    norms = np.linalg.norm(inks, axis=1)
    match = inks @ total / (norms * np.linalg.norm(total))
    color = int(match.argmax())
    if match[color] < _MIN_COLOR_MATCH:
        return None

    # The object as the share of each pixel it covers; then its area and centroid, and the shape that differs
    # least when it has the same.
    covered = np.where(mine, np.einsum("c,chw->hw", inks[color], ink) / norms[color] ** 2, 0.0)
    area = covered.sum()
    y = (covered.sum(1) @ (np.arange(mine.shape[0]) + 0.5)) / area
    x = (covered.sum(0) @ (np.arange(mine.shape[1]) + 0.5)) / area
    misfits = {}
    for shape in SHAPES:
        side = np.sqrt(area / _FILL[shape])
        ideal = coverage(shape, x, y - _SINK[shape] * side, side, mine.shape)
        blurred = [ndimage.gaussian_filter(ideal, blur * size, mode="constant") for blur in _BLURS]
        misfits[shape] = min(((covered - ideal) ** 2).sum() for ideal in blurred) / area
    shape = min(misfits, key=misfits.get)
    if misfits[shape] > _MAX_MISFIT:
        return None
    side = np.sqrt(area / _FILL[shape]) / size
    nearest_size = min(SIDES, key=lambda name: abs(np.log(side / SIDES[name])))
    return _Object((nearest_size, list(COLORS)[color], shape), x + window[1].start, y + window[0].start)


def _as_scene(objects: Sequence[_Object]) -> Scene | None:
    """Gather equal objects into groups, and find how two groups lie."""
    groups: dict[tuple[str, str, str], list[_Object]] = {}
    for found in objects:
        groups.setdefault(found.kind, []).append(found)
    if len(groups) == 1:
        ((kind, members),) = groups.items()
        return Scene(Group(len(members), *kind)) if len(members) <= 4 else None
    if len(groups) != 2 or max(map(len, groups.values())) > 2:
        return None

    one, two = groups.values()
    apart_x = np.mean([found.x for found in two]) - np.mean([found.x for found in one])
    apart_y = np.mean([found.y for found in two]) - np.mean([found.y for found in one])
    relation, axis = ("left of", "x") if abs(apart_x) > abs(apart_y) else ("above", "y")
    before, after = (one, two) if (apart_x if axis == "x" else apart_y) > 0 else (two, one)
    # Every object of the one lies on that side of every object of the other.
    if max(getattr(found, axis) for found in before) >= min(getattr(found, axis) for found in after):
        return None
    return Scene(Group(len(before), *before[0].kind), relation, Group(len(after), *after[0].kind))
