"""Do ranks, strategies, micro-batches and workers change a loss? Prints a markdown table.

    python -m tfusion.bench.layouts --steps 20

A small model learns shapes and Shakespeare in fp32 on the CPU, once in one process and once in each layout of two
processes (gloo), always with the same rows a step. In most steps the ranks hold unequal numbers of labels and of
images, so that a mean of the ranks' means would differ by up to a half. Shown is the largest relative difference,
over all steps, of text loss, diffusion loss and gradient norm from those of one process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import multiprocessing

from tfusion.callbacks.ema import EMA
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.data.shakespeare import Shakespeare
from tfusion.data.shapes import Shapes
from tfusion.models.transfusion import Transfusion
from tfusion.training.transfusion import TransfusionModule

RANKS = 2
COLUMNS = ("train/text_loss", "train/diffusion_loss", "train/grad_norm")
LAYOUTS = [*product(("DDP", "FSDP2"), (1, 2), (0, 2))]  # strategy, micro-batches a step, workers


class Recorder(L.Callback):
    """Keep what is compared, of each step."""

    def __init__(self) -> None:
        self.steps: dict[int, list[float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step not in self.steps and not trainer.fit_loop._should_accumulate():
            metrics = pl_module.step_metrics()
            self.steps[trainer.global_step] = [metrics[name] for name in COLUMNS]


def train(steps: int, strategy: str = "auto", micro_batches: int = 1, workers: int = 0) -> list[list[float]]:
    """The losses of each step."""
    strategies = {
        "auto": lambda: "auto",
        "DDP": lambda: DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True),
        "FSDP2": lambda: ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=False),
    }
    model = Transfusion(261, (3, 32, 32), patch_size=8, dim=128, num_layers=3, num_heads=4, max_seq_len=128)
    module = TransfusionModule(model, FlowMatchEulerDiscreteScheduler(), prediction_type="sample", warmup_steps=5)
    # (261: the special ids and the bytes)
    data = MultimodalDataModule(
        [Shapes(32, num_images=1000)],
        [Shakespeare()],
        vocab_size=261,
        seq_len=128,
        rows_per_step=8,
        num_workers=workers,
    )
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else RANKS,
        strategy=strategies[strategy](),
        accumulate_grad_batches=micro_batches,
        max_steps=steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        callbacks=[EMA(0.99), recorder],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return list(recorder.steps.values())


def be_rank(rank: int, port: int, steps: int, folder: Path) -> None:
    """One of two processes: train in all layouts, and leave their losses in a file."""
    become_rank(rank, port, RANKS)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, which would import all of this again
    for number, layout in enumerate(LAYOUTS):
        losses = train(steps, *layout)
        if rank == 0:
            (folder / f"{number}.json").write_text(json.dumps(losses), encoding="utf-8")


def become_rank(rank: int, port: int, ranks: int) -> None:
    """Let this process be one of several with a thread each, as torchrun would start it."""
    be_quiet()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "layouts"}
    torch.set_num_threads(1)


def free_port() -> int:
    """A port of this machine at which the ranks can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def be_quiet() -> None:
    """Show errors alone, not what Lightning says of each fit."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "tfusion"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args(args).steps
    be_quiet()
    one = torch.tensor(train(steps), dtype=torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(be_rank, (free_port(), steps, Path(folder)), nprocs=RANKS)  # raises if either fails
        losses = [json.loads(Path(folder, f"{number}.json").read_text("utf-8")) for number in range(len(LAYOUTS))]
    lines = [
        "| processes | strategy | micro-batches | workers | largest relative difference |",
        "|---|---|---|---|---|",
        "| 1 | - | 1 | 0 | 0 |",
    ]
    for (strategy, micro_batches, workers), found in zip(LAYOUTS, losses, strict=True):
        difference = ((torch.tensor(found, dtype=torch.float64) - one) / one).abs().max().item()
        lines.append(f"| {RANKS} | {strategy} | {micro_batches} | {workers} | {difference:.1e} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
