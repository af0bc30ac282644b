"""What corpora of files share: where their training and validation files are, and their tables, read once."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path

from tfusion.data.files import check_apart
from tfusion.data.records import Table

log = logging.getLogger(__name__)


class FileCorpus(ABC):
    """A corpus of the files at `path`, and of those at `val` where the validation data is apart."""

    def __init__(self, path: str | list[str], val: str | list[str] | None, val_share: float, name: str | None) -> None:
        self.path, self.val, self.val_share = path, val, check_val_share(val_share)
        self._name = name
        self._tables: dict[str, Table] = {}

    @property
    def name(self) -> str:
        """In metrics: what it is called, or the last part of the path that says something."""
        return self._name or default_name(self.path)

    def prepare(self) -> None:
        """Read all files into the cache, unless that has been done; one process does it for all."""
        for table in self.tables():
            log.info("corpus %s: %d records, %d of them bad", self.name, len(table.dataset), len(table.bad))

    def tables(self) -> list[Table]:
        """All records, good and bad, of the training files and of separate validation files."""
        if self.val is not None:
            check_apart(self.path, self.val, self.name)
        return [self._table(path) for path in (self.path, self.val) if path is not None]

    def _table(self, path: str | list[str]) -> Table:
        if str(path) not in self._tables:
            self._tables[str(path)] = self._read(path)
        return self._tables[str(path)]

    @abstractmethod
    def _read(self, path: str | list[str]) -> Table:
        """The table of all records of the files, out of the cache or made now."""


def default_name(path: str | list[str]) -> str:
    """The last part of a path that says something: `flowers` of `data/flowers/64/*.tar`."""
    first = path if isinstance(path, str) else (path[0] if path else "")
    stems = [Path(part).stem for part in Path(first).parts if not set(part) & set("*?[")]
    stems = [stem for stem in stems if stem.strip("./\\") and not stem.isdigit()]
    return stems[-1] if stems else "files"


def check_val_share(val_share: float) -> float:
    """Raise ValueError unless it is a share that leaves something to train on."""
    if not 0 <= val_share < 1:
        raise ValueError(f"got val_share {val_share}, expected at least 0 and less than 1")
    return val_share
