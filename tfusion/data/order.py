"""Which element comes next: a pure function of (seed, corpus, stream, how many the stream has taken).

A corpus is read as an endless sequence of epochs, each a permutation of its own. A run has S = lanes x R streams;
stream j takes elements j, j + S, j + 2 S, ... of that sequence, so a corpus smaller than S is no special case.
Row `slot` of step s is the next packed row of stream (s mod lanes) R + slot.
"""

from __future__ import annotations

import functools

import numpy as np

from tfusion.randomness import seed_from


def element(corpus: str, size: int, seed: int, index: int) -> tuple[int, int]:
    """(epoch, document) of the index-th element of a corpus of `size` elements."""
    epoch, place = divmod(index, size)
    return epoch, int(_permutation(corpus, size, seed, epoch)[place])


def stream_of(step: int, slot: int, lanes: int, rows_per_step: int) -> int:
    """The stream that row `slot` of a step is drawn from."""
    return (step % lanes) * rows_per_step + slot


@functools.lru_cache(maxsize=16)  # the streams of a run are within a few epochs of each other
def _permutation(corpus: str, size: int, seed: int, epoch: int) -> np.ndarray:
    # numpy promises the same raw bits in every version, and nothing of `permutation`
    return np.random.Philox(seed_from("order", corpus, seed, epoch)).random_raw(size).argsort(kind="stable")
