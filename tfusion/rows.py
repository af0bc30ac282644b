"""A sample on its way, what its row of the cache holds, and how rows are extended.

Legend: R rows, T new positions, P patches, D width, C, h, w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tfusion.models.base import MultimodalModel
from tfusion.models.kv_cache import KVCache
from tfusion.requests import Request, Segment
from tfusion.sequence import BOI_ID, BOS_ID, EOI_ID, PAD_ID
from tfusion.tokenizers import TextTokenizer

# What a row is extended by: ids, of text and of images that are ids, and clean latents (C, h, w) for P patches.
Content = list[int | Tensor]


def length_of(content: Content, num_patches: int) -> int:
    """Positions it takes."""
    return sum(1 if isinstance(item, int) else num_patches for item in content)


def without_text(content: Content, vocab_size: int) -> Content:
    """The null prompt of guidance: images and markers stay. Ids from `vocab_size` on are of images."""
    kept = (BOS_ID, BOI_ID, EOI_ID)
    return [item for item in content if not isinstance(item, int) or item in kept or item >= vocab_size]


@dataclass
class Sample:
    """One sample on its way."""

    number: int
    sample: int
    request: Request
    prompt: Content
    limit: int  # positions it may take
    draws: torch.Generator  # of its tokens
    state: str = "text"  # text | image | done
    segments: list[Segment] = field(default_factory=list)
    text: list[int] = field(default_factory=list)  # since the last image
    num_tokens: int = 0
    num_images: int = 0
    null: int | None = None  # the cache row of its null prompt

    def end_text(self, tokenizer: TextTokenizer) -> None:
        if self.text:
            self.segments.append(tokenizer.decode(self.text))
            self.text = []


def extend(model: MultimodalModel, cache: KVCache, contents: list[Content]) -> Tensor:
    """Write each row's content behind what it has; hidden state at each row's last new position, (R, D)."""
    device, P = model.embedding.weight.device, model.num_patches
    counts = [length_of(content, P) for content in contents]
    R, T = len(contents), max(counts)
    ids = torch.full((R, T), PAD_ID)
    image_ids = torch.full((R, T), -1)
    latents, at_patches = [], []
    for r, content in enumerate(contents):
        at = 0
        for item in content:
            if isinstance(item, int):
                ids[r, at] = item
                at += 1
            else:
                image_ids[r, at : at + P] = cache.row_lengths[r] + at  # where it starts names it
                at_patches.append(torch.arange(P) + r * T + at)
                latents.append(item)
                at += P
    x = model.embedding(ids.to(device))  # (R, T, D)
    if latents:
        patches = model.image_vectors(torch.stack(latents))  # (images, P, D)
        index = torch.cat(at_patches).to(device)
        x = x.view(R * T, -1).index_copy(0, index, patches.flatten(0, 1)).view(R, T, -1)
    view = cache.view(model.seen_together(image_ids.to(device)), write=True)
    hidden = model.transformer(x, rotary_positions(model, view.index), cache=view)
    cache.advance(counts)
    if T == 1:
        return hidden[:, 0]
    last = torch.tensor([max(count - 1, 0) for count in counts], device=device)
    return hidden[torch.arange(R, device=device), last]


def rotary_positions(model: MultimodalModel, index: Tensor) -> Tensor:
    """Positions by index in the row; past the model's longest sequence only rubbish is written."""
    return index.clamp(max=model.max_seq_len - 1)
