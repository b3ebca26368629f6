"""What an optimizer takes on many processes: memory in each of them, and what they send, counted in a step.

A step is made in one process that takes itself for the first of many (torch's fake process group), with tensors that
have shapes and no memory. All calls of torch.distributed are noted, those of ``fully_shard`` and ``parallelize_module``
too, and nothing is sent. So what is counted is what this package and torch do, not what somebody thinks they do; what
depends on numbers, which nobody has here, does not: every layer is what its class documents, and nothing is refused.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.curvature.proof import Proof
from fisher_kernels.curvature.rules import Sums
from fisher_kernels.curvature.statistics import Statistics
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.optim import EKFAC, KFAC, MBF, SOFIM, AdaFisher, AdaFisherW, EKFACAdam
from fisher_kernels.optim.layerwise import LayerwiseOptimizer
from fisher_kernels.optim.refresh import KEPT
from fisher_kernels.optim.refresh import NEVER as UNKNOWN
from fisher_kernels.optim.shares import local
from fisher_kernels.tools import served
from fisher_kernels.tools.user_model import UserModel, said

if TYPE_CHECKING:
    from fisher_kernels.tools.collectives import Collective, Counting

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

HSDP = "hsdp"
TENSOR = "fsdp-tp"
EXPECTED = {HSDP: "SHARDS or REPLICASxSHARDS, 8 or 128x8 for example", TENSOR: "SHARDSxTENSOR, 128x8 for example"}
"""How processes divide a model -> how a mesh is written."""

LATER = 3
"""A refresh that does not look at layers, as the 1st, the 2nd, the 4th and so on do."""

NEVER = 1 << 30
"""Steps to the next refresh."""


@dataclass(frozen=True)
class Mesh:
    """How many processes there are, and how they divide a model.

    Attributes:
        shape: of the mesh; the last dimension is over the shards of a replica, or divides layers.
        parallel: ``"hsdp"``, which is ``fully_shard`` on one dimension or two, or ``"fsdp-tp"``, on the first of two
            dimensions, with ``parallelize_module`` on the other.
    """

    shape: tuple[int, ...]
    parallel: str = HSDP

    @classmethod
    def of(cls, text: str, parallel: str = HSDP) -> Mesh:
        """``"8"`` or ``"128x8"``.

        Raises:
            ValueError: it is something else.
        """
        few = "" if parallel == TENSOR else "?"
        if not re.fullmatch(rf"[1-9]\d{{0,8}}(x[1-9]\d{{0,8}}){few}", text):
            raise ValueError(f"is {text!r}, expected {EXPECTED[parallel]}")
        return cls(tuple(map(int, text.split("x"))), parallel)

    @property
    def processes(self) -> int:
        """How many there are."""
        return torch.Size(self.shape).numel()

    @property
    def tensor(self) -> int | None:
        """Among how many of them layers are divided, if they are."""
        return self.shape[1] if self.parallel == TENSOR else None


@dataclass(frozen=True)
class Plan:
    """Bytes and calls of one process, the first one, whose shards are the largest.

    Attributes:
        parameters: how many the model has.
        weights: bytes of its shard and of the gradient, in the precision of the optimizer.
        moments: of state that is divided like the parameters.
        curvature: of statistics and what is made of them: whole, or the part of this process.
        largest: of a moment and a direction of what one call gathers or exchanges in a step, if there is any.
        passes: what forward and backward of a step send without an optimizer.
        step: what the optimizer sends in a step besides.
        refresh: what it sends more, in forward and backward too, where statistics and inverses are new.
        notes: what the optimizer says of the model.
    """

    optimizer: str
    mesh: Mesh
    parameters: int
    weights: int
    moments: int
    curvature: int
    largest: int
    passes: tuple[Collective, ...]
    step: tuple[Collective, ...]
    refresh: tuple[Collective, ...]
    notes: tuple[str, ...]

    @property
    def sent_by_model(self) -> float:
        """Bytes that pass the network for this process in the passes of a step."""
        return passing(self.passes)

    @property
    def sent_in_a_step(self) -> float:
        """Bytes that pass for the optimizer in a step without a refresh."""
        return passing(self.step)

    @property
    def sent_in_a_refresh(self) -> float:
        """Bytes more in a step that refreshes."""
        return passing(self.refresh)


class RefusedError(ValueError):
    """An optimizer cannot be made of a model.

    Attributes:
        name: of the optimizer.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def passing(calls: Sequence[Collective]) -> float:
    """Bytes that pass the network for one process."""
    return sum(call.passing for call in calls)


def kinds_of(calls: Sequence[Collective]) -> dict[str, int]:
    """How many calls there are of each kind."""
    return dict(Counter(call.kind for call in calls))


def as_numbers(found: Plan) -> dict[str, Any]:
    """A plan as JSON has it: of calls how many there are of each kind and group, and the bytes put in together."""
    numbers = {**dataclasses.asdict(found), "mesh": found.mesh.shape, "parallel": found.mesh.parallel}
    for name in ("passes", "step", "refresh"):
        calls: tuple[Collective, ...] = getattr(found, name)
        groups: dict[tuple[str, int], list[int]] = {}
        for kind, put, processes in calls:
            groups.setdefault((kind, processes), []).append(put)
        rows = [
            {"kind": kind, "processes": processes, "calls": len(puts), "put_in": sum(puts)}
            for (kind, processes), puts in groups.items()
        ]
        numbers[name] = {"bytes": passing(calls), "calls": rows}
    return numbers


def plans(
    find: Callable[[], UserModel],
    names: Sequence[str],
    mesh: Mesh,
    dtype: torch.dtype = torch.bfloat16,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Plan]:
    """What optimizers take for a model on a mesh.

    Args:
        find: makes the model with what a step takes; what it makes has no memory.
        names: of ``OPTIMIZERS``.
        dtype: of what ``fully_shard`` gathers for forward and backward passes; gradients are added up in float32.
        settings: name -> arguments of the optimizer.

    Raises:
        RefusedError: an optimizer cannot be made of the model.
        ValueError: the model cannot be divided, or make a step.
        RuntimeError: there are processes already.
    """
    from fisher_kernels.tools.collectives import Counting

    with _processes(mesh.processes):
        mode = Counting()
        with mode:
            example = find()
        with _ending_in_a_line("the model"), _in_silence():
            _divide(example, mesh, dtype)
            with mode:
                passes = _sent(mode, lambda: _pass(example))
        return [_counted(example, name, mesh, mode, passes, dict((settings or {}).get(name, {}))) for name in names]


def _pass(example: UserModel) -> None:
    """A forward and a backward."""
    for p in example.model.parameters():
        p.grad = None
    loss = example.loss or served.loss_of
    loss(served.outputs_of(example.model, example.inputs)).backward()


def _counted(
    example: UserModel,
    name: str,
    mesh: Mesh,
    mode: Counting,
    passes: tuple[Collective, ...],
    settings: dict[str, Any],
) -> Plan:
    with warnings.catch_warnings(record=True) as told, _without_numbers():
        warnings.simplefilter("always")
        try:
            optimizer = OPTIMIZERS[name](example.model, **settings)
        except (TypeError, ValueError) as error:
            raise RefusedError(name, str(error)) from error
        mode.number = 1.0 if isinstance(optimizer, AdamW) else 0.0  # it divides by what its count of steps gives
        reads = isinstance(optimizer, LayerwiseOptimizer)
        refresh: Counter[Collective] = Counter()
        try:
            with _ending_in_a_line(f"a step of {name}"), mode:
                if reads:
                    refresh = _refresh(example, optimizer, mode) - Counter(passes)
                step = _sent(mode, optimizer.step)
        finally:
            mode.number = 0.0
            if reads:
                optimizer.close()
    kind = type(optimizer).__name__
    params = [p for p in example.model.parameters() if p.requires_grad]
    brought = {"all-gather": lambda call: call.size * call.processes, "all-to-all": lambda call: call.size}
    gathered = [brought[call.kind](call) for call in step if call.kind in brought]
    with torch.no_grad():
        moments, curvature = _state(optimizer.state, getattr(optimizer, "statistics_state", ()))
        weights = sum(2 * local(p).numel() * ACCUMULATOR[p.dtype].itemsize for p in params)
    return Plan(
        kind,
        mesh,
        parameters=sum(p.numel() for p in params),
        weights=weights,
        moments=moments,
        curvature=curvature,
        largest=2 * max(gathered, default=0),
        passes=passes,
        step=step,
        refresh=tuple((refresh - Counter(step)).elements()),
        notes=tuple(str(note.message) for note in told if str(note.message).startswith(f"{kind}: ")),
    )


def _refresh(example: UserModel, optimizer: Any, mode: Counting) -> Counter[Collective]:
    """What is sent in a step that refreshes, but looks at nothing; none of the next ones refreshes anything."""

    def turn() -> None:
        _pass(example)
        optimizer.step()

    known = {p for layer in optimizer.statistics.layers() for p in layer.parameters.values()}
    applied = any(p.requires_grad and p not in known for p in example.model.parameters())
    if applied or (isinstance(optimizer, EKFAC) and optimizer.statistics.divisions):
        # The first refresh looks for functions that apply them. In it alone eigenvalues are sent, and no second moments
        # turned.
        turn()
        for group in optimizer.param_groups:
            group.update({"iteration": 0, **{name: UNKNOWN for name in KEPT if name in group}})
    optimizer.statistics.refresh = LATER
    optimizer._arm()
    sent = _sent(mode, turn)
    for group in optimizer.param_groups:
        group.update({name: NEVER for name in ("update_interval", "inverse_interval") if name in group})
        group.update({"refresh": "constant"} if "ramp" in group else {})
    optimizer._arm()
    return Counter(sent)


def _sent(mode: Counting, work: Callable[[], object]) -> tuple[Collective, ...]:
    mode.calls = []
    work()
    return tuple(mode.calls)


def _state(state: Mapping[Tensor, Mapping[str, Any]], statistics: Collection[str]) -> tuple[int, int]:
    """Bytes of the state of a process: of what is like a parameter and divided with it, and of all else."""
    sizes = Counter[bool]()
    for name, x in (entry for of_one in state.values() for entry in of_one.items()):
        if isinstance(x, Tensor):
            own = local(x)
            sizes[is_distributed(x) and name not in statistics] += own.numel() * own.element_size()
    return sizes[True], sizes[False]


def _divide(example: UserModel, mesh: Mesh, dtype: torch.dtype) -> None:
    """Divide a model as ``mesh`` says; members of lists of modules, such as blocks, are gathered one at a time.

    Outside of the mode, in which meshes could not read their ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    names = ("data", "tensor") if mesh.parallel == TENSOR else ("replicas", "shards")[-len(mesh.shape) :]
    whole = init_device_mesh("cpu", mesh.shape, mesh_dim_names=names)
    if mesh.parallel == TENSOR:
        assert example.plan is not None
        parallelize_module(example.model, whole["tensor"], dict(example.plan))
    over = whole["data"] if mesh.parallel == TENSOR else whole
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    lists = [module for module in example.model.modules() if isinstance(module, nn.ModuleList)]
    units = {member: None for members in lists for member in members if any(True for _ in member.parameters())}
    for unit in [*reversed(units), example.model]:  # those within others first
        fully_shard(unit, mesh=over, mp_policy=policy)


@contextmanager
def _in_silence() -> Iterator[None]:
    """Let torch keep to itself what it thinks of outputs that are views."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield


@contextmanager
def _processes(count: int) -> Iterator[None]:
    """Take this process for the first of so many."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("torch.distributed has a process group, expected none: a plan makes one that sends nothing")
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Let optimizers go on without the numbers that they would read.

    What processes add up is taken to be what one of them had; all have seen the same; layers are what their classes
    document.
    """
    places: list[tuple[Any, str]] = [(Statistics, "_reduce"), (Statistics, "_scatter"), (Statistics, "agree")]
    places.append((Proof, "holds"))
    own = [getattr(kind, name) for kind, name in places]
    rows: dict[tuple[int, int], Tensor] = {}  # of sums that are divided

    def reduce(statistics: Any, taken: dict[int, Any], *which: Any) -> tuple[dict[int, Any], Any]:
        rows.clear()
        own[0](statistics, taken, *which)
        for (index, position), mine in rows.items():
            vectors = list(taken[index].vectors)
            vectors[position] = mine
            taken[index] = Sums(vectors, taken[index].counts)
        return taken, which[-1]

    def scatter(statistics: Any, *about: Any) -> dict[tuple[int, int], Tensor]:
        rows.update(own[1](statistics, *about))
        return dict(rows)

    puts = (reduce, scatter, lambda statistics, found, due: found, lambda proof, *about: proof.reason is None)
    try:
        for (kind, name), put in zip(places, puts, strict=True):
            setattr(kind, name, put)
        yield
    finally:
        for (kind, name), function in zip(places, own, strict=True):
            setattr(kind, name, function)


@contextmanager
def _ending_in_a_line(what: str) -> Iterator[None]:
    """Make what is wrong with a model or its division an error of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} cannot be counted: {said(error)}") from error


def size(count: float) -> str:
    """A number of bytes with three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
