"""Texts in a user's files: a `.txt` file is a document, a line of `.jsonl` and a row of `.parquet` are one each."""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from tfusion.data.files import relative
from tfusion.data.picture_formats import find_column
from tfusion.data.picture_records import parse_json
from tfusion.data.records import bad, content_hash

COLUMNS = {"text": datasets.Value("large_string")}
EMPTY = {"text": ""}
TEXT_COLUMNS = ("text", "content")
BOM = b"\xef\xbb\xbf"
LOOKED_AT = 100  # lines, to tell the column
PART_BYTES = 2**26  # a longer .txt becomes several documents, cut at line ends
MOST_LINE_BYTES = 2**28  # a line of .jsonl


def list_units(root: Path, files: list[Path], options: dict[str, Any]) -> list[tuple]:
    """The parts a corpus of texts can be read in.

    Args:
        root: what names are relative to.
        files: all files of the corpus; those of other formats are left out.
        options: `corpus` and `column` as `TextFiles` has them.

    Raises:
        ValueError: no file of a known format, or a column that is not there.
    """
    units: list[tuple] = []
    for file in files:
        name, suffix = relative(file, root), file.suffix.lower()
        if suffix == ".txt":
            units.append(("txt", str(file), name))
        elif suffix == ".jsonl":
            units.append(_jsonl_unit(file, name, options))
        elif suffix == ".parquet":
            units += _parquet_units(file, name, options)
    if not units:
        suffixes = sorted({file.suffix.lower() for file in files})
        raise ValueError(
            f"corpus {options['corpus']!r}: no text in {len(files)} files under {str(root)!r} with endings "
            f"{suffixes[:8]}; expected .txt, .jsonl or .parquet"
        )
    return units


def read_texts(unit: tuple, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a unit, rows of `records.COMMON` and `COLUMNS`."""
    if unit[0] == "bad":
        yield bad(*unit[1:]) | EMPTY
        return
    reader = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_parquet}[unit[0]]
    try:
        yield from reader(*unit[1:])
    except OSError as error:
        yield bad(unit[2], unit[2], "unreadable file", f"{type(error).__name__}: {error.strerror}") | EMPTY


def make_record(key: str, file: str, text: Any) -> dict[str, Any]:
    """A document, if there is any text."""
    if not isinstance(text, str) or not text.strip():
        cause = "empty text" if isinstance(text, str) else "no text"
        return bad(key, file, cause) | EMPTY
    try:
        data = text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
        return bad(key, file, "not UTF-8", str(error)) | EMPTY
    return {"key": key, "file": file, "content": content_hash(data), "cause": "", "detail": "", "text": text}


def _jsonl_unit(file: Path, name: str, options: dict[str, Any]) -> tuple:
    """Its column is told from the first lines that can be read."""
    columns: dict[str, None] = {}
    try:
        with file.open("rb") as lines:
            empty = True
            for line in islice(iter(lambda: lines.readline(MOST_LINE_BYTES), b""), LOOKED_AT):
                empty = False
                row = parse_json(line.removeprefix(BOM))
                columns.update(dict.fromkeys(row if isinstance(row, dict) else ()))
    except OSError as error:
        return ("bad", name, name, "unreadable file", f"{type(error).__name__}: {error.strerror}")
    if empty:
        return ("bad", name, name, "zero bytes")
    if not columns:  # each line will be told of
        return ("jsonl", str(file), name, options["column"] or TEXT_COLUMNS[0])
    return ("jsonl", str(file), name, find_column(columns, options["column"], TEXT_COLUMNS, "column", name))


def _parquet_units(file: Path, name: str, options: dict[str, Any]) -> list[tuple]:
    try:
        parquet = pq.ParquetFile(file)
    except Exception as error:  # pyarrow's, or the system's
        return [("bad", name, name, "broken parquet", f"{type(error).__name__}: {error}")]
    column = find_column(parquet.schema_arrow.names, options["column"], TEXT_COLUMNS, "column", name)
    units, row = [], 0
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        units.append(("parquet", str(file), name, group, row, rows, column))
        row += rows
    return units


def _read_txt(path: str, name: str) -> Iterator[dict[str, Any]]:
    """One document, or several of about 64 MB."""
    with open(path, "rb") as file:
        number, offset = 0, 0
        while data := _read_part(file):
            key = name if number == 0 else f"{name}#{number}"
            bom = len(BOM) if number == 0 and data.startswith(BOM) else 0
            try:
                yield make_record(key, name, data[bom:].decode())
            except UnicodeDecodeError as error:
                yield bad(key, name, "not UTF-8", f"byte {offset + bom + error.start + 1}") | EMPTY
            number, offset = number + 1, offset + len(data)
        if number == 0:
            yield bad(name, name, "zero bytes") | EMPTY


def _read_part(file: BufferedReader) -> bytes:
    """To the end of a line, or, where that is far, of a character."""
    data = file.read(PART_BYTES)
    if len(data) == PART_BYTES:
        data += file.readline(PART_BYTES)
        for _ in range(3):
            if not data.endswith(b"\n") and file.peek(1)[:1] and file.peek(1)[0] & 0xC0 == 0x80:
                data += file.read(1)
    return data


def _read_jsonl(path: str, name: str, column: str) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as lines:
        number = 0
        while line := lines.readline(MOST_LINE_BYTES):
            number += 1
            key = f"{name}:{number}"
            if len(line) == MOST_LINE_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MOST_LINE_BYTES)
                yield bad(key, name, "enormous text", f"a line of more than {MOST_LINE_BYTES >> 20} MB") | EMPTY
                continue
            line = line.removeprefix(BOM)
            if line.strip():
                row = parse_json(line)
                if isinstance(row, str):
                    cause = "not UTF-8" if row.startswith("not UTF-8") else "unreadable line"
                    yield bad(key, name, cause, row) | EMPTY
                else:
                    yield make_record(key, name, row.get(column))


def _read_parquet(path: str, name: str, group: int, first: int, rows: int, column: str) -> Iterator[dict[str, Any]]:
    number = first
    try:
        for batch in pq.ParquetFile(path).iter_batches(256, row_groups=[group], columns=[column]):
            for value in batch.column(0):
                try:
                    yield make_record(f"{name}:{number}", name, value.as_py())
                except UnicodeDecodeError as error:
                    yield bad(f"{name}:{number}", name, "not UTF-8", f"byte {error.start + 1}") | EMPTY
                number += 1
    except Exception as error:  # pyarrow's, of a broken page: what follows in the group is lost with it
        for lost in range(number, first + rows):
            yield bad(f"{name}:{lost}", name, "broken parquet", f"{type(error).__name__}: {error}") | EMPTY
