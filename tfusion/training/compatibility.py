"""Does a checkpoint fit this run? Weights of another model are refused in words, another layout is counted anew."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def recount_micro_batches(checkpoint: dict[str, Any], micro_batches: int) -> None:
    """Lightning counts micro-batches; this run may divide a step into more or fewer of them than the last."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["current"], progress["total"]):  # accumulation goes by the one, validation by the other
        shift = checkpoint["global_step"] * micro_batches - counts["ready"]
        for name in counts:
            counts[name] += shift


def check_state_dict(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise ValueError, naming what differs, unless the names and shapes are the same."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in the configured model" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)}, the configured model has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"the checkpoint is of another model: {'; '.join(problems[:3])}{more}. Use the config.yaml of its run"
        )


def check_architecture(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, where settings that shapes do not show are not the same."""
    problems = [
        f"{name} is {found.get(name)!r}, the configured model has {value!r}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if problems:
        raise ValueError(f"the checkpoint is of another model: {'; '.join(problems)}. Use the config.yaml of its run")
