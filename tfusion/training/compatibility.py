"""Does a checkpoint fit this run? Weights of another model are refused in words, another layout is counted anew.

In a checkpoint the optimizer's state stands by parameter name. By number, as torch has it, would not do: an optimizer
numbers parameters group by group, Lightning's FSDP2 by their order in the module, and moments would change places.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor

from tfusion.diffusion import NoiseProcess
from tfusion.models.transfusion import Transfusion
from tfusion.tokenizers import ImageTokenizer

# What a model has that does not say it: older ones could choose nothing else, some have no such choice.
UNSAID = {"norm_order": "pre", "image_attention": "bidirectional", "adapter": "linear"}


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
    found = UNSAID | found
    problems = [
        f"{name} is {found.get(name)!r}, the configured model has {value!r}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if problems:
        raise ValueError(f"the checkpoint is of another model: {'; '.join(problems)}. Use the config.yaml of its run")


def check_image_tokenizer(tokenizer: ImageTokenizer, found: str | None) -> None:
    """Raise ValueError unless it is the one of this fingerprint; None: there was none, or an older checkpoint."""
    if found is not None and found != tokenizer.fingerprint:
        raise ValueError(
            f"the checkpoint was trained with the image tokenizer {found!r}, the configured one is "
            f"{tokenizer}; the latents of one mean nothing to the other: give image_tokenizer the "
            "autoencoder that the run was trained with"
        )


def architecture_of(model: Transfusion, process: NoiseProcess) -> dict[str, Any]:
    """What weights depend on and their shapes do not show."""
    return {
        "num_heads": model.transformer.num_heads,
        "rope_theta": model.transformer.rotary.theta,
        "latent_channels": model.latent_shape[0] if model.latent_shape else None,
        "patch_size": model.patch_size,
        "adapter": model.adapter,
        "image_attention": model.image_attention,
        "family": process.family,
        "prediction_type": process.prediction_type,
    }


def name_optimizer_state(checkpoint: dict[str, Any], names: list[list[str]]) -> None:
    """Replace numbers by the names of each group's parameters, in the module's order."""
    for place, state in enumerate(checkpoint["optimizer_states"]):
        if state:  # under FSDP2 ranks other than 0 have an empty one
            numbers = chain.from_iterable(group["params"] for group in state["param_groups"])
            name_of = dict(zip(numbers, chain.from_iterable(names), strict=True))
            checkpoint["optimizer_states"][place] = _renamed(state, name_of, names)


def number_optimizer_state(checkpoint: dict[str, Any], names: list[list[str]]) -> None:
    """The inverse, in the numbers of an optimizer with these groups."""
    number_of = {name: number for number, name in enumerate(chain.from_iterable(names))}
    numbers = [[number_of[name] for name in group] for group in names]
    for place, state in enumerate(checkpoint["optimizer_states"]):
        if any(isinstance(key, int) for key in state["state"]):
            raise ValueError(
                "the checkpoint's optimizer state stands by number, not by parameter name: it was written by an older "
                "tfusion, with which to go on training; validate, predict and tfusion.load take it as it is"
            )
        checkpoint["optimizer_states"][place] = _renamed(state, number_of, numbers)


def _renamed(state: dict[str, Any], new: dict[Any, Any], groups: list[list[Any]]) -> dict[str, Any]:
    return {
        "state": {new[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": params} for group, params in zip(state["param_groups"], groups, strict=True)
        ],
    }
