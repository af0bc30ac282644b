"""How long does an image take? Prints one JSON object.

    python -m tfusion.bench.sampling --dim 384 --layers 6 --heads 8 --vocab 256 --image-side 16 --patch-dim 48 \\
        --nfe 50 --guidance 3 --prompt-len 32 --batch 1 --dtype fp32 --peer

- `s_per_image`: median seconds from request to picture, over the images of a batch; the sampler is Euler's.
- `nfe`: evaluations of the network an image, as counted; with guidance the conditional and the null prompt are
  evaluated at each (ours together, the peer's one after the other).
- `--peer`: transfusion-pytorch in turn, each of its three samplers; `ratio` is that of the fastest of them to ours.

Ours is `TransfusionModule.generate`; in bf16 it runs on one bf16 copy of the weights, made within what is timed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from tfusion.bench.peer import PACKAGE, Peer
from tfusion.bench.setting import Sizes, in_turn, median, parameters_of, parser, prompts_of, ready_to_generate, sizes_of
from tfusion.requests import GenerationConfig


def measure(sizes: Sizes, nfe: int, guidance: float, prompt_len: int, with_peer: bool) -> dict[str, Any]:
    """The JSON object."""
    config = GenerationConfig(sampler="euler", num_inference_steps=nfe, guidance_scale=guidance)
    module = ready_to_generate(sizes, 1 + prompt_len + 2 + sizes.num_patches, config)
    texts, ids = prompts_of(sizes.batch, prompt_len)
    requests = [{"segments": [text], "generate": "image", "seed": n} for n, text in enumerate(texts)]
    evaluations = 0

    def count(*_: Any) -> None:
        nonlocal evaluations
        evaluations += 1

    hook = module.model.patch_decoder.register_forward_pre_hook(count)  # in fp32 the model itself generates
    calls = {"ours": lambda: module.generate(requests)}
    peer = Peer(sizes) if with_peer else None
    if peer is not None:
        calls |= peer.samplers(ids, nfe, guidance)
    times = in_turn(calls, sizes.rounds, sizes.warmup)
    hook.remove()
    return {}
