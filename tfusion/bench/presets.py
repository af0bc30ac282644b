"""What does a faster way of sampling cost in quality? Prints one JSON line a preset, the same weights under each.

    python -m tfusion.bench.presets --run runs/systems/transfusion-linear-16-seed0 \\
        configs/generation/ablation.yaml configs/generation/fast.yaml

- `composition`: share of pictures of fixed prompts (`data/scene_prompts.py`: all kinds, seen and unseen, `--scenes` in
  all) in which the reader finds what the prompt says, and its `composition_error`, the standard error.
- `fd_reference`: of `--images` pictures made from captions held out, once for each of `--seeds`; beside them the
  smallest and largest.
- `s_per_image`: median over batches of seconds from requests to pictures; `evaluations` is what the preset asks for,
  `faster` the first preset's `s_per_image` over its own.

The run is one of `shapes`, whose pictures can be read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tfusion.callbacks.sharing import picture_of, pixels_of
from tfusion.data.corpora import CaptionedImage
from tfusion.data.scene_prompts import KINDS, scene_prompts
from tfusion.data.sources import captions_of
from tfusion.loading import load, load_data
from tfusion.metrics import ImageDistances, Reference
from tfusion.metrics.scenes import composition_right
from tfusion.requests import GenerationConfig, Request
from tfusion.training.multimodal import MultimodalModule


class Maker:
    """Pictures of one preset, batch by batch, and the seconds a picture of each batch."""

    def __init__(self, module: MultimodalModule, config: GenerationConfig, batch_size: int) -> None:
        self.module, self.config, self.batch_size = module, config, batch_size
        self.seconds: list[float] = []

    def pictures(self, captions: list[str], first_seed: int) -> Tensor:
        """(N, 3, H, H), uint8; picture i has seed `first_seed` + i."""
        made = []
        for start in range(0, len(captions), self.batch_size):
            some = captions[start : start + self.batch_size]
            requests = [
                Request((caption,), "image", seed=first_seed + start + i, config=self.config)
                for i, caption in enumerate(some)
            ]
            began = time.perf_counter()
            made += [pixels_of(picture_of(generation)) for generation in self.module.generate(requests)]
            self.seconds.append((time.perf_counter() - began) / len(some))
        return torch.stack(made)


def settings_of(file: Path) -> dict[str, Any]:
    """Of an overlay in configs/generation/."""
    settings = dict(yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["init_args"]["generation"])
    return settings | {"guidance_interval": tuple(settings.get("guidance_interval", (0.0, 1.0)))}


def composition(maker: Maker, scenes: int) -> dict[str, float]:
    """Share of right pictures, prompts of all kinds alike."""
    each = max(1, scenes // (2 * len(KINDS)))
    asked = [(kind, caption) for kind in KINDS for seen in (True, False) for caption in scene_prompts(kind, seen, each)]
    made = maker.pictures([caption for _, caption in asked], first_seed=0)
    right = [composition_right(kind, picture, caption) for picture, (kind, caption) in zip(made, asked, strict=True)]
    share = sum(right) / len(right)
    return {"scenes": len(right), "composition": share, "composition_error": (share * (1 - share) / len(right)) ** 0.5}


def features_of(network: Reference, pictures: Tensor) -> Tensor:
    """(N, D), in parts."""
    return torch.cat([network.features(part) for part in pictures.split(256)])


class Held:
    """The pictures held out, and the distance of others to them; their features are computed once."""

    def __init__(self, pictures: Sequence[CaptionedImage]) -> None:
        self.pictures, self.network = pictures, Reference()
        self.network.load(torch.device("cpu"))
        self.distances = ImageDistances(self.network.num_features)
        truth = torch.stack([pictures[i].image for i in range(len(pictures))])
        self.distances.update(features_of(self.network, truth), real=True)

    def captions(self, number: int) -> list[str]:
        """The first of each picture's, in turn."""
        return [captions_of(self.pictures, i % len(self.pictures))[0] for i in range(number)]

    def distance(self, made: Tensor) -> float:
        """The Frechet distance of (N, 3, H, H)."""
        self.distances.reset()
        self.distances.update(features_of(self.network, made), real=False)
        return self.distances.compute().frechet


def measure(maker: Maker, held: Held, scenes: int, images: int, seeds: int) -> dict[str, Any]:
    """One preset's line, but for `faster`."""
    result: dict[str, Any] = composition(maker, scenes)
    captions = held.captions(images)
    found = [held.distance(maker.pictures(captions, first_seed=1_000_000 * (seed + 1))) for seed in range(seeds)]
    s_per_image = statistics.median(maker.seconds)
    return result | {
        "images": images,
        "fd_reference": found,
        "fd_range": [min(found), max(found)],
        "evaluations": maker.config.num_inference_steps,
        "s_per_image": s_per_image,
        "threads": torch.get_num_threads(),
    }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", type=Path, nargs="+", help="overlays such as configs/generation/fast.yaml")
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--scenes", type=int, default=2002, help="prompts of composition, of all kinds together")
    parser.add_argument("--images", type=int, default=300, help="pictures of a distance, at least 2")
    parser.add_argument("--seeds", type=int, default=3, help="distances")
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args(args)
    if options.images < 2:
        parser.error(f"got --images {options.images}, expected at least 2: a distance needs a covariance")
    if missing := [str(file) for file in options.presets if not file.is_file()]:
        parser.error(f"no such preset: {', '.join(missing)}")
    try:
        module, corpus = load(options.run), load_data(options.run).image_corpora[0]
    except ValueError as error:
        parser.error(str(error))
    if not getattr(corpus, "scenes", False):
        parser.error(f"the run's corpus is {corpus.name!r}; scenes are read from pictures of shapes alone")
    module.hold_generation_model()
    held, slowest = Held(corpus.load("val")), None
    for file in options.presets:
        maker = Maker(module, replace(module.generation, **settings_of(file)), options.batch_size)
        maker.pictures(["a big red circle"] * options.batch_size, first_seed=0)  # compiles
        maker.seconds.clear()
        line = measure(maker, held, options.scenes, options.images, options.seeds)
        slowest = line["s_per_image"] if slowest is None else slowest
        sys.stdout.write(json.dumps({"preset": file.stem, **line, "faster": slowest / line["s_per_image"]}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
