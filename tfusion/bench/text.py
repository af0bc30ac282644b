"""How fast is text written? Prints one JSON object.

    python -m tfusion.bench.text --dim 384 --layers 6 --heads 8 --vocab 256 --prompt-len 32 --new-tokens 128 --peer

- `tokens_per_s`: new tokens of all samples over the median seconds from request to text; greedy.
- `--peer`: transfusion-pytorch in turn, with its key-value cache; `ratio` is ours to its.

Ours is `TransfusionModule.generate`; in bf16 it runs on one bf16 copy of the weights, made within what is timed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tfusion.bench.peer import PACKAGE, Peer
from tfusion.bench.setting import Sizes, in_turn, median, parameters_of, parser, prompts_of, ready_to_generate, sizes_of
from tfusion.requests import GenerationConfig


def measure(sizes: Sizes, prompt_len: int, new_tokens: int, with_peer: bool) -> dict[str, Any]:
    """The JSON object."""
    config = GenerationConfig(max_new_tokens=new_tokens)
    module = ready_to_generate(sizes, 1 + prompt_len + new_tokens, config)
    texts, ids = prompts_of(sizes.batch, prompt_len)
    requests = [{"segments": [text], "generate": "text"} for text in texts]
    steps: list[None] = []  # a bf16 copy of the model keeps its hooks
    module.model.text_head.register_forward_pre_hook(lambda *_: steps.append(None))

    calls = {"ours": lambda: module.generate(requests)}
    peer = Peer(sizes) if with_peer else None
    if peer is not None:
        calls |= {"peer": peer.text(ids, new_tokens)}
    times = in_turn(calls, sizes.rounds, sizes.warmup)
    written = len(steps) // (sizes.rounds + sizes.warmup)  # by each sample: none ends before it must
    ours = _figures(times["ours"], sizes.batch * written)
    result = sizes.report() | {
        "prompt_len": prompt_len,
        "new_tokens": written,
        **ours,
        "params": parameters_of(module.model),
    }
    if peer is None:
        return result
    theirs = _figures(times["peer"], sizes.batch * new_tokens)
    return result | {
        "peer": {"package": PACKAGE, "params": parameters_of(peer.model), "calls": peer.calls["text"], **theirs},
        "ratio": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "ratio_of_fastest": ours["fastest_tokens_per_s"] / theirs["fastest_tokens_per_s"],
    }


def _figures(times: list[float], tokens: int) -> dict[str, float]:
    return {"tokens_per_s": tokens / median(times), "fastest_tokens_per_s": tokens / min(times)}


def main(args: list[str] | None = None) -> None:
    made = parser(__doc__, batch=1, dtype="fp32", rounds=5, warmup=1)
    made.add_argument("--prompt-len", type=int, default=32, help="text ids given")
    made.add_argument("--new-tokens", type=int, default=128, help="text ids written")
    options = made.parse_args(args)
    result = measure(sizes_of(options), options.prompt_len, options.new_tokens, options.peer)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
