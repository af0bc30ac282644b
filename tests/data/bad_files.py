"""A folder of everything that can be wrong with a record, and what becomes of each: run it for a table in Markdown."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from tfusion.data.image_files import ImageFiles
from tfusion.data.text_files import TextFiles

SIZE = 16


def make_bad_folder(path: Path) -> dict[str, str]:
    """Write `pictures` (pairs), `shards` (tar) and `texts`; returns what each record is, by folder and name."""
    kinds = {f"pictures/{name}": what for name, what in _write_pictures(path / "pictures").items()}
    kinds |= {f"shards/{name}": what for name, what in _write_shards(path / "shards").items()}
    return kinds | {f"texts/{name}": what for name, what in _write_texts(path / "texts").items()}


def what_happened(path: Path) -> dict[str, str]:
    """By the same names: "used (what was converted)" or "skipped: cause (detail)"."""
    found = {}
    pictures = ImageFiles(str(path / "pictures"), SIZE)
    for corpus in (pictures, ImageFiles(str(path / "shards"), SIZE), TextFiles(str(path / "texts"))):
        for row in corpus.tables()[0].dataset:
            name = f"{corpus.name}/{row['file' if corpus is pictures else 'key']}"
            detail = f" ({row['detail']})" if row["detail"] else ""
            notes = row.get("notes")
            found[name] = f"skipped: {row['cause']}{detail}" if row["cause"] else f"used ({notes or 'as it is'})"
    return found


def table(kinds: dict[str, str], happened: dict[str, str]) -> str:
    """Markdown."""
    lines = ["| what it is | record | what happened |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | `{name}` | {happened[name]} |" for name, what in kinds.items()])


def colors(seed: int, size: int = 32) -> PILImage.Image:
    """A picture of noise: files of it are long, so that they can be cut."""
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def encode(image: PILImage.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def pixel_bomb() -> bytes:
    """A PNG of under 100 bytes that says it has 2.5 billion pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _write_pictures(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True)
    kinds: dict[str, str] = {}

    def write(name: str, what: str, data: bytes | None, caption: bytes | None = b"a picture\n") -> None:
        kinds[name] = what
        if data is not None:
            (folder / name).write_bytes(data)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_bytes(caption)

    plain = encode(colors(0), "JPEG")
    turned = PILImage.Exif()
    turned[0x0112] = 6
    frames = [colors(n) for n in range(3)]
    write("plain.jpg", "nothing wrong", plain)
    write("alpha.png", "alpha", encode(colors(1).convert("RGBA"), "PNG"))
    write("palette.png", "palette", encode(colors(2).quantize(8), "PNG"))
    write("sixteen.png", "16 bit", encode(PILImage.fromarray(np.full((SIZE, SIZE), 40_000, np.uint16)), "PNG"))
    write("cmyk.jpg", "CMYK", encode(colors(3).convert("CMYK"), "JPEG"))
    write("turned.jpg", "EXIF rotation", encode(colors(4), "JPEG", exif=turned))
    write("animated.gif", "animated", encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    write("really_jpeg.png", "wrong extension", plain)
    write("truncated.jpg", "truncated picture", plain[: len(plain) // 2])
    write("broken.png", "broken picture", _damaged(encode(colors(5), "PNG")))
    write("zero.jpg", "zero bytes", b"")
    write("text.jpg", "no picture at all, by its content", b"this is text\n")
    write("bomb.png", "pixel bomb", pixel_bomb())
    write("float.tif", "floating-point pixels", encode(PILImage.new("F", (SIZE, SIZE), 0.5), "TIFF"))
    write("no_caption.jpg", "missing member of a pair: the caption", plain, None)
    write("empty_caption.jpg", "empty caption", plain, b" \n\n")
    write("enormous_caption.jpg", "enormous caption", plain, b"word " * 20_000)
    write("latin.jpg", "caption of invalid UTF-8", plain, b"caf\xe9\n")
    kinds["latin.txt"] = kinds.pop("latin.jpg")  # the file to mend
    write("twice.jpg", "one of two pictures of one name", plain)
    write("twice.png", "duplicate key", encode(colors(6), "PNG"), None)
    write("alone.txt", "missing member of a pair: the picture", None, b"a caption\n")
    os.symlink(folder / "nowhere.jpg", folder / "link.jpg")
    write("link.jpg", "a link to nowhere", None)
    return kinds


def _damaged(data: bytes) -> bytes:
    middle = data.index(b"IDAT") + 40
    return data[:middle] + bytes(60) + data[middle + 60 :]


def _write_shards(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True)
    data = encode(colors(7), "JPEG")
    members = [("plain.jpg", data), ("plain.txt", b"a caption"), ("no_picture.txt", b"a caption"), ("bare.jpg", data)]
    members += [("plain.jpg", data), ("plain.txt", b"again"), ("json.jpg", data), ("json.json", b'{"label": 3}')]
    members += [("bad_json.jpg", data), ("bad_json.json", b"{")]
    _write_tar(folder / "a.tar", members)
    _write_tar(folder / "b.tar", [("first.jpg", data), ("first.txt", b"a caption"), ("last.jpg", data * 20)])
    whole = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(whole[: len(whole) // 2])
    return {
        "a.tar/no_picture": "shard: missing member, the picture",
        "a.tar/bare": "shard: missing member, the caption",
        "a.tar/json": "shard: its JSON has no caption",
        "a.tar/bad_json": "shard: broken JSON",
        "a.tar/plain": "shard: duplicate key (the first is used)",
        "b.tar/first": "truncated shard: what is whole",
        "b.tar/last": "truncated shard: where it ends",
    }


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _write_texts(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True)
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfA text with a mark of its byte order.\r\n")
    (folder / "latin.txt").write_bytes("A text\nwith a café.\n".encode("latin-1"))
    (folder / "zero.txt").write_bytes(b"")
    (folder / "blank.txt").write_bytes(b" \n \n")
    (folder / "zero.jsonl").write_bytes(b"")
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    lines = [json.dumps({"text": "a good line"}).encode(), b'{"text": "no end', b'{"title": "a"}', b'{"text": null}']
    lines += [b'{"text": 5}', b'{"text": "half \\ud800"}', b'{"text": "caf\xe9"}', b"[1]", b'{"text": " "}']
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return {
        "bom.txt": "byte order mark, CRLF",
        "latin.txt": "text of invalid UTF-8",
        "zero.txt": "zero bytes",
        "blank.txt": "empty text",
        "zero.jsonl": "zero bytes",
        "broken.parquet": "broken parquet",
        "lines.jsonl:1": "a good line between bad ones",
        "lines.jsonl:2": "line: broken JSON",
        "lines.jsonl:3": "line: no text",
        "lines.jsonl:4": "line: text is null",
        "lines.jsonl:5": "line: text is a number",
        "lines.jsonl:6": "line: half a surrogate pair",
        "lines.jsonl:7": "line: invalid UTF-8",
        "lines.jsonl:8": "line: no object",
        "lines.jsonl:9": "line: blank text",
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TFUSION_CACHE"] = os.path.join(temporary, "cache")
        where = Path(temporary, "data")
        sys.stdout.write(table(make_bad_folder(where), what_happened(where)) + "\n")
