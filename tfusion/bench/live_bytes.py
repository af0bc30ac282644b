"""How many bytes are alive, and at most: of CUDA's allocator, or counted tensor by tensor where there is none."""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocator:
    """Of CUDA: what is allocated, which is what tensors need and what kernels need inside."""

    def __enter__(self) -> Self:
        torch.cuda.empty_cache()
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is left behind."""

    def start(self) -> int:
        """Forget the peak so far; return what is alive."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return self.alive()

    def alive(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The most alive at once since `start`."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


class Live(TorchDispatchMode):
    """Of all storages that came out of an operation, views once; entered before they are made."""

    def __init__(self) -> None:
        super().__init__()
        self._alive = self._most = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: weakref.ref) -> None:
            del self._known[key]
            self._alive -= size

        self._known[key] = weakref.ref(storage, freed)
        self._alive += size
        self._most = max(self._most, self._alive)

    def start(self) -> int:
        """Forget the peak so far; return what is alive."""
        self._most = self._alive
        return self._alive

    def alive(self) -> int:
        return self._alive

    def peak(self) -> int:
        """The most alive at once since `start`."""
        return self._most
