"""Records that are not used: counted by cause, named, written down, and refused where they are too many."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from tfusion.data.records import BadRecord

EXAMPLES = 3  # named of each cause in a summary; all are in bad_records.jsonl


class BadRecords:
    """The bad records of a run's corpora.

    Args:
        max_share: of a corpus's records that may be bad, that share included.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.records: list[BadRecord] = []
        self.totals: Counter[str] = Counter()  # records of each corpus, good and bad

    def __len__(self) -> int:
        return len(self.records)

    def add(self, records: Iterable[BadRecord], corpus: str = "", total: int = 0) -> None:
        """Count bad records, and all records of a corpus where they are new."""
        self.records += records
        self.totals[corpus] += total

    def check(self) -> None:
        """Raise ValueError where a corpus has more bad records than allowed."""
        counts = Counter(record.corpus for record in self.records)
        for corpus, count in counts.items():
            total = max(self.totals[corpus], count)
            if count / total > self.max_share:  # the quotient of 29 and 100 is 0.29, 100 x 0.29 is less than 29
                raise ValueError(
                    f"corpus {corpus!r}: {count} of {total} records are bad ({count / total:.2%}), data.max_bad_share "
                    f"allows {self.max_share:.2%}:\n{self.summary(corpus)}\nMend or remove them, or raise "
                    "data.max_bad_share to train on the others"
                )

    def by_cause(self, corpus: str | None = None) -> dict[str, list[BadRecord]]:
        """The records of one corpus or all, the most frequent cause first."""
        causes: dict[str, list[BadRecord]] = defaultdict(list)
        for record in self.records:
            if corpus in (None, record.corpus):
                causes[record.cause].append(record)
        return dict(sorted(causes.items(), key=lambda item: -len(item[1])))

    def summary(self, corpus: str | None = None) -> str:
        """A line a cause: how many, and the first of them with file and key."""
        return "\n".join(
            f"  {len(records)} x {cause}: " + "; ".join(_named(record) for record in records[:EXAMPLES])
            for cause, records in self.by_cause(corpus).items()
        )

    def write(self, path: Path) -> None:
        """All of them, a JSON object a line."""
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for record in self.records:
                file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
        os.replace(temporary, path)


def _named(record: BadRecord) -> str:
    where = record.file if record.key in record.file else f"{record.file}, {record.key}"
    return f"{where} ({record.detail})" if record.detail else where
