"""A dry check of a run's data: what is there, what is bad, how it packs, how long an epoch takes, how it looks.

    python -m tfusion.bench.check_data --config my.yaml
    python -m tfusion.bench.check_data --config my.yaml --tokens-per-s 20000 --data.seq_len 512

Takes what `tfusion fit` takes, and trains nothing. It builds the data's cache, so that `fit` starts at once. Prints a
report, and writes `check_data/report.json` and `check_data/samples.png` (pictures as they are trained, with captions)
into the run folder. Exits with 1 where bad records are more than data.max_bad_share allows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tfusion.__main__ import TfusionCLI, run
from tfusion.bench.data_report import check, spread
from tfusion.callbacks.sheets import attribution_of, draw_grid
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.data.sources import has_pixels, to_pil
from tfusion.training.base import TrainedModule


class DataCheck(TfusionCLI):
    """The command line of `tfusion fit`, up to its model and data."""

    def before_instantiate_classes(self) -> None:
        """Nothing is written where `fit` would write, so nothing is refused."""

    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate(self.config)
        self.model, self.datamodule = self._get(self.config_init, "model"), self._get(self.config_init, "data")
        data = self.datamodule
        if isinstance(self.model, TrainedModule):
            self.model.check_init_from()  # whose tokenizer the data are read with
        allowed, data.max_bad_share = data.max_bad_share, 1.0  # show the whole report first
        data.prepare_mixture(self.model)
        data.bad_records.max_share = allowed

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: `main` reports."""


def draw(data: MultimodalDataModule, number: int) -> Any:
    """Pictures as training has them, spread over the corpora, with their first captions and keys."""
    items = []
    for part in filter(has_pixels, data.mixture.images.pictures.parts):
        pictures = [part[i] for i in spread(len(part), number // len(data.image_corpora))]
        items += [(f"{p.captions[0]} [{p.key}]", to_pil(p)) for p in pictures]
    return draw_grid(items, title=attribution_of(data))


def describe(report: dict[str, Any]) -> str:
    """The report for a person."""

    def line(values: dict[str, float]) -> str:
        return " / ".join(f"{value:g}" for value in values.values())

    lines = []
    for corpus in report["corpora"]:
        lines.append(
            f"{corpus['name']}: {corpus['train']} {corpus['kind']} documents to train on, {corpus['val']} held out"
        )
        for files in corpus.get("files", []):
            lines.append(f"  {files['records']} records, {files['good']} good, {files['bad']} bad")
            if "width" in files:
                lines.append(
                    f"  width {line(files['width'])}, height {line(files['height'])} (min / median / 95 % / max)"
                )
                if files["smaller_than_image_size"]:
                    lines.append(
                        f"  {files['smaller_than_image_size']} pictures are smaller than {corpus['image_size']} pixels "
                        "and were enlarged"
                    )
                lines += [f"  converted: {count} x {note}" for note, count in files["converted"].items()]
        if corpus["kind"] == "image":
            lines.append(f"  captions a picture {line(corpus['captions_a_picture'])}")
            lines.append(f"  tokens a caption {line(corpus['caption_tokens'])} (min / median / 95 % / max)")
        else:
            lines.append(
                f"  {corpus['bytes']:,} bytes in {corpus['pieces']} pieces, about {corpus['tokens']:,} tokens "
                f"of {corpus['bytes_a_token']:.2f} bytes"
            )
    packing = report["packing"]
    lines.append(
        f"packing: {packing['utilisation']:.2%} of positions used, {packing['image_share']:.1%} of them by documents "
        f"with an image, {packing['images_a_row']:.2f} images a row ({packing['image_slots_a_row']} slots, "
        f"{packing['patches_an_image']} patches each); first {packing['rows']} rows"
    )
    if "compute" in report:
        compute = report["compute"]
        lines.append(
            f"compute: {compute['flops_a_step']:.3g} FLOPs a step, as train/flops; "
            f"{compute['flops_a_step_masked']:.3g} with attention only where the mask lets it through "
            f"({compute['attention_share']:.0%})"
        )
    if "latents" in report:
        latents = report["latents"]
        lines.append(
            f"latents: {latents['shape']}, mean {latents['mean']:.3f}, std {latents['std']:.3f}, "
            f"{latents['not_finite']} of {latents['pictures']} not finite"
        )
    for kind in ("image", "text"):
        if kind in report["epochs"]:
            epoch = report["epochs"][kind]
            seconds = epoch["seconds"]
            time = f"{seconds / 60:,.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"
            lines.append(
                f"one epoch of {kind}: {epoch['steps']:,.0f} steps, {time} at "
                f"{report['epochs']['tokens_per_s']:,.0f} positions a second (train/tokens_per_s; --tokens-per-s)"
            )
    return "\n".join(lines) + "\n"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens-per-s", type=float, default=5000, help="speed of training: train/tokens_per_s of a run"
    )
    parser.add_argument("--rows", type=int, default=400, help="rows packed")
    parser.add_argument("--samples", type=int, default=32, help="pictures on the sheet")
    parser.add_argument("--out", type=Path, help="folder for report and sheet; default: check_data in the run folder")
    options, of_fit = parser.parse_known_args(args)
    cli = run(DataCheck, ["fit", *of_fit])
    data, config = cli.datamodule, cli.config["fit"]
    report = check(data, cli.model, options.rows, options.tokens_per_s)
    bad = data.bad_records
    report["bad"] = {cause: [vars(record) for record in records] for cause, records in bad.by_cause().items()}
    sys.stdout.write(describe(report))
    if len(bad):
        sys.stdout.write(f"bad records ({len(bad)}):\n{bad.summary()}\n")
    out = options.out or Path(config.trainer.default_root_dir or ".", "check_data")
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    if data.image_corpora:
        draw(data, options.samples).save(out / "samples.png")
    sys.stdout.write(f"written: {', '.join(str(path) for path in sorted(out.iterdir()))}\n")
    try:
        bad.check()
    except ValueError as error:
        sys.stderr.write(f"tfusion: error: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
