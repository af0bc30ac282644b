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

from tfusion.bench.peer import PACKAGE, Peer
from tfusion.bench.setting import Sizes, in_turn, median, parameters_of, parser, prompts_of, ready_to_generate, sizes_of
from tfusion.requests import GenerationConfig


def measure(sizes: Sizes, nfe: int, guidance: float, prompt_len: int, with_peer: bool) -> dict[str, Any]:
    """The JSON object."""
    config = GenerationConfig(sampler="euler", num_inference_steps=nfe, guidance_scale=guidance)
    module = ready_to_generate(sizes, 1 + prompt_len + 2 + sizes.num_patches, config)
    texts, ids = prompts_of(sizes.batch, prompt_len)
    requests = [{"segments": [text], "generate": "image", "seed": n} for n, text in enumerate(texts)]
    evaluations: list[None] = []  # a bf16 copy of the model keeps its hooks
    module.model.patch_decoder.register_forward_pre_hook(lambda *_: evaluations.append(None))

    calls = {"ours": lambda: module.generate(requests)}
    peer = Peer(sizes) if with_peer else None
    if peer is not None:
        calls |= peer.samplers(ids, nfe, guidance)
    times = in_turn(calls, sizes.rounds, sizes.warmup)
    ours = _figures(times.pop("ours"), sizes.batch)
    result = sizes.report() | {
        "prompt_len": prompt_len,
        "guidance": guidance,
        "nfe": len(evaluations) // (sizes.rounds + sizes.warmup),
        **ours,
        "params": parameters_of(module.model),
    }
    if peer is None:
        return result
    samplers = {name: _figures(t, sizes.batch) | {"calls": peer.calls[name]} for name, t in times.items()}
    best = min(samplers, key=lambda name: samplers[name]["s_per_image"])
    fastest = min(figures["fastest_s_per_image"] for figures in samplers.values())
    return result | {
        "peer": {"package": PACKAGE, "params": parameters_of(peer.model), "best": best, **samplers},
        "ratio": samplers[best]["s_per_image"] / ours["s_per_image"],
        "ratio_of_fastest": fastest / ours["fastest_s_per_image"],
    }


def _figures(times: list[float], images: int) -> dict[str, float]:
    return {"s_per_image": median(times) / images, "fastest_s_per_image": min(times) / images}


def main(args: list[str] | None = None) -> None:
    made = parser(__doc__, batch=1, dtype="fp32", rounds=5, warmup=1)
    made.add_argument("--nfe", type=int, default=50, help="network evaluations an image")
    made.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance; 1 = off")
    made.add_argument("--prompt-len", type=int, default=32, help="text ids before the image")
    options = made.parse_args(args)
    result = measure(sizes_of(options), options.nfe, options.guidance, options.prompt_len, options.peer)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
