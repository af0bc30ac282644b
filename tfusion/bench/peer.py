"""`transfusion-pytorch` (extra `bench`), driven as its README says, at our sizes: the yardstick of the benches.

bf16 is autocast, since its forward fails with bf16 weights. Its image needs `add_pos_emb`: its rotary positions are
the same for all patches. It draws noise and times inside its step and from torch's global generator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from tfusion.bench.setting import DEVICE, Sizes
from tfusion.models.patches import patchify

PACKAGE = "transfusion-pytorch"


class Peer:
    """Its model, and what is timed of it. On CUDA it trains with its flex attention, which is the faster of its two.

    Attributes:
        positions: those its transformer ran at the last call, without what it read from a cache.
        calls: how often its transformer ran in the last call of each name.
    """

    def __init__(self, sizes: Sizes) -> None:
        try:
            from loguru import logger
            from transfusion_pytorch import Transfusion, transfusion
        except ImportError as error:
            raise SystemExit(f"{PACKAGE} is not installed: pip install 'tfusion[bench]'") from error
        logger.disable("transfusion_pytorch")
        transfusion.tqdm = functools.partial(transfusion.tqdm, disable=True)  # no progress bars among the JSON
        self.sizes, self.positions = sizes, 0
        self.calls: dict[str, int] = {}
        self.running = "train"
        self.model = Transfusion(
            num_text_tokens=sizes.vocab,
            dim_latent=sizes.patch_dim,
            modality_default_shape=(sizes.image_side, sizes.image_side),
            modality_num_dim=2,
            add_pos_emb=True,
            odeint_kwargs={"method": "euler"},
            transformer={
                "dim": sizes.dim,
                "depth": sizes.layers,
                "heads": sizes.heads,
                "dim_head": sizes.dim // sizes.heads,
                "use_flex_attn": DEVICE.type == "cuda",
            },
        ).to(DEVICE)
        self.model.transformer.register_forward_pre_hook(self._count)

    def _count(self, transformer: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.calls[self.running] = self.calls.get(self.running, 0) + 1
        self.positions = args[0].shape[0] * args[0].shape[1]

    def training_step(self, samples: list[list[torch.Tensor]], lr: float) -> Callable[[], None]:
        """Forward, backward, clip and optimizer step over samples of texts (n,) and images (C, h, w) in turn."""
        samples = [[self._part(part) for part in sample] for sample in samples]
        # fused, as ours: its README says no more than "AdamW"
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)

        def step() -> None:
            with self._autocast():
                loss = self.model(samples)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _part(self, part: torch.Tensor) -> torch.Tensor:
        """A text as it is; of an image its patches (S, S, patch_dim)."""
        if part.ndim > 1:
            side, dim = self.sizes.image_side, self.sizes.patch_dim
            part = patchify(part[None], self.sizes.patch_size)[0].view(side, side, dim)
        return part.to(DEVICE)

    def samplers(self, prompts: list[torch.Tensor], nfe: int, guidance: float) -> dict[str, Callable[[], Any]]:
        """Its three ways to one image a prompt, each with `nfe` evaluations of the conditional network."""
        side = self.sizes.image_side
        settings = {
            "force_modality_at_start": (0, (side, side)),
            "modality_steps": nfe + 1,  # points of the ODE's grid
            "max_length": side**2 - 1,  # ends behind the image
            "cfg_scale": guidance,
        }
        prompts = [prompt.to(DEVICE) for prompt in prompts]
        model = self.model.eval()
        calls = {
            "sample_one": lambda: [model.sample_one(p, **settings) for p in prompts],
            "sample_one_cached": lambda: [model.sample_one(p, cache_kv=True, **settings) for p in prompts],
            "sample_many": lambda: model.sample_many(list(prompts), **settings),
        }
        return {name: self._counted(name, call) for name, call in calls.items()}

    def text(self, prompts: torch.Tensor, num_tokens: int) -> Callable[[], Any]:
        """Greedy text with its cache, behind prompts (R, n)."""
        model, prompts = self.model.eval(), prompts.to(DEVICE)
        length = prompts.shape[1] + num_tokens
        return self._counted("text", lambda: model.generate_text_only(prompts, length, temperature=0.0, cache_kv=True))

    def _counted(self, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            self.running, self.calls[name] = name, 0
            with torch.no_grad(), self._autocast():
                return call()

        return run

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=self.sizes.dtype == "bf16")
