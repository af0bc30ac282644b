"""Training of the reference encoder: its losses against loops, packed against alone, its layout, one step of fit."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import ndimage

from tfusion.bench.reference_encoder import export
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.data.shapes import Shapes
from tfusion.metrics import Reference
from tfusion.models.reference_encoder import ReferenceEncoder
from tfusion.sequence import Document, Image, RowShape, collate
from tfusion.training.reference_encoder import ReferenceEncoderModule, augment, contrastive_loss, retrieval

SIZES = {"vocab_size": 261, "image_size": 32, "dim": 16, "text_dim": 20, "text_layers": 2, "text_heads": 2}


def encoder(**sizes: int) -> ReferenceEncoder:
    return ReferenceEncoder(**(SIZES | {"max_seq_len": 64} | sizes)).materialize("cpu", seed=0)


def test_contrastive_loss_is_the_loop_over_valid_pairs() -> None:
    draws = torch.Generator().manual_seed(0)
    pictures, captions = torch.randn(6, 5, generator=draws), torch.randn(6, 5, generator=draws)
    valid = torch.tensor([True, True, False, True, True, False])
    scale = torch.tensor([math.log(7.0)])
    total, kept = 0.0, [i for i in range(6) if valid[i]]
    for i in kept:
        for one, others in ((pictures[i], captions), (captions[i], pictures)):
            cosines = [7 * float(F.cosine_similarity(one, others[j], dim=0)) for j in kept]
            total += math.log(sum(map(math.exp, cosines))) - cosines[kept.index(i)]
    loss = contrastive_loss(pictures, captions, scale, valid)
    assert float(loss) == pytest.approx(total / 2 / len(kept), rel=1e-5)
    nothing = contrastive_loss(pictures, captions, scale, torch.zeros(6, dtype=torch.bool))
    assert float(nothing) == 0


def test_retrieval_counts_nearest_neighbours_both_ways() -> None:
    captions = torch.eye(4)
    pictures = torch.eye(4)[[0, 1, 1, 3]] + torch.tensor([0.0, 0.0, 0.1, 0.0])[:, None]
    assert retrieval(pictures, captions) == (0.75, 1.0)
    assert retrieval(captions[[1, 0, 2, 3]], captions) == (0.5, 0.5)


def test_captions_in_a_packed_row_are_as_alone() -> None:
    """Three documents a row: the vector at BOI is that of `[BOS] caption [BOI]` by itself."""
    model = encoder()
    texts = [[10, 11, 12], [20], [30, 31, 32, 33, 34], [40, 41]]
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    documents = [Document((ids, Image(picture))) for ids in texts]
    shape = RowShape(64, 1, 4, (3, 32, 32), (3, 32, 32))
    batch = collate([documents[:3], documents[3:]], shape, [("a",), ("b",)])
    module = ReferenceEncoderModule(model)
    _, packed = module._features(model, batch, torch.zeros(8, 3, 32, 32))
    for slot, ids in zip((0, 1, 2, 4), texts, strict=True):
        row = torch.tensor([[1, *ids, 3]])  # BOS and BOI
        zeros, positions = torch.zeros_like(row), torch.arange(row.shape[1])[None]
        alone = model.text_features(row, zeros, positions, torch.tensor([0]), torch.tensor([row.shape[1] - 1]))
        assert torch.allclose(packed[slot], alone[0], atol=1e-5)


def test_augmentation_is_a_function_of_its_noise_and_its_levels_are_true() -> None:
    draws = torch.Generator().manual_seed(3)
    images = (
        torch.from_numpy(np.stack([Shapes(64).load("val")[i].image.numpy() for i in range(40)])).float() / 127.5 - 1
    )
    noise = torch.randn(40, 3, 64, 64, generator=draws)
    once, levels = augment(images, noise)
    assert torch.equal(once, augment(images, noise)[0])
    alone = augment(images[3:4], noise[3:4])[0]
    assert torch.allclose(once[3:4], alone, atol=1e-5)
    assert once.abs().max() <= 1
    assert 0.2 < (levels == 0).all(1).float().mean() < 0.8
    assert levels.max() <= 1
    # Of a grey picture the spread is the noise's alone.
    spread = augment(torch.zeros_like(images), noise)[0].flatten(1).std(1)
    level = levels[:, 1]
    assert spread[level == 0].max() < 1e-6
    halved = torch.special.ndtr(noise.flatten(1)[:, 3]) < 0.5
    assert torch.allclose(spread[~halved], 0.4 * level[~halved].square(), rtol=0.1, atol=1e-6)
    assert (spread[halved & (level > 0)] > 0.2 * level[halved & (level > 0)].square()).all()


def test_blur_is_scipys() -> None:
    from tfusion.training.reference_encoder import _blur

    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([0.0, 0.7, 1.9])
    for image, blurred, sigma in zip(images, _blur(images, sigmas), sigmas.tolist(), strict=True):
        expected = image.numpy()
        if sigma:
            expected = ndimage.gaussian_filter(expected, (0, sigma, sigma), mode="nearest", radius=(0, 6, 6))
        assert np.allclose(blurred.numpy(), expected, atol=1e-5)


@pytest.fixture(scope="module")
def data():
    def make(**settings):
        defaults = {"image_corpora": [Shapes(32)], "vocab_size": 261, "seq_len": 64, "max_images_per_row": 2}
        defaults |= {"rows_per_step": 8, "lanes": 1, "caption_first": 1.0, "caption_drop": 0.0}
        return MultimodalDataModule(**(defaults | {"max_val_images": 20} | settings))

    return make


def test_it_learns_validates_and_is_exported(tmp_path: Path, tiny_trainer, data) -> None:
    module = ReferenceEncoderModule(ReferenceEncoder(**SIZES, max_seq_len=64), lr=2e-3, warmup_steps=1)
    losses = []
    step = module.training_step
    module.training_step = lambda *batch: losses.append(step(*batch)) or losses[-1]
    trainer = tiny_trainer(12, limit_val_batches=1.0, val_check_interval=12)
    trainer.fit(module, data())
    assert np.mean([loss.item() for loss in losses[-3:]]) < np.mean([loss.item() for loss in losses[:3]])
    assert {"val/shapes/retrieval_text", "val/shapes/retrieval_image", "val/loss"} <= trainer.callback_metrics.keys()
    assert 0 < trainer.callback_metrics["val/loss"] < 2 * math.log(20)


def test_accumulation_is_refused(tiny_trainer, data) -> None:
    module = ReferenceEncoderModule(ReferenceEncoder(**SIZES, max_seq_len=64))
    with pytest.raises(ValueError, match="accumulate_grad_batches 2; the reference encoder contrasts all pairs"):
        tiny_trainer(2, accumulate_grad_batches=2).fit(module, data())


def test_several_processes_and_data_that_it_cannot_read_are_refused_in_validate_too(tiny_trainer, data) -> None:
    """Each rank would rank its own share of the held-out pairs only, and say so nowhere."""
    module = ReferenceEncoderModule(ReferenceEncoder(**SIZES, max_seq_len=64))
    for world_size, settings, message in [
        (2, {}, "got 2 processes"),
        (1, {"caption_first": 0.8}, "caption_first 0.8 and data.caption_drop 0.0"),
        (1, {"caption_drop": 0.1}, "caption_first 1.0 and data.caption_drop 0.1"),
    ]:
        module._trainer = SimpleNamespace(datamodule=data(**settings), world_size=world_size, accumulate_grad_batches=1)
        with pytest.raises(ValueError, match=message):
            module.check_data(module.trainer.datamodule)
            module.setup("validate")


def test_questions_and_text_are_refused(tmp_path: Path, tiny_trainer, data) -> None:
    (tmp_path / "questions.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}')
    module = ReferenceEncoderModule(ReferenceEncoder(**SIZES, max_seq_len=64))
    with pytest.raises(ValueError, match="leave out text_corpora and choices"):
        tiny_trainer(2).validate(module, data(choices={"own": str(tmp_path / "questions.jsonl")}))


def test_a_side_that_the_tower_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="got image_size 40, expected a multiple of 16"):
        ReferenceEncoder(**(SIZES | {"image_size": 40}))


@pytest.mark.slow
def test_from_the_command_line_to_the_file(tmp_path: Path) -> None:
    """`fit` with the shipped configuration, shortened, then the export and the network that reads it."""
    from tfusion.__main__ import main

    root = Path(__file__).parents[2]
    settings = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--data.rows_per_step", "8"]
    settings += ["--data.max_val_images", "8", "--trainer.default_root_dir", str(tmp_path / "run")]
    main(["fit", "--config", str(root / "configs/reference_encoder.yaml"), *settings])
    export(tmp_path / "run", "last", tmp_path / "encoder.safetensors")
    network = Reference(str(tmp_path / "encoder.safetensors"))
    network.load(torch.device("cpu"))
    assert network.features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 128)
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    weight = load_file(tmp_path / "encoder.safetensors")["image_proj.weight"]
    assert torch.equal(weight, saved["ema_model.image_proj.weight"].half())
