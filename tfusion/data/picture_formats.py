"""Captioned pictures in a user's files: which of four formats they are in, and the parts they can be read in.

- pairs: `name.jpg` with `name.txt`, a caption a line;
- metadata: `metadata.jsonl` or `.csv` beside the pictures, a line a picture or a line a caption;
- tar: WebDataset shards, members `key.jpg` with `key.txt` or `key.json`;
- parquet: a column of pictures (bytes, or Hugging Face's {bytes, path}) and one of captions.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
    if options["where"] and found[0] in ("tar", "pairs"):
        raise ValueError(f"corpus {corpus!r}: where needs columns, which {found[0]} files do not have: leave it out")
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
    captions = {str(text.with_suffix("")): text for text in texts}
    units, seen = [], set()
    for picture in pictures:
        stem = str(picture.with_suffix(""))
        key, file = relative(Path(stem), root), relative(picture, root)
        if stem in seen:
            units.append(("bad", key, file, "duplicate key", "another picture has this name"))
        elif stem not in captions:
            units.append(("bad", key, file, "no caption", f"there is no {Path(stem).name}.txt beside it"))
        else:
            units.append(("file", key, str(picture), file, str(captions[stem])))
        seen.add(stem)
    units += [
        ("bad", relative(Path(stem), root), relative(text, root), "no picture", "a caption file without its picture")
        for stem, text in captions.items()
        if stem not in seen and text.name.lower() not in ("readme.txt", "license.txt", "licence.txt")
    ]
    return units


def _metadata_units(root: Path, metadata: list[Path], pictures: list[Path], options: dict[str, Any]) -> list[tuple]:
    units: list[tuple] = []
    captions: dict[Path, list[str]] = {}  # several lines of one picture are several captions of it
    for file in metadata:
        name = relative(file, root)
        rows = list(_jsonl_rows(file) if file.suffix.lower() == ".jsonl" else _csv_rows(file))
        columns = list(dict.fromkeys(column for _, row in rows if isinstance(row, dict) for column in row))
        if not columns:
            raise ValueError(f"corpus {options['corpus']!r}: {name} has no line that can be read")
        of_caption = find_column(columns, options["caption_column"], CAPTION_COLUMNS, "caption_column", name)
        of_file = find_column(columns, options["image_column"], FILE_COLUMNS, "image_column", name)
        for line, row in rows:
            if isinstance(row, str):
                units.append(("bad", f"line {line}", name, "unreadable line", row))
            elif not isinstance(row.get(of_file), str) or not row[of_file]:
                units.append(("bad", f"line {line}", name, "no picture", f"no {of_file} in the line"))
            elif wanted(row, options["where"]):
                picture = file.parent / row[of_file]
                captions.setdefault(picture, []).extend(as_captions(row.get(of_caption)))
    units += [
        ("file", relative(picture, root), str(picture), relative(picture, root), texts)
        for picture, texts in captions.items()
    ]
    if not options["where"]:
        known = {picture.resolve() for picture in captions}
        units += [
            ("bad", relative(picture, root), relative(picture, root), "no caption", "no line of the metadata names it")
            for picture in pictures
            if picture.resolve() not in known
        ]
    return units


def _jsonl_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Numbered lines as objects, or what is wrong with them."""
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, parse_json(line)


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    # Bytes that are no UTF-8 become lone surrogates, which no caption may hold: they are found line by line.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            text = "".join(value for value in row.values() if isinstance(value, str))
            wrong = any("\udc80" <= c <= "\udcff" for c in text)
            yield reader.line_num, ("not UTF-8" if wrong else row)


def _parquet_units(root: Path, files: list[Path], options: dict[str, Any]) -> list[tuple]:
    units = []
    for file in files:
        name = relative(file, root)
        try:
            parquet = pq.ParquetFile(file)
        except Exception as error:  # pyarrow's, or the system's
            raise ValueError(f"corpus {options['corpus']!r}: {name} is not readable as parquet: {error}") from error
        columns = parquet.schema_arrow.names
        of_caption = find_column(columns, options["caption_column"], CAPTION_COLUMNS, "caption_column", name)
        of_image = find_column(columns, options["image_column"], PICTURE_COLUMNS, "image_column", name)
        for column in options["where"] or {}:
            find_column(columns, column, (), "where", name)
        row = 0
        for group in range(parquet.num_row_groups):
            units.append(("parquet", str(file), name, group, row, of_image, of_caption))
            row += parquet.metadata.row_group(group).num_rows
    return units
