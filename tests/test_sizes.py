"""The named sizes are Table 2 of the paper, counted on the meta device, and the overlays say nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tfusion.models.transfusion import Transfusion

SIZES = Path(__file__).parents[1] / "configs" / "size"

# Table 2; its blocks and embeddings in 10^9 (SwiGLU of 8/3 D, untied 32k), and Table 7's "extra" in %.
PAPER = {  # layers, D, heads, blocks, embeddings, adapters' share
    "0.16b": (16, 768, 12, 0.113, 0.049, 0.5),
    "0.37b": (24, 1024, 16, 0.308, 0.066, 0.4),
    "0.76b": (24, 1536, 24, 0.680, 0.098, 0.4),
    "1.4b": (24, 2048, 16, 1.233, 0.131, 0.4),
    "7b": (32, 4096, 32, 6.476, 0.262, 0.3),
}
# Exact, with a vocabulary of 32,000 + 5, latents 8 x 32 x 32, patch 2: a change here changes the model.
GOLDEN = {  # blocks and final norm, embedding and head, adapters
    "0.8m": (853_120, 8_193_280, 57_760),
    "1.8m": (1_771_200, 12_289_920, 98_912),
    "14m": (14_162_304, 24_579_840, 271_520),
    "tiny": (4_820_224, 16_386_560, 148_256),
    "small": (25_698_816, 32_773_120, 427_552),
    "0.16b": (113_271_552, 49_159_680, 837_920),
    "0.37b": (308_331_520, 65_546_240, 1_379_360),
    "0.76b": (679_552_512, 98_319_360, 2_855_456),
    "1.4b": (1_233_225_728, 131_092_480, 4_855_840),
    "7b": (6_476_271_616, 262_184_960, 18_100_256),
}


def overlay(name: str) -> dict[str, int]:
    """The sizes that an overlay sets, its nesting checked."""
    outer = yaml.safe_load((SIZES / f"{name}.yaml").read_text())
    for key in ("model", "init_args", "model", "init_args"):
        assert list(outer) == [key]
        outer = outer[key]
    return outer


def counts(name: str) -> tuple[int, int, int]:
    """Parameters of trunk, embedding and head, adapters."""
    model = Transfusion(32_005, (8, 32, 32), 2, **overlay(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    parts = {"transformer": 0, "embedding": 0, "text_head": 0, "patch_encoder": 0, "patch_decoder": 0}
    for parameter_name, parameter in model.named_parameters():
        parts[parameter_name.split(".")[0]] += parameter.numel()
    assert parts["embedding"] == parts["text_head"]  # untied
    return (
        parts["transformer"],
        parts["embedding"] + parts["text_head"],
        parts["patch_encoder"] + parts["patch_decoder"],
    )


def test_the_sizes_are_all_there() -> None:
    assert {path.stem for path in SIZES.glob("*.yaml")} == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_an_overlay_is_a_header_and_three_numbers(name: str) -> None:
    lines = (SIZES / f"{name}.yaml").read_text().splitlines()
    assert len(lines) <= 20
    assert list(overlay(name)) == ["dim", "num_layers", "num_heads"]
    header = [line for line in lines if line.startswith("#")]
    assert any(f"tfusion fit --config BASE.yaml --config configs/size/{name}.yaml" in line for line in header)
    assert any(line.startswith("# Parameters: ") for line in header)


@pytest.mark.parametrize("name", GOLDEN)
def test_counts_are_exactly_these(name: str) -> None:
    assert counts(name) == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_counts_are_the_sum_of_the_matrices(name: str) -> None:
    """By hand: 4 D^2 + 3 D F + 2 D a block, and so on."""
    dim, layers, _ = overlay(name).values()
    multiple = 256 if dim >= 1024 else 64
    hidden = next(f for f in range(multiple, 4 * dim, multiple) if 3 * f >= 8 * dim)
    values = 8 * 2 * 2  # of a patch
    blocks = layers * (4 * dim**2 + 3 * dim * hidden + 2 * dim) + dim
    timestep = 256 * dim + dim + dim**2 + dim
    adapters = (values * dim + dim) + timestep + (dim * values + values)
    assert counts(name) == (blocks, 2 * 32_005 * dim, adapters)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_sizes(name: str) -> None:
    layers, dim, heads, blocks, embeddings, share = PAPER[name]
    assert overlay(name) == {"dim": dim, "num_layers": layers, "num_heads": heads}
    ours = counts(name)
    assert ours[0] / 1e9 == pytest.approx(blocks, rel=0.015)
    assert ours[1] / 1e9 == pytest.approx(embeddings, rel=0.015)
    assert sum(ours[:2]) / 1e9 == pytest.approx(blocks + embeddings, rel=0.015)
    assert 100 * ours[2] / sum(ours) == pytest.approx(share, abs=0.06)
    named = float(name.removesuffix("b"))  # 0.778 is called 0.76, 6.74 is called 7
    assert sum(ours[:2]) / 1e9 == pytest.approx(named, rel=0.04)
