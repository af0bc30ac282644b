"""Every YAML parses against the real constructors, says how to run it, and gives a model on the meta device."""

from __future__ import annotations

import re
from pathlib import Path

import lightning as L
import pytest
import yaml
from jsonargparse import ArgumentParser

from tests.data.latent_caches import save_autoencoder
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.training.encoding import CorpusEncoder

CONFIGS = Path(__file__).parents[1] / "configs"
ENCODE = CONFIGS / "encode.yaml"  # trains nothing
BASES = sorted(path for path in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("small/*.yaml")] if path != ENCODE)
OVERLAYS = sorted(path for path in CONFIGS.rglob("*.yaml") if path not in [ENCODE, *BASES])


@pytest.fixture(autouse=True)
def where_autoencoders_are(config_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in configs are relative to where a command is run."""
    monkeypatch.chdir(config_folder)


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


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", BASES, ids=name_of)
def test_base(path):
    """Header with command, time and result; parses; model and data agree before any data is read."""
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\n\n")]
    assert f"tfusion fit --config configs/{name_of(path)}" in header
    assert re.search(r"\b(minutes|hours|days)\b", header), "how long it takes"
    assert "Expected" in header, "what comes out"
    settings = yaml.safe_load(text)
    built = instantiate(settings)
    model = built.model.model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.vocab_size == built.data.vocab_size
    assert model.max_seq_len >= built.data.seq_len
    assert settings["trainer"]["max_steps"] > 0
    assert settings["trainer"]["default_root_dir"] == f"runs/{name_of(path).removesuffix('.yaml').replace('/', '_')}"


def test_encode(tmp_path):
    """Header with command, time and result; parses with an autoencoder in its place."""
    text = ENCODE.read_text(encoding="utf-8")
    header = text[: text.index("\n\n")]
    assert "tfusion predict --config configs/encode.yaml" in header
    assert "minutes" in header and "Expected" in header
    settings = yaml.safe_load(text)
    settings["model"]["init_args"]["image_tokenizer"]["init_args"]["path"] = save_autoencoder(tmp_path)
    built = instantiate(settings)
    assert isinstance(built.model, CorpusEncoder) and len(built.data.image_corpora) == 1
    assert settings["trainer"]["default_root_dir"] == "runs/encode"


@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_overlay(path):
    """At most 20 lines, a header with a command, and valid on the base that it names, at both scales."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 20
    assert text.startswith("#")
    assert f"--config configs/{name_of(path)}" in text
    base = re.search(r"--config (?:configs/)?(\S+)\.yaml", text).group(1).replace("BASE", "quickstart")
    overlay = yaml.safe_load(text)
    if "model" not in overlay and path.parent.name != "ablation":  # others name corpora that may not be here
        return
    scales = [base, *([f"small/{base}"] if base in ("transfusion", "chameleon") else [])]
    for base in scales:
        built = instantiate(merged(yaml.safe_load((CONFIGS / f"{base}.yaml").read_text(encoding="utf-8")), overlay))
        encodes = isinstance(built.model, CorpusEncoder)  # which has no model of its own
        assert encodes or all(p.is_meta for p in built.model.model.parameters())


COMMAND = re.compile(r"tfusion (fit|predict) ((?:--[\w.]+ [\w./]+ ?)+)")


def folder_of(arguments: str) -> str:
    """The run folder of a command's configs and options, the last word counting."""
    root = ""
    words = arguments.split()
    for name, value in zip(words[::2], words[1::2], strict=True):
        if name == "--config" and "BASE" not in value:
            settings = yaml.safe_load((CONFIGS.parent / value).read_text(encoding="utf-8"))
            root = settings.get("trainer", {}).get("default_root_dir", root)
        elif name == "--trainer.default_root_dir":
            root = value
    return root


def test_caches_are_read_where_commands_write_them_and_no_other_run_is_there():
    """The commands in headers, together: each cache that a config reads is written by one."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(CONFIGS.rglob("*.yaml"))}
    folders = {"fit": set(), "predict": set()}
    for text in texts.values():
        for kind, arguments in COMMAND.findall(text):
            if "--ckpt_path" not in arguments:  # of a trained model
                folders[kind].add(folder_of(arguments))
    assert folders["predict"] == {"runs/encode", "runs/encode_ids", "runs/flickr8k_latents"}
    assert not folders["fit"] & folders["predict"]
    read = {found for text in texts.values() for found in re.findall(r"path: (\S+)/latents\b", text)}
    assert read == folders["predict"]
