"""The bench of memory: bytes are those of tensors alive, and its lines say what each way of training saves."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from tfusion.bench import memory
from tfusion.bench.live_bytes import Live
from tfusion.models.transformer import Transformer

SMALL = "--model.init_args.model.init_args."


def test_alive_and_most_alive() -> None:
    """A view needs nothing, a result is alive as long as it is held, the peak is of the time since `start`."""
    with Live() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]
        assert live.alive() == 4000
        c = b.double()  # 8 x 100 x 8 bytes
        assert live.alive() == live.peak() == 4000 + 6400
        del a, c
        assert (live.alive(), live.peak()) == (4000, 10400)
        del b
        assert live.start() == live.alive() == live.peak() == 0


def test_the_peak_is_what_torchs_own_tracker_finds() -> None:
    """Of a forward and backward pass, checkpointed or not; it knows parts of a model, so it is entered by hooks."""
    for checkpointing in ("none", "full"):
        peaks = []
        for tracker in (Live(), MemTracker()):
            with tracker:
                trunk = Transformer(32, 2, 2, max_seq_len=16, activation_checkpointing=checkpointing)
                if isinstance(tracker, MemTracker):
                    tracker.track_external(trunk)
                trunk(torch.zeros(2, 16, 32), torch.arange(16).expand(2, -1)).sum().backward()
            theirs = isinstance(tracker, MemTracker)
            peaks.append(
                tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] if theirs else tracker.peak()
            )
        assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_gradients_are_there_in_the_forward_of_all_micro_batches_but_the_first() -> None:
    peaks = []
    for micro_batches in (1, 2):
        lines: list[dict] = []
        flags = [SMALL + "dim", "64", SMALL + "num_heads", "2", SMALL + "num_layers", "1", "--data.seq_len", "512"]
        flags += ["--trainer.accumulate_grad_batches", str(micro_batches), "--rows", "1"]
        memory.main(["--config", "configs/quickstart.yaml", *flags], lambda line, to=lines: to.append(json.loads(line)))
        assert [line["accumulates"] for line in lines] == [micro_batches > 1] * 6
        peaks.append(lines[1]["peak_forward_backward"] - lines[1]["gradients"])
    assert peaks[0] + 0.5 * lines[1]["gradients"] < peaks[1]


@pytest.mark.parametrize(
    ("devices", "num_nodes", "rows"),
    [(8, 1, 4), (8, 2, 2), ("8", 1, 4), ([0, 1], 1, 16), (64, 1, 1), (-1, 1, None), ("auto", 1, None)],
)
def test_rows_of_one_process(devices: object, num_nodes: int, rows: int | None) -> None:
    trainer = SimpleNamespace(devices=devices, num_nodes=num_nodes, accumulate_grad_batches=16)
    config = SimpleNamespace(trainer=trainer, data=SimpleNamespace(rows_per_step=512))
    assert memory.rows_of(config) == rows


def test_rows_that_depend_on_the_machine_are_asked_for(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        memory.main(["--config", "configs/quickstart.yaml", "--config", "configs/trainer/ddp.yaml"])
    assert "trainer.devices is -1, so the rows of one process depend on the machine: give --rows" in (
        capsys.readouterr().err
    )


def test_short_rows() -> None:
    """An image of 16 patches, one token of caption and an empty text take 23 positions."""
    model = SimpleNamespace(num_patches=16, latent_shape=(3, 16, 16))
    batch = memory.batch_of(model, rows=2, seq_len=23)
    assert (batch.document_ids >= 0).all() and batch.image_valid.sum() == 2
    with pytest.raises(ValueError, match="22 positions has no room for an image of 16: take data.seq_len >= 23"):
        memory.batch_of(model, rows=2, seq_len=22)


def test_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's config with a small model and a vocabulary that does not fit one chunk."""
    monkeypatch.setattr(memory, "CHUNK", 4 * 2000 * 32)
    lines: list[dict] = []
    settings = {"dim": 32, "num_layers": 3, "num_heads": 2, "hidden_dim": 64, "vocab_size": 2000, "max_seq_len": 256}
    flags = [flag for name, value in settings.items() for flag in (SMALL + name, str(value))]
    flags += ["--data.seq_len", "256", "--trainer.precision", "bf16-mixed", "--rows", "2"]
    memory.main(["--config", "configs/quickstart.yaml", *flags], lambda line: lines.append(json.loads(line)))
    found = {(line["checkpointing"], line["logits"]): line for line in lines}
    assert len(found) == len(lines) == 6
    for line in lines:
        assert (line["rows"], line["seq_len"]) == (2, 256)
        for part in ("weights", "average", "gradients", "optimizer"):
            assert line[part] == pytest.approx(line["formula"][part], rel=0.1), part  # (and tables)
        assert line["peak"] >= line["peak_forward_backward"] > line["weights"] + line["average"] + line["optimizer"]
    for logits in ("whole", "chunked"):
        held = [found[checkpointing, logits]["activations"] for checkpointing in ("none", "selective", "full")]
        assert held == sorted(held, reverse=True) and len(set(held)) == 3
        selective, full = (found[way, logits]["formula"]["activations"] for way in ("selective", "full"))
        assert held[1] - held[2] == selective - full  # what the adapters and the loss keep is in both
    for checkpointing in ("none", "selective", "full"):
        whole, chunked = found[checkpointing, "whole"], found[checkpointing, "chunked"]
        assert whole["loss"] == pytest.approx(whole["formula"]["loss"], rel=0.1)
        assert chunked["loss"] < 0.5 * whole["loss"]
        assert chunked["peak_forward_backward"] < whole["peak_forward_backward"]
