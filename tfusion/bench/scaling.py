"""What does a position cost in training, against all that it may depend on? Prints one JSON line a point.

    python -m tfusion.bench.scaling --plot scaling.png --table scaling.md
    python -m tfusion.bench.scaling --only T batch --most-positions 4096 --eager

A point is training steps (`Trainer.fit`: forward, backward, clipping, optimizer) on one batch of packed rows in which
captioned images of 64 patches and texts alternate (`bench/packed.py`). One thing changes along an axis:

- `T`: positions a row, 512 to 16,384, in as many rows as make up `--most-positions`.
- `images`: images a row of 2,048 positions.
- `batch`: rows at once, of 1,024.
- `size`: width, depth and heads.
- `processes`: 1 and 2, each with the same number of rows and one thread (DDP; gloo on a CPU).

`s_per_position` is the median of `step_s` over all positions of a step. `expected_s_per_position` is the law: the
model's FLOPs a position (`models/flops.py`; attention over the whole square, under flex attention over what the mask
shows), shared by the processes, and scaled to the time of the axis's first point. `over_expected` is the ratio of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import multiprocessing
from torch.utils.data import DataLoader

from tfusion.bench.layouts import be_quiet, become_rank, free_port
from tfusion.bench.packed import packed_batch
from tfusion.bench.scaling_report import draw, table
from tfusion.bench.setting import DEVICE, PRECISIONS, Sizes, median, our_module, parameters_of
from tfusion.bench.train_step import StepTimes
from tfusion.models.attention import backend_for
from tfusion.models.flops import attention_share, training_flops
from tfusion.sequence import Batch

AXES = {"T": "seq_len", "images": "images_a_row", "batch": "rows", "size": "params", "processes": "processes"}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
MODELS = ((128, 4, 2), (256, 6, 4), (384, 6, 8), (512, 8, 8))  # width, depth, heads


@dataclass(frozen=True)
class Point:
    """What is measured; `rows` are of each process, and None images about half of the positions."""

    seq_len: int = 1024
    images_a_row: int | None = None
    rows: int = 2
    dim: int = 256
    layers: int = 6
    heads: int = 4
    processes: int = 1

    @property
    def positions(self) -> int:
        """Of a step, in all processes."""
        return self.seq_len * self.rows * self.processes


@dataclass(frozen=True)
class Timing:
    """How each point is measured."""

    dtype: str
    compiled: bool
    rounds: int
    warmup: int


def points_of(axis: str, most_positions: int) -> list[Point]:
    """Along an axis, those of at most so many positions a step."""
    points = {
        "T": [Point(seq_len=length, rows=most_positions // length) for length in LENGTHS],
        "images": [Point(seq_len=2048, images_a_row=images, rows=1) for images in (1, 2, 4, 8, 16)],
        "batch": [Point(rows=rows) for rows in (1, 2, 4, 8, 16)],
        "size": [Point(dim=dim, layers=layers, heads=heads) for dim, layers, heads in MODELS],
        "processes": [Point(processes=processes) for processes in (1, 2)],
    }
    return [point for point in points[axis] if point.rows and point.positions <= most_positions]


def sizes_of(point: Point, timing: Timing) -> Sizes:
    """As the other benches have them: images are 8 x 8 patches of 4 x 4 pixels."""
    model = {"dim": point.dim, "layers": point.layers, "heads": point.heads, "vocab": 256}
    of_image = {"image_side": 8, "patch_dim": 48}
    how = {"dtype": timing.dtype, "threads": None, "rounds": timing.rounds, "warmup": timing.warmup}
    return Sizes(**model, **of_image, batch=point.rows, **how)


def batch_of(point: Point, sizes: Sizes) -> Batch:
    """The rows of one process."""
    return packed_batch(point.rows, point.seq_len, sizes.latent_shape, sizes.patch_size, point.images_a_row)


def step_times(point: Point, timing: Timing, rank: int = 0) -> list[float]:
    """Seconds of the steps after the warm-up, in which blocks are compiled."""
    sizes = sizes_of(point, timing)
    torch.compiler.reset()  # each shape compiles anew, and more than eight would not be compiled at all
    module = our_module(sizes, point.seq_len, compile_blocks=timing.compiled)
    batch = batch_of(point, sizes).to(torch.device(DEVICE.type, rank) if DEVICE.type == "cuda" else DEVICE)
    times, steps = StepTimes(lambda: None), timing.warmup + timing.rounds
    alone = point.processes == 1
    trainer = L.Trainer(
        accelerator=DEVICE.type,
        devices=1 if alone else point.processes,
        strategy="auto" if alone else DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True),
        precision=PRECISIONS[timing.dtype],
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[times],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
    return times.times[timing.warmup :]


def be_rank(rank: int, port: int, point: Point, timing: Timing, folder: Path) -> None:
    """One of the processes of a point; the first leaves its times in a file."""
    become_rank(rank, port, point.processes)
    times = step_times(point, timing, rank)
    if rank == 0:
        (folder / "times.json").write_text(json.dumps(times), encoding="utf-8")


def times_of_processes(point: Point, timing: Timing) -> list[float]:
    """`step_times` in fresh processes, also of one alone: with one thread each, they can be compared."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (free_port(), point, timing, Path(folder))
        multiprocessing.spawn(be_rank, arguments, nprocs=point.processes)  # raises if any fails
        return json.loads(Path(folder, "times.json").read_text("utf-8"))


def flops_a_position(point: Point, timing: Timing) -> float:
    """Model FLOPs of a step over its positions; processes change nothing."""
    sizes = sizes_of(point, timing)
    batch, model = batch_of(point, sizes), our_module(sizes, point.seq_len).model
    share = attention_share(batch) if backend_for(DEVICE.type) == "flex" else 1.0  # flex leaves out what nobody sees
    images, labels = len(batch.image_valid), int(batch.step_counts[0])
    flops = training_flops(model, point.rows, point.seq_len, labels, images, share)
    return flops / (point.rows * point.seq_len)


def measure(axis: str, points: list[Point], timing: Timing) -> Iterator[dict[str, Any]]:
    """The lines of one axis."""
    scale = None  # seconds a FLOP at the first point
    for point in points:
        times = times_of_processes(point, timing) if axis == "processes" else step_times(point, timing)
        step_s = median(times)
        each, flops = step_s / point.positions, flops_a_position(point, timing) / point.processes
        scale = each / flops if scale is None else scale
        sizes = sizes_of(point, timing)
        yield {
            "axis": axis,
            "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
            "threads": 1 if axis == "processes" else torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": timing.dtype,
            "compiled": timing.compiled,
            **dataclasses.asdict(point),
            "images_a_row": int(batch_of(point, sizes).image_valid.sum()) // point.rows,
            "params": parameters_of(our_module(sizes, point.seq_len).model),
            "positions": point.positions,
            "step_s": step_s,
            "fastest_step_s": min(times),
            "s_per_position": each,
            "flops_per_position": flops * point.processes,
            "expected_s_per_position": scale * flops,
            "over_expected": each / (scale * flops),
        }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(AXES), default=list(AXES), help="which axes")
    parser.add_argument("--most-positions", type=int, default=16384, help="a step, of all rows and processes")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="bf16", help="bf16: the trainer's bf16-mixed")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each point; medians are reported")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, not timed")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw measured and expected curves")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write a markdown table")
    options = parser.parse_args(args)
    for file in filter(None, (options.plot, options.table)):
        if not file.absolute().parent.is_dir():
            parser.error(f"got {file}, expected a file in a folder that exists")
    points = {axis: points_of(axis, options.most_positions) for axis in options.only}
    for axis, some in points.items():
        if len(some) < 2:
            parser.error(f"--most-positions {options.most_positions} leaves {len(some)} points of {axis}: raise it")
    if DEVICE.type == "cuda" and "processes" in points and torch.cuda.device_count() < 2:
        parser.error("one GPU, and the axis of processes needs two: give --only T images batch size")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    be_quiet()
    timing = Timing(options.dtype, not options.eager, options.rounds, options.warmup)
    lines = []
    for axis, some in points.items():
        for line in measure(axis, some, timing):
            lines.append(line)
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    if options.table is not None:
        options.table.write_text(table(lines), encoding="utf-8")
    if options.plot is not None:
        draw(lines, AXES, options.plot)


if __name__ == "__main__":
    main()
