"""How fast is text written? Prints one JSON object.

    python -m tfusion.bench.text --dim 384 --layers 6 --heads 8 --vocab 256 --prompt-len 32 --new-tokens 128 --peer

- `tokens_per_s`: new tokens of all samples over the median seconds from request to text; greedy.
- `one`: with a batch, its first request alone, in turn with all of them; `ratio_to_one`: what the batch gains.
- `matmul_flops_per_s`: the rate of a square product of the same type, measured in the same run.
- `--peer`: two others in turn, behind the same prompts. `peer` is transfusion-pytorch with its key-value cache,
  `ratio_to_peer` ours to its; `llama` is `transformers`' Llama of the same size with its static cache (`llama.py`), in
  eager mode and compiled, `ratio_to_llama` ours to the `best` of them. All of medians, but `fastest_...`.

Ours is `TransfusionModule.generate`, from characters to characters, on a copy of the weights made within what is timed,
in bf16 or (fp32 on a CPU) with packed matrices. `--compile`: on one made before and compiled. Of the others the ids are
given and taken, and a Llama in bf16 has its weights so before.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tfusion.bench.flops import matmul_rate
from tfusion.bench.llama import DTYPES, Llama
from tfusion.bench.peer import PACKAGE, Peer
from tfusion.bench.setting import Sizes, in_turn, median, parameters_of, parser, prompts_of, ready_to_generate, sizes_of
from tfusion.models.packed_linear import can_be_packed
from tfusion.requests import GenerationConfig


def measure(sizes: Sizes, prompt_len: int, new_tokens: int, with_peer: bool, compiled: bool = False) -> dict[str, Any]:
    """The JSON object."""
    config = GenerationConfig(max_new_tokens=new_tokens)
    module = ready_to_generate(sizes, 1 + prompt_len + new_tokens, config)
    texts, ids = prompts_of(sizes.batch, prompt_len)
    requests = [{"segments": [text], "generate": "text"} for text in texts]
    steps: list[None] = []  # a bf16 copy of the model keeps its hooks
    module.model.text_head.register_forward_pre_hook(lambda *_: steps.append(None))
    packed = sizes.dtype == "fp32" and can_be_packed(module.model)
    if compiled:
        module.compile_blocks = True
        module.hold_generation_model()

    ours = {"ours": requests} | ({"one": requests[:1]} if sizes.batch > 1 else {})
    calls = {name: lambda asked=asked: module.generate(asked) for name, asked in ours.items()}
    if with_peer:
        peer, beside = Peer(sizes), Llama(sizes, 1 + prompt_len + new_tokens)
        writers = beside.writers(ids, new_tokens)
        calls |= {"peer": peer.text(ids, new_tokens)} | writers
    times = in_turn(calls, sizes.rounds, sizes.warmup)
    written = len(steps) // (sizes.rounds + sizes.warmup) // len(ours)  # by each sample: none ends before it must
    result = sizes.report() | {
        "compiled": compiled,
        "packed": packed,
        "prompt_len": prompt_len,
        "new_tokens": written,
        **_figures(times["ours"], sizes.batch * written),
        "params": parameters_of(module.model),
        "matmul_flops_per_s": matmul_rate(DTYPES[sizes.dtype]),
    }
    if "one" in times:
        result["one"] = _figures(times["one"], written)
        result |= _ratios(result, result["one"], "one")
    if not with_peer:
        return result
    about = {"package": PACKAGE, "params": parameters_of(peer.model), "calls": peer.calls["text"]}
    result["peer"] = about | _figures(times["peer"], sizes.batch * new_tokens)
    ways = {n: _figures(times[n], sizes.batch * new_tokens) | {"calls": beside.calls[n]} for n in writers}
    best = max(ways, key=lambda name: ways[name]["tokens_per_s"])
    result["llama"] = beside.about | {"best": best, **ways}
    fastest = {"fastest_tokens_per_s": max(figures["fastest_tokens_per_s"] for figures in ways.values())}
    return result | _ratios(result, result["peer"], "peer") | _ratios(result, ways[best] | fastest, "llama")


def _figures(times: list[float], tokens: int) -> dict[str, float]:
    return {"tokens_per_s": tokens / median(times), "fastest_tokens_per_s": tokens / min(times)}


def _ratios(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> dict[str, float]:
    return {
        f"ratio_to_{name}": ours["tokens_per_s"] / theirs["tokens_per_s"],
        f"fastest_ratio_to_{name}": ours["fastest_tokens_per_s"] / theirs["fastest_tokens_per_s"],
    }


def main(args: list[str] | None = None) -> None:
    made = parser(__doc__, batch=1, dtype="fp32", rounds=5, warmup=1)
    made.add_argument("--prompt-len", type=int, default=32, help="text ids given")
    made.add_argument("--new-tokens", type=int, default=128, help="text ids written")
    made.add_argument("--compile", action="store_true", help="what generates is made before and compiled")
    options = made.parse_args(args)
    result = measure(sizes_of(options), options.prompt_len, options.new_tokens, options.peer, options.compile)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
