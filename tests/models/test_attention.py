"""The mask equals a loop, and both backends equal an explicit softmax in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tests.reference.attention import loop_attention, loop_mask
from tfusion.models.attention import attend, backend_for, training_mask
from tfusion.models.compilers import has_compiler


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layout(row: str) -> tuple[Tensor, Tensor, Tensor]:
    """A row of words `document image hidden`, such as `01h`: a dot is no image, p is padding."""
    words = row.split()
    documents = torch.tensor([-1 if w[0] == "p" else int(w[0]) for w in words])
    images = torch.tensor([-1 if w[1] == "." else int(w[1]) for w in words])
    return documents[None], images[None], torch.tensor([w.endswith("h") for w in words])[None]


LAYOUTS = {
    "causal": "0. 0. 0. 0. 0.",
    "documents": "0. 0. 1. 2. 2. 2.",
    "padding": "0. 0. 0. p. p. p.",
    "all_padding": "p. p. p.",
    "image": "0. 00 00 00 0. 0.",
    "image_at_the_ends": "00 00 0. 01 01",
    "several_images": "0. 00 00 0. 01 01 01 0. 02 0.",
    "adjacent_images": "0. 00 00 01 01 0.",
    "images_in_documents": "0. 00 00 0. 1. 11 11 1. 1. 2. p. p.",
    "hidden_copy": "0. 00h 00h 00h 0. 01 01 01 0. 0.",
    "hidden_copies": "0. 00h 00h 0. 01 01 0. 02h 02h 0. 03 03 0. 1. 14h 14h 1. p.",
}


def random_layout(B: int, T: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of documents with images, some hidden, and padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    documents, images = torch.full((B, T), -1), torch.full((B, T), -1)
    hidden = torch.zeros(B, T, dtype=torch.bool)
    slot = 0
    for b in range(B):
        at, document = 0, 0
        end = T - draw(0, T // 4)
        while at < end:
            length = draw(1, T // 2)
            documents[b, at : min(at + length, end)] = document
            if length > 6:  # an image inside
                start, patches = at + 2, draw(1, length - 4)
                stop = min(start + patches, end)
                images[b, start:stop], hidden[b, start:stop] = slot, draw(0, 2) == 1
                slot += 1
            at, document = at + length, document + 1
    return documents, images, hidden


def dense(mask: BlockMask | Tensor, T: int) -> Tensor:
    """(B, T, T) bool of either backend's mask; a block mask is asked at every pair."""
    if isinstance(mask, Tensor):
        assert set(mask.unique().tolist()) <= {0.0, float("-inf")}
        return mask[:, 0] == 0
    index = torch.arange(T)
    return torch.stack(
        [mask.mask_mod(torch.tensor(b), torch.tensor(0), index[:, None], index[None]) for b in range(mask.shape[0])]
    )


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_mask_equals_the_loop(name: str, backend: str) -> None:
    ids = layout(LAYOUTS[name])
    assert torch.equal(dense(training_mask(*ids, backend), ids[0].shape[1]), loop_mask(*ids))


@pytest.mark.parametrize("seed", range(5))
def test_mask_equals_the_loop_on_random_rows(seed: int) -> None:
    ids = random_layout(3, 40, seed)
    assert ids[2].any() or seed  # the first has hidden keys
    mask = training_mask(*ids, "sdpa")
    assert mask.shape == (3, 1, 40, 40)
    assert torch.equal(dense(mask, 40), loop_mask(*ids))


def test_mask_examples_by_hand() -> None:
    """`BOS [BOI hidden hidden EOI] [clean clean] text`: read off the page, not computed."""
    ids = layout("0. 0. 00h 00h 0. 01 01 0.")
    expected = [
        "1.......",
        "11......",
        "1111....",
        "1111....",
        "11..1...",
        "11..111.",
        "11..111.",
        "11..1111",
    ]
    seen = dense(training_mask(*ids, "sdpa"), 8)
    assert ["".join(".1"[int(see)] for see in row) for row in seen[0]] == expected


def test_every_query_sees_a_key() -> None:
    """Else the softmax would be NaN; padding sees padding."""
    documents, images, _ = random_layout(3, 40, 1)
    mask = training_mask(documents, images, torch.zeros_like(documents, dtype=torch.bool), "sdpa")
    assert dense(mask, 40).any(-1).all()


def make_qkv(B: int, H: int, H_kv: int, T: int, K: int, device: str = "cpu") -> list[Tensor]:
    shapes = [(B, H, T, K), (B, H_kv, T, K), (B, H_kv, T, K)]
    return [normal(*shape, seed=i).to(device).requires_grad_() for i, shape in enumerate(shapes)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("kind", ["hidden_copies", "images_in_documents", "random"])
def test_sdpa_equals_the_loop_in_values_and_gradients(kind: str, heads: int, kv_heads: int) -> None:
    ids = random_layout(2, 18, 0) if kind == "random" else layout(LAYOUTS[kind])
    B, T = ids[0].shape
    qkv = make_qkv(B, heads, kv_heads, T, 8)
    ours = attend(*qkv, training_mask(*ids, "sdpa"))
    naive = loop_attention(*qkv, loop_mask(*ids))
    assert ours.shape == (B, heads, T, 8)
    close(ours, naive)
    upstream = normal(*ours.shape, seed=9)
    for a, b in zip(torch.autograd.grad(ours, qkv, upstream), torch.autograd.grad(naive, qkv, upstream), strict=True):
        close(a, b)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_sdpa_without_gradients(kv_heads: int) -> None:
    """Eager, under the package's block mask: on CPU flex has no backward. 160 is no whole block."""
    ids = random_layout(2, 160, 3)
    qkv = [x.detach() for x in make_qkv(2, 4, kv_heads, 160, 16)]
    block_mask = training_mask(*ids, "flex")
    assert isinstance(block_mask, BlockMask)
    close(
        flex_attention(*qkv, block_mask=block_mask, enable_gqa=kv_heads != 4),
        attend(*qkv, training_mask(*ids, "sdpa")),
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_bf16_training_on_cpu_writes_the_scores_out(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against SDPA in fp32 on the same bf16 numbers, values and gradients, and of one query; long rows
    and forwards without gradients use SDPA."""
    mask = training_mask(*random_layout(2, 60, 4), "sdpa")
    halves = [x.detach().bfloat16().requires_grad_() for x in make_qkv(2, 4, kv_heads, 60, 16)]
    floats = [x.detach().float().requires_grad_() for x in halves]
    expected = attend(*floats, mask)
    calls: list[None] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention", lambda *a, **k: calls.append(None) or sdpa(*a, **k)
    )
    ours = attend(*halves, mask)
    assert not calls
    upstream = normal(*expected.shape, seed=9)
    results = [ours, *torch.autograd.grad(ours, halves, upstream.bfloat16())]
    oracles = [expected, *torch.autograd.grad(expected, floats, upstream)]
    for a, b in zip(results, oracles, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2 * max(1.0, b.abs().max().item()))
    one = (halves[0][:, :, -1:], *halves[1:])
    torch.testing.assert_close(attend(*one, mask[:, :, -1:]).float(), expected[:, :, -1:], rtol=2e-2, atol=2e-2)
    assert not calls
    with torch.no_grad():
        attend(*(x.detach() for x in halves), mask)
    monkeypatch.setattr("tfusion.models.attention.EXPLICIT_UP_TO", 59)
    attend(*halves, mask)
    assert len(calls) == 2


def test_a_block_mask_is_given_to_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """`attend` chooses by the mask and passes it on, with grouped heads."""
    ids = random_layout(1, 130, 0)
    calls: list[dict] = []
    monkeypatch.setattr(
        "tfusion.models.attention._compiled_flex",
        lambda: lambda query, key, value, **kwargs: calls.append(kwargs) or query,
    )
    mask = training_mask(*ids, "flex")
    for kv_heads in (4, 2):
        attend(*make_qkv(1, 4, kv_heads, 130, 16), mask)
    assert calls == [
        {"block_mask": mask, "enable_gqa": False, "kernel_options": None},
        {"block_mask": mask, "enable_gqa": True, "kernel_options": None},
    ]


@pytest.mark.parametrize(
    ("width", "dtype", "length", "chosen"),
    [
        (64, "bfloat16", 130, True),
        (64, "float32", 130, False),
        (128, "bfloat16", 130, False),
        (64, "bfloat16", 127, False),
    ],
)
def test_tiles_of_flex_by_head_type_and_length(
    monkeypatch: pytest.MonkeyPatch, width: int, dtype: str, length: int, chosen: bool
) -> None:
    seen: list[dict] = []
    monkeypatch.setattr(
        "tfusion.models.attention._compiled_flex",
        lambda: lambda query, key, value, **kwargs: seen.append(kwargs["kernel_options"]) or query,
    )
    mask = training_mask(*random_layout(1, length, 0), "flex")
    attend(*(torch.zeros(1, 2, length, width, dtype=getattr(torch, dtype)) for _ in range(3)), mask)
    assert (seen[0] is not None) is chosen


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length", [96, 256, 700])
def test_a_block_mask_is_what_torch_makes_of_the_rule(length: int, seed: int) -> None:
    """Block by block, for queries and keys: which are left out, which are masked inside, which are seen whole."""
    mask = training_mask(*random_layout(2, length, seed), "flex")
    theirs = create_block_mask(mask.mask_mod, 2, None, length, length, device="cpu")
    assert (mask.shape, mask.seq_lengths, mask.BLOCK_SIZE) == (theirs.shape, theirs.seq_lengths, theirs.BLOCK_SIZE)
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices, of_theirs = (
            getattr(mask, f"{name}_num_blocks"),
            getattr(mask, f"{name}_indices"),
            getattr(theirs, f"{name}_indices"),
        )
        assert torch.equal(counts, getattr(theirs, f"{name}_num_blocks"))
        used = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(indices.where(used, -1), of_theirs.where(used, -1))


def test_flex_is_compiled_for_more_sizes_than_torch_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the limit it would be run as it is written, with all scores in memory."""
    monkeypatch.setattr("tfusion.models.attention.FLEX_CODES", 3)
    torch.compiler.reset()
    counters.clear()
    with torch.compiler.config.patch(recompile_limit=1):
        for length in (128, 256):
            qkv = [torch.randn(1, 2, length, 16) for _ in range(3)]
            attend(*qkv, training_mask(*random_layout(1, length, 0), "flex"))
    assert counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()


def test_flex_needs_a_compiler_on_cuda_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for cached in (backend_for, has_compiler):
        cached.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert backend_for("cuda") == "sdpa" and not has_compiler("cuda")
    assert "there is no no-such-compiler here, so nothing is compiled for cuda" in caplog.text
    for cached in (backend_for, has_compiler):
        cached.cache_clear()


def test_backend_by_device_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfusion.models.attention.has_compiler", lambda device_type: True)
    backend_for.cache_clear()
    caplog.set_level("INFO", "tfusion")
    assert [backend_for(device) for device in ("cuda", "cpu", "mps", "cpu", "cuda")] == [
        "flex",
        "sdpa",
        "sdpa",
        "sdpa",
        "flex",
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "attention backend on cuda: flex",
        "attention backend on cpu: sdpa",
        "attention backend on mps: sdpa",
    ]
    assert isinstance(training_mask(*layout(LAYOUTS["causal"])), Tensor)  # the CPU's own choice


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_equals_sdpa_with_gradients_on_cuda(
    kv_heads: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled kernel as training runs it, against SDPA on the CPU in fp32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    ids = random_layout(2, 320, 3)
    here = make_qkv(2, 4, kv_heads, 320, 64)
    there = [x.detach().to("cuda", dtype).requires_grad_() for x in here]
    mask = training_mask(*(x.cuda() for x in ids))
    assert isinstance(mask, BlockMask)
    ours, expected = attend(*there, mask), attend(*here, training_mask(*ids))
    upstream = normal(*expected.shape, seed=9)
    results = [ours, *torch.autograd.grad(ours, there, upstream.to("cuda", dtype))]
    oracles = [expected, *torch.autograd.grad(expected, here, upstream)]
    for a, b in zip(results, oracles, strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a.float().cpu(), b, rtol=tolerance, atol=tolerance * max(1.0, scale))
