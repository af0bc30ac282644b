"""The bench of the reference encoder: its tables say whether each row rises; what sees nothing is found out."""

from __future__ import annotations

import pytest
import torch

from tfusion.bench import reference_encoder
from tfusion.data.openmoji import OpenMoji
from tfusion.data.shapes import Shapes
from tfusion.metrics import Reference


class Few:
    """The first pictures of a corpus, whichever split."""

    def __init__(self, corpus: OpenMoji | Shapes) -> None:
        self.corpus = corpus

    def load(self, split: str) -> list:
        return [self.corpus.load(split)[i] for i in range(50)]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_encoder, "OpenMoji", lambda size: Few(OpenMoji(size)))
    monkeypatch.setattr(reference_encoder, "Shapes", lambda size: Few(Shapes(size)))


@pytest.mark.slow
def test_the_shipped_encoder_answers_to_every_fault(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    reference_encoder.main([])
    output = capsys.readouterr().out
    assert output.startswith("reference_encoder.safetensors: ")
    assert output.count("| yes |") == 2 * (4 * 2 + 1)
    assert "| NO |" not in output
    assert "| openmoji, val and test | 100 |" in output
    *_, shapes = output.splitlines()
    assert min(map(float, shapes.split("|")[3:5])) > 0.9


@pytest.mark.slow
def test_a_network_that_sees_nothing_is_found_out(few: None) -> None:
    class Blind(Reference):
        def features(self, images: torch.Tensor) -> torch.Tensor:
            return torch.randn(len(images), 128, generator=torch.Generator().manual_seed(0))

    network = Blind()
    network.load(torch.device("cpu"))
    assert "| NO |" in reference_encoder.report(network)


def test_run_and_out_belong_together(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reference_encoder.main(["--run", "runs/x"])
    assert "give --run and --out, or neither" in capsys.readouterr().err
