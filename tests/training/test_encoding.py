"""A corpus becomes a cache: the same on any number of processes, killed or not; trained from, it is the pixels."""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.data.latent_caches import LATENT_SHAPE, Broken, Halves, Tiles, encode, one_by_one, save_autoencoder
from tests.data.picture_folders import S, write_pairs
from tests.test_cli import CONFIG, rows
from tests.training.processes import RANKS, end_ranks, run_ranks, start_ranks
from tests.training.test_equivalence import Recorder
from tfusion import __main__ as cli
from tfusion.bench.check_data import draw
from tfusion.bench.data_report import check
from tfusion.callbacks.ema import EMA
from tfusion.callbacks.generation_metrics import GenerationMetrics
from tfusion.callbacks.perplexity import Perplexity
from tfusion.callbacks.samples import SampleGrid
from tfusion.data import ImageFiles, Latents
from tfusion.data.corpora import CaptionedImage
from tfusion.data.latent_shards import KEY, SCHEMA
from tfusion.tokenizers import PixelTokenizer, VAETokenizer
from tfusion.training import encoding
from tfusion.training.encoding import CorpusEncoder

STEPS = 10
TWO = {"devices": RANKS, "strategy": "ddp"}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder"))


def contents(root: Path) -> dict[str, tuple[Any, ...]]:
    """What every file of a cache says: its metadata and its rows."""
    tables = {path.name: pq.read_table(path) for path in sorted((root / "latents").iterdir())}
    return {name: (table.schema.metadata[KEY], table.to_pylist()) for name, table in tables.items()}


# Training.


@pytest.fixture
def fit(autoencoder: str, tiny_module, tiny_data, tiny_trainer, tmp_path: Path):
    """`fit(corpus, tokenizer, **data)` -> losses of every step, and what was measured at the end."""

    def run(corpus: Any, tokenizer: VAETokenizer, **data: Any) -> tuple[list, dict[str, float]]:
        recorder, measured = Recorder(tmp_path / "last.ckpt"), Perplexity()
        trainer = tiny_trainer(
            STEPS, callbacks=[EMA(0.9), recorder, measured], limit_val_batches=None, val_check_interval=STEPS
        )
        module = tiny_module(seed=3, latent_shape=LATENT_SHAPE, patch_size=2, image_tokenizer=tokenizer)
        settings = {"image_first_noise_limit": 0.5, "caption_drop": 0.2} | data
        trainer.fit(module, tiny_data(image_corpora=[corpus], **settings))
        return recorder.losses, {one.name: one.value for one in measured.findings.measurements}

    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_the_cache_is_training_from_pixels(autoencoder: str, fit, tmp_path: Path, workers: int) -> None:
    """Bit for bit, flips included, where the autoencoder encodes a picture at a time."""
    tokenizer = one_by_one(autoencoder)
    encode(tmp_path, tokenizer, dtype="float32")
    losses, measured = fit(Tiles(), tokenizer)
    cached, measured_too = fit(Latents(str(tmp_path / "latents")), one_by_one(autoencoder), num_workers=workers)
    assert len(losses) == STEPS and len({diffusion for _, diffusion in losses}) == STEPS
    assert cached == losses
    assert measured_too == measured and "val/tiles/diffusion_loss" in measured


def test_rounding_is_all_that_differs_otherwise(autoencoder: str, fit, tmp_path: Path) -> None:
    """Encoded in batches, latents differ by rounding; in bfloat16, by its rounding."""
    tokenizer = VAETokenizer(autoencoder)
    losses, _ = fit(Tiles(), tokenizer)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2e-2)):
        encode(tmp_path / dtype, tokenizer, dtype=dtype)
        cached, _ = fit(Latents(str(tmp_path / dtype / "latents")), tokenizer)
        torch.testing.assert_close(torch.tensor(cached), torch.tensor(losses), rtol=tolerance, atol=0)


def test_a_cache_needs_no_autoencoder_in_training(autoencoder: str, fit, tmp_path: Path, monkeypatch) -> None:
    tokenizer = one_by_one(autoencoder)
    encode(tmp_path, tokenizer)
    monkeypatch.setattr(VAETokenizer, "encode", None)
    fit(Latents(str(tmp_path / "latents")), tokenizer)


# Writing.


def test_shards(autoencoder: str, tmp_path: Path) -> None:
    module = encode(tmp_path, one_by_one(autoencoder))
    written = contents(tmp_path)
    assert list(written) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
        "val-00000-of-00002.parquet",
        "val-00001-of-00002.parquet",
    ]
    infos = [json.loads(info) for info, _ in written.values()]
    assert infos == [infos[0]] * 6
    assert infos[0] == {
        "fingerprint": one_by_one(autoencoder).fingerprint,
        "dtype": "bfloat16",
        "latent_shape": [5, 4, 4],
        "codebook_size": None,
        "corpus": "tiles",
        "image_size": 8,
        "factor": 2,
        "num_pictures": {"train": 11, "val": 5, "test": 2},
        "content": {"train": "", "val": "", "test": ""},
        "mirrored": True,
        "pictures": "held_out",
        "shard_size": 4,
        "attribution": "Tiles of nobody",
        "scenes": False,
        "made_by": autoencoder,
        "version": 1,
    }
    keys = [[row["key"] for row in rows] for name, (_, rows) in written.items() if name.startswith("train")]
    assert keys == [[f"picture-{n}" for n in some] for some in (range(4), range(4, 8), range(8, 11))]
    assert pq.read_schema(tmp_path / "latents" / "val-00000-of-00002.parquet").equals(SCHEMA)
    assert not list(module.parameters()) and not module.state_dict()
    assert not (tmp_path / "predictions").exists() and not (tmp_path / "bad_records.jsonl").exists()


def test_workers_and_batches_change_nothing(autoencoder: str, tmp_path: Path) -> None:
    for name, settings in {
        "0": {},
        "1": {"batch_size": 3, "data": {"num_workers": 2}},
        "2": {"batch_size": 64},
    }.items():
        encode(tmp_path / name, one_by_one(autoencoder), **settings)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


def encode_as_rank(root: Path, autoencoder: str, kill_after: int | None = None) -> None:
    """Be one of two processes; die after so many shards, while the next is being written."""
    written = 0

    def write(folder: Path, shard: Any, *rest: Any) -> None:
        nonlocal written
        if written == kill_after:
            (folder / f".{shard.name}.tmp").write_bytes(b"half of it")
            os.kill(os.getpid(), 9)
        write_shard(folder, shard, *rest)
        written += 1

    write_shard, encoding.write_shard = encoding.write_shard, write
    encode(root, one_by_one(autoencoder), trainer=TWO)


@pytest.mark.multi
def test_killed_on_two_processes_and_resumed_on_one_equals_one_process(autoencoder: str, tmp_path: Path) -> None:
    encode(tmp_path / "one", one_by_one(autoencoder))
    run_ranks(tmp_path / "output", encode_as_rank, tmp_path / "two", autoencoder)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")

    root = tmp_path / "killed"
    codes, text = end_ranks(start_ranks(tmp_path / "output", encode_as_rank, root, autoencoder, 1), tmp_path / "output")
    assert -9 in codes, text
    names = sorted(path.name for path in (root / "latents").iterdir())
    whole = [name for name in names if not name.startswith(".")]
    assert 1 <= len(whole) <= 2 and len(whole) < len(names)
    before = {name: (root / "latents" / name).stat().st_mtime_ns for name in whole}
    module = encode(root, one_by_one(autoencoder))
    assert len(module.todo) == 6 - len(whole)
    assert {name: (root / "latents" / name).stat().st_mtime_ns for name in whole} == before
    assert contents(root) == contents(tmp_path / "one")


@pytest.mark.multi
def test_more_processes_than_shards(tmp_path: Path) -> None:
    run_ranks(tmp_path / "output", encode_few, tmp_path / "two")
    encode(tmp_path / "one", Halves(), corpora=[OnePicture()])
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(contents(tmp_path / "one")) == 1


class OnePicture:
    name, image_size = "one", 8

    def load(self, split: str) -> list[CaptionedImage]:
        return Tiles().load(split)[:1] if split == "train" else []


def encode_few(root: Path) -> None:
    encode(root, Halves(), corpora=[OnePicture()], trainer=TWO)


def test_ranks_share_what_is_to_be_made(tmp_path: Path) -> None:
    module = encode(tmp_path, Halves())
    module.todo = module.info.shards()
    shares = []
    for rank in range(4):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=4)
        shares.append(module.own_shards())
    assert [len(share) for share in shares] == [2, 2, 1, 1]
    assert {shard for share in shares for shard in share} == set(module.todo)


def test_an_encoding_that_is_complete_is_left_alone(tmp_path: Path) -> None:
    encode(tmp_path, Halves())
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}
    assert encode(tmp_path, Halves()).todo == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()} == times


def test_pictures_without_finite_latents_are_reported(tmp_path: Path) -> None:
    encode(tmp_path, Broken(), data={"max_bad_share": 0.9})
    lines = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    bad = {r["key"] for _, rows in contents(tmp_path).values() for r in rows if r["cause"]}
    assert {line["key"] for line in lines} == bad != set()
    assert {line["cause"] for line in lines} == {"latents not finite"}
    with pytest.raises(ValueError, match=rf"corpus 'tiles': {len(bad)} of 18 records are bad"):
        encode(tmp_path, Broken())


def test_bad_records_of_the_corpus_are_reported_and_limited(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    write_pairs(tmp_path / "pictures")
    (tmp_path / "pictures" / "03.png").write_bytes(b"no picture")
    corpora = [ImageFiles(str(tmp_path / "pictures"), S, name="files")]
    with pytest.raises(ValueError, match="corpus 'files': 1 of 12 records are bad"):
        encode(tmp_path / "run", Halves(), corpora=corpora)
    assert not (tmp_path / "run").exists()
    encode(tmp_path / "run", Halves(), corpora=corpora, data={"max_bad_share": 0.1})
    [line] = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert (line["corpus"], line["key"]) == ("files", "03")
    assert sum(len(rows) for _, rows in contents(tmp_path / "run").values()) == 11


def test_an_encoding_that_was_cut_short_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encode(tmp_path, Halves(), trainer={"limit_predict_batches": 3})
    assert "5 of 6 shards are still to be written: run it again" in caplog.text


# What is refused.

CHANGES = {
    "dtype": ({"dtype": "float32"}, r"its dtype is 'bfloat16', not 'float32'"),
    "shard_size": ({"shard_size": 5}, r"its shard_size is 4, not 5"),
    "pictures": ({"pictures": "all"}, r"its pictures is 'held_out', not 'all'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_of_other_options_is_refused(autoencoder: str, tmp_path: Path, change: str) -> None:
    encode(tmp_path, one_by_one(autoencoder))
    before = contents(tmp_path)
    settings, message = CHANGES[change]
    with pytest.raises(ValueError, match=f"is of another cache than this run would write: {message}"):
        encode(tmp_path, one_by_one(autoencoder), **settings)
    assert contents(tmp_path) == before


def test_a_folder_of_another_autoencoder_or_corpus_is_refused(autoencoder: str, tmp_path: Path) -> None:
    encode(tmp_path, one_by_one(autoencoder))
    other, own = one_by_one(save_autoencoder(tmp_path / "other", seed=1)), one_by_one(autoencoder)
    with pytest.raises(ValueError, match=f"fingerprint is '{own.fingerprint}', not '{other.fingerprint}'"):
        encode(tmp_path, other)
    still = Tiles()
    still.flip = False
    with pytest.raises(ValueError, match="its mirrored is True, not False"):
        encode(tmp_path, own, corpora=[still])


def test_arguments_and_data_that_cannot_be_encoded(autoencoder: str, tmp_path: Path, texts) -> None:
    own = one_by_one(autoencoder)
    for settings, message in (
        ({"dtype": "int8"}, "got dtype 'int8', expected one of"),
        ({"pictures": "some"}, "got pictures 'some', expected one of"),
        ({"shard_size": 0}, "got shard_size 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            CorpusEncoder(own, **settings)
    with pytest.raises(ValueError, match="for ids, which are stored as whole numbers: leave it out"):
        CorpusEncoder(Halves(), dtype="bfloat16")
    with pytest.raises(ValueError, match="pixels as they are need no cache"):
        CorpusEncoder(PixelTokenizer())
    with pytest.raises(ValueError, match=r"got the corpora \['tiles', 'lines'\].*expected one in data.image_corpora"):
        encode(tmp_path, own, data={"text_corpora": [texts]})
    two = Tiles()
    two.name = "more"
    with pytest.raises(ValueError, match=r"got the corpora \['tiles', 'more'\]"):
        encode(tmp_path, own, corpora=[Tiles(), two])
    odd = Tiles()
    odd.image_size = 9
    with pytest.raises(ValueError, match="got image_size 9, expected a multiple of 2"):
        encode(tmp_path, own, corpora=[odd])
    assert not (tmp_path / "latents").exists()
    encode(tmp_path, own)
    with pytest.raises(ValueError, match="corpus 'tiles' is a latent cache already"):
        encode(tmp_path / "again", own, corpora=[Latents(str(tmp_path / "latents"))])


@pytest.mark.parametrize("kept", ["held_out", "none", "all"])
def test_what_needs_pictures_that_were_not_kept(
    autoencoder: str, tmp_path: Path, tiny_data, tiny_module, attached, kept: str
) -> None:
    tokenizer = one_by_one(autoencoder)
    encode(tmp_path, tokenizer, pictures=kept)
    module = tiny_module(latent_shape=LATENT_SHAPE, patch_size=2, image_tokenizer=tokenizer)
    data = attached(tiny_data(image_corpora=[Latents(str(tmp_path / "latents"))]), module)
    trainer = data.trainer
    trainer.datamodule, trainer.is_global_zero = data, True
    module.text_tokenizer = data.tokenizer
    grid = SampleGrid(num_captions=2)
    metrics = {split: GenerationMetrics(num_captions=1, split=split) for split in ("val", "train")}
    if kept == "none":
        with pytest.raises(ValueError, match="samples.num_captions is 2, but the corpora are latents without pictures"):
            grid.setup(trainer, module, "fit")
    else:
        grid.setup(trainer, module, "fit")
        requests = data.sample_requests(2, 2, 0)
        first = Tiles().load("train" if kept == "all" else "val")[0]
        assert requests[0].segments == (first.captions[0],)
        assert requests[2].segments[0].tobytes() == first.image.permute(1, 2, 0).numpy().tobytes()
    SampleGrid(num_captions=0).setup(trainer, module, "fit")
    assert data.sample_requests(2, 0, 0)[0].segments == (Tiles().load("train")[0].captions[0],)
    for split, metric in metrics.items():
        if kept == "all" or (kept == "held_out" and split == "val"):
            metric.setup(trainer, module, "fit")
        else:
            with pytest.raises(
                ValueError, match=f"need the {split} pictures of corpus 'tiles', of which the latents alone"
            ):
                metric.setup(trainer, module, "fit")


# The command line.


def write_config(folder: Path, autoencoder: str) -> str:
    tokenizer = {"class_path": "VAETokenizer", "init_args": {"path": autoencoder}}
    config = {
        "trainer": {"accelerator": "cpu", "default_root_dir": "run"},
        "model": {"class_path": "CorpusEncoder", "init_args": {"image_tokenizer": tokenizer}},
        "data": {"image_corpora": [{"class_path": "tests.data.latent_caches.Tiles"}]},
    }
    (folder / "encode.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "encode.yaml")


def tfusion(cwd: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["tfusion", *arguments])
    cli.main()


def test_predict_needs_no_checkpoint_and_writes_latents_alone(autoencoder: str, tmp_path: Path, monkeypatch) -> None:
    tfusion(tmp_path, monkeypatch, "predict", "--config", write_config(tmp_path, autoencoder))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "latents"]
    corpus = Latents(str(tmp_path / "run" / "latents"))
    assert [len(corpus.load(split)) for split in ("train", "val", "test")] == [11, 5, 2]


def test_a_run_from_the_cache(autoencoder: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Trained, validated, sampled and measured as from any corpus."""
    tfusion(tmp_path, monkeypatch, "predict", "--config", write_config(tmp_path, autoencoder))
    config = copy.deepcopy(CONFIG)
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "default_root_dir": "trained"}
    settings = config["model"]["init_args"]
    settings["image_tokenizer"] = {"class_path": "VAETokenizer", "init_args": {"path": autoencoder}}
    settings["model"]["init_args"] |= {"latent_shape": LATENT_SHAPE, "patch_size": 2}
    config["data"]["image_corpora"] = [{"class_path": "tfusion.data.Latents", "init_args": {"path": "run/latents"}}]
    config["generation_metrics"] = {"num_captions": 2}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The ``compute`` method of metric")  # of metrics without a picture
        tfusion(tmp_path, monkeypatch, "fit", "--config", "fit.yaml")
    measured = {name: value for row in rows(tmp_path / "trained") for name, value in row.items() if value}
    assert float(measured["val/tiles/diffusion_loss"]) > 0 and float(measured["val/tiles/cider_d"]) >= 0
    assert (tmp_path / "trained" / "samples" / "step=0000002.png").is_file()
    assert (tmp_path / "trained" / "checkpoints" / "last.ckpt").exists()
    next((tmp_path / "run" / "latents").glob("train*")).unlink()  # predictions need no corpus
    (tmp_path / "prompts.jsonl").write_text('{"segments": ["red"], "generate": "image"}\n')
    of_run = ("--config", "trained/config.yaml", "--ckpt_path", "last", "--data.prompts", "prompts.jsonl")
    tfusion(tmp_path, monkeypatch, "predict", *of_run)
    assert len(list((tmp_path / "trained" / "predictions").glob("000000-*.png"))) == 1
    with pytest.raises(SystemExit):
        tfusion(tmp_path, monkeypatch, "validate", "--config", "trained/config.yaml", "--ckpt_path", "last")
    assert "1 of 3 shards are missing" in capsys.readouterr().err


def test_data_can_be_checked_dry(tmp_path: Path, tiny_data, tiny_module, attached) -> None:
    encode(tmp_path, Broken(), data={"max_bad_share": 1.0})
    data = tiny_data(image_corpora=[Latents(str(tmp_path / "latents"))], max_bad_share=1.0)
    module = tiny_module(image_tokenizer=Broken())
    report = check(attached(data, module), module, rows=8, tokens_per_s=1.0)
    [files] = report["corpora"][0]["files"]
    assert files["records"] == 18 and files["bad"] > 0
    assert report["latents"]["shape"] == [3, 8, 8] and report["latents"]["not_finite"] == 0
    assert draw(data, 8).size  # no picture was kept


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("fit", (), "fit got CorpusEncoder, which trains nothing: run `tfusion predict`"),
        ("validate", ("--ckpt_path", "last"), "validate got CorpusEncoder"),
        ("predict", ("--ckpt_path", "last"), "got --ckpt_path last, but CorpusEncoder has no weights of its own"),
    ],
)
def test_other_commands_are_refused(
    autoencoder: str, tmp_path: Path, monkeypatch, capsys, command: str, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        tfusion(tmp_path, monkeypatch, command, "--config", write_config(tmp_path, autoencoder), *more)
    assert caught.value.code == 2
    assert f"tfusion: error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
