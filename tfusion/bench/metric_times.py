"""How long does each metric take? Seconds for 1,000 pictures, as Markdown; nothing is generated.

    python -m tfusion.bench.metric_times --threads 2

Networks whose weights are not at hand are timed with random weights of the same architecture: time does not depend on
them. Inception is torchvision's inception_v3, with the resizing of clean-fid; CLIP is torchvision's vit_b_16, of the
size of CLIP ViT-B/16's picture tower. Each is warmed up, and the median of three runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torchvision
from cleanfid.resize import build_resizer
from torch import Tensor

from tfusion.data.shapes import Shapes
from tfusion.metrics import FeatureNetwork, FrechetDistance, Reconstruction, Reference
from tfusion.metrics.captions import cider_d
from tfusion.metrics.kernel import kernel_distance
from tfusion.metrics.scenes import caption_right, composition_right

NUMBER = 1000
BATCH = 64


def seconds(work: Callable[[int], object], number: int) -> float:
    """For NUMBER pictures, from runs of `number`."""
    work(max(2, number // 10))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work(number)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * NUMBER / number


def features(network: FeatureNetwork | Reference, pictures: Tensor) -> Callable[[int], object]:
    """Of the first n pictures, in batches."""
    return lambda n: [network.features(batch) for batch in pictures[:n].split(BATCH)]


def loaded(module: torch.nn.Module, side: int) -> FeatureNetwork:
    """A network with the weights it has."""
    network = FeatureNetwork(module, "timed", side)
    network.load(torch.device("cpu"))
    return network


def frechet(dim: int) -> Callable[[int], object]:
    """Of n features to n others."""
    real, made = torch.randn(2, NUMBER, dim, generator=torch.Generator().manual_seed(0))

    def work(n: int) -> float:
        distance = FrechetDistance(dim)
        distance.update(real[:n], real=True)
        distance.update(made[:n], real=False)
        return float(distance.compute())

    return work


def kernel(dim: int) -> Callable[[int], object]:
    """Of n features to n others."""
    real, made = torch.randn(2, NUMBER, dim, generator=torch.Generator().manual_seed(0))
    return lambda n: kernel_distance(made[:n], real[:n])


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--image_size", type=int, default=64, help="of the pictures, pixels")
    options = parser.parse_args(args)
    torch.set_num_threads(options.threads)

    corpus = Shapes(options.image_size, NUMBER).load("train")
    scenes = [corpus[i] for i in range(NUMBER)]
    pictures = torch.stack([scene.image for scene in scenes])
    captions = [scene.captions[0] for scene in scenes]
    written = captions[1:] + captions[:1]
    reference = Reference()
    reference.load(torch.device("cpu"))
    floats = pictures.float() / 255
    resizer, pixels = build_resizer("clean"), pictures.permute(0, 2, 3, 1).numpy()
    inception = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False)
    parts: list[tuple[str, Callable[[int], object], int]] = [
        ("fd_reference, kd_reference: features", features(reference, pictures), NUMBER),
        (
            "clip_score_reference: pictures and captions",
            lambda n: [
                reference.cosines(pictures[i : i + BATCH][: n - i], captions[i : min(i + BATCH, n)])
                for i in range(0, n, BATCH)
            ],
            NUMBER,
        ),
        ("fid, kid: clean-fid's resizing", lambda n: [resizer(picture) for picture in pixels[:n]], 200),
        ("fid, kid: features of an Inception-v3 at 299", features(loaded(inception, 299), pictures), 100),
        ("fd_mobilenet_v2: features at 128", features(loaded(torchvision.models.mobilenet_v2(), 128), pictures), 300),
        (
            "clip_score: pictures through a ViT-B/16 at 224",
            features(loaded(torchvision.models.vit_b_16(), 224), pictures),
            60,
        ),
        *((f"Frechet distance of {dim} features", frechet(dim), NUMBER) for dim in (128, 1280, 2048)),
        *((f"kernel distance of {dim} features", kernel(dim), NUMBER) for dim in (128, 2048)),
        ("psnr, ssim", lambda n: Reconstruction().update(floats[:n].flip(-1), floats[:n]), NUMBER),
        (
            "composition: pictures read",
            lambda n: [composition_right("all", s.image, s.captions[0]) for s in scenes[:n]],
            NUMBER,
        ),
        (
            "caption_accuracy",
            lambda n: [caption_right(a, b) for a, b in zip(written[:n], captions[:n], strict=True)],
            NUMBER,
        ),
        ("cider_d", lambda n: np.mean(cider_d(written[:n], [(caption,) for caption in captions[:n]])), NUMBER),
    ]
    sys.stdout.write(
        f"| metric | seconds for {NUMBER:,} pictures of {options.image_size} x {options.image_size} |\n|---|---|\n"
    )
    for name, work, number in parts:
        taken = seconds(work, number)
        sys.stdout.write(f"| {name} | {taken:.2f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
