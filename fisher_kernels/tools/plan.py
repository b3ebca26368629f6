"""What an optimizer takes on many processes: memory in each of them, and what they send, counted from shapes alone.

Nothing is trained and nothing is sent: an optimizer is made of a model without memory, and its own rules say how large
its statistics and its state are. Parameters are divided by rows, as ``fully_shard`` divides them, over the processes of
a replica.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from fisher_kernels.curvature.reduction import dtype_of, size_of
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.optim import EKFAC, KFAC, MBF, SOFIM, AdaFisher, AdaFisherW, EKFACAdam
from fisher_kernels.optim.base import FisherOptimizer
from fisher_kernels.optim.layerwise import LayerwiseOptimizer

OPTIMIZERS: Mapping[str, Callable[..., Any]] = {
    "adamw": lambda model, **settings: AdamW(model.parameters(), **settings),
    "adafisher": AdaFisher,
    "adafisherw": AdaFisherW,
    "mbf": MBF,
    "sofim": lambda model, **settings: SOFIM(model.parameters(), **settings),
    "kfac": KFAC,
    "ekfac": EKFAC,
    "ekfacadam": EKFACAdam,
}


@dataclass(frozen=True)
class Mesh:
    """``replicas`` copies of a model, each divided over ``shards`` processes."""

    replicas: int
    shards: int

    @classmethod
    def of(cls, text: str) -> Mesh:
        """``"8"`` or ``"128x8"``.

        Raises:
            ValueError: it is something else.
        """
        if not re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8})?", text):
            raise ValueError(f"is {text!r}, expected SHARDS or REPLICASxSHARDS, 8 or 128x8 for example")
        *replicas, shards = map(int, text.split("x"))
        return cls(replicas[0] if replicas else 1, shards)

    @property
    def processes(self) -> int:
        return self.replicas * self.shards

    def share(self, p: Tensor) -> int:
        """Numbers of a parameter that the first process of a replica has, which has the most."""
        return self.share_of(p.shape[0] if p.dim() else 1, p.numel())

    def share_of(self, rows: int, numbers: int) -> int:
        """How many of so many numbers in rows that process has."""
        return -(-rows // self.shards) * (numbers // max(rows, 1))

    def gathered(self, size: float) -> float:
        """Bytes that each process receives when ``size`` bytes of one shard each are gathered in a replica.

        It sends as many when shards of that size are scattered.
        """
        return (self.shards - 1) * size

    def added_up(self, size: float, processes: int) -> float:
        """Bytes that each process sends when ``size`` bytes are added up in a ring."""
        return 2 * (processes - 1) / processes * size


@dataclass(frozen=True)
class Plan:
    """Bytes for one process.

    Attributes:
        parameters: how many the model has.
        weights: of its shard and of the gradient, in the precision of the optimizer.
        moments: state that is divided like the parameters.
        curvature: other state: what every process has whole, and blocks of its rows.
        largest: a moment and a direction of the layer that is gathered, if any is, at a time.
        gathers: what it puts into the all-gathers of each step, and receives from them.
        bounds: what it puts into the all-reduces of each step: norms, products, counts.
        refresh: what it puts into the all-reduce of a refresh.
        scattered: what it keeps of the reduce-scatter there.
        sent_by_model: what ``fully_shard`` itself has it receive and send in a step of training.
        notes: what the optimizer says of the model.
    """

    optimizer: str
    mesh: Mesh
    parameters: int
    weights: int
    moments: int
    curvature: int
    largest: int
    gathers: tuple[int, float]
    bounds: int
    refresh: int
    scattered: int
    sent_by_model: float
    notes: tuple[str, ...]

    @property
    def received_in_a_step(self) -> float:
        """Bytes that pass the network for this process in a step without a refresh."""
        return self.gathers[1] + self.mesh.added_up(self.bounds, self.mesh.processes)

    @property
    def sent_in_a_refresh(self) -> float:
        """Bytes more in a step that refreshes."""
        own = self.mesh.gathered(self.scattered) + self.mesh.added_up(self.scattered, self.mesh.replicas)
        return self.mesh.added_up(self.refresh, self.mesh.processes) + own


def plan(model: nn.Module, name: str, mesh: Mesh, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Plan:
    """What an optimizer takes for a model on a mesh.

    Args:
        model: its parameters need no memory.
        name: one of ``OPTIMIZERS``.
        dtype: of what ``fully_shard`` gathers for forward and backward passes; gradients are added up in float32.
        settings: arguments of the optimizer.

    Raises:
        ValueError: the optimizer cannot be made of the model.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    wide = max(ACCUMULATOR[p.dtype].itemsize for p in params)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer = OPTIMIZERS[name](model, **settings)
    moments, curvature = _state(optimizer, params, mesh)
    gathers = {p: optimizer.gathered_in_a_step(p) for p in params} if _reads_layers(optimizer) else {}
    together = wide * sum(mesh.share(p) * times for p, times in gathers.items())
    share = sum(map(mesh.share, params))
    passes = 2 * mesh.gathered(dtype.itemsize * share)
    if _reads_layers(optimizer):
        optimizer.close()
    return Plan(
        type(optimizer).__name__,
        mesh,
        parameters=sum(p.numel() for p in params),
        weights=2 * wide * share,
        moments=moments,
        curvature=curvature,
        largest=max((2 * wide * p.numel() for p, times in gathers.items() if times), default=0),
        gathers=(together, mesh.gathered(together)),
        bounds=8 * _added_up(optimizer, params),
        refresh=_sent_in_a_refresh(optimizer, mesh),
        scattered=_scattered(optimizer, mesh),
        sent_by_model=passes + mesh.gathered(4 * share) + mesh.added_up(4 * share, mesh.replicas),
        notes=tuple(str(note.message) for note in told),
    )


def _reads_layers(optimizer: Any) -> bool:
    return isinstance(optimizer, LayerwiseOptimizer)


def _state(optimizer: Any, params: list[Any], mesh: Mesh) -> tuple[int, int]:
    """Bytes of the state of a process: of what has the shape of a parameter, and of all else."""
    if isinstance(optimizer, FisherOptimizer):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer._prepare()
        states: Any = optimizer.state
    else:
        number = torch.empty((), device="meta")
        states = {
            p: {"exp_avg": torch.empty_like(p), "exp_avg_sq": torch.empty_like(p), "step": number} for p in params
        }
    of_layers = getattr(optimizer, "statistics_state", ())
    moments = others = 0
    for p, state in states.items():
        by_rows = optimizer.divided_state(p) if _reads_layers(optimizer) else ()
        for name, x in state.items():
            if name not in of_layers and x.shape == p.shape and p.dim():
                moments += mesh.share(x) * x.element_size()
            elif name in by_rows:
                others += mesh.share_of(p.shape[0], x.numel()) * x.element_size()
            else:
                others += x.numel() * x.element_size()
    return moments, others


def _added_up(optimizer: Any, params: list[Any]) -> int:
    """How many numbers of 8 bytes a step adds up."""
    if _reads_layers(optimizer):
        return sum(map(optimizer.added_up_in_a_step, params))
    return int(isinstance(optimizer, SOFIM))  # the square of a norm


def _sent_in_a_refresh(optimizer: Any, mesh: Mesh) -> int:
    """What a process puts into the all-reduce of a refresh: sums, their counts, and flags of each layer."""
    if not _reads_layers(optimizer):
        return 0
    statistics = optimizer.statistics
    # A length that only the data tell is that of a sequence: beside the others it is nothing.
    scattered = optimizer.divided_sums()  # of which there is one number
    lengths = [
        [1 if (index, i) in scattered else n or 0 for i, n in enumerate(site.rule.sum_lengths(site.module))]
        for index, site in enumerate(statistics.sites)
    ]
    return size_of(lengths, len(list(statistics.layers())), dtype_of(statistics.sites), mesh.processes)


def _scattered(optimizer: Any, mesh: Mesh) -> int:
    """Bytes of the rows that a process keeps of the sums that are scattered."""
    found = 0
    for (index, position), rows in optimizer.divided_sums().items() if _reads_layers(optimizer) else ():
        site = optimizer.statistics.sites[index]
        share = mesh.share_of(rows, site.rule.sum_lengths(site.module)[position])
        found += share * torch.promote_types(site.owner.dtype, torch.float32).itemsize
    return found


def size(count: float) -> str:
    """A number of bytes with three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
