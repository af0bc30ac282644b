"""The bench of latent caches: a line a measurement, of the pictures it says, cached and not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.latent_caches import save_autoencoder
from tests.data.picture_folders import N, write_pairs
from tfusion.bench import latents


def test_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "pictures").mkdir()
    write_pairs(tmp_path / "pictures")
    folder = save_autoencoder(tmp_path / "autoencoder")
    flags = ["--image_size", "16", "--rows", "1", "--steps", "1", "--rounds", "2", "--warmup", "1"]
    latents.main(["--autoencoder", folder, "--path", str(tmp_path / "pictures"), *flags])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["what"], line.get("cached")) for line in lines] == [
        ("predict", None),
        *[(what, cached) for what in ("loader", "loader+encode") for cached in (False, True, None)],
    ]
    assert lines[0]["pictures"] == N and lines[0]["latent_shape"] == [5, 8, 8]
    assert all(line["images_per_s"] > 0 for line in lines if "images_per_s" in line)
    assert lines[3]["ratio"] == pytest.approx(lines[2]["images_per_s"] / lines[1]["images_per_s"])


def test_a_folder_that_is_no_autoencoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        latents.main(["--autoencoder", str(tmp_path)])
    assert "has no config.json" in capsys.readouterr().err
