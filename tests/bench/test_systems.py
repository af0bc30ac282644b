"""The comparison of systems: the commands it runs, where it goes on, and the table it makes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tfusion.bench import systems
from tfusion.bench.systems import SYSTEMS, System
from tfusion.bench.systems_table import as_table

TINY = System("tiny", "text_only", ("patch_2", "unet"))


@pytest.fixture
def recorded(monkeypatch):
    """Commands in place of being run; what fails leaves its reason in its log."""
    commands = []

    def record(args, log, threads):
        commands.append((args, threads))
        if "broken" in str(log):
            log.write_text("loading\ntfusion: error: no cache\n(TFUSION_TRACEBACK=1 shows where)\n")
        return int("broken" in str(log))

    monkeypatch.setattr(systems, "call", record)
    return commands


def finish(root):
    root.mkdir(parents=True)
    measurements = [
        {"name": "val/shakespeare/bits_per_byte", "value": 2.5, "standard_error": 0.01},
        {"name": "val/shapes/composition/all/seen", "value": 0.25, "standard_error": 0.03},
        {"name": "val/shapes/composition/all/unseen", "value": 0.75, "standard_error": 0.04},
    ]
    (root / "validation.json").write_text(json.dumps({"measurements": measurements}))
    (root / "metrics.csv").write_text("step,train/flops,train/seconds\n10,1e15,5\n20,2.5e15,9.6\n,,\n")


def test_configs_exist(pytestconfig):
    for system in SYSTEMS:
        assert all(path.is_file() for path in system.configs(pytestconfig.rootpath / "configs")), system.name


def test_a_run_is_trained_validated_and_read(recorded, tmp_path, monkeypatch):
    root = tmp_path / "tiny-seed3"
    monkeypatch.setattr(systems, "read", lambda *args: {"read": args})
    assert systems.run(TINY, 3, tmp_path, tmp_path / "configs", 2, ["--x", "1"])["read"] == ("tiny", 3, root)
    (fit, threads), (validate, _) = recorded
    configs = [str(tmp_path / "configs" / name) for name in ("small/text_only.yaml", "ablation/patch_2.yaml")]
    assert fit[:4] == [sys.executable, "-m", "tfusion", "fit"] and fit[5:8:2] == configs
    assert fit[-2:] == ["--x", "1"] and fit[fit.index("--data.seed") + 1] == "3" and threads == 2
    assert "--ckpt_path" not in fit
    assert validate[validate.index("--config") + 1] == str(root / "config.yaml")

    (root / "checkpoints").mkdir()
    (root / "checkpoints" / "last.ckpt").touch()
    (root / "fitted").unlink()
    systems.run(TINY, 3, tmp_path, tmp_path / "configs", 2, ["--x", "1"])
    assert recorded[2][0][-2:] == ["--ckpt_path", "last"], "a run that was cut off goes on"
    systems.run(TINY, 3, tmp_path, tmp_path / "configs", 2, ["--x", "1"])
    assert "validate" in recorded[4][0] and len(recorded) == 5, "what is trained is validated only"


def test_a_run_that_is_done_is_only_read_and_one_that_fails_is_named(recorded, tmp_path):
    finish(tmp_path / "tiny-seed0")
    done = systems.run(TINY, 0, tmp_path, tmp_path, 1, [])
    assert not recorded and done["steps"] == 20 and done["train_flops"] == 2.5e15 and done["train_s"] == 9.6
    failed = systems.run(System("broken", "text_only"), 0, tmp_path, tmp_path, 1, [])
    assert failed["failed"].startswith("fit: tfusion: error: no cache (all: ")
    systems.write(tmp_path / "systems.json", [done, failed])
    systems.write(tmp_path / "systems.json", [failed | {"failed": "validate: "}])
    kept = json.loads((tmp_path / "systems.json").read_text())
    assert kept == [done, failed | {"failed": "validate: "}], "the file holds runs of earlier calls"

    table = as_table([done, failed]).splitlines()
    assert len({line.count("|") for line in table}) == 1
    # sqrt(0.03^2 + 0.04^2) / 2
    assert "| tiny | 0 | 20 | 2.5e+03 | 10 | 2.5 +- 0.01 |" in table[2] and table[2].endswith("| 0.5 +- 0.03 |")
    assert table[3].startswith("| broken | 0 | fit: ")


def test_a_name_that_no_system_has(recorded, tmp_path, capsys):
    with pytest.raises(SystemExit):
        systems.main(["--out", str(tmp_path), "--only", "no-such"])
    assert (
        "no system's name contains 'no-such', with these seeds; there are (seeds): transfusion-linear-64 (2), "
        in capsys.readouterr().err
    )
    assert not recorded and not list(tmp_path.iterdir())


def test_a_trial_does_not_stand_in_for_the_run(recorded, tmp_path):
    root = tmp_path / "tiny-seed0"
    finish(root)
    assert "failed" not in systems.run(TINY, 0, tmp_path, tmp_path, 1, ["--trainer.max_steps", "60"])
    refused = systems.run(TINY, 0, tmp_path, tmp_path, 1, [])
    assert "was made by another command" in refused["failed"] and "give another --out" in refused["failed"]
    assert not recorded


def test_failures_are_told_and_what_is_done_is_kept(recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(systems, "SYSTEMS", (System("tiny", "text_only", (), (0, 1)), System("broken", "text_only")))
    finish(tmp_path / "tiny-seed1")
    with pytest.raises(SystemExit) as end:
        systems.main(["--out", str(tmp_path), "--seeds", "0", "1", "--only", "broken"])
    assert end.value.code == 1
    systems.main(["--out", str(tmp_path), "--seeds", "1"])
    told = capsys.readouterr()
    assert "broken, seed 0: fit: tfusion: error: no cache" in told.err and "tiny, seed 1: done" in told.err
    assert "| tiny | 1 | 20 |" in told.out
    assert [run["system"] for run in json.loads((tmp_path / "systems.json").read_text())] == ["broken", "tiny"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the caller's again"


def test_when_it_is_killed_nothing_trains_on(tmp_path):
    """A child that sleeps, in a process of its own, which gets SIGTERM."""
    code = """
import signal, sys
from pathlib import Path
from tfusion.bench import systems
signal.signal(signal.SIGTERM, systems.stop)
code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
systems.call([sys.executable, "-c", code], Path(sys.argv[1]), 1)
"""
    log = tmp_path / "fit.log"
    bench = subprocess.Popen([sys.executable, "-c", code, str(log)], stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if log.exists() and log.read_text().strip():
            break
        time.sleep(0.05)
    child = int(log.read_text())
    bench.terminate()
    assert "the same command goes on" in bench.communicate(timeout=60)[1] and bench.returncode == 128 + 15
    for _ in range(200):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")
