"""The README's commands run as they stand (shortened by overrides), and its set-up commands are the promised ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image as PILImage

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.timeout(900)  # a test runs many commands, and on a busy machine; `run` ends one that hangs
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    ")]
SHORT = (
    "--trainer.max_steps 4 --trainer.val_check_interval 4 --data.max_val_images 20 "
    "--model.init_args.generation.num_inference_steps 2 --model.init_args.generation.max_new_tokens 2 "
    "--model.init_args.compile_blocks false "
    "--samples.num_images 2 --samples.num_captions 1"
)


def run(command: str, folder: Path) -> str:
    """The command's output, from a folder with its own `runs/` and the repository's `configs/`."""
    program, *arguments = shlex.split(command)
    module = {"tfusion": ["-m", "tfusion"], "python": []}[program]
    done = subprocess.run(
        [sys.executable, *module, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("readme")
    (path / "configs").symlink_to(ROOT / "configs")
    return path


def command(start: str) -> str:
    [found] = [line for line in COMMANDS if line == start] or [line for line in COMMANDS if line.startswith(start)]
    return found


def test_set_up_commands():
    set_up = "python3 -m venv .venv && .venv/bin/pip install -e"
    assert f"{set_up} . && .venv/bin/tfusion fit --config configs/quickstart.yaml" in COMMANDS
    assert f"{set_up} '.[dev]' && .venv/bin/pytest -n auto" in COMMANDS


@pytest.mark.slow
def test_quickstart_commands(folder):
    run(f"tfusion fit --config configs/quickstart.yaml {SHORT}", folder)
    made = {path.name for path in (folder / "runs/quickstart").iterdir()}
    assert {"config.yaml", "metrics.csv", "samples", "checkpoints"} <= made
    fewer = "--generation_metrics.num_images 4 --generation_metrics.num_captions 4"
    table = run(f"{command('tfusion validate --config runs/quickstart')} {fewer}", folder)
    assert "val/shakespeare/perplexity" in table
    assert "train/openmoji/clip_score_reference" in table
    assert {"validation.json", "report.html"} <= {path.name for path in (folder / "runs/quickstart").iterdir()}
    run(command("tfusion predict  --config runs/quickstart"), folder)
    lines = (folder / "runs/quickstart/predictions/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 36
    result = json.loads(run(command("python -m tfusion.bench.quickstart"), folder).splitlines()[-1])
    assert set(result) == {
        "train_s",
        "images_in_use",
        "image_accuracy",
        "caption_accuracy",
        "text_bits_per_byte",
    }
    resumed = command("tfusion fit --config runs/quickstart/config.yaml")
    run(f"{resumed} --trainer.max_steps 5", folder)
    python = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    (folder / "snippet.py").write_text(python, encoding="utf-8")
    run("python snippet.py", folder)


@pytest.mark.slow
def test_shapes_commands(folder):
    run(f"tfusion fit --config configs/shapes.yaml {SHORT}", folder)
    result = json.loads(run(f"{command('python -m tfusion.bench.shapes')} --scenes 20", folder).splitlines()[-1])
    assert result["reader_accuracy"] == 1.0
    assert result["scenes"] == 20


@pytest.mark.slow
def test_own_pictures_commands(folder):
    """The folder of the README's own lines, and its commands in their order."""
    pictures = folder / "pictures"
    pictures.mkdir()
    lines = re.search(r"```json\n(\{\"file_name.*?)```", README, re.DOTALL).group(1)
    names = [json.loads(line)["file_name"] for line in lines.splitlines()]
    more = [{"file_name": f"{n}.jpg", "text": f"picture {n}"} for n in range(20)]
    (pictures / "metadata.jsonl").write_text(lines + "".join(json.dumps(line) + "\n" for line in more))
    for n, name in enumerate([*names, *(line["file_name"] for line in more)]):
        PILImage.new("RGB", (80 + n, 70), (9 * n, 100, 200)).save(pictures / name)
    assert "one epoch of image" in run(command("python -m tfusion.bench.check_data"), folder)
    assert (folder / "runs/pictures/check_data/samples.png").exists()
    run(f"{command('tfusion fit --config configs/pictures.yaml')} {SHORT}", folder)
    assert "val/pictures/diffusion_loss" in run(command("tfusion validate --config runs/pictures"), folder)
    subprocess.run(command("echo"), shell=True, cwd=folder, check=True)
    short = "--model.init_args.generation.num_inference_steps 2"
    run(f"{command('tfusion predict --config runs/pictures')} {short}", folder)
    assert len(list((folder / "runs/pictures/predictions").glob("000000-*.png"))) == 8
    scored = run(command("python -m tfusion.bench.folder").replace("runs/x", "runs/pictures"), folder)
    assert json.loads(scored.splitlines()[-1])["n"] == 8


@pytest.mark.slow
def test_commands_of_the_papers_systems(folder):
    """An autoencoder, a cache of its latents, a Transfusion on them, and the table, each in a few steps."""
    few = folder / "few.yaml"  # of the training pictures; those held out are 1,000 each
    few.write_text(
        "data: {image_corpora: [{class_path: tfusion.data.Shapes, init_args: {image_size: 64, num_images: 64}}]}\n"
    )
    steps = "--trainer.max_steps 4 --trainer.val_check_interval 4 --data.max_val_images 20"
    run(f"{command('tfusion fit --config configs/autoencoder.yaml')} {steps}", folder)
    run(f"{command('tfusion predict --config configs/encode.yaml')} --config few.yaml", folder)
    assert len(list((folder / "runs/encode/latents").glob("*.parquet"))) == 3
    table = run(
        f"{command('python -m tfusion.bench.systems')} --only linear-16 -- {SHORT} --data.max_val_characters 2000 "
        "--generation_metrics.num_images 2 --generation_metrics.num_captions 2 --generation_metrics.num_scenes 1",
        folder,
    )
    assert re.search(r"\| transfusion-linear-16 \| 0 \| 4 \| .* \|", table), table


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
