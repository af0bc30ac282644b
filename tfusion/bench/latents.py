"""How fast are training batches with and without a latent cache? Prints one JSON line a measurement.

    python -m tfusion.bench.latents --autoencoder runs/autoencoder/autoencoder
    python -m tfusion.bench.latents --autoencoder AE --path 'pictures/*.tar' --image_size 64 --num_workers 2

- `predict`: the corpus of pictures (Flickr8k's 6,000 training ones by default, each also mirrored) becomes a cache, by
  `CorpusEncoder` as `tfusion predict` runs it: `images_per_s`, and `bytes_per_image` on disk.
- `loader`: packed training batches out of the data module, from pictures and from the cache.
- `loader+encode`: the same and, where there is no cache, the image tokenizer's work in a training step.

Rates are medians of `--rounds` rounds of `--steps` steps, from pictures and from the cache in turn, after `--warmup`
rounds that are not timed. Only pictures that a step trains on count, not empty slots.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from tfusion.bench.setting import DEVICE, in_turn, median
from tfusion.data.corpora import ImageCorpus
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.data.image_files import ImageFiles
from tfusion.data.latents import Latents
from tfusion.data.steps import MicroBatches, StepDataset, StepLayout
from tfusion.sequence import Batch
from tfusion.tokenizers import ImageTokenizer, VAETokenizer
from tfusion.training.encoding import CorpusEncoder

VOCAB_SIZE, SEQ_LEN, NUM_PATCHES, LANES = 2048, 512, 64, 8


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", required=True, help="folder of an AutoencoderKL")
    parser.add_argument("--path", default="$TFUSION_DATA/flickr8k/128/train-*.tar", help="of ImageFiles")
    parser.add_argument("--image_size", type=int, default=64, help="side of the pictures, in pixels")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the cache")
    parser.add_argument("--rows", type=int, default=8, help=f"rows a step, of {SEQ_LEN} positions")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that make batches, a divisor of 8")
    parser.add_argument("--steps", type=int, default=5, help="a round")
    parser.add_argument("--rounds", type=int, default=7, help="timed")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before, not timed")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    options = parser.parse_args(args)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        tokenizer = VAETokenizer(options.autoencoder).to(DEVICE)
        corpus = ImageFiles(options.path, options.image_size, flip=True, name="pictures")
        with tempfile.TemporaryDirectory() as folder:
            for line in measure(corpus, tokenizer, Path(folder), options):
                sys.stdout.write(json.dumps(machine() | line) + "\n")
                sys.stdout.flush()
    except ValueError as error:
        parser.error(str(error))


def machine() -> dict[str, Any]:
    """What the figures depend on beside the options."""
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    return {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def measure(
    corpus: ImageFiles, tokenizer: ImageTokenizer, folder: Path, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The lines."""
    setting = {"image_size": options.image_size, "latent_shape": tokenizer.latent_shape(options.image_size)}
    yield {"what": "predict"} | setting | encode(corpus, tokenizer, folder, options)
    corpora = {False: corpus, True: Latents(str(folder / "latents"))}
    for what, encodes in (("loader", False), ("loader+encode", True)):
        rounds = {
            cached: Rounds(batches(one, tokenizer, options), tokenizer if encodes else None, options.steps)
            for cached, one in corpora.items()
        }
        seconds = in_turn({str(cached): one for cached, one in rounds.items()}, options.rounds, options.warmup)
        rates = {}
        for cached, one in rounds.items():
            of_rounds = zip(one.images[-options.rounds :], seconds[str(cached)], strict=True)
            rates[cached] = median([images / taken for images, taken in of_rounds])
            line = {"what": what, "cached": cached, "images_per_s": rates[cached], "rows": options.rows}
            yield line | setting | {"seq_len": SEQ_LEN, "workers": options.num_workers, "rounds": options.rounds}
        yield {"what": what, "ratio": rates[True] / rates[False]}


def encode(corpus: ImageFiles, tokenizer: ImageTokenizer, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the cache into `folder / "latents"`; the corpus is in its own cache already."""
    corpus.prepare()
    module = CorpusEncoder(tokenizer, dtype=options.dtype)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator=DEVICE.type, devices=1, default_root_dir=folder, **quiet)
    data = MultimodalDataModule([corpus], num_workers=options.num_workers)
    start = time.perf_counter()
    trainer.predict(module, data, return_predictions=False)
    seconds = time.perf_counter() - start
    pictures = sum(module.info.num_pictures.values())
    size = sum(path.stat().st_size for path in (folder / "latents").iterdir())
    return {
        "pictures": pictures,
        "dtype": options.dtype,
        "images_per_s": pictures / seconds,
        "bytes_per_image": round(size / pictures),
    }


def batches(corpus: ImageCorpus, tokenizer: ImageTokenizer, options: argparse.Namespace) -> Iterator[Batch]:
    """Training batches without end, as the data module makes them."""
    model = SimpleNamespace(
        max_seq_len=SEQ_LEN,
        num_patches=NUM_PATCHES,
        latent_shape=tokenizer.latent_shape(options.image_size),
        model_vocab_size=VOCAB_SIZE,
        image_tokenizer=tokenizer,
        text_tokenizer=None,
    )
    data = MultimodalDataModule(
        [corpus], vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, rows_per_step=options.rows, lanes=LANES
    )
    data.prepare_mixture(model)  # type: ignore[arg-type]
    layout = StepLayout(options.rows, LANES, workers=options.num_workers)
    steps = StepDataset(data.mixture, layout, data.seed, 0, {})
    return iter(MicroBatches(DataLoader(steps, batch_size=None, num_workers=options.num_workers)))


class Rounds:
    """A round is so many steps; `images` counts those of each."""

    def __init__(self, source: Iterator[Batch], tokenizer: ImageTokenizer | None, steps: int) -> None:
        self.source, self.tokenizer, self.steps = source, tokenizer, steps
        self.images: list[int] = []

    def __call__(self) -> None:
        count = 0
        for _ in range(self.steps):
            batch = next(self.source).to(DEVICE)
            count += int(batch.image_valid.sum())
            if self.tokenizer is not None and batch.images is not None:
                self.tokenizer.encode(batch.images.float() / 127.5 - 1)
        self.images.append(count)


if __name__ == "__main__":
    main()
