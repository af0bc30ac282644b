"""A validation that never was, with something of everything that a report can show."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from PIL import Image as PILImage

from tfusion.metrics.measurement import Example, Measurement
from tfusion.report.curves import read_curves
from tfusion.report.page import render
from tfusion.report.validation import Validation

EVIL = "<script>alert('a & b')</script> \"quoted\" $x_1$ " + "long" * 40
NETWORK = "an encoder with a name that is quite long, sha256:0123456789abcdef"
CONFIG = "model:\n  name: <b>bold</b>\n  line: " + "x" * 400 + "\n"


def picture(number: int, side: int = 32) -> PILImage.Image:
    """One colour a number, so that two pictures are never the same file."""
    return PILImage.new("RGB", (side, side), (number * 7 % 256, number * 31 % 256, 90))


def measurements() -> list[Measurement]:
    found = [
        Measurement("val/loss", 4.25, None),
        Measurement("val/lines/perplexity", 54.321, 1234, standard_error=0.0123),
        Measurement("val/tiles/fd_reference", 41.5, 320, NETWORK),
        Measurement("val/tiles/kd_reference", 0.00123, 320, NETWORK, standard_error=float("nan")),
        Measurement("val/tiles/broken", float("nan"), 0),
        Measurement("val/tiles/endless", float("inf"), 7, standard_error=float("inf")),
    ]
    for low, value in ((750, 0.4), (0, 0.1), (250, 0.2), (500, 0.3)):  # in no order
        name = f"val/tiles/diffusion_loss_t{low}-{low + 250}"
        found.append(Measurement(name, value, 64, standard_error=value / 10))
    return found


def examples() -> list[Example]:
    made = [Example("tiles", "picture", picture(40), EVIL)]
    made += [Example("tiles", "picture", picture(n), f"prompt {n}", "", n / 4, "clip_score") for n in range(40)]
    made += [Example("photos", "picture", picture(50 + n, 256), f"photo {n}") for n in range(3)]
    written = [
        Example("tiles", "caption", picture(60 + n), f"written {n}", f"truth {n}", n / 8, "match") for n in range(5)
    ]
    written.append(Example("tiles", "caption", picture(70), EVIL, truth="the truth"))
    written.append(Example("tiles", "caption", picture(71), "", truth="unsaid"))
    return made + written


def validation() -> Validation:
    return Validation(
        run="a run <1>",
        step=12345,
        checkpoint="checkpoints/last.ckpt",
        date=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        versions={"tfusion": "0.1.0", "torch": "2.14.0"},
        precision="bf16-mixed",
        processes=2,
        measurements=measurements(),
        examples=examples(),
        seconds={"losses": 1.25, "tiles: pictures": 20.5},
        total_seconds=23.0,
    )


def write_metrics(path: Path, steps: int = 40) -> None:
    """Training every step, validation every tenth; a torn line at the end."""
    columns = ["step", "train/loss", "train/text_loss", "train/diffusion_loss", "train/diffusion_loss_t0-500"]
    columns += ["train/diffusion_loss_t500-1000", "train/lr", "val/loss", "val/text_loss", "val/diffusion_loss"]
    columns += ["val/lines/perplexity", "val/tiles/perplexity", "val/tiles/diffusion_loss", "val/tiles/once"]
    lines = [",".join(columns)]
    for step in range(1, steps + 1):
        values = [step, 9 / step, 4 / step, 1 / step, 0.5 / step, 2 / step, 0.001, *[""] * 7]
        lines.append(",".join(map(str, values)))
        if step % 10 == 0:
            once = "1.5" if step == 10 else ""
            values = [step, *[""] * 6, 10 / step, 5 / step, 2 / step, 500 / step, 50 / step, 2 / step, once]
            lines.append(",".join(map(str, values)))
    path.write_text("\n".join(lines) + f"\n{steps + 1},0.1,0.2")


def page(folder: Path) -> str:
    """The report of all that is above."""
    write_metrics(folder / "metrics.csv")
    return render(validation(), read_curves(folder / "metrics.csv"), CONFIG, "Tiles by Tiler, CC BY\nPhotos by Ann")
