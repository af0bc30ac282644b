"""Does the quickstart remember its pictures? Prints one JSON object.

    python -m tfusion.bench.quickstart --run runs/quickstart

- `train_s`: training time, without start-up and validation.
- `images_in_use`: training pictures.
- `image_accuracy`: one image for each of 200 training names (the first by hash), with the run's generation
  settings; right if the nearest of all pictures in use, by pixel distance, is its own.
- `caption_accuracy`: the greedy name of the same 200 pictures equals the true one.
- `text_bits_per_byte`: on the held-out play.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import lightning as L
import numpy as np
import torch

from tfusion.callbacks.perplexity import Perplexity
from tfusion.data.corpora import CaptionedImage
from tfusion.data.sources import to_pil
from tfusion.loading import load, load_data
from tfusion.training.run_folder import read_metrics
from tfusion.training.transfusion import TransfusionModule

NUM_NAMES = 200


def image_accuracy(module: TransfusionModule, pictures: list[CaptionedImage], num_names: int) -> float:
    """Share of names whose generated image is nearest to its own picture."""
    requests = [
        {"segments": [p.captions[0]], "generate": "image", "seed": i} for i, p in enumerate(pictures[:num_names])
    ]
    made = [np.asarray(generation.segments[0]) for generation in module.generate(requests)]
    made = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).flatten(1).float()
    own = torch.stack([picture.image for picture in pictures]).flatten(1).float()
    nearest = torch.cdist(made, own).argmin(1)
    return float((nearest == torch.arange(len(made))).float().mean())


def caption_accuracy(module: TransfusionModule, pictures: list[CaptionedImage], num_names: int) -> float:
    """Share of pictures whose greedy name is the true one."""
    chosen = pictures[:num_names]
    requests = [{"segments": [to_pil(p)], "generate": "text", "temperature": 0.0} for p in chosen]
    written = ["".join(map(str, generation.segments)) for generation in module.generate(requests)]
    return sum(name == p.captions[0] for name, p in zip(written, chosen, strict=True)) / len(chosen)


def training_seconds(run: Path) -> float:
    """The last `train/seconds` of metrics.csv."""
    values = [row["train/seconds"] for row in read_metrics(run / "metrics.csv")[1] if row["train/seconds"]]
    return round(float(values[-1]), 1)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--checkpoint", default="last", help="last, best or a path")
    run, checkpoint = vars(parser.parse_args(args)).values()
    try:
        module, data = load(run, checkpoint), load_data(run)
    except ValueError as error:
        parser.error(str(error))
    pictures = list(data.image_corpora[0].load("train"))
    result = {
        "train_s": training_seconds(run),
        "images_in_use": len(pictures),
        "image_accuracy": image_accuracy(module, pictures, NUM_NAMES),
        "caption_accuracy": caption_accuracy(module, pictures, NUM_NAMES),
    }
    trainer = L.Trainer(
        devices=1,
        logger=False,
        callbacks=[Perplexity()],
        precision=module.precision,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(module, data, verbose=False)
    text = data.text_corpora[0].name
    result["text_bits_per_byte"] = round(float(trainer.callback_metrics[f"val/{text}/bits_per_byte"]), 4)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
