"""Optimizers that read layers, where processes divide these, compared with one process on the joint batch."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC, MBF, AdaFisher, AdaFisherW, EKFACAdam
from fisher_kernels.optim import layouts, shares
from tests.threads import in_threads

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]

STEPS = 20
FEW = 4
"""Enough where the way there is what is tried."""
BATCH = 8
TOKENS = 4

_making = threading.Lock()  # torch's random numbers are those of all threads


class Block(nn.Module):
    """A small transformer without attention. Two processes do not divide its tokens and classes evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        out: Tensor = self.head(x).mean(1)
        return out


def block(dtype: torch.dtype = torch.float64) -> Block:
    with _making:
        torch.manual_seed(0)
        return Block().to(dtype)


def batches(rank: int = 0, world: int = 1, steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    """A share of each batch."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randint(n, size, generator=generator) for n, size in ((11, (BATCH, TOKENS)), (3, (BATCH,))))
        yield x.chunk(world)[rank], y.chunk(world)[rank]


def train(model: nn.Module, optimizer: Any, rank: int = 0, world: int = 1, steps: int = STEPS) -> None:
    for x, y in batches(rank, world, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


Plan = dict[str, ParallelStyle]


def by_matrices() -> Plan:
    """Plain tensors in between, of which a process has the features that it made."""
    return {"up": ColwiseParallel(), "down": RowwiseParallel()}


def by_everything() -> Plan:
    """Activations that stay DTensors between two layers."""
    return {
        "embed": ColwiseParallel(output_layouts=Replicate()),
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }


def by_sequence() -> Plan:
    """Normalisations see some of the tokens of each sequence; of a matrix product all are gathered."""
    return {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


PLANS = {"matrices": by_matrices, "everything": by_everything, "sequence": by_sequence}

MESHES = {"tensor": (1, 2), "data x tensor": (2, 2), "replicas x data x tensor": (2, 2, 2)}
"""The last dimension divides layers, the others the batch."""


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "data", "tensor")[-len(shape) :])


def divided(model: Block, plan: str, mesh: DeviceMesh) -> nn.Module:
    parallelize_module(model, mesh["tensor"], PLANS[plan]())
    if mesh.size() > mesh.shape[-1]:
        data = mesh["replicas", "data"] if mesh.ndim == 3 else mesh["data"]
        for layer in (model.norm, model.up, model):  # what the first two gather is let go when they have run
            fully_shard(layer, mesh=data)
    return model


def data_group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """What has to be given where several dimensions of a mesh divide the batch."""
    return mesh["replicas", "data"]._flatten().get_group() if mesh.ndim == 3 else None


def part_of_batch(mesh: DeviceMesh) -> tuple[int, int]:
    rank = 0
    for name, size in zip(mesh.mesh_dim_names or (), mesh.shape[:-1], strict=False):
        rank = rank * size + mesh.get_local_rank(name)
    return rank, mesh.size() // mesh.shape[-1]


def whole(model: nn.Module) -> list[Tensor]:
    """Put together by the package: ``full_tensor`` takes no rows that are divided twice, and not evenly."""
    with torch.no_grad():
        return [shares.whole(p).detach() for p in model.parameters()]


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for p, q in zip(found, expected, strict=True):
        assert float((p - q).abs().max()) <= bound * float(q.abs().max())


READERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdaFisher": (AdaFisher, {"lr": 1e-3}),
    "AdaFisher, release": (AdaFisher, {"lr": 1e-3, "variant": "release", "update_interval": 3}),
    "AdaFisher, relative": (AdaFisher, {"lr": 0.02, "variant": "relative"}),
    "AdaFisherW": (AdaFisherW, {"lr": 1e-3, "weight_decay": 0.1}),
    "MBF": (MBF, {"lr": 1e-3, "linear_blocks": 3}),
    "KFAC": (KFAC, {"lr": 0.1, "weight_decay": 0.1, "decoupled": False}),
    "KFAC of curvature": (KFAC, {"lr": 0.1, "others": "curvature"}),
}

FAST = {
    ("AdaFisher", "sequence", "data x tensor", torch.float64),
    ("AdaFisher", "matrices", "tensor", torch.float32),
    ("MBF", "matrices", "tensor", torch.float64),
    ("KFAC", "sequence", "tensor", torch.float64),
}
"""Every kind of curvature; the others are in the slow tier."""

CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id=", ".join(map(str, case)))
    for case in itertools.product(READERS, PLANS, MESHES, (torch.float64, torch.float32))
    # In float32 the others invert, or find eigenvectors of, factors of condition numbers beyond its precision.
    if case[3] == torch.float64 or case[0].startswith("AdaFisher")
]

Found = tuple[list[Tensor], list[tuple[str, str]], dict[str, dict[str, float]]]


@pytest.mark.parametrize(("settings", "plan", "meshes", "dtype"), CASES)
def test_readers_of_layers(settings: str, plan: str, meshes: str, dtype: torch.dtype) -> None:
    kind, made = READERS[settings]
    shape = MESHES[meshes]

    def work(rank: int) -> Found:
        mesh = mesh_of(shape)
        model = divided(block(dtype), plan, mesh)
        optimizer = kind(model, **made, process_group=data_group(mesh))
        train(model, optimizer, *part_of_batch(mesh))
        return whole(model), [(row.name, row.rule) for row in optimizer.explain()], optimizer.metrics()

    model = block(dtype)
    optimizer = kind(model, **made)
    train(model, optimizer)
    for found, served, metrics in in_threads(work, torch.Size(shape).numel()):
        assert served == [(row.name, row.rule) for row in optimizer.explain()]
        assert not any(rule == "fallback" for _, rule in served)
        assert_close(found, whole(model), dtype)
        for row, other in zip(metrics.values(), optimizer.metrics().values(), strict=True):
            assert row == pytest.approx(other, rel=1e-2 if dtype == torch.float32 else 1e-9)


def _part_of_matrix(rows: int, style: ParallelStyle) -> None:
    """Whether a process has the part of numbers that are told apart, of a matrix and of a bias."""
    mesh = mesh_of((2, 2))
    layer = nn.Linear(6, rows)
    full = [torch.arange(rows * 6.0).view(rows, 6), torch.arange(float(rows))]
    with torch.no_grad():
        for p, q in zip(layer.parameters(), full, strict=True):
            p.copy_(q)
    parallelize_module(layer, mesh["tensor"], style)
    fully_shard(layer, mesh=mesh["data"])
    with torch.no_grad():
        for p, q in zip(layer.parameters(), full, strict=True):
            assert layouts.is_known(p)
            assert torch.equal(shares.local(p), q[layouts.part(p)])
            assert torch.equal(shares.whole(p), q)


def test_the_part_of_a_process_and_the_whole() -> None:
    """Of rows that are divided twice, evenly or not, down to none; of columns and rows."""

    def work(rank: int) -> None:
        for rows in (1, 3, 5, 7, 8, 11):
            _part_of_matrix(rows, ColwiseParallel())
            _part_of_matrix(rows, RowwiseParallel())

    in_threads(work, 4)


def dense() -> nn.Sequential:
    """Not of tokens: eigenvectors of equal eigenvalues, as few tokens have them, are what rounding makes."""
    with _making:
        torch.manual_seed(0)
        layers = nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)
        return nn.Sequential(*layers).double()


def train_dense(model: nn.Module, optimizer: Any, rank: int = 0, world: int = 1) -> None:
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2 * BATCH, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (2 * BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x.chunk(world)[rank]), y.chunk(world)[rank]).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "made", "shape"),
    [
        (EKFACAdam, {"lr": 0.01, "max_relative_step": 0.1}, (1, 2)),
        pytest.param(EKFAC, {"lr": 0.03}, (1, 2), marks=pytest.mark.slow),
        pytest.param(EKFAC, {"lr": 0.03}, (2, 2), marks=pytest.mark.slow),
        pytest.param(EKFAC, {"lr": 0.03, "inverse_sharing": "one_owner"}, (2, 2), marks=pytest.mark.slow),
        pytest.param(EKFACAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled": False}, (2, 2), marks=pytest.mark.slow),
    ],
)
def test_bases_of_eigenvectors(kind: Any, made: dict[str, Any], shape: tuple[int, ...]) -> None:
    def work(rank: int) -> list[Tensor]:
        mesh = mesh_of(shape)
        model = dense()
        plan = {"0": ColwiseParallel(output_layouts=Replicate()), "3": ColwiseParallel(), "5": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        if shape[0] > 1:
            fully_shard(model, mesh=mesh["data"])
        train_dense(model, kind(model, **made), *part_of_batch(mesh))
        return whole(model)

    model = dense()
    train_dense(model, kind(model, **made))
    for found in in_threads(work, torch.Size(shape).numel()):
        assert_close(found, whole(model))


def test_states_lie_as_the_parameters_do_and_are_loaded() -> None:
    def work(rank: int) -> list[list[Tensor]]:
        mesh = mesh_of((2, 2))
        found = []
        for loads in (False, True):
            model = divided(block(), "sequence", mesh)
            optimizer = AdaFisherW(model, lr=1e-3)
            train(model, optimizer, *part_of_batch(mesh), 2)
            for p in model.parameters():
                assert optimizer.state[p]["exp_avg"].placements == p.placements  # type: ignore[attr-defined]
            if loads:
                fresh = AdaFisherW(model, lr=1e-3)
                set_optimizer_state_dict(model, fresh, get_optimizer_state_dict(model, optimizer))
                optimizer.close()
                optimizer = fresh
            train(model, optimizer, *part_of_batch(mesh), 2)
            found.append(whole(model))
        return found

    for plain, resumed in in_threads(work, 4):
        for p, q in zip(plain, resumed, strict=True):
            assert torch.equal(p, q)


class Positions(Block):
    """Its position embeddings have one row for all samples, and its head is applied by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(TOKENS, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions(torch.arange(TOKENS))
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        weight, bias = self.head.weight, self.head.bias
        out = F.linear(DTensor.from_local(x, weight.device_mesh) if isinstance(weight, DTensor) else x, weight, bias)
        out = out.full_tensor() if isinstance(out, DTensor) else out
        return out.mean(1)


def positions() -> Positions:
    with _making:
        torch.manual_seed(0)
        return Positions().double()


@pytest.mark.parametrize(
    "settings", ["AdaFisher", *(pytest.param(name, marks=pytest.mark.slow) for name in ("KFAC", "MBF"))]
)
def test_rows_that_serve_many_and_weights_that_functions_apply(settings: str) -> None:
    kind, made = READERS[settings]

    def work(rank: int) -> tuple[list[Tensor], list[Any]]:
        mesh = mesh_of((2, 2))
        model = positions()
        plan = {**by_everything(), "positions": ColwiseParallel(output_layouts=Replicate())}
        del plan["head"]
        for name, p in model.head.named_parameters():
            model.head.register_parameter(name, nn.Parameter(distribute_tensor(p, mesh["tensor"], [Shard(0)])))
        parallelize_module(model, mesh["tensor"], plan)
        fully_shard(model, mesh=mesh["data"])
        optimizer = kind(model, **made)
        train(model, optimizer, *part_of_batch(mesh), FEW)
        return whole(model), [(row.name, row.rule) for row in optimizer.explain()]

    model = positions()
    optimizer = kind(model, **made)
    train(model, optimizer, steps=FEW)
    for found, served in in_threads(work, 4):
        assert served == [(row.name, row.rule) for row in optimizer.explain()]
        assert_close(found, whole(model))


class Loss(Block):
    """Its loss is what it makes: the last layer alone has the number of terms, which are tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        out = self.head(x + self.down(torch.tanh(self.up(self.norm(x)))))
        if isinstance(weight := self.head.weight, DTensor):
            out = DTensor.from_local(out, weight.device_mesh, [Shard(1)]).full_tensor()
        return F.cross_entropy(out.flatten(0, 1), tokens.flatten() % 3)


def test_terms_of_a_layer_of_which_processes_have_parts() -> None:
    """They are counted before a hook of the layer leaves to each process its part of the tokens."""

    def trained(mesh: DeviceMesh | None) -> list[Tensor]:
        with _making:
            torch.manual_seed(0)
            model = Loss().double()
        if mesh is not None:
            plan = {"head": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))}
            parallelize_module(model, mesh["tensor"], plan)
        optimizer = KFAC(model, lr=0.1)
        for tokens, _ in batches(steps=FEW):
            optimizer.zero_grad()
            model(tokens).backward()
            optimizer.step()
        return whole(model)

    expected = trained(None)
    for found in in_threads(lambda rank: trained(mesh_of((1, 2))), 2):
        assert_close(found, expected)


def _in_two_parts(model: nn.Module, optimizer: Any) -> None:
    """With a backward before each step that is taken back, and no word of that to the optimizer."""
    for x, y in batches(steps=FEW):
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()
        for xi, yi in zip(x.chunk(2), y.chunk(2), strict=True):
            (F.cross_entropy(model(xi), yi) / 2).backward()
        optimizer.step()
        model.zero_grad()


@pytest.mark.parametrize("settings", ["AdaFisher", pytest.param("KFAC", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["accumulated", "checkpointed", "loss in parts"])
def test_ways_to_train(settings: str, how: str) -> None:
    kind, made = READERS[settings]

    def work(rank: int) -> list[Tensor]:
        mesh = mesh_of((1, 2))
        model = block()
        if how == "checkpointed":
            model.up, model.down = (checkpoint_wrapper(layer) for layer in (model.up, model.down))
            inner = {"up": "up._checkpoint_wrapped_module", "down": "down._checkpoint_wrapped_module"}
            parallelize_module(model, mesh["tensor"], {inner[name]: style for name, style in by_matrices().items()})
        elif how == "loss in parts":
            plan = {**by_matrices(), "head": ColwiseParallel(use_local_output=False)}
            parallelize_module(model, mesh["tensor"], plan)
        else:
            divided(model, "sequence", mesh)
        optimizer = kind(model, **made)
        trains(model, optimizer)
        return whole(model)

    trains = _in_two_parts if how == "accumulated" else partial(train, steps=FEW)
    model = block()
    trains(model, kind(model, **made))
    with loss_parallel() if how == "loss in parts" else nullcontext():  # of all threads
        results = in_threads(work, 2)
    for found in results:
        assert_close(found, whole(model))


class Activated(nn.Linear):
    """No Linear, though it is an instance of one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Alone(nn.Linear):
    """What it makes of a part does not say so."""

    def forward(self, x: Tensor) -> Tensor:
        out: Any = super().forward(x)
        made: Tensor = out.to_local() if isinstance(out, DTensor) else out
        return made


class Shifted(nn.Embedding):
    """No Embedding, though it is an instance of one."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward((tokens + 1) % self.num_embeddings)


@pytest.mark.filterwarnings("ignore:.*(cannot be served by a rule|have no layer rule|apply parameters that layers)")
@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("up", Activated, "its output is off by"),
        ("up", Alone, "its output does not say who has what"),
        ("embed", Shifted, "its output can be read once"),
    ],
)
def test_layers_that_are_not_what_they_are_taken_for(name: str, kind: Any, reason: str) -> None:
    """The functions inside serve them, as they do in one process."""

    def made() -> Block:
        model = block()
        layer = getattr(model, name)
        other = kind(*layer.weight.shape[:: -1 if name == "up" else 1]).double()
        other.load_state_dict(layer.state_dict())
        setattr(model, name, other)
        return model

    def work(rank: int) -> tuple[list[Tensor], dict[str, str]]:
        mesh = mesh_of((1, 2))
        model = made()
        if kind is Alone:
            other: nn.Module = getattr(model, name)
            for role, p in [*other.named_parameters()]:
                other.register_parameter(role, nn.Parameter(distribute_tensor(p, mesh["tensor"], [Shard(0)])))
            other.register_forward_pre_hook(lambda module, args: DTensor.from_local(args[0], mesh["tensor"]))
            parallelize_module(model, mesh["tensor"], {"down": RowwiseParallel()})
        else:
            divided(model, "sequence", mesh)
        optimizer = AdaFisher(model, lr=1e-3)
        train(model, optimizer, steps=FEW)
        return whole(model), {row.name: row.detail for row in optimizer.explain()}

    model = made()
    train(model, AdaFisher(model, lr=1e-3), steps=FEW)
    for found, details in in_threads(work, 2):
        assert f"served by the functions inside {name}" in details[f"{name}.weight"]
        assert reason in details[f"{name}.weight"]
        assert_close(found, whole(model))


def test_what_is_refused() -> None:
    def work(rank: int) -> None:
        mesh = mesh_of((2, 2))
        for kind in (AdaFisher, MBF, KFAC, EKFAC, EKFACAdam):
            model = nn.Sequential(nn.Conv2d(4, 4, 3))
            weight = distribute_tensor(model[0].weight.detach(), mesh["tensor"], [Shard(1)])
            model[0].weight = nn.Parameter(weight)
            with pytest.raises(TypeError, match=r"\(0\.weight\) is a DTensor .*Shard\(dim=1\).* does not take others"):
                kind(model)
        both = divided(block(), "matrices", mesh)
        optimizer = KFAC(both, process_group=dist.group.WORLD)
        x, y = next(batches(*part_of_batch(mesh)))
        F.cross_entropy(both(x), y).backward()
        with pytest.raises(ValueError, match="each counts once"):
            optimizer.step()
        of_replicas = mesh_of((1, 2, 2))
        with pytest.raises(ValueError, match="process_group is None, and the parts of a batch are on"):
            AdaFisher(divided(block(), "matrices", of_replicas))
        sampling = KFAC(divided(block(), "matrices", mesh), fisher="sampled")
        with pytest.raises(TypeError, match=r"output is a DTensor, expected all of it"):
            sampling.sample(DTensor.from_local(torch.ones(2, 2, requires_grad=True), mesh["tensor"]))

    in_threads(work, 4)


@pytest.mark.parametrize("whole_sequences", [True, False])
def test_layers_that_see_parts_and_do_not_say_so(whole_sequences: bool) -> None:
    """A plain normalisation between layers of which processes have parts of the sequences."""

    def work(rank: int) -> None:
        mesh = mesh_of((1, 2))
        model = block()
        plan = by_matrices() if whole_sequences else by_sequence()
        plan.pop("norm", None)
        parallelize_module(model, mesh["tensor"], plan)
        train(model, AdaFisher(model, lr=1e-3), steps=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        in_threads(work, 2)
    told = [str(w.message) for w in caught if "differ among the processes" in str(w.message)]
    assert all("statistics of norm" in message for message in told)
    assert bool(told) is not whole_sequences
