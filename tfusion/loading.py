"""`tfusion.load("runs/quickstart")`: a trained model out of its run folder, ready to generate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser

from tfusion.data.datamodule import MultimodalDataModule
from tfusion.training.multimodal import MultimodalModule
from tfusion.training.run_folder import find_checkpoint
from tfusion.training.trainer_settings import precision_on
from tfusion.training.warm_start import evaluation_weights, read_checkpoint


def load(
    run: str | os.PathLike[str], checkpoint: str = "last", device: torch.device | str | None = None
) -> MultimodalModule:
    """The evaluation-ready module of a run: `model` has the averaged weights where there are any, and nothing else is
    there. To train on from them use `init_from`, or `--ckpt_path`.

        model = tfusion.load("runs/quickstart")
        [heart] = model.generate([{"segments": ["red heart"], "generate": "image"}])
        heart.segments[0].save("heart.png")

    Args:
        run: the run folder; its config.yaml says what to build.
        checkpoint: `last`, `best`, or the path of a checkpoint.
        device: None = CUDA if there is one, else CPU.

    Raises:
        ValueError: no such run or checkpoint, or weights of another model.
    """
    root = Path(run)
    settings = read_config(root)
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningModule, "model")
    module: MultimodalModule = parser.instantiate(parser.parse_object({"model": settings["model"]})).model
    state = read_checkpoint(find_checkpoint(root, checkpoint))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    module.on_load_checkpoint(state)
    module.model, module.ema_model = module.evaluation_model, None  # what is evaluated is all that is allocated
    module.materialize(device)
    module.model.load_state_dict(evaluation_weights(state["state_dict"]))
    module.precision = precision_on(device.type, settings["trainer"]["precision"])
    return module.eval()


def load_data(run: str | os.PathLike[str]) -> MultimodalDataModule:
    """The data of a run, as its config.yaml says."""
    parser = ArgumentParser()
    parser.add_class_arguments(MultimodalDataModule, "data")
    settings = read_config(Path(run))
    return parser.instantiate(parser.parse_object({"data": settings["data"]})).data


def read_config(root: Path) -> dict[str, Any]:
    """The run's config.yaml."""
    config = root / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{str(root)!r} is not a run folder: it has no config.yaml; give one that `tfusion fit` made")
    return yaml.safe_load(config.read_text(encoding="utf-8"))
