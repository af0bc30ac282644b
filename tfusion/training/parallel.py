"""Several processes: FSDP2's sharding, one whole copy of its weights, and lists gathered over ranks.

DDP needs nothing of this: it copies the model to every rank. FSDP2 (`fully_shard`, through Lightning's
`ModelParallelStrategy`) divides each parameter among the ranks, so that whatever touches it is a collective.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tfusion.generation import bf16_copy
from tfusion.models.base import MultimodalModel


def check_strategy(strategy: Strategy, ranks: int) -> None:
    """Refuse a strategy that does not train as one process would; without processes, so before any is started.

    Raises:
        ValueError: it is neither of one device, nor DDP, nor FSDP2 with whole checkpoints.
    """
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        raise ValueError(
            f"got trainer.strategy {type(strategy).__name__}; expected auto, DDP (--config configs/trainer/ddp.yaml) "
            "or FSDP2 (--config configs/trainer/fsdp2.yaml)"
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    sizes = strategy._data_parallel_size, strategy._tensor_parallel_size  # "auto" would be tensor parallel
    if sizes != (ranks, 1):
        raise ValueError(
            f"got ModelParallelStrategy with data_parallel_size {sizes[0]} and tensor_parallel_size {sizes[1]} for "
            f"{ranks} processes; tfusion shards over data only: set data_parallel_size {ranks} and "
            "tensor_parallel_size 1, as in configs/trainer/fsdp2.yaml"
        )
    if strategy._save_distributed_checkpoint:
        raise ValueError(
            "got ModelParallelStrategy with save_distributed_checkpoint true, whose checkpoints load on no other "
            "layout: set it to false, as in configs/trainer/fsdp2.yaml"
        )


def shard(model: MultimodalModel, mesh: DeviceMesh, bf16: bool) -> None:
    """Divide every parameter over the ranks of a one-dimensional mesh, in place; before weights are allocated.

    The matrices of a block are gathered together, in bf16 where the trainer computes in it; embedding, heads and
    norms with the root, in fp32, for autocast wants them so. Inputs are never cast, for timesteps up to 1000 do
    not fit bf16. Losses then are those of bf16-mixed in one process, and of fp32.
    """
    half = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.blocks:
        fully_shard([block.attention, block.feed_forward], mesh=mesh, mp_policy=policy)
    # The root is sharded again after a forward, as blocks are: averaging, copies and checkpoints need shards.
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=whole, reshard_after_forward=True)


@torch.no_grad()
def unsharded_copy(model: MultimodalModel, blank: MultimodalModel, dtype: torch.dtype | None = None) -> MultimodalModel:
    """Return the whole weights on every rank, in a model that needs no collective; collective itself.

    Args:
        model: sharded.
        blank: the same, not sharded and on the meta device; it is left alone.
        dtype: of the copy's weights; None = as they are. Gathered one by one: the whole is never there twice.
    """
    whole = copy.deepcopy(blank).requires_grad_(False)
    weights = {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach().clone()
        weights[name] = full.to(dtype or full.dtype)
    whole.load_state_dict(weights, assign=True)
    for module in whole.modules():  # the tables, which are in no state dict
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device=full.device)
    whole.fill_buffers()
    return whole


def whole_model(model: MultimodalModel, blank: list[MultimodalModel], bf16: bool) -> MultimodalModel:
    """Weights as decoding needs them, whole and without autocast: the model itself, or a copy.

    Args:
        model: sharded (the call is collective then) or not.
        blank: where it is sharded, the same on the meta device; else empty.
        bf16: whether the trainer computes in it; callbacks run outside autocast, and predict's casts at every call.
    """
    if blank:
        return unsharded_copy(model, blank[0], torch.bfloat16 if bf16 else None)
    return bf16_copy(model) if bf16 else model


def gather_lists(items: list[Any]) -> list[Any]:
    """The items of all ranks, rank by rank, on every rank; collective where there are several."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]
