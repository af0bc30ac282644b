"""Sheets are readable and truthful, and are made when they should be, from the same requests each time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from tfusion.callbacks.samples import SampleGrid, log_image, true_names
from tfusion.callbacks.sheets import attribution_of, draw_grid, draw_sheet, wrap
from tfusion.requests import Generation, Request

RED, BLUE = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
REQUESTS = [
    Request(("red square",), "image"),
    Request(("blue square",), "image"),
    Request((RED,), "text"),
    Request(("To be",), "text"),
]


class Corpus:
    attribution = "Drawn by nobody, CC0"


class Data(pl.LightningDataModule):
    image_corpora = (Corpus(), Corpus(), object())

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int, int]] = []

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(100, 1), batch_size=1)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(1, 1), batch_size=1)

    def sample_requests(self, num_images: int, num_captions: int, num_texts: int) -> list[Request]:
        self.asked.append((num_images, num_captions, num_texts))
        return REQUESTS


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.generated_at: list[int] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.linear(batch).sum()

    def validation_step(self, batch: torch.Tensor) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def check_requests(self, requests: list[Request]) -> None:
        assert requests is not None

    def generate(self, requests: list[Request], numbers: list[int]) -> list[Generation]:
        assert numbers == list(range(len(requests)))
        assert not torch.is_grad_enabled()
        self.generated_at.append(self.trainer.global_step)
        segments = [(RED,), (BLUE,), ("red squid",), (", or not to be \u00e9",)]
        return [Generation(i, 0, s) for i, s in enumerate(segments)]


def _fit(folder: Path, every_n_steps: int, max_steps: int, **options: object) -> tuple[Module, Data]:
    module, data = Module(), Data()
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=max_steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        callbacks=[SampleGrid(every_n_steps, 2, 1, 1)],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"logger": False, "val_check_interval": 2, "num_sanity_val_steps": 1} | options),
    )
    trainer.fit(module, data)
    return module, data


def _contains(sheet: Image.Image, color: tuple[int, int, int], side: int) -> bool:
    """Whether there is a block of `side` x `side` pixels of one colour."""
    same = (np.asarray(sheet) == color).all(-1).astype(np.int64).cumsum(0).cumsum(1)
    same = np.pad(same, ((1, 0), (1, 0)))
    return bool(
        (same[side:, side:] - same[:-side, side:] - same[side:, :-side] + same[:-side, :-side]).max() == side**2
    )


def test_when_it_samples(tmp_path: Path) -> None:
    # Validations at 2, 4, 6, 8: the first at or after 3 is 4, after 6 is 6; 9 is the end of fit.
    module, data = _fit(tmp_path, every_n_steps=3, max_steps=9)
    assert module.generated_at == [4, 6, 9]
    assert data.asked == [(2, 1, 1)]  # asked once: the same requests all along
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"step={n:07d}.{kind}" for n in (4, 6, 9) for kind in ("jsonl", "png")]
    assert _fit(tmp_path, every_n_steps=4, max_steps=8)[0].generated_at == [4, 8]  # not twice at the end


def test_not_outside_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "global_step", 5)
    module = Module()
    callback = SampleGrid(1)
    options = {
        "default_root_dir": tmp_path,
        "logger": False,
        "accelerator": "cpu",
        "enable_progress_bar": False,
    }
    pl.Trainer(callbacks=[callback], **options).validate(module, Data(), verbose=False)
    assert module.generated_at == []
    assert not (tmp_path / "samples").exists()


def test_what_it_writes(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    _fit(tmp_path, every_n_steps=2, max_steps=2, logger=logger)
    path = tmp_path / "samples" / "step=0000002.png"
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    picture = {"image": "step=0000002.png"}
    common = {"step": 2, "sample": 0}
    assert lines == [
        {**common, "request": 0, "prompt": [{"text": "red square"}], "segments": [picture]},
        {**common, "request": 1, "prompt": [{"text": "blue square"}], "segments": [picture]},
        {
            **common,
            "request": 2,
            "prompt": [picture],
            "segments": [{"text": "red squid"}],
            "true": "red square",
        },
        {
            **common,
            "request": 3,
            "prompt": [{"text": "To be"}],
            "segments": [{"text": ", or not to be \u00e9"}],
        },
    ]
    with Image.open(path) as sheet:
        assert _contains(sheet, (255, 0, 0), 96)
        assert _contains(sheet, (0, 0, 255), 96)
        events = EventAccumulator(str(tmp_path)).Reload()
        (logged,) = events.Images("samples")
        assert (logged.step, logged.width, logged.height) == (2, *sheet.size)


def test_every_rank_generates_and_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    module, _ = _fit(tmp_path, every_n_steps=2, max_steps=2)
    assert module.generated_at == [2]
    assert not (tmp_path / "samples").exists()


def test_weights_and_biases_like_loggers_get_the_picture() -> None:
    calls = []
    wandb = SimpleNamespace(experiment=object(), log_image=lambda *a, **k: calls.append((a, k)))
    image = np.zeros((2, 2, 3), np.uint8)
    log_image(SimpleNamespace(loggers=[wandb, SimpleNamespace(experiment=None)], global_step=7), "samples", image)
    assert calls == [(("samples", [image]), {"step": 7})]


def test_small_pictures_are_enlarged_without_smoothing_and_large_ones_reduced() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    sheet = np.asarray(draw_grid([("noise", Image.fromarray(pixels))], title="t"))
    enlarged = pixels.repeat(3, 0).repeat(3, 1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, enlarged.shape)
    assert (windows == enlarged).all((-1, -2, -3)).any()
    large = draw_grid([("", Image.new("RGB", (1000, 500), "red"))])
    assert _contains(large, (255, 0, 0), 120)
    assert large.width < 300


def test_grid_has_rows_of_columns() -> None:
    items = [(str(i), RED) for i in range(5)]
    one, two, three = (draw_grid(items[:n], columns=2) for n in (2, 3, 5))
    assert one.width == two.width == three.width
    assert two.height - one.height == three.height - two.height > 96
    assert draw_grid([]).width >= 96


def test_the_text_is_drawn_beneath_its_picture() -> None:
    # Independent of the layout: only the pixels beneath the second picture differ when its text does.
    a, b = (np.asarray(draw_grid([("same", RED), (text, RED)])) for text in ("moon", "noon"))
    ys, xs = np.nonzero((a != b).any(-1))
    assert len(xs) > 0
    assert ys.min() > 96
    assert xs.min() > a.shape[1] / 2


def test_wrapping_keeps_all_characters_within_the_width() -> None:
    font = ImageFont.load_default(size=12)
    text = "a line that is too long for it\nsecond  line\n\n" + "w" * 50 + " end"
    lines = wrap(text, font, 80)
    assert all(font.getlength(line) <= 80 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace("\n", "").replace(" ", "")
    assert wrap("", font, 80) == [""]
    assert wrap("iiii", font, 1) == list("iiii")
    assert wrap("one\ntwo", font, 80) == ["one", "two"]


def test_sheet_shows_every_kind(tmp_path: Path) -> None:
    both = [Generation(0, 0, ("and", RED, BLUE)), Generation(3, 0, ("x" * 2000,))]
    sheet = draw_sheet(REQUESTS, both, "title")
    assert _contains(sheet, (255, 0, 0), 96)
    assert _contains(sheet, (0, 0, 255), 96)
    assert draw_sheet(REQUESTS, [], "title").height > 0
    without, attributed = (draw_sheet(REQUESTS, both, "t", attribution=a) for a in ("", attribution_of(Data())))
    assert attributed.height > without.height
    assert attribution_of(Data()) == "Drawn by nobody, CC0"
    assert attribution_of(None) == ""


def test_true_names_are_paired_in_order() -> None:
    requests = [
        Request(("a",), "image"),
        Request((RED,), "text"),
        Request((BLUE,), "text"),
        Request(("x",), "text"),
    ]
    assert true_names(requests) == {1: "a"}
    assert true_names([Request(("b",), "image"), *requests]) == {2: "b", 3: "a"}


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_steps 0"):
        SampleGrid(0)
    with pytest.raises(ValueError, match="num_images 0"):
        SampleGrid(1, 0, 0, 0)
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        callbacks=[SampleGrid(1)],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.raises(ValueError, match="needs a data module with sample_requests"):
        trainer.fit(Module(), DataLoader(torch.zeros(1, 1)))
