"""The comparison of systems: the commands it runs, where it goes on, and the table it makes."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tfusion.bench import systems
from tfusion.bench.systems import SYSTEMS, System
from tfusion.bench.systems_table import as_table

TINY = System("tiny", "text_only", ("patch_2", "unet"))


@pytest.fixture
def recorded(monkeypatch):
    """Commands in place of being run; the fit leaves what a fit leaves."""
    commands = []

    def record(args, stdout, stderr, env, check):
        commands.append((args, env["OMP_NUM_THREADS"]))
        root = args[args.index("--trainer.default_root_dir") + 1] if "fit" in args else None
        return SimpleNamespace(returncode=1 if root and "broken" in root else 0)

    monkeypatch.setattr(subprocess, "run", record)
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
    assert fit[-2:] == ["--x", "1"] and fit[fit.index("--data.seed") + 1] == "3" and threads == "2"
    assert "--ckpt_path" not in fit
    assert validate[validate.index("--config") + 1] == str(root / "config.yaml")

    (root / "checkpoints").mkdir()
    (root / "checkpoints" / "last.ckpt").touch()
    (root / "fitted").unlink()
    systems.run(TINY, 3, tmp_path, tmp_path / "configs", 2, [])
    assert recorded[2][0][-2:] == ["--ckpt_path", "last"], "a run that was cut off goes on"
    systems.run(TINY, 3, tmp_path, tmp_path / "configs", 2, [])
    assert "validate" in recorded[4][0] and len(recorded) == 5, "what is trained is validated only"


def test_a_run_that_is_done_is_only_read_and_one_that_fails_is_named(recorded, tmp_path):
    finish(tmp_path / "tiny-seed0")
    done = systems.run(TINY, 0, tmp_path, tmp_path, 1, [])
    assert not recorded and done["steps"] == 20 and done["train_flops"] == 2.5e15 and done["train_s"] == 9.6
    failed = systems.run(System("broken", "text_only"), 0, tmp_path, tmp_path, 1, [])
    assert failed["failed"].startswith("fit: ")
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
    assert "no system's name contains 'no-such': transfusion-linear-64, " in capsys.readouterr().err
    assert not recorded and not list(tmp_path.iterdir())
