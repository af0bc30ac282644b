"""How a captioned picture is read out of a user's files, from each of four formats; what is wrong with it is said.

`picture_formats` lists the parts ("units") that a corpus is read in; here a unit becomes rows of a table.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tfusion.data.records import bad, content_hash
from tfusion.pictures import BadPicture, decode

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
CAPTION_COLUMNS = ("captions", "caption", "text")
MOST_CAPTION_BYTES = 2**16
COLUMNS = {
    "captions": datasets.List(datasets.Value("string")),
    "pixels": datasets.Value("large_binary"),  # uint8 (3, S, S): mapped and used as they are
    "width": datasets.Value("int32"),  # in the file
    "height": datasets.Value("int32"),
    "notes": datasets.Value("string"),  # what had to be converted
}
EMPTY = {"captions": [], "pixels": b"", "width": 0, "height": 0, "notes": ""}


def read_pictures(unit: tuple, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a unit, rows of `records.COMMON` and `COLUMNS`."""
    reader = {"bad": _read_bad, "file": _read_file, "tar": _read_tar, "parquet": _read_parquet}[unit[0]]
    yield from reader(*unit[1:], options)


def make_record(
    key: str, file: str, data: bytes, extension: str, captions: list[str], options: dict[str, Any]
) -> dict[str, Any]:
    """Decode, check, and bring to size."""
    try:
        usable = [caption for caption in captions if 0 < len(caption.encode()) <= MOST_CAPTION_BYTES]
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
        return bad(key, file, "not UTF-8", str(error)) | EMPTY
    if not usable:
        cause = "enormous caption" if any(captions) else "no caption"
        return bad(key, file, cause) | EMPTY
    try:
        decoded = decode(data, options["image_size"], options["resize"], extension)
    except BadPicture as error:
        return bad(key, file, error.cause, error.detail) | EMPTY
    pixels = decoded.pixels.tobytes()
    return {
        "key": key,
        "file": file,
        "content": content_hash(pixels, *[caption.encode() for caption in usable]),
        "cause": "",
        "detail": "",
        "captions": usable,
        "pixels": pixels,
        "width": decoded.width,
        "height": decoded.height,
        "notes": ", ".join(decoded.notes),
    }


def as_captions(value: Any) -> list[str]:
    """Captions out of a column: a string, a list of strings, or nothing."""
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


def caption_lines(data: bytes) -> list[str]:
    """A caption a line; raises UnicodeDecodeError."""
    return [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]


def parse_json(line: bytes) -> dict[str, Any] | str:
    """An object, or what is wrong with the line."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start + 1}"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return value if isinstance(value, dict) else f"not a JSON object but {type(value).__name__}"


def wanted(row: dict[str, Any], where: dict[str, Any] | None) -> bool:
    def same(found: Any, value: Any) -> bool:
        return found == value or (isinstance(found, str) and found.lower() == str(value).lower())  # CSV has no types

    return all(same(row.get(column), value) for column, value in (where or {}).items())


def _read_bad(key: str, file: str, cause: str, detail: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield bad(key, file, cause, detail) | EMPTY


def _read_file(
    key: str, path: str, file: str, captions: str | list[str], place: str, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A picture file and its captions, or the file that they are in; `place` is where metadata names it, if it does."""
    record = _file_record(key, path, file, captions, options)
    if record["cause"] and place:
        record["detail"] = f"{record['detail']} ({place})" if record["detail"] else place
    yield record


def _file_record(key: str, path: str, file: str, captions: str | list[str], options: dict[str, Any]) -> dict[str, Any]:
    try:
        texts = captions if isinstance(captions, list) else caption_lines(Path(captions).read_bytes())
        return make_record(key, file, Path(path).read_bytes(), Path(path).suffix[1:], texts, options)
    except UnicodeDecodeError as error:
        return bad(key, f"{file.rsplit('.', 1)[0]}.txt", "not UTF-8", f"byte {error.start + 1}") | EMPTY
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte or half a surrogate pair
        return bad(key, file, "no picture", f"{type(error).__name__}: {getattr(error, 'strerror', error)}") | EMPTY


def _read_tar(path: str, name: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The samples of a WebDataset shard: neighbours of one key, the name up to the first dot of its last part."""
    seen: set[str] = set()
    key: str | None = None
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.isfile() or Path(member.name).name.startswith("."):
                    continue
                folder, _, last = member.name.rpartition("/")
                stem, _, extension = last.partition(".")
                extension = extension.lower()
                this = f"{folder}/{stem}" if folder else stem
                if key is not None and (this != key or extension in members):
                    yield _sample(name, key, members, seen, options)
                    members = {}
                key = this
                members[extension] = tar.extractfile(member).read() if _is_wanted(extension) else b""  # type: ignore
                tar.members.clear()  # it remembers all, for a random access that is not needed
            end = _end_of(tar)
    except Exception as error:  # tarfile's, or a decompressor's
        full_key = name if key is None else f"{name}/{key}"
        yield bad(full_key, name, "truncated shard", f"{type(error).__name__}: {error}") | EMPTY
        return
    if key is not None:
        yield _sample(name, key, members, seen, options)
    if end:
        yield bad(name, name, "truncated shard", f"{end} after {key!r}") | EMPTY


def _end_of(tar: tarfile.TarFile) -> str:
    """What is wrong with an archive's end: `tarfile` takes a broken header, and what follows it, for the end."""
    tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
    block = tar.fileobj.read(2**20)  # type: ignore[union-attr]
    if not block:
        return "no end mark"
    while block:
        if block.count(0) < len(block):
            return "a broken header"
        block = tar.fileobj.read(2**20)  # type: ignore[union-attr]
    return ""


def _is_wanted(extension: str) -> bool:
    return extension.lower() in ("txt", "json") or f".{extension.lower().split('.')[-1]}" in PICTURES


def _sample(name: str, key: str, members: dict[str, bytes], seen: set[str], options: dict[str, Any]) -> dict[str, Any]:
    full_key = f"{name}/{key}"
    pictures = [extension for extension in members if f".{extension.split('.')[-1]}" in PICTURES]
    pictures = [extension for extension in pictures if "." not in extension] or pictures  # x.jpg, not x.depth.png
    if key in seen:
        return bad(full_key, name, "duplicate key", "the shard has it twice") | EMPTY
    seen.add(key)
    if not pictures:
        return bad(full_key, name, "no picture", f"only {', '.join(members)}") | EMPTY
    if len(pictures) > 1:
        return bad(full_key, name, "duplicate key", f"several pictures: {', '.join(pictures)}") | EMPTY
    captions: list[str] = []
    asked = options["caption_column"]
    try:
        if "txt" in members and not (asked and "json" in members):
            captions = caption_lines(members["txt"])
        elif "json" in members:
            row = parse_json(members["json"])
            if isinstance(row, str):
                return bad(full_key, name, "unreadable line", row) | EMPTY
            columns = (asked,) if asked else CAPTION_COLUMNS
            column = next((column for column in columns if column in row), None)
            if column is None:
                detail = f"its json has no {' or '.join(columns)}; found: {', '.join(row) or 'nothing'}"
                return bad(full_key, name, "no caption", detail) | EMPTY
            captions = as_captions(row[column])
    except UnicodeDecodeError as error:
        return bad(full_key, name, "not UTF-8", f"byte {error.start + 1} of its caption") | EMPTY
    extension = pictures[0]
    return make_record(full_key, name, members[extension], extension.split(".")[-1], captions, options)


def _read_parquet(
    path: str, name: str, group: int, first: int, rows: int, of_image: str, of_caption: str, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    columns = list(dict.fromkeys([of_image, of_caption, *(options["where"] or {})]))
    number = first
    try:
        for batch in pq.ParquetFile(path).iter_batches(64, row_groups=[group], columns=columns):
            for i in range(batch.num_rows):
                yield from _parquet_row(batch, i, f"{name}:{number}", name, of_image, of_caption, options)
                number += 1
    except Exception as error:  # pyarrow's, of a broken page: what follows in the group is lost with it
        for lost in range(number, first + rows):
            yield bad(f"{name}:{lost}", name, "broken parquet", f"{type(error).__name__}: {error}") | EMPTY


def _parquet_row(
    batch: pa.RecordBatch, index: int, key: str, name: str, of_image: str, of_caption: str, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    try:
        if options["where"] and not wanted({c: batch[c][index].as_py() for c in options["where"]}, options["where"]):
            return
        captions = as_captions(batch[of_caption][index].as_py())
    except UnicodeDecodeError as error:
        yield bad(key, name, "not UTF-8", f"byte {error.start + 1} of a text") | EMPTY
        return
    image = batch[of_image][index]
    data = image["bytes"].as_py() if isinstance(image, pa.StructScalar) and image.is_valid else image.as_py()
    if data is None:
        yield bad(key, name, "no picture", f"{of_image} is null") | EMPTY
    else:
        yield make_record(key, name, data, "", captions, options)
