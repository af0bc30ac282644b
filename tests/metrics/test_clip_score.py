"""CLIP score of a tiny random CLIP against its own embeddings, and what cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from tfusion.metrics import Clip, ClipScore

CPU = torch.device("cpu")
SIDE = 16
MOST = 12  # positions of a caption, with begin and end
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 2 x 1 layers, as `save_pretrained` writes it; a token a letter."""
    path = tmp_path_factory.mktemp("clip")
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    text = sizes | {"vocab_size": len(tokens), "max_position_embeddings": MOST} | ends
    vision = sizes | {"image_size": SIDE, "patch_size": 8}
    with torch.random.fork_rng():
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    model.save_pretrained(path)
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


def pictures(count: int, side: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=draws, dtype=torch.uint8)


@torch.no_grad()
def test_cosines_are_those_of_the_models_own_embeddings(folder: Path) -> None:
    """One pair at a time, scaled by hand: neither batch nor padding changes a pair."""
    clip = Clip(str(folder))
    clip.load(CPU)
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    images, captions = pictures(3, SIDE), ["red", "a blue cow", "x"]
    cosines = clip.cosines(images, captions)
    assert cosines.shape == (3,)
    assert len(set(cosines.tolist())) == 3
    mean, std = (torch.tensor(getattr(clip.processor.image_processor, name)) for name in ("image_mean", "image_std"))
    for image, caption, cosine in zip(images, captions, cosines, strict=True):
        pixels = (image / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        ids = torch.tensor([tokenizer(caption)["input_ids"]])
        assert len(ids[0]) == 2 + len(caption.replace(" ", ""))
        embeds = [
            model.visual_projection(model.vision_model(pixels[None]).pooler_output),
            model.text_projection(model.text_model(ids).pooler_output),
        ]
        assert cosine.item() == pytest.approx(torch.cosine_similarity(*embeds).item(), abs=1e-6)


def test_any_size_of_picture_and_long_captions_are_taken(folder: Path) -> None:
    clip = Clip(str(folder))
    clip.load(CPU)
    cosines = clip.cosines(pictures(2, 40), ["a b c d e f g h i j k l m " * 10, "x"])
    alone = clip.cosines(pictures(2, 40)[:1], ["a b c d e f g h i j"])
    assert cosines[0].item() == pytest.approx(alone.item(), abs=1e-5)  # cut to the 10 letters that fit


def test_score_is_a_mean_over_pairs_of_what_is_positive() -> None:
    one, many = ClipScore(), ClipScore()
    one.update(torch.tensor([0.5, -1.0, 0.25]))
    many.update(torch.tensor([0.5]))
    many.update(torch.tensor([-1.0, 0.25]))
    many.update(torch.empty(0))
    mean, error = many.compute()
    assert one.compute() == (mean, error)
    assert mean == pytest.approx(100 * 0.75 / 3)
    assert error == pytest.approx(np.std([50, 0, 25], ddof=1) / 3**0.5)


def test_what_is_no_clip_is_refused(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"(?s)Clip: 'nobody/nothing' cannot be loaded .*; give a folder with config.json"
    ):
        Clip("nobody/nothing").load(CPU)
    with pytest.raises(ValueError, match="cannot be loaded"):
        Clip(str(tmp_path)).load(CPU)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is of type 'bert', expected 'clip'"):
        Clip(str(tmp_path)).load(CPU)


def test_weights_that_are_not_in_the_file_are_not_drawn_at_random(tmp_path: Path, folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder)
    state = {name: value for name, value in model.state_dict().items() if name != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"its file lacks \['visual_projection.weight'\]"):
        Clip(str(tmp_path)).load(CPU)
