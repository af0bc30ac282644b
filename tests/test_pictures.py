"""Decoding: every odd kind of picture, made here with Pillow, against what a person would see, computed apart."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageFile, PngImagePlugin

from tfusion.pictures import BadPicture, decode, fit_square

S = 16


@pytest.fixture(autouse=True)
def untouched_globals() -> Iterator[None]:
    def values() -> tuple:
        return PILImage.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK

    before = values()
    yield
    assert values() == before


def scene(size: int = S) -> np.ndarray:
    """uint8 (S, S, 3): red grows to the right, green downwards, a blue corner; no symmetry."""
    y, x = np.mgrid[:size, :size]
    blue = np.where((x < size // 4) & (y < size // 2), 255, 0)
    return np.stack([x * 240 // size, y * 240 // size, blue], axis=-1).astype(np.uint8)


def encode(image: PILImage.Image | np.ndarray, kind: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image = PILImage.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **settings)
    return file.getvalue()


def pixels(data: bytes, size: int = S, **settings) -> np.ndarray:
    """(S, S, 3) as decoded."""
    decoded = decode(data, size, **settings)
    assert decoded.pixels.dtype == np.uint8 and decoded.pixels.shape == (3, size, size)
    assert decoded.pixels.flags.c_contiguous
    return decoded.pixels.transpose(1, 2, 0).astype(int)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *others: bytes) -> bytes:
    """A PNG written by hand: kinds that Pillow reads and does not write."""
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *others, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_plain_picture_is_itself_in_all_lossless_formats() -> None:
    for kind, settings in [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]:
        decoded = decode(encode(scene(), kind, **settings), S)
        assert (decoded.pixels.transpose(1, 2, 0) == scene()).all(), kind
        assert (decoded.width, decoded.height, decoded.notes) == (S, S, ())


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_lies_on_white(kind: str) -> None:
    alpha = (np.arange(S * S).reshape(S, S) % 256).astype(np.uint8)
    data = encode(np.dstack([scene(), alpha]), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    share = alpha[..., None] / 255
    assert np.abs(pixels(data) - (scene() * share + 255 * (1 - share))).max() <= 1
    assert decode(data, S).notes == ("alpha",)


def test_gray_with_alpha_and_gray_alone() -> None:
    gray, alpha = scene()[..., 0], scene()[..., 1]
    expected = gray * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(pixels(encode(np.dstack([gray, alpha]))) - expected[..., None]).max() <= 1
    assert (pixels(encode(gray)) == gray[..., None]).all()


def test_palettes_with_and_without_transparency() -> None:
    colors = np.array([[250, 0, 0], [0, 200, 0], [0, 0, 150], [9, 9, 9]], np.uint8)
    index = (np.add.outer(np.arange(S), np.arange(S)) % 4).astype(np.uint8)
    image = PILImage.fromarray(index).convert("L")
    image = PILImage.frombytes("P", (S, S), image.tobytes())
    image.putpalette(colors.tobytes())
    for kind in ("PNG", "GIF"):
        assert (pixels(encode(image, kind)) == colors[index]).all()
        assert decode(encode(image, kind), S).notes == ("palette",)
    see_through = colors.copy()
    see_through[1] = 255  # what is fully transparent is white
    for kind in ("PNG", "GIF"):
        data = encode(image, kind, transparency=1)
        assert (pixels(data) == see_through[index]).all(), kind
        assert decode(data, S).notes == ("palette", "alpha")
    half = encode(image, "PNG", transparency=bytes([255, 128, 0, 255]))
    share = np.array([1, 128 / 255, 0, 1])[index][..., None]
    assert np.abs(pixels(half) - (colors[index] * share + 255 * (1 - share))).max() <= 1


def test_a_color_that_stands_for_transparency() -> None:
    rgb = np.zeros((S, S, 3), np.uint8)
    rgb[:, 8:] = (10, 20, 30)
    found = pixels(encode(rgb, transparency=(10, 20, 30)))
    assert (found[:, :8] == 0).all() and (found[:, 8:] == 255).all()


def test_sixteen_bits_keep_their_upper_eight() -> None:
    values = np.linspace(0, 65535, S * S).astype(np.uint16).reshape(S, S)
    assert (pixels(encode(values)) == (values >> 8)[..., None]).all()
    assert decode(encode(values), S).notes == ("16 bit",)
    assert (pixels(encode(values, "TIFF")) == (values >> 8)[..., None]).all()
    dark = (values >> 8).astype(np.uint16)  # all of it nearly black, and to be seen so
    assert (pixels(encode(dark)) == 0).all()
    rows = b"".join(b"\0" + (scene().astype(np.uint16) * 257)[y].astype(">u2").tobytes() for y in range(S))
    assert (pixels(png(S, S, 16, 2, rows)) == scene()).all(), "16-bit RGB"


def test_one_bit_and_other_color_spaces() -> None:
    bits = scene()[..., 0] > 120
    assert (pixels(encode(PILImage.fromarray(bits))) == bits[..., None] * 255).all()
    ink = encode(PILImage.new("CMYK", (S, S), (255, 0, 0, 0)), "JPEG", quality=95)
    assert np.abs(pixels(ink) - [0, 255, 255]).max() <= 3, "cyan ink"
    assert decode(ink, S).notes == ("CMYK",)
    with pytest.raises(BadPicture) as caught:
        decode(encode(np.linspace(0, 1, S * S, dtype=np.float32).reshape(S, S), "TIFF"), S)
    assert caught.value.cause == "floating-point picture"


# What EXIF says was done to the upright picture, by numpy: the picture as stored, for each orientation.
STORED = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_rotation_is_undone(kind: str, orientation: int) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](scene()))
    lossless = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}[kind]
    data = encode(stored, kind, exif=exif, **lossless)
    assert np.abs(pixels(data) - scene()).max() <= (8 if kind == "JPEG" else 0)
    assert decode(data, S).notes == ("EXIF rotation",)


@pytest.mark.parametrize("value", [0, 1, 9, 1000])
def test_exif_that_says_nothing_turns_nothing(value: int) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = value
    decoded = decode(encode(scene(), exif=exif), S)
    assert (decoded.pixels.transpose(1, 2, 0) == scene()).all() and decoded.notes == ()


@pytest.mark.parametrize(
    "rubbish", [b"Exif\0\0rubbish", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_broken_exif_costs_no_picture(rubbish: bytes) -> None:
    for kind, tolerance in (("PNG", 0), ("JPEG", 8)):
        data = encode(scene(), kind, exif=rubbish, **({} if kind == "PNG" else {"quality": 100, "subsampling": 0}))
        assert np.abs(pixels(data) - scene()).max() <= tolerance


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    frames = [PILImage.new("RGB", (S, S), color) for color in ("red", "lime", "blue")]
    data = encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert (pixels(data) == [255, 0, 0]).all()
    assert "animation: first frame" in decode(data, S).notes
    if kind == "GIF":  # the end is gone; what is wanted is there
        assert (pixels(data[:-20]) == [255, 0, 0]).all()


def test_a_phones_second_picture_is_no_animation() -> None:
    data = encode(PILImage.new("RGB", (S, S), "red"), "MPO", save_all=True, append_images=[PILImage.new("RGB", (S, S))])
    decoded = decode(data, S, extension="jpg")
    assert decoded.notes == () and np.abs(pixels(data) - [255, 0, 0]).max() <= 3


def test_a_wrong_extension_is_noted_and_the_content_decides() -> None:
    data = encode(scene(), "JPEG", quality=100)
    for extension in ("png", "PNG"):
        assert decode(data, S, extension=extension).notes == (f"wrong extension: JPEG as .{extension}",)
    for extension in ("jpg", "JPEG", "", "unknown"):
        assert decode(data, S, extension=extension).notes == ()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_at_any_length_is_refused_in_few_words(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(noise, kind)
    for share in (0.02, 0.1, 0.3, 0.5, 0.8):
        with pytest.raises(BadPicture) as caught:
            decode(data[: int(len(data) * share)], S)
        assert caught.value.cause in ("truncated picture", "broken picture", "not a picture"), kind
    with pytest.raises(BadPicture, match="zero bytes"):
        decode(b"", S)


def test_what_is_no_picture() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    for data in (b"a cat\n", b"\0" * 5000, b"<html>404</html>", postscript, b"\xff\xd8\xff"):
        with pytest.raises(BadPicture) as caught:
            decode(data, S, extension="jpg")
        assert caught.value.cause == "not a picture", data[:20]


def test_flipped_bits_never_crash() -> None:
    draws = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = np.frombuffer(encode(scene(), kind), np.uint8)
        for _ in range(60):
            broken = data.copy()
            places = draws.integers(0, len(data), 3)
            broken[places] = draws.integers(0, 256, 3)
            try:
                assert decode(broken.tobytes(), S).pixels.shape == (3, S, S)
            except BadPicture as error:
                assert error.cause


def test_a_pixel_bomb_is_not_decoded() -> None:
    bomb = png(50_000, 50_000, 8, 2, b"\0" * 1000)
    assert len(bomb) < 200
    with pytest.raises(BadPicture) as caught:
        decode(bomb, S)
    assert caught.value.cause == "pixel bomb" and "2500000000 pixels" in caught.value.detail


def test_a_text_bomb_is_harmless() -> None:
    rows = b"".join(b"\0" + scene()[y].tobytes() for y in range(S))
    text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(b"x" * 5_000_000))
    try:
        assert (pixels(png(S, S, 8, 2, rows, text)) == scene()).all()
    except BadPicture as error:
        assert error.cause == "broken picture"


def test_single_pixels_and_strips() -> None:
    assert (pixels(encode(np.full((1, 1, 3), (3, 99, 200), np.uint8))) == [3, 99, 200]).all()
    strip = np.zeros((500, 1, 3), np.uint8)
    strip[245:254] = (1, 2, 3)  # around the centre, (500 - 1) // 2 = 249, as far as the filter reaches
    assert (pixels(encode(strip)) == [1, 2, 3]).all()
    assert (pixels(encode(strip.transpose(1, 0, 2))) == [1, 2, 3]).all()
    squashed = pixels(encode(np.repeat([[[0] * 3], [[200] * 3]], 250, axis=0).astype(np.uint8)), resize="squash")
    assert squashed[0].max() == 0 and squashed[-1].min() == 200


@pytest.mark.parametrize(("width", "height"), [(40, 24), (24, 40), (41, 24), (16, 40), (300, 200), (5, 9)])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_crop_and_squash_against_pil_by_hand(width: int, height: int, resize: str) -> None:
    y, x = np.mgrid[:height, :width]
    image = PILImage.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8))
    side = min(width, height)
    whole = image
    if resize == "crop":
        left, top = (width - side) // 2, (height - side) // 2
        whole = image.crop((left, top, left + side, top + side))
    by_hand = np.asarray(whole.resize((S, S), PILImage.Resampling.LANCZOS)).astype(int)
    found = np.asarray(fit_square(image, S, resize)).astype(int)
    # reducing_gap and what lies beyond the crop's edge change a few levels at the edges of the saw teeth
    assert np.abs(found - by_hand).mean() < 3
    assert (pixels(encode(image), resize=resize) == found).all()


def test_a_large_jpeg_read_at_a_fraction_looks_the_same() -> None:
    y, x = np.mgrid[:1000, :1400]
    large = np.stack([x * 255 // 1400, y * 255 // 1000, (np.hypot(x - 700, y - 500) < 300) * 255], -1).astype(np.uint8)
    data = encode(large, "JPEG", quality=95)
    whole = PILImage.open(io.BytesIO(data)).convert("RGB").crop((200, 0, 1200, 1000))
    expected = np.asarray(whole.resize((32, 32), PILImage.Resampling.LANCZOS)).astype(int)
    decoded = decode(data, 32)
    assert (decoded.width, decoded.height) == (1400, 1000), "the size in the file"
    difference = np.abs(decoded.pixels.transpose(1, 2, 0).astype(int) - expected)
    assert difference.mean() < 1.5 and difference.max() < 30
