"""Folders of diffusers' autoencoders: which kind one holds, its configuration, its frozen network, its fingerprint."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch

WHOLE = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PARTS, INDEX = "diffusion_pytorch_model-*-of-*.safetensors", "diffusion_pytorch_model.safetensors.index.json"
TOKENIZERS = {"AutoencoderKL": "VAETokenizer", "VQModel": "VQTokenizer"}  # by the kind that they read


def load_config(path: str, subfolder: str | None, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constructor's arguments of the autoencoder in a folder or on the Hugging Face hub, and its config.json.

    Args:
        path, subfolder: where it is.
        kind: the class that it has to be, `AutoencoderKL` or `VQModel`.

    Raises:
        ValueError: it cannot be read, is of another kind, or of pictures without three channels.
    """
    network = _class_of(kind)
    folder = Path(path, subfolder or "")
    if Path(path).exists():
        _check_folder(folder, kind)
    elif path.count("/") != 1 or path.startswith((".", "/", "~", "runs/")):  # the hub's names are owner/name
        raise ValueError(
            f"there is no image autoencoder at {path!r} (looked in {Path(path).absolute()}): give a folder that "
            f"{kind}.save_pretrained wrote, or train one first (tfusion fit --config configs/autoencoder.yaml)"
        )
    try:
        config = network.load_config(path, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the config of the image autoencoder {path!r} (subfolder {subfolder!r}) could not be read, here "
            f"or from the Hugging Face hub; give a folder that {kind}.save_pretrained wrote, or a name "
            f"on the hub that this machine can download. The cause: {error}"
        ) from error
    found = config.get("_class_name")
    if found != kind:
        read = " and ".join(f"{kind} ({tokenizer})" for kind, tokenizer in TOKENIZERS.items())
        advice = f"take {TOKENIZERS[found]}" if found in TOKENIZERS else f"only {read} can be read"
        raise ValueError(
            f"{str(folder)!r} holds {found} (_class_name in config.json), expected {kind} for {TOKENIZERS[kind]}: "
            f"{advice}"
        )
    # What an older config does not say is the constructor's default, as when the weights are loaded.
    defaults = {name: argument.default for name, argument in inspect.signature(network).parameters.items()}
    arguments = defaults | network.extract_init_dict(config)[0]
    if arguments["in_channels"] != 3 or arguments["out_channels"] != 3:
        raise ValueError(f"{str(folder)!r} works on {arguments['in_channels']} image channels, expected 3 (RGB)")
    return arguments, config


def load_frozen(path: str, subfolder: str | None, kind: str, dtype: torch.dtype) -> torch.nn.Module:
    """The network with its weights, for evaluation only."""
    options = {"torch_dtype": dtype, "low_cpu_mem_usage": False}  # or it asks for accelerate, each time
    network = _class_of(kind).from_pretrained(path, subfolder=subfolder, **options)
    return network.eval().requires_grad_(False)


def fingerprint_of(path: str, subfolder: str | None, config: dict[str, Any]) -> str:
    """16 characters of the sha256 of config.json and of the weights' files, in the order of their names.

    Of what the file says, not of the constructor's arguments: another diffusers may have more of these. Names that
    begin with an underscore (`_diffusers_version`, `_name_or_path`) are notes, which change nothing.
    """
    folder = Path(path, subfolder or "") if Path(path).exists() else _downloaded(path, subfolder)
    said = {name: value for name, value in config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=list).encode())
    for file in weight_files(folder):
        with file.open("rb") as weights:
            while block := weights.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """What `from_pretrained` reads of a folder, which may hold other precisions and formats of the same beside it."""
    index = folder / INDEX
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [folder / name for name in WHOLE if (folder / name).is_file()][:1]


def _downloaded(name: str, subfolder: str | None) -> Path:
    """The folder of an autoencoder of the Hugging Face hub, with the weights that `from_pretrained` reads."""
    from huggingface_hub import snapshot_download

    folder = Path()
    for patterns in ([INDEX, WHOLE[0], PARTS], [WHOLE[1]]):  # in the order in which they are looked for
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        folder = Path(snapshot_download(name, allow_patterns=patterns), subfolder or "")
        if weight_files(folder):
            break
    return folder


def _class_of(kind: str) -> Any:
    import diffusers  # takes seconds to import: only where it is used

    return getattr(diffusers, kind)


def _check_folder(folder: Path, kind: str) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} has no config.json; give a folder that {kind}.save_pretrained wrote "
            "(of a pipeline, its subfolder vae or vqvae)"
        )
    if not weight_files(folder):
        raise ValueError(
            f"{str(folder)!r} has a config.json but no weights: expected {WHOLE[0]}, or its parts and {INDEX}, or "
            f"{WHOLE[1]}"
        )
