"""Fixed sets of prompts for `shapes`, by what they test: GenEval's kinds, seen and unseen combinations apart.

The kinds are those of Ghosh et al. 2023 (arXiv 2310.11513, section 3) in the words of this corpus; `all` is the
corpus' own distribution. Seen is a scene of the train split, whichever way round it is said; unseen one of val or
test, which training never meets. So for a kind of one object, unseen says that this size, colour and shape never
stood alone, though each may have stood beside another. Of the train split's scenes of two groups, of which there are
tens of thousands, a corpus of fewer pictures holds a part only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

from tfusion.data.corpora import split_of
from tfusion.data.shapes import COLORS, RELATIONS, SHAPES, SIDES, Group, Scene, describe
from tfusion.randomness import seed_from

KINDS = ("one_object", "two_objects", "count", "color", "position", "color_binding", "all")
# Of `all`, one prompt in so many is of one group; the corpus' own share.
_ONE_GROUP_IN = 4


def scene_prompts(kind: str, seen: bool, number: int) -> list[str]:
    """Captions of one kind; a pure function of its arguments, and the first n of a longer list are the list of n.

    - `one_object`, `color`: one object.
    - `two_objects`, `position`: two objects of different shapes, and how they lie.
    - `color_binding`: the same, of different colours too.
    - `count`: two to four equal objects.
    - `all`: one group of one to four in a quarter of the prompts, else two groups of one or two, as the corpus.

    Args:
        kind: one of KINDS.
        seen: scenes of the train split, or else of the other two.
        number: how many, at least 1. They are distinct as long as the kind has more, and then repeat in turn, as
            GenEval makes four pictures of each prompt; unseen, `one_object` and `color` have few.
    """
    check_kind(kind)
    if number < 1:
        raise ValueError(f"got number={number}, expected at least 1 prompt")
    if kind != "all":
        return list(itertools.islice(itertools.cycle(_distinct(kind, seen)), number))
    one, two = itertools.cycle(_distinct("one_group", seen)), itertools.cycle(_distinct("two_groups", seen))
    return [next(two if index % _ONE_GROUP_IN else one) for index in range(number)]


def check_kind(kind: str) -> None:
    """Raise ValueError unless `kind` is one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"got kind {kind!r}, expected one of {', '.join(KINDS)}")


def is_of_kind(scene: Scene, kind: str) -> bool:
    """Whether a scene is one that prompts of this kind ask for."""
    check_kind(kind)
    first, second = scene.first, scene.second
    if kind == "all":
        return True
    if kind in ("one_object", "color"):
        return second is None and first.count == 1
    if kind == "count":
        return second is None and first.count > 1
    if second is None or first.count > 1 or second.count > 1 or first.shape == second.shape:
        return False
    return kind != "color_binding" or first.color != second.color


@cache
def _distinct(kind: str, seen: bool) -> tuple[str, ...]:
    """All captions of the kind, seen or not, in an order that is neither the corpus' nor that of the words."""
    if kind == "one_group":
        scenes = _one_group()
    elif kind == "two_groups":
        scenes = _two_groups(max_count=2)
    else:
        scenes = (s for s in itertools.chain(_one_group(), _two_groups(max_count=1)) if is_of_kind(s, kind))
    wanted = [describe(scene) for scene in scenes if (split_of(describe(scene.canonical())) == "train") == seen]
    return tuple(sorted(wanted, key=lambda caption: seed_from("scene prompts", kind, caption)))


def _one_group() -> Iterator[Scene]:
    for count, *kind in itertools.product((1, 2, 3, 4), SIDES, COLORS, SHAPES):
        yield Scene(Group(count, *kind))


def _two_groups(max_count: int) -> Iterator[Scene]:
    counts = range(1, max_count + 1)
    groups = [Group(count, *kind) for count, *kind in itertools.product(counts, SIDES, COLORS, SHAPES)]
    for first, second in itertools.product(groups, repeat=2):
        if first.kind != second.kind:
            for relation in RELATIONS:
                yield Scene(first, relation, second)
