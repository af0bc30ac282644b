"""Decoding of Chameleon: cached = uncached, a row of a batch = the row alone, ids where they belong, guidance."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image as PILImage

from tests.reference.chameleon import logits_after, naive_generate
from tests.reference.ids import BlockIds
from tests.test_generation import Biased, runs_of_ids, same
from tfusion.generation import Generator
from tfusion.models.chameleon import Chameleon
from tfusion.requests import GenerationConfig, Request
from tfusion.sequence import BOI_ID, EOI_ID, EOS_ID, NUM_SPECIAL_IDS
from tfusion.tokenizers import PixelTokenizer, TextTokenizer

SETTINGS = GenerationConfig(guidance_scale=2.0, temperature=1.0, max_new_tokens=12, max_new_images=2)
RED = PILImage.new("RGB", (8, 8), (250, 10, 30))
V = 261


class Recorder(BlockIds):
    """Remembers the codes that it was asked to decode."""

    def __init__(self):
        super().__init__(4, 3)
        self.seen = []

    def decode(self, latents):
        self.seen += [tuple(codes) for codes in latents.flatten(1).long().tolist()]
        return super().decode(latents)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer.train([], V, cache_dir=tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=["stable", "plain"])
def model(request):
    parts = {} if request.param == "stable" else {"qk_norm": False, "norm_order": "pre"}
    made = Chameleon(V, 27, (1, 2, 2), 32, 2, 4, num_kv_heads=2, max_seq_len=96, **parts)
    made.materialize("cpu", 0).double().fill_buffers()
    draws = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
    made.head = Biased(made.head)
    return made


def requests():
    still = dataclasses.replace(SETTINGS, guidance_scale=1.0, image_temperature=0.0)
    greedy = dataclasses.replace(SETTINGS, temperature=0.0, image_temperature=0.0, max_new_tokens=5)
    narrow = dataclasses.replace(
        SETTINGS, top_k=20, top_p=0.7, temperature=0.8, image_top_k=9, image_top_p=0.8, image_temperature=1.3
    )
    return [
        Request(("red heart",), "image", 1, 3, SETTINGS),
        Request((RED,), "text", 2, 1, narrow),
        Request(("hello", RED, "then"), "any", 3, 2, SETTINGS),
        Request(("x",), "image", 1, 0, still),
        Request((), "any", 2, 5, narrow),
        Request(("a", RED), "image", 2, 7, narrow),
        Request(("a longer prompt than the others",), "text", 1, 0, greedy),
        Request(("a prompt",), "image", 1, 0, greedy),
    ]


def unguided():
    """No null rows and all rows of text at the start: they are decoded in the cache itself, not in a copy."""
    config = dataclasses.replace(SETTINGS, guidance_scale=1.0)
    return [Request((), "any", 6, 0, config), Request(("ab",), "any", 3, 1, config)]


@pytest.mark.parametrize("requests", [requests, unguided])
def test_cached_and_batched_equals_uncached_and_alone(model, tokenizer, requests):
    """The same ids, greedy and drawn, with and without guidance."""
    recorder = Recorder()
    decoder = Generator(model, None, tokenizer, recorder)
    asked, codes = requests(), []
    for generation in decoder.generate(asked):
        request = asked[generation.request]
        wanted = naive_generate(model, decoder._prompts([request])[0], request, generation.sample)
        text = "".join(s for s in generation.segments if isinstance(s, str))
        assert text == "".join(tokenizer.decode(list(run)) for run in runs_of_ids(wanted))
        pictures = [s for s in generation.segments if not isinstance(s, str)]
        images = [item for item in wanted if isinstance(item, tuple)]
        codes += images
        for picture, image in zip(pictures, images, strict=True):
            latents = torch.tensor(image).float().view(1, 1, 2, 2)
            pixels = ((BlockIds(4, 3).decode(latents)[0] + 1) * 127.5).round().to(torch.uint8)
            assert picture.tobytes() == pixels.permute(1, 2, 0).numpy().tobytes()
    assert sorted(codes) == sorted(recorder.seen)
    assert len(codes) >= 7, "the requests of kind any met no image: the test shows nothing"
    assert len(set(codes)) > 4


def test_a_row_of_a_batch_equals_the_row_alone(model, tokenizer):
    decoder = Generator(model, None, tokenizer, BlockIds(4, 3))
    together = decoder.generate(requests())
    alone = [g for number, request in enumerate(requests()) for g in decoder.generate([request], [number])]
    for a, b in zip(together, alone, strict=True):
        assert (a.request, a.sample) == (b.request, b.sample)
        same(a.segments, b.segments)


def test_samples_of_a_request_differ_and_repeat(model, tokenizer):
    decoder = Generator(model, None, tokenizer, BlockIds(4, 3))
    request = Request(("red",), "image", 3, 0, SETTINGS)
    first, again = decoder.generate([request]), decoder.generate([request])
    pictures = [g.segments[0].tobytes() for g in first]
    assert len(set(pictures)) == 3
    assert pictures == [g.segments[0].tobytes() for g in again]


def test_guidance_one_is_one_row_and_equals_its_formula_beside_it(model, tokenizer):
    """And a strong one acts: greedy ids are those of null + s (conditional - null)."""
    rows, seen = [], {}
    make_cache = model.make_cache
    model.make_cache = lambda num_rows, capacity: rows.append(num_rows) or make_cache(num_rows, capacity)
    try:
        for scale in (1.0, 1.0 + 1e-9, 30.0):
            recorder = Recorder()
            config = dataclasses.replace(SETTINGS, guidance_scale=scale, image_temperature=0.0)
            Generator(model, None, tokenizer, recorder).generate([Request(("red",), "image", 1, 0, config)])
            [seen[scale]] = recorder.seen
    finally:
        del model.make_cache
    assert rows == [1, 2, 2]
    assert seen[1.0] == seen[1.0 + 1e-9]
    assert seen[30.0] != seen[1.0]


class Wants(torch.nn.Module):
    """A head that wants one id above all."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted = wanted

    def forward(self, x):
        logits = torch.zeros(*x.shape[:-1], V + 27, dtype=x.dtype)
        logits[..., self.wanted] = 100.0
        return logits


@pytest.mark.parametrize("wanted", [65, EOI_ID, EOS_ID, BOI_ID, V + 3, V + 26])
def test_an_image_id_is_never_in_text_and_no_other_in_an_image(model, tokenizer, wanted):
    """Even where the head wants nothing else."""
    recorder, head = Recorder(), model.head
    model.head = Wants(wanted)
    config = dataclasses.replace(SETTINGS, max_new_tokens=4, image_temperature=1.0)
    try:
        written, made = Generator(model, None, tokenizer, recorder).generate(
            [Request(("a",), "text", 1, 0, config), Request(("a",), "image", 1, 0, config)]
        )
    finally:
        model.head = head
    text = tokenizer.encode(written.segments[0])
    assert text == [wanted] * 4 if NUM_SPECIAL_IDS <= wanted < V else len(text) <= 12  # U+FFFD is 3 bytes
    assert recorder.seen[0] == (wanted - V,) * 4 if wanted >= V else all(0 <= code < 27 for code in recorder.seen[0])
    assert made.segments[0].size == (8, 8)


def test_a_given_picture_is_its_ids(model, tokenizer):
    """Between BOI and EOI, at V + code."""
    decoder = Generator(model, None, tokenizer, BlockIds(4, 3))
    prompt = decoder._prompts([Request(("a", RED), "text", 1, 0, SETTINGS)])[0]
    code = (2 * 3 + 0) * 3 + 0  # red of two, neither green nor blue
    assert prompt[2:] == [BOI_ID, *[V + code] * 4, EOI_ID]
    assert len(logits_after(model, prompt)) == V + 27


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "ddim"}, "got sampler 'ddim', which denoises"),
        ({"guidance_interval": (0.1, 0.7)}, "got guidance_interval .0.1, 0.7.*without noise"),
    ],
)
def test_what_ids_do_not_know_is_refused(model, tokenizer, change, message):
    decoder = Generator(model, None, tokenizer, BlockIds(4, 3))
    with pytest.raises(ValueError, match=message):
        decoder.generate([Request(("a",), "image", 1, 0, dataclasses.replace(SETTINGS, **change))])


def test_without_image_tokenizer_there_are_no_pictures(model, tokenizer):
    decoder = Generator(model, None, tokenizer, PixelTokenizer())
    assert decoder.generate([Request(("a",), "text", 1, 0, SETTINGS)])
    with pytest.raises(ValueError, match="request 0 has to do with images, but the module has no image_tokenizer"):
        decoder.generate([Request(("a",), "image", 1, 0, SETTINGS)])


def test_a_full_context_ends_the_row(model, tokenizer):
    recorder = Recorder()
    decoder = Generator(model, None, tokenizer, recorder)
    config = dataclasses.replace(SETTINGS, max_new_tokens=500, max_new_images=50)
    for generation in decoder.generate([Request(("a" * 60,), "any", 3, 1, config)]):
        assert sum(6 for s in generation.segments if not isinstance(s, str)) <= 96 - 61
    with pytest.raises(ValueError, match=r"max_seq_len is 96: shorten the prompt"):
        decoder.generate([Request(("a" * 92,), "image", 1, 0, SETTINGS)])
