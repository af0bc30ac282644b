"""Training steps of one rank, for a DataLoader with any number of workers.

One item is a whole optimizer step: the list of this rank's A micro-batches, each carrying the counts of the step, the
last one the data's position after it. Worker k of n takes steps start + k, start + k + n, ...; n divides lanes, so a
stream is always read by one worker. Ranks, micro-batches and workers only divide rows among themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import IterableDataset, get_worker_info

from tfusion.data.mixture import Mixture, Stream, StreamPosition
from tfusion.data.order import stream_of
from tfusion.sequence import Batch, collate


@dataclass(frozen=True)
class StepLayout:
    """How the R rows of a step are divided: A micro-batches, W ranks, lanes.

    Raises:
        ValueError: R is not divided; the message names the nearest R that is.
    """

    rows_per_step: int
    lanes: int
    micro_batches: int = 1
    ranks: int = 1
    rank: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        parts = self.micro_batches * self.ranks
        if self.rows_per_step < 1 or self.rows_per_step % parts:
            nearest = max(1, round(self.rows_per_step / parts)) * parts
            raise ValueError(
                f"rows_per_step {self.rows_per_step} is not divided by {self.micro_batches} micro-batches x "
                f"{self.ranks} ranks = {parts}: take {nearest} rows, or another accumulate_grad_batches or devices"
            )
        if self.workers and self.lanes % self.workers:
            nearest = max(n for n in range(1, self.lanes + 1) if self.lanes % n == 0 and n <= max(self.workers, 1))
            raise ValueError(
                f"num_workers {self.workers} does not divide lanes {self.lanes}, so workers would share streams: "
                f"take {nearest} (or 0)"
            )

    @property
    def num_streams(self) -> int:
        return self.lanes * self.rows_per_step

    def slots(self, micro_batch: int) -> range:
        """The rows of a micro-batch that this rank holds."""
        size = self.rows_per_step // (self.micro_batches * self.ranks)
        start = (micro_batch * self.ranks + self.rank) * size
        return range(start, start + size)


class StepDataset(IterableDataset):
    """Endless steps from `start` on.

    Args:
        mixture: sources and shares.
        layout: which rows are this rank's.
        seed: of the rows' noise.
        start: the first global step.
        positions: where each stream stands at `start`; a stream that is not named stands at its beginning.
    """

    def __init__(
        self, mixture: Mixture, layout: StepLayout, seed: int, start: int, positions: dict[int, tuple]
    ) -> None:
        self.mixture, self.layout, self.seed = mixture, layout, seed
        self.start, self.positions = start, positions

    def __iter__(self) -> Iterator[list[Batch]]:
        info = get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        streams: dict[int, Stream] = {}
        step = self.start + first
        while True:
            yield self._step(step, streams)
            step += stride

    def _step(self, step: int, streams: dict[int, Stream]) -> list[Batch]:
        layout, batches, after = self.layout, [], []
        for micro_batch in range(layout.micro_batches):
            rows, seeds = [], []
            for slot in layout.slots(micro_batch):
                number = stream_of(step, slot, layout.lanes, layout.rows_per_step)
                if number not in streams:
                    position = StreamPosition(*self.positions.get(number, ()))
                    streams[number] = Stream(self.mixture, number, position)
                rows.append(streams[number].next_row())
                after.append((number, tuple(streams[number].position)))
                seeds.append(("noise", self.seed, step, slot))
            batches.append(collate(rows, self.mixture.shape, seeds))
        counts = sum(batch.step_counts for batch in batches)
        for batch in batches:
            batch.step_counts = counts
        batches[-1].position = (step + 1, tuple(after))
        return batches


class MicroBatches:
    """The micro-batches of the steps of a loader, one after another; of no known length."""

    def __init__(self, steps) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[Batch]:
        for batches in self.steps:
            yield from batches

    @property
    def _iterator(self):
        """Lightning ends a loader's workers through the attribute of this name."""
        return getattr(self.steps, "_iterator", None)

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self.steps._iterator = value
