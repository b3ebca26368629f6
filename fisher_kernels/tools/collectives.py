"""What is sent between processes: the calls of torch.distributed where tensors have no memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d as c10d

KINDS = {
    "_allgather_base_": ("all-gather", 1),
    "all_gather_into_tensor": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor": ("reduce-scatter", 0),
    "allreduce_": ("all-reduce", 0),
    "all_reduce": ("all-reduce", 0),
    "broadcast_": ("broadcast", 0),
    "broadcast": ("broadcast", 0),
    "alltoall_base_": ("all-to-all", 1),
    "all_to_all_single": ("all-to-all", 0),
    "scatter_": ("scatter", 0),
}
"""Name of an op -> what it does, and the place among its arguments of what a process puts in."""

SILENT = ("wait_tensor", "_wrap_tensor_autograd", "barrier")
"""Ops that send nothing."""


class Collective(NamedTuple):
    """One call.

    Attributes:
        kind: ``"all-gather"`` for example.
        size: the bytes that this process puts in.
        processes: how many take part.
    """

    kind: str
    size: int
    processes: int

    @property
    def passing(self) -> float:
        """Bytes that pass the network for each process: what it receives of a gather, else what it sends in a ring."""
        w = self.processes
        if self.kind == "all-gather":
            return (w - 1) * self.size
        if self.kind == "all-reduce":
            return 2 * (w - 1) / w * self.size
        if self.kind == "broadcast":
            return self.size if w > 1 else 0
        return (w - 1) / w * self.size


class Counting(FakeTensorMode):
    """Tensors without memory, of which the calls of torch.distributed are noted.

    It is the mode that all such tensors come back to, so it sees what is done where other modes are off, too.

    Attributes:
        calls: what was sent since the list was put there.
        number: what whoever reads a floating-point number is told; other numbers are 0, and flags are False.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.calls: list[Collective] = []
        self.number = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return self.number if dtype.is_floating_point else False if dtype == torch.bool else 0
        if func is torch.ops.aten._unique2.default:  # as many as there can be
            x = args[0]
            places = x.new_empty(x.shape, dtype=torch.int64)
            return x.new_empty(x.numel()), places, places.flatten()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace in ("c10d", "_c10d_functional") and result is not NotImplemented:
            self._note(func._schema.name.split("::")[1], [*args, *(kwargs or {}).values()])
        return result

    def _note(self, name: str, args: list[Any]) -> None:
        if name in SILENT:
            return
        if name not in KINDS:
            raise NotImplementedError(f"{name} of torch.distributed is called, of which it is not known what it sends")
        kind, place = KINDS[name]
        given = args[place]
        tensors: list[Tensor] = [given] if isinstance(given, Tensor) else [x for x in given if isinstance(x, Tensor)]
        self.calls.append(Collective(kind, sum(x.numel() * x.element_size() for x in tensors), _processes(args)))


def _processes(args: list[Any]) -> int:
    """How many processes are in the group among the arguments of an op: its name, or itself in a box."""
    for x in args:
        if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()):
            return dist.ProcessGroup.unbox(x).size()
    name: Any = next(x for x in reversed(args) if isinstance(x, str))
    group: dist.ProcessGroup = c10d._resolve_process_group(name)  # type: ignore[attr-defined]
    return group.size()
