"""Is my loss normal: the band against loops and tables, made fates, configurations, and the shipped files."""

from __future__ import annotations

import csv
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image as PILImage

from tests.conftest import ROOT
from tfusion.__main__ import run
from tfusion.bench import curve, curve_reference
from tfusion.bench.curve_band import Curve, compare
from tfusion.bench.memory import ConfigReader

STEPS = np.arange(20, 2601, 20)
# Two-sided 99 % points of Student's t, from a printed table, by degrees of freedom.
T_TABLE = {6: 3.707, 8: 3.355, 10: 3.169}


def losses(seed: int, steps: np.ndarray = STEPS, noise: float = 0.2) -> np.ndarray:
    """A falling loss whose log has more noise late than early, as a run's has."""
    draws = np.random.default_rng(seed).normal(size=len(steps))
    return (0.1 + np.exp(-steps / 500)) * np.exp(noise * np.linspace(0.3, 1, len(steps)) * draws)


def reference(*seeds: int) -> Curve:
    return Curve(STEPS, np.stack([losses(seed) for seed in seeds]))


def write_run(folder: Path, seed: int, change=lambda steps, x: x, **settings) -> Path:
    """A run folder with the two files that matter; `change` makes of the training losses what they shall be."""
    folder.mkdir(parents=True)
    config = {
        "seed_everything": seed,
        "trainer": {"max_steps": 2600, "gradient_clip_val": 1.0, "default_root_dir": str(folder), "devices": 1},
        "model": {
            "class_path": "tfusion.training.transfusion.TransfusionModule",
            "init_args": {
                "model": {"init_args": {"dim": 256, "latent_shape": [3, 32, 32], "attention_backend": None}},
                "lr": 0.002,
                "seed": seed,
                "generation": {"guidance_scale": 2.0},
            },
        },
        "data": {"seq_len": 128, "image_corpora": [{"class_path": "tfusion.data.OpenMoji"}], "seed": seed},
        "ema": {"decay": 0.995},
    }
    for key, value in settings.items():
        *path, last = key.split("__")
        place = config
        for part in path:
            place = place[part]
        place[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    text, diffusion = losses(2 * seed), losses(2 * seed + 1) / 10
    rows = [
        {"step": s, "train/text_loss": repr(float(a)), "train/diffusion_loss": repr(float(b)), "train/lr": 0.1}
        for s, a, b in zip(STEPS, change(STEPS, text), diffusion, strict=True)
    ]
    for number, step in enumerate((1300, 2600)):
        value = (2.0 + number) * math.exp(0.01 * np.random.default_rng(seed).normal())
        rows.append({"step": step, "val/loss": repr(value)})
    with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", "train/text_loss", "train/diffusion_loss", "train/lr", "val/loss"])
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["step"]))
    return folder


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """A folder of references with one, `made`, of three seeds, made by the command."""
    folder = tmp_path / "curves"
    monkeypatch.setattr(curve_reference, "FOLDER", folder)
    runs = [write_run(tmp_path / f"seed{seed}", seed) for seed in range(3)]
    assert curve.main(["--make", "made", "--runs", *map(str, runs)]) == 0
    return folder


def test_the_band_against_loops_and_a_table() -> None:
    made = reference(0, 1, 2)
    found = compare(Curve(STEPS, losses(3)), made)
    logs = [[math.log(x) for x in row] for row in made.losses.tolist()]
    windows = [[i for i, s in enumerate(STEPS) if 100 * w < s <= 100 * w + 100] for w in range(26)]
    centre = [sum(row[i] for row in logs) / 3 for i in range(len(STEPS))]
    variances = []
    for rows in windows:
        means = [sum(row[i] for i in rows) / len(rows) for row in logs]
        variances.append(sum((m - sum(means) / 3) ** 2 for m in means) / 2)
    for w, rows in enumerate(windows):
        near = variances[max(0, w - 2) : w + 3]
        half = T_TABLE[2 * len(near)] * math.sqrt(4 / 3) * math.sqrt(sum(near) / len(near))
        middle = sum(centre[i] for i in rows) / len(rows)
        assert found.low[w] == pytest.approx(math.exp(middle - half), rel=1e-3)
        assert found.high[w] == pytest.approx(math.exp(middle + half), rel=1e-3)
        value = math.prod(losses(3)[i] for i in rows) ** (1 / len(rows))
        assert found.values[w] == pytest.approx(value)
        assert found.steps[w].tolist() == [STEPS[rows[0]], STEPS[rows[-1]]]


def test_a_fourth_seed_is_within_and_twice_the_loss_is_not() -> None:
    """Of made seeds: one window in a hundred is outside, no curve in practice; twice the loss always is."""
    false, twice, windows = 0, 0, []
    for n in range(300):
        made, fourth = reference(4 * n, 4 * n + 1, 4 * n + 2), losses(4 * n + 3)
        found = compare(Curve(STEPS, fourth), made)
        false, twice = false + found.is_outside, twice + compare(Curve(STEPS, 2 * fourth), made).is_outside
        windows += found.sides.tolist()
    assert np.mean(np.abs(windows)) == pytest.approx(0.01, abs=0.004)
    assert false <= 2
    assert twice == 300


FATES = {
    "stuck": (lambda steps, x: np.where(steps > 500, x[24], x), (500, 900)),
    "diverges": (lambda steps, x: np.where(steps > 1000, x * (steps / 1000) ** 8, x), (1001, 1200)),
    "twice": (lambda steps, x: 2 * x, (20, 20)),
    "half, as when the answer is seen": (lambda steps, x: np.where(steps > 1500, x / 2, x), (1520, 1720)),
    "not a number": (lambda steps, x: np.where(steps >= 740, np.nan, x), (740, 740)),
    "infinite": (lambda steps, x: np.where(steps == 1240, np.inf, x), (1240, 1240)),
    "zero": (lambda steps, x: np.where(steps >= 60, 0.0, x), (60, 60)),
}


@pytest.mark.parametrize("fate", FATES)
def test_made_fates_are_outside_from_the_right_step(fate, shipped, tmp_path, capsys) -> None:
    change, (earliest, latest) = FATES[fate]
    run = write_run(tmp_path / "run", 9, change)
    capsys.readouterr()
    assert curve.main(["--run", str(run)]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    words = lines["train/text_loss"].split()
    assert words[1:4] == ["outside", "from", "step"]
    assert earliest <= int(words[4].strip(":")) <= latest
    assert lines["train/diffusion_loss"].endswith("within the band of 3 seeds up to step 2600")
    with PILImage.open(run / "curve.png") as plot:
        assert plot.width > 500


def test_a_fourth_seed_from_the_command_line(shipped, tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run", 9)
    assert curve.main(["--run", str(run), "--out", str(tmp_path / "plots/p.png")]) == 0
    out = capsys.readouterr().out
    assert out.count("within the band of 3 seeds up to step 2600") == 3
    assert (tmp_path / "plots/p.png").exists()
    assert not (run / "curve.png").exists()


def test_one_bad_window_is_no_verdict_and_a_return_is_said() -> None:
    made = reference(0, 1, 2)
    spike = np.where((STEPS > 1000) & (STEPS <= 1200), 3.0, 1.0)
    assert not compare(Curve(STEPS, losses(3) * spike), made).is_outside
    bump = np.where((STEPS > 1000) & (STEPS <= 1300), 3.0, 1.0)
    found = compare(Curve(STEPS, losses(3) * bump), made)
    assert curve.verdict(found, 3).startswith("outside from step 1020 to step 1300: ")
    opposite = np.where(STEPS % 200 > 100, 3.0, 1 / 3)  # out on the other side each time: noise, not a course
    assert np.abs(compare(Curve(STEPS, losses(3) * opposite), made).sides).all()
    assert not compare(Curve(STEPS, losses(3) * opposite), made).is_outside
    late = np.where(STEPS > 2400, 3.0, 1.0)
    words = curve.verdict(compare(Curve(STEPS, losses(3) * late), made), 3)
    assert words.startswith("within the band of 3 seeds up to step 2600, but outside from step 2420, too few steps")


def test_a_young_run_one_logged_rarely_and_one_that_goes_on() -> None:
    made = reference(0, 1, 2)
    whole = compare(Curve(STEPS, losses(3)), made)
    young = compare(Curve(STEPS[:32], losses(3)[:32]), made)
    assert np.allclose(young.high[:6], whole.high[:6])
    assert young.steps[-1].tolist() == [620, 640]
    rare = compare(Curve(STEPS[4::5], losses(3)[4::5]), made)  # each 100 steps: one row a window, not five
    assert np.allclose(rare.steps[:, 0], np.arange(100, 2601, 100))
    assert np.allclose(np.log(rare.high / rare.low), math.sqrt(5) * np.log(whole.high / whole.low))
    often = np.arange(1, 5001)
    smooth = np.exp(np.interp(often, STEPS, np.log(made.losses).mean(0)))
    found = compare(Curve(often, smooth), made)
    assert not found.sides.any()
    assert (found.steps[0, 0], found.steps[-1, 1]) == (20, 2600), "nothing is compared beyond the reference"


def test_seeds_that_agree_by_chance_have_a_band_of_some_width() -> None:
    made = Curve(STEPS, np.stack([losses(0, noise=0)] * 3))
    found = compare(Curve(STEPS, 1.02 * losses(0, noise=0)), made)
    assert not found.sides.any()
    assert np.log(found.high / found.low)[5] == pytest.approx(2 * 0.01 * T_TABLE[10] * math.sqrt(4 / 3), rel=1e-3)


def test_validations_one_outside_is_enough(shipped, tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run", 9)
    text = (run / "metrics.csv").read_text().splitlines()
    at = next(n for n, line in enumerate(text) if line.startswith("1300,,"))
    text[at] = "1300,,,,5.0"
    (run / "metrics.csv").write_text("\n".join(text) + "\n")
    assert curve.main(["--run", str(run)]) == 1
    assert "outside at step 1300: 5, band 1.9 to 2.11" in capsys.readouterr().out
    made = Curve(np.array([1300, 2600]), np.array([[2.0, 3.0], [2.1, 3.1], [1.9, 2.9]]))
    other_steps = compare(Curve(np.array([500, 1300]), np.array([9.0, 2.0])), made, None, 1)
    assert other_steps.steps.tolist() == [[1300, 1300]], "a validation of the reference is met or not compared"
    assert not other_steps.is_outside


def test_another_configuration_is_told_which_keys_differ(shipped, tmp_path, capsys) -> None:
    settings = {"model__init_args__lr": 0.004, "data__seq_len": 256}
    run = write_run(tmp_path / "run", 9, **settings)
    assert curve.main(["--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert "the nearest is made" in error
    assert "model.init_args.lr: 0.004, not 0.002" in error
    assert "data.seq_len: 256, not 128" in error
    assert "--reference made" in error
    assert curve.main(["--run", str(run), "--reference", "made"]) == 0
    assert "other than made: data.seq_len is 256, not 128" in capsys.readouterr().out


def test_what_does_not_change_losses_is_no_other_configuration(shipped, tmp_path) -> None:
    settings = {
        "data__num_workers": 3,
        "data__choices": {"piqa": "piqa.jsonl"},
        "trainer__devices": 2,
        "trainer__precision": "32-true",
        "model__init_args__generation": {"guidance_scale": 5.0},
        "model__init_args__a_later_switch": False,
    }
    assert curve.main(["--run", str(write_run(tmp_path / "run", 9, **settings))]) == 0
    other = write_run(tmp_path / "other", 9, model__init_args__logit_mean=0.0)
    with pytest.raises(ValueError, match="logit_mean: 0.0, not None"):
        curve_reference.recognise(other)


def test_a_reference_of_ones_own(shipped, tmp_path, capsys) -> None:
    """What is read is what was written, to five digits."""
    runs = [tmp_path / f"seed{n}" for n in range(3)]
    path = tmp_path / "mine.json"
    assert curve.main(["--make", "mine", "--runs", *map(str, runs), "--out", str(path)]) == 0
    made, back = curve_reference.make("mine", runs), curve_reference.read(str(path))
    assert (back.name, back.settings, back.seeds) == ("mine", made.settings, 3)
    assert set(back.curves) == {"train/text_loss", "train/diffusion_loss", "val/loss"}
    for name, own in made.curves.items():
        assert np.array_equal(back.curves[name].steps, own.steps)
        assert np.allclose(back.curves[name].losses, own.losses, rtol=1e-4)
    assert curve.main(["--run", str(runs[0]), "--reference", str(path)]) == 0


def test_what_makes_no_reference_is_refused(shipped, tmp_path, capsys) -> None:
    a, b, _ = (tmp_path / f"seed{n}" for n in range(3))
    other = write_run(tmp_path / "other", 5, data__seq_len=64)
    diverged = write_run(tmp_path / "diverged", 6, lambda steps, x: np.where(steps > 99, np.nan, x))
    young = shutil.copytree(write_run(tmp_path / "whole", 7), tmp_path / "young")
    lines = (young / "metrics.csv").read_text().splitlines(keepends=True)
    (young / "metrics.csv").write_text("".join(lines[:100]))
    for runs, message in {
        (a,): "got 1 run, expected at least 2",
        (a, b, a): "have the same seeds (0, 0)",
        (a, other): "has other settings than",
        (a, diverged): "train/text_loss has a loss that is not a positive number",
        (a, young): "train/text_loss at different steps (the last are 2600 and ",
    }.items():
        assert curve.main(["--make", "bad", "--runs", *map(str, runs)]) == 2
        assert message in capsys.readouterr().err
    assert not (shipped / "bad.json").exists()


def test_missing_files_and_wrong_ones(shipped, tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run", 9)

    def refused(*arguments: str) -> str:
        assert curve.main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "has no metrics.csv" in refused("--run", str(tmp_path / "nowhere"))
    error = refused("--run", str(run), "--reference", "quickstart")
    assert "no reference curves 'quickstart'" in error and "there are: made" in error and "--make quickstart" in error
    (tmp_path / "broken.json").write_text('{"name": "x"}')
    assert "is no file of reference curves" in refused("--run", str(run), "--reference", str(tmp_path / "broken.json"))
    (run / "metrics.csv").write_text("step,train/text_loss\n20,1.0\n40,much\n")
    assert "metrics.csv, step 40, column train/text_loss" in refused("--run", str(run))
    (run / "metrics.csv").write_text("step,train/text_loss\n10,1.0\n")
    assert "has come to step 10, the reference begins at step 20" in refused("--run", str(run))
    (run / "metrics.csv").write_text("step,train/text_loss\n")
    assert "has no training loss yet" in refused("--run", str(run))
    (run / "metrics.csv").write_text("step,train/text_loss\n20,1.0\n40,0.9")
    [only] = curve_reference.read_curves(run).values()
    assert only.steps.tolist() == [20], "the torn row is left out"
    shutil.rmtree(shipped)
    assert "no reference curves are shipped" in refused("--run", str(tmp_path / "seed0"))


@pytest.mark.parametrize("name", curve_reference.names())
def test_a_shipped_reference_knows_a_run_of_its_config_as_it_is_now(name: str, tmp_path: Path) -> None:
    """A setting that later versions add, with a default that changes nothing, belongs into the shipped file."""
    args = ["fit", "--config", str(ROOT / "configs" / f"{name}.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    read = run(ConfigReader, args)
    settings = read._parser("fit").dump(read.config["fit"], skip_none=False)
    (tmp_path / "config.yaml").write_text(settings, encoding="utf-8")
    assert curve_reference.recognise(tmp_path).name == name


@pytest.mark.parametrize("name", curve_reference.names())
def test_shipped_seeds_are_within_the_band_of_the_others(name: str) -> None:
    """Three seeds at least, finite, falling, of the configuration of this name; each is normal among the others."""
    made = curve_reference.read(name)
    assert made.name == name
    assert made.seeds >= 3
    assert {"train/loss", "train/text_loss", "train/diffusion_loss", "val/loss"} <= set(made.curves)
    for column, own in made.curves.items():
        assert (np.diff(own.steps) > 0).all()
        assert np.isfinite(own.losses).all() and (own.losses > 0).all()
        if column.startswith("train/"):
            assert own.losses[:, -20:].mean() < own.losses[:, :20].mean()
    for seed in range(made.seeds):
        rest = {c: Curve(own.steps, np.delete(own.losses, seed, 0)) for c, own in made.curves.items()}
        one = {c: Curve(own.steps, own.losses[seed]) for c, own in made.curves.items()}
        found = curve.compare_all(one, replace(made, curves=rest))
        assert not [c for c, comparison in found.items() if comparison.is_outside]
        doubled = {c: Curve(own.steps, 2 * own.losses) for c, own in one.items()}
        found = curve.compare_all(doubled, made)
        assert all(found[c].is_outside for c in ("train/loss", "train/text_loss", "train/diffusion_loss"))
