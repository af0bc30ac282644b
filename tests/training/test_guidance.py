"""Guidance needs pictures without captions in training: a module knows what its data dropped, and refuses the rest."""

from __future__ import annotations

import pytest
import torch

from tfusion.callbacks.samples import SampleGrid
from tfusion.requests import GenerationConfig, parse_request

MESSAGE = r"guidance_scale 3.0, but training with data.caption_drop 0, or with data.caption_first 0, leaves out no"
IMAGE = {"segments": ["red"], "generate": "image", "num_inference_steps": 2}
GUIDED = GenerationConfig(num_inference_steps=2, guidance_scale=3.0, max_new_tokens=4)


def fit(tiny_module, tiny_data, tiny_trainer, tmp_path, drop: float, first: float = 0.5):
    """A checkpoint of a module trained with so much caption drop."""
    module, trainer = tiny_module(), tiny_trainer(1)
    trainer.fit(module, tiny_data(caption_first=first, caption_drop=drop))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    return torch.load(tmp_path / "saved.ckpt", weights_only=True)


def loaded(tiny_module, state, generation: GenerationConfig | None = None):
    """Another module with its weights, as `tfusion.load` makes it."""
    module = tiny_module(generation=generation)
    module.materialize("cpu")
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"])
    return module


@pytest.mark.parametrize("shares", [{"drop": 0.0}, {"drop": 0.1, "first": 0.0}])
def test_guidance_is_refused_where_no_caption_was_dropped(
    tiny_module, tiny_data, tiny_trainer, tmp_path, shares
) -> None:
    state = fit(tiny_module, tiny_data, tiny_trainer, tmp_path, **shares)
    assert state["caption_drop"] == 0.0
    module = loaded(tiny_module, state)
    for generate in ("image", "any"):
        with pytest.raises(ValueError, match=MESSAGE):
            module.generate([IMAGE, IMAGE | {"generate": generate, "guidance_scale": 3.0}])
    assert len(module.generate([IMAGE])) == 1
    text = {"segments": ["red"], "generate": "text", "guidance_scale": 3.0, "max_new_tokens": 2}
    assert len(module.generate([text])) == 1  # guidance acts on pictures
    with pytest.raises(ValueError, match=MESSAGE):
        loaded(tiny_module, state, GUIDED).generate([{"segments": ["red"], "generate": "image"}])


def test_guidance_goes_where_captions_were_dropped_or_nobody_knows(
    tiny_module, tiny_data, tiny_trainer, tmp_path
) -> None:
    state = fit(tiny_module, tiny_data, tiny_trainer, tmp_path, drop=0.1)
    assert state["caption_drop"] == 0.05
    assert len(loaded(tiny_module, state).generate([IMAGE | {"guidance_scale": 3.0}])) == 1
    del state["caption_drop"]  # an older checkpoint
    assert len(loaded(tiny_module, state).generate([IMAGE | {"guidance_scale": 3.0}])) == 1


def test_fit_refuses_guided_samples_at_its_start(tiny_module, tiny_data, tiny_trainer) -> None:
    trainer = tiny_trainer(1, callbacks=[SampleGrid(num_images=1)])
    with pytest.raises(ValueError, match=MESSAGE):
        trainer.fit(tiny_module(generation=GUIDED), tiny_data(caption_drop=0.0))
    assert trainer.global_step == 0


def test_fit_goes_where_no_picture_would_be_made(tiny_module, tiny_data, tiny_trainer, tmp_path) -> None:
    grid = SampleGrid(num_images=0, num_captions=1, num_texts=1)
    tiny_trainer(1, callbacks=[grid]).fit(tiny_module(generation=GUIDED), tiny_data(caption_drop=0.0))
    grid = SampleGrid(num_images=1, num_captions=0, num_texts=1)
    module = tiny_module(generation=GUIDED, latent_shape=None, patch_size=None)
    trainer = tiny_trainer(1, callbacks=[grid])
    trainer.fit(module, tiny_data(image_corpora=[], caption_drop=0.0))
    trainer.save_checkpoint(tmp_path / "text.ckpt")
    assert torch.load(tmp_path / "text.ckpt", weights_only=True)["caption_drop"] is None


def test_a_checkpoint_that_is_checked_tells_before_it_is_loaded(tiny_module, tiny_data, tiny_trainer, tmp_path) -> None:
    """As the command line does before `validate`, whose metrics would ask for pictures in the end."""
    state = fit(tiny_module, tiny_data, tiny_trainer, tmp_path, drop=0.0)
    module = tiny_module(generation=GUIDED)
    module.materialize("cpu")
    module.check_checkpoint(state)
    module.text_tokenizer = loaded(tiny_module, state).text_tokenizer
    with pytest.raises(ValueError, match=MESSAGE):
        module.check_requests([parse_request(IMAGE | {"guidance_scale": 3.0}, GUIDED)])
