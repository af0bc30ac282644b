"""Where does the time of a training step go? By torch's profiler, in five parts that add up to the step.

- `matmuls`: of linear layers and convolutions.
- `attention`: fused, or its products and softmax where these are written out (nothing else here multiplies batches of
  matrices).
- `optimizer`: AdamW and the norm that gradients are clipped by.
- `elementwise`: all other operators: norms, activations, casts, gathers, losses, and kernels that a compiler fused.
- `rest`: seconds in no operator: Python, Lightning, launches; on a GPU the seconds it stood still.

Time is an operator's own, without what it called; on a GPU that of its kernels. A profiled step is slower than others.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning as L
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tfusion.bench.setting import DEVICE, wait

PARTS = {  # the first whose pattern is found in the name of an operator or a kernel
    "optimizer": r"adam|_foreach_|multi_tensor|vector_norm|lpnorm",
    # (a compiled kernel is named by what it fused; the loss has a log-softmax, or in chunks a softmax, counted here)
    "attention": r"attention|flash|fmha|^(?!.*log_?softmax).*softmax|bmm",
    "matmuls": r"aten::(add|)mm$|aten::_addmm|convolution|conv2d|mkldnn|onednn|gemm|cutlass|nvjet|xmma",
    "elementwise": r"^aten::|cpp_fused|cpp_|triton|kernel|softmax|Memcpy|Memset",
}


def part_of(name: str) -> str | None:
    """The part that an operator or kernel belongs to; None for what is neither."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name, re.IGNORECASE)), None)


class Trace(L.Callback):
    """Profile so many steps of a fit, from the `first` on."""

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.last, self.steps = first, first + steps - 1, steps
        on_device = [ProfilerActivity.CUDA] if DEVICE.type == "cuda" else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *on_device])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            wait()
            self.profiler.start()
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.last:
            wait()
            self.seconds = time.perf_counter() - self.start
            self.profiler.stop()

    def write(self, file: Path) -> dict[str, Any]:
        """The chrome trace into a file, and for the JSON: seconds of a step and of its parts."""
        self.profiler.export_chrome_trace(str(file))
        parts_s = {part: s / self.steps for part, s in seconds_by_part(self.profiler.events()).items()}
        step_s = self.seconds / self.steps
        parts_s["rest"] = step_s - sum(parts_s.values())
        shares = {part: s / step_s for part, s in parts_s.items()}
        return {"steps": self.steps, "step_s": step_s, "parts_s": parts_s, "shares": shares}


def seconds_by_part(events: Iterable[Any]) -> dict[str, float]:
    """Own seconds of the profiler's events, summed: of kernels where there is a GPU, else of operators."""
    found = dict.fromkeys(PARTS, 0.0)
    for event in events:
        part = part_of(event.name)
        if part is None or event.is_user_annotation:
            continue
        if DEVICE.type != "cuda":
            found[part] += event.self_cpu_time_total / 1e6
        elif event.device_type == DeviceType.CUDA:
            found[part] += event.self_device_time_total / 1e6
    return found


def named_kernels() -> AbstractContextManager:
    """Within it, what is compiled for a CPU shows its kernels to the profiler."""
    import torch._inductor.config as settings  # no public module sets this

    return settings.patch({"cpp.enable_kernel_profile": True})


def check_file(file: Path) -> None:
    """Raise ValueError where no trace can be written, before anything is measured."""
    if not file.absolute().parent.is_dir() or file.is_dir():
        raise ValueError(f"--trace got {str(file)!r}, expected a file in a folder that exists, such as trace.json")
