"""Decoding: cached = uncached, a row of a batch = the row alone, guidance, limits and refusals."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image as PILImage

from tests.reference.generation import choose, naive_generate
from tfusion.decoding import Decoding
from tfusion.diffusion import NoiseProcess
from tfusion.generation import Generator, bf16_copy
from tfusion.models.kv_cache import KVCache
from tfusion.models.transfusion import Transfusion
from tfusion.pictures import to_rgb
from tfusion.randomness import generator
from tfusion.requests import GenerationConfig, Request
from tfusion.sequence import BOI_ID, EOI_ID, EOS_ID
from tfusion.token_sampling import sample_tokens
from tfusion.tokenizers import PixelTokenizer, TextTokenizer

FLOW = NoiseProcess(FlowMatchEulerDiscreteScheduler(), "sample")
DDPM = NoiseProcess(DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False), "epsilon")
SETTINGS = GenerationConfig(
    num_inference_steps=5, guidance_scale=2.0, temperature=1.0, max_new_tokens=12, max_new_images=2
)
RED = PILImage.new("RGB", (8, 8), (250, 10, 30))


class Recorder(PixelTokenizer):
    """Pixels as they are; remembers the latents it was asked to decode."""

    def __init__(self):
        self.seen = []

    def decode(self, latents):
        self.seen += list(latents)
        return super().decode(latents)


class Biased(torch.nn.Module):
    """The text head with BOI and EOS made likely, so that short runs meet them."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        logits = self.head(x)
        bias = torch.zeros(logits.shape[-1], dtype=logits.dtype)
        bias[BOI_ID], bias[EOS_ID] = 4.0, 2.0
        return logits + bias


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer.train([], 261, cache_dir=tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model():
    torch_model = Transfusion(261, (3, 8, 8), 4, 32, 2, 4, num_kv_heads=2, max_seq_len=96)
    torch_model.materialize("cpu", 0).double().fill_buffers()
    draws = torch.Generator().manual_seed(0)
    for parameter in torch_model.parameters():  # away from the zero output of the first step
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
    torch_model.text_head = Biased(torch_model.text_head)
    torch_model.embedding.weight.requires_grad_(False)
    return torch_model


def requests():
    still = dataclasses.replace(SETTINGS, guidance_scale=1.0, num_inference_steps=4, sampler=None)
    greedy = dataclasses.replace(SETTINGS, temperature=0.0, max_new_tokens=5)
    narrow = dataclasses.replace(SETTINGS, top_k=20, top_p=0.7, temperature=0.8)
    half = dataclasses.replace(SETTINGS, guidance_interval=(0.3, 0.7), num_inference_steps=7)
    return [
        Request(("red heart",), "image", 1, 3, SETTINGS),
        Request((RED,), "text", 2, 1, narrow),
        Request(("hello", RED, "then"), "any", 3, 2, SETTINGS),
        Request(("x",), "image", 1, 0, still),
        Request((), "any", 2, 5, narrow),
        Request(("a longer prompt than the others",), "text", 1, 0, greedy),
        Request(("two", "of these"), "image", 2, 4, half),
    ]


def unguided():
    """No null rows and all rows of text at the start: they are decoded in the cache itself, not in a copy."""
    config = dataclasses.replace(SETTINGS, guidance_scale=1.0)
    return [Request((), "any", 6, 0, config), Request(("ab",), "any", 3, 1, config)]


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x == y if isinstance(x, str) else x.tobytes() == y.tobytes()


@pytest.mark.parametrize("requests", [requests, unguided])
@pytest.mark.parametrize("process", [FLOW, DDPM], ids=["flow", "ddpm"])
def test_cached_and_batched_equals_uncached_and_alone(model, tokenizer, process, requests):
    recorder = Recorder()
    decoder = Generator(model, process, tokenizer, recorder)
    num_images = 0
    asked = requests()
    for generation in decoder.generate(asked):
        request = asked[generation.request]
        wanted = naive_generate(model, process, decoder._prompts([request])[0], request, generation.sample)
        text = [i for i in wanted if isinstance(i, int)]
        assert "".join(s for s in generation.segments if isinstance(s, str)) == "".join(
            tokenizer.decode(list(run)) for run in runs_of_ids(wanted)
        ), text
        for latents in (i for i in wanted if not isinstance(i, int)):
            assert any(torch.allclose(latents, seen, rtol=0, atol=1e-10) for seen in recorder.seen)
            num_images += 1
    assert num_images == len(recorder.seen)
    assert num_images >= 6, "the requests of kind any met no image: the test shows nothing"


def runs_of_ids(items):
    run = []
    for item in items:
        if isinstance(item, int):
            run.append(item)
        elif run:
            yield run
            run = []
    if run:
        yield run


@pytest.mark.parametrize("process", [FLOW, DDPM], ids=["flow", "ddpm"])
def test_a_row_of_a_batch_equals_the_row_alone(model, tokenizer, process):
    decoder = Generator(model, process, tokenizer, PixelTokenizer())
    together = decoder.generate(requests())
    alone = [g for number, request in enumerate(requests()) for g in decoder.generate([request], [number])]
    for a, b in zip(together, alone, strict=True):
        assert (a.request, a.sample) == (b.request, b.sample)
        same(a.segments, b.segments)


def test_samples_of_a_request_differ_and_repeat(model, tokenizer):
    decoder = Generator(model, FLOW, tokenizer, PixelTokenizer())
    request = Request(("red",), "image", 3, 0, SETTINGS)
    first, again = decoder.generate([request]), decoder.generate([request])
    pictures = [g.segments[0].tobytes() for g in first]
    assert len(set(pictures)) == 3
    assert pictures == [g.segments[0].tobytes() for g in again]


def test_samples_are_decoded_so_many_together_however_few_the_requests(model, tokenizer, monkeypatch):
    decoder = Generator(model, FLOW, tokenizer, PixelTokenizer())
    requests = [Request(("red",), "image", 5, 0, SETTINGS), Request(("blue",), "any", 2, 0, SETTINGS)]
    whole, rows, make_cache = decoder.generate(requests), [], model.make_cache
    monkeypatch.setattr(model, "make_cache", lambda *sizes: rows.append(sizes[0]) or make_cache(*sizes), raising=False)
    parts = decoder.generate(requests, batch_size=3)
    guided = 2 if SETTINGS.guidance_scale != 1 else 1
    assert rows == [3 * guided, 3 * guided, 1 * guided]
    for a, b in zip(whole, parts, strict=True):
        assert (a.request, a.sample) == (b.request, b.sample)
        same(a.segments, b.segments)


def test_the_cache_is_no_larger_than_it_has_to_be_and_never_copied_for_nothing(model, tokenizer, monkeypatch):
    """A long prompt is within the limit; all rows at once, and none of them guided, are the cache itself."""
    capacities, copies = [], []
    make_cache, select = model.make_cache, KVCache.select
    monkeypatch.setattr(
        model, "make_cache", lambda *sizes: capacities.append(sizes[1]) or make_cache(*sizes), raising=False
    )
    monkeypatch.setattr(KVCache, "select", lambda cache, rows: copies.append(rows) or select(cache, rows))
    config = dataclasses.replace(SETTINGS, guidance_scale=1.0, max_new_tokens=10)
    decoder = Generator(model, FLOW, tokenizer, PixelTokenizer())
    decoder.generate([Request(("a" * 60,), "image", 2, 0, config)])
    decoder.generate([Request(("a" * 60,), "text", 1, 0, config)])
    half = dataclasses.replace(SETTINGS, guidance_scale=3.0, guidance_interval=(0.3, 0.7))  # also rows without null
    decoder.generate([Request(("a" * 60,), "image", 2, 0, half)])
    P = model.num_patches
    assert capacities == [61 + (P + 2) + 1, 61 + 10 + 1, 61 + (P + 2) + 1]
    assert copies == []


def test_guidance_one_is_off(model, tokenizer):
    """Scale 1 runs no null row, and equals what the formula gives just beside 1."""
    recorder = Recorder()
    decoder = Generator(model, FLOW, tokenizer, recorder)
    rows = []
    make_cache = model.make_cache
    model.make_cache = lambda num_rows, capacity: rows.append(num_rows) or make_cache(num_rows, capacity)
    try:
        for scale in (1.0, 1.0 + 1e-9, 3.0):
            config = dataclasses.replace(SETTINGS, guidance_scale=scale)
            decoder.generate([Request(("red",), "image", 1, 0, config)])
    finally:
        del model.make_cache
    off, beside, strong = recorder.seen
    assert rows == [1, 2, 2]
    torch.testing.assert_close(off, beside, rtol=0, atol=1e-6)
    assert (off - strong).abs().max() > 1e-3


def test_denoising_leaves_the_rows_as_they_were(model):
    cache = model.make_cache(2, 40)
    view = cache.view(torch.full((2, 7), -1), write=True)
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model.transformer(x, view.index, cache=view)
    cache.advance([7, 4])
    before = cache.keys.clone()
    beside = cache.view(torch.zeros(2, 4, dtype=torch.long), write=False)
    model.transformer(x[:, :4], beside.index, cache=beside)
    assert torch.equal(cache.keys[:, :, :, :7], before[:, :, :, :7])
    assert cache.row_lengths == cache.lengths.tolist() == [7, 4]


def test_text_requests_hold_text_and_never_markers(model, tokenizer):
    decoder = Generator(model, FLOW, tokenizer, PixelTokenizer())
    for seed in range(5):
        [generation] = decoder.generate([Request((RED,), "text", 1, seed, SETTINGS)])
        assert len(generation.segments) == 1
        assert isinstance(generation.segments[0], str)
        assert generation.segments[0]


def test_token_limit_and_image_limit(model, tokenizer):
    decoder = Generator(model, FLOW, tokenizer, PixelTokenizer())
    for n, images in ((1, 1), (7, 2)):
        config = dataclasses.replace(SETTINGS, max_new_tokens=n, max_new_images=images)
        for generation in decoder.generate([Request(("ab",), "any", 6, 0, config)]):
            pictures = [s for s in generation.segments if not isinstance(s, str)]
            assert len(pictures) <= images
            ids = sum(len(tokenizer.encode(s)) for s in generation.segments if isinstance(s, str) and "\ufffd" not in s)
            assert ids <= n


def test_a_full_context_ends_the_row(model, tokenizer):
    decoder = Generator(model, FLOW, tokenizer, PixelTokenizer())
    config = dataclasses.replace(SETTINGS, max_new_tokens=500, max_new_images=50)
    for generation in decoder.generate([Request(("a" * 60,), "any", 3, 1, config)]):
        used = sum(len(s) if isinstance(s, str) else model.num_patches + 2 for s in generation.segments)
        assert 0 < used <= 96 - 61


def test_an_image_that_ends_at_the_limit_is_the_end(model, tokenizer, monkeypatch):
    """One more token would stand where the model knows no position."""
    decoder = Generator(model, FLOW, tokenizer, PixelTokenizer())
    config = dataclasses.replace(SETTINGS, max_new_tokens=500, max_new_images=50)
    image = model.num_patches + 2
    ended = 0
    take = Decoding._take

    def take_images(self, row, token, length):  # as long as there is room
        return take(self, row, BOI_ID if length + image <= row.limit else token, length)

    monkeypatch.setattr(Decoding, "_take", take_images)
    for length in range(95 - 3 * image, 95):
        [generation] = decoder.generate([Request(("a" * length,), "any", 1, 0, config)])
        images = sum(not isinstance(s, str) for s in generation.segments)
        used = 1 + length + image * images + sum(len(s) for s in generation.segments if isinstance(s, str))
        ended += used == 96 and images > 0
        assert used <= 96
    assert ended


def test_settings_are_looked_at_once(model, tokenizer, monkeypatch):
    decoder, seen = Generator(model, FLOW, tokenizer, PixelTokenizer()), []
    monkeypatch.setattr(decoder.images, "check", seen.append)
    other = dataclasses.replace(SETTINGS, num_inference_steps=7)
    decoder.check([Request((str(n),), "image", 1, n, [SETTINGS, other][n % 2]) for n in range(20)])
    assert seen == [SETTINGS, other]


def test_pictures_are_seen_as_a_person_sees_them(model, tokenizer):
    """Also those of a `Request` from Python: transparent is white, and a turned one is turned back, once."""
    decoder = Generator(model, FLOW, tokenizer, PixelTokenizer())
    turned = PILImage.new("RGB", (8, 8), "black")
    turned.paste("white", (0, 0, 8, 4))  # at the top, as stored
    exif = turned.getexif()
    exif[0x0112] = 6
    stored = io.BytesIO()
    turned.save(stored, "PNG", exif=exif)
    clear, sideways = PILImage.new("RGBA", (8, 8), (0, 0, 0, 0)), PILImage.open(stored)
    for again in (lambda picture: picture, lambda picture: to_rgb(picture)[0]):
        white, half = decoder._latents([again(clear), again(sideways)])
        assert (white == 1).all()
        assert (half[:, :, 4:] == 1).all() and (half[:, :, :4] == -1).all(), "white is at the right"


def test_refusals(model, tokenizer):
    decoder = Generator(model, FLOW, tokenizer, PixelTokenizer())
    with pytest.raises(ValueError, match=r"request 4.*max_seq_len is 96: shorten the prompt"):
        decoder.generate([Request(("a" * 95,), "image", 1, 0, SETTINGS)], [4])
    with pytest.raises(ValueError, match="available: euler, dpmpp"):
        decoder.generate([Request(("a",), "image", 1, 0, dataclasses.replace(SETTINGS, sampler="ddpm"))])


@pytest.mark.parametrize("segment", [{"text": "a"}, {"image": "a.png"}, b"a", None])
def test_a_request_of_something_else_is_refused(segment):
    with pytest.raises(ValueError, match="a Request holds strings and PIL pictures; dictionaries and paths belong to"):
        Request(("a", segment), "text")


def test_pictures_of_any_size_are_encoded_together_each_in_its_place(model, tokenizer):
    calls = []

    class Counting(PixelTokenizer):
        def encode(self, images):
            calls.append(tuple(images.shape))
            return super().encode(images)

    decoder = Generator(model, FLOW, tokenizer, Counting())
    red, green, blue = (PILImage.new("RGBA", (31, 50 + n), tuple(255 * (n == c) for c in range(3))) for n in range(3))
    asked = [("a", red), ("b",), (blue, "c", green), (red,)]
    prompts = decoder._prompts([Request(segments, "text", 1, 0, SETTINGS) for segments in asked])
    assert calls == [(4, 3, 8, 8)]
    found = [[item for item in prompt if not isinstance(item, int)] for prompt in prompts]
    assert [[latents.amax((1, 2)).argmax().item() for latents in one] for one in found] == [[0], [], [2, 1], [0]]
    for latents in (latents for one in found for latents in one):
        assert latents.shape == (3, 8, 8)
        assert sorted(latents.mean((1, 2)).round().tolist()) == [-1, -1, 1]
    assert decoder._prompts([Request(("b",), "text", 1, 0, SETTINGS)]) == [prompts[1]]
    assert len(calls) == 1


def test_bf16_copy_keeps_tables_in_fp32():
    model = Transfusion(261, (3, 8, 8), 4, 32, 1, 4, max_seq_len=96).materialize("cpu", 0)
    copied = bf16_copy(model)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in copied.buffers()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.6), (5, 0.4), (1, 1.0)])
def test_token_sampling_against_a_loop(temperature, top_k, top_p):
    config = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.randn(64, 30, generator=torch.Generator().manual_seed(0)) * 2
    allowed = torch.rand(64, 30, generator=torch.Generator().manual_seed(1)) > 0.3
    uniforms = torch.stack([torch.rand((), generator=generator("u", r)) for r in range(64)])
    tokens = sample_tokens(
        logits.masked_fill(~allowed, float("-inf")),
        torch.full((64,), temperature),
        torch.full((64,), top_k or 30),
        torch.full((64,), top_p or 1.0),
        uniforms,
    )
    for r in range(64):
        assert tokens[r] == choose(logits[r], lambda i, r=r: bool(allowed[r, i]), config, generator("u", r))


def test_eoi_is_never_sampled(model, tokenizer):
    """Even where the head wants nothing else."""
    decoder = Generator(model, FLOW, tokenizer, PixelTokenizer())
    head = model.text_head
    wants_eoi = torch.nn.Linear(32, 261, bias=True).double()
    torch.nn.init.zeros_(wants_eoi.weight)
    with torch.no_grad():
        wants_eoi.bias.zero_()
        wants_eoi.bias[EOI_ID] = 100.0
    model.text_head = wants_eoi
    try:
        [generation] = decoder.generate([Request(("a",), "text", 1, 0, SETTINGS)])
    finally:
        model.text_head = head
    assert len(generation.segments) == 1
