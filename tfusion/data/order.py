"""Which element comes next: a pure function of (seed, corpus, stream, how many the stream has taken).

A corpus is read as an endless sequence of epochs, each a permutation of its own. A run has S = lanes x R streams;
stream j takes elements j, j + S, j + 2 S, ... of that sequence, so a corpus smaller than S is no special case.
Row `slot` of step s is the next packed row of stream (s mod lanes) R + slot.
Several corpora of a kind are one corpus of all their elements, or, with weights, take turns in a fixed pattern.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tfusion.randomness import seed_from

KEPT = 2**22  # elements of a corpus's permutations
PATTERN = 10_007  # turns; a prime, so that streams, which take every S-th, all see the whole pattern


@dataclass(frozen=True)
class Order:
    """The endless sequence of the elements of one kind.

    Args:
        kind: "text" or "image"; gives it permutations of its own.
        sizes: elements of each corpus, which are numbered through: the second corpus follows the first.
        weights: how often each corpus takes its turn, in proportion; None = every element once an epoch.
        seed: of the permutations.
    """

    kind: str
    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None
    seed: int

    def element(self, index: int) -> tuple[int, int]:
        """(epoch, document) of the index-th element, the epoch being that of the document's own corpus."""
        if self.weights is None:
            return element(self.kind, sum(self.sizes), self.seed, index)
        corpora, ranks, counts = self._pattern
        block, turn = divmod(index, PATTERN)
        corpus = int(corpora[turn])
        taken = block * int(counts[corpus]) + int(ranks[turn])  # by this corpus, before
        # its number in the name: corpora of one size would else go through the same permutations side by side
        epoch, document = element(f"{self.kind} {corpus}", self.sizes[corpus], self.seed, taken)
        return epoch, sum(self.sizes[:corpus]) + document

    @functools.cached_property
    def _pattern(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whose each turn is, the how-manieth of its corpus it is, and how many each corpus has: evenly spread."""
        shares = np.array(self.weights, dtype=np.float64) / sum(self.weights)  # type: ignore[arg-type]
        counts = np.maximum(np.rint(shares * PATTERN).astype(np.int64), 1)
        counts[counts.argmax()] += PATTERN - counts.sum()
        corpora = np.repeat(np.arange(len(counts)), counts)
        ranks = np.concatenate([np.arange(count) for count in counts])
        turns = np.argsort((ranks + 0.5) / counts[corpora], kind="stable")
        return corpora[turns], ranks[turns], counts


def element(corpus: str, size: int, seed: int, index: int) -> tuple[int, int]:
    """(epoch, document) of the index-th element of a corpus of `size` elements."""
    epoch, place = divmod(index, size)
    return epoch, int(_permutations(corpus, size, seed)(epoch)[place])


def stream_of(step: int, slot: int, lanes: int, rows_per_step: int) -> int:
    """The stream that row `slot` of a step is drawn from."""
    return (step % lanes) * rows_per_step + slot


@functools.lru_cache(maxsize=64)
def _permutations(corpus: str, size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Of a corpus, by epoch; the last ones are kept: the streams of a run are within a few epochs of each other, of a
    large corpus within two.
    """
    dtype = np.uint32 if size <= 2**32 else np.int64  # every process of a loader keeps them

    def permutation(epoch: int) -> np.ndarray:
        # numpy promises the same raw bits in every version, and nothing of its own `permutation`
        bits = np.random.Philox(seed_from("order", corpus, seed, epoch)).random_raw(size)
        return bits.argsort(kind="stable").astype(dtype)

    return functools.lru_cache(maxsize=min(max(KEPT // size, 2), 32))(permutation)
