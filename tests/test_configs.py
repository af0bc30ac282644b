"""Every YAML parses against the real constructors, says how to run it, and gives a model on the meta device."""

from __future__ import annotations

import re
from pathlib import Path

import lightning as L
import pytest
import yaml
from jsonargparse import ArgumentParser

from tfusion.data.datamodule import MultimodalDataModule

CONFIGS = Path(__file__).parents[1] / "configs"
BASES = sorted(CONFIGS.glob("*.yaml"))
OVERLAYS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent != CONFIGS)


def instantiate(settings):
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningModule, "model")
    parser.add_class_arguments(MultimodalDataModule, "data")
    parsed = parser.parse_object({"model": settings["model"], "data": settings["data"]})
    return parser.instantiate_classes(parsed)


def merged(base, overlay):
    for key, value in overlay.items():
        base[key] = merged(base.get(key, {}), value) if isinstance(value, dict) else value
    return base


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.name)
def test_base(path):
    """Header with command, time and result; parses; model and data agree before any data is read."""
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\n\n")]
    assert f"tfusion fit --config configs/{path.name}" in header
    assert "minutes" in header, "how long it takes"
    assert "Expected" in header, "what comes out"
    settings = yaml.safe_load(text)
    built = instantiate(settings)
    model = built.model.model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.vocab_size == built.data.vocab_size
    assert model.max_seq_len >= built.data.seq_len
    assert settings["trainer"]["max_steps"] > 0
    assert settings["trainer"]["default_root_dir"] == f"runs/{path.stem}"


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_overlay(path):
    """At most 20 lines, a header with a command, and valid on top of the base it names, or of the quickstart."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 20
    assert text.startswith("#")
    assert f"--config configs/{path.parent.name}/{path.name}" in text
    named = re.search(r"--config configs/(\w+\.yaml)", text)
    base = yaml.safe_load((CONFIGS / (named[1] if named else "quickstart.yaml")).read_text(encoding="utf-8"))
    overlay = yaml.safe_load(text)
    if "model" in overlay:
        assert all(p.is_meta for p in instantiate(merged(base, overlay)).model.model.parameters())
