"""The command line with two processes: one run folder, written once; killed and resumed; refusals that end them all."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from tests.test_cli import CONFIG, hashes, rows
from tests.training.processes import RANKS, end_ranks, run_ranks, start_ranks
from tfusion import __main__ as cli

ROOT = Path(__file__).parents[1]
STEPS = 24
DDP = ("--config", str(ROOT / "configs" / "trainer" / "ddp.yaml"), "--trainer.devices", str(RANKS))
CPU = ("--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
pytestmark = pytest.mark.multi


def command(cwd: Path, *arguments: str) -> None:
    """Be one of the ranks' `tfusion`, as torchrun starts it."""
    os.chdir(cwd)
    sys.argv = ["tfusion", *arguments]
    cli.main()


def tfusion(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m tfusion`, which starts the other rank itself."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "tfusion", *arguments]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


def write_config(folder: Path) -> str:
    config = copy.deepcopy(CONFIG)
    config["trainer"] |= {"max_steps": STEPS, "val_check_interval": 6}
    config["data"] |= {"rows_per_step": 4, "num_workers": 2}
    config["checkpoint"] = {"every_n_train_steps": 4}
    config["samples"] = {"every_n_steps": 12, "num_images": 2, "num_captions": 1, "num_texts": 0}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "tiny.yaml")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never killed, in the folder `run`."""
    folder = tmp_path_factory.mktemp("fitted")
    done = tfusion(folder, "fit", "--config", write_config(folder), *DDP, *CPU)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said").write_text(done.stdout + done.stderr)
    return folder


def test_fit_writes_one_run_folder(fitted: Path) -> None:
    root = fitted / "run"
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith("events"))
    assert names == [".lock", "checkpoints", "config.yaml", "metrics.csv", "samples"]
    assert len(list(root.glob("events.out.tfevents.*"))) == 1
    names = sorted(path.name for path in (root / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", f"step={STEPS:07d}.ckpt"]
    names = [f"step={step:07d}.{kind}" for step in (12, 24) for kind in ("jsonl", "png")]
    assert sorted(path.name for path in (root / "samples").iterdir()) == names
    steps = [int(row["step"]) for row in rows(root)]
    assert steps == sorted([*range(1, STEPS + 1), *range(6, STEPS + 1, 6)])
    said = (fitted / "said").read_text()
    assert said.count("attention backend") == 1
    assert said.count(f"step {STEPS}/{STEPS}") == 1
    assert "deprecated" not in said


def test_killed_and_resumed_equals_never_killed(fitted: Path, tmp_path: Path) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    run = ("fit", "--config", write_config(tmp_path), *DDP, *CPU)
    processes = start_ranks(tmp_path / "output", command, tmp_path, *run)
    deadline_s = time.monotonic() + 100
    while not last.exists() and time.monotonic() < deadline_s and processes[0].is_alive():
        time.sleep(0.01)
    for process in processes:
        process.kill()
    codes, text = end_ranks(processes, tmp_path / "output")
    assert codes == [-9, -9], text
    assert torch.load(last, weights_only=True)["global_step"] < STEPS
    run_ranks(tmp_path / "output", command, tmp_path, *run, "--ckpt_path", "last")
    assert rows(tmp_path / "run") == rows(fitted / "run")
    left, right = (torch.load(path, weights_only=True) for path in (last, fitted / "run" / "checkpoints" / "last.ckpt"))
    assert left["state_dict"].keys() == right["state_dict"].keys()
    for name, tensor in left["state_dict"].items():
        assert torch.equal(tensor, right["state_dict"][name]), name
    moments = [state["optimizer_states"][0]["state"] for state in (left, right)]
    for name, moment in moments[0].items():
        assert torch.equal(moment["exp_avg_sq"], moments[1][name]["exp_avg_sq"]), name
    assert left["MultimodalDataModule"] == right["MultimodalDataModule"]


def test_validate_and_predict(fitted: Path, tmp_path: Path) -> None:
    run = ("--config", str(fitted / "run" / "config.yaml"), "--ckpt_path", "last")
    before = hashes(fitted / "run")
    output = tmp_path / "output"
    codes, text = end_ranks(start_ranks(output, command, tmp_path, "validate", *run), output)
    assert codes == [0, 0], text
    [shown] = [line for line in text.splitlines() if line.startswith("val/loss ")]
    assert text.count("report.html") == 1
    assert json.loads((fitted / "run" / "validation.json").read_text())["processes"] == RANKS
    measured = [row["val/loss"] for row in rows(fitted / "run") if row["val/loss"]]
    assert float(shown.split()[1]) == pytest.approx(float(measured[-1]), abs=1e-4)

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"segments": [{"text": "grey 1"}], "generate": "image"}) + "\n")
    run_ranks(output, command, tmp_path, "predict", *run, "--data.prompts", str(prompts))
    lines = (fitted / "run" / "predictions" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["request"] for line in lines] == [0]
    assert hashes(fitted / "run") == before


def test_a_refusal_on_all_ranks_is_said_once_and_ends_them(tmp_path: Path) -> None:
    started_s = time.monotonic()
    more = ("--data.vocab_size", "290", "--trainer.default_root_dir", "refused")
    done = tfusion(tmp_path, "fit", "--config", write_config(tmp_path), *DDP, *CPU, *more)  # waits for its pipes' end
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("tfusion: error: the tokenizer has 290 ids") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert time.monotonic() - started_s < 100


REFUSED = {
    "rows": (("--data.rows_per_step", "3"), "rows_per_step 3 is not divided by 1 micro-batches x 2 ranks = 2: take 4"),
    "workers": (("--data.num_workers", "3"), "num_workers 3 does not divide lanes 8"),
    "strategy": (
        ("--config", str(ROOT / "configs" / "trainer" / "fsdp2.yaml"), "--trainer.devices", "2", *CPU),
        "got ModelParallelStrategy with data_parallel_size 8 and tensor_parallel_size 1 for 2 processes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_processes_do_not_allow_is_refused_before_any_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_SubprocessScriptLauncher, "launch", None)
    monkeypatch.setattr(sys, "argv", ["tfusion", "fit", "--config", write_config(tmp_path), *DDP, *CPU, *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert f"tfusion: error: {message}" in capsys.readouterr().err
