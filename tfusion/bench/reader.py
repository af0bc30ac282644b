"""How far can the reader of `shapes` be trusted? Prints one JSON line a setting.

    python -m tfusion.bench.reader --image_size 32 --scenes 1000

The pictures are the true ones of the first scenes of val and of test, as they are and distorted:

- `none`: as drawn.
- `blur`: by a Gaussian, whose standard deviation is `amount`, a share of the image's side.
- `noise`: Gaussian, added to each number of the picture; `amount` is its standard deviation, of 255.
- `jpeg`: written and read again at quality `amount`, with the encoder's usual halved colours.
- `color`: each channel of the picture moved by `amount` of 255, up or down by chance, and cut at 0 and 255.

`accuracy` is the share of pictures called right under their own caption, by kind of prompt over the scenes that are
of that kind (`n`); `all` is the exact scene. `read_s_per_1000` are seconds that reading 1,000 of them takes.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image as PILImage
from scipy import ndimage

from tfusion.data.scene_prompts import KINDS, is_of_kind
from tfusion.data.shapes import MIN_IMAGE_SIZE, describe, draw, parse_caption, sample_scene
from tfusion.data.shapes_reader import read_objects
from tfusion.metrics.scenes import objects_right
from tfusion.randomness import seed_from

AMOUNTS = {
    "none": (0,),
    "blur": (0.01, 0.02, 0.03, 0.04, 0.05, 0.06),
    "noise": (8, 16, 32, 48, 64, 96),
    "jpeg": (95, 75, 50, 30, 10),
    "color": (8, 16, 24, 32, 48, 64),
}


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=32, help="side of the pictures, in pixels")
    parser.add_argument("--scenes", type=int, default=1000, help="of val, and as many of test")
    parser.add_argument("--distortions", nargs="+", choices=list(AMOUNTS), default=list(AMOUNTS), help="which of them")
    options = parser.parse_args(args)
    if options.image_size < MIN_IMAGE_SIZE:
        parser.error(f"--image_size is {options.image_size}, expected at least {MIN_IMAGE_SIZE} pixels")
    if options.scenes < 1:
        parser.error(f"--scenes is {options.scenes}, expected at least 1")

    pictures = list(true_pictures(options.image_size, options.scenes))
    for distortion in options.distortions:
        for amount in AMOUNTS[distortion]:
            result = {"image_size": options.image_size, "distortion": distortion, "amount": amount}
            result |= measure([(distorted(p, distortion, amount, i), c) for i, (p, c) in enumerate(pictures)])
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()


def true_pictures(image_size: int, number: int) -> Iterator[tuple[np.ndarray, str]]:
    """The first scenes of val, then of test: uint8 (3, S, S), and what is in it."""
    for split in ("val", "test"):
        for index in range(number):
            scene, objects = sample_scene(split, index)
            yield draw(objects, image_size), describe(scene)


def distorted(picture: np.ndarray, distortion: str, amount: float, index: int) -> np.ndarray:
    """The picture, uint8 (3, S, S), with one of AMOUNTS done to it; noise is a function of all arguments but pixels."""
    random = np.random.default_rng(seed_from("reader", distortion, index))
    values = picture.astype(np.float64)
    if distortion == "blur":
        sigma = amount * picture.shape[1]
        # Beyond the frame is more background.
        values = ndimage.gaussian_filter(values, (0, sigma, sigma), mode="nearest")
    elif distortion == "noise":
        values += random.normal(0.0, amount, values.shape)
    elif distortion == "color":
        values += amount * random.choice((-1.0, 1.0), size=(3, 1, 1))
    elif distortion == "jpeg":
        file = io.BytesIO()
        PILImage.fromarray(picture.transpose(1, 2, 0)).save(file, "JPEG", quality=int(amount))
        values = np.asarray(PILImage.open(file), dtype=np.float64).transpose(2, 0, 1)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def measure(pictures: list[tuple[np.ndarray, str]]) -> dict:
    """Accuracy of each kind over the scenes that are of it, and what reading takes."""
    start = time.perf_counter()
    read = [read_objects(picture) for picture, _ in pictures]
    seconds = time.perf_counter() - start
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for objects, (_, caption) in zip(read, pictures, strict=True):
        for kind in KINDS:
            if is_of_kind(parse_caption(caption), kind):  # type: ignore[arg-type]
                right[kind].append(objects_right(kind, objects, caption))
    return {
        "accuracy": {kind: round(float(np.mean(marks)), 5) for kind, marks in right.items() if marks},
        "n": {kind: len(marks) for kind, marks in right.items()},
        "read_s_per_1000": round(1000 * seconds / len(pictures), 2),
    }


if __name__ == "__main__":
    main()
