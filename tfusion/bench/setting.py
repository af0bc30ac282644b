"""What the three speed benches share: sizes from the command line, our module of that size, timing side by side.

An image is S x S patches of `patch_dim` = 3 k k numbers: pixels of 3 x kS x kS, patch side k, so that what is timed
is what `tfusion fit` and `generate` run. Text is bytes, so a prompt of n characters takes n positions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tfusion.models.transfusion import Transfusion
from tfusion.requests import GenerationConfig
from tfusion.sequence import NUM_SPECIAL_IDS
from tfusion.tokenizers import TextTokenizer
from tfusion.training.transfusion import TransfusionModule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}  # the trainer's


@dataclass(frozen=True)
class Sizes:
    """Of both models, and how both are timed."""

    dim: int
    layers: int
    heads: int
    vocab: int
    image_side: int
    patch_dim: int
    batch: int
    dtype: str
    threads: int | None
    rounds: int
    warmup: int

    @property
    def num_patches(self) -> int:
        return self.image_side**2

    @property
    def patch_size(self) -> int:
        return isqrt(self.patch_dim // 3)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.image_side * self.patch_size
        return 3, side, side

    def report(self) -> dict[str, Any]:
        """What every bench says of its setting."""
        return {
            "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": self.dtype,
            "dim": self.dim,
            "layers": self.layers,
            "heads": self.heads,
            "vocab": self.vocab,
            "image_patches": self.num_patches,
            "patch_dim": self.patch_dim,
            "batch": self.batch,
        }


def parser(doc: str | None, batch: int, dtype: str, rounds: int, warmup: int) -> argparse.ArgumentParser:
    """The flags of all three benches."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("dim", 384, "width"),
        ("layers", 6, "depth"),
        ("heads", 8, "attention heads"),
        ("vocab", 256, "text ids without the special ones, at least 256: bytes"),
        ("image-side", 16, "patches along one side of an image"),
        ("patch-dim", 48, "numbers a patch, 3 k k"),
        ("batch", batch, "samples at once"),
        ("rounds", rounds, "timed rounds; medians are reported"),
        ("warmup", warmup, "rounds before, not timed"),
        ("threads", None, "of torch; its own choice by default"),
    ):
        made.add_argument(f"--{name}", type=int, default=default, help=what)
    made.add_argument("--dtype", choices=list(PRECISIONS), default=dtype, help="bf16: as the trainer's bf16-mixed")
    made.add_argument("--peer", action="store_true", help="time other packages in turn and print the ratios")
    return made


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The sizes, checked; sets the number of threads."""
    sizes = Sizes(**{name: getattr(options, name) for name in Sizes.__dataclass_fields__})
    if sizes.patch_dim != 3 * sizes.patch_size**2:
        raise ValueError(f"--patch-dim is {sizes.patch_dim}, expected 3 k k for a patch of k x k pixels: 12, 48, 192")
    if sizes.threads is not None:
        torch.set_num_threads(sizes.threads)
    return sizes


def our_module(
    sizes: Sizes, max_seq_len: int, of_model: dict[str, Any] | None = None, **settings: Any
) -> TransfusionModule:
    """Rectified flow, as the peer's; without EMA, which the peer's loop has not.

    Args:
        sizes, max_seq_len: of the model.
        of_model: its other arguments, or these in place of the sizes'.
        settings: the module's.
    """
    arguments = {
        "vocab_size": sizes.vocab + NUM_SPECIAL_IDS,
        "latent_shape": sizes.latent_shape,
        "patch_size": sizes.patch_size,
        "dim": sizes.dim,
        "num_layers": sizes.layers,
        "num_heads": sizes.heads,
        "max_seq_len": max_seq_len,
    }
    model = Transfusion(**(arguments | (of_model or {})))
    module = TransfusionModule(
        model, FlowMatchEulerDiscreteScheduler(), prediction_type="flow_prediction", ema=False, **settings
    )
    module.text_tokenizer = TextTokenizer.train([], sizes.vocab + NUM_SPECIAL_IDS)
    return module


def ready_to_generate(sizes: Sizes, max_seq_len: int, config: GenerationConfig) -> TransfusionModule:
    """Our module with its weights, as `load` gives it."""
    module = our_module(sizes, max_seq_len, generation=config)
    module.materialize(DEVICE)
    module.precision = PRECISIONS[sizes.dtype]
    with torch.no_grad():
        module.model.text_head.weight[:NUM_SPECIAL_IDS] = 0  # logit 0 is never the highest: EOS would end the text
    return module.eval()


def prompts_of(rows: int, length: int) -> tuple[list[str], torch.Tensor]:
    """Texts of printable ASCII, and their bytes as ids (R, length)."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(32, 127, (rows, length), generator=draws)
    return ["".join(map(chr, row)) for row in ids.tolist()], ids


def parameters_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, with the device's work."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round, so that a busy moment of the machine falls on all of them."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warmup + rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call))
            del taken[name][: round_ < warmup]
    return taken


def median(times: list[float]) -> float:
    return statistics.median(times)


def wait() -> None:
    """For the device to be done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
