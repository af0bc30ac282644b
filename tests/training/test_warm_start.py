"""A run starts from another's weights: all that fits is taken, the rest is named by the user or refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import BYTES_VOCAB_SIZE
from tests.test_cli import CONFIG, rows, tfusion
from tests.training.processes import run_ranks
from tests.training.test_parallel import make, trainer_of
from tfusion.tokenizers import TextTokenizer
from tfusion.training.warm_start import InitFrom, WarmStart, parts_of

ADAPTERS = ("patch_encoder", "patch_decoder")


def save(module: Any, path: Path) -> Path:
    """A checkpoint as `fit` writes it, of weights that differ from those averaged."""
    module.materialize("cpu")
    module.text_tokenizer = TextTokenizer.train([], BYTES_VOCAB_SIZE)
    with torch.no_grad():
        for parameter in module.ema_model.parameters() if module.ema_model is not None else []:
            parameter.mul_(1.1)
    state = {"state_dict": module.state_dict(), "optimizer_states": []}
    module.on_save_checkpoint(state)
    torch.save(state, path)
    return path


@pytest.fixture
def text_only(tiny_module, tmp_path: Path) -> Path:
    return save(tiny_module(latent_shape=None, patch_size=None, seed=1), tmp_path / "text.ckpt")


@pytest.fixture
def both(tiny_module, tmp_path: Path) -> Path:
    return save(tiny_module(seed=1), tmp_path / "both.ckpt")


def start(module: Any, path: Path, new: tuple[str, ...] = (), unused: tuple[str, ...] = ()) -> WarmStart:
    module.init_from = InitFrom(str(path), new, unused)
    module.check_init_from()
    return module._warm_start


def test_takes_averaged_weights_into_both_and_leaves_what_is_new(tiny_module, text_only: Path) -> None:
    module, fresh = tiny_module(seed=2), tiny_module(seed=2)
    warm = start(module, text_only, new=ADAPTERS)
    for some in (module, fresh):
        some.materialize("cpu")
    warm.fill([module.model, module.ema_model])
    saved = torch.load(text_only, weights_only=True)["state_dict"]
    drawn = dict(fresh.model.named_parameters())
    for model in (module.model, module.ema_model):
        for name, parameter in model.named_parameters():
            expected = drawn[name] if name.startswith("patch_") else saved[f"ema_model.{name}"]
            assert torch.equal(parameter, expected), name
    said = warm.report(module.model)
    counts = {True: 0, False: 0}
    for name, parameter in drawn.items():
        counts[name.startswith("patch_")] += parameter.numel()
    assert f"loaded {counts[False]:,} parameters (embedding, transformer, text_head)" in said
    assert f"new {counts[True]:,} parameters (patch_encoder, patch_decoder); unused 0 parameters" in said


def test_takes_trained_weights_where_none_are_averaged(tiny_module, tmp_path: Path) -> None:
    path = save(tiny_module(ema=False, seed=1), tmp_path / "no_ema.ckpt")
    warm = start(tiny_module(), path)
    assert torch.equal(warm.taken["embedding.weight"], torch.load(path)["state_dict"]["model.embedding.weight"])


def test_a_transfusion_gives_a_model_of_text_its_trunk(tiny_module, both: Path) -> None:
    warm = start(tiny_module(latent_shape=None, patch_size=None), both, unused=ADAPTERS)
    assert not warm.new
    assert {name.split(".")[0] for name in warm.unused} == set(ADAPTERS)


def test_other_shapes_may_start_anew_where_it_is_said_of_both(tiny_module, both: Path) -> None:
    other = tiny_module(patch_size=2)  # the same trunk, other adapters
    parts = ("patch_encoder.proj", "patch_decoder")
    with pytest.raises(ValueError, match=r"patch_encoder.proj.weight is \(32, 48\) there, the configured model has"):
        start(other, both)
    with pytest.raises(ValueError, match=r"patch_size is 4 there, the configured model has 2"):
        start(other, both, parts, parts)  # the timestep's layers would fit, but have learned for other patches
    narrow = tiny_module(latent_shape=None, patch_size=None, hidden_dim=48)
    warm = start(narrow, both, ("feed_forward",), ("feed_forward", *ADAPTERS))
    assert {name.split(".")[3] for name in warm.new} == {"feed_forward"}
    assert "transformer.blocks.1.attention.o_proj.weight" in warm.taken


REFUSED = {
    "the checkpoint lacks parts": (
        "text",
        {},
        (),
        r"it lacks patch_encoder, patch_decoder: .* add new: \[patch_encoder, patch_decoder\]",
    ),
    "one of them is not said": ("text", {}, ("patch_encoder",), r"it lacks patch_decoder:"),
    "it has more": (
        "both",
        {"latent_shape": None, "patch_size": None},
        (),
        r"its patch_encoder, patch_decoder would be left: .* add unused: \[patch_encoder, patch_decoder\]",
    ),
    "deeper": (
        "both",
        {"num_layers": 3},
        (),
        r"it lacks transformer.blocks.2: .* add new: \[transformer.blocks.2\]",
    ),
    "wider": ("both", {"dim": 40}, (), r"embedding.weight is \(261, 32\) there, the configured model has \(261, 40\)"),
    "heads": ("text", {"num_heads": 4}, ADAPTERS, r"num_heads is 2 there, the configured model has 4"),
    "rotary": ("text", {"rope_theta": 500.0}, ADAPTERS, r"rope_theta is 10000.0 there, .* has 500.0"),
    "mask of images": ("both", {"image_attention": "causal"}, (), r"image_attention is 'bidirectional' there"),
    "process": ("both", {"family": "flow", "prediction_type": "sample"}, (), r"family is 'ddpm' there"),
    "vocabulary": ("both", {"vocab_size": 300}, (), r"tokenizer of 261 ids, the configured model has 300"),
    "no such path": ("gone", {}, (), r"'.*gone.ckpt', but .*gone.ckpt does not exist; give a run folder"),
    "no checkpoint": ("rubbish", {}, (), r"rubbish.ckpt is no checkpoint: give a .ckpt that `tfusion fit` wrote"),
    "of another program": ("other", {}, (), r"other.ckpt is no checkpoint of a tfusion model"),
    "a folder without one": ("folder.d", {}, (), r"folder.d', but .*folder.d/checkpoints/last.ckpt does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_is_not_said(tiny_module, text_only: Path, both: Path, tmp_path: Path, case: str) -> None:
    source, model, new, message = REFUSED[case]
    (tmp_path / "rubbish.ckpt").write_bytes(b"rubbish")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "folder.d").mkdir()
    path = tmp_path / (source if "." in source else f"{source}.ckpt")
    with pytest.raises(ValueError, match=message):
        start(tiny_module(**model), path, new)


def test_parts_are_the_fewest_pieces_of_names() -> None:
    names = ["a.b.x", "a.b.y", "a.c.x", "d.x", "d.y"]
    assert parts_of(names, ["a.e.x"]) == ["a.b", "a.c", "d"]
    assert parts_of(["a.b.x"], ["a.b.y"]) == ["a.b.x"]
    assert parts_of([], names) == []
    assert parts_of(["t.0.q_norm.w", "t.1.q_norm.w"], ["t.0.q.w", "t.1.q.w"]) == ["t.0.q_norm", "t.1.q_norm"]


# Through the command line


def write(folder: Path, name: str, config: dict[str, Any]) -> str:
    (folder / name).write_text(yaml.safe_dump(config))
    return str(folder / name)


def test_from_text_alone_to_a_transfusion(tmp_path: Path) -> None:
    """The first text loss is the text model's last, training goes on, and the first run is not needed again."""
    config = copy.deepcopy(CONFIG)
    config["trainer"]["default_root_dir"] = "text"
    config["model"]["init_args"].pop("noise_scheduler")
    config["model"]["init_args"]["model"]["init_args"] |= {"latent_shape": None, "patch_size": None}
    config["data"].pop("image_corpora")
    code, output = tfusion(tmp_path, "fit", "--config", write(tmp_path, "text.yaml", config))
    assert code == 0, output
    after_text = rows(tmp_path / "text")[-1]

    base = write(tmp_path, "both.yaml", CONFIG)
    part = {"init_from": {"path": "text", "new": ["patch_encoder", "patch_decoder"]}}
    overlay = write(tmp_path, "from_text.yaml", {"model": {"init_args": part}})
    run = ("fit", "--config", base, "--config", overlay)
    short = ("--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--model.lr", "0")
    code, output = tfusion(tmp_path, *run, *short)
    assert code == 0, output
    assert output.count("warm start from text/checkpoints/last.ckpt: loaded ") == 1
    started = rows(tmp_path / "run")[-1]
    assert started["val/text/bits_per_byte"] == after_text["val/text/bits_per_byte"]
    assert float(started["val/grey/diffusion_loss"]) > 0

    shutil.rmtree(tmp_path / "text")  # whatever has a checkpoint of its own needs no other
    go_on = ("--trainer.max_steps", "6", "--model.lr", "0.01", "--ckpt_path", "last")
    code, output = tfusion(tmp_path, *run, *go_on)
    assert code == 0, output
    assert "warm start" not in output
    train = [float(row["train/text_loss"]) for row in rows(tmp_path / "run") if row["train/text_loss"]]
    assert len(train) == 6
    assert train[-1] < train[0]
    choices = tmp_path / "endings.jsonl"
    choices.write_text(json.dumps({"context": "grey", "choices": [" 1", " 2"], "answer": 0}) + "\n")
    own = ("--config", "run/config.yaml", "--ckpt_path", "last")
    code, output = tfusion(tmp_path, "validate", *own, f"--data.choices.endings={choices}")
    assert code == 0, output
    [shown] = [line for line in output.splitlines() if line.startswith("val/text/bits_per_byte ")]
    assert float(shown.split()[1]) == pytest.approx(
        float(rows(tmp_path / "run")[-1]["val/text/bits_per_byte"]), rel=1e-3
    )
    code, output = tfusion(tmp_path, "fit", *run[1:], "--trainer.default_root_dir", "new")
    assert code == 2
    assert re.search(r"tfusion: error: init_from.path is 'text', but text does not exist", output)
    assert not (tmp_path / "new" / "metrics.csv").exists()


def test_a_trainer_that_is_told_its_checkpoint_needs_the_first_run_no_more(
    tiny_module, tiny_data, tiny_trainer, text_only: Path, tmp_path: Path
) -> None:
    """Lightning tells a module of `fit(ckpt_path=...)` after data are set up, of `trainer.ckpt_path` before."""
    init_from = InitFrom(str(text_only), ADAPTERS)
    trainer = tiny_trainer(1)
    trainer.fit(tiny_module(init_from=init_from), tiny_data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    text_only.unlink()
    trainer = tiny_trainer(2)
    trainer.ckpt_path = tmp_path / "one.ckpt"
    trainer.fit(tiny_module(init_from=init_from), tiny_data(), weights_only=True)
    assert trainer.global_step == 2
    trainer = tiny_trainer(1)
    trainer._checkpoint_connector._ckpt_path = tmp_path / "one.ckpt"  # as a resume has left it
    with pytest.raises(ValueError, match="has resumed another fit before"):
        trainer.fit(tiny_module(init_from=init_from), tiny_data())


# Two processes


def warm(folder: Path, strategy: str, path: Path) -> None:
    module, data = make()
    module.init_from = InitFrom(str(path), ADAPTERS)
    trainer = trainer_of(folder, strategy, max_steps=4, limit_val_batches=0)
    trainer.fit(module, data)
    losses = module.step_metrics()
    trainer.save_checkpoint(folder / "last.ckpt")
    if trainer.is_global_zero:
        torch.save(losses, folder / "losses.pt")


def both_strategies(root: Path) -> None:
    for name in ("DDP", "FSDP2"):
        warm(root / name, name, root / "text.ckpt")


@pytest.mark.multi
def test_two_processes_start_as_one(tmp_path: Path) -> None:
    module, _ = make()
    sizes = {"vocab_size": BYTES_VOCAB_SIZE, "dim": 36, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}
    text = type(module)(type(module.model)(latent_shape=None, patch_size=None, **sizes), seed=7)
    save(text, tmp_path / "text.ckpt")
    warm(tmp_path / "one", "auto", tmp_path / "text.ckpt")
    run_ranks(tmp_path / "output", both_strategies, tmp_path)
    expected = torch.load(tmp_path / "one" / "losses.pt", weights_only=True)
    state = torch.load(tmp_path / "one" / "last.ckpt", weights_only=True)["state_dict"]
    for name in ("DDP", "FSDP2"):
        found = torch.load(tmp_path / name / "losses.pt", weights_only=True)
        for key in ("train/text_loss", "train/diffusion_loss"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (name, key)
        theirs = torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"]
        for key, tensor in state.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-4, atol=1e-5)
