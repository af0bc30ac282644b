"""The learning rate at every corner, which weights decay, and one AdamW step by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tfusion.models.transfusion import Transfusion
from tfusion.training.optim import adamw, lr_factor, parameter_groups


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1 / 4000),  # the first step already learns
        (1999, 0.5),
        (3999, 1.0),
        (4000, 1.0),  # the cosine starts where the warm-up ends
        (127_000, (1 + 0.05) / 2),  # half-way between warm-up and end
        (250_000, 0.05),
        (10**6, 0.05),
    ],
)
def test_learning_rate_of_the_paper(step: int, factor: float) -> None:
    assert math.isclose(lr_factor(step, 4000, 250_000, 0.05), factor, rel_tol=1e-12)


def test_learning_rate_rises_then_falls() -> None:
    factors = [lr_factor(step, 10, 100, 0.05) for step in range(120)]
    assert factors[:10] == [(n + 1) / 10 for n in range(10)]
    assert all(a > b for a, b in itertools.pairwise(factors[10:101]))
    assert set(factors[100:]) == {0.05}
    assert max(factors) == 1
    quarter = 10 + 90 // 3  # a third of the way: cos(60 degrees)
    assert math.isclose(factors[quarter], 0.05 + 0.95 * (1 + 0.5) / 2, rel_tol=1e-12)


def test_learning_rate_without_warm_up_and_with_nothing_else() -> None:
    assert lr_factor(0, 0, 10, 0.1) == 1.0
    assert math.isclose(lr_factor(10, 0, 10, 0.1), 0.1)
    assert [lr_factor(step, 4, 4, 0.1) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(5, 0, 10, 1.0) == 1.0  # final = 1: constant


def make() -> Transfusion:
    return Transfusion(20, (2, 4, 4), 2, 32, 2, 4, max_seq_len=16, qk_norm=True).materialize("cpu", 0)


def test_decay_groups_exactly() -> None:
    """Every matrix decays, embedding, head and adapters among them; norms and biases do not."""
    model = make()
    groups = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert len(decayed) + len(free) == len(names) == len({*decayed, *free})
    block = [f"transformer.blocks.{n}." for n in range(2)]
    assert set(decayed) == {
        "embedding.weight",
        "text_head.weight",
        "patch_encoder.proj.weight",
        "patch_encoder.timestep.in_proj.weight",
        "patch_encoder.timestep.out_proj.weight",
        "patch_decoder.proj.weight",
        *[b + "attention." + p + "_proj.weight" for b in block for p in ("qkv", "o")],
        *[b + "feed_forward." + p + "_proj.weight" for b in block for p in ("gate_up", "down")],
    }
    assert set(free) == {
        "transformer.norm.weight",
        "patch_encoder.proj.bias",
        "patch_encoder.timestep.in_proj.bias",
        "patch_encoder.timestep.out_proj.bias",
        "patch_decoder.proj.bias",
        *[b + p + "_norm.weight" for b in block for p in ("attention", "feed_forward")],
        *[b + "attention." + p + "_norm.weight" for b in block for p in ("q", "k")],
    }


def test_frozen_parameters_are_left_out() -> None:
    model = make()
    model.embedding.requires_grad_(False)
    model.transformer.norm.requires_grad_(False)
    chosen = {id(parameter) for group in parameter_groups(model, 0.1) for parameter in group["params"]}
    assert chosen == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_steps_equal_the_formula() -> None:
    """Decoupled decay on the matrix only (Loshchilov & Hutter, algorithm 2)."""
    module = torch.nn.Linear(3, 2).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    lr, (b1, b2), eps = 1e-2, (0.9, 0.95), 1e-8
    optimizer = adamw(parameter_groups(module, 0.1), lr, (b1, b2), eps)
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in module.named_parameters()}
    for step in range(1, 5):
        for name, p in module.named_parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=p.dtype)
            m, v = moments[name]
            m, v = b1 * m + (1 - b1) * p.grad, b2 * v + (1 - b2) * p.grad**2
            moments[name] = m, v
            decay = 0.1 if name == "weight" else 0.0
            update = m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + eps)
            expected[name] = expected[name] * (1 - lr * decay) - lr * update
        optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-10, atol=1e-12)
