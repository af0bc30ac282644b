"""Transfusion attention: the one mask rule and the one attention call, with two backends.

Causal over the sequence, bidirectional inside an image, nothing across documents (Transfusion §3, figure 4). On CUDA
the rule becomes a flex-attention block mask (blocks that nobody sees are skipped), elsewhere a boolean mask for SDPA.

Legend: B rows, T queries, S keys, H heads, K head dim.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

logger = logging.getLogger(__name__)
Backend = Literal["flex", "sdpa"]
Mask = Tensor | BlockMask | None  # None: everything is seen
EXPLICIT_UP_TO = 1024  # positions a row: scores of more take too much memory


def visible(
    query_index: Tensor,
    key_index: Tensor,
    query_document: Tensor,
    key_document: Tensor,
    query_image: Tensor,
    key_image: Tensor,
    key_hidden: Tensor,
) -> Tensor:
    """Whether a query sees a key: `same_document & ((causal & ~hidden[key]) | same_image)`.

    Works on scalars (flex attention's mask_mod) and, by broadcasting, on whole rows. Indices are positions in the
    row; images are slots, -1 off images; hidden keys are seen by their own image only.
    """
    same_image = (query_image == key_image) & (query_image >= 0)
    return (query_document == key_document) & (((query_index >= key_index) & ~key_hidden) | same_image)


@functools.cache
def backend_for(device_type: str) -> Backend:
    """Flex attention on CUDA, SDPA elsewhere (flex has no backward on CPU); said once a device type."""
    backend: Backend = "flex" if device_type == "cuda" else "sdpa"
    logger.info("attention backend on %s: %s", device_type, backend)
    return backend


def training_mask(document_ids: Tensor, image_ids: Tensor, hidden: Tensor, backend: Backend | None = None) -> Mask:
    """The mask of packed rows, made once a batch and used by every layer.

    Args:
        document_ids, image_ids, hidden: (B, T) as in `Batch`.
        backend: None = the one for the device.

    Returns:
        a `BlockMask`, or (B, 1, T, T) bool.
    """
    B, T = document_ids.shape
    if (backend or backend_for(document_ids.device.type)) == "flex":

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            documents, images = (document_ids[b, q], document_ids[b, k]), (image_ids[b, q], image_ids[b, k])
            return visible(q, k, *documents, *images, hidden[b, k])

        return create_block_mask(mask_mod, B, None, T, T, device=str(document_ids.device))
    index = torch.arange(T, device=document_ids.device)
    mask = visible(
        index[:, None],
        index[None, :],
        document_ids[:, :, None],
        document_ids[:, None, :],
        image_ids[:, :, None],
        image_ids[:, None, :],
        hidden[:, None, :],
    )
    return mask[:, None]  # (B, 1, T, T)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Masked attention, (B, H, T, K) over (B, H_kv, S, K); H_kv divides H (grouped keys)."""
    grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, BlockMask):
        return _compiled_flex()(query, key, value, block_mask=mask, enable_gqa=grouped)
    slow = query.requires_grad and query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if slow and mask is not None and query.shape[2] <= EXPLICIT_UP_TO:
        return _explicit(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def _explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The same with its scores written out, in bf16: training on a CPU, where SDPA's bf16 backward is twice as slow.

    softmax works in fp32 inside; its inputs are rounded to bf16, as in any mixed-precision attention written out.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = query.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))  # (B, 1, T, S)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias  # (B, H, T, S)
    return scores.softmax(-1) @ value


@functools.cache
def _compiled_flex():
    """One compiled instance for all layers: several would each compile again."""
    return torch.compile(flex_attention, dynamic=False)
