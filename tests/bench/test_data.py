"""The bench of the loader: what it prints hangs together, and a loader that is slow is seen."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.data.picture_folders import write_pairs
from tfusion.bench import data as bench
from tfusion.data.mixture import Stream
from tfusion.training.transfusion import TransfusionModule

ROOT = Path(__file__).parents[2]
FLAGS = ["--steps", "3", "--warmup", "2", "--rounds", "1", "--loader-steps", "2", "--workers", "0", "1"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A tiny model on 12 pictures and a poem."""
    (tmp_path / "pictures").mkdir()
    write_pairs(tmp_path / "pictures")
    (tmp_path / "poem.txt").write_text("".join(f"line {n} of a poem\n" for n in range(400)))
    pictures = {"path": str(tmp_path / "pictures"), "image_size": 64}
    sizes = {"vocab_size": 300, "dim": 16, "num_layers": 1, "num_heads": 2}
    overlay = {
        "trainer": {"default_root_dir": str(tmp_path / "run"), "precision": "32-true"},
        "model": {"init_args": {"model": {"init_args": sizes}}},
        "data": {
            "vocab_size": 300,
            "image_corpora": [{"class_path": "tfusion.data.ImageFiles", "init_args": pictures}],
            "text_corpora": [
                {"class_path": "tfusion.data.TextFiles", "init_args": {"path": str(tmp_path / "poem.txt")}}
            ],
        },
    }
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay))
    return [*FLAGS, "--config", str(ROOT / "configs/pictures.yaml"), "--config", str(path)]


def printed(arguments: list[str], capsys: pytest.CaptureFixture) -> dict:
    capsys.readouterr()
    bench.main(arguments)
    [line] = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = printed(arguments, capsys)
    assert result["kind"] == "pictures" and len(result["corpora"]) == 2
    assert (result["rows"], result["seq_len"], result["workers"], result["steps"]) == (4, 256, 0, 3)
    assert result["ratio"] == pytest.approx(result["real_step_s"] / result["resident_step_s"])
    assert result["ratio_of_means"] > 0 and "ratio_error" not in result  # of one round
    assert result["loader"].keys() == {"0", "1"}
    for rates in result["loader"].values():
        assert rates["images_per_s"] > 0
        # a row has 256 positions, nearly all of them used, and pictures of 66 positions and a caption
        assert rates["positions_per_s"] / rates["images_per_s"] > 66
    assert 0 < result["positions_a_step"] <= 4 * 256
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_a_slow_loader_is_seen(
    arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that take 0.25 s each make steps of 4 rows at least a second long, on real data only."""
    next_row = Stream.next_row
    monkeypatch.setattr(Stream, "next_row", lambda stream: (time.sleep(0.25), next_row(stream))[1])
    monkeypatch.setattr(bench, "loader_rates", lambda *args: {})
    result = printed(arguments, capsys)
    assert result["real_step_s"] > 1
    assert result["real_step_s"] > result["resident_step_s"] + 0.5


def test_what_was_made_ahead_is_thrown_away() -> None:
    """Else a part could live on what workers had made during the other one, and a slow loader would look fast."""
    made = [SimpleNamespace(position=n, number=n, to=lambda device, n=n: n) for n in range(40)]
    parts = list(bench.InTurn(made, many=3, rounds=2, ahead=4))
    assert [getattr(batch, "number", batch) for batch in parts] == [4, 5, 6] * 2 + [11, 12, 13] * 2


def test_workers_make_ahead_what_is_thrown_away(
    arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers and two micro-batches a step: two steps ahead each, of two micro-batches."""
    seen, in_turn = [], bench.InTurn
    monkeypatch.setattr(bench, "InTurn", lambda *args: (seen.append(args[3]), in_turn(*args))[1])
    monkeypatch.setattr(bench, "loader_rates", lambda *args: {})
    printed([*arguments, "--data.num_workers", "2", "--trainer.accumulate_grad_batches", "2"], capsys)
    printed(arguments, capsys)
    assert seen == [2 * 2 * 2, 0]


def test_ratio_of_rounds() -> None:
    found = bench.ratio_of("ratio", [[2.0, 2.0], [3.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]], bench.median)
    assert found == {"ratio": 1.25, "ratio_error": 0.25}


def test_batches_come_from_the_loader_and_again_from_memory(
    arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of 5 steps, of which those of the first round compile and are not counted."""
    seen, training_step = [], TransfusionModule.training_step
    monkeypatch.setattr(
        TransfusionModule,
        "training_step",
        lambda self, batch, *rest: (seen.append(int(batch.token_ids.sum())), training_step(self, batch, *rest))[1],
    )
    monkeypatch.setattr(bench, "loader_rates", lambda *args: {})
    result = printed([*arguments, "--rounds", "2"], capsys)
    parts = [seen[at : at + 5] for at in range(0, len(seen), 5)]
    assert len(seen) == 30 and parts[::2] == parts[1::2]
    assert len(set(map(tuple, parts))) == 3
    assert result["steps"] == 6 and result["ratio_error"] >= 0


def test_steps_are_counted_to_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's seconds begin at the end of the step before; the first of a part are left out."""
    ends = bench.StepEnds(warmup=1, steps=2)
    now, trainer = 0.0, SimpleNamespace(accumulate_grad_batches=2, global_step=0)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)
    for micro_batch in range(12):
        trainer.global_step = (micro_batch + 1) // 2
        now += micro_batch
        ends.on_train_batch_end(trainer, None, None, None, micro_batch)
    assert ends.times == [[2 + 3, 4 + 5], [8 + 9, 10 + 11]]


@pytest.mark.slow
def test_a_cache_of_latents(
    config_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny cache that stands where the config expects one."""
    monkeypatch.chdir(config_folder)
    small = {"dim": 16, "num_layers": 1, "num_heads": 2}
    flags = [f"--model.init_args.model.init_args.{name}={value}" for name, value in small.items()]
    flags += ["--model.init_args.compile_blocks=false", f"--trainer.default_root_dir={tmp_path}"]
    result = printed([*FLAGS, "--config", "configs/small/transfusion.yaml", *flags], capsys)
    assert result["kind"] == "latents"
    assert result["loader"]["0"]["images_per_s"] > 0
