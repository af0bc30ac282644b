"""The whole path on a CUDA device: fit in bf16-mixed with pinned batches, validate, sample, load."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.models.test_attention import random_layout
from tfusion import replay
from tfusion.callbacks.ema import EMA
from tfusion.callbacks.perplexity import Perplexity
from tfusion.models.attention import attend, training_mask
from tfusion.replay import Replayed, TokenSteps
from tfusion.requests import GenerationConfig
from tfusion.rows import extend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REQUESTS = [
    {"segments": ["red"], "generate": "image", "n": 2, "seed": 1},
    {"segments": ["a longer prompt"], "generate": "image", "seed": 2, "guidance_interval": [0.3, 0.7]},
    {"segments": ["one"], "generate": "any", "n": 2, "seed": 3},
    {"segments": ["words, words"], "generate": "text", "n": 3, "seed": 4},
]
UNGUIDED = [{"segments": ["one"], "generate": "any", "n": 6, "seed": 5, "guidance_scale": 1}]  # in the cache itself


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


def test_losses_are_those_of_the_cpu(tiny_module, tiny_data, tiny_trainer):
    losses = {}
    for accelerator in ("cpu", "gpu"):
        module = tiny_module(dim=64)
        tiny_trainer(5, accelerator=accelerator).fit(module, tiny_data())
        losses[accelerator] = module.step_metrics()["train/loss"]
    assert losses["gpu"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_losses_are_those_of_eager_sdpa(tiny_module, tiny_data, tiny_trainer, backend, checkpointing):
    losses = {}
    for compiled in (False, True):
        module = tiny_module(
            dim=64,
            attention_backend=backend if compiled else "sdpa",
            activation_checkpointing=checkpointing if compiled else "none",
            compile_blocks=compiled,
        )
        tiny_trainer(5, accelerator="gpu").fit(module, tiny_data())
        losses[compiled] = module.step_metrics()["train/loss"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


@pytest.mark.parametrize(("width", "dtype"), [(32, "float32"), (64, "float32"), (64, "bfloat16"), (128, "bfloat16")])
@pytest.mark.parametrize("length", [100, 256, 1000])
def test_flex_attention_is_sdpa_forward_and_backward(width, dtype, length):
    """On rows with documents, images and padding anywhere, against float64: also rows that see nothing in a tile."""
    rule = [x.cuda() for x in random_layout(3, length, seed=width + length)]
    draws = torch.Generator().manual_seed(0)
    shape = (3, 4, length, width)
    inputs = [torch.randn(shape, generator=draws).to("cuda", getattr(torch, dtype)).requires_grad_() for _ in range(3)]
    upstream = torch.randn(shape, generator=draws).to("cuda", getattr(torch, dtype))
    flex = attend(*inputs, training_mask(*rule, backend="flex"))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = attend(*wide, training_mask(*rule, backend="sdpa").double())
    for ours, theirs in zip(
        [flex, *torch.autograd.grad(flex, inputs, upstream)],
        [exact, *torch.autograd.grad(exact, wide, upstream.double())],
        strict=True,
    ):
        assert (ours - theirs).norm() / theirs.norm() < (2e-3 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("width", [64, 256])
def test_losses_of_a_few_steps_are_those_of_sdpa_in_bf16(tiny_module, tiny_data, tiny_trainer, width):
    """Compiled, in packed rows of several tiles, with heads of 64: finite, and the same."""
    losses = {}
    for backend in ("sdpa", "flex"):
        settings = {"dim": width, "num_heads": width // 64, "max_seq_len": 512}
        module = tiny_module(**settings, attention_backend=backend, compile_blocks=backend == "flex")
        trainer = tiny_trainer(8, accelerator="gpu", precision="bf16-mixed")
        trainer.fit(module, tiny_data(seq_len=512, rows_per_step=4))
        losses[backend] = module.step_metrics()["train/loss"]
    assert losses["flex"] == pytest.approx(losses["sdpa"], rel=2e-2)


@pytest.mark.parametrize("kind", ["transfusion", "chameleon"])
@pytest.mark.parametrize("compiled", [False, True])
def test_replayed_generation_is_plain_generation(
    tiny_module, tiny_chameleon, monkeypatch, byte_tokenizer, kind, compiled
):
    """Pictures and texts of graphs, blocks compiled or not, against those launched one by one."""
    settings = GenerationConfig(num_inference_steps=10, guidance_scale=2.0, max_new_tokens=30, temperature=0.7)
    module = (tiny_module if kind == "transfusion" else tiny_chameleon)(dim=64, generation=settings)
    module.text_tokenizer = byte_tokenizer
    module.materialize(torch.device("cuda"))
    monkeypatch.setattr(replay, "COLUMNS", 8)  # so that texts outgrow what was recorded
    asked = REQUESTS if kind == "transfusion" else [{**r, "guidance_interval": [0, 1]} for r in REQUESTS]
    recorded = []
    record = Replayed._record
    monkeypatch.setattr(Replayed, "_record", lambda self, inputs: recorded.append(1) or record(self, inputs))
    module.compile_blocks = compiled
    module.hold_generation_model()
    ours = module.generate(asked) + module.generate(UNGUIDED)
    assert recorded
    module._held = []
    monkeypatch.setattr(Replayed, "__call__", lambda self, *inputs: self.call(*inputs))
    monkeypatch.setattr(TokenSteps, "__call__", lambda self, contents: extend(self.model, self.cache, contents))
    monkeypatch.setattr(TokenSteps, "of_all", lambda self, ids: self([[i] for i in ids.tolist()]))
    plain = module.generate(asked) + module.generate(UNGUIDED)
    for a, b in zip(ours, plain, strict=True):
        assert [type(s) for s in a.segments] == [type(s) for s in b.segments]
        for one, other in zip(a.segments, b.segments, strict=True):
            if isinstance(one, str):
                assert one == other
            else:
                assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 2
