"""Scores of folders: equal to clean-fid's arithmetic, to validation's, and of the right prompts; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from PIL import Image

from tfusion.bench.folder import main, read_picture
from tfusion.callbacks.generation_metrics import GenerationMetrics
from tfusion.callbacks.writer import PredictionWriter
from tfusion.data.prompts import read_prompts
from tfusion.metrics import FeatureNetwork
from tfusion.pictures import decode
from tfusion.requests import GenerationConfig

NETWORK = """
generation_metrics:
  networks:
    - class_path: tfusion.metrics.FeatureNetwork
      init_args: {module: torch.nn.Flatten, name: pixels, image_size: 1}
"""


def pictures(folder: Path, number: int, side: int, seed: int) -> np.ndarray:
    """Noise as PNG files; uint8 (N, 3, S, S)."""
    folder.mkdir()
    made = np.random.default_rng(seed).integers(0, 256, (number, side, side, 3), dtype=np.uint8)
    for number, pixels in enumerate(made):
        Image.fromarray(pixels).save(folder / f"{number:06d}-0-0.png")
    return made.transpose(0, 3, 1, 2)


def scores(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, float]:
    main([str(argument) for argument in arguments])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def config(tmp_path: Path) -> list[object]:
    (tmp_path / "network.yaml").write_text(NETWORK)
    return ["--config", tmp_path / "network.yaml"]


@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_equals_clean_fid_on_the_same_features_and_features_kept_serve_as_well(tmp_path: Path, capsys, config) -> None:
    made, real = pictures(tmp_path / "made", 30, 8, 1), pictures(tmp_path / "real", 30, 8, 2)
    found = scores(capsys, "--generated", tmp_path / "made", "--reference", tmp_path / "real", *config)
    network = FeatureNetwork(torch.nn.Flatten(), "pixels", image_size=1)
    network.load(torch.device("cpu"))
    one, other = (network.features(torch.from_numpy(some)).double().numpy() for some in (made, real))
    moments = [moment for x in (one, other) for moment in (x.mean(0), np.cov(x, rowvar=False))]
    assert found["fd_pixels"] == pytest.approx(cleanfid.frechet_distance(*moments), rel=1e-5)
    assert found["kd_pixels"] == pytest.approx(cleanfid.kernel_distance(one, other), rel=1e-4)
    assert found["n"] == 30

    kept = tmp_path / "kept.safetensors"
    main([str(a) for a in ("--reference", tmp_path / "real", "--image_size", 8, "--write", kept, *config)])
    assert json.loads(capsys.readouterr().out) == {"written": str(kept)}
    again = scores(capsys, "--generated", tmp_path / "made", "--reference", kept, *config)
    assert again == found
    assert "of pictures of 8 pixels a side, expected 4" in refusal(
        capsys, "--generated", tmp_path / "made", "--image_size", 4, "--reference", kept, *config
    )
    (tmp_path / "other.yaml").write_text(NETWORK.replace("image_size: 1", "image_size: 2"))
    assert "network with fingerprint" in refusal(
        capsys, "--generated", tmp_path / "made", "--reference", kept, "--config", tmp_path / "other.yaml"
    )


def test_a_folder_of_predictions_scores_as_validation_does(
    tmp_path: Path, tiny_module, tiny_data, tiny_trainer, capsys, config
) -> None:
    """The same requests through `validate` and through `predict` and the folder, against the same pictures."""
    settings = {"seed": 2, "generation": GenerationConfig(num_inference_steps=2)}
    network = FeatureNetwork(torch.nn.Flatten(), "pixels", image_size=1)
    callback = GenerationMetrics([network], num_images=5, batch_size=2)
    trainer = tiny_trainer(1, limit_val_batches=1.0, callbacks=[callback])
    module, data = tiny_module(**settings), tiny_data()
    trainer.validate(module, data, verbose=False)
    (tmp_path / "real").mkdir()
    lines = []
    for number, picture in enumerate(data.image_corpora[0].load("val")):
        Image.fromarray(picture.image.permute(1, 2, 0).numpy()).save(tmp_path / "real" / f"{number}.png")
        lines.append(json.dumps({"segments": [picture.captions[0]], "generate": "image", "seed": number}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    predict = tiny_trainer(1, callbacks=[PredictionWriter()], default_root_dir=tmp_path / "run")
    module.text_tokenizer = data.tokenizer
    predict.predict(module, tiny_data(prompts=str(tmp_path / "prompts.jsonl")), return_predictions=False)
    found = scores(capsys, "--generated", tmp_path / "run" / "predictions", "--reference", tmp_path / "real", *config)
    assert found["n"] == 5
    for name in ("fd_pixels", "kd_pixels"):
        assert found[name] == pytest.approx(trainer.callback_metrics[f"val/tiles/{name}"].item(), rel=1e-5)


def test_pictures_are_scored_with_the_text_they_were_made_from(tmp_path: Path, capsys) -> None:
    """By the package's encoder: drawn scenes fit their own captions, not those of a list in another order."""
    from tfusion.data.shapes import Shapes

    corpus, lines = Shapes(32).load("val"), []
    (tmp_path / "made").mkdir()
    for number in range(12):
        Image.fromarray(corpus[number].image.permute(1, 2, 0).numpy()).save(tmp_path / "made" / f"{number:06d}-0-0.png")
        lines.append(json.dumps({"segments": [corpus[number].captions[0]], "generate": "image"}))
    (tmp_path / "right.jsonl").write_text("\n".join(lines))
    (tmp_path / "wrong.jsonl").write_text("\n".join(lines[5:] + lines[:5]))
    right, wrong = (
        scores(capsys, "--generated", tmp_path / "made", "--prompts", tmp_path / f"{name}.jsonl")
        for name in ("right", "wrong")
    )
    assert right["clip_score_reference"] > 2 * wrong["clip_score_reference"]
    assert right["n"] == 12
    assert len(read_prompts(tmp_path / "right.jsonl", GenerationConfig())) == 12


def test_refusals(tmp_path: Path, capsys, config) -> None:
    pictures(tmp_path / "made", 3, 8, 1)
    assert "give a folder of pictures" in refusal(capsys, "--generated", tmp_path / "none", "--reference", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds 0 pictures" in refusal(capsys, "--generated", tmp_path / "made", "--reference", tmp_path / "empty")
    Image.new("RGB", (8, 6)).save(tmp_path / "made" / "wide.png")
    message = refusal(capsys, "--generated", tmp_path / "made", "--reference", tmp_path / "made")
    assert "wide.png' is 8 x 6, not square: say --image_size" in message
    (tmp_path / "made" / "wide.png").write_bytes(b"no picture")
    message = refusal(capsys, "--generated", tmp_path / "made", "--image_size", 8, "--reference", tmp_path / "made")
    assert "wide.png' cannot be read as a picture" in message
    (tmp_path / "made" / "wide.png").unlink()
    (tmp_path / "prompts.jsonl").write_text('{"segments": ["a"], "generate": "image"}\n')
    message = refusal(capsys, "--generated", tmp_path / "made", "--prompts", tmp_path / "prompts.jsonl")
    assert "000001-0-0.png' is not called after one of the 1 requests" in message
    assert "nothing to do" in refusal(capsys, "--reference", tmp_path / "made")
    assert "nothing to do" in refusal(capsys, "--generated", tmp_path / "made")
    # features alone cannot say whether a picture fits its prompt
    message = refusal(capsys, "--generated", tmp_path / "made", "--prompts", tmp_path / "prompts.jsonl", *config)
    assert "--prompts is given, but none of the networks (FeatureNetwork) can use it" in message


def test_pictures_are_brought_to_size_as_training_data_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 4), dtype=np.uint8)  # wide, with transparency
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    expected = decode((tmp_path / "wide.png").read_bytes(), 8).pixels
    assert np.array_equal(read_picture(tmp_path / "wide.png", 8).numpy(), np.asarray(expected))
