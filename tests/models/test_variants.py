"""Variants of the model: causal inside images, text alone, and diffusion that reads captions and predicts none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.models.test_transfusion import (
    DOCUMENTS,
    PACKED,
    P,
    changed,
    close,
    everywhere,
    make,
    make_model,
    naive,
    span,
)
from tfusion.models.transfusion import Transfusion
from tfusion.sequence import Batch, Document, RowShape, collate

TEXTS = [Document(([7, 8, 9],)), Document(([10, 11, 12, 13],)), Document(([17, 18],), bos=False, eos=False, next_id=20)]


@pytest.fixture(scope="module")
def causal() -> Transfusion:
    return make_model(image_attention="causal")


@pytest.mark.parametrize("adapter", ["linear", "unet"])
def test_causal_images_equal_the_naive_forward(adapter: str) -> None:
    channels = {"adapter": "unet", "adapter_channels": 16} if adapter == "unet" else {}
    model = make_model(image_attention="causal", **channels)
    batch, x_t, timesteps = make(PACKED)
    batch = everywhere(batch)
    logits, output = model(batch, x_t, timesteps)
    all_logits, outputs = naive(model, batch, x_t, timesteps)
    close(logits, all_logits)
    close(output * batch.image_valid[:, None, None, None], outputs)
    both_ways = make_model(**channels)
    assert not torch.allclose(both_ways(batch, x_t, timesteps)[0], logits)


@pytest.mark.parametrize(("patch", "first"), [((0, 0), 0), ((0, 2), 1), ((2, 0), 2), ((3, 3), 3)])
def test_a_patch_changes_no_patch_before_it(causal: Transfusion, patch: tuple[int, int], first: int) -> None:
    """Of the linear adapter: slot 0 stands at positions 5 to 8 of row 0."""

    def perturb(batch, x_t, timesteps):
        x_t[0, 0, patch[0], patch[1]] += 0.1
        return batch, x_t, timesteps

    assert changed(causal, perturb) == (span(0, 5 + first, 11), {0})
    batch, x_t, timesteps = make(PACKED)
    output = causal(batch, x_t, timesteps)[1]
    _, new, _ = perturb(batch, x_t.clone(), timesteps)
    changes = (causal(batch, new, timesteps)[1] != output)[0].any(0)  # (h, w)
    windows = changes.reshape(2, 2, 2, 2).permute(0, 2, 1, 3).flatten(2).any(2).flatten()  # by patch
    assert windows.tolist() == [p >= first for p in range(P)]


def text_batch(rows: list[list[Document]]) -> Batch:
    return collate(rows, RowShape(40, 0, 0, (0, 0, 0), None), [(n,) for n in range(len(rows))])


def test_a_model_of_text_alone() -> None:
    """Packed = separate, and the logits of the multimodal model of the same trunk."""
    model, whole = Transfusion(40, None, None, 32, 2, 4, 2, max_seq_len=40, qk_norm=True).double(), make_model()
    model.materialize("cpu", 0)
    model.load_state_dict({name: weight for name, weight in whole.state_dict().items() if "patch_" not in name})
    packed, separate = text_batch([TEXTS]), text_batch([[text] for text in TEXTS])
    logits, output = model(packed, None, None)
    assert output is None
    one = by_text(packed, logits, [[0, 1, 2]])
    alone = by_text(separate, model(separate, None, None)[0], [[0], [1], [2]])
    assert one.keys() == alone.keys()
    assert len(one) == sum(len(text.elements[0]) + text.bos for text in TEXTS)
    for key, row in one.items():
        close(row, alone[key])
    batch, x_t, timesteps = make([TEXTS])
    close(logits, whole(batch, x_t, timesteps)[0])
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def by_text(batch: Batch, logits: Tensor, names: list[list[int]]) -> dict[tuple[int, int], Tensor]:
    """Logits by (document, position in it)."""
    rows = {}
    for label, flat, row in zip(batch.text_labels, batch.text_positions, logits, strict=True):
        if label >= 0:
            b, t = divmod(int(flat), 40)
            rows[names[b][int(batch.document_ids[b, t])], int(batch.position_ids[b, t])] = row
    return rows


@pytest.mark.parametrize("adapter", ["linear", "unet"])
def test_a_model_that_predicts_no_text(adapter: str) -> None:
    """No logits; its images are those of the whole model, packed or not; captions are read."""
    channels = {"adapter": "unet", "adapter_channels": 16} if adapter == "unet" else {}
    model, whole = make_model(predict_text=False, **channels), make_model(**channels)
    model.load_state_dict({name: weight for name, weight in whole.state_dict().items() if name in model.state_dict()})
    assert set(whole.state_dict()) - set(model.state_dict()) == {"text_head.weight"}
    batch, x_t, timesteps = make(PACKED)
    logits, output = model(batch, x_t, timesteps)
    assert logits is None
    close(output, whole(batch, x_t, timesteps)[1])
    alone, x_alone, t_alone = make([[document] for document in DOCUMENTS])
    separate = model(alone, x_alone, t_alone)[1]
    close(output[batch.image_valid], separate[alone.image_valid][[0, 1, 2, 3]])
    assert changed_outputs(model, batch, x_t, timesteps) == {0}
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def changed_outputs(model: Transfusion, batch: Batch, x_t: Tensor, timesteps: Tensor) -> set[int]:
    """Slots that another caption of the first document changes."""
    ids = batch.token_ids.clone()
    ids[0, 2] = 33
    new = model(dataclasses.replace(batch, token_ids=ids), x_t, timesteps)[1]
    old = model(batch, x_t, timesteps)[1]
    return {slot for slot in range(len(x_t)) if (new != old)[slot].any()}


@pytest.mark.parametrize("kind", ["transfusion", "chameleon"])
def test_weights_do_not_depend_on_the_default_device(tiny_module, tiny_chameleon, kind: str) -> None:
    """Lightning allocates with the GPU as torch's default device; here meta stands for one."""
    make = tiny_module if kind == "transfusion" else tiny_chameleon
    expected = make().model.materialize("cpu", 0)
    model = make().model.to_empty(device="cpu")
    with torch.device("meta"):
        model.init_weights(0)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
