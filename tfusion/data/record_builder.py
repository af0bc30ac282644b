"""Writes records into `datasets`' tables as `Dataset.from_generator` does, but so many bytes at a time, not records.

Texts are of very different lengths: parts of many long ones would not fit in memory, and a table of very many parts of
a few short ones is slow. A module of its own, because `datasets` replaces `os` and `open` in a builder's module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
from datasets.builder import Key

BYTES_A_WRITE = 2**26
MOST_RECORDS_A_WRITE = 10_000
LARGE = ("pixels", "text", "latents", "mirrored", "picture")  # columns that records' sizes are counted by
Reader = Callable[[Any, dict[str, Any]], Iterator[dict[str, Any]]]


@dataclass
class _Config(datasets.BuilderConfig):
    features: datasets.Features | None = None
    gen_kwargs: dict[str, Any] | None = None


class RecordBuilder(datasets.ArrowBasedBuilder):
    """Writes records to a table of `features`; `gen_kwargs` are those of `_read_all`."""

    BUILDER_CONFIG_CLASS = _Config

    def __init__(self, **settings: Any) -> None:
        super().__init__(writer_batch_size=MOST_RECORDS_A_WRITE, **settings)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.features)

    def _split_generators(self, _: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator("train", gen_kwargs=self.config.gen_kwargs)]

    def _generate_tables(self, **gen_kwargs: Any) -> Iterator[tuple[Key, pa.Table]]:
        for number, rows in enumerate(_in_parts(_read_all(**gen_kwargs))):
            yield Key(0, number), pa.Table.from_pylist(rows, schema=self.config.features.arrow_schema)


def _read_all(units: list[Any], reader: Reader, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for unit in units:
        for record in reader(unit, options):
            yield record | {name: _printable(record[name]) for name in ("key", "file", "detail")}


def _in_parts(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    size = 0
    for record in records:
        rows.append(record)
        size += sum(len(record.get(name, "")) for name in LARGE)
        # not a row alone: `datasets` keeps those in memory until it has many
        if (size >= BYTES_A_WRITE and len(rows) > 1) or len(rows) == MOST_RECORDS_A_WRITE:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _printable(text: str) -> str:
    """UTF-8, which the names of files and of a tar's members need not be, and Arrow's strings must."""
    return text.encode(errors="backslashreplace").decode()
