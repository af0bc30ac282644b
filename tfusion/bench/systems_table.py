"""The table of `tfusion.bench.systems`: a line a run, a column a claim."""

from __future__ import annotations

import math
from typing import Any

COMPOSITION = "val/shapes/composition/"
COLUMNS = {  # what a system does not do is left empty
    "text bits/byte": "val/shakespeare/bits_per_byte",
    "caption accuracy": "val/shapes/caption_accuracy",
    "caption bits/byte, image given": "val/shapes/given_image/bits_per_byte",
    "fd_reference": "val/shapes/fd_reference",
    "clip_score_reference": "val/shapes/clip_score_reference",
}


def as_table(results: list[dict[str, Any]]) -> str:
    """Markdown; composition is the mean over all kinds of prompts, seen and unseen."""
    head = ["system", "seed", "steps", "TFLOPs", "train s", *COLUMNS, "composition"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in results:
        cells = [result["system"], str(result["seed"])]
        if "failed" in result:
            cells += [result["failed"]] + [""] * (len(head) - 3)
        else:
            cells += [str(result["steps"]), f"{result['train_flops'] / 1e12:.3g}", f"{result['train_s']:.0f}"]
            cells += [_cell(result["metrics"].get(name), result["errors"].get(name)) for name in COLUMNS.values()]
            cells.append(_composition(result["metrics"], result["errors"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _composition(metrics: dict[str, float], errors: dict[str, float | None]) -> str:
    """Of the kinds' shares, each of as many prompts; their errors are independent."""
    names = [name for name in metrics if name.startswith(COMPOSITION)]
    if not names:
        return ""
    mean = sum(metrics[name] for name in names) / len(names)
    error = math.sqrt(sum((errors[name] or 0.0) ** 2 for name in names)) / len(names)
    return _cell(mean, error)


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if error is None else f"{value:.3g} +- {error:.1g}"
