"""Compiled blocks: the same losses and weights' names as without, and nothing is compiled after the first step."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests.models.test_attention import random_layout
from tfusion.models.attention import training_mask
from tfusion.models.compilers import has_compiler
from tfusion.models.packed_linear import PackedLinear
from tfusion.models.transformer import Transformer
from tfusion.requests import GenerationConfig, Request

STEPS = 6


class Watch(L.Callback):
    """Losses of each step, how many graphs were compiled by its end, and a picture made in between."""

    def __init__(self) -> None:
        self.losses, self.graphs = [], []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        prompt = "red" * len(self.losses)  # another length each time, to the model that trains, no copy
        pl_module.generate([{"segments": [prompt], "generate": "image"}])
        self.losses.append(pl_module.step_metrics()["train/loss"])
        self.graphs.append(counters["stats"]["unique_graphs"])


@pytest.fixture
def unpacked(monkeypatch):
    """As on CUDA: what generates shares the weights that learn, where it is not held."""
    monkeypatch.setattr("tfusion.training.multimodal.can_be_packed", lambda model: False)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_equals_eager_and_compiles_once(tiny_module, tiny_data, tiny_trainer, recompute, unpacked):
    runs = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        config = GenerationConfig(num_inference_steps=2, max_new_tokens=3)
        module = tiny_module(
            ema=False, generation=config, compile_blocks=compiled, activation_checkpointing=recompute, qk_norm=True
        )
        watch = Watch()
        tiny_trainer(STEPS, callbacks=[watch]).fit(module, tiny_data())
        runs[compiled] = watch, module.state_dict()
    (eager, weights), (watch, compiled_weights) = runs[False], runs[True]
    assert eager.graphs == [0] * STEPS
    assert watch.graphs[0] > 0
    assert watch.graphs == [watch.graphs[0]] * STEPS  # neither other rows nor a cache compile anything
    assert watch.losses == pytest.approx(eager.losses, rel=1e-5)
    assert list(compiled_weights) == list(weights)


def test_flex_in_compiled_blocks_equals_sdpa_and_compiles_once():
    """A new block mask each time, without gradients: for those flex has no kernel on CPU."""
    torch._dynamo.reset()
    counters.clear()
    trunk = Transformer(32, 2, 2, max_seq_len=256, qk_norm=True)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.normal_(generator=draws).mul_(0.2)
    trunk.rotary.fill_buffers()
    trunk.compile_blocks()
    x, places = torch.randn(2, 256, 32, generator=draws), torch.arange(256).expand(2, -1)
    for seed in range(3):
        ids = random_layout(2, 256, seed)
        with torch.no_grad():
            ours = trunk(x, places, training_mask(*ids, "flex"))
            with torch.compiler.set_stance("force_eager"):
                expected = trunk(x, places, training_mask(*ids, "sdpa"))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_generation_equals_eager(tiny_module, byte_tokenizer, dtype):
    """Text, pictures and both, of several lengths and in any number, in float64, and in float32, of which matrices are
    packed; attention is compiled as well, and what is compiled is compiled in the first calls.
    """
    config = GenerationConfig(num_inference_steps=2, max_new_tokens=6, guidance_scale=2.0)
    kinds = ("text", "image", "any")
    guided = ({"guidance_scale": 2.0}, {"guidance_scale": 1.0})
    calls = [
        [
            {"segments": ["red" * (1 + k % 4)], "generate": kinds[k % 3], "seed": k, **guided[k % 5 == 4]}
            for k in range(number)
        ]
        for number in (1, 2, 5, 9, 3, 4, 6, 7, 8, 10, 11)
    ]
    made, graphs = {}, {}
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        module = tiny_module(generation=config, compile_blocks=compiled, qk_norm=True).to(dtype)
        module.materialize("cpu")
        module.text_tokenizer = byte_tokenizer
        module.hold_generation_model()
        is_packed = any(type(layer) is PackedLinear for layer in module._held[0].modules())
        assert is_packed == (dtype == torch.float32 and torch.backends.mkldnn.is_available())
        made[compiled], graphs[compiled] = [], []
        for requests in calls:
            made[compiled] += [generation.segments for generation in module.generate(requests)]
            graphs[compiled].append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    assert set(graphs[False]) == {0}
    assert graphs[True][0] > 0
    assert graphs[True][3:] == [graphs[True][3]] * 8
    for ours, expected in zip(made[True], made[False], strict=True):
        assert len(ours) == len(expected)
        for a, b in zip(ours, expected, strict=True):
            if isinstance(a, str):
                assert a == b
            else:
                off = np.abs(np.asarray(a, int) - np.asarray(b, int)).max()
                assert off <= (dtype == torch.float32)  # of 255: rounded from sums in another order


def test_without_a_compiler_nothing_is_compiled_and_that_is_said(
    tiny_module, tiny_data, tiny_trainer, monkeypatch, caplog
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    has_compiler.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    with caplog.at_level("WARNING"):
        tiny_trainer(1).fit(tiny_module(compile_blocks=True), tiny_data())
    has_compiler.cache_clear()
    assert counters["stats"]["unique_graphs"] == 0
    assert "there is no no-such-compiler here, so nothing is compiled" in caplog.text


def test_without_the_headers_of_python_nothing_is_compiled(monkeypatch, caplog):
    """As of a Debian without python3-dev: inductor's code includes Python.h."""
    has_compiler.cache_clear()
    assert has_compiler("cpu")
    has_compiler.cache_clear()
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    with caplog.at_level("WARNING"):
        assert not has_compiler("cpu")
    has_compiler.cache_clear()
    assert "there is no Python.h (of Debian's python3-dev) here, so nothing is compiled for cpu" in caplog.text


def test_blocks_are_compiled_where_weights_were_there_before(tiny_module, tiny_data, tiny_trainer):
    torch._dynamo.reset()
    counters.clear()
    module = tiny_module(compile_blocks=True)
    module.materialize("cpu")
    tiny_trainer(1).fit(module, tiny_data())
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("packs", [True, False])
def test_what_is_held_is_apart_from_what_learns(tiny_module, tiny_data, tiny_trainer, packs, request):
    """Until the next run of a Trainer, which generates from the weights of then."""
    if not packs:
        request.getfixturevalue("unpacked")
    module = tiny_module(ema=False)
    tiny_trainer(1).fit(module, tiny_data())
    module.hold_generation_model()
    asked = [{"segments": ["red"], "generate": "image", "num_inference_steps": 2}]
    [held] = module.generate(asked)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.normal_()
    [same] = module.generate(asked)
    assert same.segments[0].tobytes() == held.segments[0].tobytes()
    tiny_trainer(2).fit(module, tiny_data())
    [new] = module.generate(asked)
    assert new.segments[0].tobytes() != held.segments[0].tobytes()


@pytest.mark.parametrize("samples", [499, 500, None])
@pytest.mark.parametrize("asked", [True, False])
def test_what_generates_is_compiled_for_many_samples(tiny_module, monkeypatch, asked, samples):
    calls = []
    monkeypatch.setattr(Transformer, "compile_blocks", lambda self, dynamic: calls.append(dynamic))
    module = tiny_module(compile_blocks=asked)
    module.materialize("cpu")
    module.hold_generation_model(samples)
    assert calls == [True] * (asked and samples != 499)


def test_predict_counts_the_samples_of_a_rank(tiny_module, monkeypatch):
    module, seen = tiny_module(), []
    monkeypatch.setattr(module, "check_requests", lambda requests: None)
    monkeypatch.setattr(module, "hold_generation_model", seen.append)
    requests = [Request(("a",), "image", n) for n in (3, 1, 4)]
    for ranks in (1, 2):
        trainer = SimpleNamespace(world_size=ranks, datamodule=SimpleNamespace(requests=requests))
        monkeypatch.setattr(type(module), "trainer", trainer)
        module.on_predict_start()
    assert seen == [8, 4]
