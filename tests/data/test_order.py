"""The order of documents: epochs are permutations, streams share them out, and nothing but the arguments matters."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from tfusion.data import order
from tfusion.data.order import element, stream_of


@pytest.mark.parametrize("size", [1, 2, 11, 64])
@pytest.mark.parametrize("corpus", ["text", "image"])
def test_every_epoch_is_a_permutation(corpus: str, size: int) -> None:
    for epoch in range(5):
        elements = [element(corpus, size, 3, index) for index in range(epoch * size, (epoch + 1) * size)]
        assert [e for e, _ in elements] == [epoch] * size
        assert sorted(d for _, d in elements) == list(range(size))


def test_epochs_corpora_and_seeds_have_orders_of_their_own() -> None:
    def epoch(corpus: str, seed: int, number: int) -> tuple[int, ...]:
        return tuple(element(corpus, 50, seed, number * 50 + place)[1] for place in range(50))

    orders = {epoch(c, s, n) for c in ("text", "image") for s in (0, 1) for n in range(3)}
    assert len(orders) == 12
    assert tuple(range(50)) not in orders


@pytest.mark.parametrize(("size", "rows_per_step", "lanes"), [(1000, 4, 8), (11, 8, 8), (3, 5, 2)])
def test_streams_partition_the_endless_sequence(size: int, rows_per_step: int, lanes: int) -> None:
    """Also where a corpus is smaller than the number of streams: each document is read equally often."""
    streams, taken = rows_per_step * lanes, 6
    read = [stream + n * streams for stream in range(streams) for n in range(taken)]
    assert sorted(read) == list(range(streams * taken))
    counts = Counter(element("image", size, 0, index)[1] for index in read)
    assert max(counts.values()) - min((counts[d] for d in range(size)), default=0) <= 1


def test_each_round_of_lanes_visits_each_stream_once() -> None:
    for start in (0, 7, 800):
        lanes, rows = 8, 6
        visited = [stream_of(step, slot, lanes, rows) for step in range(start, start + lanes) for slot in range(rows)]
        assert sorted(visited) == list(range(lanes * rows))
    assert stream_of(3, 2, 8, 6) == stream_of(11, 2, 8, 6) == 20


def test_is_pure() -> None:
    """The same backwards, again, and without what was remembered."""
    forwards = [element("text", 17, 5, index) for index in range(1000)]
    order._permutations.cache_clear()
    assert [element("text", 17, 5, index) for index in reversed(range(1000))] == forwards[::-1]


@pytest.mark.parametrize(("size", "kept"), [(17, 32), (2**19, 8), (2**22, 2)])
def test_of_a_large_corpus_few_permutations_are_kept(size: int, kept: int, monkeypatch) -> None:
    """Every process of a loader keeps them, 4 bytes an element."""
    monkeypatch.setattr(order.np.random, "Philox", lambda seed: SimpleNamespace(random_raw=lambda n: np.zeros(1)))
    order._permutations.cache_clear()
    permutations = order._permutations("image", size, 0)
    assert {permutations(epoch).itemsize for epoch in range(40)} == {4}
    assert permutations.cache_info().currsize == kept
    order._permutations.cache_clear()
