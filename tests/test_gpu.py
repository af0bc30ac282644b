"""The whole path on a CUDA device: fit in bf16-mixed with pinned batches, validate, sample, load."""

from __future__ import annotations

import pytest
import torch

from tfusion.callbacks.ema import EMA
from tfusion.callbacks.perplexity import Perplexity
from tfusion.requests import GenerationConfig


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["ddpm", "flow"])
def test_fit_validate_and_generate(tiny_module, tiny_data, tiny_trainer, family):
    settings = GenerationConfig(num_inference_steps=4, guidance_scale=2.0, max_new_tokens=4, temperature=0.7)
    module = tiny_module(family, "epsilon", dim=64, generation=settings)  # flex attention wants heads of 16 or more
    trainer = tiny_trainer(
        6,
        accelerator="gpu",
        precision="bf16-mixed",
        callbacks=[EMA(0.9), Perplexity()],
        limit_val_batches=1.0,
        val_check_interval=3,
    )
    trainer.fit(module, tiny_data(num_workers=1))
    assert trainer.callback_metrics["val/loss"].isfinite()
    module.to("cuda")
    made = module.generate(
        [{"segments": ["red"], "generate": "image", "n": 2}, {"segments": ["one"], "generate": "any", "n": 2}]
    )
    assert made[0].segments[0].size == (8, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_losses_are_those_of_the_cpu(tiny_module, tiny_data, tiny_trainer):
    losses = {}
    for accelerator in ("cpu", "gpu"):
        module = tiny_module(dim=64)
        tiny_trainer(5, accelerator=accelerator).fit(module, tiny_data())
        losses[accelerator] = module.step_metrics()["train/loss"]
    assert losses["gpu"] == pytest.approx(losses["cpu"], rel=1e-3)
