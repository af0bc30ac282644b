"""Chameleon equals a naive forward; packing and empty slots change nothing; a block by hand; text as Transfusion."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tfusion import losses
from tfusion.models.chameleon import Chameleon
from tfusion.models.transformer import Block, Rotary
from tfusion.models.transfusion import Transfusion
from tfusion.sequence import BOI_ID, IGNORE_INDEX, Batch, Document, Image, RowShape, collate

LATENT, P, T, SLOTS, V, K = (1, 2, 2), 4, 40, 5, 40, 9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_model(**settings) -> Chameleon:
    """In float64, with weights large enough that whatever is seen shows."""
    model = Chameleon(V, K, LATENT, 32, 2, 4, num_kv_heads=2, max_seq_len=T, **settings).double()
    model.materialize("cpu", 0)
    for i, parameter in enumerate(model.parameters()):
        scale = 1.5 / parameter.shape[1] ** 0.5 if parameter.ndim == 2 else 0.3
        parameter.data = normal(*parameter.shape, seed=i) * scale + (parameter.ndim == 1)
    return model


@pytest.fixture(scope="module")
def model() -> Chameleon:
    return make_model()


def picture(seed: int) -> Image:
    """Codes of its own."""
    return Image(torch.randint(0, K, LATENT, generator=torch.Generator().manual_seed(seed)).float())


DOCUMENTS = [
    Document(([7, 8, 9], picture(1))),
    Document(([10, 11, 12, 13],)),
    Document((picture(2), [14, 15], picture(3), [16])),
    Document(([17, 18, 19],), bos=False, eos=False, next_id=20),
    Document((picture(4),)),
]
PACKED = [[DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[3]], [DOCUMENTS[2], DOCUMENTS[4]]]


def make(rows: list[list[Document]], slots: int = SLOTS) -> Batch:
    return collate(rows, RowShape(T, P, slots, LATENT, None), [(n,) for n in range(len(rows))])


def ids_by_hand(batch: Batch) -> Tensor:
    """(B, T) ids of the one vocabulary."""
    ids, seen = batch.token_ids.clone(), {}
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            slot = int(batch.image_ids[b, t])
            if slot >= 0:
                n = seen[slot] = seen.get(slot, -1) + 1
                ids[b, t] = V + int(batch.latents[slot, 0, n // 2, n % 2])
    return ids


def naive(model: Chameleon, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V + K) at every position, by a mask in loops, and the ids (B, T)."""
    ids = ids_by_hand(batch)
    mask = torch.zeros(*ids.shape, T, dtype=torch.bool)
    for b in range(ids.shape[0]):
        for i in range(T):
            for j in range(i + 1):
                mask[b, i, j] = batch.document_ids[b, i] == batch.document_ids[b, j]
    x = model.transformer(model.embedding.weight[ids], batch.position_ids, mask[:, None])
    return x @ model.head.weight.T, ids


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_equals_the_naive_forward_with_its_gradients(model: Chameleon) -> None:
    """At the labelled positions, then where ids are predicted: at BOI the first, at each id but the last the next."""
    batch = make(PACKED)
    logits, (everywhere, ids) = model(batch, batch.latents), naive(model, batch)
    N, valid = len(batch.text_positions), batch.image_valid
    assert logits.shape == (N + len(valid) * P, V + K)
    text, image = logits[:N], logits[N:].view(-1, P, V + K)
    close(text, everywhere.view(-1, V + K)[batch.text_positions])
    for slot in valid.nonzero()[:, 0].tolist():
        b, start = divmod(int(batch.image_rows[slot]) * T + int(batch.image_starts[slot]), T)
        assert ids[b, start - 1] == BOI_ID
        close(image[slot], everywhere[b, start - 1 : start + P - 1])
        assert torch.equal(model.ids_of(batch.latents)[slot], ids[b, start : start + P])

    weights, kept = normal(*logits.shape, seed=5), torch.cat([torch.ones(N, dtype=bool), valid.repeat_interleave(P)])
    theirs = [(everywhere.view(-1, V + K)[batch.text_positions] * weights[:N]).sum()]
    for slot in valid.nonzero()[:, 0].tolist():
        b, start = int(batch.image_rows[slot]), int(batch.image_starts[slot])
        theirs.append((everywhere[b, start - 1 : start + P - 1] * weights[N:].view(-1, P, V + K)[slot]).sum())
    parameters = list(model.parameters())
    ours = torch.autograd.grad((logits * weights * kept[:, None]).sum(), parameters)
    for a, b in zip(ours, torch.autograd.grad(sum(theirs), parameters), strict=True):
        close(a, b)


@pytest.mark.parametrize("rows", [7, 1000])
def test_losses_in_place_of_logits(model: Chameleon, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks and whole; log^2 Z beside the nll."""
    batch = make(PACKED)
    logits = model(batch, batch.latents)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * (V + K) * rows)
    labels = torch.randint(V + K, (len(logits),), generator=torch.Generator().manual_seed(0))
    labels[::4] = IGNORE_INDEX
    nll, log_z = model(batch, batch.latents, labels)
    close(nll, F.cross_entropy(logits, labels, reduction="none"))
    close(log_z, logits.logsumexp(-1).square() * (labels != IGNORE_INDEX))


def by_place(model: Chameleon, batch: Batch, names: list[list[int]]) -> dict[tuple[int, int], Tensor]:
    """Logits by (document, position in it)."""
    logits = model(batch, batch.latents)
    found, N = {}, len(batch.text_positions)
    flat = [int(f) for f, label in zip(batch.text_positions, batch.text_labels, strict=True) if label != IGNORE_INDEX]
    rows = list(range(len(flat)))
    for slot in batch.image_valid.nonzero()[:, 0].tolist():
        at = int(batch.image_rows[slot]) * T + int(batch.image_starts[slot]) - 1
        flat += range(at, at + P)
        rows += range(N + slot * P, N + slot * P + P)
    for place, row in zip(flat, rows, strict=True):
        b, t = divmod(place, T)
        found[names[b][int(batch.document_ids[b, t])], int(batch.position_ids[b, t])] = logits[row]
    return found


def test_packed_equals_separate(model: Chameleon) -> None:
    packed = by_place(model, make(PACKED), [[0, 1, 3], [2, 4]])
    assert len(packed) == sum(len(d.images) * P for d in DOCUMENTS) + int(make(PACKED).step_counts[0])
    for n, document in enumerate(DOCUMENTS):
        for place, row in by_place(model, make([[document]]), [[n]]).items():
            close(packed[place], row)


def test_empty_slots_change_nothing(model: Chameleon) -> None:
    """Whatever stands in them, not-a-number apart."""
    batch = make([[DOCUMENTS[0]], [DOCUMENTS[1]]])
    filled = batch.latents.clone()
    filled[~batch.image_valid] = 7.0
    logits, others = model(batch, batch.latents), model(batch, filled)
    kept = torch.cat([torch.ones(256, dtype=bool), batch.image_valid.repeat_interleave(P)])
    assert torch.equal(logits[kept], others[kept])
    assert others.isfinite().all()


def test_all_attention_is_causal(model: Chameleon) -> None:
    """An id changes what is predicted behind it in its document, inside its image too, and nothing before."""
    batch, place = make([[DOCUMENTS[2], DOCUMENTS[0]]]), 2
    changed = batch.latents.clone()
    changed[0].view(-1)[place] = (changed[0].view(-1)[place] + 1) % K
    one, other = (
        by_place(model, dataclasses.replace(batch, latents=latents), [[2, 0]]) for latents in (batch.latents, changed)
    )
    at = 2 + place  # behind BOS and BOI
    assert any(position == at for document, position in one if document == 2)
    for (document, position), row in one.items():
        differs = not torch.allclose(row, other[document, position], rtol=0, atol=1e-12)
        assert differs == (document == 2 and position >= at), (document, position)


def test_text_logits_are_transfusions_where_its_stability_parts_are_off() -> None:
    ours = make_model(qk_norm=False, norm_order="pre")
    theirs = Transfusion(V, (3, 4, 4), 2, 32, 2, 4, num_kv_heads=2, max_seq_len=T).double().materialize("cpu", 0)
    weights = ours.state_dict()
    weights["embedding.weight"] = weights["embedding.weight"][:V]
    weights["text_head.weight"] = weights.pop("head.weight")[:V]
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert all(name.startswith(("patch_encoder.", "patch_decoder.")) for name in missing)
    rows = [[DOCUMENTS[1], DOCUMENTS[3]], [DOCUMENTS[1]]]
    batch = make(rows)
    of_theirs = collate(rows, RowShape(T, P, SLOTS, (3, 4, 4), None), [(0,), (1,)])
    text, _ = theirs(of_theirs, of_theirs.latents.double(), torch.zeros(len(of_theirs.image_valid)).double())
    close(ours(batch, batch.latents)[: len(text), :V], text)
    close(ours.text_logits(normal(3, 32)), normal(3, 32) @ weights["text_head.weight"].T)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_a_block_written_out(norm_order: str, qk_norm: bool) -> None:
    """Chameleon §2.3: h = x + norm(attention(x)), out = h + norm(ffn(h)); queries and keys normed before rotation."""
    D, H, L, eps = 16, 2, 6, 1e-5
    block = Block(D, H, H, 24, qk_norm, eps, norm_order).double()
    for i, parameter in enumerate(block.parameters()):
        parameter.data = normal(*parameter.shape, seed=i) * 0.4 + (parameter.ndim == 1)
    rotary = Rotary(D // H, L, 100.0).double()
    rotary.fill_buffers()
    x = normal(1, L, D, seed=99)

    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def attention(y: Tensor) -> Tensor:
        heads = (y @ block.attention.qkv_proj.weight.T).view(L, 3 * H, D // H)
        out = []
        for h in range(H):
            q, k, v = heads[:, h], heads[:, H + h], heads[:, 2 * H + h]
            if qk_norm:
                q, k = norm(q, block.attention.q_norm.weight), norm(k, block.attention.k_norm.weight)
            turned = []
            for vectors in (q, k):
                half = D // H // 2
                angles = torch.arange(L).double()[:, None] * 100.0 ** (-torch.arange(half).double() / half)
                a, b = vectors[:, :half], vectors[:, half:]
                turned.append(torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1))
            scores = turned[0] @ turned[1].T / (D // H) ** 0.5
            scores = scores.masked_fill(~torch.ones(L, L, dtype=torch.bool).tril(), float("-inf"))
            out.append(scores.softmax(-1) @ v)
        return torch.cat(out, -1) @ block.attention.o_proj.weight.T

    def feed_forward(y: Tensor) -> Tensor:
        gate, up = (y @ block.feed_forward.gate_up_proj.weight.T).chunk(2, -1)
        return (F.silu(gate) * up) @ block.feed_forward.down_proj.weight.T

    first, second = block.attention_norm.weight, block.feed_forward_norm.weight
    if norm_order == "post":
        h = x[0] + norm(attention(x[0]), first)
        expected = h + norm(feed_forward(h), second)
    else:
        h = x[0] + attention(norm(x[0], first))
        expected = h + feed_forward(norm(h, second))
    mask = torch.ones(L, L, dtype=torch.bool).tril()[None, None]
    close(block(x, rotary(torch.arange(L)[None]), mask)[0], expected)


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_blocks_begin_as_the_identity_where_norms_stand_behind(norm_order: str) -> None:
    """And every weight depends on seed and name alone."""
    model = Chameleon(V, K, LATENT, 32, 2, 4, max_seq_len=T, norm_order=norm_order).materialize("cpu", 5)
    x = normal(1, T, 32).float()
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    out = model.transformer.blocks[0](x, model.transformer.rotary(torch.arange(T)[None]), mask)
    assert torch.equal(out, x) == (norm_order == "post")
    assert (model.transformer.blocks[0].attention.q_norm.weight == 1).all()
    assert (model.transformer.norm.weight == 1).all()
    assert torch.equal(model.head.weight, Chameleon(V, K, LATENT, 32, 1, 4).materialize("cpu", 5).head.weight)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_stability_parts_are_on_by_default_and_names_stay() -> None:
    names = set(Chameleon(V, K, LATENT, 32, 2, 4).state_dict())
    assert any(name.endswith("q_norm.weight") for name in names)
    assert Chameleon(V, K, LATENT, 32, 2, 4).transformer.blocks[0].norm_order == "post"
    plain = set(Chameleon(V, K, LATENT, 32, 2, 4, qk_norm=False, norm_order="pre").state_dict())
    transfusion = {n for n in Transfusion(V, (3, 4, 4), 2, 32, 2, 4).state_dict() if n.startswith("transformer.")}
    assert {name for name in plain if name.startswith("transformer.")} == transfusion


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_shape": (3, 4, 4)}, r"latent_shape \(3, 4, 4\), expected \(1, h, w\)"),
        ({"codebook_size": 0}, "codebook_size 0"),
        ({"norm_order": "both"}, "norm_order 'both', expected 'pre' or 'post'"),
        ({"dim": 30}, "dim 30 must be a multiple"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    sizes = {"vocab_size": V, "codebook_size": K, "latent_shape": LATENT, "dim": 32, "num_layers": 2, "num_heads": 4}
    with pytest.raises(ValueError, match=message):
        Chameleon(**(sizes | change))
