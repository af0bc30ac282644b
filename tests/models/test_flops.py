"""The formula counts what torch counts on the SDPA path, part by part and for every variant of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.test_transfusion import PACKED, make
from tests.reference.attention import loop_mask
from tfusion.losses import token_nll
from tfusion.models.chameleon import Chameleon
from tfusion.models.flops import attention_share, forward_flops, training_flops
from tfusion.models.transfusion import Transfusion
from tfusion.sequence import Document, Image, RowShape, collate

LATENT, V = (2, 8, 8), 40
VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear, positions, grouped keys": {"patch_positions": True, "num_kv_heads": 1, "qk_norm": True},
    "conv": {"adapter": "conv", "adapter_channels": 12},
    "unet 1": {"adapter": "unet", "adapter_channels": 8, "patch_size": 1},
    "unet 2": {"adapter": "unet", "adapter_channels": 16},
    "unet 4": {"adapter": "unet", "adapter_channels": 32, "patch_size": 4},
    "unet 8": {"adapter": "unet", "adapter_channels": 64, "patch_size": 8},
    "images alone": {"predict_text": False},
    "causal": {"image_attention": "causal"},
    "recomputed": {"activation_checkpointing": "full"},
}


def written_out(query, key, value, mask):
    """Attention as two matrix products, for torch does not count SDPA on every device."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-2, -1)
    return (scores if mask is None else scores + mask).softmax(-1) @ value


@pytest.fixture
def countable(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("transformer", "unet_patches"):
        monkeypatch.setattr(f"tfusion.models.{module}.attend", written_out)


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    with FlopCounterMode(display=False) as counter:
        yield counter.get_total_flops


def make_rows(model: Transfusion):
    """Two rows of T positions with K image slots each, two of them used."""
    P = model.num_patches
    images = RowShape(96, P, 1, LATENT, None)
    draws = torch.Generator().manual_seed(0)
    picture = Image(torch.randn(LATENT, generator=draws))
    batch = collate([[Document(([7, 8, 9], picture))], [Document(([7] * 20,))]], images, [(0,), (1,)])
    return batch, torch.randn(2, *LATENT, generator=draws), torch.tensor([10.0, 900.0])


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_backward_are_what_torch_counts(name: str, countable: None) -> None:
    """The forward exactly. The backward lacks one product of each layer whose input wants no gradient."""
    sizes = {"vocab_size": V, "latent_shape": LATENT, "patch_size": 2, "dim": 32, "num_layers": 2, "num_heads": 2}
    model = Transfusion(**(sizes | {"max_seq_len": 96} | VARIANTS[name])).materialize("cpu", 0)
    batch, x_t, timesteps = make_rows(model)
    shape = (*batch.token_ids.shape, len(batch.text_labels), len(batch.image_valid))
    with counted() as count, torch.no_grad():
        model(batch, x_t, timesteps)
    assert forward_flops(model, *shape) == count()
    if name == "recomputed":
        model.transformer.activation_checkpointing = "none"  # its second forward is not the model's
    with counted() as count:
        logits, output = model(batch, x_t, timesteps)
        loss = output.square().sum()
        (loss if logits is None else loss + token_nll(logits, batch.text_labels).sum()).backward()
    assert training_flops(model, *shape) == count() + missing(model, len(x_t))


def test_of_chameleon_too(countable: None) -> None:
    """With its text labels; those of images it has at every place of a slot."""
    model = Chameleon(V, 9, (1, 2, 2), dim=32, num_layers=2, num_heads=2, max_seq_len=40).materialize("cpu", 0)
    rows = [[Document(([7, 8, 9], Image(torch.zeros(1, 2, 2))))], [Document(([7] * 20,))]]
    batch = collate(rows, RowShape(40, 4, 2, (1, 2, 2), None), [(0,), (1,)])
    with counted() as count:
        logits = model(batch, batch.latents)
        shape = (*batch.token_ids.shape, len(batch.text_labels), len(batch.image_valid))
        assert forward_flops(model, *shape) == count()
        logits.sum().backward()
        assert training_flops(model, *shape) == count()


def missing(model: Transfusion, images: int) -> int:
    """What torch does not count: gradients that nobody asks for, of the latents and of the sinusoids."""
    encoder, decoder = model.patch_encoder, model.patch_decoder
    flops = 2 * encoder.timestep.in_proj.weight.numel() * images
    if model.adapter == "unet":
        flops += 2 * decoder.timestep.in_proj.weight.numel() * images
        return flops + 2 * encoder.in_conv.weight.numel() * LATENT[1] * LATENT[2] * images
    if model.adapter == "conv":  # torch forgets the groups in the gradient of a depthwise kernel: c times too many
        kernels = [block.depthwise.weight for block in (*encoder.blocks, *decoder.blocks)]
        flops -= sum(2 * (len(kernel) - 1) * kernel.numel() for kernel in kernels) * model.num_patches * images
    first = encoder.proj if model.adapter == "linear" else encoder.in_proj
    return flops + 2 * first.weight.numel() * model.num_patches * images


def test_text_alone(countable: None) -> None:
    model = Transfusion(V, None, None, 32, 2, 2, max_seq_len=40).materialize("cpu", 0)
    shape = RowShape(40, 0, 0, (0, 0, 0), None)
    batch = collate([[Document(([7, 8, 9],))], []], shape, [(0,), (1,)])
    with counted() as count:
        logits, _ = model(batch, None, None)
        forward = count()
        token_nll(logits, batch.text_labels).sum().backward()
    assert forward_flops(model, 2, 40, 256, 0) == forward
    assert training_flops(model, 2, 40, 256, 0) == count()


def test_the_share_of_attention_that_the_mask_lets_through() -> None:
    """Against the loop; padding needs none of its own."""
    batch, *_ = make(PACKED)
    for image_ids in (batch.image_ids, torch.full_like(batch.image_ids, -1)):
        mask = loop_mask(batch.document_ids, image_ids, batch.hidden) & (batch.document_ids >= 0)[:, :, None]
        assert attention_share(batch, image_ids) == pytest.approx(mask.float().mean().item())
    assert attention_share(batch) > attention_share(batch, torch.full_like(batch.image_ids, -1))


def test_a_share_of_attention_counts_in_proportion() -> None:
    model = Transfusion(V, None, None, 32, 2, 2, max_seq_len=40)
    whole, none = (forward_flops(model, 2, 40, 0, 0, share) for share in (1.0, 0.0))
    assert whole - none == 2 * 2 * 4 * 40 * 40 * 32  # rows, layers, two products, T x T x D
    assert forward_flops(model, 2, 40, 0, 0, 0.25) == none + (whole - none) // 4
