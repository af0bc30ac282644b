"""Perplexity, bits per byte and diffusion loss against explicit loops and torchmetrics, alone and in validation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torchmetrics.text import Perplexity as TorchmetricsPerplexity

from tfusion.callbacks.perplexity import Perplexity
from tfusion.losses import token_nll
from tfusion.metrics import DiffusionLoss, TextLoss, standard_error_of_mean, token_bytes
from tfusion.sequence import BOI_ID, EOS_ID, IGNORE_INDEX
from tfusion.tokenizers import TextTokenizer

VOCAB = 40


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(logits (N, V), labels (N,)) with some labels ignored."""
    draws = torch.Generator().manual_seed(0)
    made = []
    for n in range(count):
        logits = 3 * torch.randn(50 + n, VOCAB, generator=draws)
        labels = torch.randint(5, VOCAB, (50 + n,), generator=draws)
        labels[torch.rand(50 + n, generator=draws) < 0.2] = IGNORE_INDEX
        made.append((logits, labels))
    return made


def test_text_loss_equals_loops_and_torchmetrics() -> None:
    sizes = torch.arange(VOCAB).float() % 7
    metric, theirs = TextLoss(sizes), TorchmetricsPerplexity(ignore_index=IGNORE_INDEX)
    nats = tokens = size = 0.0
    for logits, labels in batches():
        metric.update(token_nll(logits, labels), labels, labels != IGNORE_INDEX)
        theirs.update(logits[None], labels[None])
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            if label != IGNORE_INDEX:
                nats += math.log(sum(math.exp(x) for x in row)) - row[label]
                tokens, size = tokens + 1, size + label % 7
    values = metric.compute()
    assert values["tokens"] == tokens
    assert values["nll"] == pytest.approx(nats / tokens, rel=1e-6)
    assert values["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert values["perplexity"] == pytest.approx(theirs.compute().item(), rel=1e-5)
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_only_counted_tokens_count_and_batches_do_not_matter() -> None:
    (logits, labels), *_ = batches()
    counted = labels > 20
    one, many = TextLoss(torch.ones(VOCAB)), TextLoss(torch.ones(VOCAB))
    one.update(token_nll(logits, labels), labels, counted)
    for n in range(len(labels)):
        many.update(token_nll(logits[n : n + 1], labels[n : n + 1]), labels[n : n + 1], counted[n : n + 1])
    assert one.compute() == pytest.approx(many.compute(), rel=1e-12)
    assert one.compute()["tokens"] == counted.sum()
    mean = token_nll(logits, labels)[counted].double().mean().item()
    assert one.compute()["nll"] == pytest.approx(mean, rel=1e-12)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_counted_and_hopeless_models_give_numbers() -> None:
    metric = TextLoss(torch.ones(VOCAB))
    assert metric.compute() == {"nll": 0, "perplexity": 1, "bits_per_byte": 0, "tokens": 0, "squares": 0}
    metric.update(torch.tensor([5000.0]), torch.tensor([7]), torch.tensor([True]))
    assert math.isfinite(metric.compute()["perplexity"])
    assert metric.compute()["nll"] == 5000
    assert DiffusionLoss().compute() == {"loss": 0, "images": 0, "squares": 0}


def test_diffusion_loss_is_the_mean_over_counted_images() -> None:
    metric = DiffusionLoss()
    errors = torch.tensor([0.5, 2.0, 100.0, 1.0, 100.0])
    metric.update(errors[:3], torch.tensor([True, True, False]))
    metric.update(errors[3:], torch.tensor([True, False]))
    assert metric.compute() == {"loss": pytest.approx(3.5 / 3, rel=1e-12), "images": 3, "squares": 5.25}


def test_standard_errors_are_those_of_samples() -> None:
    """Against numpy, and against the spread of the means of many samples."""
    values = np.random.default_rng(0).exponential(2.0, (2000, 50))
    expected = values[0].std(ddof=1) / math.sqrt(50)
    assert standard_error_of_mean(values[0].sum(), (values[0] ** 2).sum(), 50) == pytest.approx(expected, rel=1e-9)
    errors = [standard_error_of_mean(row.sum(), (row**2).sum(), 50) for row in values]
    assert np.mean(errors) == pytest.approx(values.mean(1).std(), rel=0.05)
    assert standard_error_of_mean(3.0, 9.0, 1) is None
    assert standard_error_of_mean(0.3, 0.03, 3) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("vocab_size", [261, 300, 400])
def test_bytes_of_tokens_add_up_to_the_texts(vocab_size: int, texts, tmp_path) -> None:
    corpus = [*texts.load("train"), "naïve 漢字 \U0001f642\t\x00 <eos>"]
    tokenizer = TextTokenizer.train(corpus, vocab_size, tmp_path)
    sizes = token_bytes(tokenizer)
    assert sizes.shape == (vocab_size,)
    assert sizes[:5].tolist() == [0] * 5
    for text in corpus:
        assert sizes[torch.tensor(tokenizer.encode(text), dtype=torch.long)].sum() == len(text.encode())


def test_bytes_of_the_tokens_of_another_kind_of_tokenizer() -> None:
    inner = Tokenizer(models.WordLevel({"ab": 0, "é": 1, "[UNK]": 2}, unk_token="[UNK]"))
    inner.normalizer, inner.decoder = normalizers.NFC(), decoders.Fuse()
    assert token_bytes(TextTokenizer(inner)).tolist()[5:7] == [2, 2]


# In validation


@pytest.fixture
def validated(tiny_module, tiny_data, tiny_trainer):
    """Module, data, metrics and findings after `trainer.validate`; the averaged weights are not the trained ones."""
    module, data, callback = tiny_module(seed=2), tiny_data(val_rows=3), Perplexity()
    trainer = tiny_trainer(10, limit_val_batches=1.0, callbacks=[callback])
    module.materialize("cpu")
    with torch.no_grad():
        for parameter in module.ema_model.parameters():
            parameter.mul_(1.5)
    metrics = {}
    module.log_dict = lambda values, **_: metrics.update(values)
    trainer.validate(module, data, verbose=False)
    return module, data, metrics, callback.findings


def test_validation_equals_loops_over_the_evaluation_weights(validated) -> None:
    """Text: tokens and EOS; a caption alone: tokens; a caption of a given image: tokens and EOS. Never BOI."""
    module, data, metrics, findings = validated
    measured = {one.name: one for one in findings.measurements}
    all_nats, errors, noise = [], [], []
    for view, loader in zip(data.val_views, data.val_dataloader(), strict=True):
        nats, size = [], 0
        for batch in loader:
            x_0 = batch.images.float() / 127.5 - 1
            clean = batch.noise_limits == 0
            t = module.process.sample_timesteps(batch.time_uniforms, batch.noise_limits)
            x_t = module.process.add_noise(x_0, batch.noise, t, clean)
            with torch.no_grad():
                logits, output = module.ema_model(batch, x_t, t)
            for row, label in zip(logits.log_softmax(-1), batch.text_labels.tolist(), strict=True):
                if label in (IGNORE_INDEX, BOI_ID) or (label == EOS_ID and view == "tiles"):
                    continue
                nats.append(-row[label].item())
                size += label != EOS_ID  # a byte an id
            for slot in range(len(clean)):
                if batch.image_valid[slot] and not clean[slot]:
                    errors.append((output[slot] - batch.noise[slot]).square().mean().item())
                    noise.append(int(t[slot]) // 250)
        perplexity, bits = measured[f"val/{view}/perplexity"], measured[f"val/{view}/bits_per_byte"]
        error = np.std(nats, ddof=1) / math.sqrt(len(nats))
        assert metrics[perplexity.name] == perplexity.value == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
        assert metrics[bits.name] == bits.value == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-5)
        assert perplexity.n == bits.n == len(nats)
        up, down = (math.exp(np.mean(nats) + sign * 1e-4 * error) for sign in (1, -1))
        assert perplexity.standard_error == pytest.approx((up - down) / 2e-4, rel=1e-4)
        up, down = ((sum(nats) + sign * error * len(nats)) / math.log(2) / size for sign in (1, -1))
        assert bits.standard_error == pytest.approx((up - down) / 2, rel=1e-4)
        all_nats += nats
    assert len(errors) == 5
    assert metrics["val/text_loss"] == pytest.approx(np.mean(all_nats), rel=1e-5)
    assert metrics["val/diffusion_loss"] == pytest.approx(np.mean(errors), rel=1e-5)
    text, image, loss = (measured[f"val/{name}"] for name in ("text_loss", "diffusion_loss", "loss"))
    assert (text.n, image.n) == (len(all_nats), 5)
    assert text.standard_error == pytest.approx(np.std(all_nats, ddof=1) / math.sqrt(len(all_nats)), rel=1e-4)
    assert image.standard_error == pytest.approx(np.std(errors, ddof=1) / math.sqrt(5), rel=1e-4)
    assert loss.standard_error == pytest.approx(math.hypot(text.standard_error, 5 * image.standard_error))
    found = {name: one for name, one in measured.items() if "diffusion_loss_t" in name}
    by_quarter = {q: [e for e, n in zip(errors, noise, strict=True) if n == q] for q in sorted(set(noise))}
    assert 1 < len(by_quarter) <= 4
    assert set(found) == {f"val/tiles/diffusion_loss_t{250 * q}-{250 * q + 250}" for q in by_quarter}
    for one, some in zip(found.values(), by_quarter.values(), strict=True):
        assert (metrics[one.name], one.n) == (one.value, len(some))
        assert one.value == pytest.approx(np.mean(some), rel=1e-5)
    assert 0 < findings.seconds["losses"] < 100
    assert metrics["val/tiles/diffusion_loss"] == metrics["val/diffusion_loss"]
    assert "val/lines/diffusion_loss" not in metrics
    assert "val/tiles/given_image/diffusion_loss" not in metrics
    expected = metrics["val/text_loss"] + 5 * metrics["val/diffusion_loss"]
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-12)


def test_bytes_of_a_text_view_are_those_of_its_texts(validated, tiny_data, texts) -> None:
    _, _, metrics, _ = validated
    size = sum(len(text.encode()) for text in texts.load("val"))
    tokens = size + len(texts.load("val"))  # a byte an id, and EOS
    nats = math.log(metrics["val/lines/perplexity"]) * tokens
    assert metrics["val/lines/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_metrics_are_those_of_all_ranks(byte_tokenizer, monkeypatch) -> None:
    """Another rank's sums arrive through torchmetrics' gather; `val/loss`, which `best` follows, must hold them."""
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    gathered = lambda value, group=None: [value, value.new_tensor(4.0)]  # noqa: E731 (each sum of the other is 4)
    monkeypatch.setattr("torchmetrics.metric.gather_all_tensors", gathered)
    callback, metrics = Perplexity(), {}
    data = SimpleNamespace(tokenizer=byte_tokenizer, val_views=["tiles", "tiles/given_image"])
    trainer = SimpleNamespace(datamodule=data, loggers=[], global_step=0, state=SimpleNamespace(fn="fit"))
    module = SimpleNamespace(device="cpu", predicts_text=True, log_dict=lambda v, **_: metrics.update(v))
    module.image_measure, module.noise_steps, module.loss_weights = "diffusion_loss", 1000, lambda *_: (1.0, 5.0)
    callback.on_validation_epoch_start(trainer, module)
    outputs = {"nll": torch.tensor([2.0, 2.0]), "labels": torch.tensor([65, 66])}
    outputs |= {"errors": torch.tensor([3.0, 3.0]), "valid": torch.tensor([True, True])}
    outputs |= {"timesteps": torch.tensor([30, 900])}
    for number in range(2):
        callback.on_validation_batch_end(trainer, module, outputs, None, 0, number)
    callback.on_validation_epoch_end(trainer, module)
    assert metrics["val/text_loss"] == pytest.approx(2 * (4 + 4) / (2 * (2 + 4)))
    assert metrics["val/tiles/diffusion_loss"] == pytest.approx((6 + 4) / (2 + 4))
    assert metrics["val/diffusion_loss"] == pytest.approx((6 + 4) / (2 + 4))
    assert metrics["val/loss"] == pytest.approx(metrics["val/text_loss"] + 5 * (6 + 4) / (2 + 4))
    assert metrics["val/tiles/diffusion_loss_t0-250"] == pytest.approx((3 + 4) / (1 + 4))
    assert callback.findings.measurements[-3].n == 2 * (2 + 4)
