"""Any picture file as a square RGB picture; prompts are converted as corpora are (and always cropped, not squashed).

Transparency becomes white, 16 bits become 8, EXIF rotation is applied, CMYK and palettes are converted, and of an
animation the first frame is taken. What cannot be read raises `BadPicture`, which says why in a few words.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image as PILImage

Resize = Literal["crop", "squash"]
# What a corpus may hold, told from the content. Not all that PIL opens: it hands PostScript to an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")  # MPO is read as JPEG
# PIL turns against the clock; by the orientation that EXIF tells.
TURNS = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}

ORIENTED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where PIL looks for an orientation


class BadPicture(ValueError):
    """A picture that cannot be used: `cause` is one of a few, for counting, `detail` says more."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause} ({detail})" if detail else cause)
        self.cause, self.detail = cause, detail


@dataclass(frozen=True)
class Decoded:
    """`pixels` uint8 (3, S, S); the size in the file, before any resizing; what had to be converted, if anything."""

    pixels: np.ndarray
    width: int
    height: int
    notes: tuple[str, ...]


def decode(data: bytes, size: int, resize: Resize = "crop", extension: str = "") -> Decoded:
    """The bytes of a picture file as pixels.

    Args:
        data: the file.
        size: S, side in pixels.
        resize: see `fit_square`.
        extension: of the file's name, "jpg" or "": a wrong one is noted, the content decides.

    Raises:
        BadPicture: empty, not a picture, broken or cut off, or of more pixels than PIL accepts (178,956,970).
    """
    if not data:
        raise BadPicture("zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of large pictures and odd metadata; it raises where it matters
            with PILImage.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                notes = _wrong_extension(image.format, extension)
                image.draft(image.mode, (2 * size, 2 * size))  # JPEG: decode at a fraction of the size, if large
                image.load()
                rgb, converted = to_rgb(image)
        pixels = np.asarray(fit_square(rgb, size, resize)).transpose(2, 0, 1)
        return Decoded(np.ascontiguousarray(pixels), width, height, notes + converted)
    except BadPicture:
        raise
    except PILImage.UnidentifiedImageError as error:
        raise BadPicture("not a picture") from error
    except PILImage.DecompressionBombError as error:
        raise BadPicture("pixel bomb", str(error).split(",")[0]) from error
    except Exception as error:  # PIL's decoders raise whatever broken bytes lead to
        cause = "truncated picture" if "truncated" in str(error) else "broken picture"
        raise BadPicture(cause, f"{type(error).__name__}: {error}") from error


def to_rgb(image: PILImage.Image) -> tuple[PILImage.Image, tuple[str, ...]]:
    """The picture in RGB as a person sees it, and what was converted; of its own result it changes nothing."""
    notes = []
    if _is_animated(image):
        notes.append("animation: first frame")
        image.seek(0)
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        notes.append("EXIF rotation")
        # not `ImageOps.exif_transpose`, which also writes the other tags anew and fails where one is broken
        image = image.transpose(turn)
        image.info = {name: value for name, value in image.info.items() if name not in ORIENTED}
    if image.mode.startswith("I"):  # `convert` would clip at 255
        notes.append("16 bit")
        values = np.asarray(image)
        # "I" is 32 bits, and what a file's 8 or 16 bits became on the way there is not said
        deep = image.mode != "I" or values.max(initial=0) > 255
        image = PILImage.fromarray((values.clip(0, 65535) // 256 if deep else values.clip(0)).astype(np.uint8))
    if image.mode == "F":
        raise BadPicture("floating-point picture", "no one knows its range; save it with 8 bits")
    if image.mode in ("P", "CMYK"):
        notes.append("palette" if image.mode == "P" else "CMYK")
    if image.has_transparency_data:
        notes.append("alpha")
        rgba = image.convert("RGBA")
        # white, as most pictures' ground, not whatever lies beneath
        image = PILImage.alpha_composite(PILImage.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB"), tuple(notes)


def fit_square(image: PILImage.Image, size: int, resize: Resize = "crop") -> PILImage.Image:
    """An RGB picture at `size` x `size`: its centre square ("crop"), or all of it out of proportion ("squash")."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side) if resize == "crop" else (0, 0, width, height)
    if (width, height) == (size, size):
        return image
    return image.resize((size, size), PILImage.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _is_animated(image: PILImage.Image) -> bool:
    """More than one frame; not a phone's JPEG with a second picture, nor where only the first can be read."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # of the second frame, which is not wanted
        return False


def _orientation(image: PILImage.Image) -> int:
    """Of EXIF, which many programs write broken: then none."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:
        return 1


def _wrong_extension(found: str | None, extension: str) -> tuple[str, ...]:
    """A note where a file's name promises another format than it has."""
    formats = PILImage.registered_extensions()  # {".jpg": "JPEG", ...}
    promised = formats.get(f".{extension.lower()}")
    # MPO is a JPEG with a second picture, as some phones write.
    return () if promised is None or found in (promised, "MPO") else (f"wrong extension: {found} as .{extension}",)
