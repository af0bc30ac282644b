"""ChameleonModule: its loss in loops, validation, micro-batches, resumes, refusals, the commands; it learns."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as PILImage

from tests.conftest import TinyPictures
from tests.reference.ids import BlockIds
from tests.test_cli import CONFIG, rows, tfusion
from tests.test_learning import NAMES, EightPictures
from tests.training.test_equivalence import Recorder, differences, state_of
from tfusion import load
from tfusion.callbacks.ema import EMA
from tfusion.callbacks.perplexity import Perplexity
from tfusion.callbacks.samples import SampleGrid
from tfusion.requests import GenerationConfig
from tfusion.sequence import BOI_ID, EOS_ID, IGNORE_INDEX, NUM_SPECIAL_IDS
from tfusion.tokenizers import PixelTokenizer

STEPS = 10


def batch_of(data, attached, module, **settings: Any):
    """The first micro-batch of a step."""
    made = attached(data(**settings), module)
    return next(iter(made.train_dataloader()))


def loops(module, batch) -> tuple[list[float], list[float], list[float]]:
    """nll of each text label and of each image id, and log^2 Z of both, by the naive softmax."""
    model, tokenizer = module.model, module.image_tokenizer
    codes = tokenizer.encode(batch.images.float() / 127.5 - 1).flatten(1).long()  # (I, P)
    logits = model(batch, codes.view(-1, 1, 2, 2).float()).double()
    N, P = len(batch.text_positions), model.num_patches
    wanted = [(n, int(label), "text") for n, label in enumerate(batch.text_labels) if label != IGNORE_INDEX]
    for slot in range(len(batch.image_valid)):
        if batch.image_valid[slot] and batch.noise_limits[slot] > 0:
            wanted += [(N + slot * P + p, model.vocab_size + int(codes[slot, p]), "image") for p in range(P)]
    text, image, log_z = [], [], []
    for row, label, kind in wanted:
        z = logits[row].exp().sum().log()
        (text if kind == "text" else image).append(float(z - logits[row, label]))
        log_z.append(float(z) ** 2)
    return text, image, log_z


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.01])
def test_the_loss_is_one_mean_over_all_ids(tiny_chameleon, tiny_data, attached, z_loss_weight):
    """Of text and images that are predicted; those given (noise limit 0) have none."""
    module = tiny_chameleon(z_loss_weight=z_loss_weight)
    module.materialize("cpu")
    batch = batch_of(tiny_data, attached, module, image_first_noise_limit=0.0, caption_first=0.5)
    assert (batch.noise_limits[batch.image_valid] == 0).any(), "no image is given"
    module._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1)
    loss = module.training_step(batch, 0)
    text, image, log_z = loops(module, batch)
    count = len(text) + len(image)
    assert len(image) == int(batch.step_counts[1]) * 4 > 0
    expected = (sum(text) + sum(image)) / count + z_loss_weight * sum(log_z) / count
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    metrics = module.metrics_of_step(module.step_sums)
    assert metrics["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["train/text_loss"] == pytest.approx(np.mean(text), rel=1e-5)
    assert metrics["train/image_loss"] == pytest.approx(np.mean(image), rel=1e-5)
    if z_loss_weight:
        assert metrics["train/z_loss"] == pytest.approx(np.mean(log_z), rel=1e-5)
    assert ("train/z_loss" in metrics) == (z_loss_weight > 0)
    assert metrics["train/images"] == int(batch.image_valid.sum())


def test_latents_of_a_cache_are_the_pictures_own(tiny_chameleon, tiny_data, attached):
    module = tiny_chameleon()
    module.materialize("cpu")
    batch = batch_of(tiny_data, attached, module)
    from_pixels = module._losses(module.model, batch)
    batch.latents = module.image_tokenizer.encode(batch.images.float() / 127.5 - 1)
    batch.images = None
    for one, other in zip(from_pixels, module._losses(module.model, batch), strict=True):
        assert torch.equal(one, other)


def test_validation_is_that_of_loops(tiny_chameleon, tiny_data, tiny_trainer):
    """`val/<corpus>/image_nll`, and `val/loss` the mean over all labelled ids; text as of any model."""
    module, data, callback, metrics = tiny_chameleon(seed=2), tiny_data(val_rows=3), Perplexity(), {}
    module.materialize("cpu")
    module.log_dict = lambda values, **_: metrics.update(values)
    tiny_trainer(10, limit_val_batches=1.0, callbacks=[callback]).validate(module, data, verbose=False)
    text, image = [], []
    for view, loader in zip(data.val_views, data.val_dataloader(), strict=True):
        for batch in loader:
            labels = [int(label) for label in batch.text_labels if label != IGNORE_INDEX]
            nll, of_images, _ = loops(module, batch)
            kept = [label >= NUM_SPECIAL_IDS or (label == EOS_ID and view != "tiles") for label in labels]
            text += [value for value, counted in zip(nll, kept, strict=True) if counted]
            image += of_images
            assert view != "tiles/given_image" or not of_images
            assert BOI_ID in labels or view != "tiles"
    assert metrics["val/text_loss"] == pytest.approx(np.mean(text), rel=1e-5)
    assert metrics["val/tiles/image_nll"] == metrics["val/image_nll"] == pytest.approx(np.mean(image), rel=1e-5)
    assert metrics["val/loss"] == pytest.approx(np.mean(text + image), rel=1e-5)
    assert len(image) == 5 * 4
    assert not any("diffusion" in name or "_t0" in name for name in metrics)
    assert {"val/lines/perplexity", "val/tiles/given_image/perplexity"} < set(metrics)
    of_all = next(one for one in callback.findings.measurements if one.name == "val/loss")
    assert of_all.standard_error > 0


@pytest.fixture
def fit(tiny_chameleon, tiny_data, tiny_trainer, tmp_path):
    """`fit(accumulate, stop, resume, **data)` -> losses, path of the last state."""
    count = iter(range(100))

    def run(accumulate: int = 1, stop: int | None = None, resume: Path | None = None, **data: Any):
        recorder = Recorder(tmp_path / f"{next(count)}.ckpt", stop, ("loss", "text_loss", "image_loss", "z_loss"))
        trainer = tiny_trainer(STEPS, accumulate_grad_batches=accumulate, callbacks=[EMA(0.9), recorder])
        trainer.fit(tiny_chameleon(seed=3), tiny_data(**data), ckpt_path=resume, weights_only=True)
        return torch.tensor(recorder.losses, dtype=torch.float64), recorder.path

    return run


def test_micro_batches_change_no_loss(fit):
    one, _ = fit()
    assert (one[-3:].mean(0) < one[0])[:3].all()
    torch.testing.assert_close(fit(accumulate=4)[0], one, rtol=1e-5, atol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resume_changes_no_bit(fit, accumulate):
    losses, whole = fit(accumulate)
    before, half = fit(accumulate, stop=5)
    after, resumed = fit(accumulate, resume=half)
    assert torch.equal(torch.cat([before, after]), losses)
    assert differences(state_of(resumed), state_of(whole)) == []


def test_text_alone_needs_no_image_tokenizer(tiny_chameleon, tiny_data, tiny_trainer):
    """The paper's table 4: Chameleon's stability parts on text; the same with image corpora is refused in words."""
    module = tiny_chameleon(image_tokenizer=None)
    trainer = tiny_trainer(2, callbacks=[SampleGrid(1, 2, 2, 1), Perplexity()], limit_val_batches=1)
    trainer.fit(module, tiny_data(image_corpora=[]))
    metrics = module.step_metrics()
    assert metrics["train/loss"] > 0
    assert "train/image_loss" not in metrics


class OfCache(TinyPictures):
    """Pictures that say what ids they are."""

    codebook_size = 512


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"image_tokenizer": BlockIds(4, 4)}, {}, "BlockIds has 64 ids, the model's codebook_size is 27"),
        ({"image_tokenizer": PixelTokenizer()}, {}, "PixelTokenizer gives no ids"),
        ({"image_tokenizer": BlockIds(2, 3)}, {}, r"become latents of \(1, 4, 4\), the model's latent_shape is"),
        ({}, {"image_corpora": [OfCache()]}, "corpus 'tiles' has 512 ids, the model's codebook_size is 27"),
        ({"z_loss_weight": -1.0}, {}, "z_loss_weight -1.0, expected 1e-5"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_chameleon, tiny_data, tiny_trainer, model, data, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(1).fit(tiny_chameleon(**model), tiny_data(**data))


def test_transfusion_refuses_ids(tiny_module):
    with pytest.raises(ValueError, match="image_tokenizer of 27 ids, which no noise can be added to"):
        tiny_module(image_tokenizer=BlockIds(4, 3))


@pytest.mark.parametrize("change", [{"norm_order": "pre"}, {"rope_theta": 500.0}])
def test_a_checkpoint_of_another_model_is_refused(tiny_chameleon, tiny_data, tiny_trainer, tmp_path, change):
    trainer = tiny_trainer(1)
    trainer.fit(tiny_chameleon(), tiny_data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=rf"of another model: {next(iter(change))} is"):
        tiny_trainer(2).fit(tiny_chameleon(**change), tiny_data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)


def config() -> dict[str, Any]:
    """That of test_cli, with a Chameleon."""
    sizes = {"vocab_size": 270, "codebook_size": 27, "latent_shape": [1, 2, 2]}
    sizes |= {"dim": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 64}
    init_args = {
        "model": {"class_path": "tfusion.models.chameleon.Chameleon", "init_args": sizes},
        "image_tokenizer": {"class_path": "tests.reference.ids.BlockIds", "init_args": {"side": 4, "levels": 3}},
        "warmup_steps": 1,
        "generation": {"max_new_tokens": 4, "guidance_scale": 2.0},
    }
    metrics = {"networks": [{"class_path": "tfusion.metrics.Reference"}], "num_images": 2, "num_captions": 2}
    return {
        **CONFIG,
        "model": {"class_path": "ChameleonModule", "init_args": init_args},
        "generation_metrics": metrics,
    }


def test_the_three_commands_and_load(tmp_path):
    """The run folder of any system: metrics, samples, a validation, predictions, the model out of it."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config()))
    code, output = tfusion(tmp_path, "fit", "--config", "tiny.yaml")
    assert code == 0, output
    root = tmp_path / "run"
    logged = rows(root)[-1] | rows(root)[-2]
    assert {"train/image_loss", "train/z_loss", "val/loss", "val/grey/image_nll", "val/grey/psnr"} < set(logged)
    assert len(list((root / "samples").glob("*.png"))) == 2
    prompts = [{"segments": ["grey 1"], "generate": kind} for kind in ("image", "text", "any")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    run = ("--config", "run/config.yaml", "--ckpt_path", "last")
    code, output = tfusion(tmp_path, "predict", *run, "--data.prompts", "prompts.jsonl")
    assert code == 0, output
    lines = [json.loads(line) for line in (root / "predictions" / "predictions.jsonl").read_text().splitlines()]
    code, output = tfusion(tmp_path, "validate", *run)
    assert code == 0, output
    assert "val/grey/image_nll" in output

    module = load(root, device="cpu")
    made = module.generate(prompts)
    [picture] = made[0].segments
    stored = PILImage.open(root / "predictions" / lines[0]["segments"][0]["image"])
    assert picture.tobytes() == stored.convert("RGB").tobytes()
    assert made[1].segments == tuple(segment["text"] for segment in lines[1]["segments"])


@pytest.mark.parametrize("refused", [{"sampler": "ddim"}, {"guidance_interval": [0.0, 0.5]}])
def test_settings_of_denoising_are_refused_before_any_work(tiny_chameleon, byte_tokenizer, refused):
    module = tiny_chameleon()
    module.materialize("cpu")
    module.text_tokenizer = byte_tokenizer
    name = next(iter(refused))
    with pytest.raises(ValueError, match=f"got {name}"):
        module.generate([{"segments": ["a"], "generate": "image"} | refused])
    with pytest.raises(ValueError, match=f"got {name}"):
        tiny_chameleon(generation=GenerationConfig(**refused))


def test_settings_of_ids_are_refused_where_images_are_denoised(tiny_module, byte_tokenizer):
    module = tiny_module()
    module.materialize("cpu")
    module.text_tokenizer = byte_tokenizer
    for name, value in (("image_temperature", 0.5), ("image_top_k", 3), ("image_top_p", 0.9)):
        with pytest.raises(ValueError, match=f"got {name} {value}, which is of image ids"):
            module.generate([{"segments": ["a"], "generate": "image", name: value}])
        with pytest.raises(ValueError, match=f"got {name} {value}, which is of image ids"):
            tiny_module(generation=GenerationConfig(**{name: value}))


def test_learns_pictures_and_names(tiny_chameleon, tiny_data, tiny_trainer):
    """A tiny model learns 8 pictures of 16 ids and their names by heart, in both directions."""
    module = tiny_chameleon(
        latent_shape=(1, 4, 4), image_tokenizer=BlockIds(2, 3), dim=64, num_layers=3, num_heads=4, lr=4e-3
    )
    data = tiny_data(image_corpora=[EightPictures()], text_corpora=[], rows_per_step=8, caption_first=0.6)
    tiny_trainer(250, callbacks=[EMA(0.95)]).fit(module, data)
    pictures = EightPictures().load("train")
    asked = [{"segments": [name], "generate": "image", "seed": n} for n, name in enumerate(NAMES)]
    shown = [{"segments": [PILImage.fromarray(p.image.permute(1, 2, 0).numpy())], "generate": "text"} for p in pictures]
    settings = {"max_new_tokens": 12, "guidance_scale": 1.5}
    generations = module.generate([request | settings for request in asked + shown])
    right = []
    for generation, picture in zip(generations, pictures, strict=False):
        made = torch.from_numpy(np.array(generation.segments[0])).permute(2, 0, 1)
        codes = [module.image_tokenizer.encode(x[None].float() / 127.5 - 1) for x in (made, picture.image)]
        right.append(float((codes[0] == codes[1]).float().mean()))
    assert np.mean(right) > 0.95, right
    named = ["".join(generation.segments) for generation in generations[8:]]
    assert sum(name == true for name, true in zip(named, NAMES, strict=True)) >= 7, named
