"""The model equals a naive forward; packing, empty slots and what must not be seen change nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.attention import loop_mask
from tfusion import losses
from tfusion.losses import image_mse, token_nll
from tfusion.models.transfusion import Transfusion
from tfusion.sequence import IGNORE_INDEX, Batch, Document, Image, RowShape, collate

LATENT, P, T, K, V = (2, 4, 4), 4, 40, 5, 40


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ADAPTERS = {
    "linear": {},
    "unet": {"adapter": "unet", "adapter_channels": 16},
    "conv": {"adapter": "conv", "adapter_channels": 12, "patch_positions": True},
}


def make_model(**settings: Any) -> Transfusion:
    """In float64, with weights large enough that whatever is seen shows, and a decoder that is not zero."""
    model = Transfusion(V, LATENT, 2, 32, 2, 4, num_kv_heads=2, max_seq_len=T, qk_norm=True, **settings).double()
    model.materialize("cpu", 0)
    for i, parameter in enumerate(model.parameters()):
        if parameter.ndim >= 2:
            parameter.data = normal(*parameter.shape, seed=i) * 1.5 / parameter[0].numel() ** 0.5
    return model


@pytest.fixture(scope="module", params=ADAPTERS)
def model(request: pytest.FixtureRequest) -> Transfusion:
    return make_model(**ADAPTERS[request.param])


@pytest.fixture(autouse=True)
def no_gradients_left(model: Transfusion) -> None:
    model.zero_grad()


def shape(max_images: int = K, seq_len: int = T) -> RowShape:
    return RowShape(seq_len, P, max_images, LATENT, None)


def picture(seed: int, limit: float = 1.0) -> Image:
    return Image(normal(*LATENT, seed=seed).float(), limit)


DOCUMENTS = [
    Document(([7, 8, 9], picture(1))),  # a caption, then its picture
    Document(([10, 11, 12, 13],)),
    Document((picture(2), [14, 15], picture(3), [16])),  # two images, text between
    Document(([17, 18, 19],), bos=False, eos=False, next_id=20),  # the middle of a long text
    Document((picture(4),)),  # a picture alone, as after a caption drop
]
PACKED = [[DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[3]], [DOCUMENTS[2], DOCUMENTS[4]]]


def make(rows: list[list[Document]], max_images: int = K) -> tuple[Batch, Tensor, Tensor]:
    """A batch, its clean latents as x_t, and timesteps told by the image's content, wherever it stands."""
    batch = collate(rows, shape(max_images), [(n,) for n in range(len(rows))])
    x_t = batch.latents.double()
    return batch, x_t, x_t[:, 0, 0, 0].abs() * 300


def everywhere(batch: Batch) -> Batch:
    """The same batch with logits wanted at every position."""
    return dataclasses.replace(batch, text_positions=torch.arange(batch.token_ids.numel()))


def naive(model: Transfusion, batch: Batch, x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Position by position: logits (B T, V), and outputs of the valid slots, zeros elsewhere."""
    B = batch.token_ids.shape[0]
    rows, skips = [], {}
    for b in range(B):
        vectors, patches_before = [], {}
        for t in range(T):
            slot = int(batch.image_ids[b, t])
            if slot < 0:
                vectors.append(model.embedding.weight[batch.token_ids[b, t]])
            else:
                n = patches_before[slot] = patches_before.get(slot, -1) + 1
                patches, skips[slot] = model.patch_encoder(x_t[slot : slot + 1], timesteps[slot : slot + 1])
                vectors.append(patches[0, n])
        rows.append(torch.stack(vectors))
    together = batch.image_ids if model.image_attention == "bidirectional" else torch.full_like(batch.image_ids, -1)
    mask = loop_mask(batch.document_ids, together, batch.hidden)[:, None]
    x = model.transformer(torch.stack(rows), batch.position_ids, mask)
    outputs = torch.zeros_like(x_t)
    for slot in range(len(x_t)):
        at = (batch.image_ids == slot).nonzero()
        if len(at):
            outputs[slot] = model.patch_decoder(x[at[:, 0], at[:, 1]][None], skips[slot], timesteps[slot : slot + 1])[0]
    return model.text_head(x).view(-1, V), outputs


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_equals_the_naive_forward_with_its_gradients(model: Transfusion) -> None:
    """Through embedding, scatter, gather and both heads; any positions, logits where asked for, in any order."""
    batch, x_t, timesteps = make(PACKED)
    changes = {"text_positions": batch.text_positions.flip(0), "position_ids": 2 * batch.position_ids}
    batch = dataclasses.replace(batch, **changes)
    logits, output = model(batch, x_t, timesteps)
    assert logits.shape == (256, V)
    assert output.shape == x_t.shape
    all_logits, outputs = naive(model, batch, x_t, timesteps)
    valid = batch.image_valid[:, None, None, None]
    close(logits, all_logits[batch.text_positions])
    close(output * valid, outputs)

    weights, image_weights = normal(256, V, seed=5), normal(*x_t.shape, seed=6) * valid
    ours = (logits * weights).sum() + (output * image_weights).sum()
    theirs = (all_logits[batch.text_positions] * weights).sum() + (outputs * image_weights).sum()
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        close(a, b)


@pytest.mark.parametrize("rows", [7, 256])
def test_the_labels_losses_in_place_of_logits(model: Transfusion, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks and whole, with the gradients of all weights; images are the same."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * V * rows)
    batch, x_t, timesteps = make(PACKED)
    (logits, output), (nll, same) = model(batch, x_t, timesteps), model(batch, x_t, timesteps, text_losses=True)
    assert torch.equal(output, same)
    expected = token_nll(logits, batch.text_labels)
    close(nll, expected)
    parameters = [*model.transformer.parameters(), model.embedding.weight, model.text_head.weight]
    for a, b in zip(*(torch.autograd.grad(each.sum(), parameters) for each in (nll, expected)), strict=True):
        close(a, b)


def by_place(batch: Batch, logits: Tensor, output: Tensor, names: list[list[int]]) -> tuple[dict, dict]:
    """Logits by (document, position in it) and outputs by (document, image of it)."""
    text, images = {}, {}
    for label, flat, row in zip(batch.text_labels, batch.text_positions, logits, strict=True):
        if label != IGNORE_INDEX:
            b, t = divmod(int(flat), T)
            name = names[b][int(batch.document_ids[b, t])]
            text[name, int(batch.position_ids[b, t])] = row
    for b, row_names in enumerate(names):
        slot = b * (len(batch.image_valid) // len(names))
        for name in row_names:
            for n in range(len(DOCUMENTS[name].images)):
                images[name, n] = output[slot]
                slot += 1
    return text, images


@pytest.mark.parametrize(
    "names",
    [[[0, 1, 3], [2, 4]], [[4, 3, 2], [1, 0]], [[3, 0], [], [4, 1], [2]]],
    ids=["packed", "reordered", "gaps"],
)
@pytest.mark.parametrize("max_images", [3, K])
def test_packed_equals_separate(model: Transfusion, names: list[list[int]], max_images: int) -> None:
    """Logits and image outputs do not depend on a document's neighbours, row, place or slot."""
    alone = [[name] for name in range(len(DOCUMENTS))]
    results = []
    for rows, slots in ((names, max_images), (alone, K)):
        batch, x_t, timesteps = make([[DOCUMENTS[name] for name in row] for row in rows], slots)
        results.append(by_place(batch, *model(batch, x_t, timesteps), rows))
    labels = sum(len(e) for d in DOCUMENTS for e in d.elements if not isinstance(e, Image))
    assert len(results[0][0]) > labels
    assert len(results[0][1]) == 4
    for packed, separate in zip(*results, strict=True):
        assert packed.keys() == separate.keys()
        for key in packed:
            close(packed[key], separate[key])


def test_loss_of_packed_rows_is_the_sum_over_separate_ones(model: Transfusion) -> None:
    """With its gradients: the whole of training, packed or not."""
    sums = []
    for rows in (PACKED, [[document] for document in DOCUMENTS]):
        batch, x_t, timesteps = make(rows)
        logits, output = model(batch, x_t, timesteps)
        # what noise a slot has depends on the row, so the target is a function of the content
        errors = image_mse(output, x_t.flip(1), batch.image_valid)
        loss = token_nll(logits, batch.text_labels).sum() + 5 * errors.sum()
        sums.append([loss.detach().double(), *torch.autograd.grad(loss, list(model.parameters()))])
    for packed, separate in zip(*sums, strict=True):  # losses are in fp32
        torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5 * max(1.0, separate.abs().max().item()))


# Leaks: what a perturbation changes, exactly.

# Row 0: 0 BOS, 1-3 text, 4 BOI, 5-8 image 0, 9 EOI, 10 EOS | 11 BOS, 12-15 text, 16 EOS | 17-19 text
# Row 1: 0 BOS, 1 BOI, 2-5 image K, 6 EOI, 7-8 text, 9 BOI, 10-13 image K + 1, 14 EOI, 15 text, 16 EOS
#        | 17 BOS, 18 BOI, 19-22 image K + 2, 23 EOI, 24 EOS | padding


def changed(model: Transfusion, perturb) -> tuple[set[tuple[int, int]], set[int]]:
    """Positions whose logits, and slots whose outputs, are not exactly as without the perturbation."""
    batch, x_t, timesteps = make(PACKED)
    batch = everywhere(batch)
    logits, output = model(batch, x_t, timesteps)
    new_logits, new_output = model(*perturb(batch, x_t.clone(), timesteps.clone()))
    positions = (logits != new_logits).any(1).nonzero()[:, 0]
    slots = {slot for slot in range(len(x_t)) if batch.image_valid[slot] and (output != new_output)[slot].any()}
    return {divmod(int(flat), T) for flat in positions}, slots


def span(row: int, start: int, stop: int) -> set[tuple[int, int]]:
    return {(row, t) for t in range(start, stop)}


@pytest.mark.parametrize(
    ("at", "positions", "slots"),
    [
        ((0, 2), span(0, 2, 11), {0}),  # a caption: its image and what follows
        ((0, 13), span(0, 13, 17), set()),  # nothing earlier, no other document
        ((0, 19), span(0, 19, 20), set()),
        ((1, 7), span(1, 7, 17), {K + 1}),  # text after an image does not reach it
        ((1, 15), span(1, 15, 17), set()),
        ((0, 39), span(0, 39, 40), set()),  # padding
    ],
)
def test_a_token_changes_itself_and_what_follows(model: Transfusion, at, positions, slots) -> None:
    def perturb(batch, x_t, timesteps):
        ids = batch.token_ids.clone()
        ids[at] = 33
        return dataclasses.replace(batch, token_ids=ids), x_t, timesteps

    assert changed(model, perturb) == (positions, slots)


@pytest.mark.parametrize("what", ["first patch", "last patch", "timestep"])
@pytest.mark.parametrize(
    ("slot", "positions", "slots"),
    [
        (0, span(0, 5, 11), {0}),
        (K, span(1, 2, 17), {K, K + 1}),  # a later image sees it
        (K + 1, span(1, 10, 17), {K + 1}),  # an earlier one does not
        (K + 2, span(1, 19, 25), {K + 2}),  # another document's
    ],
)
def test_a_patch_changes_its_whole_image_and_what_follows(model: Transfusion, slot, positions, slots, what) -> None:
    """Bidirectional inside: the last patch changes the first."""

    def perturb(batch, x_t, timesteps):
        if what == "timestep":
            timesteps[slot] += 1
        else:
            x_t[(slot, 0, 0, 0) if what == "first patch" else (slot, 1, 3, 3)] += 0.1
        return batch, x_t, timesteps

    assert changed(model, perturb) == (positions, slots)


def test_every_patch_of_an_image_sees_every_other(model: Transfusion) -> None:
    """The outputs too, pixel by pixel: no window of the latent is left unchanged by any other."""
    batch, x_t, timesteps = make(PACKED)
    output = model(batch, x_t, timesteps)[1]
    for row in (0, 2):
        for column in (0, 2):
            new = x_t.clone()
            new[K, 0, row, column] += 0.1
            assert (model(batch, new, timesteps)[1][K] != output[K]).all()


# Hidden keys: a noised copy beside a clean one.


def hidden_batch(rows: list[list[Document]], slots: set[int]) -> tuple[Batch, Tensor, Tensor]:
    batch, x_t, timesteps = make(rows)
    hidden = torch.zeros_like(batch.hidden)
    for slot in slots:
        hidden |= batch.image_ids == slot
    return everywhere(dataclasses.replace(batch, hidden=hidden)), x_t, timesteps


def test_a_hidden_image_is_seen_by_itself_alone(model: Transfusion) -> None:
    batch, x_t, timesteps = hidden_batch(PACKED, {K})
    logits, output = model(batch, x_t, timesteps)
    new = x_t.clone()
    new[K] += 0.3
    new_logits, new_output = model(batch, new, timesteps)
    positions = (logits != new_logits).any(1).nonzero()[:, 0]
    assert {divmod(int(flat), T) for flat in positions} == span(1, 2, 6)
    assert (output != new_output).flatten(1).any(1).nonzero()[:, 0].tolist() == [K]
    close(logits, naive(model, batch, x_t, timesteps)[0])


# Empty slots.


def loss_of(model: Transfusion, batch: Batch, x_t: Tensor, timesteps: Tensor) -> Tensor:
    logits, output = model(batch, x_t, timesteps)
    images = image_mse(output, torch.ones_like(output), batch.image_valid)
    return token_nll(logits, batch.text_labels).sum() + images.sum()


def test_what_stands_in_an_empty_slot_is_irrelevant(model: Transfusion) -> None:
    """Any latents and timesteps there: same outputs and same gradients, exactly."""
    batch, x_t, timesteps = make(PACKED)
    rubbish, odd = x_t.clone(), timesteps.clone()
    rubbish[~batch.image_valid] = 1e4 * normal(*rubbish[~batch.image_valid].shape, seed=3)
    odd[~batch.image_valid] = 777.0
    results = []
    for x, t in ((x_t, timesteps), (rubbish, odd)):
        logits, output = model(batch, x, t)
        gradients = torch.autograd.grad(loss_of(model, batch, x, t), list(model.parameters()))
        results.append([logits, output[batch.image_valid], *gradients])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_an_empty_slot_gives_and_gets_no_gradient(model: Transfusion) -> None:
    batch, x_t, timesteps = make(PACKED)
    x_t, timesteps = x_t.requires_grad_(), timesteps.detach().requires_grad_()
    for gradient in torch.autograd.grad(loss_of(model, batch, x_t, timesteps), [x_t, timesteps]):
        per_slot = gradient.flatten(1).abs().amax(1) if gradient.dim() > 1 else gradient.abs()
        assert torch.equal(per_slot > 0, batch.image_valid)


def test_without_images_the_adapters_get_zeros_not_nothing(model: Transfusion) -> None:
    """No parameter is unused under DDP, none is NaN, and a row of padding does no harm."""
    batch, x_t, timesteps = make([[DOCUMENTS[1]], []])
    loss_of(model, batch, x_t, timesteps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad == 0).all() == name.startswith("patch_"), name


def test_without_text_labels_the_text_head_gets_zeros(model: Transfusion) -> None:
    batch, x_t, timesteps = make([[Document((picture(4),), bos=False, eos=False)]])
    assert (batch.text_labels == IGNORE_INDEX).all()
    loss_of(model, batch, x_t, timesteps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad == 0).all() == (name == "text_head.weight"), name


def test_rows_without_slots_are_text(model: Transfusion) -> None:
    """K = 0, what a run without pictures asks for."""
    batch, x_t, timesteps = make([[DOCUMENTS[1]]], max_images=0)
    assert x_t.shape == (0, *LATENT)
    assert timesteps.shape == (0,)
    logits, output = model(batch, x_t, timesteps)
    assert output.shape == x_t.shape
    expected, *_ = model(*make([[DOCUMENTS[1]]]))
    close(logits, expected)
    loss_of(model, batch, x_t, timesteps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_all_parameters_learn(model: Transfusion) -> None:
    """From text and images together, every parameter gets a gradient; embeddings only where their id is."""
    batch, x_t, timesteps = make(PACKED)
    loss_of(model, batch, x_t, timesteps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name
    used = {int(i) for i in batch.token_ids[(batch.image_ids < 0) & (batch.document_ids >= 0)]}
    trained = set(model.embedding.weight.grad.abs().sum(1).nonzero()[:, 0].tolist())
    assert trained <= used
    assert used - trained <= {2}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_new_model_predicts_zero_and_learns_from_there(adapter: str) -> None:
    """`init_weights` leaves the decoder's last layer at 0: only it has a gradient from the images at first."""
    model = Transfusion(V, LATENT, 2, 32, 2, 4, max_seq_len=T, **ADAPTERS[adapter]).materialize("cpu", 0)
    batch, x_t, timesteps = make(PACKED)
    output = model(batch, x_t.float(), timesteps.float())[1]
    assert (output == 0).all()
    output.sub(1).square().sum().backward()
    assert (model.patch_decoder.proj.weight.grad != 0).all()
