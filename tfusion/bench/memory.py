"""What does a training step need memory for? Prints a JSON object for each way of activation checkpointing and loss.

    python -m tfusion.bench.memory --config configs/transfusion.yaml
    python -m tfusion.bench.memory --config configs/transfusion.yaml --config configs/size/7b.yaml --rows 1

Takes what `tfusion fit` takes, of which it reads the model, the precision, data.seq_len and the rows of a micro-batch
of one process: no strategy divides anything here (and DDP's buckets are 4 bytes a parameter more). Rows are made up:
captioned images in half the positions, text in the other half. On CUDA the step runs, and bytes are the allocator's
(`torch.cuda.max_memory_allocated`). Elsewhere tensors are fake (`FakeTensorMode`: they have a shape, and nothing in
them), so any size goes on any machine, and bytes are those of all storages alive, seen as they come out of operations
(`Live`): without what kernels need inside, and with the attention of a CPU. Blocks are not compiled, whatever the
config says; compiled ones need less (on an H200 at 0.76B 24.5 GB in place of 30.1 above weights and moments).

- `weights`, `average` (EMA), `gradients`, `optimizer`: bytes of each, all of a step but activations; `formula` beside:
  4, 4, 4 and 8 bytes a parameter (fp32, and AdamW's two moments).
- `activations`: what is held between forward and backward, the loss's part as well. `formula`, of the trunk alone: a
  block's input where checkpointing is full; where it is selective also its 4 products and attention.
- `loss`: the most that head and loss need at once, by themselves, above their inputs, the head and its gradient.
  `formula`, where the logits are whole: 12 bytes each, their log-softmax and both gradients in fp32.
- `peak_forward_backward`, `peak_optimizer`: the most alive at once in each; `peak` is the larger. Where a step has
  several micro-batches (`accumulates`: trainer.accumulate_grad_batches) gradients are there during the forward, too.

All in bytes. A peak is not the sum of the parts: gradients come while activations go.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tfusion import losses
from tfusion.__main__ import TfusionCLI, run
from tfusion.bench.live_bytes import Allocator, Live
from tfusion.bench.setting import DEVICE
from tfusion.models.base import MultimodalModel
from tfusion.models.chameleon import Chameleon
from tfusion.models.transformer import Transformer
from tfusion.sequence import NUM_SPECIAL_IDS, Batch, Document, Image, RowShape, collate
from tfusion.training.optim import adamw, parameter_groups

CAPTION = 32  # ids before each image
CHUNK = losses.CHUNK_BYTES
WHOLE = 2**62  # bytes of logits that may be there at once


class ConfigReader(TfusionCLI):
    """The command line of `tfusion fit`, read and nothing built of it."""

    def before_instantiate_classes(self) -> None:
        """Nothing is written where `fit` would write, so nothing is refused."""

    def instantiate_classes(self) -> None:
        """Nothing: `main` builds the model alone."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: `main` measures."""


def model_of(config: Any, checkpointing: str) -> MultimodalModel:
    """The network of a config, on the meta device."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(MultimodalModel, "model")
    settings = config.model.init_args.model.clone()
    settings.init_args.activation_checkpointing = checkpointing
    return parser.instantiate(parser.parse_object({"model": settings})).model


def batch_of(model: MultimodalModel, rows: int, seq_len: int) -> Batch:
    """Rows without padding: images with a caption up to half of each, and one text."""
    P, shape = model.num_patches, model.latent_shape
    caption = min(CAPTION, seq_len - P - 6)  # (BOS, BOI, EOI, EOS, and BOS, EOS of a text)
    if shape is not None and caption < 1:
        raise ValueError(f"a row of {seq_len} positions has no room for an image of {P}: take data.seq_len >= {P + 7}")
    images = 0 if shape is None else max(1, seq_len // 2 // (CAPTION + P + 4))
    picture = None if shape is None else Image(torch.zeros(shape))
    documents = [Document(([NUM_SPECIAL_IDS] * caption, picture))] * images
    rest = seq_len - sum(document.length(P) for document in documents)
    documents.append(Document(([NUM_SPECIAL_IDS] * (rest - 2),)))
    row_shape = RowShape(seq_len, P, images, shape or (0, 0, 0), None)
    return collate([documents] * rows, row_shape, [(row,) for row in range(rows)])


def forward(model: MultimodalModel, batch: Batch) -> Tensor:
    """The sum of all losses, as the modules of `tfusion.training` have it."""
    if isinstance(model, Chameleon):
        ids = model.ids_of(batch.latents).flatten()
        nll, log_z = model(batch, batch.latents, torch.cat([batch.text_labels, ids]))
        return nll.sum() + 1e-5 * log_z.sum()
    images = (None, None) if model.latent_shape is None else (batch.latents, batch.time_uniforms)
    nll, output = model(batch, *images, text_losses=True)
    return sum((part.float().square().sum() for part in (nll, output) if part is not None), torch.zeros(()).to(DEVICE))


def head_of(model: MultimodalModel) -> nn.Linear | None:
    return model.head if isinstance(model, Chameleon) else model.text_head


def labels_of(model: MultimodalModel, batch: Batch) -> int:
    """N: rows of logits."""
    of_images = batch.image_valid.numel() * model.num_patches if isinstance(model, Chameleon) else 0
    return len(batch.text_labels) + of_images


def step(
    model: MultimodalModel, batch: Batch, bf16: bool, accumulates: bool, memory: Allocator | Live
) -> dict[str, int]:
    """The last micro-batch of a training step, its second, so that AdamW's moments are there; bytes of each part."""
    weights = [*model.parameters(), *model.buffers()]
    average = [weight.detach().clone() for weight in weights]
    optimizer = adamw(parameter_groups(model, 0.1), 3e-4, (0.9, 0.95), 1e-8)

    def learn() -> dict[str, int]:
        before = memory.start()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            loss = forward(model, batch)
        held = memory.alive() - before
        loss.backward()
        del loss
        peak = memory.peak()
        memory.start()
        optimizer.step()
        return {"activations": held, "peak_forward_backward": peak, "peak_optimizer": memory.peak()}

    learn()
    gradients = sum(_bytes(parameter.grad) for parameter in model.parameters())
    if not accumulates:  # else those of the micro-batches before are there
        optimizer.zero_grad()
    found = learn()
    moments = sum(_bytes(value) for state in optimizer.state.values() for value in state.values())
    both = {"weights": sum(map(_bytes, weights)), "average": sum(map(_bytes, average))}
    parts = both | {"gradients": gradients, "optimizer": moments}
    optimizer.zero_grad()
    parts |= found | {"loss": _loss_alone(model, batch, bf16, memory)}
    return parts | {"peak": max(found["peak_forward_backward"], found["peak_optimizer"])}


def _loss_alone(model: MultimodalModel, batch: Batch, bf16: bool, memory: Allocator | Live) -> int:
    head = head_of(model)
    if head is None:
        return 0
    labels = torch.zeros(labels_of(model, batch), dtype=torch.long, device=DEVICE)
    hidden = torch.zeros(len(labels), head.in_features, device=DEVICE, requires_grad=True)
    head.weight.grad, hidden.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden)
    before = memory.start()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        losses.head_losses(hidden, head.weight, labels)[0].sum().backward()
    return memory.peak() - before


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def formula(model: MultimodalModel, batch: Batch, bf16: bool, checkpointing: str, whole: bool) -> dict[str, int | None]:
    """What the parts should be, from sizes alone; None where no short formula holds."""
    parameters, size = sum(parameter.numel() for parameter in model.parameters()), 2 if bf16 else 4
    trunk: Transformer = model.transformer
    block, positions = trunk.blocks[0], batch.token_ids.numel()
    D = trunk.norm.weight.numel()
    kept = {"full": 4 * D, "selective": 4 * D}.get(checkpointing)  # the stream is fp32
    if checkpointing == "selective":
        outputs = sum(m.out_features for m in block.modules() if isinstance(m, nn.Linear))
        kept += size * (outputs + D)  # attention's own output is as wide as the stream
    head = head_of(model)
    logits = 0 if head is None else labels_of(model, batch) * head.out_features
    return {
        **{"weights": 4 * parameters, "average": 4 * parameters, "gradients": 4 * parameters},
        "optimizer": 8 * parameters,
        "activations": None if kept is None else len(trunk.blocks) * positions * kept,
        "loss": 12 * logits if whole else None,
    }


def measure(config: Any, rows: int, checkpointing: str, whole: bool) -> dict[str, Any]:
    """One line."""
    bf16, model = "bf16" in str(config.trainer.precision), model_of(config, checkpointing)
    accumulates = config.trainer.accumulate_grad_batches > 1
    batch = batch_of(model, rows, config.data.seq_len)
    real = DEVICE.type == "cuda"
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    memory = Allocator() if real else Live()
    with nullcontext() if real else fake, memory, patch.object(losses, "CHUNK_BYTES", WHOLE if whole else CHUNK):
        if real:
            model.materialize(DEVICE, 0)
        else:
            model.to_empty(device=DEVICE)
        batch = batch.to(DEVICE) if real else _faked(batch, fake)
        parts = step(model.train(), batch, bf16, accumulates, memory)
    return {
        "model": type(model).__name__,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "rows": rows,
        "seq_len": config.data.seq_len,
        "labels": labels_of(model, batch),
        "vocab": 0 if head_of(model) is None else head_of(model).out_features,
        "precision": str(config.trainer.precision),
        "accumulates": accumulates,
        "device": torch.cuda.get_device_name() if real else "fake",
        "torch": torch.__version__,
        "checkpointing": checkpointing,
        "logits": "whole" if whole else "chunked",
        **parts,
        "formula": formula(model, batch, bf16, checkpointing, whole),
    }


def _faked(batch: Batch, fake: FakeTensorMode) -> Batch:
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return dataclasses.replace(batch, **{name: fake.from_tensor(value) for name, value in tensors.items()})


def rows_of(config: Any) -> int | None:
    """Of a micro-batch of one process; None = the config does not say how many processes there are."""
    devices = config.trainer.devices
    devices = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else None
    if not devices:
        return None
    processes = devices * config.trainer.num_nodes
    return max(1, config.data.rows_per_step // processes // config.trainer.accumulate_grad_batches)


def main(args: list[str] | None = None, write: Callable[[str], Any] = sys.stdout.write) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="rows at once; default: those of a micro-batch of one process")
    options, of_fit = parser.parse_known_args(args)
    config = run(ConfigReader, ["fit", *of_fit]).config["fit"]
    rows, devices = options.rows or rows_of(config), config.trainer.devices
    if rows is None:
        parser.error(f"trainer.devices is {devices!r}, so the rows of one process depend on the machine: give --rows")
    for checkpointing, whole in product(("none", "selective", "full"), (False, True)):
        write(json.dumps(measure(config, rows, checkpointing, whole)) + "\n")


if __name__ == "__main__":
    main()
