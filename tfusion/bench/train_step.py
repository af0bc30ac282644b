"""How long does a training step take? Prints one JSON object.

    python -m tfusion.bench.train_step --dim 384 --layers 6 --heads 8 --vocab 256 --text-len 32 --image-side 16 \\
        --patch-dim 48 --batch 8 --dtype bf16 --peer

    python -m tfusion.bench.train_step --dim 1536 --layers 24 --heads 24 --vocab 32000 --seq-len 4096 --batch 4

- A row is a text and an image, or with `--seq-len` as many captioned images and texts, packed, as make up so many
  positions, about half of them of images. `--text-only`: one text, for a model without images.
- `step_s`: median seconds of forward, backward, clipping and optimizer step, inside Lightning's own loop.
- `positions`, `tokens_per_s`: of a step, all of them: text, patches, special ids. No padding.
- `params`, and `matmul_share`: model FLOPs (`models/flops.py`: what is counted) / step_s / the rate of a square
  product of the same type, measured in the same run. Attention is counted over the whole square, under flex attention
  over what the mask shows of it, `attention_share`; `matmul_share_of_squares` has the whole of it in any case.
- `step_bytes`, on CUDA: the most allocated in a step above what stays between steps, which are weights and moments.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tfusion.bench.flops import matmul_rate
from tfusion.bench.packed import as_samples, packed_batch, text_batch
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
from tfusion.models.attention import backend_for
from tfusion.models.flops import attention_share, training_flops
from tfusion.models.patches import unpatchify
from tfusion.sequence import NUM_SPECIAL_IDS, Batch, Document, Image, RowShape, collate

LR = 3e-4
TRACED_STEPS = 3


def samples_of(sizes: Sizes, text_len: int) -> tuple[list[Tensor], Tensor]:
    """Texts of ids 0 ... vocab - 1, and images (batch, P, patch_dim): both sides' samples."""
    draws = torch.Generator().manual_seed(0)
    texts = [torch.randint(sizes.vocab, (text_len,), generator=draws) for _ in range(sizes.batch)]
    return texts, torch.randn(sizes.batch, sizes.num_patches, sizes.patch_dim, generator=draws)


@dataclass(frozen=True)
class Rows:
    """What a row is: a text of `text_len` ids and an image, or of `seq_len` positions."""

    text_len: int
    seq_len: int | None = None
    text_only: bool = False

    def batch(self, sizes: Sizes) -> Batch:
        if self.text_only:
            return text_batch(sizes.batch, self.seq_len, sizes.vocab)
        if self.seq_len is None:
            return our_batch(sizes, *samples_of(sizes, self.text_len))
        return packed_batch(sizes.batch, self.seq_len, sizes.latent_shape, sizes.patch_size, vocab=sizes.vocab)


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
    """Seconds of each training step, and something else done between them.

    Attributes:
        times: seconds.
        memory: bytes at most above those at the start, of each step; on CUDA.
    """

    def __init__(self, between: Callable[[], None]) -> None:
        self.between, self.times = between, []
        self.memory = StepBytes()

    def on_train_batch_start(self, *args: Any) -> None:
        wait()
        self.memory.start()
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        wait()
        self.times.append(time.perf_counter() - self.start)
        self.memory.stop()
        self.between()


class StepBytes:
    """The most that CUDA allocated at once in a step above what there was at its start."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def start(self) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def stop(self) -> None:
        if DEVICE.type == "cuda":
            self.found.append(torch.cuda.max_memory_allocated() - self.before)

    def report(self, warmup: int) -> dict[str, int]:
        return {"step_bytes": max(self.found[warmup:])} if self.found else {}


def measure(
    sizes: Sizes,
    rows: Rows,
    with_peer: bool,
    trace_file: Path | None = None,
    of_model: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The JSON object; `of_model` and `settings` go to our model and module."""
    batch = rows.batch(sizes)
    B, T = batch.token_ids.shape
    of_model = (of_model or {}) | ({"latent_shape": None, "patch_size": None} if rows.text_only else {})
    module = our_module(sizes, T, of_model, lr=LR, **settings)
    peer_times, peer_memory = list[float](), StepBytes()
    peer = Peer(sizes) if with_peer else None
    if peer is not None:
        peer_step = peer.training_step(as_samples(batch), LR)

    def between() -> None:
        if peer is not None and len(ours.times) <= timed:
            peer_memory.start()
            peer_times.append(seconds(peer_step))
            peer_memory.stop()

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

    if not module.step_sums.isfinite().all():
        raise RuntimeError("the losses of the last step are not finite: what was timed is no training")
    times = ours.times[sizes.warmup : timed]
    step_s, fastest = median(times), min(times)
    counted = (B, T, int(batch.step_counts[0]), len(batch.image_valid))
    backend = module.model.attention_backend or backend_for(DEVICE.type)
    share = attention_share(batch)
    of_squares = training_flops(module.model, *counted)
    flops = training_flops(module.model, *counted, share) if backend == "flex" else of_squares
    rate = matmul_rate(torch.bfloat16 if sizes.dtype == "bf16" else torch.float32)
    result = (
        sizes.report()
        | {
            "compiled": module.compile_blocks,
            "attention": backend,
            "checkpointing": module.model.transformer.activation_checkpointing,
            "text_only": rows.text_only,
            "images_a_row": int(batch.image_valid.sum()) // B,
            "seq_len": T,
            "positions": B * T,
            "step_s": step_s,
            "fastest_step_s": fastest,
            "tokens_per_s": B * T / step_s,
            "samples_per_s": B / step_s,
            "params": parameters_of(module.model),
            "step_flops": flops,
            "attention_share": share,
            "matmul_flops_per_s": rate,
            "matmul_share": flops / step_s / rate,
            "matmul_share_of_squares": of_squares / step_s / rate,
        }
        | ours.memory.report(sizes.warmup)
    )
    if peer is not None:
        result |= _beside(peer, peer_times[sizes.warmup :], peer_memory.report(sizes.warmup), result)
    if trace is not None:
        result["trace"] = {"file": str(trace_file)} | trace.write(trace_file)
    return result


def _beside(peer: Peer, times: list[float], memory: dict[str, int], ours: dict[str, Any]) -> dict[str, Any]:
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
    } | memory
    tokens = ours["tokens_per_s"] / theirs["tokens_per_s"]
    samples = ours["samples_per_s"] / theirs["samples_per_s"]
    same_positions = min(1.0, ours["positions"] / peer.positions)
    fastest = theirs["fastest_step_s"] / ours["fastest_step_s"] * same_positions
    ratios = {"tokens_ratio": tokens, "samples_ratio": samples, "ratio": min(tokens, samples)}
    return {"peer": theirs} | ratios | {"ratio_of_fastest": fastest}


def main(args: list[str] | None = None) -> None:
    made = parser(__doc__, batch=8, dtype="bf16", rounds=10, warmup=3)
    made.add_argument("--text-len", type=int, default=32, help="text ids a sample")
    made.add_argument("--seq-len", type=int, metavar="T", help="packed rows of so many positions in place of samples")
    made.add_argument("--text-only", action="store_true", help="rows of --seq-len, all text, for a model of text alone")
    made.add_argument("--attention", choices=["flex", "sdpa"], help="default: flex on CUDA, elsewhere SDPA")
    made.add_argument("--checkpointing", choices=["none", "selective", "full"], default="none", help="of activations")
    made.add_argument("--eager", action="store_true", help="do not compile the blocks")
    made.add_argument("--trace", type=Path, metavar="FILE", help="write a profile, .json or .json.gz")
    options = made.parse_args(args)
    if options.trace is not None:
        check_file(options.trace)
    if options.text_only and (options.peer or options.seq_len is None):
        made.error("--text-only has no --peer, and takes --seq-len: its rows are one text of so many positions")
    rows = Rows(options.text_len, options.seq_len, options.text_only)
    of_model = {"attention_backend": options.attention, "activation_checkpointing": options.checkpointing}
    compiled = not options.eager
    result = measure(sizes_of(options), rows, options.peer, options.trace, of_model, compile_blocks=compiled)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
