"""Reading metrics.csv, whatever state it is in, and which curves stand in one chart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.report.made_up import measurements, write_metrics
from tfusion.metrics.measurement import Measurement
from tfusion.report.curves import MOST_POINTS, read_curves, timestep_charts, training_charts
from tfusion.training.run_folder import MetricsLogger


def test_reads_what_the_logger_writes(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.log_metrics({"train/loss": 0.1}, 1)
    logger.log_metrics({"train/loss": float("nan"), "val/loss": 1e-9}, 2)
    logger.log_metrics({"train/loss": 0.3, "val/loss": float("inf")}, 3)
    logger.finalize("success")
    curves = read_curves(logger.path)
    assert {name: (x.tolist(), y.tolist()) for name, (x, y) in curves.items()} == {
        "train/loss": ([1, 3], [0.1, 0.3]),
        "val/loss": ([2], [1e-9]),
    }


@pytest.mark.parametrize(
    "text",
    ["", "\n", "step,a", "step,a\n", "step,a\n1,2", "step,a\nx,2\n,3\n1\n1,2,3\n1,word\n", "a,b\n1,2\n", "\0\0\n\0"],
)
def test_a_broken_file_is_no_curve(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    assert read_curves(tmp_path / "metrics.csv") == {}
    assert training_charts({}) == timestep_charts({}, []) == []


def test_a_missing_or_torn_file(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "metrics.csv") == {}
    (tmp_path / "metrics.csv").write_bytes(b"step,a\n1,2\n2,\xff\n3,4\n4,5")
    x, y = read_curves(tmp_path / "metrics.csv")["a"]
    assert (x.tolist(), y.tolist()) == ([1, 3], [2, 4])


def test_charts_of_a_run(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.csv")
    charts = training_charts(read_curves(tmp_path / "metrics.csv"))
    assert {chart.title: [line.name for line in chart.lines] for chart in charts} == {
        "loss": ["train", "val"],
        "text loss": ["train", "val"],
        "diffusion loss": ["train", "val"],
        "perplexity": ["lines", "tiles"],  # one point is no curve, and one corpus' diffusion loss is the whole's
    }
    loss = charts[0]
    assert loss.lines[0].x.tolist() == list(range(1, 41))
    np.testing.assert_allclose(loss.lines[1].y, [1, 1 / 2, 1 / 3, 1 / 4])
    assert charts[1].y_label == "nats per token"


def test_what_is_measured_on_the_training_pictures_is_shown_beside_the_held_out_ones() -> None:
    names = ["train/loss", "train/lr", "val/loss", "val/a/fd_x", "train/a/fd_x", "val/b/given_image/perplexity"]
    charts = training_charts({name: (np.array([1, 2]), np.array([0.1, 0.2])) for name in names})
    assert {chart.title: [line.name for line in chart.lines] for chart in charts} == {
        "loss": ["train", "val"],
        "fd x": ["a", "a (train)"],
        "perplexity": ["b/given_image"],
    }


def test_a_long_curve_is_of_means_that_keep_its_integral() -> None:
    steps, values = np.arange(1, 1001), np.random.default_rng(0).normal(size=1000)
    [chart] = training_charts({"train/loss": (steps, values)})
    [line] = chart.lines
    assert len(line.x) == 250 <= MOST_POINTS  # of four each
    np.testing.assert_allclose(line.y, values.reshape(250, 4).mean(axis=1))
    np.testing.assert_allclose(line.x, steps.reshape(250, 4).mean(axis=1))


def test_loss_by_timestep_as_measured_and_over_the_run(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.csv")
    measured, training = timestep_charts(read_curves(tmp_path / "metrics.csv"), measurements())
    [line] = measured.lines
    assert line.name == "tiles"
    assert line.x.tolist() == [125, 375, 625, 875]
    assert line.x_error is not None and line.x_error.tolist() == [125] * 4
    assert line.y.tolist() == [0.1, 0.2, 0.3, 0.4]
    np.testing.assert_allclose(line.y_error, [0.01, 0.02, 0.03, 0.04])
    assert [one.name for one in training.lines] == ["timesteps 0 to 500", "timesteps 500 to 1000"]


def test_single_timesteps_and_missing_errors() -> None:
    found = [Measurement("val/a/diffusion_loss_t100", 0.5, 3), Measurement("val/a/diffusion_loss_t9", 0.25, 3)]
    found += [Measurement("val/a/diffusion_loss_t200", float("nan"), 0), Measurement("val/a/diffusion_loss", 1.0, 3)]
    [chart] = timestep_charts({}, found)
    [line] = chart.lines
    assert (line.x.tolist(), line.y.tolist()) == ([9, 100], [0.25, 0.5])
    assert line.y_error is not None and line.y_error.tolist() == [0, 0]
