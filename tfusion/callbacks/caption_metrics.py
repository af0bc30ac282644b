"""Captions written for held-out pictures, and pictures of scenes: what can be judged right or wrong, and CIDEr-D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import lightning.pytorch as pl

from tfusion.callbacks.sharing import ROUND, make, picture_of, pixels_of, shown, text_of
from tfusion.data.corpora import CaptionedImage
from tfusion.data.scene_prompts import KINDS, scene_prompts
from tfusion.data.sources import captions_of, to_pil
from tfusion.metrics.captions import cider_d
from tfusion.metrics.measurement import Example, Measurement, share
from tfusion.metrics.scenes import caption_right, composition_right
from tfusion.requests import GenerationConfig, Request
from tfusion.training.parallel import gather_lists


def measure_captions(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    prefix: str,
    pictures: Sequence[CaptionedImage],
    number: int,
    batch_size: int,
    scenes: bool,
) -> tuple[list[Measurement], list[Example]]:
    """Greedy captions of the first pictures; collective.

    `<prefix>/cider_d` (1 = 100 of the papers), `<prefix>/caption_exact` (one of the true ones, word for word) and,
    of scenes, `<prefix>/caption_accuracy` (the scene it says is the true one; what cannot be parsed is wrong).
    """
    config = replace(module.generation, temperature=0.0)
    texts: list[str] = []
    step = ROUND * trainer.world_size  # so that no more pictures are held at a time
    for first in range(0, min(number, len(pictures)), step):
        some = range(first, min(first + step, number, len(pictures)))
        requests = [Request((to_pil(pictures[i]),), "text", config=config) for i in some]
        made = make(trainer, module, requests, batch_size, first)
        written = dict(gather_lists([(i, text_of(generation).strip()) for i, generation in made]))
        texts += [written[i] for i in some]
    truths = [captions_of(pictures, i) for i in range(len(texts))]
    scores = cider_d(texts, truths)
    n = len(texts)
    error = float(scores.std(ddof=1)) / n**0.5 if n > 1 else None
    found = [
        Measurement(f"{prefix}/cider_d", float(scores.mean()), n, "pycocoevalcap", error),
        share(f"{prefix}/caption_exact", sum(t in c for t, c in zip(texts, truths, strict=True)), n),
    ]
    if scenes:
        right = sum(caption_right(t, c[0]) for t, c in zip(texts, truths, strict=True))
        found.append(share(f"{prefix}/caption_accuracy", right, n))
    corpus = prefix.split("/", 1)[1]
    examples = [
        Example(corpus, "caption", to_pil(pictures[i]), texts[i], truths[i][0], float(scores[i]), "cider_d")
        for i in shown(scores.tolist())
    ]
    return found, examples


def measure_scenes(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    prefix: str,
    number: int,
    batch_size: int,
    config: GenerationConfig,
) -> tuple[list[Measurement], list[Example]]:
    """Composition accuracy by kind, on scenes that are in training and on those that never are; collective.

    `<prefix>/<kind>/{seen,unseen}`, kinds as GenEval's; picture i of a kind has seed i.
    """
    asked = [
        (kind, seen, caption, i)
        for kind in KINDS
        for seen in (True, False)
        for i, caption in enumerate(scene_prompts(kind, seen, number))
    ]
    requests = [Request((caption,), "image", seed=i, config=config) for _, _, caption, i in asked]
    judged, examples = [], []
    for index, generation in make(trainer, module, requests, batch_size):
        kind, seen, caption, _ = asked[index]
        picture = picture_of(generation)
        right = composition_right(kind, pixels_of(picture), caption)
        judged.append((kind, seen, right))
        if kind == "all" and not seen:
            corpus = prefix.split("/", 1)[1]
            examples.append(Example(corpus, "picture", picture, caption, "", float(right), "composition"))
    everything = gather_lists(judged)
    found = []
    for kind in KINDS:
        for seen in (True, False):
            of_kind = [right for k, s, right in everything if (k, s) == (kind, seen)]
            name = f"{prefix}/composition/{kind}/{'seen' if seen else 'unseen'}"
            found.append(share(name, sum(of_kind), len(of_kind)))
    return found, examples
