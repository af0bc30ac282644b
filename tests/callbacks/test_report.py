"""`ValidationReport`: what it gathers, where it writes, and when it does nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from tests.report.made_up import picture, write_metrics
from tfusion.callbacks.report import ValidationReport
from tfusion.metrics.measurement import Example, Findings, Measurement


class Module(pl.LightningModule):
    """Logs a metric that no findings hold, and one that some do, as a float32 tensor is: not exactly."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.log_dict({"val/tiles/logged": 2.5, "val/tiles/fd": 0.1})


class Pictures(pl.Callback):
    """Measures pictures at the end of a validation."""

    def __init__(self) -> None:
        self.findings = Findings([Measurement("val/stale", 1.0, 1)])  # of an earlier validation

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        measurement = Measurement("val/tiles/fd", 0.1, 40, "an encoder", 0.02)
        examples = [Example("tiles", "picture", picture(n), f"prompt {n}") for n in range(5)]
        self.findings = Findings([measurement], examples, {"generation": 1.0, "network": 0.5})


class Texts(pl.Callback):
    """Measures texts."""

    findings = Findings([Measurement("val/lines/perplexity", float("nan"), 9)], seconds={"generation": 2.0})


class OtherFindings(pl.Callback):
    """A callback of someone else, that means something else by the word."""

    findings = "none"


class Data(pl.LightningDataModule):
    image_corpora = (SimpleNamespace(attribution="Tiles by Tiler"), SimpleNamespace())

    def val_dataloader(self) -> DataLoader:
        return DataLoader([0, 1])


def trainer_of(root: Path, **settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [Pictures(), OtherFindings(), Texts(), settings.pop("report", ValidationReport())]
    return pl.Trainer(default_root_dir=root, callbacks=callbacks, enable_checkpointing=False, **(quiet | settings))


def save(path: Path, step: int) -> str:
    """A checkpoint of `Module`, which has no weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "global_step": step, "pytorch-lightning_version": pl.__version__}, path)
    return str(path)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "my run"
    root.mkdir()
    (root / "config.yaml").write_text("seed: 1  # <i>\n")
    write_metrics(root / "metrics.csv")
    (root / "events.out.tfevents.1").write_bytes(b"\0events")
    return root


def test_findings_and_logged_metrics_in_one_table_one_file_and_one_page(run: Path, capsys) -> None:
    checkpoint = save(run / "checkpoints" / "best.ckpt", 77)
    before = contents(run)
    trainer_of(run).validate(Module(), datamodule=Data(), ckpt_path=checkpoint, verbose=False)
    after = contents(run)
    assert {name: after.pop(name) for name in before} == before
    assert set(after) == {"validation.json", "report.html"}  # no temporary file is left

    read = json.loads(after["validation.json"])
    assert read["measurements"] == [
        {"name": "val/tiles/fd", "value": 0.1, "n": 40, "network": "an encoder", "standard_error": 0.02},
        {"name": "val/lines/perplexity", "value": None, "n": 9, "network": None, "standard_error": None},
        {"name": "val/tiles/logged", "value": 2.5, "n": None, "network": None, "standard_error": None},
    ]
    assert read["seconds"] == {"generation": 3.0, "network": 0.5}
    assert (read["run"], read["step"], read["checkpoint"]) == ("my run", 77, "checkpoints/best.ckpt")
    assert (read["precision"], read["processes"]) == ("32-true", 1)
    assert read["versions"]["torch"] == torch.__version__

    output = capsys.readouterr().out
    table = output[output.index("metric ") :].splitlines()
    assert [line.split()[:3] for line in table[1:4]] == [
        ["val/tiles/fd", "0.1000", "40"],
        ["val/tiles/logged", "2.5000"],
        ["val/lines/perplexity", "nan", "9"],
    ]
    assert table[4].startswith("seconds: generation 3.0, network 0.5, in all ")
    assert table[5:] == [str(run / "validation.json"), str(run / "report.html")]

    page = after["report.html"].decode()
    assert page.count("<img") == 5 and "prompt 4" in page
    assert "seed: 1  # &lt;i&gt;" in page and "<h2>Curves</h2>" in page
    assert page.index("Tiles by Tiler") > page.index("</main>")


def test_a_second_validation_replaces_the_first_whole(run: Path) -> None:
    for step in (5, 6):
        checkpoint = save(run / "checkpoints" / "last.ckpt", step)
        trainer_of(run).validate(Module(), datamodule=Data(), ckpt_path=checkpoint, verbose=False)
        assert json.loads((run / "validation.json").read_text())["step"] == step


def test_checkpoints_are_named_relative_to_the_run_folder_if_inside(run: Path, tmp_path: Path) -> None:
    outside = save(tmp_path / "elsewhere.ckpt", 3)
    trainer_of(run).validate(Module(), datamodule=Data(), ckpt_path=outside, verbose=False)
    assert json.loads((run / "validation.json").read_text())["checkpoint"] == outside
    link = tmp_path / "link"
    link.symlink_to(run)
    inside = save(run / "checkpoints" / "last.ckpt", 3)
    trainer_of(link).validate(Module(), datamodule=Data(), ckpt_path=inside, verbose=False)
    assert json.loads((run / "validation.json").read_text())["checkpoint"] == "checkpoints/last.ckpt"


def test_without_checkpoint_config_or_metrics(tmp_path: Path) -> None:
    root = tmp_path / "new" / "run"
    trainer_of(root).validate(Module(), DataLoader([0]), verbose=False)
    assert set(contents(root)) == {"validation.json", "report.html"}
    assert json.loads((root / "validation.json").read_text())["checkpoint"] is None
    page = (root / "report.html").read_text()
    assert "Configuration" not in page and "Curves" not in page and "<footer>" not in page


def test_examples_limits_the_pictures(run: Path) -> None:
    trainer_of(run, report=ValidationReport(examples=2)).validate(Module(), datamodule=Data(), verbose=False)
    page = (run / "report.html").read_text()
    assert page.count("<img") == 2 and "The first 2." in page
    with pytest.raises(ValueError, match=r"report.examples is -1, expected 0"):
        ValidationReport(examples=-1)


def trainer_like(run: Path, **changed: Any) -> SimpleNamespace:
    """What the callback asks of a trainer."""
    settings: dict[str, Any] = {"default_root_dir": str(run), "state": SimpleNamespace(fn="validate")}
    settings |= {"sanity_checking": False, "fast_dev_run": False, "is_global_zero": True, "callbacks": [Texts()]}
    settings |= {"callback_metrics": {}, "ckpt_path": None, "global_step": 4, "precision": "32-true"}
    return SimpleNamespace(**(settings | {"world_size": 2, "datamodule": None} | changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"is_global_zero": False},
        {"state": SimpleNamespace(fn="fit")},
        {"sanity_checking": True},
        {"fast_dev_run": True},
    ],
)
def test_rank_0_of_validate_alone_speaks_and_writes(run: Path, capsys, changed: dict[str, Any]) -> None:
    before = contents(run)
    ValidationReport().on_validation_end(trainer_like(run, **changed), Module())
    assert contents(run) == before and not capsys.readouterr().out
    ValidationReport().on_validation_end(trainer_like(run), Module())
    assert json.loads((run / "validation.json").read_text())["processes"] == 2
    assert capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(run: Path, monkeypatch) -> None:
    report = ValidationReport()
    report.setup(trainer_like(run), Module(), "validate")
    report.setup(trainer_like(run / "not" / "yet"), Module(), "validate")
    with pytest.raises(ValueError, match="cannot be written; pass another one with --trainer.default_root_dir"):
        report.setup(trainer_like(run / "config.yaml"), Module(), "validate")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(ValueError, match="my run, which cannot be written"):
        report.setup(trainer_like(run), Module(), "validate")
    report.setup(trainer_like(run), Module(), "fit")
