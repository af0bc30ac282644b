"""Which way of masked attention is the fastest here, and does `attend` choose it? Prints one JSON line a measurement.

    python -m tfusion.bench.attention
    python -m tfusion.bench.attention --dtypes bf16 --seq-lens 291 512 --rounds 21

One attention of one layer, under the mask of packed rows in which captioned images and texts alternate
(`bench/packed.py`, `training_mask`), for each type and length, `forward` without gradients and `forward+backward`:

- `sdpa_bool`, `sdpa_added`: SDPA with a bool mask, and with 0 or -inf that is added to the scores.
- `written_out`, `written_out_compiled`: matmul, softmax, matmul (`models/attention.py`), eager and compiled.
- `flex`: flex attention with a block mask, compiled; on CUDA only (it has no backward on a CPU).

`s` is the median, `fastest_s` the least of the rounds, in which all ways are timed in turn. `products_s` is the
median of the matrix products alone over the whole square, two forward and four backward; flex, which leaves out blocks
that nobody sees, may take less. `over_products` and `over_best` are `s` over it and over the least `s` of all ways.
`chosen` says whether this is what `attend` takes in training, or without gradients, of such a row; a compiled model
compiles what is chosen, so `written_out` is then chosen of both. `seen` is the share of the square that the mask shows.
Rows: as many as make up `--positions`, at least one.

Legend: B rows, T positions, H heads, K head dim.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode

from tfusion.bench.packed import packed_batch
from tfusion.bench.setting import DEVICE, in_turn, median
from tfusion.models.attention import Mask, _explicit, attend, training_mask
from tfusion.models.flops import attention_flops, attention_share
from tfusion.sequence import Batch

Way = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, H, T, K) three times -> (B, H, T, K)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "forward+backward")
LATENT_SHAPE, PATCH_SIZE = (3, 64, 64), 4  # 256 patches
COMPILED = {"written_out": ("written_out", "written_out_compiled")}  # what a choice of `attend` may become


def ways_of(masks: dict[str, Mask], compiled: bool = True) -> dict[str, Way]:
    """Each way that can be had on the device, given its `masks_of`."""
    seen, added = masks["bool"], masks["added"]
    found: dict[str, Way] = {
        "sdpa_bool": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen),
        "sdpa_added": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=added),
        "written_out": lambda q, k, v: _explicit(q, k, v, added),
    }
    if compiled:
        torch.compiler.reset()  # each length and type compiles anew, and more than eight would not be compiled at all
        written_out = torch.compile(_explicit, dynamic=False)
        found["written_out_compiled"] = lambda q, k, v: written_out(q, k, v, added)
        if "flex" in masks:
            found["flex"] = lambda q, k, v: attend(q, k, v, masks["flex"])
    return found


def masks_of(batch: Batch, dtype: torch.dtype) -> dict[str, Mask]:
    """The same mask as each way takes it: (B, 1, T, T) bool, the same added, a block mask on CUDA."""
    rule = (batch.document_ids, batch.image_ids, batch.hidden)
    added = training_mask(*rule, backend="sdpa")
    masks: dict[str, Mask] = {"bool": added == 0, "added": added.to(dtype)}
    return masks | ({"flex": training_mask(*rule, backend="flex")} if DEVICE.type == "cuda" else {})


class _Calls(TorchFunctionMode):
    """Names of the torch functions that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def choice_of_attend(inputs: Sequence[Tensor], mask: Mask, backward: bool) -> str:
    """What `attend` does with these; a `training_mask` is a block mask on CUDA, else added."""
    if isinstance(mask, BlockMask):
        return "flex"
    with _Calls() as calls, torch.set_grad_enabled(backward):
        attend(*(x.detach().requires_grad_(backward) for x in inputs), mask)
    return "sdpa_added" if "scaled_dot_product_attention" in calls.names else "written_out"


def one_call(way: Way, inputs: Sequence[Tensor], upstream: Tensor, backward: bool) -> Callable[[], None]:
    """What is timed."""
    leaves = [x.detach().requires_grad_(backward) for x in inputs]

    def call() -> None:
        with torch.set_grad_enabled(backward):
            out = way(*leaves)
            if backward:
                torch.autograd.grad(out, leaves, upstream)

    return call


def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Both products and nothing between them; the backward has the other four."""
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))  # (B H, T, K)
    return torch.bmm(torch.bmm(query, key.transpose(1, 2)), value)


def measure(seq_len: int, dtype: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The lines of one length and type."""
    rows = max(1, options.positions // seq_len)
    batch = packed_batch(rows, seq_len, LATENT_SHAPE, PATCH_SIZE).to(DEVICE)
    draws = torch.Generator().manual_seed(0)
    shape = (rows, options.heads, seq_len, options.head_dim)
    *inputs, upstream = (torch.randn(shape, generator=draws).to(DEVICE, DTYPES[dtype]) for _ in range(4))
    masks = masks_of(batch, DTYPES[dtype])
    setting = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": dtype,
        "rows": rows,
        "seq_len": seq_len,
        "images_a_row": len(batch.image_valid) // rows,
        "heads": options.heads,
        "head_dim": options.head_dim,
        "seen": attention_share(batch),
    }
    for name in PASSES:
        backward = name == PASSES[1]
        ways = ways_of(masks, not options.eager)
        alone = one_call(lambda q, k, v: products(q, k, v).view(shape), inputs, upstream, backward)
        calls = {way: one_call(function, inputs, upstream, backward) for way, function in ways.items()}
        times = in_turn(calls | {"products": alone}, options.rounds, options.warmup)
        products_s = median(times.pop("products"))
        best = min(map(median, times.values()))
        choice = choice_of_attend(inputs, masks.get("flex", masks["added"]), backward)
        flops = rows * attention_flops(seq_len, seq_len, options.heads * options.head_dim) * (3 if backward else 1)
        for way, taken in times.items():
            s = median(taken)
            yield setting | {
                "pass": name,
                "way": way,
                "chosen": way in COMPILED.get(choice, (choice,)),
                "s": s,
                "fastest_s": min(taken),
                "products_s": products_s,
                "over_products": s / products_s,
                "over_best": s / best,
                "flops": flops,
            }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[291, 512, 1024, 2048, 4096], help="positions a row")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--positions", type=int, default=2336, help="in all rows together, about; 8 rows of 291")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=11, help="timed; medians are reported")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before, not timed")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--eager", action="store_true", help="leave out the ways that are compiled")
    options = parser.parse_args(args)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        for dtype in options.dtypes:
            for seq_len in options.seq_lens:
                for line in measure(seq_len, dtype, options):
                    sys.stdout.write(json.dumps(line) + "\n")
                    sys.stdout.flush()
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
