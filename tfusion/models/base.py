"""`MultimodalModel`: what models of text and images share: how weights come to be, a cache, where images stand.

Parameters are made on the meta device and filled once, by `materialize`; each is a function of the seed and its name.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tfusion.models.kv_cache import KVCache
from tfusion.models.transformer import Transformer
from tfusion.randomness import generator
from tfusion.sequence import Batch

DRAWN_AT_ONCE = 8  # parameters, by each process: of 7B, at most 3 GB beside the model


class MultimodalModel(nn.Module):
    """A trunk over text and images. Subclasses set the attributes below and give `forward` and what raises here."""

    vocab_size: int  # V, of text
    latent_shape: tuple[int, int, int] | None  # (C, h, w), None = no images
    num_patches: int  # P, positions an image takes
    max_seq_len: int
    embedding: nn.Embedding
    transformer: Transformer

    predicts_text = True
    latent_parts: ClassVar[tuple[str, ...]] = ()  # that mean the latents of one image tokenizer

    def seen_together(self, image_ids: Tensor) -> Tensor:
        """(B, T) image ids as the mask wants them: none where attention inside an image is causal."""
        raise NotImplementedError

    def text_logits(self, hidden: Tensor) -> Tensor:
        """What text comes next: (..., D) -> (..., V)."""
        raise NotImplementedError

    def make_cache(self, num_rows: int, capacity: int) -> KVCache:
        """An empty cache for `num_rows` sequences of up to `capacity` positions, in the weights' type."""
        weight, trunk = self.embedding.weight, self.transformer
        sizes = (len(trunk.blocks), num_rows, trunk.num_kv_heads, trunk.head_dim, capacity)
        return KVCache(*sizes, weight.device, weight.dtype)

    def materialize(self, device: torch.device | str, seed: int) -> Self:
        """Allocate on a device, draw the weights and fill the tables; sharded or not."""
        self.to_empty(device=device)
        self.init_weights(seed)
        self.fill_buffers()
        return self

    def fill_buffers(self) -> None:
        """Fill rotary and timestep tables, which no checkpoint holds and `to_empty` leaves as rubbish."""
        for module in self.modules():
            if module is not self and hasattr(module, "fill_buffers"):
                module.fill_buffers()

    def initial_std(self, name: str, shape: torch.Size) -> float:
        """Of a matrix (outputs, inputs): 0.02; of what writes to the stream less, 0.02 / sqrt(2 layers) (GPT-2), so
        that it keeps its scale.
        """
        scaled = name.endswith(("o_proj.weight", "down_proj.weight"))
        return 0.02 / (2 * len(self.transformer.blocks)) ** 0.5 if scaled else 0.02

    def initial_gain(self, name: str) -> float:
        """Of a norm's weights."""
        return 1.0

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every weight from a generator seeded by (seed, its name): layout and device change nothing.

        Norms' weights are `initial_gain`, biases 0, matrices N(0, `initial_std`).
        """
        parameters = list(self.named_parameters())
        with ThreadPoolExecutor(DRAWN_AT_ONCE) as pool:  # torch draws a tensor on one thread, at 0.5 GB a second
            for at in range(0, len(parameters), DRAWN_AT_ONCE):
                some = parameters[at : at + DRAWN_AT_ONCE]
                drawn = pool.map(lambda named: self._initial(named[0], named[1].shape, seed), some)
                for (_, parameter), full in zip(some, drawn, strict=True):
                    if isinstance(parameter, DTensor):  # every rank drew the same tensor and keeps its shard
                        full = full.to(parameter.device)
                        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
                    parameter.copy_(full)

    def _initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """Of one parameter, on the CPU, whatever the default device: Lightning makes the GPU so."""
        if name.endswith("bias"):
            return torch.zeros(shape, device="cpu")
        if "norm" in name:
            return torch.full(shape, self.initial_gain(name), device="cpu")
        full = torch.randn(shape, generator=generator("weights", seed, name), device="cpu")
        return full.mul_(self.initial_std(name, shape))


def image_positions(batch: Batch, num_patches: int, shift: int = 0) -> Tensor:
    """(I P,) flat positions of each image's P places, or `shift` after them.

    Empty slots stand at position 0, so that shapes stay fixed and no parameter goes unused.
    """
    T = batch.token_ids.shape[1]
    start = torch.where(batch.image_valid, batch.image_rows * T + batch.image_starts + shift, 0)
    offsets = torch.arange(num_patches, device=start.device)
    return (start[:, None] + offsets * batch.image_valid[:, None]).view(-1)
