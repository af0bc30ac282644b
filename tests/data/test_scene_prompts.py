"""Prompt sets are of their kind by their words, of their splits by the hash, fixed, and distinct while they can be."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest
import torch

from tfusion.data.corpora import split_of
from tfusion.data.scene_prompts import KINDS, _distinct, is_of_kind, scene_prompts
from tfusion.data.shapes import COLORS, RELATIONS, SHAPES, SIDES, Scene, describe, parse_caption, sample_scene

# By words alone.
ONE = f"a ({'|'.join(SIDES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
PAIR = f"{ONE} ({'|'.join(RELATIONS)}) {ONE}"
MANY = rf"(two|three|four) ({'|'.join(SIDES)}) ({'|'.join(COLORS)}) (circles|squares|triangles|crosses)"


def of_kind(kind: str, caption: str) -> bool:
    pair = re.fullmatch(PAIR, caption)
    return {
        "one_object": bool(re.fullmatch(ONE, caption)),
        "color": bool(re.fullmatch(ONE, caption)),
        "count": bool(re.fullmatch(MANY, caption)),
        "two_objects": pair is not None and pair[3] != pair[7],
        "position": pair is not None and pair[3] != pair[7],
        "color_binding": pair is not None and pair[3] != pair[7] and pair[2] != pair[6],
        "all": True,
    }[kind]


def either_way(caption: str) -> set[str]:
    """The caption, and that of the groups exchanged."""
    scene = parse_caption(caption)
    if scene.second is None:
        return {caption}
    return {caption, describe(Scene(scene.second, RELATIONS[scene.relation], scene.first))}


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_of_their_kind_and_split(kind, seen):
    prompts = scene_prompts(kind, seen, 300)
    assert len(prompts) == 300
    for caption in prompts:
        assert of_kind(kind, caption), caption
        assert describe(parse_caption(caption)) == caption
        # The one way of saying it that says "left of" or "above" has the split.
        [canonical] = [c for c in either_way(caption) if " right of " not in c and " below " not in c]
        assert (split_of(canonical) == "train") == seen


def test_no_unseen_prompt_is_a_caption_of_the_train_corpus():
    train = set().union(*(either_way(describe(sample_scene("train", index)[0])) for index in range(3000)))
    for kind in KINDS:
        assert not train & set(scene_prompts(kind, False, 400))
        if kind != "all":
            assert len(_distinct(kind, True)) > 5 * len(_distinct(kind, False))
    # And of the scenes of one object, nearly every one that the split has was met.
    assert len(train & set(scene_prompts("one_object", True, 57))) > 50


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_fixed_and_shorter_lists_are_the_start_of_longer_ones(kind):
    before = scene_prompts(kind, True, 90)
    state = torch.get_rng_state(), random.getstate()
    _distinct.cache_clear()
    random.seed(5)
    torch.manual_seed(5)
    assert scene_prompts(kind, True, 90) == before
    assert scene_prompts(kind, True, 7) == before[:7]
    random.setstate(state[1])
    torch.set_rng_state(state[0])
    _distinct.cache_clear()
    assert scene_prompts(kind, True, 7) == before[:7]
    # Nor does it draw from them, and each call's list is the caller's own.
    assert random.getstate() == state[1] and torch.equal(torch.get_rng_state(), state[0])
    before.append("changed")
    assert scene_prompts(kind, True, 90) == before[:-1]


def test_these_are_the_prompts_for_ever():
    assert scene_prompts("one_object", False, 2) == ["a small yellow cross", "a small orange cross"]
    assert scene_prompts("count", True, 2) == ["four big blue crosses", "three big green crosses"]
    assert scene_prompts("position", False, 1) == ["a big purple triangle below a small cyan circle"]
    assert scene_prompts("all", False, 2) == [
        "a small purple square",
        "a big orange square right of a big red square",
    ]


@pytest.mark.parametrize("seen", [True, False])
def test_prompts_are_distinct_as_far_as_there_are_and_repeat_in_turn(seen):
    groups = list(itertools.product((1, 2, 3, 4), SIDES, COLORS, SHAPES))
    word = {1: "a", 2: "two", 3: "three", 4: "four"}
    plural = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
    sizes = {"one_object": 0, "count": 0}
    for count, size, color, shape in groups:
        caption = f"{word[count]} {size} {color} {shape if count == 1 else plural[shape]}"
        sizes["one_object" if count == 1 else "count"] += (split_of(caption) == "train") == seen
    sizes["color"] = sizes["one_object"]
    for kind, size in sizes.items():
        prompts = scene_prompts(kind, seen, 2 * size + 3)
        assert len(set(prompts)) == len(set(prompts[:size])) == size
        assert prompts[size : 2 * size] == prompts[:size] and prompts[2 * size :] == prompts[:3]
    for kind in ("two_objects", "position", "color_binding"):
        assert len(set(scene_prompts(kind, seen, 1000))) == 1000
    # A quarter of 100 prompts are of one group, of which each half has at least 25.
    assert len(set(scene_prompts("all", seen, 100))) == 100


def test_kinds_have_orders_of_their_own_and_words_in_equal_shares():
    assert scene_prompts("two_objects", True, 50) != scene_prompts("position", True, 50)
    for kind in ("two_objects", "color_binding"):
        pairs = [re.fullmatch(PAIR, caption) for caption in scene_prompts(kind, True, 2000)]
        for place, options in enumerate((SIDES, COLORS, SHAPES, RELATIONS, SIDES, COLORS, SHAPES), start=1):
            shares = [sum(pair[place] == option for pair in pairs) / 2000 for option in options]
            assert np.allclose(shares, 1 / len(options), atol=0.04)


def test_all_is_distributed_as_the_corpus():
    def counts(captions):
        scenes = [parse_caption(caption) for caption in captions]
        kinds = [(scene.first.count, scene.second.count if scene.second else 0) for scene in scenes]
        return np.array([kinds.count(pair) for pair in itertools.product((1, 2, 3, 4), (0, 1, 2))]) / len(kinds)

    corpus = [describe(sample_scene("train", index)[0]) for index in range(3000)]
    assert np.allclose(counts(scene_prompts("all", True, 3000)), counts(corpus), atol=0.035)


def test_is_of_kind_agrees_with_the_words():
    for index in range(600):
        caption = describe(sample_scene("val", index)[0])
        for kind in KINDS:
            assert is_of_kind(parse_caption(caption), kind) == of_kind(kind, caption), (kind, caption)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="got kind 'colour', expected one of one_object, two_objects, count"):
        scene_prompts("colour", True, 3)
    with pytest.raises(ValueError, match="got kind 'one_group', expected one of"):
        scene_prompts("one_group", True, 3)
    with pytest.raises(ValueError, match="got number=0, expected at least 1"):
        scene_prompts("color", True, 0)
