"""The dry check says what is in a folder: counts, bad records, packing; and draws its pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image as PILImage

from tfusion.bench import check_data
from tfusion.data.mixture import Stream, StreamPosition

ROOT = Path(__file__).parents[2]
GOOD = 40


@pytest.fixture
def arguments(tmp_path):
    """The command line for a folder of 40 good pictures, a broken one, one without caption, and a text."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    draws = np.random.default_rng(0)
    lines = []
    for n in range(GOOD):
        width, height = 20 + n, 90
        pixels = draws.integers(0, 255, (height, width, 3), np.uint8)
        PILImage.fromarray(pixels).save(folder / f"{n}.png")
        lines.append({"file_name": f"{n}.png", "text": [f"picture {n}", "noise"]})
    (folder / "broken.png").write_bytes((folder / "3.png").read_bytes()[:200])
    lines += [{"file_name": "broken.png", "text": "broken"}, {"file_name": "0.png", "text": "the first"}]
    PILImage.new("RGBA", (64, 64)).save(folder / "alone.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "poem.txt").write_text("".join(f"line {n} of a poem\n" for n in range(400)))
    overlay = {
        "trainer": {"default_root_dir": str(tmp_path / "run")},
        "model": {"init_args": {"model": {"init_args": {"vocab_size": 300}}}},
        "data": {
            "vocab_size": 300,
            "image_corpora": [
                {"class_path": "tfusion.data.ImageFiles", "init_args": {"path": str(folder), "image_size": 64}}
            ],
            "text_corpora": [
                {"class_path": "tfusion.data.TextFiles", "init_args": {"path": str(tmp_path / "poem.txt")}}
            ],
        },
    }
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay))
    return ["--config", str(ROOT / "configs/pictures.yaml"), "--config", str(path), "--rows", "200"]


def test_report_and_sheet(arguments, tmp_path, capsys) -> None:
    check_data.main([*arguments, "--data.max_bad_share", "0.05", "--tokens-per-s", "1000", "--samples", "6"])
    report = json.loads((tmp_path / "run/check_data/report.json").read_text())
    pictures, texts = report["corpora"]
    [files] = pictures["files"]
    assert (files["records"], files["good"], files["bad"]) == (GOOD + 2, GOOD, 2)
    assert files["width"]["min"] == 20
    assert files["width"]["max"] == 20 + GOOD - 1
    assert files["smaller_than_image_size"] == GOOD, "none is 64 wide"
    assert pictures["train"] + pictures["val"] == GOOD
    assert pictures["val"] >= 1
    assert pictures["captions_a_picture"]["max"] in (2, 3)
    assert {cause: [r["file"] for r in records] for cause, records in report["bad"].items()} == {
        "truncated picture": ["broken.png"],
        "no caption": ["alone.png"],
    }
    whole = (tmp_path / "poem.txt").stat().st_size
    assert 0.9 * whole < texts["bytes"] < whole, "its end is held out"

    packing = report["packing"]
    assert packing["utilisation"] == 1
    assert packing["image_share"] == pytest.approx(0.8, abs=0.05)
    positions = pictures["train"] * pictures["document_positions"] / packing["image_share"]
    assert report["epochs"]["image"]["seconds"] == pytest.approx(positions / 1000)
    assert report["epochs"]["image"]["steps"] == pytest.approx(positions / (4 * 256))
    with PILImage.open(tmp_path / "run/check_data/samples.png") as sheet:
        assert sheet.width > 6 * 96
    out = capsys.readouterr().out
    assert "1 x truncated picture: broken.png" in out
    assert "one epoch of image" in out
    assert not (tmp_path / "run/checkpoints").exists()


def test_more_bad_records_than_allowed_are_shown_and_end_with_an_error(arguments, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        check_data.main(arguments)
    assert exit.value.code == 1
    shown = capsys.readouterr()
    assert "2 of 42 records are bad (4.76%), data.max_bad_share allows 1.00%" in shown.err
    assert "packing:" in shown.out
    assert (tmp_path / "run/check_data/report.json").exists()


def test_packing_against_counting_positions_of_rows(arguments) -> None:
    cli = check_data.run(check_data.DataCheck, ["fit", *arguments[:4]])
    data = cli.datamodule
    found = check_data.check(data, cli.model, 32, 1000.0)["packing"]
    # the first four rows of 8 of the 32 streams (8 lanes x 4 rows)
    streams = [Stream(data.mixture, n, StreamPosition()) for n in (0, 4, 8, 13, 17, 22, 26, 31)]
    rows = [stream.next_row() for stream in streams for _ in range(4)]
    ids = [(length, bool(d.images)) for row in rows for d in row for length in [d.length(64)]]
    used = sum(length for length, _ in ids)
    assert found["rows"] == 32
    assert found["utilisation"] == used / (32 * 256)
    assert found["image_share"] == sum(length for length, image in ids if image) / used
    assert found["images_a_row"] == sum(len(d.images) for row in rows for d in row) / 32


def test_compute_against_counting_pairs(arguments) -> None:
    cli = check_data.run(check_data.DataCheck, ["fit", *arguments[:4]])
    data, model = cli.datamodule, cli.model.model
    found = check_data.check(data, cli.model, 32, 1000.0)["compute"]
    rows = [Stream(data.mixture, n, StreamPosition()).next_row() for n in (0, 4, 8, 13, 17, 22, 26, 31)]
    pairs = 0
    for document in (document for row in rows for document in row):
        length = document.length(64)
        pairs += length * (length + 1) // 2 + len(document.images) * 64 * 63 // 2
    assert found["attention_share"] == pairs / (len(rows) * 256**2)
    attention = 3 * 4 * len(model.transformer.blocks) * data.rows_per_step * 256**2 * 256  # D = T = 256
    saved = found["flops_a_step"] - found["flops_a_step_masked"]
    assert saved == pytest.approx(attention * (1 - found["attention_share"]), rel=1e-6)


def test_a_path_that_is_not_there_is_one_line(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        check_data.main([*arguments[:2], "--trainer.default_root_dir", "nowhere"])
    assert exit.value.code == 2
    assert "corpus 'pictures': 'pictures' does not exist" in capsys.readouterr().err
