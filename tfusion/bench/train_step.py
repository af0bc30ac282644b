"""How long does a training step take? Prints one JSON object.

    python -m tfusion.bench.train_step --dim 384 --layers 6 --heads 8 --vocab 256 --text-len 32 --image-side 16 \\
        --patch-dim 48 --batch 8 --dtype bf16 --peer

- `step_s`: median seconds of forward, backward, clipping and optimizer step, inside Lightning's own loop.
- `positions`, `tokens_per_s`: of a step, all of them: text, patches, special ids. No padding.
- `params`, and `matmul_share`: model FLOPs (`models/flops.py`: what is counted) / step_s / the rate of a square
  product of the same type, measured in the same run.
- `--peer`: the same samples by transfusion-pytorch, one of its steps after each of ours. `ratio` is the smaller of
  `tokens_ratio` and `samples_ratio`, so that neither side's special ids count in its favour; all of medians, but
  `ratio_of_fastest`.
- `--trace FILE`: writes a profile of a few more steps that chrome://tracing and Perfetto show, and adds to the JSON
  where the seconds of a step go (`trace`; `bench/trace.py`).

Ours is a `Trainer.fit` of `TransfusionModule` in `bf16-mixed` (or fp32), batches made before. Its blocks are compiled,
within the warm-up, unless `--eager` is given; the peer's loop is not, as its package has it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tfusion.bench.flops import matmul_rate
from tfusion.bench.peer import PACKAGE, Peer
from tfusion.bench.setting import (
    DEVICE,
    PRECISIONS,
    Sizes,
    median,
    our_module,
    parameters_of,
    parser,
    seconds,
    sizes_of,
    wait,
)
from tfusion.bench.trace import Trace, check_file, named_kernels
from tfusion.models.flops import training_flops
from tfusion.models.patches import unpatchify
from tfusion.sequence import NUM_SPECIAL_IDS, Batch, Document, Image, RowShape, collate

LR = 3e-4
TRACED_STEPS = 3


def samples_of(sizes: Sizes, text_len: int) -> tuple[list[Tensor], Tensor]:
    """Texts of ids 0 ... vocab - 1, and images (batch, P, patch_dim): both sides' samples."""
    draws = torch.Generator().manual_seed(0)
    texts = [torch.randint(sizes.vocab, (text_len,), generator=draws) for _ in range(sizes.batch)]
    return texts, torch.randn(sizes.batch, sizes.num_patches, sizes.patch_dim, generator=draws)


def our_batch(sizes: Sizes, texts: Sequence[Tensor], patches: Tensor) -> Batch:
    """One document a row, rows of exactly that length."""
    latents = unpatchify(patches, sizes.latent_shape, sizes.patch_size)
    rows = [
        [Document(((text + NUM_SPECIAL_IDS).tolist(), Image(latent)))]
        for text, latent in zip(texts, latents, strict=True)
    ]
    shape = RowShape(rows[0][0].length(sizes.num_patches), sizes.num_patches, 1, sizes.latent_shape, None)
    return collate(rows, shape, [(0, row) for row in range(len(rows))])


class StepTimes(L.Callback):
    """Seconds of each training step, and something else done between them."""

    def __init__(self, between: Callable[[], None]) -> None:
        self.between, self.times = between, []

    def on_train_batch_start(self, *args: Any) -> None:
        wait()
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        wait()
        self.times.append(time.perf_counter() - self.start)
        self.between()


def measure(
    sizes: Sizes, text_len: int, with_peer: bool, trace_file: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """The JSON object; `settings` go to our module."""
    texts, patches = samples_of(sizes, text_len)
    batch = our_batch(sizes, texts, patches)
    rows, T = batch.token_ids.shape
    module = our_module(sizes, T, lr=LR, **settings)
    peer_times: list[float] = []
    peer = Peer(sizes) if with_peer else None
    if peer is not None:
        images = patches.view(sizes.batch, sizes.image_side, sizes.image_side, sizes.patch_dim)
        peer_step = peer.training_step(texts, images, LR)

    def between() -> None:
        if peer is not None and len(ours.times) <= timed:
            peer_times.append(seconds(peer_step))

    timed = sizes.warmup + sizes.rounds
    ours, trace = StepTimes(between), Trace(timed, TRACED_STEPS) if trace_file is not None else None
    steps = timed + (TRACED_STEPS if trace is not None else 0)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        precision=PRECISIONS[sizes.dtype],
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[ours] if trace is None else [ours, trace],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with named_kernels() if trace is not None else nullcontext():
        trainer.fit(module, DataLoader([batch.to(DEVICE)] * steps, batch_size=None))

    times = ours.times[sizes.warmup : timed]
    step_s, fastest = median(times), min(times)
    labels = int(batch.step_counts[0])
    flops = training_flops(module.model, rows, T, labels, rows)
    rate = matmul_rate(torch.bfloat16 if sizes.dtype == "bf16" else torch.float32)
    result = sizes.report() | {
        "compiled": module.compile_blocks,
        "text_len": text_len,
        "seq_len": T,
        "positions": rows * T,
        "step_s": step_s,
        "fastest_step_s": fastest,
        "tokens_per_s": rows * T / step_s,
        "samples_per_s": rows / step_s,
        "params": parameters_of(module.model),
        "step_flops": flops,
        "matmul_flops_per_s": rate,
        "matmul_share": flops / step_s / rate,
    }
    if peer is not None:
        result |= _beside(peer, peer_times[sizes.warmup :], result)
    if trace is not None:
        result["trace"] = {"file": str(trace_file)} | trace.write(trace_file)
    return result


def _beside(peer: Peer, times: list[float], ours: dict[str, Any]) -> dict[str, Any]:
    """The peer's figures, and ours over them."""
    step_s = median(times)
    theirs = {
        "package": PACKAGE,
        "seq_len": peer.positions // ours["batch"],
        "positions": peer.positions,
        "step_s": step_s,
        "fastest_step_s": min(times),
        "tokens_per_s": peer.positions / step_s,
        "samples_per_s": ours["batch"] / step_s,
        "params": parameters_of(peer.model),
    }
    tokens = ours["tokens_per_s"] / theirs["tokens_per_s"]
    samples = ours["samples_per_s"] / theirs["samples_per_s"]
    same_positions = min(1.0, ours["positions"] / peer.positions)
    fastest = theirs["fastest_step_s"] / ours["fastest_step_s"] * same_positions
    ratios = {"tokens_ratio": tokens, "samples_ratio": samples, "ratio": min(tokens, samples)}
    return {"peer": theirs} | ratios | {"ratio_of_fastest": fastest}


def main(args: list[str] | None = None) -> None:
    made = parser(__doc__, batch=8, dtype="bf16", rounds=10, warmup=3)
    made.add_argument("--text-len", type=int, default=32, help="text ids a sample")
    made.add_argument("--eager", action="store_true", help="do not compile the blocks")
    made.add_argument("--trace", type=Path, metavar="FILE", help="write a profile, .json or .json.gz")
    options = made.parse_args(args)
    if options.trace is not None:
        check_file(options.trace)
    result = measure(sizes_of(options), options.text_len, options.peer, options.trace, compile_blocks=not options.eager)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
