"""Reference curves: what the losses of some seeds were, with the settings they were trained with, as a JSON file.

`tfusion/bench/curves/NAME.json` holds every logged loss of each seed, so bands can be computed anew, and
`settings`, by which a run with the same recipe is recognised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfusion.bench.curve_band import Curve
from tfusion.loading import read_config
from tfusion.training.run_folder import read_metrics, write_atomically

FOLDER = Path(__file__).parent / "curves"
LOSSES = ("loss", "text_loss", "diffusion_loss")
CURVES = tuple(f"{kind}/{loss}" for kind in ("train", "val") for loss in LOSSES)

# Groups of config.yaml that say what is trained on what; of the trainer, what changes the losses.
COMPARED = ("model", "data", "ema", "trainer.max_steps", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm")
SEEDS = ("model.init_args.seed", "data.seed")
IGNORED = (
    *SEEDS,
    "model.init_args.generation",
    "model.init_args.compile_blocks",
    "model.init_args.model.init_args.attention_backend",
    "model.init_args.model.init_args.activation_checkpointing",
    "data.lanes",
    "data.num_workers",
    "data.val_rows",
    "data.prompts",
    "data.choices",
    "data.predict_batch_size",
    "data.max_bad_share",
)


@dataclass(frozen=True)
class ReferenceCurves:
    """The curves of several seeds.

    Attributes:
        name: such as `quickstart`.
        settings: what they were trained with, by key: `data.seq_len`.
        curves: by column of metrics.csv, losses (R, S).
    """

    name: str
    settings: dict[str, Any]
    curves: dict[str, Curve]

    @property
    def seeds(self) -> int:
        return len(next(iter(self.curves.values())).losses)


def names() -> list[str]:
    """The shipped references."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read(reference: str) -> ReferenceCurves:
    """A shipped reference by its name, or a file of one's own by its path (`*.json`).

    Raises:
        ValueError: there is none, or it is no such file.
    """
    path = Path(reference) if reference.endswith(".json") else FOLDER / f"{reference}.json"
    if not path.is_file():
        raise ValueError(
            f"no reference curves {reference!r} ({path} does not exist); there are: {', '.join(names()) or 'none'}; "
            f"make them from runs of several seeds: python -m tfusion.bench.curve --make {path.stem} --runs A B C"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        curves = {
            name: Curve(np.array(curve["steps"], int), np.array(curve["losses"], float))
            for name, curve in content["curves"].items()
        }
        return ReferenceCurves(content["name"], content["settings"], curves)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of reference curves ({error}); make it anew with --make") from error


def make(name: str, runs: Sequence[Path]) -> ReferenceCurves:
    """A reference from finished runs that differ in nothing but their seeds.

    Raises:
        ValueError: fewer than two runs, other settings, a seed twice, other steps, a loss that is no positive number.
    """
    if len(runs) < 2:
        raise ValueError(f"got {len(runs)} run, expected at least 2 (3 are usual), of different seeds")
    settings = settings_of(runs[0])
    seen: dict[tuple[Any, ...], Path] = {}
    for run in runs:
        differing = differences(settings_of(run), settings)
        if differing:
            raise ValueError(f"{run} has other settings than {runs[0]}: {_few(differing)}")
        flat = dict(_flat(read_config(run)))
        seeds = tuple(flat.get(key) for key in SEEDS)
        if seeds in seen:
            raise ValueError(f"{run} and {seen[seeds]} have the same seeds {seeds} ({', '.join(SEEDS)})")
        seen[seeds] = run
    curves = [read_curves(run) for run in runs]
    first = curves[0]
    for run, own in zip(runs, curves, strict=True):
        for column in first | own:
            steps = [c[column].steps.tolist() if column in c else [] for c in (first, own)]
            if steps[0] != steps[1]:
                last = [max(s, default=None) for s in steps]
                raise ValueError(
                    f"{runs[0]} and {run} have {column} at different steps (the last are {last[0]} and {last[1]}); "
                    "expected finished runs of one configuration"
                )
            losses = own[column].losses
            if not (np.isfinite(losses) & (losses > 0)).all():
                raise ValueError(f"{run}: {column} has a loss that is not a positive number; leave this run out")
    joined = {c: Curve(first[c].steps, np.stack([own[c].losses for own in curves])) for c in first}
    return ReferenceCurves(name, settings, joined)


def write(reference: ReferenceCurves, path: Path) -> None:
    """Write the file, a line a seed and curve, losses to five digits."""
    curves = []
    for name, curve in reference.curves.items():
        seeds = ",\n".join("    " + json.dumps([float(f"{x:.5g}") for x in losses]) for losses in curve.losses)
        steps = json.dumps(curve.steps.tolist())
        curves.append(f'  {json.dumps(name)}: {{\n   "steps": {steps},\n   "losses": [\n{seeds}\n   ]\n  }}')
    settings = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in reference.settings.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path,
        f'{{\n "name": {json.dumps(reference.name)},\n "settings": {{\n{settings}\n }},\n "curves": {{\n'
        + ",\n".join(curves)
        + "\n }\n}\n",
    )


def read_curves(run: Path) -> dict[str, Curve]:
    """The loss curves of a run's metrics.csv, by column. A row torn by a kill, or still being written, is left out.

    Raises:
        ValueError: no such file, a cell that is no number, or no training loss in it.
    """
    path = run / "metrics.csv"
    if not path.is_file():
        raise ValueError(f"{run} has no metrics.csv; give the folder of a run, as `tfusion fit` makes it")
    rows = read_metrics(path)[1]
    curves = {}
    for column in CURVES:
        logged = [row for row in rows if row.get(column)]
        losses = [_loss(row, column, path) for row in logged]
        if logged:
            curves[column] = Curve(np.array([int(row["step"]) for row in logged]), np.array(losses))
    if not any(column.startswith("train/") for column in curves):
        raise ValueError(
            f"{path} has no training loss yet; expected a column of {', '.join(f'train/{loss}' for loss in LOSSES)}"
        )
    return curves


def _loss(row: dict[str, str], column: str, path: Path) -> float:
    try:
        return float(row[column])
    except ValueError as error:
        raise ValueError(f"{path}, step {row['step']}, column {column}: {error}") from error


def settings_of(run: Path) -> dict[str, Any]:
    """What of a run's config.yaml decides how its losses fall, by key.

    Left out: seeds, the layout of processes, precision, and how pictures are generated.
    """
    return {
        key: value
        for key, value in _flat(read_config(run))
        if _starts(key, COMPARED) and not _starts(key, IGNORED) and value is not None and value is not False
    }


def differences(own: dict[str, Any], reference: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(own, reference) of each key that differs. None and False are as good as no key: later versions have more."""
    return {key: (own.get(key), reference.get(key)) for key in reference | own if own.get(key) != reference.get(key)}


def recognise(run: Path) -> ReferenceCurves:
    """The shipped reference with the settings of a run.

    Raises:
        ValueError: there is none; names the nearest and the keys that differ.
    """
    shipped = [read(name) for name in names()]
    if not shipped:
        raise ValueError(
            f"no reference curves are shipped ({FOLDER} holds none); "
            "make them from runs of several seeds: python -m tfusion.bench.curve --make NAME --runs A B C"
        )
    own = settings_of(run)
    nearest = min(shipped, key=lambda reference: len(differences(own, reference.settings)))
    differing = differences(own, nearest.settings)
    if differing:
        raise ValueError(
            f"{run} has another configuration than the references ({', '.join(names())}); the nearest is "
            f"{nearest.name}, which differs in {_few(differing)}; "
            f"to compare all the same, give --reference {nearest.name}"
        )
    return nearest


def _few(differing: dict[str, tuple[Any, Any]]) -> str:
    shown = [f"{key}: {own!r}, not {reference!r}" for key, (own, reference) in list(differing.items())[:8]]
    return "; ".join(shown) + (f"; and {len(differing) - 8} more" if len(differing) > 8 else "")


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists: ("data.image_corpora.0.class_path", ...)."""
    if isinstance(value, dict | list) and value:
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _starts(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
