"""GenEval (Ghosh et al. 2023, https://github.com/djghosh13/geneval): its prompts, its folder, its summary.

GenEval's own evaluate_images.py finds the objects; it needs mmdetection, a detector's weights and a CUDA device, and
runs in an environment of its own. Before and after it stands what is here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tfusion.bench.protocol_files import field, read_lines, read_predictions

SAMPLES = 4  # pictures a prompt, as in the paper


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """The lines of GenEval's evaluation_metadata.jsonl: `prompt`, `tag`, and what must be in the picture.

    Raises:
        ValueError: no such file, an empty one, or a line without these keys; names the line.
    """
    lines = read_lines(path)
    for where, line in lines:
        for key in ("prompt", "tag"):
            if not field(line, key, str, where).strip():
                raise ValueError(f"{where}: {key!r} is empty")
        field(line, "include", list, where)
    return [line for _, line in lines]


def requests(metadata: list[dict[str, Any]], samples: int = SAMPLES) -> list[dict[str, Any]]:
    """A request of `samples` pictures a prompt, the i-th with seed i."""
    return [
        {"segments": [line["prompt"]], "generate": "image", "n": samples, "seed": i} for i, line in enumerate(metadata)
    ]


def write_folder(metadata: list[dict[str, Any]], predictions: Path, out: Path, samples: int = SAMPLES) -> None:
    """Copy predictions into the folder that evaluate_images.py reads.

        00000/metadata.jsonl  00000/samples/0000.png ... 0003.png  00001/ ...

    Args:
        metadata: the lines that the prompts were made of, in their order.
        predictions: the folder `predictions` of the run.
        out: must not exist, or be empty: pictures of another model there would be scored, too.

    Raises:
        ValueError: predictions are missing, a sample is not one picture, or `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; give a new folder, or delete this one")
    found = read_predictions(predictions, len(metadata), samples)
    folder = predictions if predictions.is_dir() else predictions.parent
    pictures: list[list[Path]] = []
    for number, own in enumerate(found):
        pictures.append([])
        for sample, segments in enumerate(own):
            images = [folder / segment["image"] for segment in segments if "image" in segment]
            if len(images) != 1 or not images[0].is_file():
                raise ValueError(
                    f"request {number}, sample {sample} of {folder} should be one picture; "
                    f"got {[image.name for image in images]}{', which is not there' if len(images) == 1 else ''}"
                )
            pictures[-1] += images
    for number, (line, own) in enumerate(zip(metadata, pictures, strict=True)):
        samples_folder = out / f"{number:05d}" / "samples"
        samples_folder.mkdir(parents=True)
        (samples_folder.parent / "metadata.jsonl").write_text(json.dumps(line), encoding="utf-8")
        for sample, picture in enumerate(own):
            shutil.copyfile(picture, samples_folder / f"{sample:04d}.png")


def summary(results: Path) -> dict[str, Any]:
    """What summary_scores.py says of the results of evaluate_images.py.

    Returns:
        `tags`: accuracy, right and n (pictures) of each tag, in the order of the file; `overall`: the mean of the tags'
        accuracies, each tag counting the same; `correct_images`, `correct_prompts` (one of its pictures is right);
        `images` and `prompts`.

    Raises:
        ValueError: no such file, an empty one, or a line without `tag`, `correct` or `metadata`; names the line.
    """
    tags: dict[str, list[bool]] = {}
    prompts: dict[str, list[bool]] = {}  # metadata tells prompts apart, as there
    for where, line in read_lines(results):
        correct = field(line, "correct", bool, where)
        tags.setdefault(field(line, "tag", str, where), []).append(correct)
        prompts.setdefault(field(line, "metadata", str, where), []).append(correct)
    images = [correct for own in tags.values() for correct in own]
    return {
        "tags": {
            tag: {"accuracy": float(np.mean(own)), "right": int(np.sum(own)), "n": len(own)}
            for tag, own in tags.items()
        },
        "overall": float(np.mean([np.mean(own) for own in tags.values()])),
        "correct_images": float(np.mean(images)),
        "correct_prompts": float(np.mean([any(own) for own in prompts.values()])),
        "images": len(images),
        "prompts": len(prompts),
    }
