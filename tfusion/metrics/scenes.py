"""Pictures and captions of `shapes` marked right or wrong: GenEval's kinds, judged on pixels by the analytic reader.

GenEval (Ghosh et al. 2023, arXiv 2310.11513, section 3) asks of each kind of prompt only what it tests, with a
detector that is sometimes wrong; here the reader is exact on true pictures (`tfusion.bench.reader` says how far).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tfusion.data.scene_prompts import is_of_kind
from tfusion.data.shapes import Scene, parse_caption
from tfusion.data.shapes_reader import SeenObject, read_objects, relation_of, scene_of, scene_of_caption


def composition_right(kind: str, image: torch.Tensor | np.ndarray, caption: str) -> bool:
    """Whether a picture shows what its caption asks for, as far as this kind of prompt tests it.

    - `one_object`: exactly one thing, of the shape.
    - `color`: exactly one thing, of the shape and the colour.
    - `two_objects`: exactly two things, of the two shapes.
    - `position`: the same, and they lie as said, by their centroids: along the axis on which these are farther apart.
    - `color_binding`: exactly two things, each of the two shapes in its own colour, wherever they lie.
    - `count`: exactly as many things as said, all of the shape.
    - `all`: the scene and nothing else: count, size, colour and shape of each group, and how two groups lie.

    A thing of no known shape counts as a thing, and its shape is never right; the same holds for colours. Sizes are
    asked for by `all` alone.

    Args:
        kind: one of `scene_prompts.KINDS`.
        image: uint8, (3, S, S).
        caption: of this kind, as `scene_prompts` gives it; any other raises ValueError.
    """
    return objects_right(kind, read_objects(image), caption)


def objects_right(kind: str, objects: Sequence[SeenObject], caption: str) -> bool:
    """`composition_right` of a picture that `read_objects` has read."""
    scene = scene_of_caption(caption)
    if not is_of_kind(scene, kind):
        raise ValueError(f"got caption {caption!r}, expected one of kind {kind!r}, as scene_prompts gives it")
    if kind == "all":
        return scene_of(objects) == scene
    wanted = [group for group in (scene.first, scene.second) if group is not None for _ in range(group.count)]
    if len(objects) != len(wanted):
        return False
    # Of two things the shapes differ, so that a thing's shape says which of the two it is.
    found = {seen.shape: seen for seen in objects}
    if found.keys() != {group.shape for group in wanted}:
        return False
    if kind in ("color", "color_binding"):
        return all(found[group.shape].color == group.color for group in wanted)
    if kind == "position":
        return relation_of(*([found[group.shape]] for group in wanted)) == scene.relation
    return True


def caption_right(written: str, true_caption: str) -> bool:
    """Whether a written caption says exactly the scene of the true one, whichever way round.

    A written caption that is none of this corpus' grammar is wrong, and so is one with a space too many.

    Raises:
        ValueError: the true caption is none of this corpus.
    """
    return _canonical(written) == scene_of_caption(true_caption)


def _canonical(caption: str) -> Scene | None:
    scene = parse_caption(caption)
    return None if scene is None else scene.canonical()
