"""Ranked choice in validation equals a loop that scores each context and choice alone, and changes no other metric."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tfusion.callbacks.choices import RankedChoice
from tfusion.callbacks.perplexity import Perplexity
from tfusion.data.choices import read_choices
from tfusion.sequence import BOS_ID, IGNORE_INDEX, Document, RowShape, collate

T = 64


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Two files of questions with 2 to 4 choices; some contexts are longer than a row."""
    draw = random.Random(1)
    paths = {}
    for name, count in (("words", 24), ("few", 2)):
        lines = []
        for _ in range(count):
            some = ["".join(draw.choices("abcdé ", k=draw.randint(2, 14))) + "." for _ in range(draw.randint(2, 4))]
            context = "".join(draw.choices("xyz ", k=draw.choice([0, 5, 20, 90])))
            lines.append(json.dumps({"context": context, "choices": some, "answer": draw.randrange(len(some))}))
        paths[name] = str(tmp_path / f"{name}.jsonl")
        Path(paths[name]).write_text("\n".join(lines), encoding="utf-8")
    return paths


def alone(model, tokenizer, context: str, choices: tuple[str, ...]) -> list[float]:
    """Log-likelihood of each choice, from all logits of `[BOS] context choice` by itself."""
    most = T - 1 - max(len(tokenizer.encode(choice)) for choice in choices)
    found = []
    for choice in choices:
        ids = tokenizer.encode(context)
        before, after = [BOS_ID, *ids[max(0, len(ids) - most) :]], tokenizer.encode(choice)
        shape = RowShape(len(before) + len(after), model.num_patches, 0, model.latent_shape, None)
        batch = collate([[Document((before[1:] + after,), eos=False)]], shape, [(0,)])
        with torch.no_grad():
            logits, _ = model(batch, batch.noise.to(model.embedding.weight.dtype), batch.time_uniforms)
        scores = logits.double().log_softmax(-1)
        found.append(sum(scores[len(before) - 1 + i, token].item() for i, token in enumerate(after)))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_log_likelihoods_are_those_of_each_choice_alone(
    files, dtype, tolerance: float, tiny_module, tiny_data, attached
) -> None:
    module = tiny_module(seed=2, ema=False)
    module.materialize("cpu")
    data = attached(tiny_data(choices=files, val_rows=3), module, "validate")
    model = module.model.to(dtype).requires_grad_(False)
    callback, trainer = RankedChoice(), SimpleNamespace(datamodule=data)
    callback.on_validation_epoch_start(trainer, module)
    for number, loader in enumerate(data.val_dataloader()):
        for batch in loader:
            logits, _ = model(batch, batch.noise.to(dtype), torch.zeros(len(batch.noise)))
            nll = F.cross_entropy(logits, batch.text_labels, ignore_index=IGNORE_INDEX, reduction="none")
            callback.on_validation_batch_end(trainer, module, {"nll": nll}, batch, 0, number)
    for name, path in files.items():
        expected = [x for q in read_choices(path) for x in alone(model, data.tokenizer, q.context, q.choices)]
        found = callback.accuracies[name].log_likelihoods
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=0)
        assert len(set(expected)) > 0.9 * len(expected)


def validated(module, data, trainer) -> dict[str, float]:
    metrics: dict[str, float] = {}
    module.log_dict = lambda values, **_: metrics.update(values)
    trainer.validate(module, data, verbose=False)
    return metrics


def test_accuracies_of_a_validation(files, tiny_module, tiny_data, tiny_trainer) -> None:
    """By the evaluation weights; all that was measured without the files is measured still, to the last bit."""
    module, callback = tiny_module(seed=2), RankedChoice()
    module.materialize("cpu")
    with torch.no_grad():
        for parameter in module.ema_model.parameters():
            parameter.mul_(1.5)
    whole = {"limit_val_batches": 1.0}
    data = tiny_data(choices=files, val_rows=3)
    metrics = validated(module, data, tiny_trainer(10, callbacks=[Perplexity(), callback], **whole))
    trainer = tiny_trainer(10, callbacks=[Perplexity(), RankedChoice()], **whole)
    plain = validated(module, tiny_data(val_rows=3), trainer)
    names = {f"val/{name}/accuracy{ending}" for name in files for ending in ("", "_unnormalised")}
    assert {name: value for name, value in metrics.items() if name not in names} == plain
    measured = {one.name: one for one in callback.findings.measurements}
    assert set(measured) == names
    assert callback.findings.seconds["ranked choice"] > 0
    for name, path in files.items():
        questions, right, unnormalised = read_choices(path), 0, 0
        for question in questions:
            scores = alone(module.ema_model, data.tokenizer, question.context, question.choices)
            each = [s / len(c.strip()) for s, c in zip(scores, question.choices, strict=True)]
            right += each.index(max(each)) == question.answer
            unnormalised += scores.index(max(scores)) == question.answer
        n = len(questions)
        accuracy = measured[f"val/{name}/accuracy"]
        assert metrics[accuracy.name] == accuracy.value == right / n
        assert metrics[f"{accuracy.name}_unnormalised"] == unnormalised / n
        assert accuracy.n == n
        p = (right + 1) / (n + 2)
        assert accuracy.standard_error == pytest.approx(math.sqrt(p * (1 - p) / n))
    assert metrics["val/words/accuracy"] != metrics["val/words/accuracy_unnormalised"], "else nothing is seen"


def test_a_validation_cut_short_counts_whole_questions_only(files, tiny_module, tiny_data, tiny_trainer) -> None:
    module, callback = tiny_module(seed=2), RankedChoice()
    trainer = tiny_trainer(10, callbacks=[callback], limit_val_batches=1)
    validated(module, tiny_data(choices=files, val_rows=3), trainer)
    assert 0 < callback.findings.measurements[0].n < 24
