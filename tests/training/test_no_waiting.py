"""Between two log steps nothing of a step waits for the device: it asks for no number and no tensor that is there.

Seen in steps on the CPU, whose operations are those of CUDA but for attention's mask and the copy of the batch.
"""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor
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
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
}
COPIED_TO_HOST = ("tolist", "numpy", "cpu", "__array__")  # on a CPU no operation is seen of them
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Waits(TorchDispatchMode):
    """Names of what would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __enter__(self):
        self.patches = pytest.MonkeyPatch()
        for name in COPIED_TO_HOST:
            self.patches.setattr(Tensor, name, self._noted(name, getattr(Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        self.patches.undo()
        super().__exit__(*error)

    def _noted(self, name: str, call):
        return lambda tensor, *args, **kwargs: self.found.append(name) or call(tensor, *args, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        masked = packet in INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
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

    def on_exception(self, *args) -> None:
        self.mode.__exit__(None, None, None)


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
        x.tolist()
        x.cpu()
        x.numpy()
    x.tolist()
    assert len(waits.found) == 7
