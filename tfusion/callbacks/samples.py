"""`SampleGrid`: what the model makes of the same requests during training, on a sheet that one can read."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from tfusion.callbacks.sheets import attribution_of, draw_sheet, pictures_of, text_of
from tfusion.data.sources import has_pixels
from tfusion.requests import Generation, Request, Segment
from tfusion.training.parallel import gather_lists

log = logging.getLogger(__name__)


class SampleGrid(pl.Callback):
    """Write `samples/step=NNNNNNN.png` and `.jsonl` (a line a sample) in the run folder, and log the picture.

    At the first validation at or after each multiple of `every_n_steps`, and at the end of fit. The requests
    are the data module's `sample_requests(num_images, num_captions, num_texts)` and stay the same over the
    run, seeds included. Ranks share the requests; rank 0 writes what one process would.

    Args:
        every_n_steps: optimizer steps between sheets.
        num_images: pictures made from text.
        num_captions: texts written about given pictures.
        num_texts: texts continued.
    """

    def __init__(
        self, every_n_steps: int = 1000, num_images: int = 16, num_captions: int = 8, num_texts: int = 2
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"samples: got every_n_steps {every_n_steps}, expected at least 1")
        if min(num_images, num_captions, num_texts) < 0 or num_images + num_captions + num_texts == 0:
            raise ValueError(
                f"samples: got num_images {num_images}, num_captions {num_captions}, num_texts {num_texts}; "
                "expected none below 0 and one above it (leave the callback out for no samples)"
            )
        self.every_n_steps = every_n_steps
        self.numbers = num_images, num_captions, num_texts
        self._requests: list[Request] | None = None
        self._last_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a run that nothing could be sampled from, or no pictures as they are asked for."""
        if stage == "fit" and not hasattr(trainer.datamodule, "sample_requests"):
            raise ValueError(
                "SampleGrid needs a data module with sample_requests(), got "
                f"{type(trainer.datamodule).__name__}; use MultimodalDataModule or leave the callback out"
            )
        pictures = self.numbers[0] > 0 and getattr(trainer.datamodule, "image_corpora", None)
        if stage == "fit" and pictures and hasattr(pl_module, "generation"):
            pl_module.check_requests([Request(("",), "image", config=pl_module.generation)])
        asks = stage == "fit" and self.numbers[1] > 0 and hasattr(trainer.datamodule, "sample_pictures")
        if asks and not has_pixels(trainer.datamodule.sample_pictures()):
            raise ValueError(
                f"samples.num_captions is {self.numbers[1]}, but the corpora are latents without pictures: set it "
                "to 0, or encode them again with --model.init_args.pictures held_out"
            )

    def state_dict(self) -> dict[str, int]:
        """A resumed run makes the sheets of an unbroken one."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._last_step = state_dict["last_step"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample if a multiple of `every_n_steps` has been reached since the last sheet."""
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != "fit":
            return
        if trainer.global_step // self.every_n_steps > self._last_step // self.every_n_steps:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last sheet, unless the last validation has made it."""
        if trainer.global_step > self._last_step and not trainer.fast_dev_run:
            self._sample(trainer, pl_module)

    @torch.no_grad()
    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        if not hasattr(pl_module, "generate"):
            return  # nothing to show
        if self._requests is None:
            self._requests = trainer.datamodule.sample_requests(*self.numbers)  # type: ignore[attr-defined]
        pl_module.check_requests(self._requests)  # all of them on every rank, so that all refuse
        mine = slice(trainer.global_rank, None, trainer.world_size)
        numbers = list(range(len(self._requests)))[mine]
        if trainer.is_global_zero:  # it may take a minute
            log.info("samples: making %d for a sheet", len(self._requests))
        # (a rank without any takes part: gathering the weights is a collective)
        generations = gather_lists(pl_module.generate(self._requests[mine], numbers))
        generations.sort(key=lambda generation: (generation.request, generation.sample))
        if trainer.is_global_zero:
            self._write(trainer, self._requests, generations)

    def _write(self, trainer: pl.Trainer, requests: list[Request], generations: list[Generation]) -> None:
        answers = true_names(requests)
        title = f"step {trainer.global_step}"
        sheet = draw_sheet(requests, generations, title, answers, attribution_of(trainer.datamodule))
        folder = Path(trainer.default_root_dir, "samples")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step={trainer.global_step:07d}.png"

        lines = []
        for generation in generations:
            line = {
                "step": trainer.global_step,
                "request": generation.request,
                "sample": generation.sample,
                "prompt": _described(requests[generation.request].segments, path.name),
                "segments": _described(generation.segments, path.name),
            }
            if generation.request in answers:
                line["true"] = answers[generation.request]
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")

        temporary = path.with_name(f".{path.name}.tmp")
        sheet.save(temporary, format="PNG")
        os.replace(temporary, path)
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, path.with_suffix(".jsonl"))
        log_image(trainer, "samples", np.asarray(sheet))


def true_names(requests: Sequence[Request]) -> dict[int, str]:
    """The true text for each request that gives a picture, by index, as far as it is known.

    `sample_requests` asks for pictures by their names and for the names of pictures from the same list, both from its
    beginning: the k-th picture given is the one that the k-th name belongs to.
    """
    names = [text_of(request.segments) for request in requests if request.generate == "image"]
    given = [i for i, r in enumerate(requests) if r.generate == "text" and pictures_of(r.segments)]
    return dict(zip(given, names, strict=False))


def log_image(trainer: pl.Trainer, key: str, image: np.ndarray) -> None:
    """Give `image`, uint8 (H, W, 3), to every logger that takes images; call it on rank 0."""
    for logger in trainer.loggers:
        experiment: Any = logger.experiment
        if hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(key, [image], step=trainer.global_step)
        elif hasattr(experiment, "add_image"):  # TensorBoard
            experiment.add_image(key, image, trainer.global_step, dataformats="HWC")


def _described(segments: Sequence[Segment], sheet: str) -> list[dict[str, str]]:
    """Segments as in `prompts.jsonl`; a picture is named by the sheet that shows it."""
    return [{"text": s} if isinstance(s, str) else {"image": sheet} for s in segments]
