"""Work in two processes at once, which talk to each other over gloo."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

needs_processes = pytest.mark.skipif(sys.platform != "linux", reason="gloo over a file is tried on Linux only")


IMPORTS = [
    "hypothesis",
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
]
"""What takes its time to import. A server, from which the processes of all tests are forked, does it once."""


def _process(rank: int, store: str, work: Callable[[int], Any], results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results[rank] = work(rank)
    dist.barrier()  # nobody closes what another one still reads from
    dist.destroy_process_group()
    # Threads of groups that are still known would abort the process if one gave back a tensor while Python ends.
    os._exit(0)


def in_two_processes(work: Callable[[int], Any], folder: Path) -> tuple[Any, Any]:
    """What a function returns on rank 0 and on rank 1; it is found by its name, and its results are pickled."""
    # A fork of a process whose autograd has threads may not train; the server has none.
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    with context.Manager() as manager:
        results = manager.dict()
        run = functools.partial(_process, store=str(folder / "store"), work=work, results=results)
        processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(180)
        assert [process.exitcode for process in processes] == [0, 0]
        return results[0], results[1]
