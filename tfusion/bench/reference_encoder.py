"""Is the reference encoder meaningful? Its answers to known faults, and retrieval on held-out pairs.

    python -m tfusion.bench.reference_encoder
    python -m tfusion.bench.reference_encoder --run runs/reference_encoder --out reference_encoder.safetensors

The second writes a run's averaged weights, fp16, with tokenizer and sizes, and then measures them. Printed are tables
in Markdown: `fd_reference` and `kd_reference` of a corpus's pictures, at 32 x 32, to the same pictures blurred,
noised, with colours changed, or with most of their kinds lost; and `clip_score_reference` when a share of captions is
swapped. Each has to rise (scores: fall) with the fault. Retrieval@1 is the share of held-out pictures whose nearest
caption of all is theirs, and the other way.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor

from tfusion.data.corpora import CaptionedImage
from tfusion.data.openmoji import OpenMoji
from tfusion.data.shapes import Shapes
from tfusion.loading import load
from tfusion.metrics import ClipScore, ImageDistances, Reference

SIZE = 32  # of the pictures measured, as the quickstart's
BATCH = 64
Fault = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # uint8 (N, 3, S, S) to the same


def blurred(sigma: float) -> Fault:
    """Gaussian, sigma pixels."""
    return lambda pictures, _: ndimage.gaussian_filter(pictures, (0, 0, sigma, sigma), mode="nearest")


def noised(std: float) -> Fault:
    """Gaussian, of 255."""
    return lambda pictures, draws: np.clip(pictures + draws.normal(0, std, pictures.shape), 0, 255).astype(np.uint8)


def recoloured(share: float) -> Fault:
    """Red, green and blue change places in a share of the pictures."""

    def change(pictures: np.ndarray, _: np.random.Generator) -> np.ndarray:
        changed = pictures.copy()
        some = slice(0, round(share * len(pictures)))
        changed[some] = pictures[some][:, [1, 2, 0]]
        return changed

    return change


def collapsed(kinds: float) -> Fault:
    """Only a share of the pictures is left, again and again."""
    return lambda pictures, _: pictures[np.arange(len(pictures)) % max(2, round(kinds * len(pictures)))]


FAULTS: dict[str, list[tuple[str, Fault]]] = {
    "blur (sigma, pixels of 32)": [(f"{s}", blurred(s)) for s in (0.0, 0.5, 1.0, 2.0, 4.0)],
    "noise (std of 255)": [(f"{s}", noised(s)) for s in (0, 10, 25, 50, 100)],
    "colours changed (share)": [(f"{s}", recoloured(s)) for s in (0.0, 0.1, 0.25, 0.5, 1.0)],
    "kinds left (share)": [(f"{s}", collapsed(s)) for s in (1.0, 0.5, 0.25, 0.1, 0.05)],
}
SWAPPED = (0.0, 0.1, 0.25, 0.5, 1.0)


def pixels_of(pictures: Sequence[CaptionedImage]) -> np.ndarray:
    """uint8 (N, 3, S, S)."""
    return np.stack([picture.image.numpy() for picture in pictures])


def features_of(network: Reference, pictures: np.ndarray) -> Tensor:
    """(N, 128)."""
    return torch.cat([network.features(batch) for batch in torch.from_numpy(pictures).split(BATCH)])


def distances(network: Reference, reference: Tensor, pictures: np.ndarray) -> tuple[float, float]:
    """Frechet and kernel distance of pictures to reference features."""
    distance = ImageDistances(network.num_features)
    distance.update(reference, real=True)
    distance.update(features_of(network, pictures), real=False)
    found = distance.compute()
    return found.frechet, found.kernel


def clip_score(network: Reference, pictures: np.ndarray, captions: list[str], swapped: float) -> float:
    """With the captions of the first share of pictures moved on by one."""
    some = round(swapped * len(captions))
    mixed = captions[1:some] + captions[:1] + captions[some:] if some > 1 else captions
    score = ClipScore()
    for first in range(0, len(mixed), BATCH):
        score.update(network.cosines(torch.from_numpy(pictures[first : first + BATCH]), mixed[first : first + BATCH]))
    return score.compute()[0]


def retrieval(network: Reference, pictures: Sequence[CaptionedImage]) -> tuple[float, float]:
    """Share of pictures whose nearest caption says what theirs does, word for word, and of captions, of pictures."""
    captions = [picture.captions[0] for picture in pictures]
    seen = F.normalize(features_of(network, pixels_of(pictures)), dim=-1)
    read = F.normalize(
        torch.cat([network.text_features(captions[i : i + BATCH]) for i in range(0, len(captions), BATCH)]), dim=-1
    )
    cosines = seen @ read.T
    named = [captions[i] == caption for i, caption in zip(cosines.argmax(1).tolist(), captions, strict=True)]
    found = [captions[i] == caption for i, caption in zip(cosines.argmax(0).tolist(), captions, strict=True)]
    return float(np.mean(named)), float(np.mean(found))


def report(network: Reference) -> str:
    """All tables, as Markdown."""
    lines = []
    corpora = {"openmoji": OpenMoji(SIZE).load("train"), "shapes": Shapes(SIZE).load("val")}
    for name, corpus in corpora.items():
        pictures = [corpus[i] for i in range(len(corpus))]
        own = pixels_of(pictures)
        reference, captions = features_of(network, own), [picture.captions[0] for picture in pictures]
        lines += [f"### {name}: {len(pictures)} pictures", ""]
        lines += ["| fault | | | | | | rises |", "|---|---|---|---|---|---|---|"]
        for fault, steps in FAULTS.items():
            found = [distances(network, reference, apply(own, np.random.default_rng(0))) for _, apply in steps]
            lines.append(f"| {fault} | {' | '.join(label for label, _ in steps)} | |")
            for metric, values in zip(("fd_reference", "kd_reference"), zip(*found, strict=True), strict=True):
                rises = all(a < b for a, b in pairwise(values))
                lines.append(
                    f"| {metric} | {' | '.join(f'{value:.4g}' for value in values)} | {'yes' if rises else 'NO'} |"
                )
        scores = [clip_score(network, own, captions, share) for share in SWAPPED]
        falls = all(a > b for a, b in pairwise(scores))
        lines.append(f"| captions swapped (share) | {' | '.join(map(str, SWAPPED))} | falls |")
        lines.append(
            f"| clip_score_reference | {' | '.join(f'{s:.4g}' for s in scores)} | {'yes' if falls else 'NO'} |"
        )
        lines.append("")
    lines += ["| held-out pairs | of | picture to caption | caption to picture |", "|---|---|---|---|"]
    for name, corpus, splits in (("openmoji", OpenMoji(SIZE), ("val", "test")), ("shapes", Shapes(SIZE), ("val",))):
        pictures = [picture for split in splits for picture in corpus.load(split)]  # type: ignore[arg-type]
        to_text, to_image = retrieval(network, pictures)
        lines.append(f"| {name}, {' and '.join(splits)} | {len(pictures)} | {to_text:.3f} | {to_image:.3f} |")
    return "\n".join(lines) + "\n"


def export(run: Path, checkpoint: str, out: Path) -> None:
    """Write the averaged weights of a run, fp16, with all that `Reference` needs."""
    module = load(run, checkpoint, "cpu")
    model = module.evaluation_model
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    sizes = {"vocab_size": model.vocab_size, "image_size": model.image_size, "dim": model.dim}
    trunk = model.transformer
    sizes |= {"text_dim": model.embedding.embedding_dim, "text_layers": len(trunk.blocks)}
    sizes |= {"text_heads": trunk.num_heads, "max_seq_len": model.max_seq_len}
    metadata = {"sizes": json.dumps(sizes), "tokenizer": module.text_tokenizer.to_json()}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out, metadata)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="export this run first")
    parser.add_argument("--checkpoint", default="last", help="last, best or a path")
    parser.add_argument("--out", type=Path, help="where to; measured is this file, or else the package's own")
    options = parser.parse_args(args)
    if (options.run is None) != (options.out is None):
        parser.error("give --run and --out, or neither")
    if options.run is not None:
        export(options.run, options.checkpoint, options.out)
    network = Reference(None if options.out is None else str(options.out))
    network.load(torch.device("cpu"))
    sys.stdout.write(f"{network.path.name}: {network.path.stat().st_size:,} bytes, {network.fingerprint}\n\n")
    sys.stdout.write(report(network))


if __name__ == "__main__":
    main()
