"""Transfusion attention: the one mask rule and the one attention call, with two backends.

Causal over the sequence, bidirectional inside an image, nothing across documents (Transfusion §3, figure 4). On CUDA
the rule becomes a flex-attention block mask (blocks that nobody sees are skipped), elsewhere what is added to scores.

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
Mask = Tensor | BlockMask | None  # bool: seen; float: added to scores; None: everything is seen
EXPLICIT_UP_TO = 512  # positions a row, from where on SDPA is as fast in training and takes less memory


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
        a `BlockMask`, or (B, 1, T, T) to be added to scores, 0 or -inf: a bool mask costs SDPA on a CPU a tenth more.
    """
    B, T = document_ids.shape
    if (backend or backend_for(document_ids.device.type)) == "flex":

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            documents, images = (document_ids[b, q], document_ids[b, k]), (image_ids[b, q], image_ids[b, k])
            return visible(q, k, *documents, *images, hidden[b, k])

        return create_block_mask(mask_mod, B, None, T, T, device=str(document_ids.device))
    index = torch.arange(T, device=document_ids.device)
    seen = visible(
        index[:, None],
        index[None, :],
        document_ids[:, :, None],
        document_ids[:, None, :],
        image_ids[:, :, None],
        image_ids[:, None, :],
        hidden[:, None, :],
    )
    kind = document_ids.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.get_default_dtype()
    return as_bias(seen, dtype)[:, None]  # (B, 1, T, T)


def as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a key is seen, else -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Masked attention, (B, H, T, K) over (B, H_kv, S, K); H_kv divides H (grouped keys)."""
    # a plain bool: compiled for every length a comparison is a symbol, which SDPA does not take
    grouped = True if query.shape[1] != key.shape[1] else False  # noqa: SIM210
    if isinstance(mask, BlockMask):
        if not torch.compiler.is_compiling():
            return _compiled_flex()(query, key, value, block_mask=mask, enable_gqa=grouped)
        # As whole tensors: inductor's CPU kernel (torch 2.14) reads the halves of a rotated split wrong
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped)
    if mask is not None:
        mask = as_bias(mask, query.dtype) if mask.dtype == torch.bool else mask.to(query.dtype)
    T = query.shape[2]
    slow = T == 1 or (query.requires_grad and T <= EXPLICIT_UP_TO)
    if slow and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return _explicit(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def _explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The same with its scores written out: on a CPU in bf16 SDPA's backward is slow, and for one query its forward.

    softmax works in fp32 inside; its inputs are rounded to bf16, as in any mixed-precision attention written out.
    """
    B, H, T, K = query.shape
    groups = H // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query, key, value = (x.reshape(B * H, -1, K) for x in (query, key, value))
    if mask is None:
        scores = (query * K**-0.5) @ key.transpose(1, 2)  # (B H, T, S)
    else:
        mask = mask.expand(B, H, T, -1).reshape(B * H, T, -1)
        scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=K**-0.5)
    return (scores.softmax(-1) @ value).view(B, H, T, K)


@functools.cache
def _compiled_flex():
    """One compiled instance for all layers: several would each compile again."""
    return torch.compile(flex_attention, dynamic=False)
