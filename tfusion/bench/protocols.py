"""Protocols of the papers, as prompt files, on data that you bring; nothing is downloaded.

COCO-30k, text to image (FID, CLIP score). Annotations: COCO 2014's captions_val2014.json.

    python -m tfusion.bench.protocols coco --annotations captions_val2014.json --out coco30k.jsonl
    tfusion predict --config runs/x/config.yaml --ckpt_path last --data.prompts coco30k.jsonl
    python -m tfusion.bench.folder --generated runs/x/predictions --reference val2014 --image_size 256 \\
        --prompts coco30k.jsonl --config configs/metrics/fid.yaml --config configs/metrics/clip.yaml

`coco` draws 30,000 of the 40,504 pictures and one caption of each (--number, --seed). `tfusion.bench.folder` then
measures FID and KID between the predictions and the folder val2014, and the CLIP score with the prompts. The paper's
FID is of pictures at 256 x 256 with 250 steps and guidance 5; papers differ in whether the real pictures are the
30,000 or all of val2014, so say which.

COCO captions, image to text (CIDEr-D), on the 5,000 test pictures of Karpathy's split (dataset_coco.json).

    python -m tfusion.bench.protocols coco-captions --split dataset_coco.json --images coco --out captions.jsonl
    tfusion predict --config runs/x/config.yaml --ckpt_path last --data.prompts captions.jsonl
    python -m tfusion.bench.protocols cider --split dataset_coco.json --predictions runs/x/predictions

`--images` is the folder that holds val2014/. Captions are greedy. The score is times 100, as papers print it, and
compares only over all 5,000, because weights of words come from the references. dataset_flickr8k.json and
dataset_flickr30k.json work, too.

GenEval, text to image (objects, counts, colours, positions). Prompts: evaluation_metadata.jsonl of its repository.

    python -m tfusion.bench.protocols geneval --metadata evaluation_metadata.jsonl --out geneval.jsonl
    tfusion predict --config runs/x/config.yaml --ckpt_path last --data.prompts geneval.jsonl
    python -m tfusion.bench.protocols geneval-folder --metadata evaluation_metadata.jsonl \\
        --predictions runs/x/predictions --out geneval_images
    python evaluation/evaluate_images.py geneval_images --outfile results.jsonl --model-path MODELS   # GenEval's own
    python -m tfusion.bench.protocols geneval-summary --results results.jsonl

Four pictures a prompt (--samples). The summary's `overall` is the mean of the tags' accuracies, the number in papers.

Prompts are lines of `tfusion predict`, with a seed each; sampler, steps and guidance are the run's, or the command
line's (`--model.init_args.generation.guidance_scale 5`). Results are joined by request number, so predictions must be
of the whole prompts file; what is missing is an error that names it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tfusion.bench import coco, geneval
from tfusion.bench.protocol_files import write_prompts


def parser() -> argparse.ArgumentParser:
    """A command a step."""
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, **paths: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        for path, meaning in paths.items():
            added.add_argument(f"--{path}", type=Path, required=True, help=meaning)
        return added

    prompts, folder = "prompts.jsonl to write", "the run's folder `predictions`"
    metadata, karpathy = "GenEval's evaluation_metadata.jsonl", "Karpathy's dataset_coco.json"
    made = command("coco", "captions of random pictures, as prompts", annotations="captions_val2014.json", out=prompts)
    made.add_argument("--number", type=int, default=30_000, help="pictures (default 30000)")
    made.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    made = command("coco-captions", "pictures to caption", split=karpathy, images="folder of val2014/", out=prompts)
    made.add_argument("--name", default="test", help="of the split (default test)")
    made = command("cider", "CIDEr-D of the captions written", split=karpathy, predictions=folder)
    made.add_argument("--name", default="test", help="of the split (default test)")
    made = command("geneval", "GenEval's prompts", metadata=metadata, out=prompts)
    made.add_argument("--samples", type=int, default=geneval.SAMPLES, help="pictures a prompt (default 4)")
    made = command(
        "geneval-folder", "the folder GenEval reads", metadata=metadata, predictions=folder, out="new folder"
    )
    made.add_argument("--samples", type=int, default=geneval.SAMPLES, help="pictures a prompt (default 4)")
    command("geneval-summary", "accuracy by tag and their mean", results="what evaluate_images.py wrote")
    return whole


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do a step; what there is to print.

    Raises:
        ValueError: a file, a line or a prediction is missing or wrong; names it.
    """
    match options.command:
        case "coco":
            requests, blank = coco.image_requests(options.annotations, options.number, options.seed)
            write_prompts(requests, options.out)
            return {"prompts": len(requests), "blank_captions_left_out": blank, "written": str(options.out)}
        case "coco-captions":
            requests = coco.caption_requests(coco.karpathy_split(options.split, options.name), options.images)
            write_prompts(requests, options.out)
            return {"prompts": len(requests), "written": str(options.out)}
        case "cider":
            return coco.cider(coco.karpathy_split(options.split, options.name), options.predictions)
        case "geneval":
            if options.samples < 1:
                raise ValueError(f"got --samples {options.samples}, expected at least 1")
            requests = geneval.requests(geneval.read_metadata(options.metadata), options.samples)
            write_prompts(requests, options.out)
            return {"prompts": len(requests), "samples": options.samples, "written": str(options.out)}
        case "geneval-folder":
            metadata = geneval.read_metadata(options.metadata)
            geneval.write_folder(metadata, options.predictions, options.out, options.samples)
            return {"prompts": len(metadata), "samples": options.samples, "written": str(options.out)}
        case _:
            return geneval.summary(options.results)


def main(args: list[str] | None = None) -> int:
    options = parser().parse_args(args)
    try:
        result = run(options)
    except ValueError as error:
        sys.stderr.write(f"tfusion: error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
