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
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tfusion.models.compilers import has_compiler

logger = logging.getLogger(__name__)
Backend = Literal["flex", "sdpa"]
Mask = Tensor | BlockMask | None  # bool: seen; float: added to scores; None: everything is seen
# For heads of 64 in half precision the tiles that torch 2.11 takes forward on Hopper leave 4 kB a thread to slow memory
# and take 9.4 ms where these take 0.3 (`bench/results/speed_h200_202611.md`; of other cards nothing was measured). Not
# ROWS_GUARANTEED_SAFE: every position sees itself, but not always a key of the first tile, without which it is NaN.
TILES = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8}
BLOCK = 128  # positions, of queries and of keys, that flex attention leaves out together: its own default
# Sizes and types it is compiled for in a process; past torch's own 8 it would silently write all scores out.
FLEX_CODES = 64
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
    """Flex attention on CUDA where it can be compiled, SDPA elsewhere (flex has no backward on CPU); said once a device
    type.
    """
    backend: Backend = "flex" if device_type == "cuda" and has_compiler(device_type) else "sdpa"
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
        return block_mask(*spans(document_ids, image_ids), hidden)
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


def spans(document_ids: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a position sees of a packed row, as keys from `start` to `end`, of which those before `own` only if they are
    not hidden: documents and images lie in one piece each, so what `visible` says of pairs is an interval.

    Args:
        document_ids, image_ids: (B, T) as in `Batch`.

    Returns:
        (B, T) each: where the document begins; the last position of the own image, of text itself; where the own image
        begins, of text T.
    """
    T = document_ids.shape[1]
    index = torch.arange(T, device=document_ids.device)

    def first(ids: Tensor) -> Tensor:
        """Where the run of equal ids around each position begins."""
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return (begins * index).cummax(1).values

    in_image = image_ids >= 0
    last = T - 1 - first(image_ids.flip(1)).flip(1)
    start, end = first(document_ids), torch.where(in_image, last, index)
    own = torch.where(in_image, first(image_ids), T)
    return start.int(), end.int(), own.int()


def block_mask(start: Tensor, end: Tensor, own: Tensor, hidden: Tensor) -> BlockMask:
    """`visible` of packed rows for flex attention, given their `spans` and hidden keys, (B, T) each.

    As torch's `create_block_mask` with this `mask_mod`, whose vmap takes 7 times as long as these few operations.
    """

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (start[b, q] <= k) & (k <= end[b, q]) & ((own[b, q] <= k) | ~hidden[b, k])

    B, T = hidden.shape
    blocks = -(-T // BLOCK)
    padded = [F.pad(x, (0, blocks * BLOCK - T), value=value) for x, value in ((start, T), (end, -1), (own, T))]
    key = torch.arange(blocks * BLOCK, device=hidden.device)
    first, last, image = (x[:, :, None] for x in padded)  # (B, T, 1)
    shown = ~F.pad(hidden, (0, blocks * BLOCK - T), value=True)[:, None]  # (B, 1, T)
    seen = (first <= key) & (key <= last) & ((image <= key) | shown)
    seen = seen.view(B, blocks, BLOCK, blocks, BLOCK).transpose(2, 3).flatten(3).sum(-1, dtype=torch.int32)
    some, all_ = ((part[:, None].int()) for part in ((seen > 0) & (seen < BLOCK**2), seen == BLOCK**2))  # (B, 1, n, n)
    counts = [each.sum(-1, dtype=torch.int32) for each in (some, all_)]
    order = [each.argsort(dim=-1, descending=True, stable=True).int() for each in (some, all_)]  # those first
    return BlockMask.from_kv_blocks(counts[0], order[0], counts[1], order[1], BLOCK, mask_mod, (T, T))


def as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a key is seen, else -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Masked attention, (B, H, T, K) over (B, H_kv, S, K); H_kv divides H (grouped keys)."""
    # a plain bool: compiled for every length a comparison is a symbol, which SDPA does not take
    grouped = True if query.shape[1] != key.shape[1] else False  # noqa: SIM210
    if isinstance(mask, BlockMask):
        # (below a block of queries it may be another kernel, of other tiles)
        chosen = query.shape[-1] == 64 and query.dtype.itemsize == 2 and query.shape[2] >= BLOCK
        options = TILES if chosen else None
        if not torch.compiler.is_compiling():
            # every time: torch keeps it a thread
            torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, FLEX_CODES)
            return _compiled_flex()(query, key, value, block_mask=mask, enable_gqa=grouped, kernel_options=options)
        # As whole tensors: inductor's CPU kernel (torch 2.14) reads the halves of a rotated split wrong
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped, kernel_options=options)
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
