"""Compiled blocks: the same losses and weights' names as without, and nothing is compiled after the first step."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch._dynamo.utils import counters

from tfusion.requests import GenerationConfig

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


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_equals_eager_and_compiles_once(tiny_module, tiny_data, tiny_trainer, recompute):
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
