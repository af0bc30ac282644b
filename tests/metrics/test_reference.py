"""The shipped encoder answers to faults as its card says, and one picture's scores do not depend on the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tfusion.bench.reference_encoder import (
    blurred,
    clip_score,
    collapsed,
    distances,
    features_of,
    noised,
    pixels_of,
    recoloured,
    retrieval,
)
from tfusion.data.openmoji import OpenMoji
from tfusion.data.shapes import Shapes
from tfusion.metrics import Reference
from tfusion.metrics.reference import SHIPPED

CORPORA = {"openmoji": OpenMoji(32, limit=200), "shapes": Shapes(32, 200)}


@pytest.fixture(scope="module")
def network() -> Reference:
    found = Reference()
    found.load(torch.device("cpu"))
    return found


def test_it_is_small_and_named_by_its_content(network: Reference) -> None:
    assert SHIPPED.stat().st_size < 8_000_000
    card = SHIPPED.with_suffix(".md").read_text(encoding="utf-8")
    assert network.fingerprint.split()[1] in card, "the card is of another file"
    assert "CC BY-SA 4.0" in card


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize(
    "faults",
    [
        [blurred(0.5), blurred(1.0), blurred(2.0)],
        [noised(10), noised(25), noised(50)],
        [recoloured(0.25), recoloured(0.5), recoloured(1.0)],
        [collapsed(0.5), collapsed(0.25), collapsed(0.1)],
    ],
    ids=["blur", "noise", "colours", "kinds"],
)
def test_distances_grow_with_the_fault(name: str, faults: list, network: Reference) -> None:
    pictures = CORPORA[name].load("train")
    own = pixels_of([pictures[i] for i in range(200)])
    reference = features_of(network, own)
    found = [distances(network, reference, fault(own, np.random.default_rng(0))) for fault in faults]
    for values in zip(*found, strict=True):  # Frechet, then kernel
        assert values[0] < values[1] < values[2]


@pytest.mark.parametrize("name", CORPORA)
def test_the_score_falls_as_captions_are_swapped(name: str, network: Reference) -> None:
    pictures = [CORPORA[name].load("train")[i] for i in range(200)]
    captions = [picture.captions[0] for picture in pictures]
    scores = [clip_score(network, pixels_of(pictures), captions, share) for share in (0.0, 0.25, 0.5, 1.0)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 2 * scores[-1]


def test_it_finds_scenes_it_has_never_seen(network: Reference) -> None:
    scenes = Shapes(32).load("val")
    assert min(retrieval(network, [scenes[i] for i in range(200)])) > 0.9


def test_a_picture_and_its_caption_are_scored_alike_alone_and_among_others(network: Reference) -> None:
    pictures = [Shapes(48).load("val")[i] for i in range(5)]
    captions = ["", *(picture.captions[0] for picture in pictures[1:4]), "word " * 100]
    pixels = torch.from_numpy(pixels_of(pictures))
    together = network.cosines(pixels, captions)
    for i in range(5):
        assert network.cosines(pixels[i : i + 1], captions[i : i + 1])[0].item() == pytest.approx(
            together[i].item(), abs=1e-5
        )
    cut = network.text_features(["word " * 45, "word " * 200])
    assert torch.allclose(cut[0], cut[1])  # what it cannot read is cut


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.safetensors', which is no file"):
        Reference(str(tmp_path / "none.safetensors")).load(torch.device("cpu"))
    (tmp_path / "half.safetensors").write_bytes(SHIPPED.read_bytes()[:10_000])
    with pytest.raises(ValueError, match="is no reference encoder"):
        Reference(str(tmp_path / "half.safetensors")).load(torch.device("cpu"))


def test_pictures_of_floats_and_captions_too_few_are_refused(network: Reference) -> None:
    pictures = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="torch.float32, expected uint8"):
        network.features(pictures / 255)
    with pytest.raises(ValueError, match="2 pictures and 1 captions"):
        network.cosines(pictures, ["a heart"])  # one caption would otherwise be compared with both
