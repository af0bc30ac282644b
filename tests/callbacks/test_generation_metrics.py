"""What is generated and when, what it is compared with, and what it is called; ranks and resumes change nothing."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from tests.callbacks.test_caption_metrics import drawn
from tfusion.callbacks.generation_metrics import GenerationMetrics
from tfusion.callbacks.sharing import make
from tfusion.data.corpora import CaptionedImage
from tfusion.data.shapes import Shapes
from tfusion.data.sources import load_split
from tfusion.metrics import Clip, FeatureNetwork
from tfusion.metrics.distances import write_features
from tfusion.requests import Generation, GenerationConfig, Request

RANKS = 3
PICTURES = 7  # of the validation split: less than samples, and no multiple of the ranks


def noise(*seed: int) -> torch.Tensor:
    """Uint8 (3, 4, 4)."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, 4, 4), dtype=np.uint8))


class Corpus:
    """Pictures of noise, or those given."""

    name, image_size = "noise", 4

    def __init__(
        self, pictures: Sequence[torch.Tensor] = tuple(noise(0, n) for n in range(PICTURES)), split: str = "val"
    ) -> None:
        self.pictures, self.split = pictures, split

    def load(self, split: str) -> list[CaptionedImage]:
        assert split == self.split
        return [CaptionedImage(str(n), image, (f"caption {n}", "other")) for n, image in enumerate(self.pictures)]


class Data(pl.LightningDataModule):
    def __init__(self, *corpora: Corpus) -> None:
        super().__init__()
        self.image_corpora = corpora

    def measured_pictures(self, corpus: Corpus, split: str):
        return load_split(corpus, split)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(100, 1), batch_size=1)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(1, 1), batch_size=1)


class Module(pl.LightningModule):
    """Whose picture for a request is a noise of the request's own."""

    predicts_text = True

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.generation = GenerationConfig(guidance_scale=3.0)
        self.asked: list[tuple[int, list[Request], list[int], int]] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.linear(batch).sum()

    def validation_step(self, batch: torch.Tensor) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def check_requests(self, requests: list[Request]) -> None:
        for request in requests:
            if "too long" in str(request.segments[0]):
                raise ValueError("too long")

    def generate(self, requests: list[Request], numbers: list[int], batch_size: int) -> list[Generation]:
        assert not torch.is_grad_enabled()
        self.asked.append((self.global_step, requests, numbers, batch_size))
        pictures = [(image_of(request.seed),) for request in requests]
        return [Generation(number, 0, picture) for number, picture in zip(numbers, pictures, strict=True)]


def image_of(number: int) -> Image.Image:
    return Image.fromarray(noise(1, number).permute(1, 2, 0).numpy())


class Stub:
    """The mean of each channel, (N, 3); counts pictures."""

    name, fingerprint = "fd_stub", "stub"

    def __init__(self, channels: int = 3, factor: float = 1.0) -> None:
        self.num_features, self.factor, self.seen = channels, factor, 0

    def load(self, device: torch.device) -> None:
        self.device = device

    def features(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        self.seen += len(images)
        return self.factor * images.float().mean((2, 3))[:, : self.num_features]


class Cosines(Clip):
    """One where the picture was made for its caption, else -1."""

    def load(self, device: torch.device) -> None:
        pass

    def cosines(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        made = {noise(1, n).numpy().tobytes(): f"caption {n % PICTURES}" for n in range(20)}
        same = [made.get(i.numpy().tobytes()) == c for i, c in zip(images, captions, strict=True)]
        return torch.tensor(same).float() * 2 - 1


class Ranked(Cosines):
    """Picture n scores n."""

    def cosines(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        number = {noise(1, n).numpy().tobytes(): n for n in range(70)}
        return torch.tensor([number[image.numpy().tobytes()] / 100 for image in images])


def trainer_of(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": folder}
    endless = {"max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 2}
    return pl.Trainer(callbacks=list(callbacks), **(quiet | endless | settings))


def measured(folder: Path, callback: GenerationMetrics, corpus: Corpus | None = None, **settings: Any):
    """Metrics of `trainer.validate`, and the module."""
    module, trainer = Module(), trainer_of(folder, callback, **settings)
    trainer.validate(module, Data(corpus or Corpus()), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, module


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the reference features."""
    monkeypatch.setenv("TFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


# Values


def test_closed_form_of_one_feature(tmp_path: Path) -> None:
    metrics, _ = measured(tmp_path, GenerationMetrics([Stub(channels=1)], num_images=9, batch_size=2))
    sets = [[noise(k, n)[0].double().mean().item() for n in range(count)] for k, count in ((0, PICTURES), (1, 9))]
    means, spreads = [np.mean(values) for values in sets], [np.std(values, ddof=1) for values in sets]
    expected = (means[0] - means[1]) ** 2 + (spreads[0] - spreads[1]) ** 2
    assert metrics.keys() == {"val/noise/fd_stub", "val/noise/kd_stub"}
    assert metrics["val/noise/fd_stub"] == pytest.approx(expected, rel=1e-6)
    x, y = ([noise(k, n)[0].double().mean().item() for n in range(count)] for k, count in ((1, 9), (0, PICTURES)))
    kernel = [[[(a * b + 1) ** 3 for b in right] for a in left] for left, right in ((x, x), (y, y), (x, y))]
    within = [(np.sum(k) - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    squared_mmd = sum(within) - 2 * np.mean(kernel[2])
    assert metrics["val/noise/kd_stub"] == pytest.approx(squared_mmd, rel=1e-4)


@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_equals_clean_fid_and_the_score_is_of_the_captions_used(tmp_path: Path) -> None:
    metrics, _ = measured(tmp_path, GenerationMetrics([Stub(), Cosines("-")], num_images=9, batch_size=4))
    sets = [np.stack([noise(k, n).double().mean((1, 2)).numpy() for n in range(c)]) for k, c in ((0, PICTURES), (1, 9))]
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in sets)
    assert metrics["val/noise/fd_stub"] == pytest.approx(frechet_distance(m1, s1, m2, s2), rel=1e-6)
    assert metrics["val/noise/clip_score"] == 100.0


def test_requests_are_fixed_by_the_sample(tmp_path: Path) -> None:
    _, module = measured(tmp_path, GenerationMetrics([Stub()], num_images=9, batch_size=4))
    ((_, requests, numbers, batch_size),) = module.asked
    assert numbers == list(range(9))
    assert batch_size == 4
    captions = [f"caption {n}" for n in (0, 1, 2, 3, 4, 5, 6, 0, 1)]
    assert requests == [Request((c,), "image", seed=n, config=module.generation) for n, c in enumerate(captions)]


def test_the_budget_of_steps_and_what_it_cost(tmp_path: Path) -> None:
    callback = GenerationMetrics([Stub(), Cosines("-")], num_images=5, num_inference_steps=7, split="train")
    metrics, module = measured(tmp_path, callback, Corpus(split="train"))
    assert {request.config.num_inference_steps for _, requests, _, _ in module.asked for request in requests} == {7}
    assert module.generation.num_inference_steps != 7
    assert set(callback.findings.seconds) == {
        "5 pictures made of train/noise",
        "fd_stub of 5 pictures of train/noise",
        "clip_score of 5 pictures of train/noise",
    }
    assert all(seconds > 0 for seconds in callback.findings.seconds.values())
    assert metrics.keys() == {f"train/noise/{name}" for name in ("fd_stub", "kd_stub", "clip_score")}


def test_rounds_change_nothing_but_that_pictures_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """70 pictures at once, and in rounds of 9: the same requests and numbers; kept are the first and the extremes."""
    found = []
    for pictures in (1000, 9):
        monkeypatch.setattr("tfusion.callbacks.picture_metrics.ROUND", pictures)
        callback = GenerationMetrics([Stub(), Ranked("-")], num_images=70, batch_size=4)
        metrics, module = measured(tmp_path, callback)
        asked = [(n, r) for _, requests, numbers, _ in module.asked for n, r in zip(numbers, requests, strict=True)]
        found.append((metrics, asked, [(e.text, e.score) for e in callback.findings.examples]))
        assert len(module.asked) == -(-70 // pictures)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert found[0][1:] == found[1][1:]
    assert [score for _, score in found[0][2]] == pytest.approx([*range(32), *range(32, 40), *range(62, 70)])


@pytest.mark.parametrize(("num_images", "num_pictures"), [(3, 7), (7, 3), (4, 4)])
def test_a_distance_of_too_few_pictures_is_called_biased(
    num_images: int, num_pictures: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three features: three pictures of either are too few, four are not."""
    corpus = Corpus([noise(0, n) for n in range(num_pictures)])
    metrics, _ = measured(tmp_path, GenerationMetrics([Stub()], num_images=num_images), corpus)
    biased = min(num_images, num_pictures) == 3
    assert list(metrics) == ["val/noise/fd_stub_biased" if biased else "val/noise/fd_stub", "val/noise/kd_stub"]
    expected = f"fd_stub_biased: it is of {num_images} pictures against {num_pictures}, and the network has 3"
    assert caplog.text.count(expected) == biased


def test_the_model_measured_is_the_evaluation_model(tmp_path: Path, tiny_module, tiny_data, tiny_trainer) -> None:
    """A real module: the metric is that of its own pictures; neither weights, checkpoint nor mode show the network."""
    network = FeatureNetwork(torch.nn.Flatten(), "pixels", image_size=1)
    module = tiny_module(seed=2, generation=GenerationConfig(num_inference_steps=2))
    names = set(module.state_dict())
    trainer = tiny_trainer(
        2,
        limit_val_batches=1.0,
        val_check_interval=2,
        callbacks=[GenerationMetrics([network], num_images=5, batch_size=2)],
    )
    trainer.fit(module, tiny_data())
    value = trainer.callback_metrics["val/tiles/fd_pixels"].item()
    pictures = tiny_data().image_corpora[0].load("val")
    requests = [Request((p.captions[0],), "image", seed=n, config=module.generation) for n, p in enumerate(pictures)]
    images = [generation.segments[0] for generation in module.generate(requests)]
    made = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    features = [network.features(x).double().numpy() for x in (torch.stack([p.image for p in pictures]), made)]
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in features)
    with pytest.warns(DeprecationWarning, match="disp"):
        assert value == pytest.approx(frechet_distance(m1, s1, m2, s2), rel=1e-3)  # a pixel may round otherwise
    assert set(module.state_dict()) == names


# When


def steps_measured(folder: Path, every_n_steps: int, max_steps: int, resume: Path | None = None, **settings: Any):
    callback, module = GenerationMetrics([Stub()], num_images=4, every_n_steps=every_n_steps), Module()
    trainer = trainer_of(folder, callback, max_steps=max_steps, **({"num_sanity_val_steps": 1} | settings))
    trainer.fit(module, Data(Corpus()), ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / f"{max_steps}.ckpt")
    return [step for step, *_ in module.asked]


def test_when_it_measures(tmp_path: Path) -> None:
    # Validations at 2, 4, 6, ...: the first at or after 3 is 4, after 6 is 6. Never in the sanity check.
    assert steps_measured(tmp_path, every_n_steps=3, max_steps=8) == [4, 6]
    assert steps_measured(tmp_path, every_n_steps=1, max_steps=5) == [2, 4]
    assert steps_measured(tmp_path, every_n_steps=1, max_steps=1, fast_dev_run=True) == []


@pytest.mark.parametrize("every_n_steps", [2, 3])
def test_a_fit_that_measures_nothing_says_so_and_calls_nothing_biased(tmp_path, caplog, every_n_steps: int) -> None:
    with caplog.at_level(logging.INFO, "tfusion"):
        callback = GenerationMetrics([Stub()], num_images=3, every_n_steps=every_n_steps)
        trainer = trainer_of(tmp_path, callback, max_steps=2)
        trainer.fit(Module(), Data(Corpus()))
    measures = every_n_steps == 2
    assert ("none in this fit, every_n_steps 3 is past trainer.max_steps 2" in caplog.text) != measures
    assert ("is biased, and will be called" in caplog.text) == measures


def test_a_resumed_run_measures_when_an_unbroken_one_does(tmp_path: Path) -> None:
    assert steps_measured(tmp_path, every_n_steps=5, max_steps=10) == [6, 10]
    assert steps_measured(tmp_path, every_n_steps=5, max_steps=6) == [6]
    assert steps_measured(tmp_path, every_n_steps=5, max_steps=10, resume=tmp_path / "6.ckpt") == [10]


def test_without_networks_nothing_is_made(tmp_path: Path) -> None:
    metrics, module = measured(tmp_path, GenerationMetrics())
    assert (metrics, module.asked) == ({}, [])


def test_loggers_get_the_global_step(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
    steps_measured(tmp_path, every_n_steps=2, max_steps=2, logger=logger)
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["step"] == "2"
    assert "val/noise/fd_stub" in header


# The reference pictures


def pictures_seen(folder: Path, network: Stub, corpus: Corpus | None = None) -> tuple[int, float]:
    """How many the network was given beside the 4 generated, and the distance."""
    metrics, _ = measured(folder, GenerationMetrics([network], num_images=4, batch_size=3), corpus)
    return network.seen - 4, metrics["val/noise/fd_stub"]


def test_the_reference_is_read_again_only_for_the_same_pictures_and_network(tmp_path: Path, own_cache: Path) -> None:
    first, value = pictures_seen(tmp_path, Stub())
    assert first == 1 + PICTURES  # one to see whether the network is that of the file, were there one
    assert len(list(own_cache.iterdir())) == 1
    assert pictures_seen(tmp_path, Stub()) == (1, value)
    more = Corpus([noise(0, n) for n in range(PICTURES + 1)])
    assert pictures_seen(tmp_path, Stub(), more)[0] == 1 + PICTURES + 1
    other = Stub()
    other.fingerprint = "other"
    assert pictures_seen(tmp_path, other)[0] == 1 + PICTURES
    assert len(list(own_cache.iterdir())) == 3
    # the code has changed, which no fingerprint shows
    seen, changed = pictures_seen(tmp_path, Stub(factor=2.0))
    assert seen == 1 + PICTURES
    assert changed == pytest.approx(4 * value, rel=1e-6)


def test_the_reference_is_read_once_a_run_and_the_rest_begins_anew(tmp_path: Path) -> None:
    network = Stub()
    trainer = trainer_of(tmp_path, GenerationMetrics([network], num_images=4), max_steps=6, num_sanity_val_steps=0)
    trainer.fit(Module(), Data(Corpus()))
    assert network.seen == 1 + PICTURES + 3 * 4
    value = trainer.callback_metrics["val/noise/fd_stub"].item()
    assert value == pytest.approx(pictures_seen(tmp_path, Stub())[1], rel=1e-6)


# Refusals


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    for name in ("num_images", "every_n_steps", "batch_size", "num_inference_steps"):
        with pytest.raises(ValueError, match=f"generation_metrics.{name} is 0"):
            GenerationMetrics(**{name: 0})
    with pytest.raises(ValueError, match=r"\['fd_stub', 'fd_stub'\], expected each name once"):
        GenerationMetrics([Stub(), Stub()])
    with pytest.raises(ValueError, match=r"no captions .*; add data.image_corpora"):
        trainer_of(tmp_path, GenerationMetrics([Stub()])).validate(Module(), Data(), verbose=False)
    with pytest.raises(ValueError, match=r"'noise' has 1 val picture, fd_stub needs 2"):
        measured(tmp_path, GenerationMetrics([Stub()]), Corpus([noise(0)]))


def test_a_network_that_cannot_be_loaded_stops_fit_at_its_start(tmp_path: Path) -> None:
    module = Module()
    module.training_step = lambda batch: pytest.fail("training has begun")
    network = FeatureNetwork(torch.nn.Flatten(), "pixels", 1, weights=str(tmp_path / "none.pt"))
    with pytest.raises(ValueError, match="none.pt', which is no file"):
        trainer_of(tmp_path, GenerationMetrics([network]), max_steps=2).fit(module, Data(Corpus()))


def test_what_generates_nothing_is_refused(tmp_path: Path) -> None:
    class Other(pl.LightningModule):
        validation_step = Module.validation_step

    with pytest.raises(ValueError, match="Other generates nothing: leave networks"):
        trainer_of(tmp_path, GenerationMetrics([Stub()])).validate(Other(), Data(Corpus()), verbose=False)


def test_more_evaluations_than_timesteps_stop_fit_at_its_start(tmp_path, tiny_module, tiny_data, tiny_trainer) -> None:
    network = FeatureNetwork(torch.nn.Flatten(), "pixels", image_size=1)
    callback = GenerationMetrics([network], num_inference_steps=100_000)
    module = tiny_module()
    module.training_step = lambda *batch: pytest.fail("training has begun")
    with pytest.raises(ValueError, match="generation_metrics would ask .* num_steps=100000; expected 1 ... 1000"):
        tiny_trainer(2, callbacks=[callback]).fit(module, tiny_data())


def reference_file(path: Path, network: Stub, pictures: Sequence[torch.Tensor], **metadata: str) -> str:
    """What `tfusion.bench.folder --write` writes."""
    network.load(torch.device("cpu"))
    kinds = {"fd_stub.fingerprint": network.fingerprint, "image_size": "4"} | metadata
    write_features(path, {"fd_stub": network.features(torch.stack(list(pictures)))}, kinds)
    return str(path)


def test_a_file_of_reference_features_stands_for_the_pictures(tmp_path: Path, own_cache: Path) -> None:
    pictures = [noise(0, n) for n in range(PICTURES)]
    path = reference_file(tmp_path / "kept.safetensors", Stub(), pictures)
    others = Corpus([noise(5, n) for n in range(PICTURES)])
    found, _ = measured(tmp_path, GenerationMetrics([Stub()], num_images=9, reference=path), others)
    expected, _ = measured(tmp_path, GenerationMetrics([Stub()], num_images=9), Corpus(pictures))
    assert found == pytest.approx(expected, rel=1e-6)


def test_reference_features_that_nothing_would_read_are_refused(tmp_path: Path) -> None:
    path = reference_file(tmp_path / "kept.safetensors", Stub(), [noise(0, n) for n in range(9)])
    with pytest.raises(ValueError, match="no network in generation_metrics.networks has features"):
        GenerationMetrics([Cosines("-")], reference=path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({"image_size": "8"}, "of 8 pixels a side, expected 4"), ({"fd_stub.fingerprint": "x"}, "fingerprint 'x'")],
)
def test_reference_features_of_another_kind_stop_fit_at_its_start(tmp_path: Path, metadata, message) -> None:
    path = reference_file(tmp_path / "kept.safetensors", Stub(), [noise(0, n) for n in range(9)], **metadata)
    module = Module()
    module.training_step = lambda batch: pytest.fail("training has begun")
    trainer = trainer_of(tmp_path, GenerationMetrics([Stub()], reference=path), max_steps=2, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, Data(Corpus()))


def test_a_rank_refuses_what_another_could_not_make() -> None:
    """All requests are checked on every rank: none waits at a collective for one that has stopped."""
    module = Module()
    requests = [Request((text,), "image") for text in ("short", "too long")]
    with pytest.raises(ValueError, match="too long"):
        make(SimpleNamespace(global_rank=0, world_size=2), module, requests, 4)
    assert module.asked == []


def test_one_reference_for_several_corpora_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reference.safetensors").write_bytes(b"")
    callback, data = (
        GenerationMetrics([Stub()], reference=str(tmp_path / "reference.safetensors")),
        Data(Corpus(), Corpus()),
    )
    with pytest.raises(ValueError, match=r"one file, for the corpora \['noise', 'noise'\]; expected one corpus"):
        trainer_of(tmp_path, callback).validate(Module(), data, verbose=False)


# Ranks


class Draughtsman(Module):
    """Draws what it is asked where the seed is even, and says of every picture that it is a big red circle."""

    def generate(self, requests: list[Request], numbers: list[int], batch_size: int) -> list[Generation]:
        self.asked.append((self.global_step, requests, numbers, batch_size))
        blank = Image.new("RGB", (64, 64), "white")
        answers = [
            "a big red circle" if r.generate == "text" else blank if r.seed % 2 else drawn(r.segments[0])
            for r in requests
        ]
        return [Generation(number, 0, (answer,)) for number, answer in zip(numbers, answers, strict=True)]


def results(folder: Path, **settings: Any) -> list[Any]:
    """Metrics and numbers made: more samples than pictures, read again from the file, then less than ranks; scenes."""
    found = []
    for num_images in (8, 8, 2):
        networks = [Stub(), Cosines("-")] if num_images > 2 else [Stub()]
        metrics, module = measured(folder, GenerationMetrics(networks, num_images, batch_size=2), **settings)
        found.append([metrics, module.asked[0][2]])
    callback, module = GenerationMetrics(num_captions=20, num_scenes=3, batch_size=2), Draughtsman()
    trainer = trainer_of(folder, callback, **settings)
    trainer.validate(module, Data(Shapes(32)), verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert len({one.n for one in callback.findings.measurements} - {20, 3}) == 0, "a share of a rank was reported"
    found.append([metrics, module.asked[1][2]])
    return found


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def run_rank(rank: int, folder: Path, environment: dict[str, str]) -> None:
    """A process's part; what it finds is written as JSON."""
    os.environ.update(environment | {"LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    (folder / f"{rank}.json").write_text(json.dumps(results(folder, strategy="ddp", devices=RANKS)))


@pytest.mark.multi
def test_ranks_change_nothing(tmp_path: Path, own_cache: Path) -> None:
    """Each sample is made once, each reference picture counts once, and every rank has the metrics of one process."""
    expected = results(tmp_path)
    (kept,) = own_cache.iterdir()
    features = load_file(kept)["features"]
    kept.unlink()
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(RANKS), "NODE_RANK": "0"}
    environment["TFUSION_CACHE"] = os.environ["TFUSION_CACHE"]  # the server may be older than this test
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tfusion.__main__"])  # imports for all processes, once
    ranks = [context.Process(target=run_rank, args=(rank, tmp_path, environment)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
    assert [rank.exitcode for rank in ranks] == [0] * RANKS
    assert torch.equal(load_file(kept)["features"], features)  # in the order of the pictures
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    for run, (metrics, numbers) in enumerate(expected):
        for rank in range(RANKS):
            assert found[rank][run][0] == pytest.approx(metrics, rel=1e-6)
        assert sorted(n for rank in found for n in rank[run][1]) == numbers
