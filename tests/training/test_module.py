"""The LightningModule: which weights are used where, what a checkpoint holds, and what a resume obeys."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from diffusers import AutoencoderKL

from tfusion.callbacks.ema import EMA
from tfusion.requests import GenerationConfig
from tfusion.tokenizers import VAETokenizer
from tfusion.training.optim import adamw
from tfusion.training.trainer_settings import check_validation_interval


@pytest.fixture
def vae_folder(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
        )
    vae.save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


def test_frozen_autoencoder_trains_nothing_and_is_in_no_checkpoint(
    tiny_module, tiny_data, tiny_trainer, vae_folder, tmp_path
):
    module = tiny_module(latent_shape=(4, 4, 4), image_tokenizer=VAETokenizer(vae_folder))
    trainer = tiny_trainer(2)
    trainer.fit(module, tiny_data())
    trainer.save_checkpoint(tmp_path / "with_vae.ckpt")
    saved = torch.load(tmp_path / "with_vae.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"model", "ema_model"}
    assert set(saved["state_dict"]) == {
        f"{kind}.{name}" for kind in ("model", "ema_model") for name, _ in module.model.named_parameters()
    }
    [generation] = module.generate([{"segments": ["red"], "generate": "image", "num_inference_steps": 2}])
    assert generation.segments[0].size == (8, 8)


def test_batches_of_requests_change_nothing(tiny_module, byte_tokenizer):
    module = tiny_module(generation=GenerationConfig(num_inference_steps=2)).double()
    module.materialize("cpu")
    module.text_tokenizer = byte_tokenizer
    requests = [{"segments": [name], "generate": "image", "seed": n} for n, name in enumerate(("red", "lime", "teal"))]
    whole, parts = (module.generate(requests, [7, 8, 9], batch_size=size) for size in (None, 2))
    assert [generation.request for generation in parts] == [7, 8, 9]
    for one, other in zip(whole, parts, strict=True):
        assert one.segments[0].tobytes() == other.segments[0].tobytes()
    assert module.generate([], [], batch_size=2) == []
    with pytest.raises(ValueError, match="request 1: its prompt"):
        module.generate([requests[0], {"segments": ["x" * 99], "generate": "image"}], batch_size=1)


class Gradients(L.Callback):
    """Whether there are any at the start of each micro-batch."""

    def __init__(self) -> None:
        self.there: list[bool] = []

    def on_train_batch_start(self, trainer, pl_module, *args) -> None:
        self.there.append(any(parameter.grad is not None for parameter in pl_module.model.parameters()))


def test_gradients_are_freed_when_their_step_has_ended(tiny_module, tiny_data, tiny_trainer):
    """They would be there through the forward of the next one, which is when memory is short."""
    watch = Gradients()
    data = tiny_data()
    trainer = tiny_trainer(3, callbacks=[watch], accumulate_grad_batches=2)
    trainer.fit(tiny_module(), data)
    assert watch.there == [False, True] * 3


def test_everything_but_training_uses_the_averaged_weights(tiny_module, tiny_data, tiny_trainer):
    module = tiny_module(generation=GenerationConfig(num_inference_steps=2, max_new_tokens=4))
    trainer = tiny_trainer(3, callbacks=[EMA(0.9)])
    trainer.fit(module, tiny_data())
    averaged, weights = list(module.ema_model.parameters()), list(module.model.parameters())
    assert any(not torch.equal(a, w) for a, w in zip(averaged, weights, strict=True))
    assert module.evaluation_model is module.ema_model
    request = [{"segments": ["red"], "generate": "image"}]
    picture = module.generate(request)[0].segments[0].tobytes()
    for weight in weights:
        weight.data.zero_()
    assert module.generate(request)[0].segments[0].tobytes() == picture
    for average in averaged:
        average.data.zero_()
    assert module.generate(request)[0].segments[0].tobytes() != picture


def test_settings_of_the_command_line_act_on_a_resume(tiny_module, tiny_data, tiny_trainer, tmp_path):
    trainer = tiny_trainer(2)
    trainer.fit(tiny_module(lr=1e-2), tiny_data())
    trainer.save_checkpoint(tmp_path / "at_2.ckpt")
    module = tiny_module(lr=1e-4, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, final_lr_share=1.0)
    trainer = tiny_trainer(4)
    trainer.fit(module, tiny_data(), ckpt_path=tmp_path / "at_2.ckpt", weights_only=True)
    matrices, vectors = trainer.optimizers[0].param_groups
    assert matrices["lr"] == vectors["lr"] == 1e-4
    assert matrices["betas"] == (0.8, 0.9)
    assert matrices["eps"] == 1e-6
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)


def test_weights_of_another_model_are_refused(tiny_module, tiny_data, tiny_trainer, tmp_path):
    trainer = tiny_trainer(1)
    trainer.fit(tiny_module(), tiny_data())
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    with pytest.raises(ValueError, match=r"of another model: .*embedding.weight is \(261, 32\).*\(261, 64\)"):
        tiny_trainer(2).fit(tiny_module(dim=64), tiny_data(), ckpt_path=tmp_path / "small.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"blocks.2.* is missing"):
        tiny_trainer(2).fit(
            tiny_module(num_layers=3), tiny_data(), ckpt_path=tmp_path / "small.ckpt", weights_only=True
        )


def test_moments_by_number_are_refused(tiny_module, tiny_data, tiny_trainer, tmp_path):
    """An optimizer numbers parameters by group, Lightning's FSDP2 by module: they would change places."""
    trainer = tiny_trainer(1)
    trainer.fit(tiny_module(), tiny_data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    [state] = saved["optimizer_states"]
    assert "model.transformer.blocks.0.attention.qkv_proj.weight" in state["param_groups"][0]["params"]
    assert "model.transformer.norm.weight" in state["param_groups"][1]["params"]
    saved["optimizer_states"] = [trainer.optimizers[0].state_dict()]
    torch.save(saved, tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"stands by number, not by parameter name"):
        tiny_trainer(2).fit(tiny_module(), tiny_data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)


def test_bf16_mixed_is_close_to_fp32(tiny_module, tiny_data, tiny_trainer):
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        module = tiny_module()
        tiny_trainer(5, precision=precision).fit(module, tiny_data())
        losses[precision] = module.step_metrics()["train/loss"]
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=2e-2)
    assert losses["bf16-mixed"] != losses["32-true"], "autocast did nothing"


def test_step_metrics_are_the_means_over_the_step(tiny_module, tiny_data, tiny_trainer):
    """Loss = text + 5 x diffusion; the quarters' means weighted by their counts give the whole."""
    module = tiny_module()
    tiny_trainer(3).fit(module, tiny_data(rows_per_step=16))
    metrics = module.step_metrics()
    assert metrics["train/loss"] == pytest.approx(metrics["train/text_loss"] + 5 * metrics["train/diffusion_loss"])
    quarters, counts = module.step_sums[5:9], module.step_sums[9:13]
    assert float(quarters.sum() / counts.sum()) == pytest.approx(metrics["train/diffusion_loss"], rel=1e-5)
    assert metrics["train/utilization"] == 1.0


def test_missing_max_steps_is_refused(tiny_module, tiny_data, tiny_trainer):
    with pytest.raises(ValueError, match=r"trainer.max_steps is not set"):
        tiny_trainer(-1).fit(tiny_module(), tiny_data())


@pytest.mark.parametrize("change", [{"num_heads": 4}, {"prediction_type": "v_prediction"}, {"family": "flow"}])
def test_what_shapes_do_not_show_is_refused_too(tiny_module, tiny_data, tiny_trainer, tmp_path, change):
    trainer = tiny_trainer(1)
    trainer.fit(tiny_module(), tiny_data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=rf"of another model: {next(iter(change))} is"):
        tiny_trainer(2).fit(tiny_module(**change), tiny_data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)


class ValidatedAt(L.Callback):
    """At which steps validation ran."""

    def __init__(self):
        self.steps = []

    def on_validation_start(self, trainer, pl_module):
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_a_resume_with_other_micro_batches_validates_at_the_same_steps(
    tiny_module, tiny_data, tiny_trainer, tmp_path, before, after
):
    def fit(max_steps, accumulate, ckpt_path=None):
        at = ValidatedAt()
        trainer = tiny_trainer(
            max_steps,
            accumulate_grad_batches=accumulate,
            val_check_interval=3 * accumulate,
            limit_val_batches=1,
            callbacks=[at],
        )
        trainer.fit(tiny_module(), tiny_data(), ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(tmp_path / "at.ckpt")
        return at.steps

    assert fit(4, before) == [3]
    assert fit(9, after, tmp_path / "at.ckpt") == [6, 9]


def test_validation_speaks_the_tokenizer_of_the_weights(tiny_module, tiny_data, tiny_trainer, tmp_path):
    """Another corpus would give other merges: ids mean what the weights have learned."""
    trainer = tiny_trainer(1)
    trainer.fit(tiny_module(vocab_size=300), tiny_data(vocab_size=300))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    learned = trainer.datamodule.tokenizer.fingerprint
    data = tiny_data(vocab_size=300, text_corpora=[])
    trainer = tiny_trainer(1, limit_val_batches=1)
    trainer.validate(tiny_module(vocab_size=300), data, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert data.tokenizer.fingerprint == learned


def test_weights_in_bf16_are_refused_for_they_would_not_move(tiny_module, tiny_data, tiny_trainer):
    """What torch's AdamW does to them, and what a Trainer made in Python is told."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = adamw([{"params": [weight]}], 3e-4, (0.9, 0.95), 1e-8)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert (weight == 1).all()  # in fp32 0.97
    with pytest.raises(ValueError, match="'bf16-true'.*expected bf16-mixed.*FSDP2"):
        tiny_trainer(1, precision="bf16-true").fit(tiny_module(), tiny_data())


def test_losses_that_would_not_teach_are_refused(tiny_module, tiny_data, tiny_trainer):
    with pytest.raises(ValueError, match="got diffusion_loss_weight -1, expected 5"):
        tiny_module(diffusion_loss_weight=-1)
    data = tiny_data(text_corpora=[], caption_first=0.0, image_first_noise_limit=0.0)
    with pytest.raises(ValueError, match="no picture would have a loss; set data.caption_first to 1"):
        tiny_trainer(1).fit(tiny_module(predict_text=False), data)
    with pytest.raises(ValueError, match="predict_text false and data.text_corpora .* have no loss; set both to null"):
        tiny_trainer(1).fit(tiny_module(predict_text=False), tiny_data())


def test_a_resume_past_the_last_step_says_that_nothing_is_trained(
    tiny_module, tiny_data, tiny_trainer, tmp_path, caplog
):
    trainer = tiny_trainer(3)
    trainer.fit(tiny_module(), tiny_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for steps in (4, 3, 2):
        assert "nothing is trained" not in caplog.text
        fresh = tiny_trainer(steps)
        fresh.fit(tiny_module(), tiny_data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert "the checkpoint is of step 3, past trainer.max_steps 2: nothing is trained" in caplog.text


def test_an_interval_that_no_run_reaches_is_said(caplog):
    settings = {"limit_val_batches": 1.0, "val_check_interval": 8, "accumulate_grad_batches": 2}
    for steps in (4, -1, 3):
        assert "nothing is validated" not in caplog.text
        check_validation_interval(SimpleNamespace(max_steps=steps, **settings))
    assert "val_check_interval 8 is more than the 6 micro-batches of this run" in caplog.text
