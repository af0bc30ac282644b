"""`PredictionWriter`: what `tfusion predict` makes, written into the run folder as soon as it is made."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image as PILImage

from tfusion.callbacks.sheets import attribution_of, draw_sheet
from tfusion.requests import Generation, Request
from tfusion.training.encoding import CorpusEncoder

log = logging.getLogger(__name__)
OURS = re.compile(r"\d{6,}-\d+-\d+\.png|predictions(\.rank\d+)?\.jsonl|grid\.png")
SAMPLES_IN_GRID = 64


class PredictionWriter(BasePredictionWriter):
    """Write each sample's pictures and its line; at the end merge the ranks' lines and draw `grid.png`.

    `predictions/` then holds `RRRRRR-S-K.png` (request, sample, number of the picture in the sample) and
    `predictions.jsonl`, sorted: `{"request": 0, "sample": 0, "seed": 0, "prompt": [{"text": "a"}, {"image": "b.png"}],
    "segments": [{"text": "..."}, {"image": "000000-0-0.png"}]}`, with the path of a picture in the prompt as the
    prompts have it, or null where it had none. The file appears when all is done; until then `predictions.rankK.jsonl`
    grow. What an earlier run wrote there is removed at the start; other files are left alone. Expects `predict_step` to
    return `list[Generation]`; `CorpusEncoder` writes for itself.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clear the folder of an earlier run's predictions."""
        if isinstance(pl_module, CorpusEncoder):
            return
        folder = _folder(trainer)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if OURS.fullmatch(path.name):
                    path.unlink()
        trainer.strategy.barrier("predictions_cleared")
        self._rank_file(trainer).touch()

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: list[Generation],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch's samples; nothing is kept."""
        if isinstance(pl_module, CorpusEncoder):
            return
        requests = trainer.datamodule.requests  # type: ignore[attr-defined]
        with self._rank_file(trainer).open("a", encoding="utf-8") as file:
            for generation in prediction:
                line = _write_images(generation, requests[generation.request], _folder(trainer))
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge and draw, on rank 0."""
        if isinstance(pl_module, CorpusEncoder):
            return
        trainer.strategy.barrier("predictions_written")
        if not trainer.is_global_zero:
            return
        folder = _folder(trainer)
        parts = sorted(folder.glob("predictions.rank*.jsonl"))
        merged = folder / "predictions.jsonl"
        temporary = folder / ".predictions.jsonl.tmp"
        _merge(parts, temporary)
        os.replace(temporary, merged)
        for part in parts:
            part.unlink()
        self._draw(trainer, merged)
        log.info("predictions: %s, the first of them drawn in %s", merged, merged.with_name("grid.png"))

    def _draw(self, trainer: pl.Trainer, merged: Path) -> None:
        requests = trainer.datamodule.requests  # type: ignore[attr-defined]
        with merged.open(encoding="utf-8") as file:
            generations = [_read(json.loads(line), merged.parent) for line in islice(file, SAMPLES_IN_GRID)]
        if not generations:
            return
        title = f"predictions: the first {len(generations)} samples"
        sheet = draw_sheet(requests, generations, title, attribution=attribution_of(trainer.datamodule))
        temporary = merged.with_name(".grid.png.tmp")
        sheet.save(temporary, format="PNG")
        os.replace(temporary, merged.with_name("grid.png"))

    @staticmethod
    def _rank_file(trainer: pl.Trainer) -> Path:
        return _folder(trainer) / f"predictions.rank{trainer.global_rank}.jsonl"


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir, "predictions")


def _write_images(generation: Generation, request: Request, folder: Path) -> dict[str, Any]:
    """Write the sample's pictures, return its line."""
    segments: list[dict[str, str]] = []
    images = 0
    for segment in generation.segments:
        if isinstance(segment, str):
            segments.append({"text": segment})
            continue
        name = f"{generation.request:06d}-{generation.sample}-{images}.png"
        segment.save(folder / name, format="PNG")
        segments.append({"image": name})
        images += 1
    prompt = [
        {"text": segment} if isinstance(segment, str) else {"image": segment.info.get("path")}
        for segment in request.segments
    ]
    made = {"request": generation.request, "sample": generation.sample, "seed": request.seed}
    return made | {"prompt": prompt, "segments": segments}


def _read(line: dict[str, Any], folder: Path) -> Generation:
    """The inverse of `_write_images`."""
    segments = []
    for segment in line["segments"]:
        if "text" in segment:
            segments.append(segment["text"])
        else:
            with PILImage.open(folder / segment["image"]) as image:
                segments.append(image.convert("RGB"))
    return Generation(line["request"], line["sample"], tuple(segments))


def _merge(parts: Sequence[Path], target: Path) -> None:
    """All lines of `parts`, by (request, sample), each sample once; only their places are held in memory."""
    places: dict[tuple[int, int], tuple[int, int]] = {}
    files: list[BinaryIO] = [part.open("rb") for part in parts]
    try:
        for number, file in enumerate(files):
            start = 0
            for line in file:
                parsed = json.loads(line)
                places[parsed["request"], parsed["sample"]] = number, start
                start += len(line)
        with target.open("wb") as out:
            for _, (number, start) in sorted(places.items()):
                files[number].seek(start)
                out.write(files[number].readline())
    finally:
        for file in files:
            file.close()
