"""Warm start: the weights of another run as the first weights of this one, as `init_from` says, and nothing silently.

A parameter is taken where name and shape are the same. What the checkpoint lacks stays as it was drawn, and what the
model has no place for is left, only where the user has named it. The text tokenizer comes with the weights, for ids
mean what they have learned. Optimizer, step and data start anew: `--ckpt_path` is for going on.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tfusion.tokenizers import ImageTokenizer, TextTokenizer
from tfusion.training.compatibility import UNSAID

log = logging.getLogger(__name__)

# Settings that mean something to these parts alone; any other is the trunk's.
ADAPTERS = ("patch_encoder", "patch_decoder")
OF_ADAPTERS = ("latent_channels", "patch_size", "adapter", "image_attention", "family", "prediction_type")


@dataclass(frozen=True)
class InitFrom:
    """Where the first weights come from.

    Args:
        path: a run folder (its `last`), or a checkpoint; its averaged weights are taken where it has them.
        new: parts that the checkpoint may lack, or hold in another shape; where it does, they start from random
            weights. A part is a piece of a parameter's dotted name: `patch_encoder`, `transformer.blocks.5`, `q_norm`.
        unused: parts of the checkpoint that the model may have no place for.
    """

    path: str
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


class WarmStart:
    """A checkpoint that has been found to fit a model, as far as `init_from` allows.

    Args:
        init_from: what the user says.
        model: with its parameters' names and shapes; the meta device will do.
        architecture: of the module, what shapes do not show.
        vocab_size: of the module's text.
        image_tokenizer: of the module; None = it has no images.

    Raises:
        ValueError: no such path, not a checkpoint, or one that fits only in part and this is not said.
    """

    def __init__(
        self,
        init_from: InitFrom,
        model: nn.Module,
        architecture: dict[str, Any],
        vocab_size: int,
        image_tokenizer: ImageTokenizer | None = None,
    ) -> None:
        self.path = _find(init_from.path)
        saved = read_checkpoint(self.path)
        self.text_tokenizer = TextTokenizer.from_json(saved["text_tokenizer"])
        if self.text_tokenizer.vocab_size != vocab_size:
            raise ValueError(
                f"init_from: {self.path} comes with a text tokenizer of {self.text_tokenizer.vocab_size} ids, the "
                f"configured model has {vocab_size}: set model vocab_size and data.vocab_size to the former"
            )
        weights = evaluation_weights(saved["state_dict"])
        wanted = dict(model.named_parameters())
        self.taken = {name: weights[name] for name, p in wanted.items() if _same_shape(weights.get(name), p)}
        self.new = [name for name in wanted if name not in self.taken]
        self.unused = {name: tensor for name, tensor in weights.items() if name not in self.taken}
        self._refuse_what_is_not_said(init_from, wanted)
        self._refuse_other_settings(architecture, saved["architecture"])
        if any(_within(name, getattr(model, "latent_parts", ())) for name in self.taken):
            self._refuse_another_tokenizer(image_tokenizer, saved.get("image_tokenizer"))

    def _refuse_what_is_not_said(self, init_from: InitFrom, wanted: dict[str, Tensor]) -> None:
        lacking = [name for name in self.new if not _within(name, init_from.new)]
        left = [name for name in self.unused if not _within(name, init_from.unused)]
        problems = []
        for name in [name for name in lacking if name in self.unused][:3]:
            shapes = tuple(self.unused[name].shape), tuple(wanted[name].shape)
            problems.append(f"{name} is {shapes[0]} there, the configured model has {shapes[1]}")
        if lack := parts_of(lacking, self.taken):
            problems.append(f"it lacks {', '.join(lack)}: where these may start anew, add new: {_yaml(lack)}")
        if leave := parts_of(left, self.taken):
            problems.append(f"its {', '.join(leave)} would be left: where this is meant, add unused: {_yaml(leave)}")
        if not self.taken:
            problems = ["nothing in it has the name and shape of a parameter of the configured model"]
        if problems:
            raise ValueError(f"init_from: {self.path} does not fit the configured model: {'; '.join(problems)}")

    def _refuse_other_settings(self, expected: dict[str, Any], found: dict[str, Any]) -> None:
        adapters = any(_within(name, ADAPTERS) for name in self.taken)
        expected, found = UNSAID | expected, UNSAID | found
        problems = [
            f"{name} is {found[name]!r} there, the configured model has {expected[name]!r}"
            for name in sorted(expected.keys() & found.keys())
            if found[name] != expected[name] and (adapters or name not in OF_ADAPTERS)
        ]
        if problems:
            raise ValueError(
                f"init_from: {self.path} has learned other settings: {'; '.join(problems)}. Set the model's to them"
            )

    def _refuse_another_tokenizer(self, tokenizer: ImageTokenizer | None, found: str | None) -> None:
        """Weights that read or make latents are of one autoencoder; older checkpoints do not say of which."""
        if tokenizer is not None and found is not None and tokenizer.fingerprint != found:
            raise ValueError(
                f"init_from: {self.path} was trained with the image tokenizer {found!r}, the configured one is "
                f"{tokenizer}; the latents of one mean nothing to the other: give image_tokenizer the "
                "autoencoder that the run was trained with"
            )

    @torch.no_grad()
    def fill(self, models: Iterable[nn.Module]) -> None:
        """Copy the weights into models of these names and shapes, materialised; sharded ones keep their shards."""
        for model in models:
            for name, parameter in model.named_parameters():
                if name not in self.taken:
                    continue
                full = self.taken[name].to(parameter.dtype)
                if isinstance(parameter, DTensor):  # every rank reads the same file and keeps its shard
                    full = full.to(parameter.device)
                    full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.copy_(full)

    def report(self, model: nn.Module) -> str:
        """What has been loaded, is new and is unused, with numbers of parameters."""
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        unused = {name: tensor.numel() for name, tensor in self.unused.items()}

        def line(what: str, names: Iterable[str], others: Iterable[str], counts: dict[str, int]) -> str:
            names = list(names)
            parts = ", ".join(parts_of(names, others))
            return f"{what} {sum(counts[name] for name in names):,} parameters" + (f" ({parts})" if parts else "")

        lines = [
            line("loaded", self.taken, self.new, sizes),
            line("new", self.new, self.taken, sizes),
            line("unused", self.unused, self.taken, unused),
        ]
        return f"warm start from {self.path}: {'; '.join(lines)}"


def _find(given: str) -> Path:
    path = Path(given).expanduser()
    checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not checkpoint.exists():
        raise ValueError(
            f"init_from.path is {given!r}, but {checkpoint} does not exist; give a run folder that `tfusion fit` has "
            "filled, or a checkpoint"
        )
    return checkpoint


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint that `tfusion fit` wrote, its tensors mapped and not read; ValueError where it is none."""
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        why = f" ({error})" if isinstance(error, OSError) else ""  # torch's words are about ways of saving
        raise ValueError(f"{path} is no checkpoint: give a .ckpt that `tfusion fit` wrote{why}") from error
    needed = {"state_dict", "text_tokenizer", "architecture"}
    if not isinstance(saved, dict) or not needed <= saved.keys():
        raise ValueError(
            f"{path} is no checkpoint of a tfusion model, which has {', '.join(sorted(needed))}: give a .ckpt that "
            "`tfusion fit` wrote"
        )
    return saved


def evaluation_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averaged weights where there are any, else the trained ones, under their names in the model."""
    prefix = "ema_model." if any(name.startswith("ema_model.") for name in state_dict) else "model."
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def parts_of(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The fewest pieces of dotted names that hold all of `names` and none of `others`, in order."""
    others, parts = list(others), []
    for name in names:
        if _within(name, parts):
            continue
        pieces = name.split(".")
        for depth in range(1, len(pieces) + 1):
            part = ".".join(pieces[:depth])
            if not any(_within(other, [part]) for other in others):
                parts.append(part)
                break
    return parts


def _within(name: str, parts: Iterable[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in parts)


def _same_shape(found: Tensor | None, parameter: Tensor) -> bool:
    return found is not None and found.shape == parameter.shape


def _yaml(parts: list[str]) -> str:
    return f"[{', '.join(parts)}]"
