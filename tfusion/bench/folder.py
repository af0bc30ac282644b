"""FID, KID and CLIP score of a folder of pictures, by the same networks and code as during training.

    python -m tfusion.bench.folder --generated runs/x/predictions --reference pictures/
    python -m tfusion.bench.folder --generated runs/x/predictions --reference coco/val2014 --image_size 256 \\
        --prompts coco30k.jsonl --config configs/metrics/fid.yaml --config configs/metrics/clip.yaml
    python -m tfusion.bench.folder --reference coco/val2014 --image_size 256 --write coco.safetensors

Networks are those of `generation_metrics.networks` (the overlays in `configs/metrics`), by default the package's own.
Pictures are brought to `--image_size` as training data is (centre square, Lanczos); without it generated pictures
stay as they are, and have to be square and of one size, which reference pictures are then brought to. A reference is
a folder, or what `--write` wrote: features that serve for as often as one likes, here and as
`generation_metrics.reference`; features of another network or of pictures of another size are refused.
With `--prompts`, the file that `predict` was given, pictures called `RRRRRR-S-K.png` are scored with the text of
request R. Prints a table, then one JSON line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from PIL import Image as PILImage
from torch import Tensor
from tqdm import tqdm

from tfusion.callbacks.generation_metrics import GenerationMetrics
from tfusion.callbacks.sharing import pixels_of
from tfusion.data.prompts import read_prompts
from tfusion.metrics import ClipScore, ImageDistances, ImageFeatures, PairScore, Reference
from tfusion.metrics.distances import measurements_of, read_reference_file, write_features
from tfusion.metrics.measurement import Measurement
from tfusion.metrics.networks import label_of
from tfusion.pictures import fit_square, to_rgb
from tfusion.requests import GenerationConfig

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
BATCH = 64


def picture_paths(folder: Path) -> list[Path]:
    """Pictures in a folder and below it, sorted; `grid.png`, the sheet of `predict`, is none."""
    if not folder.is_dir():
        raise ValueError(f"got the folder {str(folder)!r}, which is none; give a folder of pictures")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.name != "grid.png")
    if len(paths) < 2:
        raise ValueError(
            f"{str(folder)!r} holds {len(paths)} pictures ({', '.join(sorted(EXTENSIONS))}), expected 2 or more"
        )
    return paths


def own_size(paths: Sequence[Path]) -> int:
    """The one side that all pictures have; of each only the head of its file is read."""
    sizes = set()
    for path in paths:
        with _opened(path) as image:
            width, height = image.size
        if width != height:
            raise ValueError(f"{str(path)!r} is {width} x {height}, not square: say --image_size")
        sizes.add(width)
    if len(sizes) > 1:
        raise ValueError(f"the pictures have sides of {sorted(sizes)} pixels: say --image_size")
    return sizes.pop()


def read_picture(path: Path, image_size: int) -> Tensor:
    """uint8 (3, S, S), the centre square at `image_size`."""
    with _opened(path) as opened:
        image = to_rgb(opened)[0]
    return pixels_of(image if image.size == (image_size, image_size) else fit_square(image, image_size))


@contextmanager
def _opened(path: Path) -> Iterator[PILImage.Image]:
    try:
        with PILImage.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a picture ({error}); remove it, or mend it") from error


def batches(paths: Sequence[Path], image_size: int, what: str) -> Iterator[tuple[Sequence[Path], Tensor]]:
    """Paths and uint8 (N, 3, S, S), with a bar."""
    with tqdm(total=len(paths), desc=what, disable=not sys.stderr.isatty()) as bar:
        for first in range(0, len(paths), BATCH):
            some = paths[first : first + BATCH]
            pixels = [read_picture(path, image_size) for path in some]
            yield some, torch.stack(pixels)
            bar.update(len(some))


def reference_features(
    reference: Path, networks: Sequence[ImageFeatures], image_size: int, device: torch.device
) -> dict[str, Tensor]:
    """(N, D) features on the CPU by each network's name, of a folder of pictures or of a file that --write wrote."""
    if reference.is_file():
        return {n.name: read_reference_file(reference, n.name, n.fingerprint, image_size) for n in networks}
    parts: dict[str, list[Tensor]] = {network.name: [] for network in networks}
    for _, pixels in batches(picture_paths(reference), image_size, "reference"):
        for network in networks:
            parts[network.name].append(network.features(pixels.to(device)).cpu())
    return {name: torch.cat(some) for name, some in parts.items()}


def prompt_texts(paths: Sequence[Path], prompts: Path) -> list[str]:
    """The text of the request that made each picture."""
    requests = read_prompts(prompts, GenerationConfig())
    texts = []
    for path in paths:
        number = path.name.split("-")[0]
        if not number.isdigit() or int(number) >= len(requests):
            raise ValueError(
                f"{str(path)!r} is not called after one of the {len(requests)} requests of {str(prompts)!r} "
                "(RRRRRR-S-K.png, as predict writes them): give the prompts that it was made from"
            )
        texts.append("".join(s for s in requests[int(number)].segments if isinstance(s, str)))
    return texts


def score(
    made: Sequence[Path],
    networks: Sequence[ImageFeatures | PairScore],
    references: dict[str, Tensor],
    texts: dict[Path, str],
    image_size: int,
    device: torch.device,
) -> list[Measurement]:
    """Distances to the references that there are, and scores if there are texts; each picture is read once."""
    distances = [(n, ImageDistances(n.num_features)) for n in networks if hasattr(n, "features") and references]
    scores = [(network, ClipScore()) for network in networks if hasattr(network, "cosines") and texts]
    for network, distance in distances:
        distance.update(references[network.name], real=True)
    for some, pixels in batches(made, image_size, "generated"):
        for network, distance in distances:
            distance.update(network.features(pixels.to(device)).cpu(), real=False)
        for network, clip in scores:
            clip.update(network.cosines(pixels.to(device), [texts[path] for path in some]).cpu())
    found = [one for network, distance in distances for one in measurements_of(distance, network)]
    for network, clip in scores:
        value, error = clip.compute()
        found.append(Measurement(network.score_name, value, len(made), label_of(network), error))
    return found


def check(options: Namespace, networks: Sequence[ImageFeatures | PairScore]) -> None:
    """Raise ValueError for options that would do nothing."""
    nothing = options.generated is None and options.write is None
    if nothing or (options.reference is None and options.prompts is None):
        raise ValueError("nothing to do: give --generated, with --reference or --prompts, or --reference with --write")
    if options.write is not None and (options.reference is None or not options.reference.is_dir()):
        raise ValueError("--write keeps the features of a folder: give --reference FOLDER")
    for given, needed, option in (
        (options.reference, "features", "--reference"),
        (options.prompts, "cosines", "--prompts"),
    ):
        if given is not None and not any(hasattr(network, needed) for network in networks):
            raise ValueError(
                f"{option} is given, but none of the networks ({', '.join(type(n).__name__ for n in networks)}) "
                "can use it: leave it out, or add a --config of configs/metrics with another network"
            )


def run(options: Namespace) -> list[Measurement]:
    """What the command line asks for; raises ValueError, worded for the user."""
    networks = options.generation_metrics.networks or [Reference()]
    check(options, networks)
    device = torch.device(options.device)
    for network in networks:
        network.load(device)
    made = picture_paths(options.generated) if options.generated is not None else []
    if options.image_size is None and not made:
        raise ValueError("say --image_size, for there are no generated pictures to take it from")
    image_size = own_size(made) if options.image_size is None else options.image_size
    # before anything is computed: names may be wrong
    texts = {} if options.prompts is None else dict(zip(made, prompt_texts(made, options.prompts), strict=True))
    with_features = [network for network in networks if hasattr(network, "features")]
    references: dict[str, Tensor] = {}
    if options.reference is not None:
        references = reference_features(options.reference, with_features, image_size, device)
    if options.write is not None:
        kinds = {f"{network.name}.fingerprint": network.fingerprint for network in with_features}
        write_features(options.write, references, kinds | {"image_size": str(image_size)})
    return score(made, networks, references, texts, image_size, device) if made else []


def main(args: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m tfusion.bench.folder", description=__doc__)
    parser.add_argument("--config", action=ActionConfigFile, help="an overlay with generation_metrics.networks")
    parser.add_class_arguments(GenerationMetrics, "generation_metrics")
    parser.add_argument("--generated", type=Path | None, help="folder of pictures")
    parser.add_argument("--reference", type=Path | None, help="folder of pictures, or a file that --write wrote")
    parser.add_argument("--image_size", type=int | None, help="side that all are brought to, pixels")
    parser.add_argument("--prompts", type=Path | None, help="prompts.jsonl that the pictures were made from")
    parser.add_argument("--write", type=Path | None, help="file for the reference pictures' features")
    parser.add_argument("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.instantiate(parser.parse_args(args))
    try:
        found = run(options)
    except ValueError as error:
        sys.stderr.write(f"tfusion: error: {error}\n")
        sys.exit(2)
    for one in found:
        error = "" if one.standard_error is None else f" +- {one.standard_error:.4g}"
        sys.stdout.write(f"{one.name:<28} {one.value:.5g}{error}   (n {one.n}, {one.network})\n")
    result = {one.name: one.value for one in found} | ({"n": found[0].n} if found else {})
    if options.write is not None:
        result["written"] = str(options.write)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
