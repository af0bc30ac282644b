"""Between two log steps nothing of a step waits for the device: no operation needs a number that is there on the host.

Counted of real steps on the CPU, where the same operations run that would wait on CUDA.
"""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tfusion.callbacks.ema import EMA
from tfusion.callbacks.training_metrics import TrainingMetrics

aten = torch.ops.aten
READ_BY_HOST = {  # as numbers, or as the shape of what comes out
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
    aten.unique_consecutive,
    aten.bincount,
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Waits(TorchDispatchMode):
    """Names of the operations that would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        masked = packet in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])
        if packet in READ_BY_HOST or masked:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Watch(L.Callback):
    """Every step from its batch to its end: forward, backward, clipping, optimizer, average, metrics."""

    def __init__(self) -> None:
        self.waits: list[list[str]] = []

    def on_train_batch_start(self, *args) -> None:
        self.mode = Waits()
        self.mode.__enter__()

    def on_train_batch_end(self, *args) -> None:
        self.mode.__exit__(None, None, None)
        self.waits.append(self.mode.found)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("transfusion", {}),
        ("transfusion", {"family": "flow", "activation_checkpointing": "full"}),
        ("chameleon", {"z_loss_weight": 1e-5}),
    ],
)
def test_a_step_waits_for_nothing(tiny_module, tiny_chameleon, tiny_data, tiny_trainer, kind, settings):
    module = (tiny_module if kind == "transfusion" else tiny_chameleon)(**settings)
    watch = Watch()
    callbacks = [EMA(0.9), TrainingMetrics(), watch]
    tiny_trainer(6, callbacks=callbacks, accumulate_grad_batches=2, log_every_n_steps=100).fit(module, tiny_data())
    assert watch.waits[:-1] == [[]] * 11
    assert watch.waits[-1]  # the last step is logged


def test_what_waits_is_found():
    x = torch.arange(4.0)
    with Waits() as waits:
        float(x.sum())
        x[x > 1]
        x[x > 1] = 0
        x.nonzero()
        x[torch.tensor([1, 2])]
    assert len(waits.found) == 4
