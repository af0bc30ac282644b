"""Model FLOPs of a training step, counted part by part, a multiply-add being 2.

Counted: every matrix product and convolution where it runs, and both products of attention. Not counted: norms,
softmax, rotary, activations, interpolation, embedding, loss, optimizer, a frozen image tokenizer; nor what activation
checkpointing and a loss in chunks compute twice (these are the model's FLOPs, not the machine's). Autoencoders, which
systems have in common and which learn nothing of text, stand outside of the comparison and are not counted.

Attention is counted over the whole T x T square, as SDPA computes it, though the mask hides more than half: that is
also what systems are compared by, for it does not depend on how documents fall into rows. `attention_share` says how
much of the square a batch needs, which is what flex attention computes, up to its blocks.

Legend: B rows, T positions, N labelled positions, I image slots, P patches an image, D width, h, w latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfusion.models.attention import visible
from tfusion.models.chameleon import Chameleon
from tfusion.models.conv_patches import ConvPatchDecoder, ConvPatchEncoder
from tfusion.models.transformer import Transformer
from tfusion.models.transfusion import Transfusion
from tfusion.models.unet_patches import SelfAttention, UNetPatchDecoder, UNetPatchEncoder
from tfusion.sequence import Batch


def forward_flops(
    model: Transfusion | Chameleon, rows: int, positions: int, labels: int, images: int, attention_share: float = 1.0
) -> int:
    """Of one forward over B rows of T positions with N labels and I image slots, empty ones too, for they run."""
    flops = trunk_flops(model.transformer, rows, positions, attention_share)
    if isinstance(model, Chameleon):
        return flops + linear_flops(model.head, labels + images * model.num_patches)
    if model.text_head is not None:
        flops += linear_flops(model.text_head, labels)
    if model.patch_encoder is not None:
        flops += (adapter_flops(model.patch_encoder, model) + adapter_flops(model.patch_decoder, model)) * images
    return flops


def training_flops(
    model: Transfusion | Chameleon, rows: int, positions: int, labels: int, images: int, attention_share: float = 1.0
) -> int:
    """Of forward and backward: 3 x the forward, for each product has two in the backward."""
    return 3 * forward_flops(model, rows, positions, labels, images, attention_share)


def trunk_flops(trunk: Transformer, rows: int, positions: int, attention_share: float = 1.0) -> int:
    """Of the blocks: their matrices at all B T positions, and attention over a share of the T x T squares."""
    square = round(attention_flops(positions, positions, trunk.num_heads * trunk.head_dim) * attention_share)
    return linear_flops(trunk, rows * positions) + rows * len(trunk.blocks) * square


def attention_flops(queries: int, keys: int, width: int) -> int:
    """Of both products of one attention, over all heads together as wide as `width`."""
    return 2 * 2 * queries * keys * width


def linear_flops(module: nn.Module, vectors: int) -> int:
    """Of all linear layers in a module, each at so many vectors."""
    return 2 * vectors * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def adapter_flops(adapter: nn.Module, model: Transfusion) -> int:
    """Of a patch encoder or decoder for one image: what is of the timestep once, all else once a position."""
    P, once = model.num_patches, ()
    if isinstance(adapter, UNetPatchEncoder | UNetPatchDecoder):
        flops, once = unet_convolution_flops(adapter, model), ("timestep", "time_proj")
        attentions = [m for m in adapter.modules() if isinstance(m, SelfAttention)]
        flops += sum(attention_flops(P, P, m.o_proj.in_features) for m in attentions)
    elif isinstance(adapter, ConvPatchEncoder | ConvPatchDecoder):
        flops, once = sum(convolution_flops(block.depthwise, P) for block in adapter.blocks), ("timestep",)
    else:
        flops, once = 0, ("timestep",)
    for name, layer in adapter.named_modules():
        if isinstance(layer, nn.Linear):
            flops += linear_flops(layer, 1 if any(part in name.split(".") for part in once) else P)
    return flops


def convolution_flops(layer: nn.Conv2d, outputs: int) -> int:
    """Of a convolution with so many output positions."""
    return 2 * layer.weight.numel() * outputs  # (c', c / groups, y, x): each output channel its own products


def unet_convolution_flops(adapter: UNetPatchEncoder | UNetPatchDecoder, model: Transfusion) -> int:
    """Of a U-Net's way for one image; level n of the way down has 4^n times fewer positions than the latent."""
    _, h, w = model.latent_shape
    sizes = [h * w // 4**n for n in range(len(adapter.stages))]  # positions, from the latent's resolution down
    if isinstance(adapter, UNetPatchEncoder):
        flops, between = convolution_flops(adapter.in_conv, h * w), adapter.downs
    else:
        sizes.reverse()
        flops, between = convolution_flops(adapter.proj, h * w), adapter.ups
    for stages, size in zip(adapter.stages, sizes, strict=True):
        flops += sum(convolution_flops(m, size) for m in stages.modules() if isinstance(m, nn.Conv2d))
    return flops + sum(convolution_flops(m, size) for m, size in zip(between, sizes[1:], strict=True))


@torch.no_grad()
def attention_share(batch: Batch, image_ids: Tensor | None = None) -> float:
    """Which share of the B squares of T x T the mask lets through; waits for the device.

    Args:
        batch: packed rows.
        image_ids: (B, T) as the model's mask takes them (`Transfusion.seen_together`); None = bidirectional images.
    """
    image_ids = batch.image_ids if image_ids is None else image_ids
    index = torch.arange(batch.token_ids.shape[1], device=batch.token_ids.device)
    seen = 0
    for documents, images, hidden in zip(batch.document_ids, image_ids, batch.hidden, strict=True):
        pairs = (documents[:, None], documents[None], images[:, None], images[None])
        mask = visible(index[:, None], index[None], *pairs, hidden[None]) & (documents >= 0)[:, None]
        seen += int(mask.sum())
    return seen / batch.token_ids.numel() / batch.token_ids.shape[1]
