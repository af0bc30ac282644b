"""Records of a user's files in one memory-mapped Arrow table: read, checked and converted once, then shared.

`datasets` writes the table into the cache folder, with as many processes as help, under a name made of the files'
place, names, sizes and times and of how they are read; later runs and other processes map it. Bad records are rows
too, with a cause in place of content, so they are counted and named as often as anyone asks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tfusion.data.corpora import cache_folder
from tfusion.data.record_builder import Reader, RecordBuilder

log = logging.getLogger(__name__)

VERSION = 2  # raised when what a reader makes of a file changes
BYTES_A_PROCESS = 2**25  # of files; fewer are not worth another process
COMMON = {  # of every table; `content` is a hash of what the record holds
    "key": datasets.Value("string"),
    "file": datasets.Value("string"),
    "content": datasets.Value("int64"),
    "cause": datasets.Value("string"),  # "" = good
    "detail": datasets.Value("string"),
}


@dataclass(frozen=True)
class BadRecord:
    """A record that is not used: why, and where it is."""

    corpus: str
    cause: str
    file: str
    key: str
    detail: str = ""


def build_table(
    reader: Reader,
    units: list[Any],
    options: dict[str, Any],
    columns: dict[str, Any],
    root: Path,
    stamps: list[tuple[str, int, int]],
) -> datasets.Dataset:
    """The table of all records, read now or mapped from the cache.

    Args:
        reader: a function at the top of a module; a unit and the options -> its records, `COMMON` and `columns`.
        units: parts that can be read apart, in order (pictures, shards, row groups, files).
        options: what else the reader goes by; part of the cache's name, but for `corpus`, the name in errors.
        columns: features beside `COMMON`.
        root: where the files lie: two folders may hold files of the same names, sizes and times.
        stamps: of `files.stamps`, what says whether the files have changed.
    """
    read_by = {name: value for name, value in options.items() if name != "corpus"}
    name = json.dumps([VERSION, reader.__name__, read_by, str(root), stamps], default=str)
    datasets.logging.set_verbosity_error()  # its warnings are about its own settings
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # a log file would hold each of their states
    builder = RecordBuilder(
        cache_dir=str(cache_folder() / "corpora"),
        config_id=hashlib.sha256(name.encode()).hexdigest()[:32],
        features=datasets.Features(COMMON | columns),
        gen_kwargs={"units": units, "reader": reader, "options": options},
    )
    try:
        builder.download_and_prepare(num_proc=_num_processes(len(units), sum(size for _, size, _ in stamps)))
    except OSError as error:
        raise ValueError(
            f"corpus {options['corpus']!r}: its records cannot be kept in {cache_folder()} ({error}); make room there, "
            "or set TFUSION_CACHE to a writable folder"
        ) from error
    if not builder.info.splits or not builder.info.splits["train"].num_examples:
        where = f" whose columns are {options['where']}" if options.get("where") else ""
        raise ValueError(f"corpus {options['corpus']!r}: {len(stamps)} files under {root} hold no record{where}")
    return builder.as_dataset(split="train")


def _num_processes(num_units: int, num_bytes: int) -> int | None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = min(cores, num_units, num_bytes // BYTES_A_PROCESS)
    return wanted if wanted > 1 else None


def bad(key: str, file: str, cause: str, detail: str = "") -> dict[str, Any]:
    """The row of a bad record, to which a reader adds empty columns of its own."""
    return {"key": key, "file": file, "content": 0, "cause": cause, "detail": detail[:300]}


def content_hash(*parts: bytes) -> int:
    """64 bits that change with any part."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True)


class Table:
    """The good rows of a table, and its bad records.

    Attributes:
        dataset: all rows, memory-mapped.
        rows: (N,) of the good ones.
        bad: the others.
    """

    def __init__(self, dataset: datasets.Dataset, corpus: str) -> None:
        self.dataset, self.corpus = dataset, corpus
        good = pc.equal(self.column("cause"), "")
        self.rows = np.flatnonzero(good.to_numpy())
        names = self.dataset.data.select(["cause", "file", "key", "detail"]).filter(pc.invert(good))
        self.bad = [BadRecord(corpus, **row) for row in names.to_pylist()]

    def column(self, name: str) -> pa.ChunkedArray:
        return self.dataset.data.column(name)

    def keys(self) -> list[str]:
        """Of the good rows."""
        return self.column("key").take(pa.array(self.rows)).to_pylist()

    def content(self, rows: np.ndarray) -> str:
        """A hash of what these rows hold, whatever machine they are on."""
        return hashlib.sha256(self.column("content").to_numpy()[rows].tobytes()).hexdigest()[:16]


def split_rows(keys: Sequence[str], val_share: float) -> np.ndarray:
    """(N,) bool, True where a record is validated: by its key alone; one at least, where there are two or more."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    places = np.array([int.from_bytes(digest[8:16], "little") for digest in digests], dtype=np.uint64)
    held_out = places < np.uint64(min(val_share * 2.0**64, 2.0**64 - 2048))
    if val_share > 0 and len(keys) > 1 and not held_out.any():
        held_out[places.argmin()] = True
    return held_out
