"""The peers from `transformers` and `diffusers`: the size they claim, and the evaluations that are counted."""

from __future__ import annotations

import pytest
import torch

from tfusion.bench import evaluations, llama, sampling
from tfusion.bench.dit import Dit
from tfusion.bench.evaluations import Evaluations
from tfusion.bench.llama import Llama
from tfusion.bench.setting import Sizes, parameters_of, parser, prompts_of, ready_to_generate, sizes_of

D, L, P, PATCH_DIM, V, F = 32, 2, 4, 12, 256 + 5, 128  # F: 8/3 D, up to a multiple of 64
FLAGS = [f"--dim={D}", f"--layers={L}", "--heads=2", "--image-side=2", f"--patch-dim={PATCH_DIM}", "--batch=2"]


@pytest.fixture(params=["fp32", "bf16"])
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return sizes_of(parser("", 2, "fp32", 2, 1).parse_args([*FLAGS, f"--dtype={request.param}"]))


def test_llama_is_our_model_without_its_patches(sizes: Sizes) -> None:
    peer = Llama(sizes, 12)
    block = 4 * D * D + 3 * D * F + 2 * D  # attention, feed-forward, two norms
    assert peer.about["params"] == L * block + D + 2 * V * D
    ours = our_model(sizes)
    adapters = parameters_of(ours.patch_encoder) + parameters_of(ours.patch_decoder)
    assert peer.about["params"] == parameters_of(ours) - adapters
    assert {str(p.dtype) for p in peer.model.parameters()} == {
        "torch.float32" if sizes.dtype == "fp32" else "torch.bfloat16"
    }


def our_model(sizes: Sizes):
    return ready_to_generate(sizes, 12, sampling.GenerationConfig()).model


def test_both_ways_of_llama_write_greedily(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many forwards as new tokens, over one position each behind the prompt's; what they write is the likeliest."""
    monkeypatch.setattr(llama, "COMPILER", "eager")
    peer, (_, prompts) = Llama(sizes, 12), prompts_of(2, 4)
    widths: list[int] = []
    hook = peer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    writers = peer.writers(prompts, 7)
    written = writers["eager"]()
    hook.remove()
    assert widths == [5] + 6 * [1], "BOS and the prompt, then token after token"
    assert torch.equal(written, writers["compiled"]())
    assert peer.calls == {"eager": 7, "compiled": 7}
    assert written.shape == (2, 1 + 4 + 7)
    assert torch.equal(written[:, :5], torch.cat([torch.ones(2, 1, dtype=torch.long), prompts + 5], 1))
    if sizes.dtype == "fp32":  # in bf16 two tokens may be equally likely
        for at in range(5, 12):
            with torch.no_grad():
                logits = peer.model(written[:, :at], use_cache=False).logits[:, -1]
            assert torch.equal(written[:, at], logits.argmax(-1))


def test_only_one_way_of_llama_is_compiled(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, for the forward of one token, and not again in a second call."""
    compiled: list[torch.Size] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **options):
        compiled.append(next(i.shape for i in inputs if i.dtype == torch.long and i.ndim == 2))
        return graph.forward

    monkeypatch.setattr(llama, "COMPILER", backend)
    writers = Llama(sizes, 12).writers(prompts_of(2, 4)[1], 7)
    writers["eager"]()
    assert not compiled
    writers["compiled"]()
    writers["compiled"]()
    assert compiled == [(2, 1)]


def test_dit_has_the_size_it_claims(sizes: Sizes) -> None:
    attention, norm = 4 * (D * D + D), 6 * (D * D + D)
    conditioning = (256 * D + D) + (D * D + D) + 1001 * D  # each block embeds the timestep and the class
    feed_forward = (4 * D * D + 4 * D) + (4 * D * D + D)
    ends = (PATCH_DIM * D + D) + 2 * (D * D + D) + (D * PATCH_DIM + PATCH_DIM)
    assert Dit(sizes).about["params"] == L * (attention + norm + conditioning + feed_forward) + ends


@pytest.mark.parametrize(("guidance", "rows"), [(3.0, 4), (1.0, 2)])
def test_dit_evaluates_both_rows_together(sizes: Sizes, guidance: float, rows: int) -> None:
    peer = Dit(sizes)
    shapes: list[tuple[int, ...]] = []
    peer.model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    pictures = peer.sampler(5, guidance)()
    assert shapes == 5 * [(rows, 3, 4, 4)]
    assert [picture.size for picture in pictures] == 2 * [(4, 4)]


@pytest.mark.parametrize(("guidance", "rows"), [(3.0, 4), (1.0, 2)])
def test_the_plain_forward_is_of_the_evaluations_positions(
    sizes: Sizes, guidance: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same rows and patches as each evaluation over the cache, but no cache; and as many of them."""
    seen: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}

    def prepared(*args):
        module = ready_to_generate(*args)
        module.model.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: seen["cache" in kwargs].append(tuple(args[0].shape)), with_kwargs=True
        )
        return module

    monkeypatch.setattr(sampling, "ready_to_generate", prepared)
    sampling.measure(sizes, 3, guidance, 6, with_peer=False)
    evaluated = [shape for shape in seen[True] if shape[1] == P]
    assert evaluated == seen[False] == 3 * 3 * [(rows, P, D)], "3 calls of 3 evaluations"


def test_an_evaluation_lasts_until_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two calls, the first a warm-up: 1 and 5 between three evaluations, and nothing before or behind them."""
    clock = iter([0.0, 100.0, 200.0, 10.0, 11.0, 16.0])
    monkeypatch.setattr(evaluations, "_mark", lambda: next(clock))
    network = torch.nn.Identity()
    watched = Evaluations()
    network.register_forward_pre_hook(watched.mark)
    call = watched.watch("ours", lambda: [network(torch.zeros(1)) for _ in range(3)])
    call(), call()
    assert watched.counts == {"ours": 3}
    assert watched.seconds("ours", warmup=1) == 3.0


def test_one_evaluation_is_refused(sizes: Sizes) -> None:
    with pytest.raises(ValueError, match="got --nfe 1, expected at least 2"):
        sampling.measure(sizes, 1, 3.0, 4, with_peer=False)
