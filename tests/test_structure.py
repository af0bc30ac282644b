"""The package's shape: imports go downward only, nothing prints, nothing names a device, files stay small."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tfusion"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each tier may import those before it, and modules of its own tier where named so.
TIERS = [
    {"randomness", "quantization", "models.compilers"},
    {"sequence", "diffusion"},
    {
        "pictures",
        "samplers",
        "models.attention",
        "models.kv_cache",
        "models.transformer",
        "models.patches",
        "models.unet_patches",
        "models.conv_patches",
        "losses",
    },
    {
        "token_sampling",
        "requests",
        "models.base",
        "models.transfusion",
        "models.chameleon",
        "models.flops",
        "models.reference_encoder",
        "models.discriminator",
        "models.autoencoder",
        "tokenizers",
    },
    {"rows", "models.packed_linear"},
    {"replay"},
    {"denoising", "image_tokens"},
    {"decoding"},
    {"generation", "data.corpora", "data.order"},
    {
        "data.openmoji",
        "data.shakespeare",
        "data.shapes",
        "data.shapes_reader",
        "data.latent_shards",
        "data.sources",
        "data.files",
        "data.json_lines",
        "data.record_builder",
    },
    {"data.records", "data.text_pieces", "data.scene_prompts"},
    {"data.mixture", "data.picture_records", "data.bad_records", "data.file_corpus"},
    {"data.picture_formats", "data.building"},
    {"data.text_records", "data.image_files"},
    {"data.latents"},
    {
        "data.encoded",
        "data.shard_batches",
        "data.text_files",
        "data.steps",
        "data.validation",
        "data.prompts",
        "data.sample_requests",
        "metrics",
    },
    {"data.choices", "data.checks"},
    {
        "data.datamodule",
        "training.optim",
        "training.compatibility",
        "training.run_folder",
        "training.trainer_settings",
        "training.parallel",
        "training.step_sums",
        "training.validation_log",
        "training.autoencoder_losses",
        "training.autoencoder_export",
        "training.autoencoder_validation",
        "training.codebook",
        "parser",
    },
    {"training.warm_start"},
    {"training.base", "training.multimodal", "training.encoding", "report"},
    {
        "training.transfusion",
        "training.chameleon",
        "training.reference_encoder",
        "training.autoencoder",
        "callbacks",
    },
    {"loading"},
    {"__main__"},
    {"bench"},
]
# A package's own pieces may import each other.
FAMILIES = ("tokenizers", "metrics", "callbacks", "report", "bench", "models", "training", "data.shapes")
FIRST_WITH_LIGHTNING = 16


def module_of(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tier_of(module: str) -> int | None:
    for tier, names in enumerate(TIERS):
        if module in names or module.split(".")[0] in names:
            return tier
    return None


def submodule(package: str, name: str) -> str | None:
    """`package.name` where that is a module of ours."""
    path = ROOT.joinpath(*package.split("."), name)
    return f"{package}.{name}" if path.with_suffix(".py").exists() or path.is_dir() else None


def imports_of(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [submodule(node.module, alias.name) or node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_downward(path):
    module = module_of(path)
    if path.name == "__init__.py":
        return  # an __init__ only gathers names of its own package
    tier = tier_of(module)
    assert tier is not None, f"{module} stands in no tier: add it to TIERS"
    for name in imports_of(path):
        if name.split(".")[0] in ("lightning", "pytorch_lightning"):
            assert tier >= FIRST_WITH_LIGHTNING or module.startswith("data.prompts"), f"{module} imports lightning"
        if not name.startswith("tfusion."):
            continue
        target = name.removeprefix("tfusion.")
        same_family = any(module.startswith(f) and target.startswith(f) for f in FAMILIES)
        target_tier = tier_of(target)
        assert target_tier is not None, f"{module} imports {target}, which stands in no tier"
        assert target_tier < tier or (same_family and target_tier <= tier), f"{module} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_print_no_device_no_global_seed(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path}:{node.lineno} prints: use logging"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in ("cuda", "manual_seed_all"), f"{path}:{node.lineno} {node.func.attr}"
            name = ast.unparse(node.func)
            assert name != "torch.manual_seed", f"{path}:{node.lineno} seeds the global generator"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_are_of_a_size_one_can_see_whole(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.name == "__init__.py", "docstring"


def test_nothing_else_at_the_top():
    allowed = {
        "tfusion",
        "configs",
        "notebooks",
        "tests",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
    }
    # What is in the repository: a user's own pictures and prompts may lie beside it.
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    visible = {line.split("/")[0] for line in listed.splitlines() if not line.startswith(".")}
    assert allowed <= visible
    assert visible <= allowed, visible - allowed
