"""Predictions are written as they are made, merged over ranks in order, and replace an earlier run's."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from tfusion.callbacks.writer import PredictionWriter
from tfusion.requests import Generation, Request


def _picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8))


READ = _picture(101)
READ.info["path"] = "pictures/cat.png"  # as `parse_request` leaves it
REQUESTS = [
    Request(("red heart",), "image", n=2, seed=7),
    Request((_picture(100), READ), "text"),
    Request(("To be",), "any"),
]


def _samples(number: int) -> list[Generation]:
    if number == 0:
        return [Generation(0, k, (_picture(k),)) for k in range(2)]
    if number == 1:
        return [Generation(1, 0, ("caf\u00e9\n\u2028",))]
    return [Generation(2, 0, ("or", _picture(2), "not", _picture(3)))]


HEART = {"seed": 7, "prompt": [{"text": "red heart"}]}
LINES = [
    {"request": 0, "sample": 0, **HEART, "segments": [{"image": "000000-0-0.png"}]},
    {"request": 0, "sample": 1, **HEART, "segments": [{"image": "000000-1-0.png"}]},
    {
        "request": 1,
        "sample": 0,
        "seed": 0,
        "prompt": [{"image": None}, {"image": "pictures/cat.png"}],
        "segments": [{"text": "caf\u00e9\n\u2028"}],
    },
    {
        "request": 2,
        "sample": 0,
        "seed": 0,
        "prompt": [{"text": "To be"}],
        "segments": [
            {"text": "or"},
            {"image": "000002-0-0.png"},
            {"text": "not"},
            {"image": "000002-0-1.png"},
        ],
    },
]


class Data(pl.LightningDataModule):
    def __init__(self, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.order, self.requests = order, REQUESTS

    def predict_dataloader(self) -> DataLoader:
        return DataLoader([(i, REQUESTS[i]) for i in self.order], batch_size=1, collate_fn=list)

    def transfer_batch_to_device(self, batch: object, device: object, dataloader_idx: int) -> object:
        return batch  # Lightning's own refuses frozen dataclasses


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref] = []

    def predict_step(self, batch: list[tuple[int, Request]], batch_idx: int) -> list[Generation]:
        gc.collect()
        assert all(reference() is None for reference in self.alive[:-1])  # nothing is kept of earlier batches
        generations = _samples(batch[0][0])
        self.alive.append(weakref.ref(generations[0]))
        return generations


def _predict(folder: Path, order: tuple[int, ...] = (0, 1, 2)) -> None:
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=[PredictionWriter()],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.predict(Module(), Data(order), return_predictions=False)


def _lines(folder: Path) -> list[dict]:
    content = (folder / "predictions" / "predictions.jsonl").read_bytes()
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def _check(folder: Path) -> None:
    """All of `LINES`, their pictures and the sheet, and nothing else."""
    assert _lines(folder) == LINES
    pictures = {"000000-0-0.png": 0, "000000-1-0.png": 1, "000002-0-0.png": 2, "000002-0-1.png": 3}
    for name, number in pictures.items():
        with Image.open(folder / "predictions" / name) as picture:
            assert np.array_equal(picture, _picture(number))
    names = {path.name for path in (folder / "predictions").iterdir()}
    assert names == {*pictures, "predictions.jsonl", "grid.png"}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_one_rank(tmp_path: Path, order: tuple[int, ...]) -> None:
    _predict(tmp_path, order)
    _check(tmp_path)


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "predictions"
    folder.mkdir()
    for name in (
        "000009-0-0.png",
        "predictions.rank5.jsonl",
        "predictions.jsonl",
        "grid.png",
        "1000000-0-0.png",
    ):
        (folder / name).write_text("of an earlier run")
    _predict(tmp_path)
    _check(tmp_path)
    (folder / "notes.txt").touch()
    _predict(tmp_path, (1,))
    assert _lines(tmp_path) == LINES[2:3]
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "predictions.jsonl", "grid.png"}


def test_an_unfinished_run_has_no_merged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _predict(tmp_path)
    monkeypatch.setattr(Module, "predict_step", lambda self, batch, batch_idx: 1 / (2 - batch[0][0]) and _samples(0))
    with pytest.raises(ZeroDivisionError):
        _predict(tmp_path)
    assert not (tmp_path / "predictions" / "predictions.jsonl").exists()
    rank_file = tmp_path / "predictions" / "predictions.rank0.jsonl"
    assert json.loads(rank_file.read_text().splitlines()[0]) == LINES[0]


def test_ranks_are_merged_in_order_each_sample_once(tmp_path: Path) -> None:
    def rank(number: int) -> SimpleNamespace:
        return SimpleNamespace(
            default_root_dir=str(tmp_path),
            global_rank=number,
            is_global_zero=number == 0,
            strategy=SimpleNamespace(barrier=lambda name: None),
            datamodule=Data(),
        )

    writers = [(PredictionWriter(), rank(number)) for number in range(3)]  # rank 2 has nothing to do
    for writer, trainer in writers:
        writer.on_predict_start(trainer, None)
    for (writer, trainer), numbers in zip(writers, ((2, 1), (1, 0), ()), strict=True):
        for number in numbers:  # request 1 comes from two ranks, as from a padded loader
            writer.write_on_batch_end(trainer, None, _samples(number), None, None, 0, 0)
    for writer, trainer in reversed(writers):
        writer.on_predict_end(trainer, None)
    _check(tmp_path)


def test_the_sheet_holds_the_first_64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Module,
        "predict_step",
        lambda self, batch, batch_idx: [Generation(0, k, (Image.new("RGB", (96, 96), "red"),)) for k in range(70)],
    )
    _predict(tmp_path, (0,))
    assert len(_lines(tmp_path)) == 70
    with Image.open(tmp_path / "predictions" / "grid.png") as sheet:
        red = (np.asarray(sheet) == (255, 0, 0)).all(-1).sum()
    assert red == 64 * 96 * 96
