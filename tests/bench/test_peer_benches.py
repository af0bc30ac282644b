"""The speed benches at tiny sizes: what they print hangs together. Nothing here depends on how long it took."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tfusion.bench import llama, sampling, text, train_step
from tfusion.bench.flops import matmul_rate
from tfusion.bench.packed import as_samples, packed_batch
from tfusion.bench.setting import PRECISIONS, Sizes, in_turn, our_module, parser, sizes_of
from tfusion.bench.trace import part_of

TINY = {"dim": 32, "layers": 2, "heads": 2, "image-side": 2, "patch-dim": 12, "batch": 2, "rounds": 2, "warmup": 1}
FLAGS = [f"--{name}={value}" for name, value in TINY.items()]
needs_peer = pytest.mark.skipif(
    importlib.util.find_spec("transfusion_pytorch") is None, reason="transfusion-pytorch is not installed"
)


def printed(bench, capsys: pytest.CaptureFixture, *args: str) -> dict:
    """The JSON object, alone on the output."""
    capsys.readouterr()
    bench.main([*FLAGS, *args])
    [line] = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.fixture
def sizes() -> Sizes:
    return sizes_of(parser("", 2, "fp32", 2, 1).parse_args(FLAGS))


@pytest.mark.parametrize("dtype", list(PRECISIONS))
def test_training_step(dtype: str, capsys: pytest.CaptureFixture) -> None:
    result = printed(train_step, capsys, "--text-len", "5", "--dtype", dtype, "--eager")
    assert result["seq_len"] == 5 + 2 * 2 + 4  # text, patches, BOS, BOI, EOI, EOS
    assert result["positions"] == 2 * result["seq_len"]
    assert result["tokens_per_s"] == pytest.approx(result["positions"] / result["step_s"])
    assert result["samples_per_s"] == pytest.approx(2 / result["step_s"])
    share = result["step_flops"] / result["step_s"] / result["matmul_flops_per_s"]
    assert result["matmul_share"] == pytest.approx(share)
    assert result["fastest_step_s"] <= result["step_s"]
    assert "peer" not in result and "ratio" not in result
    assert result["dtype"] == dtype
    assert result["compiled"] is False
    assert (result["attention"], result["matmul_share_of_squares"]) == ("sdpa", result["matmul_share"])


def test_training_step_of_packed_rows(capsys: pytest.CaptureFixture) -> None:
    """Two images of 4 patches a row, half of its positions; or, of the same rows, one text and no adapters."""
    packed = printed(train_step, capsys, "--seq-len", "100", "--eager", "--checkpointing", "full")
    assert (packed["seq_len"], packed["positions"], packed["images_a_row"]) == (100, 200, 1)
    assert 0 < packed["attention_share"] < 0.5
    assert packed["checkpointing"] == "full"
    text = printed(train_step, capsys, "--seq-len", "100", "--eager", "--text-only")
    assert (text["seq_len"], text["positions"], text["images_a_row"]) == (100, 200, 0)
    assert text["params"] < packed["params"]
    with pytest.raises(SystemExit):
        train_step.main([*FLAGS, "--text-only"])
    assert "takes --seq-len" in capsys.readouterr().err


@pytest.mark.slow
def test_trace_of_a_compiled_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The parts of a step add up to it, and the file is a chrome trace of as many steps."""
    file = tmp_path / "trace.json"
    result = printed(train_step, capsys, "--text-len", "5", "--trace", str(file))
    assert result["compiled"] is True
    traced = result["trace"]
    assert list(traced["parts_s"]) == ["optimizer", "attention", "matmuls", "elementwise", "rest"]
    assert sum(traced["parts_s"].values()) == pytest.approx(traced["step_s"])
    assert sum(traced["shares"].values()) == pytest.approx(1)
    assert all(s > 0 for s in traced["parts_s"].values())
    names = [event["name"] for event in json.loads(file.read_text())["traceEvents"] if "dur" in event]
    assert names.count("Optimizer.step#AdamW.step") == traced["steps"], "no warm-up and no timed step is in it"
    assert any("cpp_fused" in name for name in names), "compiled kernels are seen"


def test_trace_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a file in a folder that exists"):
        train_step.main([*FLAGS, "--trace", str(tmp_path / "nowhere" / "trace.json")])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::mm", "matmuls"),
        ("aten::addmm", "matmuls"),
        ("sm90_xmma_gemm_bf16", "matmuls"),
        ("aten::bmm", "attention"),
        ("aten::baddbmm", "attention"),
        ("aten::_softmax", "attention"),
        ("aten::_log_softmax", "elementwise"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("graph_0_cpp_fused__softmax_add_3", "attention"),
        ("graph_0_cpp_fused__to_copy_view_0", "elementwise"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::linalg_vector_norm", "optimizer"),
        ("aten::embedding", "elementwise"),
        ("cunn_SoftMaxForward<4, float, LogSoftMaxForwardEpilogue>", "elementwise"),
        ("cunn_SoftMaxForward<4, float, SoftMaxForwardEpilogue>", "attention"),
        ("CompiledFunctionBackward", None),
    ],
)
def test_part_of(name: str, part: str | None) -> None:
    assert part_of(name) == part


def test_the_timed_step_trains(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up and timed rounds are optimizer steps of the real module, with its clipping."""
    modules = []
    monkeypatch.setattr(train_step, "our_module", lambda *a, **k: modules.append(our_module(*a, **k)) or modules[0])
    train_step.measure(sizes, train_step.Rows(5), with_peer=False)
    [module] = modules
    assert module.trainer.global_step == 3
    assert module.trainer.gradient_clip_val == 1.0
    assert module.grad_norm > 0
    fresh = our_module(sizes, 13)
    fresh.materialize("cpu")
    unchanged = [
        name
        for (name, trained), weight in zip(module.model.named_parameters(), fresh.model.parameters(), strict=True)
        if torch.equal(trained, weight)
    ]
    assert not unchanged


def test_the_peer_gets_what_is_in_packed_rows(sizes: Sizes) -> None:
    """Every text id and image of a row, in its order, and nothing else."""
    batch = packed_batch(2, 120, sizes.latent_shape, sizes.patch_size, images_a_row=2)
    samples = as_samples(batch)
    assert len(samples) == 2
    images = [part for row in samples for part in row if part.ndim == 3]
    assert torch.equal(torch.stack(images), batch.latents)
    for ids, of_image, row in zip(batch.token_ids, batch.image_ids, samples, strict=True):
        words = torch.cat([part for part in row if part.ndim == 1])
        assert (words + 5).tolist() == [
            i for i, image in zip(ids.tolist(), of_image, strict=True) if image < 0 and i > 4
        ]
        assert [part.ndim for part in row] == [1, 3, 1, 3, 1]


def test_both_sides_get_the_same_samples(sizes: Sizes) -> None:
    """Text ids moved up past the special ones, patches in raster order."""
    texts, patches = train_step.samples_of(sizes, 5)
    batch = train_step.our_batch(sizes, texts, patches)
    for words, image, sample in zip(texts, batch.latents, as_samples(batch), strict=True):
        assert torch.equal(sample[0], words) and torch.equal(sample[1], image) and len(sample) == 2
    assert (batch.token_ids[:, 1:6] - 5).tolist() == [text.tolist() for text in texts]
    encoder = our_module(sizes, batch.token_ids.shape[1]).model.materialize("cpu", 0).patch_encoder
    seen = []
    encoder.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder(batch.latents, batch.time_uniforms)
    assert torch.equal(seen[0], patches)


@pytest.mark.parametrize("dtype", list(PRECISIONS))
def test_sampling(dtype: str, capsys: pytest.CaptureFixture) -> None:
    result = printed(sampling, capsys, "--nfe", "3", "--guidance", "3", "--prompt-len", "4", "--dtype", dtype)
    assert result["nfe"] == 3, "network evaluations an image"
    assert 0 < result["fastest_s_per_image"] <= result["s_per_image"]
    assert (result["guidance"], result["prompt_len"], result["dtype"]) == (3, 4, dtype)
    assert result["evaluation_to_forward"] == pytest.approx(result["evaluation_s"] / result["forward_s"])
    assert result["matmul_share"] > 0
    assert not [name for name in result if name in ("peer", "dit") or "ratio" in name]


@pytest.mark.parametrize("dtype", list(PRECISIONS))
def test_text(dtype: str, capsys: pytest.CaptureFixture) -> None:
    result = printed(text, capsys, "--prompt-len", "4", "--new-tokens", "7", "--dtype", dtype)
    assert result["new_tokens"] == 7, "no sample ends before it must"
    assert 0 < result["tokens_per_s"] <= result["fastest_tokens_per_s"]
    assert result["ratio_to_one"] == pytest.approx(result["tokens_per_s"] / result["one"]["tokens_per_s"])
    assert result["matmul_flops_per_s"] > 0
    assert not [name for name in result if name in ("peer", "llama") or name.endswith(("_peer", "_llama"))]


@needs_peer
def test_training_step_beside_the_peer(capsys: pytest.CaptureFixture) -> None:
    result = printed(train_step, capsys, "--text-len", "5", "--peer", "--eager")
    peer = result["peer"]
    assert peer["seq_len"] > 5 + 4
    assert peer["positions"] == 2 * peer["seq_len"]
    assert result["tokens_ratio"] == pytest.approx(result["tokens_per_s"] / peer["tokens_per_s"])
    assert result["samples_ratio"] == pytest.approx(peer["step_s"] / result["step_s"])
    assert result["ratio"] == min(result["tokens_ratio"], result["samples_ratio"])
    assert peer["params"] > result["params"]


@needs_peer
def test_sampling_beside_the_peer(capsys: pytest.CaptureFixture) -> None:
    result = printed(sampling, capsys, "--nfe", "3", "--prompt-len", "4", "--batch", "1", "--peer")
    samplers = {name: result["peer"][name] for name in ("sample_one", "sample_one_cached", "sample_many")}
    for figures in samplers.values():
        assert figures["calls"] >= 2 * 3, "the conditional and the null network at each evaluation"
        assert figures["calls"] <= 2 * 3 + 2
    best = min(samplers, key=lambda name: samplers[name]["s_per_image"])
    assert result["peer"]["best"] == best
    assert result["ratio_to_peer"] == pytest.approx(samplers[best]["s_per_image"] / result["s_per_image"])
    assert result["dit"]["calls"] == result["nfe"] == 3, "both rows in one"
    assert result["ratio_to_dit"] == pytest.approx(result["dit"]["s_per_image"] / result["s_per_image"])
    ratio = result["dit"]["evaluation_s"] / result["evaluation_s"]
    assert result["evaluation_ratio_to_dit"] == pytest.approx(ratio)


@needs_peer
def test_text_beside_the_peers(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "COMPILER", "eager")  # traced, but no code made of it: that takes a minute
    result = printed(text, capsys, "--prompt-len", "4", "--new-tokens", "7", "--peer")
    assert result["peer"]["calls"] == result["new_tokens"] == 7
    assert result["ratio_to_peer"] == pytest.approx(result["tokens_per_s"] / result["peer"]["tokens_per_s"])
    ways = {name: result["llama"][name] for name in ("eager", "compiled")}
    assert [figures["calls"] for figures in ways.values()] == [7, 7]
    assert result["llama"]["best"] == max(ways, key=lambda name: ways[name]["tokens_per_s"])
    fastest = max(figures["tokens_per_s"] for figures in ways.values())
    assert result["ratio_to_llama"] == pytest.approx(result["tokens_per_s"] / fastest)


def test_calls_are_timed_in_turn_after_the_warm_up() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = in_turn(calls, rounds=2, warmup=1)
    assert order == list("ababab")
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}


def test_matmul_rate_is_positive() -> None:
    assert matmul_rate(torch.float32, size=16, repeats=2) > 0


def test_a_patch_that_is_no_square_of_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--patch-dim is 50, expected 3 k k"):
        sizes_of(parser("", 1, "fp32", 1, 1).parse_args(["--patch-dim", "50"]))
