"""A tiny model learns 8 pictures and their names by heart in half a minute, in both directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from tfusion.callbacks.ema import EMA
from tfusion.data.corpora import CaptionedImage

STEPS = 400
NAMES = ("sun", "frog", "sea", "rose", "night", "snow", "brick", "lime tree")


class EightPictures:
    """8 pictures of 8 x 8 pixels: a shape of one colour on another."""

    name, image_size = "eight", 8

    def load(self, split: str) -> list[CaptionedImage]:
        draws = torch.Generator().manual_seed(1)
        pictures = []
        for name in NAMES:
            shape = torch.rand(4, 4, generator=draws).repeat_interleave(2, 0).repeat_interleave(2, 1) < 0.5
            ground, figure = torch.randint(0, 256, (2, 3, 1, 1), generator=draws)
            image = torch.where(shape, figure, ground).to(torch.uint8)
            pictures.append(CaptionedImage(name, image, (name,)))
        return pictures


@pytest.fixture
def trained(tiny_module, tiny_data, tiny_trainer):
    module = tiny_module(
        "flow", "sample", timestep_sampling="logit_normal", dim=64, num_layers=3, num_heads=4, lr=4e-3, warmup_steps=20
    )  # fmt: skip
    data = tiny_data(image_corpora=[EightPictures()], text_corpora=[], rows_per_step=8, caption_first=0.6)
    tiny_trainer(STEPS, callbacks=[EMA(0.98)]).fit(module, data)
    return module


def test_learns_pictures_and_names(trained) -> None:
    pictures = EightPictures().load("train")
    pixels = np.stack([p.image.permute(1, 2, 0).numpy().astype(float) for p in pictures])
    asked = [{"segments": [name], "generate": "image", "seed": n} for n, name in enumerate(NAMES)]
    shown = [{"segments": [PILImage.fromarray(p.image.permute(1, 2, 0).numpy())], "generate": "text"} for p in pictures]
    settings = {"num_inference_steps": 25, "max_new_tokens": 12}
    generations = trained.generate([request | settings for request in asked + shown])

    made = [np.asarray(generation.segments[0]).astype(float) for generation in generations[:8]]
    distances = [((pixels - image) ** 2).mean((1, 2, 3)) for image in made]
    assert sum(int(d.argmin()) == n for n, d in enumerate(distances)) >= 7
    assert np.median([d[n] for n, d in enumerate(distances)]) < 20**2, "not only nearest, but like it"
    named = ["".join(generation.segments) for generation in generations[8:]]
    assert sum(name == right for name, right in zip(named, NAMES, strict=True)) >= 7, named
