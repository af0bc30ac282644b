"""The files of evaluation protocols: JSON, JSON lines and `predictions.jsonl`, read with each wrong line named."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tfusion.data.json_lines import read_json_lines
from tfusion.training.run_folder import write_atomically


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: no such file, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """("FILE, line N", object) of a file of JSON objects, one a line; blank lines are skipped.

    Raises:
        ValueError: no such file, nothing in it, or a line that is no object; names the line.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a file of JSON objects, one a line")
    lines = []
    for where, value in read_json_lines(path):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: got {type(value).__name__}, expected an object")
        lines.append((where, value))
    if not lines:
        raise ValueError(f"{path} is empty; expected JSON objects, one a line")
    return lines


def field(value: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`value[key]`, of this kind.

    Raises:
        ValueError: it is missing or of another kind; `where` says in what.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if key not in value:
        raise ValueError(f"{where}: no key {key!r}; it has {sorted(value)}")
    found = value[key]
    if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
        names = " or ".join(k.__name__ for k in kinds)
        raise ValueError(f"{where}: {key!r} is {found!r}, expected {names}")
    return found


def write_prompts(requests: Iterable[dict[str, Any]], path: Path) -> None:
    """A request a line, as `tfusion predict --data.prompts` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests))


def read_predictions(path: Path, requests: int, samples: int) -> list[list[list[dict[str, str]]]]:
    """Segments of every sample of every request: `found[request][sample]`.

    Args:
        path: predictions.jsonl, or the folder `predictions` that holds it.
        requests: how many the prompts had.
        samples: how many samples each had (`n`).

    Raises:
        ValueError: no such file, a bad line, a sample that is missing, twice, or not asked for.
    """
    path = path / "predictions.jsonl" if path.is_dir() else path
    found: dict[tuple[int, int], list[dict[str, str]]] = {}
    for where, line in read_lines(path):
        key = field(line, "request", int, where), field(line, "sample", int, where)
        if key in found:
            raise ValueError(f"{where}: request {key[0]}, sample {key[1]} is there twice")
        if not (0 <= key[0] < requests and 0 <= key[1] < samples):
            raise ValueError(
                f"{where}: request {key[0]}, sample {key[1]}, but {requests} requests of {samples} samples were "
                "expected; these are predictions of other prompts"
            )
        segments = field(line, "segments", list, where)
        for segment in segments:
            if not isinstance(segment, dict) or len(segment) != 1 or not {"text", "image"} & set(segment):
                raise ValueError(f'{where}: segment {segment!r}, expected {{"text": ...}} or {{"image": ...}}')
        found[key] = segments
    missing = [(r, s) for r in range(requests) for s in range(samples) if (r, s) not in found]
    if missing:
        first = ", ".join(f"request {r} sample {s}" for r, s in missing[:3])
        raise ValueError(
            f"{path} lacks {len(missing)} of {requests * samples} samples ({first}{', ...' if missing[3:] else ''}); "
            "run `tfusion predict` with the whole prompts file"
        )
    return [[found[r, s] for s in range(samples)] for r in range(requests)]
