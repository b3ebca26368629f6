"""What is sent between processes: the calls of torch.distributed in a stretch of code, with their bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.multi_threaded_pg import ProcessLocalGroup
from torch.utils._python_dispatch import TorchDispatchMode

from fisher_kernels.tools.collectives import Collective

GATHERS = {
    "all_gather_into_tensor": "all-gather",
    "all_reduce": "all-reduce",
    "reduce_scatter_tensor": "reduce-scatter",
}

_here = threading.local()


class Collectives(TorchDispatchMode):
    """Notes the calls of this thread: what each is, and the bytes that this process puts in.

    DTensors call functions that a mode sees, everything else those of ``torch.distributed``, for which there is
    ``watched``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __enter__(self) -> Any:
        _here.mode = self
        return super().__enter__()

    def __exit__(self, *about: Any) -> None:
        _here.mode = None
        super().__exit__(*about)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.note(GATHERS.get(name, name), args[0])
        return func(*args, **(kwargs or {}))

    def note(self, name: str, x: Tensor) -> None:
        self.calls.append((name, x.numel() * x.element_size()))


def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls of ``torch.distributed`` be noted, all-gathers and reduce-scatters by either of their names."""

    def noting(name: str, function: Any, given: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if (mode := getattr(_here, "mode", None)) is not None:
                mode.note(name, args[given])
            return function(*args, **kwargs)

        return call

    for what, name, given in (("all-reduce", "all_reduce", 0), ("broadcast", "broadcast", 0)):
        monkeypatch.setattr(dist, name, noting(what, getattr(dist, name), given))
    monkeypatch.setattr(dist, "all_to_all_single", noting("all-to-all", dist.all_to_all_single, 1))
    for what, *names in (
        ("all-gather", "all_gather_single", "all_gather_into_tensor"),
        ("reduce-scatter", "reduce_scatter_single", "reduce_scatter_tensor"),
    ):
        name = next(name for name in names if hasattr(dist, name))  # the second one before torch 2.13
        monkeypatch.setattr(dist, name, noting(what, getattr(dist, name), 1))


GROUPS = {"allreduce": ("all-reduce", 0), "allgather": ("all-gather", 1), "reduce_scatter": ("reduce-scatter", 1)}
GROUPS |= {"broadcast": ("broadcast", 0)}
GROUPS |= {next(n for n in ("all_to_all_single", "alltoall_base") if hasattr(ProcessLocalGroup, n)): ("all-to-all", 1)}
"""Methods of a group of threads, which all others come to -> what they do, and which argument a process puts in."""


def watch_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all that groups of threads are asked for be noted, whoever asks: ``noted`` has it."""

    def noting(name: str, kind: str, given: int) -> Any:
        function = getattr(ProcessLocalGroup, name)

        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            if (calls := getattr(_here, "calls", None)) is not None:
                calls.append(Collective(kind, _size(args[given]), group.size()))
            return function(group, *args, **kwargs)

        return call

    for name, (kind, given) in GROUPS.items():
        monkeypatch.setattr(ProcessLocalGroup, name, noting(name, kind, given))


def _size(x: Any) -> int:
    return x.numel() * x.element_size() if isinstance(x, Tensor) else sum(map(_size, x))


@contextmanager
def noted() -> Iterator[list[Collective]]:
    """The calls of this thread in a stretch of code."""
    _here.calls = []
    try:
        yield _here.calls
    finally:
        _here.calls = None
