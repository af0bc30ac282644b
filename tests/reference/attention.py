"""The mask rule and masked attention in loops, written from the design and not from the package.

Legend: B rows, T queries, S keys, H heads, K head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def loop_mask(document_ids: Tensor, image_ids: Tensor, hidden: Tensor) -> Tensor:
    """(B, T) three times -> (B, T, T) bool, [b, i, j]: the query at i sees the key at j."""
    B, T = document_ids.shape
    mask = torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        for i in range(T):
            for j in range(T):
                if int(document_ids[b, i]) != int(document_ids[b, j]):
                    continue
                if int(image_ids[b, i]) != -1 and int(image_ids[b, i]) == int(image_ids[b, j]):
                    mask[b, i, j] = True  # inside an image all see all
                elif j <= i and not bool(hidden[b, j]):
                    mask[b, i, j] = True  # elsewhere the past, less what is hidden
    return mask


def loop_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """(B, H, T, K) over (B, H_kv, S, K) under (B, T, S); query head n reads key head n H_kv // H."""
    B, H, T, K = query.shape
    shared = H // key.shape[1]
    rows = []
    for b in range(B):
        for head in range(H):
            for i in range(T):
                keys = [j for j in range(key.shape[2]) if mask[b, i, j]]
                scores = torch.stack([query[b, head, i] @ key[b, head // shared, j] for j in keys])
                weights = (scores / math.sqrt(K)).exp()
                weights = weights / weights.sum()
                rows.append(sum(w * value[b, head // shared, j] for w, j in zip(weights, keys, strict=True)))
    return torch.stack(rows).view(B, H, T, K)
