"""The command line on a tiny model: the run folder, what is refused and how, and kill and resume."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml

from tfusion import __main__ as cli
from tfusion.data.corpora import CaptionedImage, Split
from tfusion.parser import meant
from tfusion.report.validation import number as shown
from tfusion.training import run_folder
from tfusion.training.trainer_settings import check_validation_interval

SPEED = {"train/tokens_per_s", "train/images_per_s", "train/seconds"}  # the columns that a clock fills
STEPS = 6


class TinyText:
    """Six short documents a split."""

    name = "text"

    def load(self, split: Split) -> Sequence[str]:
        return [f"{split} line {i}: the quick brown fox jumps over dog {i * i}.\n" * 3 for i in range(6)]


class TinyPictures:
    """Six grey squares."""

    name = "grey"
    image_size = 8

    def load(self, split: Split) -> Sequence[CaptionedImage]:
        squares = [torch.full((3, 8, 8), i * 20, dtype=torch.uint8) for i in range(6)]
        return [CaptionedImage(str(i), square, (f"grey {i}",)) for i, square in enumerate(squares)]


CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "default_root_dir": "run",  # relative to where the command is run
        "max_steps": STEPS,
        "val_check_interval": 3,
        "log_every_n_steps": 1,
    },
    "model": {
        "class_path": "TransfusionModule",
        "init_args": {
            "model": {
                "class_path": "tfusion.models.transfusion.Transfusion",
                "init_args": {
                    "vocab_size": 270,
                    "latent_shape": [3, 8, 8],
                    "patch_size": 4,
                    "dim": 16,
                    "num_layers": 1,
                    "num_heads": 2,
                    "max_seq_len": 64,
                },
            },
            "noise_scheduler": {"class_path": "diffusers.FlowMatchEulerDiscreteScheduler"},
            "warmup_steps": 1,
            "generation": {"num_inference_steps": 2, "max_new_tokens": 4},
        },
    },
    "data": {
        "image_corpora": [{"class_path": f"{__name__}.TinyPictures"}],
        "text_corpora": [{"class_path": f"{__name__}.TinyText"}],
        "vocab_size": 270,
        "seq_len": 64,
        "rows_per_step": 2,
    },
    "checkpoint": {"every_n_train_steps": 2},
    "samples": {"every_n_steps": 3, "num_images": 1, "num_captions": 1, "num_texts": 1},
}


def command(arguments: list[str], cwd: Path, kill_at: int | None, traceback: bool) -> None:
    """Be `python -m tfusion`, in a process of its own; in `fit`, die at the n-th call of a function."""
    os.chdir(cwd)
    os.environ["TFUSION_TRACEBACK"] = "1" if traceback else "0"
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers; this process's own is inherited
    count, main_process = 0, os.getpid()

    def die(frame, event, argument):
        nonlocal count
        count += 1
        if count == kill_at and os.getpid() == main_process:  # data workers count, too
            os.kill(main_process, signal.SIGKILL)

    @functools.wraps(pl.Trainer.fit)
    def fit(*args, **kwargs):
        sys.setprofile(die)
        try:
            return trainer_fit(*args, **kwargs)
        finally:
            sys.setprofile(None)
            Path("calls").write_text(str(count))

    trainer_fit = pl.Trainer.fit
    if kill_at:
        pl.Trainer.fit = fit
    sys.argv = ["tfusion", *arguments]
    sys.modules.pop("tfusion.__main__")  # runpy warns of a module that has been imported
    runpy.run_module("tfusion", run_name="__main__")


def tfusion(cwd: Path, *arguments: str, kill_at: int | None = None, traceback: bool = False) -> tuple[int | None, str]:
    """Run a command; return its exit code and what it wrote."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tfusion.__main__"])  # imports for all commands, once
    process = context.Process(target=command, args=(list(arguments), cwd, kill_at, traceback))
    process.start()
    process.join(100)
    return process.exitcode, (cwd / "output").read_text()


def write_config(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def hashes(root: Path) -> dict[str, str]:
    """Of what only `fit` may write."""
    patterns = ("config.yaml", "metrics.csv", "events*", "checkpoints/*", "samples/*")
    paths = [path for pattern in patterns for path in root.glob(pattern)]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def rows(root: Path) -> list[dict[str, str]]:
    """Those of metrics.csv, without the clock's columns."""
    with open(root / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in SPEED} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in the folder `run` of the one returned."""
    folder = tmp_path_factory.mktemp("fitted")
    code, output = tfusion(folder, "fit", "--config", str(write_config(folder)))
    assert code == 0, output
    assert "measure it: tfusion validate --config run/config.yaml --ckpt_path last\n" in output
    return folder


@pytest.fixture
def copied(fitted: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may write."""
    shutil.copytree(fitted / "run", tmp_path / "run", symlinks=True)
    return tmp_path


def test_fit_writes_the_run_folder(fitted: Path) -> None:
    root = fitted / "run"
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith("events"))
    assert names == [".lock", "checkpoints", "config.yaml", "metrics.csv", "samples"]
    assert len(list(root.glob("events.out.tfevents.*"))) == 1
    names = sorted(path.name for path in (root / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", f"step={STEPS:07d}.ckpt"]
    config = yaml.safe_load((root / "config.yaml").read_text())
    assert config["trainer"]["default_root_dir"] == str(root)
    assert config["checkpoint"]["every_n_train_steps"] == 2
    assert "ckpt_path" not in config
    steps = [int(row["step"]) for row in rows(root)]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]  # one of training each, one of validation at 3 and 6


def test_validate_and_predict_leave_the_run_as_it_is(copied: Path) -> None:
    root, before = copied / "run", hashes(copied / "run")
    prompts = copied / "prompts.jsonl"
    prompts.write_text(json.dumps({"segments": [{"text": "grey 1"}], "generate": "image"}) + "\n")
    run = ("--config", str(root / "config.yaml"), "--trainer.default_root_dir", str(root), "--ckpt_path")
    endings = copied / "endings.jsonl"
    endings.write_text(json.dumps({"context": "grey", "choices": [" 1", " 2"], "answer": 0}) + "\n")
    code, output = tfusion(copied, "validate", *run, "last", f"--data.choices.endings={endings}")
    assert code == 0, output
    assert "val/endings/accuracy" in output
    assert hashes(root) == before
    read = json.loads((root / "validation.json").read_text())
    assert (read["step"], read["checkpoint"]) == (STEPS, "checkpoints/last.ckpt")
    logged = {name for name in rows(root)[-1] if name.startswith("val/")}
    logged |= {"val/endings/accuracy", "val/endings/accuracy_unnormalised"}  # asked for by this validate alone
    assert {measurement["name"] for measurement in read["measurements"]} == logged
    assert all(f"\n{name} " in output for name in logged)
    assert "<h2>Curves</h2>" in (root / "report.html").read_text()
    code, output = tfusion(copied, "predict", *run, "best", "--data.prompts", str(prompts))
    assert code == 0, output
    assert hashes(root) == before
    assert (root / "predictions" / "predictions.jsonl").exists()


def test_a_resume_takes_the_command_line_and_leaves_config_yaml(copied: Path) -> None:
    root = copied / "run"
    before = (root / "config.yaml").read_bytes(), rows(root)
    run = ("--config", str(root / "config.yaml"), "--trainer.default_root_dir", "run")
    # Lightning would take these over the command line's, without a word.
    checkpoint = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {"lr": 1e-9, "_class_path": "tfusion.training.transfusion.TransfusionModule"}
    torch.save(checkpoint, copied / "other.ckpt")
    more = ("--ckpt_path", "other.ckpt", "--trainer.max_steps", "8", "--model.lr", "0.5")
    code, output = tfusion(copied, "fit", *run, *more)
    assert code == 0, output
    assert (root / "config.yaml").read_bytes() == before[0]
    after = rows(root)
    assert [row["step"] for row in after[len(before[1]) :]] == ["7", "8"]
    assert float(before[1][-2]["train/lr"]) < 3e-4 < float(after[-2]["train/lr"])
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 8
    assert not any("tokenizer." in name for name in state["state_dict"])


@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_killed_and_resumed_equals_never_killed(tmp_path: Path, accumulate: int, workers: int) -> None:
    config = str(write_config(tmp_path))
    divided = ("--trainer.accumulate_grad_batches", str(accumulate))
    divided += ("--trainer.val_check_interval", str(3 * accumulate), "--data.num_workers", str(workers))
    code, output = tfusion(tmp_path, "fit", "--config", config, *divided, kill_at=10**12)
    assert code == 0, output
    calls = int((tmp_path / "calls").read_text())
    draw = random.Random(accumulate + workers)
    for number in range(2):
        root = str(tmp_path / str(number))
        kill_at = draw.randrange(calls // 5, calls)
        run = ("fit", "--config", config, *divided, "--trainer.default_root_dir", root)
        while (code := tfusion(tmp_path, *run, kill_at=kill_at)[0]) == 0:  # data workers make the number of calls vary
            shutil.rmtree(root)
            kill_at = kill_at * 3 // 4
        assert code == -signal.SIGKILL
        last = Path(root, "checkpoints", "last.ckpt")
        resume = ("--ckpt_path", "last") if last.exists() else ()
        code, output = tfusion(tmp_path, *run, *resume)
        assert code == 0, output
        assert rows(Path(root)) == rows(tmp_path / "run")
        left, right = (torch.load(path, weights_only=True) for path in (last, tmp_path / "run/checkpoints/last.ckpt"))
        assert left["state_dict"].keys() == right["state_dict"].keys()
        for name, tensor in left["state_dict"].items():
            assert torch.equal(tensor, right["state_dict"][name]), name
        moments = [state["optimizer_states"][0]["state"] for state in (left, right)]
        for index, moment in moments[0].items():
            assert torch.equal(moment["exp_avg_sq"], moments[1][index]["exp_avg_sq"])


REFUSED = {
    "a used folder": ([], r"holds checkpoints \(best.ckpt, last.ckpt, step=0000006.ckpt\).*--ckpt_path last"),
    "no last": (
        ["--trainer.default_root_dir", "new", "--ckpt_path", "last"],
        r"--ckpt_path last, but .*new/checkpoints/last.ckpt does not exist",
    ),
    "no such path": (["--ckpt_path", "gone.ckpt"], r"gone.ckpt does not exist; expected 'last', 'best' or"),
    "no run folder": (["--trainer.default_root_dir", "null"], r"got no trainer.default_root_dir"),
    "between micro-batches": (
        ["--trainer.default_root_dir", "new", "--trainer.accumulate_grad_batches", "2"],
        r"val_check_interval 3 with trainer.accumulate_grad_batches 2.*such as 4",
    ),
    "no validation ever": (
        ["--trainer.default_root_dir", "new", "--trainer.val_check_interval", "null"],
        r"val_check_interval None, expected a number of batches",
    ),
    "a callback's argument": (
        ["--trainer.default_root_dir", "new", "--ema.decay", "3"],
        r"ema.decay 3.0, expected a number between 0 and 1",
    ),
    "in setup, where Lightning's cleaning up fails too": (
        ["--trainer.default_root_dir", "new", "--data.seq_len", "100"],
        r"data.seq_len 100 is longer than the model's max_seq_len 64",
    ),
    "a file of choices that is not there": (
        ["--trainer.default_root_dir", "new", "--data.choices", '{"endings": "gone.jsonl"}'],
        r"no choices file 'gone.jsonl'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_message(fitted: Path, tmp_path: Path, case: str) -> None:
    arguments, message = REFUSED[case]
    root = str(fitted / "run")
    before = hashes(fitted / "run")
    run = ("fit", "--config", str(fitted / "tiny.yaml"), "--trainer.default_root_dir", root, *arguments)
    code, output = tfusion(tmp_path, *run)
    assert code == 2
    (line,) = [line for line in output.splitlines() if line.startswith("tfusion: error: ")]
    assert re.search(message, line), line
    assert "Traceback" not in output
    assert hashes(fitted / "run") == before
    assert not (tmp_path / "new" / "checkpoints").exists()
    assert not (tmp_path / "new" / "metrics.csv").exists()


def test_the_traceback_is_there_when_asked_for(tmp_path: Path) -> None:
    run = ("fit", "--config", str(write_config(tmp_path)), "--ckpt_path", "last")
    code, output = tfusion(tmp_path, *run, traceback=True)
    assert code == 1
    assert "Traceback" in output
    assert "ValueError: got --ckpt_path last" in output


def test_a_second_process_is_kept_out(copied: Path) -> None:
    root = copied / "run"
    run_folder.lock(root)
    config = str(root / "config.yaml")
    code, output = tfusion(
        copied, "fit", "--config", config, "--trainer.default_root_dir", str(root), "--ckpt_path", "last"
    )
    assert code == 2
    assert f"another process (pid {os.getpid()}) is writing the run folder {root}" in output


def test_validate_without_weights_is_refused(tmp_path: Path) -> None:
    code, output = tfusion(tmp_path, "validate", "--config", str(write_config(tmp_path)))
    assert code == 2
    assert "tfusion: error: validate got no weights; expected --ckpt_path last" in output


def test_a_wrong_option_gets_a_message_and_not_the_usage(tmp_path: Path) -> None:
    code, output = tfusion(tmp_path, "fit", "--config", str(write_config(tmp_path)), "--trainer.max_step", "1")
    assert code == 2 and "trainer.max_step" in output, "the beginning of an option is not the option"
    assert output.endswith("did you mean trainer.max_steps?\n")
    code, output = tfusion(tmp_path, "fit", "--config", str(write_config(tmp_path)), "--model.lrr", "1")
    assert code == 2
    assert "Option 'lrr' is not accepted" in output
    assert output.endswith("did you mean lr?\n")
    nested = "--model.init_args.model.init_args.dims"
    code, output = tfusion(tmp_path, "fit", "--config", str(write_config(tmp_path)), nested, "1")
    assert code == 2 and output.endswith("did you mean dim?\n") and output.count("did you mean") == 1
    assert "usage:" not in output
    assert len(output.splitlines()) < 15


def test_a_wrong_name_gets_the_nearest() -> None:
    keys = ["trainer", "trainer.max_steps", "data.seq_len", "model", "samples.every_n_steps"]
    assert meant("Subcommand 'fit' does not accept option 'data.seq_lne'", keys) == "data.seq_len"
    assert meant("unrecognized arguments: --modle.init_args.lr 3", keys) == "model.init_args.lr"
    assert meant("unrecognized arguments: --sample.every_n_steps 3", keys) == "samples.every_n_steps"
    for unknown in ("foo", "trainer.nonsense", "model.init_args.foo", "samples.max_steps"):
        assert meant(f"unrecognized arguments: --{unknown} 3", keys) is None
    assert meant("something else", keys) is None
    nested = "Problem with given class_path 'tfusion.models.transfusion.Transfusion':\n  Option '{}' is not accepted"
    assert meant(nested.format("dims"), keys) == "dim"
    assert meant(nested.format("foo"), keys) is None
    assert meant("class_path 'no.such.Class':\n  Option 'dims' is not accepted", keys) is None


def test_there_are_three_commands(tmp_path: Path) -> None:
    code, output = tfusion(tmp_path, "--help")
    assert code == 0
    assert "{fit,validate,predict}" in output
    assert output.startswith("usage: tfusion ")


def test_a_logger_in_yaml_adds_to_the_run_folders_own(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    more = (
        "--trainer.logger",
        "CSVLogger",
        "--trainer.logger.save_dir",
        "elsewhere",
        "--trainer.max_steps",
        "2",
    )
    code, output = tfusion(tmp_path, "fit", "--config", config, *more)
    assert code == 0, output
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2"]
    assert len(list((tmp_path / "elsewhere").rglob("metrics.csv"))) == 1
    assert not list((tmp_path / "elsewhere").rglob("*.ckpt"))
    assert list((tmp_path / "run").glob("events*"))


def test_a_terminated_run_says_so_and_can_go_on(tmp_path: Path) -> None:
    config, last = str(write_config(tmp_path)), tmp_path / "run" / "checkpoints" / "last.ckpt"
    context = multiprocessing.get_context("forkserver")
    arguments = ["fit", "--config", config, "--trainer.max_steps", "100000"]
    process = context.Process(target=command, args=(arguments, tmp_path, None, False))
    process.start()
    deadline_s = time.monotonic() + 60
    while not last.exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    said = (tmp_path / "output").read_text()
    assert re.search(
        r"stopped at step \d+; the last checkpoint is step=\d{7}.ckpt. Go on: tfusion fit --config ", said
    ), said
    step = torch.load(last, weights_only=True)["global_step"]
    more = ("--ckpt_path", "last", "--trainer.max_steps", str(step + 1))
    code, output = tfusion(tmp_path, "fit", "--config", config, *more)
    assert code == 0, output
    assert rows(tmp_path / "run")[-1]["step"] == str(step + 1)


@pytest.mark.parametrize(
    ("interval", "accumulate", "batches"),
    [
        (None, 1, None),
        (1.0, 1, 5),
        ("00:00:10:00", 1, None),
        (True, 1, None),
        (0, 1, None),
        (5, 2, 1.0),
        (2, 4, 1),
    ],
)
def test_refuses_validation_intervals_that_would_not_do(interval, accumulate, batches) -> None:
    config = SimpleNamespace(val_check_interval=interval, accumulate_grad_batches=accumulate, limit_val_batches=batches)
    with pytest.raises(ValueError, match="val_check_interval"):
        check_validation_interval(config)
    config.limit_val_batches = 0
    check_validation_interval(config)  # no validation is asked for


def test_only_its_own_refusals_lose_their_traceback() -> None:
    def error_of(function) -> Exception:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            function()
        return caught.value

    assert cli._is_for_the_user(error_of(lambda: run_folder.find_checkpoint(Path("x"), "last")))
    assert not cli._is_for_the_user(error_of(lambda: int("x")))
    assert not cli._is_for_the_user(error_of(lambda: torch.zeros(2) + torch.zeros(3)))


# Generation metrics


NETWORK = {
    "class_path": "tfusion.metrics.FeatureNetwork",
    "init_args": {"module": "torch.nn.Flatten", "name": "pixels", "image_size": 1},  # the mean of each channel
}


def test_networks_in_yaml_measure_in_fit_and_in_validate_of_its_config(tmp_path: Path) -> None:
    metrics = {"generation_metrics": {"num_images": 5, "networks+": [NETWORK]}}
    (tmp_path / "metrics.yaml").write_text(yaml.safe_dump(metrics | {"best": {"monitor": "val/grey/fd_pixels"}}))
    files = ["--config", str(write_config(tmp_path)), "--config", "metrics.yaml"]
    code, output = tfusion(tmp_path, "fit", *files)
    assert code == 0, output
    assert "5 pictures made of val/grey" in output
    values = [row["val/grey/fd_pixels"] for row in rows(tmp_path / "run") if row["val/grey/fd_pixels"]]
    assert len(values) == STEPS // 3
    code, output = tfusion(tmp_path, "validate", "--config", "run/config.yaml", "--ckpt_path", "last")
    assert code == 0, output
    [line] = [line for line in output.splitlines() if line.startswith("val/grey/fd_pixels ")]
    assert line.split()[1] == shown(float(values[-1]))


def test_a_network_that_cannot_be_loaded_is_said_before_training(tmp_path: Path) -> None:
    files = ["--config", str(write_config(tmp_path)), "--generation_metrics.networks+", "tfusion.metrics.Inception"]
    code, output = tfusion(tmp_path, "fit", *files, "--generation_metrics.networks.weights", "none.pt")
    assert code == 2
    assert "tfusion: error: Inception: got weights 'none.pt', which is no file" in output
    assert "step 1" not in output
