"""Twenty losses of a tiny model are those recorded: whatever moves them is seen.

After a change that is meant to move them, record again and say so in the changelog:

    TFUSION_RECORD_GOLDEN=1 pytest tests/test_golden.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import lightning as L
import pytest

GOLDEN = Path(__file__).parent / "golden"
STEPS = 20


class Recorder(L.Callback):
    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {"train/text_loss": [], "train/diffusion_loss": []}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        metrics = pl_module.step_metrics()
        for name, values in self.losses.items():
            values.append(metrics[name])


@pytest.mark.parametrize(("family", "prediction_type"), [("ddpm", "epsilon"), ("flow", "sample")])
def test_losses_are_those_recorded(
    tiny_module, tiny_data, tiny_trainer, texts, family: str, prediction_type: str
) -> None:
    sampling = "uniform" if family == "ddpm" else "logit_normal"
    module = tiny_module(family, prediction_type, timestep_sampling=sampling, qk_norm=family == "flow")
    recorder = Recorder()
    trainer = tiny_trainer(STEPS, callbacks=[recorder])
    trainer.fit(module, tiny_data(image_first_noise_limit=0.5, max_images_per_row=10))

    path = GOLDEN / f"{family}_{prediction_type}.json"
    if os.environ.get("TFUSION_RECORD_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(recorder.losses, indent=1) + "\n")
    recorded = json.loads(path.read_text())
    for name, values in recorder.losses.items():
        assert len(values) == STEPS
        assert values == pytest.approx(recorded[name], rel=1e-3), name
