"""`diffusers`' DiT of our trunk's size, sampled by its pipeline: what images are measured beside.

Same width, depth, heads and patches of the same pixels. It is another model: a class (1 of 1000) instead of a prompt,
so nothing stands before its patches; adaptive norms; a feed-forward of two matrices of 4 D, which costs what our three
of 8/3 D do. Its weights are of the type that is timed, made so before.

`DiTPipeline` is timed from classes to pictures, with DDIM (one evaluation a step) and pixels in place of latents; with
guidance it runs both rows of an image in one batch, as ours does. It is not compiled, beside ours with `--compile`
neither.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor

from tfusion.bench.setting import DEVICE, Sizes, parameters_of


class Pixels:
    """In place of the pipeline's autoencoder: the latents are the picture."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """(R, 3, H, W), as they are."""
        return SimpleNamespace(sample=latents)


class Dit:
    """The model in its pipeline, and what is timed of it.

    Attributes:
        about: which model it is, for the report.
    """

    def __init__(self, sizes: Sizes) -> None:
        channels, side, _ = sizes.latent_shape
        self.batch = sizes.batch
        self.model = DiTTransformer2DModel(
            num_attention_heads=sizes.heads,
            attention_head_dim=sizes.dim // sizes.heads,
            num_layers=sizes.layers,
            in_channels=channels,
            out_channels=channels,  # no learned variance
            sample_size=side,
            patch_size=sizes.patch_size,
        )
        self.model.to(DEVICE).eval()
        if sizes.dtype == "bf16":
            self.model.bfloat16()
        self.about = {
            "package": "diffusers",
            "version": diffusers.__version__,
            "params": parameters_of(self.model),
        }
        self.pipeline = DiTPipeline(self.model, Pixels(), DDIMScheduler())
        self.pipeline.set_progress_bar_config(disable=True)  # no progress bars among the JSON

    def sampler(self, nfe: int, guidance: float) -> Callable[[], Any]:
        """A batch of pictures of `nfe` evaluations."""
        classes = list(range(self.batch))
        settings = {"guidance_scale": guidance, "num_inference_steps": nfe}
        draws = torch.Generator(DEVICE)
        return lambda: self.pipeline(classes, generator=draws.manual_seed(0), **settings).images
