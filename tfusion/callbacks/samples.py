"""`SampleGrid`: what the model makes of the same requests during training, on a sheet that one can read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from tfusion.data.sources import has_pixels
from tfusion.requests import Generation, Request, Segment
from tfusion.training.parallel import gather_lists

PADDING_PX = 8
TEXT_PX = 12
SMALL_TEXT_PX = 11
TITLE_PX = 14
LARGEST_PX = 256  # a larger picture is reduced to this side
MOST_LINES = 6  # under a picture; the whole text is in the .jsonl beside the sheet
TEXT_WIDTH_PX = 640
BLACK, GREY = "#111111", "#666666"


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

    `sample_requests` asks for pictures by their names and for the names of pictures from the same list, both
    from its
    beginning: the k-th picture given is the one that the k-th name belongs to.
    """
    names = [_text_of(request.segments) for request in requests if request.generate == "image"]
    given = [i for i, r in enumerate(requests) if r.generate == "text" and _pictures_of(r.segments)]
    return dict(zip(given, names, strict=False))


def log_image(trainer: pl.Trainer, key: str, image: np.ndarray) -> None:
    """Give `image`, uint8 (H, W, 3), to every logger that takes images; call it on rank 0."""
    for logger in trainer.loggers:
        experiment: Any = logger.experiment
        if hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(key, [image], step=trainer.global_step)
        elif hasattr(experiment, "add_image"):  # TensorBoard
            experiment.add_image(key, image, trainer.global_step, dataformats="HWC")


def draw_grid(
    items: Sequence[tuple[str, PILImage.Image]], columns: int = 8, cell_px: int = 96, title: str = ""
) -> PILImage.Image:
    """Pictures in rows of `columns`, each with its text wrapped beneath it.

    Args:
        items: text and picture, in reading order.
        columns: pictures a row, at most.
        cell_px: small pictures are enlarged, by a whole factor and without smoothing, to at least this side.
        title: a line above, or nothing.
    """
    font = ImageFont.load_default(size=TEXT_PX)
    pictures = [_fit(picture, cell_px) for _, picture in items]
    cell = max([cell_px, *(picture.width for picture in pictures)])
    labels = [_clip(wrap(text, font, cell)) for text, _ in items]
    rows = [range(i, min(i + columns, len(items))) for i in range(0, len(items), columns)]
    line_px = TEXT_PX + 3
    heights = [max(pictures[i].height + 4 + line_px * len(labels[i]) for i in row) for row in rows]

    width = PADDING_PX + min(columns, max(1, len(items))) * (cell + PADDING_PX)
    header = _text_block([(title, BLACK)], width, TITLE_PX) if title else None
    top = header.height if header else 0
    sheet = PILImage.new("RGB", (width, top + PADDING_PX + sum(h + PADDING_PX for h in heights)), "white")
    if header:
        sheet.paste(header, (0, 0))
    draw, y = ImageDraw.Draw(sheet), top + PADDING_PX
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = PADDING_PX + column * (cell + PADDING_PX)
            sheet.paste(pictures[i], (x, y))
            draw.rectangle((x - 1, y - 1, x + pictures[i].width, y + pictures[i].height), outline="#dddddd")
            for n, line in enumerate(labels[i]):
                draw.text((x, y + pictures[i].height + 4 + n * line_px), line, fill=BLACK, font=font)
        y += height + PADDING_PX
    return sheet


def draw_sheet(
    requests: Sequence[Request],
    generations: Sequence[Generation],
    title: str,
    answers: dict[int, str] | None = None,
    attribution: str = "",
    columns: int = 8,
) -> PILImage.Image:
    """Samples in three parts: pictures made, pictures given with what was written about them, text alone.

    Args:
        requests: `generation.request` is an index into them.
        generations: what was made.
        title: a line at the top.
        answers: the true text for a request that gives a picture, by index; drawn beneath the written one.
        attribution: of the pictures shown; small, at the bottom.
        columns: pictures a row, at most.
    """
    made, named, texts = [], [], []
    for generation in generations:
        request = requests[generation.request]
        prompt, written = _text_of(request.segments), _text_of(generation.segments)
        new_pictures, given = _pictures_of(generation.segments), _pictures_of(request.segments)
        if new_pictures:
            label = prompt + (f"\n+ {written}" if written else "")
            made += [(label, picture) for picture in new_pictures]
        elif given:
            answer = (answers or {}).get(generation.request)
            named.append((written + (f"\n(true: {answer})" if answer else ""), given[-1]))
        else:
            texts += [(prompt, GREY), (written, BLACK), ("", GREY)]
    parts = [_text_block([(title, BLACK)], TEXT_WIDTH_PX, TITLE_PX)]
    if made:
        parts.append(draw_grid(made, columns, title="Pictures made from the text beneath them"))
    if named:
        parts.append(draw_grid(named, columns, title="Text written about the pictures given"))
    width = max(TEXT_WIDTH_PX, *(part.width for part in parts))
    if texts:
        parts.append(_text_block([("Text written (the opening, given, in grey)", BLACK)], width, TITLE_PX))
        parts.append(_text_block(texts, width, TEXT_PX))
    if attribution:
        parts.append(_text_block([(attribution, GREY)], width, SMALL_TEXT_PX))
    sheet = PILImage.new("RGB", (width, sum(part.height for part in parts)), "white")
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height
    return sheet


def attribution_of(datamodule: object) -> str:
    """What the image corpora ask to be written where their pictures appear: their `attribution`, if any."""
    corpora = getattr(datamodule, "image_corpora", None) or []
    lines = [getattr(corpus, "attribution", "") for corpus in corpora]
    return "\n".join(dict.fromkeys(line for line in lines if line))


def wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width_px: float) -> list[str]:
    """Lines of `text` no wider than `width_px`; its own line ends are kept, too long words are cut."""
    lines = []
    for paragraph in text.expandtabs(4).splitlines() or [""]:
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width_px:
                line = longer
                continue
            if line:
                lines.append(line)
            while len(word) > 1 and font.getlength(word) > width_px:
                fits = max(1, next(n for n in range(len(word) + 1) if font.getlength(word[: n + 1]) > width_px))
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
    return lines


def _described(segments: Sequence[Segment], sheet: str) -> list[dict[str, str]]:
    """Segments as in `prompts.jsonl`; a picture is named by the sheet that shows it."""
    return [{"text": s} if isinstance(s, str) else {"image": sheet} for s in segments]


def _clip(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1] + "..."]


def _text_block(paragraphs: Sequence[tuple[str, str]], width: int, size: int) -> PILImage.Image:
    """Paragraphs of (text, colour), wrapped to `width` pixels, on white."""
    font = ImageFont.load_default(size=size)
    lines = [(line, color) for text, color in paragraphs for line in wrap(text, font, width - 2 * PADDING_PX)]
    block = PILImage.new("RGB", (width, PADDING_PX + len(lines) * (size + 4)), "white")
    draw = ImageDraw.Draw(block)
    for n, (line, color) in enumerate(lines):
        draw.text((PADDING_PX, PADDING_PX + n * (size + 4)), line, fill=color, font=font)
    return block


def _fit(picture: PILImage.Image, cell_px: int) -> PILImage.Image:
    picture = picture.convert("RGB")
    side = max(picture.size)
    if side < cell_px:
        factor = -(-cell_px // side)
        return picture.resize((picture.width * factor, picture.height * factor), PILImage.Resampling.NEAREST)
    if side > LARGEST_PX:
        picture.thumbnail((LARGEST_PX, LARGEST_PX), PILImage.Resampling.LANCZOS)
    return picture


def _text_of(segments: Sequence[str | PILImage.Image]) -> str:
    return "".join(segment for segment in segments if isinstance(segment, str)).strip()


def _pictures_of(segments: Sequence[str | PILImage.Image]) -> list[PILImage.Image]:
    return [segment for segment in segments if not isinstance(segment, str)]
