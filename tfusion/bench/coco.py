"""COCO both ways: prompts for pictures (COCO-30k), and captions for the pictures of the Karpathy test split.

Which pictures and captions are drawn is a function of the seed and COCO's own ids alone: not of the order of the file,
nor of a generator's version.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from tfusion.bench.protocol_files import field, read_json, read_predictions


def draw_order(seed: int, *key: object) -> bytes:
    """Where something stands in an order drawn by `seed`: a hash of its key."""
    return hashlib.sha256("/".join(map(str, (seed, *key))).encode()).digest()


def image_requests(annotations: Path, number: int, seed: int) -> tuple[list[dict[str, Any]], int]:
    """One random caption of each of `number` random pictures, as requests for pictures.

    Args:
        annotations: COCO's captions_val2014.json (40,504 pictures of five captions or more).
        number: pictures; the papers' 30,000.
        seed: another seed, another draw.

    Returns:
        The requests, the i-th with seed i, and how many captions were left out because they are blank.

    Raises:
        ValueError: not such a file, a wrong annotation (named by its place), or fewer pictures than `number`.
    """
    content = read_json(annotations)
    if not isinstance(content, dict):
        raise ValueError(f"{annotations}: got {type(content).__name__}, expected an object with 'annotations'")
    captions: dict[int, dict[int, str]] = {}  # by picture, by annotation
    blank = 0
    for place, annotation in enumerate(field(content, "annotations", list, str(annotations))):
        where = f"{annotations}, annotations[{place}]"
        if not isinstance(annotation, dict):
            raise ValueError(f"{where}: got {annotation!r}, expected an object")
        picture, own = field(annotation, "image_id", int, where), field(annotation, "id", int, where)
        text = " ".join(field(annotation, "caption", str, where).split())
        if text:
            captions.setdefault(picture, {})[own] = text
        blank += not text
    if number < 1 or len(captions) < number:
        raise ValueError(
            f"got --number {number}, but {annotations} has captions of {len(captions)} pictures; "
            f"expected 1 to {len(captions)}"
        )
    pictures = sorted(captions, key=lambda picture: draw_order(seed, picture))[:number]
    chosen = [captions[p][min(captions[p], key=lambda own: draw_order(seed, p, own))] for p in pictures]
    requests = [{"segments": [text], "generate": "image", "seed": i} for i, text in enumerate(chosen)]
    return requests, blank


def karpathy_split(path: Path, split: str) -> list[tuple[Path, tuple[str, ...]]]:
    """(picture's path in the folder of pictures, its captions) of a split of Karpathy's JSON, in its order.

    Args:
        path: dataset_coco.json (dataset_flickr8k.json and dataset_flickr30k.json have the same form).
        split: `test`, for COCO 5,000 pictures.

    Raises:
        ValueError: not such a file, a wrong entry (named by its place), or nothing of this split.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, expected an object with 'images'")
    found, splits = [], set()
    for place, entry in enumerate(field(content, "images", list, str(path))):
        where = f"{path}, images[{place}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: got {entry!r}, expected an object")
        splits.add(field(entry, "split", str, where))
        if entry["split"] != split:
            continue
        picture = Path(entry.get("filepath") or "", field(entry, "filename", str, where))  # Flickr's have no filepath
        sentences = field(entry, "sentences", list, where)
        texts = [" ".join(field(s, "raw", str, f"{where}, a sentence").split()) for s in sentences]
        if not any(texts):
            raise ValueError(f"{where}: no caption in 'sentences'")
        found.append((picture, tuple(text for text in texts if text)))
    if not found:
        raise ValueError(f"{path} has no picture of the split {split!r}; its splits are {sorted(splits)}")
    return found


def caption_requests(split: list[tuple[Path, tuple[str, ...]]], images: Path) -> list[dict[str, Any]]:
    """A request for a caption of each picture, greedy; paths are absolute, so the file may lie anywhere.

    Raises:
        ValueError: pictures are not there; names how many and the first.
    """
    paths = [(images / picture).resolve() for picture, _ in split]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} pictures are not there, the first is {missing[0]}; "
            "give with --images the folder that holds val2014/ (of Flickr, the folder of the pictures)"
        )
    return [{"segments": [{"image": str(path)}], "generate": "text", "temperature": 0.0} for path in paths]


def cider(split: list[tuple[Path, tuple[str, ...]]], predictions: Path) -> dict[str, float | int]:
    """CIDEr-D of the captions written for a split, times 100 as papers print it, with its standard error.

    Raises:
        ValueError: predictions are missing, or of other prompts.
    """
    from tfusion.metrics.captions import cider_d

    found = read_predictions(predictions, requests=len(split), samples=1)
    written = ["".join(segment.get("text", "") for segment in sample) for [sample] in found]
    scores = 100 * np.asarray(cider_d(written, [captions for _, captions in split]), dtype=float)
    return {
        "cider_d": round(float(scores.mean()), 2),
        "standard_error": round(float(scores.std(ddof=1)) / math.sqrt(len(scores)), 2) if len(scores) > 1 else 0.0,
        "n": len(scores),
        "empty": sum(not text.strip() for text in written),
    }
