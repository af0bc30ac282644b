"""The bench of metric times runs, on a few pictures; what it times are the metrics themselves."""

from __future__ import annotations

import pytest
import torch

from tfusion.bench import metric_times


@pytest.mark.slow
def test_every_metric_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(metric_times, "NUMBER", 6)
    frechet = metric_times.frechet
    monkeypatch.setattr(metric_times, "frechet", lambda dim: frechet(dim // 16))  # roots of 2048 x 2048 take a minute
    threads = torch.get_num_threads()
    try:
        metric_times.main(["--threads", "1", "--image_size", "32"])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("for 6 pictures of 32 x 32 |")
    times = {name.strip(): float(value) for _, name, value, _ in (line.split("|") for line in lines[2:])}
    assert {
        "cider_d",
        "caption_accuracy",
        "composition: pictures read",
        "Frechet distance of 2048 features",
    } <= times.keys()
    assert all(value >= 0 for value in times.values())
