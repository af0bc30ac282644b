"""Two processes for tests, started as torchrun would start them, but from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

RANKS = 2


def be_rank(rank: int, port: int, output: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Call the function as one of `RANKS` processes; what it writes goes to a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    rank_zero_only.rank = rank  # as the import of Lightning would have set it
    descriptor = os.open(f"{output}.rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers; this process's own is inherited
    function(*arguments)


def start_ranks(output: Path, function: Callable[..., None], *arguments: Any) -> list[Any]:
    """The processes of both ranks; see `end_ranks`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tfusion.__main__"])
    processes = [
        context.Process(target=be_rank, args=(rank, port, output, function, arguments)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    return processes


def end_ranks(processes: list[Any], output: Path, timeout_s: float = 120) -> tuple[list[int | None], str]:
    """Wait for both; kill what is left; return their exit codes (None: killed here) and what they wrote."""
    for process in processes:
        process.join(timeout_s)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes, "".join(Path(f"{output}.rank{rank}").read_text() for rank in range(RANKS))


def run_ranks(output: Path, function: Callable[..., None], *arguments: Any) -> None:
    """Start, wait, and expect that all went well."""
    codes, text = end_ranks(start_ranks(output, function, *arguments), output)
    assert codes == [0] * RANKS, text
