"""Two processes do what one does, under DDP and FSDP2: losses, averages, metrics, samples, checkpoints, predictions."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from PIL import Image
from torch._dynamo.utils import counters

from tests.conftest import BYTES_VOCAB_SIZE, IMAGE_SIZE, TinyPictures, TinyTexts
from tests.training.processes import RANKS, run_ranks
from tfusion import losses
from tfusion.callbacks.checkpoint import AtomicCheckpointIO
from tfusion.callbacks.choices import RankedChoice
from tfusion.callbacks.ema import EMA
from tfusion.callbacks.perplexity import Perplexity
from tfusion.callbacks.samples import SampleGrid
from tfusion.callbacks.writer import PredictionWriter
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.models.transfusion import Transfusion
from tfusion.requests import GenerationConfig
from tfusion.training.parallel import check_strategy, gather_lists
from tfusion.training.transfusion import TransfusionModule

STEPS, HALF = 10, 5
CHUNK_BYTES = losses.CHUNK_BYTES
REQUESTS = [
    {"segments": ["red"], "generate": "image", "n": 2},
    {"segments": ["a"], "generate": "any", "temperature": 1.0},
    {"segments": ["one blue tile"], "generate": "text"},
]
# What is done by two processes: name -> arguments of `fit`.
FITS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},  # as the user may say it, without the overlay
    "ddp_accumulated": {"strategy": "DDP", "accumulate": 2},
    "ddp_workers": {"strategy": "DDP", "workers": 2},
    "ddp_accumulated_workers": {"strategy": "DDP", "accumulate": 2, "workers": 2},
    "ddp_recomputed": {"strategy": "DDP", "activation_checkpointing": "full"},
    "ddp_chunked": {"strategy": "DDP", "activation_checkpointing": "selective", "chunk_rows": 9},
    "ddp_compiled": {"strategy": "DDP", "activation_checkpointing": "selective", "compile_blocks": True},
    "fsdp": {"strategy": "FSDP2"},
    "fsdp_accumulated": {"strategy": "FSDP2", "accumulate": 2},
    "fsdp_recomputed": {"strategy": "FSDP2", "activation_checkpointing": "full"},
    "fsdp_chunked": {"strategy": "FSDP2", "activation_checkpointing": "selective", "chunk_rows": 9},
    "fsdp_compiled": {"strategy": "FSDP2", "activation_checkpointing": "full", "compile_blocks": True},
}
# After `one` and `fsdp` have saved their states at HALF: name -> whose state, and where.
RESUMES = {"fsdp_from_one": ("one", "FSDP2"), "ddp_from_fsdp": ("fsdp", "DDP"), "fsdp_from_fsdp": ("fsdp", "FSDP2")}


def strategy(name: str) -> Any:
    """A fresh one, for it keeps its model."""
    if name == "DDP":
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    if name == "FSDP2":
        return ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=False)
    return name


def make(
    workers: int = 0, prompts: Path | None = None, choices: Path | None = None, compiled: bool = False, **model: Any
) -> tuple[TransfusionModule, MultimodalDataModule]:
    sizes = {"vocab_size": BYTES_VOCAB_SIZE, "latent_shape": (3, IMAGE_SIZE, IMAGE_SIZE), "patch_size": 4}
    sizes |= {"dim": 36, "num_layers": 2, "num_heads": 2, "max_seq_len": 64, "patch_positions": True}
    module = TransfusionModule(
        Transfusion(**sizes, **model),
        FlowMatchEulerDiscreteScheduler(),
        prediction_type="sample",
        lr=1e-2,
        warmup_steps=2,
        generation=GenerationConfig(num_inference_steps=2, guidance_scale=2.0, max_new_tokens=4),
        seed=3,
        compile_blocks=compiled,
    )
    data = MultimodalDataModule(
        [TinyPictures()],
        [TinyTexts()],
        vocab_size=BYTES_VOCAB_SIZE,
        seq_len=64,
        rows_per_step=4,
        lanes=2,
        num_workers=workers,
        max_images_per_row=10,  # so that the ranks have unequal numbers of images
        val_rows=2,
        prompts=None if prompts is None else str(prompts),
        predict_batch_size=1,
        choices=None if choices is None else {"endings": str(choices)},
    )
    return module, data


class Recorder(L.Callback):
    """Keep the losses and the validation metrics of each step, and save the states at HALF and at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.losses, self.metrics = folder, [], {}
        self.validated = 0
        self.counts: list[list[list[float]]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, *args: Any) -> None:
        if trainer.global_step == self.seen:
            return
        self.seen = trainer.global_step
        self.counts.append(gather_lists([batch.step_counts.tolist()]))
        metrics = pl_module.step_metrics()
        self.losses.append([metrics[f"train/{name}"] for name in ("text_loss", "diffusion_loss", "grad_norm")])
        if self.seen in (HALF, STEPS):
            trainer.save_checkpoint(self.folder / f"{self.seen}.ckpt")

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, *args: Any) -> None:
        self.validated += int((outputs["labels"] >= 0).sum() + outputs["valid"].sum())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        values["labels and images"] = sum(gather_lists([self.validated]))  # means would not show a row done twice
        self.validated = 0
        self.metrics[trainer.global_step] = values


def fit(
    folder: Path,
    strategy_name: str = "auto",
    accumulate: int = 1,
    workers: int = 0,
    ckpt_path: Path | None = None,
    precision: str = "32-true",
    chunk_rows: int | None = None,
    compile_blocks: bool = False,
    **model: Any,
) -> None:
    """Train, validate and sample; leave in the folder what `result` reads."""
    losses.CHUNK_BYTES = CHUNK_BYTES if chunk_rows is None else 4 * BYTES_VOCAB_SIZE * chunk_rows
    recorder = Recorder(folder)
    trainer = trainer_of(
        folder,
        strategy_name,
        precision=precision,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        val_check_interval=HALF * accumulate,
        callbacks=[EMA(0.9), Perplexity(), RankedChoice(), SampleGrid(HALF, 3, 2, 1), recorder],
    )
    module, data = make(workers, choices=folder.parent / "choices.jsonl", compiled=compile_blocks, **model)
    counters.clear()
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    if trainer.is_global_zero:
        kept = {"losses": torch.tensor(recorder.losses), "metrics": recorder.metrics, "counts": recorder.counts}
        kept["graphs"] = counters["stats"]["unique_graphs"]
        torch.save(kept, folder / "result.pt")


def predict(folder: Path, strategy_name: str, prompts: Path, ckpt_path: Path, precision: str = "32-true") -> None:
    module, data = make(prompts=prompts)
    trainer = trainer_of(folder, strategy_name, precision=precision, callbacks=[PredictionWriter()])
    trainer.predict(module, data, ckpt_path=ckpt_path, return_predictions=False, weights_only=True)


def trainer_of(folder: Path, strategy_name: str, **settings: Any) -> L.Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    endless = {"max_epochs": -1, "check_val_every_n_epoch": None, "gradient_clip_val": 0.5}
    return L.Trainer(
        accelerator="cpu",
        devices=1 if strategy_name == "auto" else RANKS,
        strategy=strategy(strategy_name),
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
        **(quiet | endless | settings),
    )


def all_of_a_rank(root: Path) -> None:
    """What each of two processes does, one after another."""
    for name, settings in FITS.items():
        settings = dict(settings)
        fit(root / name, settings.pop("strategy"), **settings)
    for name, (source, strategy_name) in RESUMES.items():
        fit(root / name, strategy_name, ckpt_path=root / source / f"{HALF}.ckpt")
    for name in ("DDP", "FSDP2"):
        for prompts in ("three", "one"):  # one request: nothing for rank 1
            predict(root / f"{prompts}_{name}", name, root / f"{prompts}.jsonl", root / "one" / f"{STEPS}.ckpt")
    fit(root / "fsdp_bf16", "FSDP2", precision="bf16-mixed")
    predict(root / "bf16_FSDP2", "FSDP2", root / "three.jsonl", root / "one" / f"{STEPS}.ckpt", "bf16-mixed")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, cache_folder: None) -> Path:
    """The folders of all runs."""
    root = tmp_path_factory.mktemp("parallel")
    for name, count in (("three", 3), ("one", 1)):
        lines = [json.dumps(request) + "\n" for request in REQUESTS[:count]]
        (root / f"{name}.jsonl").write_text("".join(lines))
    questions = [{"context": f"Line {n}", "choices": [" of a", f" xyz {n}", "!"], "answer": n % 3} for n in range(11)]
    (root / "choices.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    fit(root / "one")
    run_ranks(root / "output", all_of_a_rank, root)
    fit(root / "one_recomputed", activation_checkpointing=True)
    fit(root / "one_from_fsdp", ckpt_path=root / "fsdp" / f"{HALF}.ckpt")
    for prompts in ("three", "one"):
        predict(root / f"{prompts}_auto", "auto", root / f"{prompts}.jsonl", root / "one" / f"{STEPS}.ckpt")
    fit(root / "one_bf16", precision="bf16-mixed")
    predict(root / "bf16_auto", "auto", root / "three.jsonl", root / "one" / f"{STEPS}.ckpt", "bf16-mixed")
    return root


def result(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "result.pt", weights_only=True)


def checkpoint(folder: Path, step: int = STEPS) -> dict[str, Any]:
    return torch.load(folder / f"{step}.ckpt", weights_only=True)


pytestmark = pytest.mark.multi
LAYOUTS = [*FITS, "one_recomputed"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_loss_is_that_of_one_process(root: Path, name: str) -> None:
    """And every gradient's norm."""
    losses = result(root / "one")["losses"]
    assert losses.shape == (STEPS, 3)
    assert losses[-1, 0] < 0.8 * losses[0, 0]
    torch.testing.assert_close(result(root / name)["losses"], losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["ddp_compiled", "fsdp_compiled"])
def test_blocks_are_compiled(root: Path, name: str) -> None:
    """Under FSDP2 in parts, between its hooks; torch would fall back to eager blocks without an error."""
    assert result(root / name)["graphs"] >= 1
    assert result(root / name.split("_")[0])["graphs"] == 0


@pytest.mark.parametrize("name", ["ddp", "fsdp_accumulated"])
def test_the_ranks_counts_differ(root: Path, name: str) -> None:
    """Of labels and of images: were they equal, the mean of the ranks' means would pass above, too."""
    counts = result(root / name)["counts"]
    for kind in (0, 1):
        assert sum(first[kind] != second[kind] for first, second in counts) >= STEPS // 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_and_their_average_are_those_of_one_process(root: Path, name: str) -> None:
    one, other = checkpoint(root / "one"), checkpoint(root / name)
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert {key.split(".")[0] for key in other["state_dict"]} == {"model", "ema_model"}
    for key, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][key], weight, rtol=1e-4, atol=2e-5, msg=key)
    assert other["MultimodalDataModule"] == one["MultimodalDataModule"]


@pytest.mark.parametrize("name", [*LAYOUTS, *RESUMES])
def test_validation_is_that_of_one_process(root: Path, name: str) -> None:
    one, other = result(root / "one")["metrics"], result(root / name)["metrics"]
    assert set(one) == {HALF, STEPS}
    assert set(other) == ({STEPS} if name in RESUMES else {HALF, STEPS})
    assert {"val/lines/perplexity", "val/tiles/diffusion_loss", "val/loss", "val/endings/accuracy"} < set(one[STEPS])
    for step in other:
        assert other[step] == pytest.approx(one[step], rel=1e-5)


@pytest.mark.parametrize("name", [*FITS, *RESUMES])
def test_samples_are_those_of_one_process(root: Path, name: str) -> None:
    """Every request once, in order: 3 pictures, 2 captions and a text."""
    one, other = root / "one" / "samples", root / name / "samples"
    path = f"step={STEPS:07d}"
    lines = (one / f"{path}.jsonl").read_text()
    assert [json.loads(line)["request"] for line in lines.splitlines()] == list(range(6))
    assert (other / f"{path}.jsonl").read_text() == lines
    sheets = [np.asarray(Image.open(folder / f"{path}.png")).astype(int) for folder in (one, other)]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1  # levels of 255
    assert not list(other.glob(".*"))


def moments(state: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    [optimizer] = state["optimizer_states"]
    assert [sorted(group["params"]) for group in optimizer["param_groups"]] != [[], []]
    return optimizer["state"]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_each_parameter_has_its_own_moments(root: Path, name: str) -> None:
    one, other = moments(checkpoint(root / "one", HALF)), moments(checkpoint(root / name, HALF))
    assert set(one) == set(other) == {key for key in checkpoint(root / "one")["state_dict"] if key[:3] != "ema"}
    for key in one:
        assert other[key]["step"] == HALF
        for moment in ("exp_avg", "exp_avg_sq"):
            scale = one[key][moment].abs().max().item()
            assert scale > 0
            torch.testing.assert_close(other[key][moment], one[key][moment], rtol=1e-3, atol=1e-4 * scale, msg=key)


@pytest.mark.parametrize("name", [*RESUMES, "one_from_fsdp"])
def test_a_state_loads_on_any_layout(root: Path, name: str) -> None:
    """Losses go on as if nothing had happened; the norms of gradients alone would not see mixed up moments."""
    torch.testing.assert_close(result(root / name)["losses"], result(root / "one")["losses"][HALF:], rtol=1e-5, atol=0)
    one, other = checkpoint(root / "one"), checkpoint(root / name)
    for key, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][key], weight, rtol=1e-4, atol=2e-5, msg=key)
    for key, values in moments(one).items():
        for moment in ("exp_avg", "exp_avg_sq"):
            scale = values[moment].abs().max().item()
            found = moments(other)[key][moment]
            torch.testing.assert_close(found, values[moment], rtol=1e-3, atol=1e-3 * scale, msg=key)


def test_bf16_is_cast_where_one_process_casts_it(root: Path) -> None:
    """Before the weights move apart the losses are equal, and would not be with timesteps or norms in bf16."""
    one, sharded = result(root / "one_bf16")["losses"], result(root / "fsdp_bf16")["losses"]
    assert not torch.allclose(one[0], result(root / "one")["losses"][0], rtol=1e-5)
    torch.testing.assert_close(sharded[0, :2], one[0, :2], rtol=1e-5, atol=0)
    torch.testing.assert_close(sharded, one, rtol=2e-2, atol=0)
    assert {weight.dtype for weight in checkpoint(root / "fsdp_bf16")["state_dict"].values()} == {torch.float32}


@pytest.mark.parametrize(("prompts", "name"), [*product(("three", "one"), ("DDP", "FSDP2")), ("bf16", "FSDP2")])
def test_predictions_are_those_of_one_process(root: Path, prompts: str, name: str) -> None:
    """Bit for bit, for the weights are the same."""
    one = root / f"{prompts}_auto" / "predictions"
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert {"predictions.jsonl", "000000-0-0.png", "000000-1-0.png"} < set(files)
    assert {path.name: path.read_bytes() for path in (root / f"{prompts}_{name}" / "predictions").iterdir()} == files


def test_what_fsdp_would_not_compile_is_refused() -> None:
    module, _ = make(compiled=True, activation_checkpointing="selective")
    with pytest.raises(ValueError, match="would compile nothing .* set compile_blocks to false"):
        module._check_sharded(compiled=True)
    module._check_sharded(compiled=False)


def test_strategies_that_would_not_do_are_refused() -> None:
    check_strategy(SingleDeviceStrategy(), 1)
    check_strategy(DDPStrategy(), 2)
    check_strategy(ModelParallelStrategy(2, 1, save_distributed_checkpoint=False), 2)
    with pytest.raises(ValueError, match="data_parallel_size auto and tensor_parallel_size auto for 2 processes"):
        check_strategy(ModelParallelStrategy(save_distributed_checkpoint=False), 2)
    with pytest.raises(ValueError, match="set data_parallel_size 4 and tensor_parallel_size 1"):
        check_strategy(ModelParallelStrategy(2, 2, save_distributed_checkpoint=False), 4)
    with pytest.raises(ValueError, match="save_distributed_checkpoint true"):
        check_strategy(ModelParallelStrategy(2, 1), 2)
    with pytest.raises(ValueError, match="got trainer.strategy FSDPStrategy; expected auto, DDP"):
        check_strategy(FSDPStrategy(), 2)
