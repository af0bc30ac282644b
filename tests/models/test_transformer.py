"""The trunk equals transformers' Llama and Qwen 3, and every weight starts from (seed, name) alone."""

from __future__ import annotations

import math

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from tfusion.bench.live_bytes import Live
from tfusion.models.attention import training_mask
from tfusion.models.transformer import Checkpointing, NormOrder, Rotary, Transformer, default_hidden_dim, rotate
from tfusion.models.transfusion import Transfusion
from tfusion.randomness import generator, seed_from


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def causal(T: int) -> Tensor:
    return torch.ones(1, 1, T, T, dtype=torch.bool).tril()


def like(theirs: torch.nn.Module, **options) -> Transformer:
    """Our trunk with the weights of theirs."""
    config = theirs.config
    ours = Transformer(
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        max_seq_len=config.max_position_embeddings,
        rope_theta=config.rope_parameters["rope_theta"],
        norm_eps=config.rms_norm_eps,
        **options,
    )
    weights = {"norm.weight": theirs.norm.weight}
    for n, layer in enumerate(theirs.layers):
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        weights |= {
            f"blocks.{n}.attention_norm.weight": layer.input_layernorm.weight,
            f"blocks.{n}.attention.qkv_proj.weight": torch.cat(qkv),
            f"blocks.{n}.attention.o_proj.weight": attention.o_proj.weight,
            f"blocks.{n}.feed_forward_norm.weight": layer.post_attention_layernorm.weight,
            f"blocks.{n}.feed_forward.gate_up_proj.weight": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            f"blocks.{n}.feed_forward.down_proj.weight": mlp.down_proj.weight,
        }
        if options.get("qk_norm"):
            weights[f"blocks.{n}.attention.q_norm.weight"] = attention.q_norm.weight
            weights[f"blocks.{n}.attention.k_norm.weight"] = attention.k_norm.weight
    ours.load_state_dict(weights)  # strict: every name, and no other
    ours.rotary.fill_buffers()
    return ours


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_transformers(qk_norm: bool, kv_heads: int) -> None:
    """Llama, and Qwen 3 for QK-norm: hidden states and gradients, for any weights and positions."""
    config_class, model_class = (Qwen3Config, Qwen3Model) if qk_norm else (LlamaConfig, LlamaModel)
    config = config_class(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    theirs = model_class(config)
    for i, parameter in enumerate(theirs.parameters()):
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5
        parameter.data = normal(*parameter.shape, seed=i) * scale + (parameter.ndim == 1)
    ours = like(theirs, qk_norm=qk_norm)

    x, position_ids = normal(2, 12, 64, seed=99), torch.stack([torch.arange(12), torch.arange(3, 27, 2)])
    mask = causal(12).expand(2, -1, -1, -1)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    a = ours(x, position_ids, mask)
    b = theirs(inputs_embeds=x, position_ids=position_ids, attention_mask=additive).last_hidden_state
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    upstream = normal(*a.shape, seed=98)
    (a * upstream).sum().backward()
    (b * upstream).sum().backward()
    ours_gradients = dict(ours.named_parameters())
    for name, parameter in like_gradients(theirs, qk_norm).items():
        gradient = ours_gradients[name].grad
        torch.testing.assert_close(gradient, parameter, rtol=1e-4, atol=1e-5 * parameter.abs().max().item())


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_activation_checkpointing_changes_nothing_but_runs_each_block_twice(norm_order: NormOrder) -> None:
    def run(checkpointing: Checkpointing) -> tuple[list[Tensor], int]:
        options = {"activation_checkpointing": checkpointing, "norm_order": norm_order, "qk_norm": True}
        trunk = Transformer(32, 2, 2, max_seq_len=16, **options).to_empty(device="cpu")
        for i, parameter in enumerate(trunk.parameters()):
            parameter.data = normal(*parameter.shape, seed=i) * 0.1
        trunk.rotary.fill_buffers()
        calls = []
        trunk.blocks[0].attention.register_forward_hook(lambda *_: calls.append(None))
        x, position_ids = normal(2, 16, 32, seed=99).requires_grad_(), torch.arange(16).expand(2, -1)
        out = trunk(x, position_ids, causal(16).expand(2, -1, -1, -1))
        out.square().sum().backward()
        with torch.no_grad():
            trunk(x, position_ids)
        trunk.eval()(x, position_ids)
        return [out, x.grad, *(parameter.grad for parameter in trunk.parameters())], len(calls)

    kept, calls = run("none")
    assert calls == 3
    for checkpointing in ("selective", "full"):
        recomputed, calls = run(checkpointing)
        assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
        assert calls == 4
    assert (run(False)[1], run(True)[1]) == (3, 4)  # as they were said before there was a third way


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_kept_for_the_backward_pass(bf16: bool) -> None:
    """Bytes a position that one more block takes: all of it; 4 products, attention and the input; the input."""
    B, T, D, hidden = 2, 64, 32, 128
    held, size = {}, 2 if bf16 else 4
    for checkpointing in ("none", "selective", "full"):
        for layers in (1, 2):
            with Live() as live:
                trunk = Transformer(D, layers, 2, max_seq_len=T, activation_checkpointing=checkpointing)
                trunk.rotary.fill_buffers()
                x, mask = torch.zeros(B, T, D, requires_grad=True), torch.zeros(1, 1, T, T)
                before = live.start()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    out = trunk(x, torch.arange(T).expand(B, -1), mask)
                held[checkpointing, layers] = live.alive() - before
            del out
    a_block = {name: (held[name, 2] - held[name, 1]) / (B * T) for name in ("none", "selective", "full")}
    outputs = 3 * D + D + 2 * hidden + D + D  # of qkv, attention, gate and up, o and down
    statistics = 0 if bf16 else 2 * 4  # a head's log-sum-exp, where SDPA gives it; scores written out are not kept
    assert a_block["full"] == 4 * D
    assert a_block["selective"] == 4 * D + size * outputs + statistics
    assert a_block["none"] > 1.5 * a_block["selective"]


def like_gradients(theirs: torch.nn.Module, qk_norm: bool) -> dict[str, Tensor]:
    """Their gradients under our names: the weights of `like`, made of gradients."""
    for parameter in theirs.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return dict(like(theirs, qk_norm=qk_norm).state_dict())


def test_rotation_is_complex_multiplication() -> None:
    """Pair (i, i + K/2) is a complex number, turned by position x theta^(-2i/K) (RoFormer eq. 34)."""
    rotary = Rotary(8, 32, 100.0).double()
    rotary.fill_buffers()
    x, position_ids = (
        normal(2, 3, 5, 8, dtype=torch.float64),
        torch.tensor([[0, 1, 2, 3, 4], [31, 0, 7, 7, 9]]),
    )
    out = rotate(x, rotary(position_ids))
    for b in range(2):
        for t in range(5):
            for i in range(4):
                angle = int(position_ids[b, t]) * 100.0 ** (-2 * i / 8)
                for head in range(3):
                    turned = complex(x[b, head, t, i], x[b, head, t, i + 4]) * complex(math.cos(angle), math.sin(angle))
                    ours = complex(out[b, head, t, i], out[b, head, t, i + 4])
                    assert abs(ours - turned) < 1e-12


def double_trunk(**options) -> Transformer:
    trunk = Transformer(32, 3, 4, 2, max_seq_len=64, **options).double().requires_grad_(False)
    for i, parameter in enumerate(trunk.parameters()):
        if parameter.ndim == 2:
            parameter.copy_(normal(*parameter.shape, seed=i, dtype=torch.float64) * 2 / parameter.shape[1] ** 0.5)
    trunk.rotary.fill_buffers()
    return trunk


@pytest.mark.parametrize("qk_norm", [False, True])
def test_only_relative_positions_matter(qk_norm: bool) -> None:
    trunk, x, positions = (
        double_trunk(qk_norm=qk_norm),
        normal(1, 9, 32, dtype=torch.float64),
        torch.arange(9)[None],
    )
    out = trunk(x, positions, causal(9))
    torch.testing.assert_close(trunk(x, positions + 50, causal(9)), out, rtol=1e-10, atol=1e-10)
    assert (trunk(x, 2 * positions, causal(9)) - out).abs().max() > 1e-3  # they do matter


def test_positions_restart_so_documents_packed_equal_each_alone() -> None:
    trunk, x = double_trunk(), normal(1, 9, 32, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    mask = training_mask(documents, torch.full_like(documents, -1), torch.zeros_like(documents, dtype=torch.bool))
    packed = trunk(x, positions, mask)
    alone = [trunk(x[:, a:b], positions[:, a:b], causal(b - a)) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("dim", "hidden"),
    [(64, 192), (256, 704), (768, 2048), (1024, 2816), (1536, 4096), (2048, 5632), (4096, 11008)],
)
def test_feed_forward_width_is_llamas(dim: int, hidden: int) -> None:
    assert default_hidden_dim(dim) == hidden


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 36, "num_heads": 4}, "dim 36 must be a multiple of 2 x num_heads = 8"),
        ({"dim": 30, "num_heads": 4}, "dim 30 must be a multiple"),
        ({"dim": 32, "num_heads": 4, "num_kv_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(num_layers=1, **sizes)


# Made on meta, filled once.

SEED = 3022468574623411596  # blake2b of "weights/7/text_head.weight", 8 bytes, little-endian, halved


def make(**changes) -> Transfusion:
    sizes = {
        "vocab_size": 50,
        "latent_shape": (2, 4, 4),
        "patch_size": 2,
        "dim": 64,
        "num_layers": 3,
        "num_heads": 4,
    }
    return Transfusion(**sizes | {"max_seq_len": 32, "qk_norm": True} | changes)


def test_made_on_meta_and_materialised_whole() -> None:
    model = make()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert tensors
    assert all(tensor.is_meta for _, tensor in tensors)
    assert {name for name, _ in model.named_buffers()} == {
        "patch_encoder.timestep.frequencies",
        "transformer.rotary.cos",
        "transformer.rotary.sin",
    }
    assert model.materialize("cpu", 0) is model
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert not tensor.is_meta, name
        assert tensor.isfinite().all(), name
        assert tensor.dtype == torch.float32, name
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}  # tables are in no checkpoint


def test_tables_are_right_after_materialising() -> None:
    model = make().materialize("cpu", 0)
    for buffer in model.buffers():
        buffer.fill_(float("nan"))  # as rubbish as `to_empty` leaves them
    model.fill_buffers()
    half, rotary = 8, model.transformer.rotary
    for t in (0, 1, 17, 31):
        angles = [t * 10_000 ** (-i / half) for i in range(half)]
        torch.testing.assert_close(rotary.cos[t], torch.tensor([math.cos(a) for a in angles]), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rotary.sin[t], torch.tensor([math.sin(a) for a in angles]), rtol=1e-6, atol=1e-6)
    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)])
    torch.testing.assert_close(model.patch_encoder.timestep.frequencies, frequencies, rtol=1e-6, atol=0)


def test_weights_depend_on_seed_and_name_alone() -> None:
    """Not on the order of construction, other parameters, what was there, or the global generator."""
    before = torch.get_rng_state()
    reference = make().materialize("cpu", 7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # nothing read or written
    others = [
        make().materialize("cpu", 3).materialize("cpu", 7),
        make(vocab_size=80, patch_size=1, qk_norm=False).materialize("cpu", 7),
    ]
    reordered = make()
    for name in ("embedding", "transformer"):  # the last made now comes first
        part = reordered._modules.pop(name)
        reordered._modules[name] = part
    others.append(reordered.materialize("cpu", 7))
    for other in others:
        shared = [name for name, w in other.state_dict().items() if w.shape == reference[name].shape]
        assert len(shared) > 15
        for name in shared:
            assert torch.equal(other.state_dict()[name], reference[name]), name
    drawn = {name: w for name, w in reference.items() if w.std() > 0}
    for name, other in make().materialize("cpu", 8).state_dict().items():
        assert name not in drawn or not torch.equal(other, drawn[name])
    same_shape = [w for name, w in drawn.items() if name.endswith("qkv_proj.weight")]
    assert not torch.equal(same_shape[0], same_shape[1])


def test_a_weight_is_what_its_name_and_seed_say() -> None:
    """Pinned: a change here changes every run and every recorded loss."""
    assert seed_from("weights", 7, "text_head.weight") == SEED
    weight = make().materialize("cpu", 7).text_head.weight
    expected = torch.randn(50, 64, generator=torch.Generator().manual_seed(SEED)) * 0.02
    assert torch.equal(weight, expected)
    assert torch.equal(
        generator("weights", 7, "text_head.weight").get_state(),
        torch.Generator().manual_seed(SEED).get_state(),
    )


def test_initial_statistics_are_those_of_the_table() -> None:
    """A row of `init_weights`' table a parameter; standard errors decide how near."""
    depth = 3
    model = make(vocab_size=500, dim=256).materialize("cpu", 0)
    counts = dict.fromkeys(("ones", "zeros", "residual", "patch", "other"), 0)
    for name, w in model.named_parameters():
        kind, std = "other", 0.02
        if name.endswith("norm.weight"):
            kind = "ones"
        elif name.endswith("bias") or name == "patch_decoder.proj.weight":
            kind = "zeros"
        elif name.endswith(("attention.o_proj.weight", "feed_forward.down_proj.weight")):
            kind, std = "residual", 0.02 / math.sqrt(2 * depth)
        elif name == "patch_encoder.proj.weight":
            kind = "patch"
        counts[kind] += 1
        if kind in ("ones", "zeros"):
            assert (w == (kind == "ones")).all(), name
            continue
        n = w.numel()
        assert abs(w.mean()) < 5 * std / math.sqrt(n), name
        assert abs(w.std() / std - 1) < 5 / math.sqrt(2 * n), name
        assert w.abs().max() < 6.5 * std, name
        assert abs((w / std).pow(4).mean() - 3) < 5 * math.sqrt(96 / n), name  # normal, not uniform
    # per layer 4 norms, 2 residual, 2 other; final norm; embedding, head, timestep's two
    assert counts == {
        "ones": 4 * depth + 1,
        "zeros": 5,
        "residual": 2 * depth,
        "patch": 1,
        "other": 2 * depth + 4,
    }


WAYS = [("false", "none"), ("true", "full"), ("none", "none"), ("selective", "selective"), ("full", "full")]


@pytest.mark.parametrize(("said", "meant"), WAYS)
def test_checkpointing_as_yaml_says_it(said: str, meant: str) -> None:
    """Runs of before there were three ways have false or true in their config.yaml."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(nn.Module, "model")
    text = "{class_path: tfusion.models.transformer.Transformer, init_args: {dim: 32, num_layers: 1, num_heads: 2, "
    config = parser.parse_string(f"model: {text}activation_checkpointing: {said}}}}}")
    assert parser.instantiate(config).model.activation_checkpointing == meant


def test_another_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="got activation_checkpointing 'some', expected 'none', 'selective' or 'full'"):
        Transformer(32, 1, 2, activation_checkpointing="some")
