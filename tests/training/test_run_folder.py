"""The run folder: which checkpoint is meant, one writer at a time, and metrics.csv as exact bytes."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tfusion.training import run_folder
from tfusion.training.run_folder import EventsLogger, MetricsLogger


def checkpoint(root: Path, name: str) -> Path:
    path = root / "checkpoints" / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


def test_finds_the_checkpoint_that_is_meant(tmp_path: Path) -> None:
    best, other = checkpoint(tmp_path, "best.ckpt"), checkpoint(tmp_path, "step=0000003.ckpt")
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to(other.name)
    assert run_folder.find_checkpoint(tmp_path, "last") == tmp_path / "checkpoints" / "last.ckpt"
    assert run_folder.find_checkpoint(tmp_path, "best") == best
    assert run_folder.find_checkpoint(Path("elsewhere"), str(other)) == other


@pytest.mark.parametrize("name", ["last", "best", "a/b.ckpt"])
def test_a_missing_checkpoint_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"--ckpt_path {name}, but .* does not exist"):
        run_folder.find_checkpoint(tmp_path, name)


def test_a_link_that_points_nowhere_is_missing(tmp_path: Path) -> None:
    checkpoint(tmp_path, "x").unlink()
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to("gone.ckpt")
    with pytest.raises(ValueError, match="does not exist"):
        run_folder.find_checkpoint(tmp_path, "last")


def test_says_which_checkpoint_there_is_where_the_one_named_is_missing(tmp_path: Path) -> None:
    best = checkpoint(tmp_path, "best.ckpt")
    with pytest.raises(ValueError, match=rf"got --ckpt_path last, .* has best.ckpt: give --ckpt_path {best}"):
        run_folder.find_checkpoint(tmp_path, "last")


def test_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    run_folder.refuse_used_folder(tmp_path)
    (tmp_path / "metrics.csv").touch()  # a run killed before its first checkpoint may start again
    run_folder.refuse_used_folder(tmp_path)
    checkpoint(tmp_path, "step=0000001.ckpt")
    with pytest.raises(ValueError, match=r"\(step=0000001\.ckpt\).*--ckpt_path /.*step=0000001\.ckpt\)"):
        run_folder.refuse_used_folder(tmp_path)
    checkpoint(tmp_path, "last.ckpt")
    with pytest.raises(ValueError, match=r"--ckpt_path last\), .*default_root_dir.*delete"):
        run_folder.refuse_used_folder(tmp_path)


HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
file.write("pid 123")
file.flush()
print("held", flush=True)
if os.fork() == 0:  # as a data worker: it lives on after the kill, without the lock
    time.sleep(3)
    os._exit(0)
time.sleep(60)
"""


def test_one_writer_at_a_time_and_free_after_a_kill(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"another process \(pid 123\) is writing the run folder"):
            run_folder.lock(tmp_path)
        checkpoint(tmp_path, "best.ckpt")
        with pytest.raises(ValueError, match=r"another process \(pid 123\) is writing the run folder"):
            run_folder.refuse_used_folder(tmp_path)  # not: delete it
    finally:
        other.kill()
        other.wait()
    run_folder.lock(tmp_path)
    run_folder.lock(tmp_path)  # a second fit in one process
    assert (tmp_path / ".lock").read_text() == f"pid {os.getpid()}\n"
    # Reading closed the file once, which drops a POSIX lock: take it anew to see that others are kept out.
    run_folder._locks.clear()
    run_folder.lock(tmp_path)
    code = "import sys; from pathlib import Path; import fcntl\n"
    code += "file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lock")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "BlockingIOError" in done.stderr


def test_writes_floats_exactly(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    value, single = 0.1 + 0.2, torch.tensor(1 / 3)
    logger.log_metrics({"a": value, "b": single, "c": np.float32(0.1), "d": 3, "e": math.nan}, step=1)
    text = (tmp_path / "metrics.csv").read_text()
    assert text == f"step,a,b,c,d,e\n1,0.30000000000000004,{single.item()!r},{float(np.float32(0.1))!r},3,nan\n"
    assert float(text.splitlines()[1].split(",")[1]) == value


def test_one_header_that_grows_and_rows_in_order_of_steps(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_metrics({"a": 2.0}, step=2)
    logger.log_metrics({"val": 5.0, "a,b": 1}, step=2)
    logger.log_metrics({"a": 3.0}, step=4)
    logger.log_metrics({"late": 7}, step=1)
    logger.log_metrics({"a": 5.0}, step=5)
    expected = 'step,a,val,"a,b",late\n1,1.0,,,\n1,,,,7\n2,2.0,,,\n2,,5.0,1,\n4,3.0,,,\n5,5.0,,,\n'
    assert (tmp_path / "metrics.csv").read_text() == expected


def log(logger: MetricsLogger, steps: range) -> None:
    for step in steps:
        logger.log_metrics({"a": step / 3}, step=step)
        if step % 5 == 0:
            logger.log_metrics({"val": step / 7}, step=step)
        if step == 14:
            logger.log_metrics({"new": 1}, step=step)
    logger.finalize("success")


def test_killed_and_cut_equals_never_killed(tmp_path: Path) -> None:
    log(MetricsLogger(tmp_path / "whole"), range(1, 31))
    whole = (tmp_path / "whole" / "metrics.csv").read_bytes()
    draw = random.Random(0)
    for number in range(50):
        resumed_at, logged = sorted(draw.sample(range(1, 31), 2))
        folder = tmp_path / str(number)
        log(MetricsLogger(folder), range(1, logged + 1))
        path = folder / "metrics.csv"
        torn = path.read_bytes()[: -draw.randrange(1, 4)] if draw.random() < 0.5 else path.read_bytes()
        if logged > resumed_at + 1:
            path.write_bytes(torn)  # the last row is torn; those up to the checkpoint never are
        logger = MetricsLogger(folder)
        logger.cut(resumed_at)
        log(logger, range(resumed_at + 1, 31))
        assert path.read_bytes() == whole, (resumed_at, logged)


def test_a_fresh_start_empties_what_was_left_and_never_deletes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,old\n1,2.0\n")
    MetricsLogger(tmp_path)
    assert path.read_text() == "step,old\n1,2.0\n"
    logger = MetricsLogger(tmp_path)
    logger.cut(-1)
    assert path.read_text() == ""
    logger.log_metrics({"a": 1.0}, step=1)
    assert path.read_text() == "step,a\n1,1.0\n"


@pytest.mark.parametrize("text", ["", "ste", "step,a", "step,a\n", "step,a\nx,y\n", "step,a\n1,2.0,3\n"])
def test_survives_a_file_torn_anywhere(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    logger = MetricsLogger(tmp_path)
    logger.cut(5)
    logger.log_metrics({"a": 1.0}, step=6)
    assert (tmp_path / "metrics.csv").read_text() == "step,a\n6,1.0\n"


def test_makes_no_file_before_the_first_row(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.log_hyperparams({"a": 1})
    logger.cut(3)
    logger.save()
    logger.finalize("success")
    assert not list(tmp_path.iterdir())


def test_writes_atomically(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("one\n", "two\n"):
        run_folder.write_atomically(path, text)
        assert path.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_events_lie_in_the_folder_itself_and_are_cut_on_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_at, steps in ((-1, range(1, 9)), (4, range(5, 7))):
        logger = EventsLogger(tmp_path)
        assert logger.log_dir == str(tmp_path) + "/"
        logger.log_hyperparams({"a": 1})
        logger.cut(resumed_at)
        for step in steps:
            logger.log_metrics({"a": step + 100 * (resumed_at > 0)}, step=step)
        logger.save()
        logger.finalize("success")
        (events,) = tmp_path.glob("events*")
        events.rename(tmp_path / f"{len(list(tmp_path.iterdir()))}.tfevents")  # TensorBoard reads by name
    assert len(list(tmp_path.iterdir())) == 2  # no hparams.yaml, no version_0
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("a")
    assert [(event.step, event.value) for event in events] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
        (5, 105.0),
        (6, 106.0),
    ]
