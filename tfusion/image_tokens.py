"""Images made id by id: how `decoding.py` fills an image of a Chameleon.

All waiting rows go together, one id a step over the cache, each row by its own draws. Only image ids are sampled.
Guidance runs a conditional and a null row in one forward, and both go on with the id sampled.

Legend: R rows, G guided ones, P ids an image, D width, K ids of images.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from tfusion.models.chameleon import Chameleon
from tfusion.models.kv_cache import KVCache
from tfusion.randomness import generator
from tfusion.replay import TokenSteps
from tfusion.requests import GenerationConfig
from tfusion.rows import Content, Sample
from tfusion.token_sampling import sample_tokens


def check_settings(config: GenerationConfig) -> None:
    """Raise ValueError for settings that mean something to denoising only; num_inference_steps has a default."""
    if config.sampler is not None:
        raise ValueError(
            f"got sampler {config.sampler!r}, which denoises; Chameleon's images are ids, sampled one by one: leave it "
            "out (image_temperature, image_top_k and image_top_p say how they are sampled)"
        )
    if config.guidance_interval != (0.0, 1.0):
        raise ValueError(
            f"got guidance_interval {list(config.guidance_interval)}, a part of the noise range; Chameleon's images "
            "are ids, without noise: leave it out (guidance_scale acts on every id)"
        )


class Settings(NamedTuple):
    """How R rows are sampled, on the device: once an image, not once an id."""

    guided: Tensor  # (G,) places of the guided rows
    scales: Tensor  # (G, 1) of guidance
    temperature: Tensor  # (R,)
    top_k: Tensor  # (R,)
    top_p: Tensor  # (R,)


class IdSampler:
    """Makes images id by id.

    Args:
        model: weights of one type.
    """

    def __init__(self, model: Chameleon) -> None:
        self.model = model
        self.device = model.embedding.weight.device

    def check(self, config: GenerationConfig) -> None:
        """Raise ValueError for settings that cannot be met."""
        check_settings(config)

    def content(self, latents: Tensor) -> Content:
        """What an image (1, h, w) of codes is in a row: P ids."""
        return self.model.ids_of(latents[None])[0].tolist()

    def kind(self, config: GenerationConfig) -> Hashable:
        """All rows go together."""
        return None

    def make(self, cache: KVCache, hidden: Tensor, rows: list[Sample]) -> tuple[Tensor, list[Content]]:
        """Images (R, 1, h, w) of codes, and what is still to be written of them before EOI: the last id.

        The cache ends in BOI, where `hidden` (R + G, D) is; it holds the rows, then the null rows of the guided ones,
        and so do the contents.
        """
        P, guided = self.model.num_patches, [r for r, row in enumerate(rows) if row.null is not None]
        settings = self._settings([row.request.config for row in rows], guided)
        seeds = [("image", row.request.seed, row.sample, row.num_images) for row in rows]
        draws = torch.stack([torch.rand(P, generator=generator(*parts)) for parts in seeds]).to(self.device)  # (R, P)
        steps, ids = TokenSteps(self.model, cache), list[Tensor]()
        while True:
            ids.append(self._next_ids(hidden, settings, draws[:, len(ids)]))
            last = torch.cat([ids[-1], ids[-1][settings.guided]])  # null rows go on with their own rows' ids
            if len(ids) == P:
                return self.model.latents_of(torch.stack(ids, 1)), [[i] for i in last.tolist()]
            hidden = steps.of_all(last)

    def _settings(self, configs: list[GenerationConfig], guided: list[int]) -> Settings:
        K, weight = self.model.codebook_size, self.model.embedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)  # of logits
        return Settings(
            torch.tensor(guided, dtype=torch.long, device=self.device),
            torch.tensor([[configs[r].guidance_scale] for r in guided], dtype=dtype, device=self.device),
            torch.tensor([config.image_temperature for config in configs], device=self.device),
            torch.tensor([min(config.image_top_k or K, K) for config in configs], device=self.device),
            torch.tensor([config.image_top_p or 1.0 for config in configs], device=self.device),
        )

    def _next_ids(self, hidden: Tensor, settings: Settings, uniforms: Tensor) -> Tensor:
        """The next id of each row, (R,), of the one vocabulary."""
        logits = self.model.image_logits(hidden)  # (R + G, K)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        conditional, null = logits[: len(uniforms)], logits[len(uniforms) :]
        if len(null):  # classifier-free guidance on logits (Ho & Salimans 2022, eq. 6, with scale = 1 + w)
            places = settings.guided
            guided_logits = null + settings.scales * (conditional[places] - null)
            conditional = conditional.index_copy(0, places, guided_logits)
        codes = sample_tokens(conditional, settings.temperature, settings.top_k, settings.top_p, uniforms)
        return codes + self.model.vocab_size
