"""Autoencoders in training: losses against closed forms and diffusers, codes that live, layouts, resumes, export."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import VectorQuantizer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image as PILImage
from torch.distributions import Normal, kl_divergence
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image import lpip

from tests.conftest import BYTES_VOCAB_SIZE, IMAGE_SIZE, TinyPictures, picture
from tests.data.picture_folders import S, png
from tests.training.processes import run_ranks
from tests.training.test_equivalence import differences, state_of
from tfusion.callbacks.ema import EMA
from tfusion.callbacks.reconstruction import ReconstructionQuality
from tfusion.data import ImageFiles
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.models.autoencoder import Autoencoder, Coded, KLAutoencoder, VQAutoencoder
from tfusion.models.discriminator import PatchDiscriminator
from tfusion.sequence import Batch, Document, Image, RowShape, collate
from tfusion.tokenizers import TextTokenizer, VAETokenizer, VQTokenizer
from tfusion.training import autoencoder_losses
from tfusion.training.autoencoder import AutoencoderModule
from tfusion.training.autoencoder_export import export
from tfusion.training.autoencoder_losses import Perceptual, adversarial, hinge
from tfusion.training.autoencoder_validation import sheet
from tfusion.training.codebook import StepCodes, statistics
from tfusion.training.optim import adamw, parameter_groups

STEPS, CODES = 6, 20
SIZES: dict[str, Any] = {"image_size": IMAGE_SIZE, "base_channels": 8, "channel_multipliers": (1, 2)}
SIZES |= {"layers_per_block": 1, "latent_channels": 3, "attention": False, "norm_num_groups": 4}
SIZES |= {"vocab_size": BYTES_VOCAB_SIZE, "max_seq_len": 64}
KINDS = ["kl", "vq"]


def autoencoder(kind: str, discriminator: bool = False, **sizes: Any) -> Autoencoder:
    patches = PatchDiscriminator(8, 1) if discriminator else None
    if kind == "kl":
        return KLAutoencoder(**(SIZES | sizes), discriminator=patches)
    after = sizes.pop("after", 2)
    return VQAutoencoder(**(SIZES | sizes), discriminator=patches, codebook_size=CODES, restart_after=after)


def test_a_discriminator_too_deep_for_the_pictures_is_refused() -> None:
    """And what is not refused has a logit."""
    for layers, least in ((1, 6), (2, 12), (3, 24)):
        patches = PatchDiscriminator(8, layers)
        patches.to_empty(device="cpu")
        patches.check_size(least)
        assert patches(torch.zeros(1, 3, least, least)).shape == (1, 1, 1, 1)
        with pytest.raises(ValueError, match=f"for pictures of {least - 1} pixels, expected at least {least}"):
            patches.check_size(least - 1)
    with pytest.raises(ValueError, match="set fewer layers"):
        KLAutoencoder(**SIZES, discriminator=PatchDiscriminator(8, 4))


def module_of(kind: str, discriminator: bool = False, **settings: Any) -> AutoencoderModule:
    # eps: without it Adam makes of a rounding error in a gradient near 0 a whole step
    defaults = {"perceptual": "off", "lr": 5e-3, "eps": 1e-2, "warmup_steps": 1, "seed": 3}
    defaults |= {"gan_start": 3} if discriminator else {}
    return AutoencoderModule(autoencoder(kind, discriminator), **(defaults | settings))


def data_of(**settings: Any) -> MultimodalDataModule:
    defaults = {"image_corpora": [TinyPictures()], "vocab_size": BYTES_VOCAB_SIZE, "seq_len": 64, "rows_per_step": 4}
    defaults |= {"lanes": 2, "val_rows": 2, "max_images_per_row": 4}
    return MultimodalDataModule(**(defaults | settings))


def images_of(number: int = 5) -> torch.Tensor:
    return torch.stack([picture(n).image for n in range(number)]).float() / 127.5 - 1


@pytest.mark.parametrize(("kind", "codes"), [(KLAutoencoder, 0), (VQAutoencoder, 16384 * 8)])
def test_paper_scale(kind: type[Autoencoder], codes: int) -> None:
    """86M parameters, 256 x 256 to 32 x 32 x 8; 16,384 codes of 8 numbers."""
    model = kind()
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(86e6, rel=0.05)
    assert model.coded_shape == (8, 32, 32)
    assert model.factor == 8
    if codes:
        assert model.network.quantize.embedding.weight.numel() == codes


def test_weights_depend_on_seed_and_name_alone() -> None:
    one, other = (autoencoder("vq").materialize("cpu", 0) for _ in range(2))
    assert differences(one.state_dict(), other.state_dict()) == []
    assert differences(one.state_dict(), autoencoder("vq").materialize("cpu", 1).state_dict()) != []


def test_kl_and_samples_are_those_of_normal_distributions() -> None:
    model, images = autoencoder("kl").materialize("cpu", 0), images_of()
    noise = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    coded = model.encode(images, noise)
    posterior = model.network.encode(images).latent_dist
    expected = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(coded.regularisation, expected)
    torch.testing.assert_close(coded.latents, posterior.mean + posterior.std * noise)
    torch.testing.assert_close(model.encode(images).latents, posterior.mode())
    torch.testing.assert_close(model.decode(coded.latents), model.network.decode(coded.latents).sample)


def test_beta_is_on_the_term_that_moves_vectors() -> None:
    """Both gradients in closed form, and diffusers' loss with its fault mended; the decoder's goes straight on."""
    model, images = autoencoder("vq").materialize("cpu", 0), images_of()
    vectors = model.network.encode(images).latents.detach().requires_grad_()
    model.network.encoder, model.network.quant_conv = torch.nn.Identity(), torch.nn.Identity()
    codes = model.network.quantize.embedding.weight
    coded = model.encode(vectors)
    nearest = torch.cdist(vectors.movedim(1, -1).flatten(0, 2), codes).argmin(1)
    assert torch.equal(coded.ids.flatten(), nearest)
    torch.testing.assert_close(coded.latents, codes[nearest].view(5, 4, 4, 3).movedim(-1, 1))
    to_vectors, to_codes = torch.autograd.grad(coded.regularisation.mean(), (vectors, codes), retain_graph=True)
    apart = vectors - coded.latents
    torch.testing.assert_close(to_vectors, 0.25 * 2 * apart / vectors.numel())
    expected = torch.zeros_like(codes).index_add(0, nearest, -2 * apart.movedim(1, -1).flatten(0, 2) / vectors.numel())
    torch.testing.assert_close(to_codes, expected)

    mended = VectorQuantizer(CODES, 3, beta=0.25, legacy=False)
    mended.embedding.weight.data.copy_(codes)
    theirs = mended(vectors)
    torch.testing.assert_close(coded.regularisation.mean(), theirs[1])
    assert torch.equal(coded.latents, theirs[0])
    (straight,) = torch.autograd.grad(coded.latents.sum(), vectors)
    assert torch.equal(straight, torch.ones_like(vectors))


def test_adversarial_terms_are_the_loop_and_gradients_stay_apart() -> None:
    model = autoencoder("kl", discriminator=True).materialize("cpu", 0)
    patches, images = model.discriminator, images_of(4)
    made = (images + 0.3).requires_grad_()
    fooling, telling = adversarial(patches, made), hinge(patches, made, images)
    for i in range(4):  # each by itself: no picture changes another's
        real, fake = (patches(x[i : i + 1]).flatten().tolist() for x in (images, made))
        assert float(fooling[i]) == pytest.approx(-np.mean(fake), rel=1e-4)
        terms = [max(0, 1 - r) + max(0, 1 + f) for r, f in zip(real, fake, strict=True)]
        assert float(telling[i]) == pytest.approx(np.mean(terms) / 2, rel=1e-4)
    fooling.sum().backward()
    assert made.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in patches.parameters())
    made.grad = None
    hinge(patches, made, images).sum().backward()
    assert made.grad is None
    # (inside both margins the last bias has no gradient: it moves real and made alike)
    assert all(parameter.grad.abs().sum() > 0 for parameter in patches.parameters() if parameter.ndim > 1)


def test_gradients_are_clipped_apart() -> None:
    """What the discriminator's are changes nothing in the autoencoder, and the other way round."""
    module = module_of("kl", discriminator=True)
    module.materialize("cpu")
    parts = [list(part.parameters()) for part in (module.model.network, module.model.discriminator)]
    for large, small in (parts, parts[::-1]):
        for parameter in large:
            parameter.grad = torch.full_like(parameter, 7.0)
        for parameter in small:
            parameter.grad = torch.full_like(parameter, 1e-6)
        norms = [torch.cat([p.grad.flatten() for p in part]).norm() for part in parts]
        module.configure_gradient_clipping(module.configure_optimizers(), 1.0, "norm")
        clipped = [torch.cat([p.grad.flatten() for p in part]).norm() for part in (large, small)]
        assert float(clipped[0]) == pytest.approx(1.0, rel=1e-4)
        assert all((p.grad == 1e-6).all() for p in small)
        torch.testing.assert_close(module.grad_norm, norms[0])


def test_a_logit_sees_70_pixels() -> None:
    """Isola et al.: three layers see patches of 70 x 70 (norms aside, which see all of a picture)."""
    patches = PatchDiscriminator(8, 3).to_empty(device="cpu")
    for parameter in patches.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    patches.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in patches.norms)
    images = torch.ones(1, 3, 128, 128, requires_grad=True)
    logits = patches(images)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    seen = images.grad[0, 0].nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def batch_of(pictures: int, slots: int, fill: int = 0) -> Batch:
    """A row with so many pictures in so many slots; empty ones hold `fill`."""
    shape = RowShape(64, 1, slots, (3, IMAGE_SIZE // 2, IMAGE_SIZE // 2), (3, IMAGE_SIZE, IMAGE_SIZE))
    batch = collate([[Document((Image(picture(n).image),)) for n in range(pictures)]], shape, [("a",)])
    batch.images[pictures:] = fill
    batch.noise[:pictures] = torch.randn(batch.noise[:pictures].shape, generator=torch.Generator().manual_seed(0))
    return batch


@pytest.mark.parametrize("kind", KINDS)
def test_empty_slots_weigh_nothing(kind: str, tiny_trainer) -> None:
    """Whatever is in them: not in the loss, nor in gradients, nor among codes and what these restart from."""
    found = []
    for slots, fill in ((3, 0), (6, 0), (6, 200)):
        module = module_of(kind, discriminator=True, gan_start=0)
        module._trainer = tiny_trainer(1)
        module.materialize("cpu")
        module.training_step(batch_of(3, slots, fill), 0).backward()
        gradients = {name: p.grad for name, p in module.model.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        codes = []
        if module.codes is not None:
            module.codes.restart_dead(module.model, module.ema_model, module.configure_optimizers(), 0)
            codes = [module.codes.use, module.model.network.quantize.embedding.weight]
            assert module.codes.use.sum() == 3 * 16
        found.append((module._sums["loss"], gradients, codes))
    for loss, gradients, codes in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradients, found[0][1])
        torch.testing.assert_close(codes, found[0][2])
    assert found[0][0] > 0


def test_dead_codes_restart_where_the_encoder_is() -> None:
    model = autoencoder("vq").materialize("cpu", 0)  # dead after 2 steps without use, and all at first
    codes = model.network.quantize.embedding.weight
    vectors = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    use = torch.zeros(CODES, dtype=torch.int64)
    use[:4] = 7
    before = codes.detach().clone()
    dead = model.count_use(use)
    assert dead.nonzero()[:, 0].tolist() == list(range(4, CODES))
    everyone = torch.ones(50, dtype=torch.bool)
    assert torch.equal(model.restart(dead, vectors, everyone, ("codes", 0, 0)), dead)
    chosen = codes[4:].detach().clone()
    assert torch.equal(codes[:4], before[:4])
    assert {tuple(v) for v in chosen.tolist()} <= {tuple(v) for v in vectors.tolist()}
    assert len(chosen.unique(dim=0)) == len(chosen)
    with torch.no_grad():
        codes.zero_()
    model.restart(dead, vectors, everyone, ("codes", 0, 0))
    assert torch.equal(codes[4:], chosen)
    model.restart(dead, vectors, everyone, ("codes", 0, 1))
    assert not torch.equal(codes[4:], chosen)
    # used, unused once: alive; unused twice: dead
    use[4:10] = 1
    assert not model.count_use(use).any()
    assert model.count_use(use).nonzero()[:, 0].tolist() == list(range(10, CODES))
    # fewer vectors than codes, for the others do not count; none at all
    some = torch.zeros(50, dtype=torch.bool)
    some[[7, 30, 49]] = True
    model.restart(dead, vectors, some, ("codes", 0, 2))
    assert {tuple(v) for v in codes[4:].tolist()} == {tuple(v) for v in vectors[some].tolist()}
    before = codes.detach().clone()
    assert not model.restart(dead, vectors, torch.zeros_like(some), ("codes", 0, 3)).any()
    assert torch.equal(codes, before)


def test_a_step_of_codes_waits_for_no_device() -> None:
    """On the meta device there are no values to wait for: what asks for one, or for a shape of them, raises."""
    model = autoencoder("vq").to("meta")
    codes = StepCodes(0)
    vectors, ids = torch.empty(3, 3, 4, 4, device="meta"), torch.empty(3, 4, 4, dtype=torch.int64, device="meta")
    valid = torch.empty(3, dtype=torch.bool, device="meta")
    codes.add(Coded(vectors, valid, ids, vectors), valid, CODES, first=True)
    codes.restart_dead(model, model, adamw(parameter_groups(model, 0.0), 1e-3, (0.9, 0.99), 1e-8), 0)


def test_a_restarted_code_stays_where_it_is_put() -> None:
    """Until it is used: its moments, of where it was, move it no more."""
    model = autoencoder("vq", after=1).materialize("cpu", 0)
    optimizer = adamw(parameter_groups(model, 0.0), 0.1, (0.9, 0.99), 1e-8)
    codes = model.network.quantize.embedding.weight
    step_codes, images = StepCodes(0), images_of(3)
    codes.grad = torch.ones_like(codes)
    optimizer.step()  # every code has moments

    coded = model.encode(images)
    step_codes.add(coded, torch.ones(3, dtype=torch.bool), CODES, first=True)
    dead = step_codes.use == 0
    codes.grad = (~dead)[:, None].float().expand_as(codes).clone()
    step_codes.restart_dead(model, None, optimizer, 1)
    placed = codes.detach().clone()
    optimizer.step()
    assert dead.any() and not dead.all()
    assert torch.equal(codes[dead], placed[dead])
    assert (codes[~dead] != placed[~dead]).all()


def test_averaged_codes_jump_with_their_own() -> None:
    """The average of a code here and the same code there would be a vector of neither."""
    module = module_of("vq")
    module.materialize("cpu")
    batch = batch_of(3, 3)
    coded = module.model.encode(images_of(3))
    used = coded.ids.unique()
    module.codes.add(coded, batch.image_valid, CODES, first=True)
    with torch.no_grad():
        module.ema_model.network.quantize.embedding.weight.zero_()
    module.codes.restart_dead(module.model, module.ema_model, module.configure_optimizers(), 0)
    expected = module.model.network.quantize.embedding.weight.detach().clone()
    expected[used] = 0
    assert torch.equal(module.ema_model.network.quantize.embedding.weight, expected)


def test_codebook_statistics_are_closed_forms() -> None:
    assert statistics(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx({"codebook_use": 0.8, "codebook_perplexity": 4})
    uneven = statistics(torch.tensor([3, 1]))["codebook_perplexity"]
    assert uneven == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))


class Recorder(L.Callback):
    """Keep the losses of every step; at step `stop` save and end, as an interrupted run does."""

    def __init__(self, path: Path, stop: int | None = None) -> None:
        self.path, self.stop = path, stop
        self.losses: list[list[float]] = []
        self.metrics: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.seen:
            return
        self.seen = trainer.global_step
        metrics = pl_module.step_metrics()
        names = ("loss", "l1", "kl", "codebook", "adversarial", "discriminator", "codebook_perplexity", "grad_norm")
        self.losses.append([metrics.get(f"train/{name}", 0.0) for name in names])
        if self.seen in (self.stop, trainer.max_steps):
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.validated = pl_module._validation.reconstruction["tiles"].compute()["images"]


def fit(
    folder: Path,
    kind: str,
    accumulate: int = 1,
    stop: int | None = None,
    resume: Path | None = None,
    validate: bool = False,
    perceptual: str = "off",
    **settings: Any,
) -> Recorder:
    """With a discriminator from step 3 on."""
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(folder / f"{stop or STEPS}.ckpt", stop)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if validate else 0,
        val_check_interval=STEPS * accumulate,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=[EMA(0.9), ReconstructionQuality(), recorder],
        **({"devices": 1} | quiet | settings),
    )
    module = module_of(kind, discriminator=True, perceptual=perceptual)
    trainer.fit(module, data_of(), ckpt_path=resume, weights_only=True)
    return recorder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache_folder: None) -> dict[str, Any]:
    """One fit of each kind, with its validation: (folder, what was recorded)."""
    root = tmp_path_factory.mktemp("autoencoders")
    return {"root": root} | {kind: (root / kind, fit(root / kind, kind, validate=True)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_says_so(runs: dict[str, Any], kind: str) -> None:
    folder, recorder = runs[kind]
    losses = torch.tensor(recorder.losses)
    fresh = autoencoder(kind).materialize("cpu", 3)
    held_out = torch.stack([one.image for one in TinyPictures().load("val")]).float() / 127.5 - 1
    untrained = float((fresh.decode(fresh.encode(held_out).latents) - held_out).abs().mean())
    assert recorder.metrics["val/tiles/l1"] < untrained, "in six steps"
    assert (losses[:3, 4:6] == 0).all()  # no adversary before its step
    assert (losses[3:, 5] > 0).all()
    metrics = recorder.metrics
    expected = {"val/tiles/psnr", "val/tiles/ssim", "val/tiles/l1", "val/tiles/fd_reference_biased", "val/loss"}
    expected |= {"val/latents_mean_0", "val/latents_std_2"} if kind == "kl" else {"val/codebook_perplexity"}
    assert expected <= metrics.keys()
    kl = 1e-6 * metrics["val/tiles/kl"] if kind == "kl" else metrics["val/tiles/codebook"]
    assert metrics["val/loss"] == pytest.approx(metrics["val/tiles/l1"] + kl, rel=1e-5)
    assert recorder.validated == 5, "each held-out picture once"
    sheets = [path.name for path in (folder / "samples").iterdir()]
    assert sheets == [f"step={STEPS:07d}.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_the_evaluated_model(runs: dict[str, Any], kind: str) -> None:
    """Averaged weights; latents of unit variance on the held-out pictures, ids of the codebook."""
    folder, recorder = runs[kind]
    average = autoencoder(kind, discriminator=True).materialize("cpu", 0)
    weights = torch.load(recorder.path, weights_only=True)["state_dict"]
    average.load_state_dict({k.removeprefix("ema_model."): v for k, v in weights.items() if k.startswith("ema_model")})
    held_out = torch.stack([one.image for one in TinyPictures().load("val")]).float() / 127.5 - 1
    with torch.no_grad():
        coded = average.encode(held_out)
        decoded = average.decode(coded.latents).clamp(-1, 1)
    tokenizer = (VAETokenizer if kind == "kl" else VQTokenizer)(str(folder / "autoencoder"))
    latents = tokenizer.encode(held_out)
    torch.testing.assert_close(tokenizer.decode(latents), decoded, atol=1e-4, rtol=1e-3)
    if kind == "vq":
        assert torch.equal(latents[:, 0], coded.ids.float())
        assert recorder.metrics["val/codebook_use"] == pytest.approx(len(latents.unique()) / CODES)
    else:
        flat = latents.movedim(1, 0).flatten(1)
        torch.testing.assert_close(flat.mean(1), torch.zeros(3), atol=1e-3, rtol=0)
        torch.testing.assert_close(flat.std(1, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    mse = (decoded / 2 - held_out / 2).square().flatten(1).mean(1)
    assert recorder.metrics["val/tiles/psnr"] == pytest.approx(float((-10 * mse.log10()).mean()), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_in_fp32_whatever_training_is(tmp_path: Path, kind: str) -> None:
    """As image tokenizers are: what is measured is what a model on the latents gets."""
    metrics = fit(tmp_path, kind, validate=True, precision="bf16-mixed").metrics
    held_out = torch.stack([one.image for one in TinyPictures().load("val")]).float() / 127.5 - 1
    tokenizer = (VAETokenizer if kind == "kl" else VQTokenizer)(str(tmp_path / "autoencoder"))
    again, truth = ((each + 1) / 2 for each in (tokenizer.decode(tokenizer.encode(held_out)), held_out))
    psnr = -10 * (again - truth).square().flatten(1).mean(1).log10()
    assert metrics["val/tiles/psnr"] == pytest.approx(float(psnr.mean()), rel=1e-5)
    ssim = structural_similarity_index_measure(again, truth, data_range=1.0)
    assert metrics["val/tiles/ssim"] == pytest.approx(float(ssim), abs=1e-4)


def test_one_held_out_picture_has_no_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is no reason to lose what was trained."""
    load = TinyPictures.load
    monkeypatch.setattr(TinyPictures, "load", lambda self, split: load(self, split)[: 1 if split == "val" else None])
    metrics = fit(tmp_path, "kl", validate=True).metrics
    assert "val/tiles/psnr" in metrics and not any("fd_reference" in name for name in metrics)
    assert (tmp_path / "autoencoder" / "config.json").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_changes_no_bit(runs: dict[str, Any], kind: str) -> None:
    folder, whole = runs[kind]
    first = fit(folder, kind, stop=2)  # before the adversary, with codes about to die
    rest = fit(folder.with_name(f"{kind}_resumed"), kind, resume=first.path)
    assert first.losses + rest.losses == whole.losses
    assert differences(state_of(rest.path), state_of(whole.path)) == []


def assert_equal_but_for_rounding(found: list[list[float]], expected: list[list[float]]) -> None:
    """Of the norm of gradients, which comes last, less is asked: L1's flips its sign where a pixel is all but right."""
    ours, theirs = torch.tensor(found), torch.tensor(expected)
    torch.testing.assert_close(ours[:, :-1], theirs[:, :-1], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(ours[:, -1], theirs[:, -1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_no_loss(runs: dict[str, Any], kind: str) -> None:
    _, whole = runs[kind]
    divided = fit(runs["root"] / f"{kind}_divided", kind, accumulate=2)
    assert_equal_but_for_rounding(divided.losses, whole.losses)


def fit_on_a_rank(root: Path) -> None:
    for kind in KINDS:
        folder = root / f"{kind}_ranks"
        recorder = fit(folder, kind, validate=True, strategy="ddp", devices=2)
        if torch.distributed.get_rank() == 0:
            torch.save({"losses": recorder.losses, "metrics": recorder.metrics}, folder / "result.pt")


@pytest.mark.multi
def test_two_processes_do_what_one_does(runs: dict[str, Any]) -> None:
    run_ranks(runs["root"] / "output", fit_on_a_rank, runs["root"])
    for kind in KINDS:
        folder, one = runs[kind]
        two = torch.load(runs["root"] / f"{kind}_ranks" / "result.pt", weights_only=True)
        assert_equal_but_for_rounding(two["losses"], one.losses)
        assert two["metrics"] == pytest.approx(one.metrics, rel=1e-3)
        names = {path.name for path in (folder / "autoencoder").iterdir()}
        assert {path.name for path in (runs["root"] / f"{kind}_ranks" / "autoencoder").iterdir()} == names


def exported(path: Path) -> float | None:
    """What `export` below has written, as its readers see it; None where they see nothing."""
    if not path.exists():
        return None
    assert VAETokenizer(str(path)).encode(images_of(1)).isfinite().all()
    return json.loads((path / "config.json").read_text())["latents_mean"][0]


def test_the_folder_is_replaced_whole(tmp_path: Path) -> None:
    """What an interrupted export left behind is no hindrance; the run folder may be moved."""
    model = autoencoder("kl").materialize("cpu", 0)
    for letter in "ab":
        (tmp_path / "run" / f".ae.{letter}").mkdir(parents=True)
        (tmp_path / "run" / f".ae.{letter}" / "half").touch()
    for mean in (2.0, 0.0, 1.0):
        export(model, tmp_path / "run" / "ae", ([mean] * 3, [2.0] * 3))
        assert exported(tmp_path / "run" / "ae") == mean
        assert len(list((tmp_path / "run").iterdir())) == 2, "the folder and what it links to"
    (tmp_path / "run").rename(tmp_path / "moved")
    images = images_of(2)
    expected = (model.encode(images).latents.detach() - 1) / 2
    torch.testing.assert_close(VAETokenizer(str(tmp_path / "moved" / "ae")).encode(images), expected)


class Killed(BaseException):
    """As by a signal."""


@pytest.mark.parametrize("before", ["nothing", "link", "folder"])
def test_a_killed_export_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """Killed at each of its operations on files, it leaves the old one, or the new one; and the next one goes on."""
    model = autoencoder("kl").materialize("cpu", 0)
    countdown = 10**9

    def counted(operation: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal countdown
            countdown -= 1
            if countdown < 0:
                raise Killed
            return operation(*args, **options)

        return run

    for module, name in ((os, "rename"), (os, "replace"), (os, "symlink"), (os, "unlink"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    monkeypatch.setattr(Path, "write_text", counted(Path.write_text))

    for at in range(100):
        folder = tmp_path / str(at) / "ae"
        folder.parent.mkdir()
        if before != "nothing":
            export(model, folder, ([0.0] * 3, [1.0] * 3))
        if before == "folder":  # as older versions had it
            target = folder.resolve()
            folder.unlink()
            target.rename(folder)
        countdown = at
        try:
            export(model, folder, ([1.0] * 3, [1.0] * 3))
        except Killed:
            countdown = 10**9
            found = exported(folder)
            if found is None and before == "folder":  # between two renames: both are there
                found = exported(folder.with_name(".ae.link"))
            assert found in ([None, 1.0] if before == "nothing" else [0.0, 1.0])
            export(model, folder, ([2.0] * 3, [1.0] * 3))
            assert exported(folder) == 2.0
        else:
            break
    assert at > 4 and exported(folder) == 1.0


def test_the_sheet_has_originals_above_what_came_back() -> None:
    pairs = torch.zeros(3, 2, 3, 8, 8, dtype=torch.uint8)
    pairs[:, 0], pairs[:, 1] = 200, 50
    drawn = np.asarray(sheet([pairs, pairs[:1]]))
    assert drawn.shape == (4 * 100 + 4, 3 * 100 + 4, 3)
    assert (drawn[50, 50], drawn[150, 50], drawn[250, 250]) == pytest.approx(np.array([[200] * 3, [50] * 3, [255] * 3]))
    assert isinstance(sheet([]), PILImage.Image)


class Squares(torch.nn.Module):
    """In LPIPS's place."""

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one - other).square().mean((1, 2, 3), keepdim=True)


def test_lpips_is_used_where_its_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    missing = Perceptual("cached")
    with caplog.at_level(logging.WARNING):
        assert [missing.load(torch.device("cpu")) for _ in range(3)] == [False] * 3
    assert len([r for r in caplog.records if "vgg16-397923af.pth" in r.getMessage()]) == 1
    assert not Perceptual("off").load(torch.device("cpu"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").touch()

    monkeypatch.setattr(autoencoder_losses, "_lpips", Squares)
    module = module_of("kl", perceptual="cached", perceptual_weight=3.0)
    module.materialize("cpu")
    images = images_of(2)
    parts, reconstructed, _ = module._parts(module.model, images, None)
    torch.testing.assert_close(parts["perceptual"], F.mse_loss(reconstructed, images, reduction="none").mean((1, 2, 3)))
    assert module.weights["perceptual"] == 3.0


def test_the_distance_is_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torchmetrics' network over a VGG-16 of random weights, against the definition, feature by feature."""

    def untrained(net_type: str) -> SimpleNamespace:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return SimpleNamespace(net=_LPIPS(net=net_type, pnet_rand=True))

    monkeypatch.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", untrained)
    distance = Perceptual("download")
    assert distance.load(torch.device("cpu"))
    network = distance._network
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    images, others = F.interpolate(images_of(4), size=32).split(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = distance(images, others)

    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)  # of ImageNet's pictures in [-1, 1]
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    parts = [getattr(network.net, f"slice{n}") for n in range(1, 6)]
    for n in range(2):
        a, b, total = (images[n] - shift) / scale, (others[n] - shift) / scale, 0.0
        for part, linear in zip(parts, network.lins, strict=True):
            a, b = part(a[None])[0], part(b[None])[0]
            unit_a, unit_b = (x / x.square().sum(0, keepdim=True).sqrt() for x in (a, b))
            weights = linear.model[-1].weight.view(-1, 1, 1)
            total += float((weights * (unit_a - unit_b).square()).sum(0).mean())
        assert float(found[n]) == pytest.approx(total, rel=1e-4)


def test_machines_that_do_not_all_have_lpips_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the processes would train another loss, and wait for the others' sums for ever."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    another_has = lambda self, decision, all=True: decision if all else True  # noqa: E731
    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", another_has, raising=False)
    with pytest.raises(ValueError, match="not all machines have vgg16-397923af.pth"):
        fit(tmp_path / "run", "kl", perceptual="cached")


def test_ranks_but_the_first_do_not_miss_lpips_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with caplog.at_level(logging.WARNING):
        assert not Perceptual("cached").load(torch.device("cpu"))
    assert not caplog.records


def test_a_resume_on_a_machine_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether LPIPS is found or lost on the way; said outright, off and download may do what they say."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(autoencoder_losses, "_lpips", Squares)
    vgg = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    vgg.parent.mkdir()
    without = fit(tmp_path / "without", "kl", stop=1, perceptual="cached").path
    vgg.touch()
    with_it = fit(tmp_path / "with", "kl", stop=1, perceptual="cached").path
    fit(tmp_path / "same", "kl", stop=2, resume=with_it, perceptual="cached")
    fit(tmp_path / "less", "kl", stop=2, resume=with_it, perceptual="off")
    with pytest.raises(ValueError, match="trained without a perceptual loss, .* has vgg16"):
        fit(tmp_path / "found", "kl", resume=without, perceptual="cached")
    vgg.unlink()
    with pytest.raises(ValueError, match="trained with a perceptual loss, .* has no vgg16"):
        fit(tmp_path / "lost", "kl", resume=with_it, perceptual="cached")


def test_weights_of_lpips_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="LPIPS cannot be had.*set perceptual to off"):
        Perceptual("cached").load(torch.device("cpu"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 9}, "got image_size 9 with 2 channel_multipliers.*multiple of 2"),
        ({"latent_channels": 13}, "got latent_channels 13, expected at most 3 x 2"),
        ({"norm_num_groups": 16}, r"got levels of \[8\] channels, expected multiples of norm_num_groups 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autoencoder("kl", **wrong)


def test_codebooks_that_do_not_fit_are_refused() -> None:
    for wrong in ({"codebook_size": 1}, {"restart_after": 0}, {"commitment": -0.25}, {"commitment": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VQAutoencoder(**SIZES, **wrong)
    with pytest.raises(ValueError, match="got perceptual 'vgg'"):
        Perceptual("vgg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="base_channels 12 of the discriminator, expected a multiple of 8"):
        PatchDiscriminator(12)


@pytest.mark.parametrize(
    ("kind", "discriminator", "wrong"),
    [
        *(("kl", True, wrong) for wrong in ({"gan_weight": -0.5}, {"gan_start": -1}, {"kl_weight": -1e-6})),
        ("kl", True, {"kl_weight": float("nan")}),
        ("vq", False, {"codebook_weight": -1.0}),
        ("kl", False, {"perceptual_weight": -1.0, "perceptual": "cached"}),
        ("kl", False, {"perceptual_weight": 1.0}),  # perceptual is off
        ("kl", False, {"gan_weight": 0.5}),
        ("kl", False, {"gan_start": 3}),
        ("kl", False, {"codebook_weight": 1.0}),
        ("vq", False, {"kl_weight": 1e-6}),
    ],
)
def test_weights_below_zero_or_of_nothing_are_refused(kind: str, discriminator: bool, wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"got {name} .*(would do nothing|from 0 on)"):
        module_of(kind, discriminator, **wrong)


def test_weights_are_the_papers_where_nothing_is_said() -> None:
    for kind, its_own in (("kl", {"kl": 1e-6}), ("vq", {"codebook": 1.0})):
        module = AutoencoderModule(autoencoder(kind, discriminator=True))
        assert module.weights == {"l1": 1.0, "perceptual": 1.0, "adversarial": 0.5, "discriminator": 1.0} | its_own
        assert module.gan_start == 50_000


def test_captions_are_not_read(tmp_path: Path, attached) -> None:
    """However long they are, no picture is lost, no tokenizer is trained on them, and rows hold pictures alone."""
    for n in range(20):
        (tmp_path / f"{n:02}.png").write_bytes(png(n))
        (tmp_path / f"{n:02}.txt").write_text("so long a caption " * (n + 1))
    pictures = ImageFiles(str(tmp_path), S, val_share=0.2)
    sizes = {"vocab_size": BYTES_VOCAB_SIZE + 9, "seq_len": 20, "max_images_per_row": 2, "rows_per_step": 2}
    module = module_of("vq")
    module.model = autoencoder("vq", image_size=S, vocab_size=BYTES_VOCAB_SIZE + 9)
    data = attached(data_of(image_corpora=[pictures], **sizes), module)
    assert not len(data.bad_records)
    assert (data.tokenizer.to_json(), data.tokenizer.vocab_size) == (
        TextTokenizer.train([], BYTES_VOCAB_SIZE + 9).to_json(),
        BYTES_VOCAB_SIZE + 9,
    )
    assert len(data.mixture.images.pictures) + len(pictures.load("val")) == 20
    batch = next(iter(data.train_dataloader()))
    assert batch.image_valid.sum() == 4 and batch.noise.shape == (4, 0, 0, 0)  # codes need none
    assert (batch.document_ids >= 0).sum() == 4 * 5
    for loader in data.val_dataloader():
        assert sum(int(held_out.image_valid.sum()) for held_out in loader) == len(pictures.load("val")) > 0


@pytest.mark.parametrize(
    ("steps", "accumulate", "validated", "held"),
    [(5, 1, 2, "be that of 4 of 5"), (3, 1, 4, "never be written"), (3, 2, 4, "be that of 4 of 6")],
)
def test_training_past_the_last_validation_is_refused(
    tiny_trainer, steps: int, accumulate: int, validated: int, held: str
) -> None:
    """The folder would not hold what was trained."""
    settings = {"limit_val_batches": 1.0, "val_check_interval": validated, "accumulate_grad_batches": accumulate}
    with pytest.raises(ValueError, match=f"max_steps {steps} .* no multiple of .* {validated} .*{held}"):
        tiny_trainer(steps, **settings).fit(module_of("kl"), data_of())


def test_a_run_that_writes_no_folder_says_so(tiny_trainer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tiny_trainer(1).fit(module_of("kl"), data_of())
    assert "no autoencoder will be written" in caplog.text


def test_data_that_is_not_pictures_alone_is_refused(tiny_trainer, texts) -> None:
    for settings, message in (
        ({"text_corpora": [texts]}, "pictures alone"),
        ({"image_first_noise_limit": 0.0}, "image_first_noise_limit 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_trainer(1).fit(module_of("kl"), data_of(**settings))
    cached = SimpleNamespace(name="cached", image_size=8, codebook_size=None)  # as tfusion.data.Latents
    with pytest.raises(ValueError, match="corpus 'cached' holds latents; an autoencoder learns from pictures"):
        tiny_trainer(1).fit(module_of("kl"), data_of(image_corpora=[cached]))


def test_pictures_of_another_size_are_refused(tiny_trainer) -> None:
    module = AutoencoderModule(autoencoder("kl", image_size=16), perceptual="off")
    with pytest.raises(ValueError, match="pictures of 8 x 8 become latents of"):
        tiny_trainer(1).fit(module, data_of())
