"""Captioned pictures in a user's files: which of four formats they are in, and the parts they can be read in.

- pairs: `name.jpg` with `name.txt`, a caption a line;
- metadata: `metadata.jsonl` or `.csv` beside the pictures, a line a picture or a line a caption;
- tar: WebDataset shards, members `key.jpg` with `key.txt` or `key.json`;
- parquet: a column of pictures (bytes, or Hugging Face's {bytes, path}) and one of captions.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tfusion.data.files import relative
from tfusion.data.picture_records import CAPTION_COLUMNS, PICTURES, as_captions, parse_json, wanted

FILE_COLUMNS = ("file_name", "image", "filename", "file", "path")
PICTURE_COLUMNS = ("image", "jpg", "png", "webp", "picture")


def list_units(root: Path, files: list[Path], options: dict[str, Any]) -> list[tuple]:
    """The parts a corpus can be read in, after its format has been told.

    Args:
        root: what names are relative to.
        files: all files of the corpus.
        options: `corpus`, `caption_column`, `image_column`, `where` as `ImageFiles` has them.

    Raises:
        ValueError: a format that cannot be told, or columns that are not there.
    """
    corpus = options["corpus"]
    metadata = [f for f in files if f.name in ("metadata.jsonl", "metadata.csv")]
    if not metadata and all(f.suffix.lower() in (".jsonl", ".csv") for f in files):
        metadata = files  # named outright
    suffixes = {f.suffix.lower() for f in files}
    kinds = {"metadata": bool(metadata), "tar": ".tar" in suffixes, "parquet": ".parquet" in suffixes}
    kinds["pairs"] = bool(suffixes & PICTURES) and not metadata
    found = [kind for kind, there in kinds.items() if there]
    if len(found) != 1:
        several = f"holds several formats ({', '.join(found)})" if found else "is of no known format"
        raise ValueError(
            f"corpus {corpus!r} {several}: {len(files)} files under {str(root)!r} with endings {sorted(suffixes)[:8]}; "
            "expected metadata.jsonl or metadata.csv beside pictures, pictures with a .txt each, .tar shards or "
            ".parquet; say which with a glob, such as path: 'folder/*.tar'"
        )
    for setting in {"tar": ("where", "image_column"), "pairs": ("where", "image_column", "caption_column")}.get(
        found[0], ()
    ):
        if options[setting]:
            raise ValueError(
                f"corpus {corpus!r}: {setting} needs columns, which {found[0]} files do not have: leave it out"
            )
    if found == ["tar"]:
        return [("tar", str(f), relative(f, root)) for f in files if f.suffix.lower() == ".tar"]
    if found == ["parquet"]:
        return _parquet_units(root, [f for f in files if f.suffix.lower() == ".parquet"], options)
    pictures = [f for f in files if f.suffix.lower() in PICTURES]
    if found == ["metadata"]:
        return _metadata_units(root, metadata, pictures, options)
    return _pair_units(root, pictures, [f for f in files if f.suffix.lower() == ".txt"])


def find_column(columns: Iterable[str], asked: str | None, usual: tuple[str, ...], setting: str, file: str) -> str:
    """The column asked for by `setting`, or the first of the usual names; an error lists those found."""
    columns = list(columns)
    names = (asked,) if asked else usual
    for name in names:
        if name in columns:
            return name
    raise ValueError(
        f"{file} has no column {' or '.join(names)}; columns found: {', '.join(columns) or 'none'}. "
        f"Say which with {setting}"
    )


def _pair_units(root: Path, pictures: list[Path], texts: list[Path]) -> list[tuple]:
    captions = {os.path.splitext(text)[0]: str(text) for text in texts}
    units: list[tuple] = []
    seen = set()
    for picture in pictures:
        stem = os.path.splitext(picture)[0]
        key, file = relative(stem, root), relative(picture, root)
        if stem in seen:
            units.append(("bad", key, file, "duplicate key", "another picture has this name"))
        elif stem not in captions:
            units.append(("bad", key, file, "no caption", f"there is no {os.path.basename(stem)}.txt beside it"))
        else:
            units.append(("file", key, str(picture), file, captions[stem], ""))
        seen.add(stem)
    units += [
        ("bad", relative(stem, root), relative(text, root), "no picture", "a caption file without its picture")
        for stem, text in captions.items()
        if stem not in seen and os.path.basename(text).lower() not in ("readme.txt", "license.txt", "licence.txt")
    ]
    return units


def _metadata_units(root: Path, metadata: list[Path], pictures: list[Path], options: dict[str, Any]) -> list[tuple]:
    units: list[tuple] = []
    captions: dict[str, list[str]] = {}  # several lines of one picture are several captions of it
    places: dict[str, str] = {}  # where each is named first
    for file in metadata:
        name = relative(file, root)
        read = _jsonl_rows if file.suffix.lower() == ".jsonl" else _csv_rows
        columns: dict[str, None] = {}  # of all lines: one may leave out what others have
        for _, row in read(file):
            columns.update(dict.fromkeys(row if isinstance(row, dict) else ()))
        if not columns:
            raise ValueError(f"corpus {options['corpus']!r}: {name} has no line that can be read")
        of_caption = find_column(columns, options["caption_column"], CAPTION_COLUMNS, "caption_column", name)
        of_file = find_column(columns, options["image_column"], FILE_COLUMNS, "image_column", name)
        for line, row in read(file):
            if isinstance(row, str):
                units.append(("bad", f"line {line}", name, *_cause(row)))
            elif not isinstance(row.get(of_file), str) or not row[of_file]:
                units.append(("bad", f"line {line}", name, "no picture", f"no {of_file} in the line"))
            elif wanted(row, options["where"]):
                picture = os.path.normpath(os.path.join(file.parent, row[of_file]))
                captions.setdefault(picture, []).extend(as_captions(row.get(of_caption)))
                places.setdefault(picture, f"{name} line {line}")
    for picture, texts in captions.items():
        key = relative(picture, root)
        units.append(("file", key, picture, key, texts, places[picture]))
    if not options["where"]:
        for key in (relative(picture, root) for picture in pictures if str(picture) not in captions):
            units.append(("bad", key, key, "no caption", "no line of the metadata names it"))
    if not units:
        raise ValueError(
            f"corpus {options['corpus']!r}: where {options['where']} keeps no line of {len(metadata)} metadata files; "
            f"columns found: {', '.join(columns)}"
        )
    return units


def _cause(trouble: str) -> tuple[str, str]:
    """(cause, detail) of a line that cannot be read."""
    return (trouble.split(" at ")[0] if trouble.startswith("not UTF-8") else "unreadable line", trouble)


def _jsonl_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Numbered lines as objects, or what is wrong with them."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, parse_json(line)


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    # Bytes that are no UTF-8 become lone surrogates, which no caption may hold: they are found line by line.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:  # a field of more than 128 KB, or a null byte
                yield reader.line_num, str(error)
                continue
            if row is None:
                return
            row.pop(None, None)  # type: ignore[call-overload]  # fields beyond the header's
            text = "".join(value for value in row.values() if isinstance(value, str))
            yield reader.line_num, ("not UTF-8" if not _is_utf8(text) else row)


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= c <= "\udcff" for c in text)


def _parquet_units(root: Path, files: list[Path], options: dict[str, Any]) -> list[tuple]:
    units: list[tuple] = []
    for file in files:
        name = relative(file, root)
        try:
            parquet = pq.ParquetFile(file)
        except Exception as error:  # pyarrow's, or the system's
            units.append(("bad", name, name, "broken parquet", f"{type(error).__name__}: {error}"))
            continue
        columns = parquet.schema_arrow.names
        of_caption = find_column(columns, options["caption_column"], CAPTION_COLUMNS, "caption_column", name)
        of_image = find_column(columns, options["image_column"], PICTURE_COLUMNS, "image_column", name)
        for column in options["where"] or {}:
            find_column(columns, column, (), "where", name)
        kind = parquet.schema_arrow.field(of_image).type
        if not (is_bytes(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
            raise ValueError(
                f"{name}: the column {of_image!r} is of type {kind}, expected the bytes of pictures, or a struct with "
                f"bytes. Columns found: {', '.join(columns)}. Say which with image_column"
            )
        row = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            units.append(("parquet", str(file), name, group, row, rows, of_image, of_caption))
            row += rows
    return units


def is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
