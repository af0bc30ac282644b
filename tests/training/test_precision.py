"""bf16-mixed on a CPU that has no instructions for it: fp32 in its place, said, and nothing else changes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import yaml

from tests.test_cli import CONFIG
from tfusion import __main__ as cli
from tfusion.loading import load
from tfusion.training import trainer_settings


class Built(cli.TfusionCLI):
    """The command line up to where it would train."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is the CUDA device here")
@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_run_takes_what_its_cpu_has(tmp_path: Path, monkeypatch, caplog, has_bf16: bool, accelerator: str) -> None:
    monkeypatch.setattr(trainer_settings, "has_bf16", lambda device_type: device_type != "cpu" or has_bf16)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    args = ["fit", "--config", str(tmp_path / "tiny.yaml"), "--trainer.default_root_dir", str(tmp_path / "run")]
    with caplog.at_level(logging.WARNING, logger="tfusion"):
        built = cli.run(Built, [*args, "--trainer.precision", "bf16-mixed", "--trainer.accelerator", accelerator])
    assert built.trainer.precision == ("bf16-mixed" if has_bf16 else "32-true")
    assert ("45 times as long in bf16-mixed" in caplog.text) is not has_bf16
    assert built.config.fit.trainer.precision == "bf16-mixed", "elsewhere the run goes on in what was asked for"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_refused_in_words(tmp_path: Path, capsys) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    args = ["fit", "--config", str(tmp_path / "tiny.yaml"), "--trainer.default_root_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        cli.run(Built, [*args, "--trainer.accelerator", "gpu"])
    assert "torch finds no CUDA device; on a CPU add --config configs/trainer/cpu.yaml" in capsys.readouterr().err


def test_what_is_loaded_generates_in_what_the_device_has(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trainer_settings, "has_bf16", lambda device_type: device_type != "cpu")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    args = ["fit", "--config", str(tmp_path / "tiny.yaml"), "--trainer.default_root_dir", str(tmp_path / "run")]
    cli.run(cli.TfusionCLI, [*args, "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "3"])
    module = load(tmp_path / "run", device="cpu")
    assert module.precision == "32-true"
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    weights = module.state_dict()  # the averaged ones, and nothing beside them
    assert module.evaluation_model is module.model and len(weights) == len(saved) / 2
    assert all(torch.equal(weight, saved[f"ema_{name}"]) for name, weight in weights.items())
    assert any(not torch.equal(weight, saved[name]) for name, weight in weights.items())
    monkeypatch.setattr(trainer_settings, "has_bf16", lambda device_type: True)
    assert load(tmp_path / "run", device="cpu").precision == "bf16-mixed"


def test_on_a_gpu_it_is_what_was_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(trainer_settings, "has_bf16", lambda device_type: device_type != "cpu")
    assert trainer_settings.precision_on("cuda", "bf16-mixed") == "bf16-mixed"
    assert trainer_settings.precision_on("cpu", "32-true") == "32-true"
    assert trainer_settings.precision_on("cpu", "bf16-mixed") == "32-true"
