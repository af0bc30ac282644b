"""Images made by denoising (Transfusion §3, "Inference"): how `decoding.py` fills an image of a Transfusion.

While denoising, the keys and values of what came before are fixed, and only the image's own P positions run; the
clean patches are then written once, at timestep 0. Guidance runs a conditional and a null row in one forward.

Legend: R rows, G guided ones, P patches, D width, C, h, w latent size.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from tfusion.diffusion import NoiseProcess
from tfusion.models.kv_cache import CacheView, KVCache
from tfusion.models.transfusion import Transfusion
from tfusion.randomness import generator
from tfusion.replay import Replayed
from tfusion.requests import GenerationConfig
from tfusion.rows import Content, Sample, rotary_positions
from tfusion.samplers import Sampler


def check_settings(process: NoiseProcess, config: GenerationConfig) -> None:
    """Raise ValueError for settings that a model which denoises cannot meet."""
    Sampler(process, config.sampler, config.num_inference_steps)
    for name in ("image_temperature", "image_top_k", "image_top_p"):
        value = getattr(config, name)
        if value != getattr(GenerationConfig, name):
            raise ValueError(
                f"got {name} {value}, which is of image ids (Chameleon); this model denoises its images: leave it out"
            )


class Denoiser:
    """Makes images from noise.

    Args:
        model: weights of one type.
        process: what the model was trained with.
    """

    def __init__(self, model: Transfusion, process: NoiseProcess) -> None:
        self.model, self.process = model, process
        self.device = model.embedding.weight.device
        # states of the diffusion stay in fp32 at least
        self.dtype = torch.promote_types(model.embedding.weight.dtype, torch.float32)

    def check(self, config: GenerationConfig) -> None:
        """Raise ValueError for settings that cannot be met."""
        check_settings(self.process, config)

    def content(self, latents: Tensor) -> Content:
        """What a clean image (C, h, w) is in a row."""
        return [latents]

    def kind(self, config: GenerationConfig) -> Hashable:
        """Rows of one kind are denoised together."""
        return config.sampler, config.num_inference_steps

    def make(self, cache: KVCache, hidden: Tensor, rows: list[Sample]) -> tuple[Tensor, list[Content]]:
        """Images (R, C, h, w) for rows of one kind, and what is still to be written of them before EOI.

        The cache ends in BOI; it holds the rows, then the null rows of the guided ones, and so do the contents.
        """
        config = rows[0].request.config
        x_0 = self._denoise(cache, rows, Sampler(self.process, config.sampler, config.num_inference_steps))
        guided = [r for r, row in enumerate(rows) if row.null is not None]
        return x_0, [[latents] for latents in [*x_0, *x_0[guided]]]

    def _denoise(self, cache: KVCache, rows: list[Sample], sampler: Sampler) -> Tensor:
        """From noise to x_0 (R, C, h, w); the cache holds the rows, then the null rows of the guided ones."""
        shape = self.model.latent_shape
        draws = [generator("image", row.request.seed, row.sample, row.num_images) for row in rows]
        x_t = torch.stack([torch.randn(shape, generator=g) for g in draws]).to(self.device, self.dtype)
        R = len(rows)
        guided = torch.tensor([r for r, row in enumerate(rows) if row.null is not None], dtype=torch.long)
        scales = self._guidance_scales([rows[r].request.config for r in guided.tolist()], sampler.timesteps)
        needed = (scales != 1).any(1).tolist()  # at which steps
        scales, guided = scales.to(self.device, x_t.dtype)[:, :, None, None, None], guided.to(self.device)

        own = torch.arange(R, device=self.device)
        images, view = torch.cat([own, guided]), self._image_view(cache)  # whose image a row of the cache denoises
        alone = view if all(needed) or not len(guided) else self._image_view(cache.first(R))
        both = Replayed(lambda x_t, timesteps: self._predict(x_t, timesteps, images, view))
        unguided = Replayed(lambda x_t, timesteps: self._predict(x_t, timesteps, own, alone))
        for index, timestep in enumerate(sampler.timesteps):
            timesteps = torch.full((R,), timestep, device=self.device, dtype=x_t.dtype)
            if needed[index]:
                output = both(x_t, timesteps)
                output, null = output[:R], output[R:]
                # classifier-free guidance (Ho & Salimans 2022, eq. 6, with scale = 1 + w)
                output = output.index_copy(0, guided, null + scales[index] * (output[guided] - null))
            else:
                output = unguided(x_t, timesteps)
            x_t = sampler.step(output, index, x_t, draws)
        return x_t

    def _guidance_scales(self, configs: list[GenerationConfig], timesteps: list[float]) -> Tensor:
        """(steps, G): 1 = none, outside of a row's interval (arXiv 2404.07724)."""
        scale = torch.tensor([config.guidance_scale for config in configs], dtype=torch.float64)
        intervals = torch.tensor([config.guidance_interval for config in configs], dtype=torch.float64).view(-1, 2)
        times = torch.tensor(timesteps, dtype=torch.float64)[:, None] / self.process.num_train_timesteps  # (steps, 1)
        inside = (intervals[:, 0] <= times) & (times <= intervals[:, 1])
        return torch.where(inside, scale, 1.0)

    def _image_view(self, cache: KVCache) -> CacheView:
        """Of one image behind what each row has; its noisy patches stand behind the longest row."""
        return cache.view(
            self.model.seen_together(cache.lengths[:, None].expand(-1, self.model.num_patches)), write=False
        )

    def _predict(self, x_t: Tensor, timesteps: Tensor, images: Tensor, view: CacheView) -> Tensor:
        """What the network says of (R, C, h, w), the image `images[n]` of them behind row n of the cache."""
        patches, skip = self.model.patch_encoder(x_t, timesteps)  # (R, P, D); knows no text: once for both its rows
        hidden = self.model.transformer(patches[images], rotary_positions(self.model, view.index), cache=view)
        output = self.model.patch_decoder(hidden, tuple(part[images] for part in skip), timesteps[images])
        return output.to(x_t.dtype)
