"""`TextFiles`: texts out of a user's own files, mapped from disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from tfusion.data.corpora import Split, check_split
from tfusion.data.file_corpus import FileCorpus
from tfusion.data.files import find_files, stamps
from tfusion.data.records import Table, build_table, split_rows
from tfusion.data.text_records import COLUMNS, list_units, read_texts


class TextFiles(FileCorpus):
    """Texts in `.txt` (a file is a document), `.jsonl` (a line) or `.parquet` (a row), or folders of these.

    They are read and checked once, into the cache folder, and mapped from there by all processes. What cannot be used
    is left out and reported.

    Args:
        path: a folder, a file, a glob, or a list of these; relative to where the command is run.
        val: where the validation texts are; None = hold out `val_share` of the documents of `path`, by a hash of the
            key; of a single document its end.
        val_share: share held out where `val` is not given.
        name: in metrics; None = the last part of the path.
        column: of jsonl and parquet; None = text or content.
    """

    def __init__(
        self,
        path: str | list[str],
        val: str | list[str] | None = None,
        val_share: float = 0.05,
        name: str | None = None,
        column: str | None = None,
    ) -> None:
        super().__init__(path, val, val_share, name)
        self._options: dict[str, Any] = {"corpus": self.name, "column": column}

    def load(self, split: Split) -> Sequence[str]:
        """The split's texts; raises ValueError where there are no files or their format cannot be told."""
        check_split(split)
        table = self._table(self.val if self.val is not None and split == "val" else self.path)
        rows = table.rows[:0] if split == "test" else table.rows
        if self.val is None and self.val_share > 0 and len(rows) == 1:
            return _part_of(StoredTexts(table, rows), split, self.val_share)
        if self.val is None:
            held_out = split_rows(table.keys(), self.val_share)
            rows = rows[:0] if split == "test" else rows[held_out if split == "val" else ~held_out]
        return StoredTexts(table, rows)

    def _read(self, path: str | list[str]) -> Table:
        root, files = find_files(path, self.name)
        units = list_units(root, files, self._options)
        return Table(build_table(read_texts, units, self._options, COLUMNS, root, stamps(files, root)), self.name)


class StoredTexts(Sequence[str]):
    """Some rows of a table of texts.

    Args:
        table: the records.
        rows: (N,) of the table.
        span: bytes of the only row that are used; None = all of all.
    """

    def __init__(self, table: Table, rows: np.ndarray, span: tuple[int, int] | None = None) -> None:
        self.table, self.rows, self.span = table, rows, span

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        return self.utf8(index).tobytes().decode()

    def utf8(self, index: int) -> memoryview:
        """A text's bytes, where they lie on disk."""
        data = memoryview(self.table.column("text")[int(self.rows[index])].as_buffer())
        return data if self.span is None else data[self.span[0] : self.span[1]]

    def sizes(self) -> np.ndarray:
        """(N,) bytes of each text, without reading them."""
        if self.span is not None:
            return np.array([self.span[1] - self.span[0]])
        return pc.binary_length(self.table.column("text")).to_numpy()[self.rows]

    @property
    def content(self) -> str:
        """A hash of all texts."""
        return self.table.content(self.rows) + (f":{self.span}" if self.span else "")


def _part_of(texts: StoredTexts, split: Split, val_share: float) -> StoredTexts:
    """A single text's beginning, to train on, or its end, cut at a line end if one is near."""
    data = texts.utf8(0)
    middle = int(len(data) * (1 - val_share))
    near = max(0, middle - (len(data) - middle) // 2)
    line_end = data[near:middle].tobytes().rfind(b"\n") + 1
    cut = near + line_end if line_end else middle
    while cut < len(data) and data[cut] & 0xC0 == 0x80:  # not within a character
        cut += 1
    return StoredTexts(texts.table, texts.rows, (0, cut) if split == "train" else (cut, len(data)))
