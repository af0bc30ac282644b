"""An autoencoder as a folder of diffusers, which `VAETokenizer` or `VQTokenizer` reads; whole at any time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tfusion.models.autoencoder import Autoencoder


def export(model: Autoencoder, folder: Path, latents: tuple[list[float], list[float]] | None) -> None:
    """Write `config.json` and the weights beside the folder, then put the new folder in the old one's place.

    Args:
        model: whose weights.
        folder: replaced if it is there.
        latents: mean and standard deviation of each channel, by which `VAETokenizer` normalises; None for codes.
    """
    new, old = (folder.with_name(f".{folder.name}.{name}") for name in ("new", "old"))
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    model.network.save_pretrained(new, safe_serialization=True)
    if latents is not None:
        config = json.loads((new / "config.json").read_text())
        mean, std = latents
        # normalised: (z - mean) * scaling_factor / std
        config |= {"latents_mean": mean, "latents_std": std, "scaling_factor": 1.0, "shift_factor": None}
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)
