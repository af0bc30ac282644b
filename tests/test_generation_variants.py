"""Decoding with every adapter and causal images equals the naive one; intervals of guidance; who encodes and decodes.

Models of text alone and of images alone generate what they predict, and refuse the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.reference.generation import naive_generate
from tests.test_generation import DDPM, FLOW, RED, SETTINGS, Biased, Recorder, requests, runs_of_ids, same
from tfusion.generation import Generator, bf16_copy
from tfusion.models.packed_linear import can_be_packed, packed
from tfusion.models.transfusion import Transfusion
from tfusion.requests import GenerationConfig, Request
from tfusion.samplers import Sampler
from tfusion.tokenizers import PixelTokenizer, TextTokenizer

UNET = {"adapter": "unet", "adapter_channels": 16}
VARIANTS = {
    "unet": UNET,
    "conv": {"adapter": "conv", "adapter_channels": 24, "patch_positions": True},
    "linear, causal": {"image_attention": "causal"},
    "unet, causal": UNET | {"image_attention": "causal"},
    "images alone": {"predict_text": False},
}
INTERVAL = (0.25, 0.6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.train([], 261, cache_dir=tmp_path_factory.mktemp("tokenizer"))


def make(**settings: Any) -> Transfusion:
    """In float64, away from the zero output of the first step."""
    model = Transfusion(261, (3, 8, 8), 4, 32, 2, 4, num_kv_heads=2, max_seq_len=96, **settings)
    model.materialize("cpu", 0).double().fill_buffers()
    draws = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
    if model.text_head is not None:
        model.text_head = Biased(model.text_head)
    return model


def asked(model: Transfusion) -> list[Request]:
    """Of all kinds, or of images alone; one with guidance in an interval."""
    narrow = dataclasses.replace(SETTINGS, guidance_interval=INTERVAL, num_inference_steps=6)
    wanted = [*requests(), Request(("in between",), "image", 1, 4, narrow)]
    return [request for request in wanted if model.text_head is not None or request.generate == "image"]


def check_naive(model: Transfusion, process: Any, tokenizer: TextTokenizer, wanted: list[Request]) -> int:
    """Every image equals the naive one, and the tokens; how many images there were."""
    recorder = Recorder()
    decoder = Generator(model, process, tokenizer, recorder)
    count = 0
    for generation in decoder.generate(wanted):
        request = wanted[generation.request]
        expected = naive_generate(model, process, decoder._prompts([request])[0], request, generation.sample)
        texts = [segment for segment in generation.segments if isinstance(segment, str)]
        assert texts == [tokenizer.decode(list(run)) for run in runs_of_ids(expected)]
        for latents in (item for item in expected if not isinstance(item, int)):
            assert any(torch.allclose(latents, seen, rtol=0, atol=1e-10) for seen in recorder.seen)
            count += 1
    assert count == len(recorder.seen)
    return count


@pytest.mark.parametrize("process", [FLOW, DDPM], ids=["flow", "ddpm"])
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_and_batched_equals_uncached_and_alone(name: str, process: Any, tokenizer: TextTokenizer) -> None:
    model = make(**VARIANTS[name])
    assert check_naive(model, process, tokenizer, asked(model)) >= (3 if model.text_head is None else 6)


@pytest.mark.parametrize("name", ["unet", "conv"])
def test_a_row_of_a_batch_equals_the_row_alone(name: str, tokenizer: TextTokenizer) -> None:
    model = make(**VARIANTS[name])
    decoder = Generator(model, FLOW, tokenizer, PixelTokenizer())
    alone = [g for number, request in enumerate(asked(model)) for g in decoder.generate([request], [number])]
    for a, b in zip(decoder.generate(asked(model)), alone, strict=True):
        same(a.segments, b.segments)


class Calls:
    """How many images or rows each call of a module had."""

    def __init__(self, module: torch.nn.Module, size: Callable[..., int]) -> None:
        self.sizes: list[int] = []
        module.register_forward_pre_hook(lambda _, args: self.sizes.append(size(args)))


@pytest.mark.parametrize("name", ["unet", "conv"])
def test_a_clean_image_runs_the_encoder_alone(name: str, tokenizer: TextTokenizer) -> None:
    """A prompt's image and one just generated are written without the decoder; text runs neither."""
    model = make(**VARIANTS[name])
    encoder, decoder = (Calls(part, lambda args: len(args[0])) for part in (model.patch_encoder, model.patch_decoder))
    generator = Generator(model, FLOW, tokenizer, PixelTokenizer())
    generator.generate([Request((RED, "and", RED), "text", 2, 0, SETTINGS)])
    assert (encoder.sizes, decoder.sizes) == ([4], [])
    encoder.sizes.clear()
    config = dataclasses.replace(SETTINGS, guidance_scale=1.0, num_inference_steps=3, max_new_images=1)
    found = generator.generate([Request((), "any", 6, 0, config)])
    images = sum(not isinstance(segment, str) for one in found for segment in one.segments)
    assert images
    assert sum(decoder.sizes) == 3 * images
    assert 3 * images < sum(encoder.sizes) <= 4 * images  # and once clean, where the row goes on


@pytest.mark.parametrize("process", [FLOW, DDPM], ids=["flow", "ddpm"])
def test_outside_of_the_interval_one_row_runs(process: Any, tokenizer: TextTokenizer) -> None:
    """And inside both; ends of the interval count; a batch runs both where any of its rows needs it."""
    model = make()
    rows = Calls(model.patch_decoder, lambda args: len(args[0]))
    decoder = Generator(model, process, tokenizer, PixelTokenizer())
    config = dataclasses.replace(SETTINGS, guidance_interval=INTERVAL, num_inference_steps=20)
    times = [t / process.num_train_timesteps for t in Sampler(process, None, 20).timesteps]
    wanted = [2 if INTERVAL[0] <= t <= INTERVAL[1] else 1 for t in times]
    assert 4 < sum(size == 2 for size in wanted) < 12
    decoder.generate([Request(("red",), "image", 1, 0, config)])
    assert rows.sizes == wanted
    rows.sizes.clear()
    decoder.generate([Request(("red",), "image", 1, 0, dataclasses.replace(config, guidance_interval=(0.0, 1.0)))])
    assert rows.sizes == [2] * 20
    rows.sizes.clear()
    everywhere = dataclasses.replace(config, guidance_scale=1.0)
    decoder.generate([Request(("red",), "image", 1, 0, config), Request(("blue",), "image", 1, 0, everywhere)])
    assert rows.sizes == [size + 1 for size in wanted]


def test_an_interval_that_holds_no_step_is_no_guidance(tokenizer: TextTokenizer) -> None:
    decoder = Generator(make(), FLOW, tokenizer, PixelTokenizer())
    config = dataclasses.replace(SETTINGS, guidance_interval=(0.0, 0.0))
    pictures = []
    for settings in (config, dataclasses.replace(SETTINGS, guidance_scale=1.0), SETTINGS):
        [found] = decoder.generate([Request(("red",), "image", 1, 0, settings)])
        pictures.append(found.segments[0].tobytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1), (0, 1.1), (0.5,), 0.5, (0, "1"), (False, 1)])
def test_an_interval_that_is_none_is_refused(interval: Any) -> None:
    with pytest.raises(ValueError, match=r"guidance_interval=.*two numbers with 0 <= low <= high <= 1"):
        GenerationConfig(guidance_interval=interval)


@pytest.mark.parametrize("name", ["unet", "conv"])
def test_bf16_and_packed_copies_generate(name: str, tokenizer: TextTokenizer) -> None:
    """A packed copy the same latents; one in bf16 runs and stays near."""
    model = Transfusion(261, (3, 8, 8), 4, 32, 2, 4, max_seq_len=96, **VARIANTS[name]).materialize("cpu", 0)
    draws = torch.Generator().manual_seed(1)
    weight = model.patch_decoder.proj.weight
    weight.data = 0.1 * torch.randn(weight.shape, generator=draws)
    config = GenerationConfig(num_inference_steps=4, guidance_scale=2.0)
    seen = []
    for copied in (model, packed(model) if can_be_packed(model) else model, bf16_copy(model)):
        recorder = Recorder()
        Generator(copied, FLOW, tokenizer, recorder).generate([Request((RED, "red"), "image", 1, 0, config)])
        seen += recorder.seen
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    assert seen[2].isfinite().all()
    assert 0 < (seen[2] - seen[0]).abs().max() < 0.1


def test_a_model_of_text_alone(tokenizer: TextTokenizer) -> None:
    """Text goes on as by the whole sequence again; whatever has to do with images is refused."""
    model = Transfusion(261, None, None, 32, 2, 4, max_seq_len=96).materialize("cpu", 0).double()
    model.fill_buffers()
    decoder = Generator(model, FLOW, tokenizer, PixelTokenizer())
    [found] = decoder.generate([Request(("hello",), "text", 1, 0, GenerationConfig(max_new_tokens=6))])
    ids = [1, *tokenizer.encode("hello")]
    for _ in range(6):
        x = model.embedding(torch.tensor([ids]))
        mask = torch.ones(len(ids), len(ids)).tril().bool()[None, None]
        logits = model.text_head(model.transformer(x, torch.arange(len(ids))[None], mask)[0, -1])
        logits[[0, 1, 3, 4] + [2] * (len(ids) == 1 + len(tokenizer.encode("hello")))] = float("-inf")
        ids.append(int(logits.argmax()))
        if ids[-1] == 2:
            break
    assert found.segments == (tokenizer.decode([i for i in ids[1 + len(tokenizer.encode("hello")) :] if i != 2]),)
    for request in (Request(("a",), "image"), Request(("a",), "any"), Request((RED,), "text")):
        with pytest.raises(ValueError, match="request 3 has to do with images, of which the model knows nothing"):
            decoder.generate([request], [3])


def test_a_model_of_images_alone_refuses_text(tokenizer: TextTokenizer) -> None:
    decoder = Generator(make(predict_text=False), FLOW, tokenizer, PixelTokenizer())
    for kind in ("text", "any"):
        with pytest.raises(ValueError, match=f"request 2 asks for '{kind}', but the model predicts no text"):
            decoder.generate([Request(("a",), kind)], [2])
