"""An autoencoder as a folder of diffusers, which `VAETokenizer` or `VQTokenizer` reads; whole at any time.

The folder is a link to one of two folders beside it. An export writes the other one and then, in one step, the link.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tfusion.models.autoencoder import Autoencoder


def export(model: Autoencoder, folder: Path, latents: tuple[list[float], list[float]] | None) -> None:
    """Write `config.json` and the weights; whenever this ends early, what was exported last is still there.

    Args:
        model: whose weights.
        folder: becomes a link to `.<folder>.a` or `.<folder>.b`; if it is a folder of an older version, it gives way.
        latents: mean and standard deviation of each channel, by which `VAETokenizer` normalises; None for codes.
    """
    places = [folder.with_name(f".{folder.name}.{letter}") for letter in "ab"]
    link = folder.with_name(f".{folder.name}.link")
    if link.is_symlink() and not folder.exists():
        os.replace(link, folder)  # a folder that was no link had given way, and then the run was killed
    old, new = places if folder.is_symlink() and folder.resolve() == places[0].resolve() else places[::-1]
    shutil.rmtree(new, ignore_errors=True)
    model.network.save_pretrained(new, safe_serialization=True)
    if latents is not None:
        config = json.loads((new / "config.json").read_text())
        mean, std = latents
        # normalised: (z - mean) * scaling_factor / std
        config |= {"latents_mean": mean, "latents_std": std, "scaling_factor": 1.0, "shift_factor": None}
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    link.unlink(missing_ok=True)
    link.symlink_to(new.name)  # relative: a run folder may be moved
    if folder.is_dir() and not folder.is_symlink():  # nothing puts a link in a folder's place in one step
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.replace(link, folder)
    shutil.rmtree(old, ignore_errors=True)
