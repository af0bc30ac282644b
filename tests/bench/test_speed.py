"""The speed benches print what they promise, from consistent figures; no time is asserted."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tfusion.bench import sampling, text, train_step
from tfusion.bench.flops import forward_flops
from tfusion.bench.setting import parser, sizes_of

TINY = [
    "--dim",
    "32",
    "--layers",
    "2",
    "--heads",
    "2",
    "--image-side",
    "4",
    "--patch-dim",
    "12",
    "--rounds",
    "2",
    "--warmup",
    "1",
]
PEER = pytest.mark.skipif(importlib.util.find_spec("transfusion_pytorch") is None, reason="needs the extra `bench`")


def printed(bench, capsys, *arguments: str) -> dict:
    bench.main([*TINY, *arguments])
    [line] = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_flops_are_those_a_counter_sees(tiny_module) -> None:
    sizes = sizes_of(parser(None, batch=3, dtype="fp32", rounds=1, warmup=0).parse_args(TINY))
    batch = train_step.our_batch(sizes, *train_step.samples_of(sizes, 20))
    rows, T = batch.token_ids.shape
    module = train_step.our_module(sizes, T, lr=1e-3)
    module.materialize("cpu")
    # SDPA as plain products, which the counter knows
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        module.model(batch, batch.latents, torch.zeros(rows))
    # the head runs at all N positions, which are padded to a multiple of 256
    assert counter.get_total_flops() == forward_flops(module.model, rows, T, len(batch.text_labels), rows)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_training_step(capsys, dtype: str) -> None:
    result = printed(train_step, capsys, "--batch", "3", "--text-len", "20", "--dtype", dtype)
    assert result["seq_len"] == 20 + 16 + 4
    assert result["positions"] == 3 * 40
    assert result["tokens_per_s"] == pytest.approx(result["positions"] / result["step_s"])
    share = result["step_flops"] / result["step_s"] / result["matmul_flops_per_s"]
    assert result["matmul_share"] == pytest.approx(share)
    assert result["params"] > 0
    assert "peer" not in result


@PEER
def test_a_training_step_beside_the_peer(capsys) -> None:
    result = printed(train_step, capsys, "--batch", "2", "--text-len", "8", "--dtype", "fp32", "--peer")
    peer = result["peer"]
    assert result["tokens_ratio"] == pytest.approx(result["tokens_per_s"] / peer["tokens_per_s"])
    assert result["ratio"] == min(result["tokens_ratio"], result["samples_ratio"])
    assert peer["positions"] >= 2 * (8 + 16)
    assert peer["params"] > result["params"], "adaptive norms"


@PEER
def test_an_image(capsys) -> None:
    result = printed(sampling, capsys, "--nfe", "3", "--guidance", "3", "--prompt-len", "5", "--batch", "1", "--peer")
    assert result["s_per_image"] > 0
    assert result["ratio"] > 0


@PEER
def test_text(capsys) -> None:
    result = printed(text, capsys, "--prompt-len", "5", "--new-tokens", "9", "--peer")
    assert result["new_tokens"] == 9
    assert result["ratio"] == pytest.approx(result["tokens_per_s"] / result["peer"]["tokens_per_s"])


def test_a_patch_that_is_no_square_is_refused() -> None:
    with pytest.raises(ValueError, match="--patch-dim is 50"):
        sizes_of(parser(None, 1, "fp32", 1, 0).parse_args(["--patch-dim", "50"]))
