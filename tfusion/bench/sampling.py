"""How long does an image take, and one evaluation of the network in it? Prints one JSON object.

    python -m tfusion.bench.sampling --dim 384 --layers 6 --heads 8 --vocab 256 --image-side 16 --patch-dim 48 \\
        --nfe 50 --guidance 3 --prompt-len 32 --batch 1 --dtype fp32 --peer

- `s_per_image`: median seconds from request to picture, over the images of a batch; the sampler is Euler's.
- `nfe`: evaluations of the network an image, as counted; with guidance the conditional and the null prompt are
  evaluated at each (ours together, the peer's one after the other).
- `evaluation_s`: median seconds from one evaluation of the batch to the next, both rows of each image with guidance;
  `forward_s`: of a plain forward of the same patches, without a cache (`evaluations.py`), in turn with the images;
  `evaluation_to_forward` is the first over the second, and `matmul_share` what the forward reaches of
  `matmul_flops_per_s`, the rate of a square product of the same type in the same run.
- `--peer`: two others in turn. `peer` is transfusion-pytorch, each of its three samplers, `ratio_to_peer` the seconds
  an image of the `best` of them over ours; `dit` is a `diffusers` DiT of the same size in its pipeline (`dit.py`: what
  differs), `ratio_to_dit` the same of it, `evaluation_ratio_to_dit` of one evaluation. Of medians, but `fastest_...`.

Ours is `TransfusionModule.generate` on a copy of the weights made within what is timed, in bf16 or (fp32 on a CPU) with
packed matrices. `--compile`: on one made before and compiled, and so is the forward beside it, as `predict` of many
samples has it; the others run as they come, uncompiled.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import patch

from tfusion.bench.dit import Dit
from tfusion.bench.evaluations import Evaluations, plain_forward_flops, plain_forwards
from tfusion.bench.flops import matmul_rate
from tfusion.bench.llama import DTYPES
from tfusion.bench.peer import PACKAGE, Peer
from tfusion.bench.setting import Sizes, in_turn, median, parameters_of, parser, prompts_of, ready_to_generate, sizes_of
from tfusion.generation import bf16_copy
from tfusion.models.packed_linear import can_be_packed
from tfusion.requests import GenerationConfig
from tfusion.samplers import Sampler
from tfusion.training.transfusion import TransfusionModule


def measure(
    sizes: Sizes, nfe: int, guidance: float, prompt_len: int, with_peer: bool, compiled: bool = False
) -> dict[str, Any]:
    """The JSON object.

    Args:
        sizes: of both models.
        nfe: evaluations an image.
        guidance: scale, 1 = off.
        prompt_len: ids before the image.
        with_peer: time the others, too.
        compiled: what generates is made before, and compiled.

    Raises:
        ValueError: fewer than 2 evaluations.
    """
    if nfe < 2:
        raise ValueError(f"got --nfe {nfe}, expected at least 2: an evaluation is timed from one to the next")
    config = GenerationConfig(sampler="euler", num_inference_steps=nfe, guidance_scale=guidance)
    module = ready_to_generate(sizes, 1 + prompt_len + 2 + sizes.num_patches, config)
    texts, ids = prompts_of(sizes.batch, prompt_len)
    requests = [{"segments": [text], "generate": "image", "seed": n} for n, text in enumerate(texts)]
    evaluations = Evaluations()
    packed = sizes.dtype == "fp32" and can_be_packed(module.model)
    if compiled:
        module.compile_blocks = True
        module.hold_generation_model()
        [model] = module._held
    else:
        model = bf16_copy(module.model) if sizes.dtype == "bf16" else module._generation_model()
    rows = sizes.batch * (1 if guidance == 1 else 2)
    forwards = plain_forwards(model, sizes.batch, rows, nfe, evaluations.mark)

    calls = {
        "ours": evaluations.watch("ours", lambda: _generate(module, requests, evaluations)),
        "forward": evaluations.watch("forward", forwards),
    }
    if with_peer:
        peer, beside = Peer(sizes), Dit(sizes)
        dit_evaluations = Evaluations()
        beside.model.register_forward_pre_hook(dit_evaluations.mark)
        samplers = peer.samplers(ids, nfe, guidance)
        calls |= samplers | {"dit": dit_evaluations.watch("dit", beside.sampler(nfe, guidance))}
    times = in_turn(calls, sizes.rounds, sizes.warmup)
    evaluation_s, forward_s = (evaluations.seconds(name, sizes.warmup) for name in ("ours", "forward"))
    rate = matmul_rate(DTYPES[sizes.dtype])
    result = sizes.report() | {
        "compiled": compiled,
        "packed": packed,
        "prompt_len": prompt_len,
        "guidance": guidance,
        "nfe": evaluations.counts["ours"],
        **_figures(times["ours"], sizes.batch),
        "evaluation_s": evaluation_s,
        "forward_s": forward_s,
        "evaluation_to_forward": evaluation_s / forward_s,
        "params": parameters_of(module.model),
        "matmul_flops_per_s": rate,
        "matmul_share": plain_forward_flops(model, sizes.batch, rows) / forward_s / rate,
    }
    if not with_peer:
        return result
    ways = {name: _figures(times[name], sizes.batch) | {"calls": peer.calls[name]} for name in samplers}
    best = min(ways, key=lambda name: ways[name]["s_per_image"])
    result["peer"] = {"package": PACKAGE, "params": parameters_of(peer.model), "best": best, **ways}
    result["dit"] = beside.about | {
        "calls": dit_evaluations.counts["dit"],
        **_figures(times["dit"], sizes.batch),
        "evaluation_s": dit_evaluations.seconds("dit", sizes.warmup),
    }
    fastest = {"fastest_s_per_image": min(figures["fastest_s_per_image"] for figures in ways.values())}
    result |= _ratios(result, ways[best] | fastest, "peer") | _ratios(result, result["dit"], "dit")
    return result | {"evaluation_ratio_to_dit": result["dit"]["evaluation_s"] / evaluation_s}


def _generate(module: TransfusionModule, requests: list[dict[str, Any]], evaluations: Evaluations) -> None:
    """Noted at the sampler's steps: what is replayed as a CUDA graph runs no hooks."""
    step = Sampler.step
    with patch.object(Sampler, "step", lambda *args: evaluations.mark() or step(*args)):
        module.generate(requests)


def _figures(times: list[float], images: int) -> dict[str, float]:
    return {"s_per_image": median(times) / images, "fastest_s_per_image": min(times) / images}


def _ratios(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> dict[str, float]:
    return {
        f"ratio_to_{name}": theirs["s_per_image"] / ours["s_per_image"],
        f"fastest_ratio_to_{name}": theirs["fastest_s_per_image"] / ours["fastest_s_per_image"],
    }


def main(args: list[str] | None = None) -> None:
    made = parser(__doc__, batch=1, dtype="fp32", rounds=5, warmup=1)
    made.add_argument("--nfe", type=int, default=50, help="network evaluations an image")
    made.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance; 1 = off")
    made.add_argument("--prompt-len", type=int, default=32, help="text ids before the image")
    made.add_argument("--compile", action="store_true", help="what generates is made before and compiled")
    options = made.parse_args(args)
    result = measure(
        sizes_of(options), options.nfe, options.guidance, options.prompt_len, options.peer, options.compile
    )
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
