"""Does the model draw scenes it has never seen? Prints one JSON object.

    python -m tfusion.bench.shapes --run runs/shapes --scenes 200

- `composition_accuracy`: share of generated pictures in which the analytic reader finds exactly the scene that the
  caption says: count, size, colour and shape of each group, and how they lie. Captions are of the validation split,
  whose scenes are never in training.
- `one_group`, `two_groups`: the same for captions of one and of two groups.
- `caption_accuracy`: share of held-out pictures whose greedy caption says exactly their scene.
- `reader_accuracy`: the reader's own, on the true pictures of these captions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from tfusion.bench.quickstart import training_seconds
from tfusion.data.shapes import parse_caption
from tfusion.data.shapes_reader import composition_correct
from tfusion.data.sources import to_pil
from tfusion.loading import load, load_data
from tfusion.metrics.scenes import caption_right


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--checkpoint", default="last", help="last, best or a path")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes, the first of the split")
    options = parser.parse_args(args)
    try:
        module, data = load(options.run, options.checkpoint), load_data(options.run)
    except ValueError as error:
        parser.error(str(error))
    corpus = data.image_corpora[0].load("val")
    scenes = [corpus[i] for i in range(min(options.scenes, len(corpus)))]
    captions = [scene.captions[0] for scene in scenes]

    requests = [{"segments": [c], "generate": "image", "seed": i} for i, c in enumerate(captions)]
    made = [np.asarray(generation.segments[0]) for generation in module.generate(requests)]
    right = [composition_correct(picture.transpose(2, 0, 1), c) for picture, c in zip(made, captions, strict=True)]
    groups = [1 if parse_caption(c).second is None else 2 for c in captions]  # type: ignore[union-attr]

    requests = [{"segments": [to_pil(s)], "generate": "text", "temperature": 0.0} for s in scenes]
    written = ["".join(map(str, generation.segments)) for generation in module.generate(requests)]
    same = [caption_right(w, c) for w, c in zip(written, captions, strict=True)]
    result = {
        "train_s": training_seconds(options.run),
        "scenes": len(scenes),
        "composition_accuracy": round(float(np.mean(right)), 4),
        "one_group": round(float(np.mean([r for r, g in zip(right, groups, strict=True) if g == 1])), 4),
        "two_groups": round(float(np.mean([r for r, g in zip(right, groups, strict=True) if g == 2])), 4),
        "caption_accuracy": round(float(np.mean(same)), 4),
        "reader_accuracy": float(
            np.mean([composition_correct(s.image, c) for s, c in zip(scenes, captions, strict=True)])
        ),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
