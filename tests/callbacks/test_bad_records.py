"""What is left out is said, written and counted; latents that are not finite have no loss and are named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from tfusion.callbacks.bad_records import BadRecordReport
from tfusion.callbacks.training_metrics import TrainingMetrics
from tfusion.data.records import BadRecord
from tfusion.tokenizers import PixelTokenizer
from tfusion.training import transfusion


class Overflowing(PixelTokenizer):
    """Pixels, but no PixelTokenizer to the module: NaN for pictures whose first pixel is `broken`."""

    def __init__(self, broken: torch.Tensor) -> None:
        self.broken = broken

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        images = images.clone()
        images[(images[:, :, 0, 0] == self.broken).all(1), 1, 2, 3] = float("nan")
        return images


class Kept(Logger):
    """Rows by step."""

    name, version = "", ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics, step=None) -> None:
        self.rows[step] = dict(metrics)

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass


@pytest.fixture
def fit(tiny_module, tiny_data, tiny_trainer, pictures, monkeypatch):
    """`fit(broken picture, **data)` -> trainer, module, data, logged metrics by step."""

    def run(number: int | None, steps: int = 12, **data):
        # only the very class is spared the look for NaN
        monkeypatch.setattr("tfusion.training.transfusion.PixelTokenizer", type("Pixels", (PixelTokenizer,), {}))
        first = torch.full((3,), 9.0) if number is None else pictures.load("train")[number].image[:, 0, 0] / 127.5 - 1
        logger = Kept()
        callbacks = [BadRecordReport(), TrainingMetrics()]
        trainer = tiny_trainer(steps, callbacks=callbacks, log_every_n_steps=4, logger=logger)
        module, datamodule = tiny_module(image_tokenizer=Overflowing(first)), tiny_data(**data)
        trainer.fit(module, datamodule)
        return trainer, module, datamodule, logger.rows

    return run


def test_latents_that_are_not_finite_have_no_loss_and_are_named(fit, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        trainer, module, data, logged = fit(3, max_bad_share=0.2)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert all(metrics["train/loss"] == metrics["train/loss"] for metrics in logged.values())
    assert [(r.cause, r.key) for r in data.bad_records.records] == [("latents not finite", "picture-3")]
    assert logged[12]["data/bad_records"] == 1
    path = Path(trainer.default_root_dir, "bad_records.jsonl")
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["picture-3"]
    assert "picture-3" in caplog.text
    assert not module.latent_checks


def test_they_count_in_no_mean_by_quarter(fit, monkeypatch) -> None:
    counted = []

    def recorded(batch, losses, errors, timesteps, valid, num_timesteps):
        found = sums(batch, losses, errors, timesteps, valid, num_timesteps)
        counted.append((int(found[9:13].sum()), int((valid & (batch.noise_limits > 0)).sum())))
        broken = [key == "picture-3" for key in batch.image_keys]
        assert not valid[: len(broken)][torch.tensor(broken, dtype=torch.bool)].any()
        return found

    sums = transfusion.micro_batch_sums
    monkeypatch.setattr(transfusion, "micro_batch_sums", recorded)
    fit(3, max_bad_share=0.2)
    assert counted and all(by_quarter == good for by_quarter, good in counted)


def test_more_of_them_than_allowed_end_the_run(fit) -> None:
    with pytest.raises(ValueError, match=r"1 of 11 records are bad .*max_bad_share allows 5.00%"):
        fit(3, max_bad_share=0.05)


def test_finite_latents_change_nothing(fit, tiny_module, tiny_data, tiny_trainer) -> None:
    _, module, data, logged = fit(None)
    assert len(data.bad_records) == 0
    assert logged[12]["data/bad_records"] == 0
    plain = tiny_module()
    tiny_trainer(12).fit(plain, tiny_data())
    for (name, one), other in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_records_of_the_corpora_are_reported_at_start_and_end(tmp_path, caplog) -> None:
    from tfusion.data.bad_records import BadRecords

    bad = BadRecords(0.5)
    bad.add([BadRecord("cats", "truncated picture", "a.jpg", "a", "at byte 9"), BadRecord("cats", "x", "t.tar", "7")])
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(bad_records=bad),
        default_root_dir=str(tmp_path / "run"),
        is_global_zero=True,
        fast_dev_run=False,
        global_step=0,
    )
    callback = BadRecordReport()
    with caplog.at_level(logging.WARNING):
        callback.on_fit_start(trainer, None)
        callback.on_train_end(trainer, None)
    assert caplog.text.count("1 x truncated picture: a.jpg (at byte 9)") == 2
    assert "t.tar, 7" in caplog.text
    lines = (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["a.jpg", "t.tar"]
