"""Weights of corpora: shares, whole epochs of each, the same in every stream; and a resume with files of one's own."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.data.bad_files import colors, encode
from tfusion.callbacks.ema import EMA
from tfusion.data.image_files import ImageFiles
from tfusion.data.order import PATTERN, Order
from tfusion.data.text_files import TextFiles
from tfusion.data.text_pieces import TextPieces

WEIGHTS = [(1.0, 1.0), (3.0, 1.0), (0.2, 0.5, 0.3), (1000.0, 1.0, 5.0)]


def owner(sizes: tuple[int, ...], document: int) -> tuple[int, int]:
    for corpus, size in enumerate(sizes):
        if document < size:
            return corpus, document
        document -= size
    raise AssertionError(document)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_are_those_asked_for_at_any_time_and_in_every_stream(weights: tuple[float, ...]) -> None:
    sizes = (7, 40, 11)[: len(weights)]
    order = Order("image", sizes, weights, 3)
    owners = [owner(sizes, order.element(n)[1])[0] for n in range(2 * PATTERN)]
    for start in (0, PATTERN, 1234):  # any PATTERN elements in a row
        counts = Counter(owners[start : start + PATTERN])
        for corpus, weight in enumerate(weights):
            assert abs(counts[corpus] / PATTERN - weight / sum(weights)) <= 1 / PATTERN
    for end in range(50, PATTERN, 997):  # and evenly within
        for corpus, weight in enumerate(weights):
            assert abs(owners[:end].count(corpus) - end * weight / sum(weights)) <= len(weights)
    for streams in (8, 48):
        for stream in (0, 5):
            taken = Counter(owners[(stream + n * streams) % PATTERN] for n in range(PATTERN))
            for corpus, weight in enumerate(weights):
                assert abs(taken[corpus] / PATTERN - weight / sum(weights)) <= 1 / PATTERN


@pytest.mark.parametrize("weights", [*WEIGHTS, None])
def test_each_corpus_goes_through_whole_epochs(weights: tuple[float, ...] | None) -> None:
    sizes = (7, 40, 11)[: len(weights or "123")]
    order = Order("text", sizes, weights, 3)
    elements = [order.element(n) for n in range(3 * PATTERN)]
    seen: dict[int, list[tuple[int, int]]] = {}
    for epoch, document in elements:
        corpus, place = owner(sizes, document) if weights else (0, document)
        seen.setdefault(corpus, []).append((epoch, place))
    assert len(seen) == (len(sizes) if weights else 1)
    for corpus, taken in seen.items():
        size = sizes[corpus] if weights else sum(sizes)
        whole = [taken[start : start + size] for start in range(0, len(taken) - size + 1, size)]
        orders = set()
        for number, epoch in enumerate(whole):
            assert {e for e, _ in epoch} == {number}
            assert sorted(place for _, place in epoch) == list(range(size))
            orders.add(tuple(place for _, place in epoch))
        assert len(whole) < 3 or len(orders) > 1


def test_corpora_of_one_size_have_orders_of_their_own() -> None:
    order = Order("text", (30, 30), (1.0, 1.0), 0)
    documents = [order.element(n)[1] for n in range(60)]
    first, second = [d for d in documents if d < 30], [d - 30 for d in documents if d >= 30]
    assert sorted(first) == sorted(second) == list(range(30)) and first != second


def test_weights_of_texts_are_in_bytes(byte_tokenizer) -> None:
    short, long = ["ab\n"] * 50, ["a much longer line than that\n" * 20] * 10
    pieces = TextPieces([short, long], byte_tokenizer, 200, (3.0, 1.0))
    order = Order("text", pieces.sizes, pieces.weights, 0)
    read = Counter()
    for n in range(PATTERN):
        document = order.element(n)[1]
        read[document >= pieces.sizes[0]] += len(pieces[document].elements[0])
    assert read[False] / (read[False] + read[True]) == pytest.approx(0.75, abs=0.002)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0]])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_wrong_weights_are_refused(tiny_data, pictures, texts, kind: str, weights: list[float]) -> None:
    class Other:
        image_size = pictures.image_size
        name = "other"

    corpora = {"image_corpora": [pictures, Other()]} if kind == "image" else {"text_corpora": [texts, Other()]}
    with pytest.raises(ValueError, match=rf"data.{kind}_weights is \[.*for 2 {kind} corpora: expected one number"):
        tiny_data(**corpora, **{f"{kind}_weights": weights})


@pytest.fixture
def fit(tmp_path: Path, tiny_module, tiny_data, tiny_trainer):
    """`fit(folder, steps, resume)` with two corpora of each kind in the folder -> losses, checkpoint."""

    def run(folder: Path, steps: int, resume: str | None = None) -> tuple[list[float], str]:
        data = tiny_data(
            image_corpora=[ImageFiles(str(folder / name), 8, flip=name == "a") for name in ("a", "b")],
            text_corpora=[TextFiles(str(folder / f"{name}.jsonl")) for name in ("c", "d")],
            image_weights=[3, 1],
            text_weights=[1, 2],
        )
        module, losses = tiny_module(seed=1), []
        trainer = tiny_trainer(steps, callbacks=[EMA(0.9)])
        module.on_train_batch_end = lambda *_: losses.append(float(module.step_metrics()["train/loss"]))
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        path = str(tmp_path / f"{steps}{' resumed' if resume else ''}.ckpt")
        trainer.save_checkpoint(path)
        return losses, path

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    for seed, name in enumerate(("a", "b")):
        (path / name).mkdir(parents=True)
        for n in range(9):
            (path / name / f"{n}.png").write_bytes(encode(colors(100 * seed + n, 8), "PNG"))
            (path / name / f"{n}.txt").write_text(f"{name} {n}\nanother {n}")
    for name in ("c", "d"):
        (path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {n} is a line"}}\n' for n in range(40)))
    return path


def test_a_resume_is_exact_where_files_moved_and_refused_where_they_changed(fit, folder: Path, tmp_path: Path) -> None:
    whole, end = fit(folder, 6)
    before, half = fit(folder, 3)
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(folder, moved)
    after, resumed = fit(moved, 6, half)
    assert before + after == whole and len(whole) == 6
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (end, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (moved / "a" / "3.png").write_bytes(encode(colors(999, 8), "PNG"))
    with pytest.raises(ValueError, match="the checkpoint was trained with content .* needs the same data"):
        fit(moved, 6, half)
