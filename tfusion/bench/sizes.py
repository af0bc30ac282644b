"""The paper's sizes on an accelerator: a training step of each, in several ways. Prints one JSON line a measurement.

    python -m tfusion.bench.sizes --table sizes.md
    python -m tfusion.bench.sizes --only 0.76b --ways flex sdpa text peer --trace trace.json.gz

Rows of 4,096 positions as training packs them, captioned images of 256 patches and texts in turn (`bench/packed.py`),
vocabulary 32,000, bf16-mixed. The ways (each line is one of `bench/train_step.py`, which says what its figures are):

- `flex`, `sdpa`: the attention; blocks compiled. `flex_eager`, `sdpa_eager`: not compiled.
- `text`: a model of text alone on as many rows of it, flex attention, compiled.
- `peer`: `flex` beside transfusion-pytorch at equal width, depth and heads, in turn, of one row each.

The widths, depths and heads are those of Table 2; of 7B 4 of its 32 layers. What does not fit into memory is a line
that says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tfusion.bench.scaling_report import table
from tfusion.bench.setting import DEVICE, Sizes
from tfusion.bench.train_step import Rows, measure

SIZES = {  # width, depth, heads
    "0.16b": (768, 16, 12),
    "0.37b": (1024, 24, 16),
    "0.76b": (1536, 24, 24),
    "1.4b": (2048, 24, 16),
    "7b_slice": (4096, 4, 32),
}
WAYS: dict[str, dict[str, Any]] = {
    "flex": {},
    "sdpa": {"attention": "sdpa"},
    "flex_eager": {"compiled": False},
    "sdpa_eager": {"attention": "sdpa", "compiled": False},
    "text": {"text_only": True},
    "peer": {"peer": True},
}
COLUMNS = {  # of a line -> how it is headed and written
    "size": ("size", "{}"),
    "way": ("way", "{}"),
    "params": ("parameters", "{:,}"),
    "batch": ("rows", "{}"),
    "step_s": ("s a step", "{:.3f}"),
    "tokens_per_s": ("positions a second", "{:,.0f}"),
    "matmul_share": ("share of the matmul rate", "{:.3f}"),
    "step_bytes": ("GB of a step", "{:.1f}"),
    "tokens_ratio": ("over the peer", "{:.2f}"),
    "error": ("", "{}"),
}


def one(size: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """A line."""
    settings = {"attention": None, "compiled": True, "text_only": False, "peer": False} | WAYS[way]
    dim, layers, heads = SIZES[size]
    rows = 1 if settings["peer"] else options.rows
    model = {"dim": dim, "layers": layers, "heads": heads, "vocab": 32_000, "image_side": 16, "patch_dim": 48}
    how = {"batch": rows, "dtype": "bf16", "threads": None, "rounds": options.rounds, "warmup": options.warmup}
    torch.compiler.reset()  # each way compiles anew, and more than eight codes of a block would not be compiled at all
    found = measure(
        Sizes(**model, **how),
        Rows(0, options.seq_len, settings["text_only"]),
        settings["peer"],
        options.trace if way == "flex" else None,
        {"attention_backend": settings["attention"], "activation_checkpointing": options.checkpointing},
        compile_blocks=settings["compiled"],
    )
    return {"size": size, "way": way} | found


def line_of(size: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """`one`, or why there is none."""
    try:
        return one(size, way, options)
    except torch.OutOfMemoryError as error:
        return {"size": size, "way": way, "error": str(error).split(". ")[0]}
    finally:
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def in_gigabytes(line: dict[str, Any]) -> dict[str, Any]:
    """A line for the table."""
    return line | ({"step_bytes": line["step_bytes"] / 1e9} if "step_bytes" in line else {})


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES), help="which sizes")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="which ways")
    parser.add_argument("--rows", type=int, default=4, help="at once; beside the peer always 1")
    parser.add_argument("--seq-len", type=int, default=4096, help="positions a row")
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"], default="none", help="of activations")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps; medians are reported")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, not timed")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a profile of the last `flex`, .json or .json.gz")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write a markdown table")
    options = parser.parse_args(args)
    for file in filter(None, (options.trace, options.table)):
        if not file.absolute().parent.is_dir():
            parser.error(f"got {file}, expected a file in a folder that exists")
    lines = []
    for size in options.only:
        for way in options.ways:
            lines.append(line_of(size, way, options))
            sys.stdout.write(json.dumps(lines[-1]) + "\n")
            sys.stdout.flush()
            if options.table is not None:
                options.table.write_text(table([in_gigabytes(line) for line in lines], COLUMNS), encoding="utf-8")


if __name__ == "__main__":
    main()
