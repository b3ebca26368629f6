"""Optimizers whose parameters are shared out among processes, compared with one process on the joint batch."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from fisher_kernels import KFAC, MBF, SOFIM, AdaFisher, EKFACAdam
from fisher_kernels.curvature.gathered import all_of
from fisher_kernels.optim import block_shards, shard_products, shares
from fisher_kernels.optim.factor_bases import FactorBases
from fisher_kernels.optim.factor_inverses import FactorInverses
from fisher_kernels.optim.fisher_blocks import FisherBlocks
from fisher_kernels.optim.inverse_sharing import owners
from tests.collectives import Collectives, watched
from tests.processes import in_two_processes, needs_processes
from tests.shards import READERS, SOFIMS, STEPS, assert_close, batch, empty, making, network, sharded, train, whole
from tests.threads import in_threads

pytestmark = pytest.mark.usefixtures("one_thread")

RANKS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "2": ((2,), {}),
    "4, without resharding": ((4,), {"reshard_after_forward": False}),
    "8": ((8,), {}),
    "2 x 2": ((2, 2), {}),
}


FAST = {
    ("momentum", "8", torch.float64),
    ("momentum", "2 x 2", torch.float32),
    ("gradient", "2 x 2", torch.float64),
    ("without memory", "2", torch.float64),
    ("by tensor", "4, without resharding", torch.float64),
    ("l2, maximize", "2 x 2", torch.float64),
}
"""Every setting and every mesh once; the others are in the slow tier."""

CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id=", ".join(map(str, case)))
    for case in itertools.product(SOFIMS, RANKS, (torch.float64, torch.float32))
]


def trained(settings: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, dict[str, float]]]:
    """What one process makes of the joint batches."""
    model = network(dtype)
    optimizer = SOFIM(model.parameters(), **settings)
    train(model, optimizer, dtype)
    return whole(model), optimizer.metrics()


@pytest.mark.parametrize(("settings", "ranks", "dtype"), CASES)
def test_sofim(settings: str, ranks: str, dtype: torch.dtype) -> None:
    shape, how = RANKS[ranks]
    world = torch.Size(shape).numel()

    def work(rank: int) -> tuple[list[Tensor], dict[str, dict[str, float]]]:
        model = sharded(network(dtype), shape, **how)
        optimizer = SOFIM(model.parameters(), **SOFIMS[settings])
        train(model, optimizer, dtype, rank, world)
        return whole(model), optimizer.metrics()

    expected, figures = trained(SOFIMS[settings], dtype)
    for found, metrics in in_threads(work, world):
        assert_close(found, expected, dtype)
        for row, other in zip(metrics.values(), figures.values(), strict=True):
            assert row == pytest.approx(other, rel=1e-3 if dtype == torch.float32 else 1e-9)


def test_gradients_that_are_accumulated() -> None:
    def work(rank: int) -> list[Tensor]:
        model = sharded(network(torch.float64), (2,))
        train(model, SOFIM(model.parameters(), **SOFIMS["momentum"]), torch.float64, rank, 2, parts=2)
        return whole(model)

    expected, _ = trained(SOFIMS["momentum"], torch.float64)
    for found in in_threads(work, 2):
        assert_close(found, expected, torch.float64)


def test_groups_and_parameters_that_are_not_sharded() -> None:
    def made(model: nn.Module) -> SOFIM:
        first, *others = model.parameters()
        return SOFIM([{"params": others, "lr": 0.02, "weight_decay": 0.1}, {"params": [first], "lr": 0.05}])

    def work(rank: int) -> list[Tensor]:
        model = network(torch.float64)
        last = model[-1]
        mesh = init_device_mesh("cpu", (2,))
        for p in last.parameters():  # a gradient of each process's own
            p.register_hook(lambda g: dist.all_reduce(g.div_(2)) or g)
        fully_shard(model, mesh=mesh, ignored_params=set(last.parameters()))
        train(model, made(model), torch.float64, rank, 2)
        return whole(model)

    model = network(torch.float64)
    train(model, made(model), torch.float64)
    for found in in_threads(work, 2):
        assert_close(found, whole(model), torch.float64)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_tensor_parallel_and_both() -> None:
    """Normalisations are whole in tensor parallel training, and shards of another mesh where it is combined."""

    def work(rank: int) -> list[list[Tensor]]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        found = []
        for both in (False, True):
            model: nn.Module = network(torch.float64)
            plan = {"3": RowwiseParallel(input_layouts=Replicate()), "5": ColwiseParallel(output_layouts=Replicate())}
            parallelize_module(model, mesh["tensor"], plan)
            if both:
                fully_shard(model, mesh=mesh["data"])
            part = (mesh.get_local_rank("data"), 2) if both else (0, 1)
            train(model, SOFIM(model.parameters(), **SOFIMS["momentum"]), torch.float64, *part)
            found.append(whole(model))
        return found

    expected, _ = trained(SOFIMS["momentum"], torch.float64)
    for found in in_threads(work, 4):
        for one in found:
            assert_close(one, expected, torch.float64)


@pytest.mark.parametrize(("direction", "numbers"), [("momentum", 1), ("gradient", 2)])
def test_a_step_sends_one_number(direction: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    sum_over_mesh = shares.sum_over_mesh

    def counting(x: Tensor, mesh: Any) -> Tensor:
        sent.append(x.numel())
        return sum_over_mesh(x, mesh)

    monkeypatch.setattr(shard_products, "sum_over_mesh", counting)

    def work(rank: int) -> None:
        model = sharded(network(torch.float64), (2,))
        train(model, SOFIM(model.parameters(), lr=0.05, direction=direction, rho=1.0), torch.float64, rank, 2)

    in_threads(work, 2)
    assert sent == [numbers] * (2 * STEPS)


def test_what_is_not_finite_stays_where_it_is_and_what_overflows_stops_the_step() -> None:
    def work(rank: int) -> tuple[list[Tensor], list[Tensor]]:
        model = sharded(network(torch.float64), (2,))
        optimizer = SOFIM(model.parameters(), **SOFIMS["momentum"])
        train(model, optimizer, torch.float64, rank, 2)
        first = next(model.parameters())
        found = []
        for value in (math.nan, 1e200):
            x, y = (part.chunk(2)[rank] for part in batch(STEPS, torch.float64))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if rank == 0:
                first.grad.to_local()[0, 0] = value  # type: ignore[union-attr]
            before = whole(model)
            optimizer.step()
            found.append([after - b for after, b in zip(whole(model), before, strict=True)])
        return found[0], found[1]

    for spared, stopped in in_threads(work, 2):
        assert spared[0][0, 0] == 0
        assert all(bool(d.any()) for d in spared)
        assert not any(bool(d.any()) for d in stopped)


def test_states_are_shards_and_being_asked_for_them_changes_nothing() -> None:
    def work(rank: int) -> tuple[list[Tensor], list[Tensor]]:
        found = []
        for asked in (False, True):
            model = sharded(network(torch.float64), (2,))
            optimizer = SOFIM(model.parameters(), **SOFIMS["momentum"])
            if asked:
                state = get_optimizer_state_dict(model, optimizer)["state"]["0.weight"]
                assert state["exp_avg"].placements == next(model.parameters()).placements  # type: ignore[attr-defined]
            train(model, optimizer, torch.float64, rank, 2)
            fresh = SOFIM(model.parameters(), **SOFIMS["momentum"])
            set_optimizer_state_dict(model, fresh, get_optimizer_state_dict(model, optimizer))
            train(model, fresh if asked else optimizer, torch.float64, rank, 2)
            assert fresh.explain()[0].state_bytes == 8 * 6 * 6 + 4
            found.append(whole(model))
        return found[0], found[1]

    for plain, resumed in in_threads(work, 2):
        for p, q in zip(plain, resumed, strict=True):
            assert torch.equal(p, q)


FAST_READERS = {
    ("AdaFisher", "8", torch.float64),
    ("AdaFisher", "2", torch.float32),
    ("AdaFisher, release", "2 x 2", torch.float64),
    ("AdaFisher, relative", "4, without resharding", torch.float64),
    ("AdaFisherW", "2", torch.float64),
    ("MBF", "8", torch.float64),
    ("MBF, along gradients", "2 x 2", torch.float64),
    ("MBF, packed", "2", torch.float64),
    ("KFAC", "2 x 2", torch.float64),
    ("KFAC beside Adam", "4, without resharding", torch.float64),
    ("EKFAC", "2", torch.float64),
    ("EKFACAdam", "2 x 2", torch.float64),
}

READER_CASES = [
    pytest.param(*case, marks=() if case in FAST_READERS else pytest.mark.slow, id=", ".join(map(str, case)))
    for case in itertools.product(READERS, RANKS, (torch.float64, torch.float32))
    # In float32 the others invert, or find eigenvectors of, factors of condition numbers beyond its precision.
    if case[2] == torch.float64 or case[0].startswith("AdaFisher")
]


@pytest.mark.parametrize(("settings", "ranks", "dtype"), READER_CASES)
def test_readers_of_layers(settings: str, ranks: str, dtype: torch.dtype) -> None:
    kind, made = READERS[settings]
    shape, how = RANKS[ranks]
    world = torch.Size(shape).numel()

    def work(rank: int) -> tuple[list[Tensor], dict[str, dict[str, float]], list[Any]]:
        model = sharded(network(dtype), shape, **how)
        optimizer = kind(model, **made)
        train(model, optimizer, dtype, rank, world)
        served = [(row.name, row.rule) for row in optimizer.explain()]
        return whole(model), optimizer.metrics(), served

    model = network(dtype)
    optimizer = kind(model, **made)
    train(model, optimizer, dtype)
    for found, metrics, served in in_threads(work, world):
        assert served == [(row.name, row.rule) for row in optimizer.explain()]
        assert_close(found, whole(model), dtype)
        for row, other in zip(metrics.values(), optimizer.metrics().values(), strict=True):
            assert row == pytest.approx(other, rel=1e-2 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(MBF, {"lr": 0.1, "damping": 1.0}), (MBF, {"lr": 0.1, "damping": 1.0, "kl_along": "gradient"}), (KFAC, {})],
    ids=str,
)
def test_moments_in_16_bits(kind: Any, settings: dict[str, Any]) -> None:
    """They round to a neighbour at most, and MBF's first step, being made before that, is the same.

    Gradients that are added up in another order, in float32, may lie on the other side of a tie.
    """
    eps = torch.finfo(torch.bfloat16).eps

    def one_step(model: nn.Module, rank: int, world: int) -> tuple[list[Tensor], list[Tensor]]:
        model = sharded(model, (world,)) if world > 1 else model
        optimizer = kind(model, **settings, moment_dtype=torch.bfloat16)
        x, y = (part.chunk(world)[rank] for part in batch(0, torch.float32))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        moments = [optimizer.state[p][optimizer.moment] for p in model.parameters()]
        assert all(m.dtype == torch.bfloat16 for m in moments)
        return whole(model), [m.full_tensor() if hasattr(m, "full_tensor") else m for m in moments]

    before = whole(network(torch.float32))
    expected, wanted = one_step(network(torch.float32), 0, 1)
    for found, moments in in_threads(lambda rank: one_step(network(torch.float32), rank, 2), 2):
        for m, n in zip(moments, wanted, strict=True):
            assert float((m.float() - n.float()).abs().max()) <= eps * float(n.float().abs().max())
        for p, q, start in zip(found, expected, before, strict=True):
            if kind is MBF:
                assert float((p - q).abs().max()) <= 1e-4 * float((q - start).abs().max()) + 1e-7


class Tokens(nn.Sequential):
    """Layers of every kind that has a rule, over the rows of which groups of channels are cut."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x * 3).round().long().clamp(-4, 4) + 4
        h = self[0](tokens).unflatten(1, (3, 2)).movedim(3, 1)  # 16 x 6 x 3 x 2
        for layer in self[1:-1]:
            h = torch.tanh(layer(h))
        out: Tensor = self[-1](h.flatten(1))
        return out


def layers(dtype: torch.dtype) -> Tokens:
    with making:
        torch.manual_seed(0)
        model = Tokens(
            nn.Embedding(9, 6),
            nn.Conv2d(6, 10, 3, padding=1, groups=2),
            nn.GroupNorm(2, 10),
            nn.ConvTranspose2d(10, 6, 2, groups=2),
            nn.Conv2d(6, 4, 2, bias=False),
            nn.Linear(4 * 3 * 2, 3),
        )
    return model.to(dtype)


# Not EKFAC: factors of few samples have eigenvalues that are equal, and its moments follow what eigenvectors of these
# rounding makes. Of a model whose weights are off by 1e-15 its steps are off by 6e-3.
ON_EVERY_LAYER = [
    "AdaFisher",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("AdaFisher, release", "AdaFisher, relative", "MBF")),
    "MBF, packed",
    "KFAC",
    pytest.param("EKFACAdam", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("settings", ON_EVERY_LAYER)
def test_every_kind_of_layer(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for no more than a few layers at a time."""
    monkeypatch.setattr(block_shards, "AT_ONCE", 100)
    kind, made = READERS[settings]

    def work(rank: int) -> tuple[list[Tensor], list[Any]]:
        model = sharded(layers(torch.float64), (4,))
        optimizer = kind(model, **made)
        train(model, optimizer, torch.float64, rank, 4)
        return whole(model), [(row.name, row.rule) for row in optimizer.explain()]

    model = layers(torch.float64)
    optimizer = kind(model, **made)
    train(model, optimizer, torch.float64)
    for found, served in in_threads(work, 4):
        assert served == [(row.name, row.rule) for row in optimizer.explain()]
        assert not any(rule == "fallback" for _, rule in served)
        assert_close(found, whole(model), torch.float64)


class Grids(nn.Sequential):
    """A normalisation whose weight is a matrix. Of its rows the last of four processes has none."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[2](torch.tanh(self[1](self[0](x).view(-1, 5, 6))).flatten(1))
        return out


def grids() -> Grids:
    with making:
        torch.manual_seed(0)
        model = Grids(nn.Linear(6, 30), nn.LayerNorm((5, 6)), nn.Linear(30, 3)).double()
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        name if name in ("AdaFisherW", "MBF", "KFAC beside Adam") else pytest.param(name, marks=pytest.mark.slow)
        for name in READERS
        if name != "EKFAC"  # as above: weights that are off by 1e-15 are off by 6e-3 in the end
    ],
)
def test_normalisations_of_several_dimensions(settings: str) -> None:
    kind, made = READERS[settings]

    def work(rank: int) -> tuple[list[Tensor], list[Any]]:
        model = sharded(grids(), (4,))
        optimizer = kind(model, **made)
        train(model, optimizer, torch.float64, rank, 4)
        return whole(model), [(row.name, row.rule) for row in optimizer.explain()]

    model = grids()
    optimizer = kind(model, **made)
    train(model, optimizer, torch.float64)
    for found, served in in_threads(work, 4):
        assert served == [(row.name, row.rule) for row in optimizer.explain()]
        assert_close(found, whole(model), torch.float64)


@pytest.mark.parametrize(
    ("settings", "bad"),
    [
        ("MBF", 2),
        ("KFAC beside Adam", 3),
        ("EKFACAdam", 12),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("MBF", 12), ("KFAC", 2), ("EKFACAdam", 3)]),
    ],
)
def test_gradients_that_are_not_finite(settings: str, bad: int) -> None:
    """Of a bias of 12 numbers some of one process, all that one has, or all of them; the same stay everywhere."""
    kind, made = READERS[settings]

    def spoil(model: nn.Module, rank: int, world: int) -> None:
        weight, norm = model[0].weight.grad, model[1].bias.grad  # type: ignore[index,union-attr]
        if rank == 0:
            (weight.to_local() if world > 1 else weight)[:2, 1] = math.nan
        norm = norm.to_local() if world > 1 else norm
        norm[: max(0, bad - rank * 12 // world)] = math.inf

    def steps(model: nn.Module, rank: int, world: int) -> tuple[list[Tensor], dict[str, dict[str, float]]]:
        optimizer = kind(model, **made)
        train(model, optimizer, torch.float64, rank, world)
        for step in range(2):
            x, y = (part.chunk(world)[rank] for part in batch(STEPS + step, torch.float64))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if step == 0:
                spoil(model, rank, world)
            optimizer.step()
        return whole(model), optimizer.metrics()

    expected, figures = steps(network(torch.float64), 0, 1)
    for found, metrics in in_threads(lambda rank: steps(sharded(network(torch.float64), (4,)), rank, 4), 4):
        assert all(bool(p.isfinite().all()) for p in found)
        assert_close(found, expected, torch.float64)
        for row, other in zip(metrics.values(), figures.values(), strict=True):
            assert row == pytest.approx(other, rel=1e-9)


def test_a_refresh_of_adafisher_sends_its_sums_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns of each layer, the counts of terms of each, and four flags for each layer."""
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counting(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(x.numel())
        return all_reduce(x, *args, **kwargs)

    def work(rank: int) -> None:
        model = sharded(network(torch.float64), (2,))
        optimizer = AdaFisher(model, lr=1e-3, update_interval=5)
        train(model, optimizer, torch.float64, rank, 2)
        if rank == 0:  # from here on layers have statistics
            monkeypatch.setattr(dist, "all_reduce", counting)
        dist.barrier()
        train(model, optimizer, torch.float64, rank, 2)
        dist.barrier()

    in_threads(work, 2)
    sums = (6 + 12) + 12 + (12 + 7) + (7 + 3)
    assert sent == [sums + 2 + 1 + 2 + 2 + 4 * 4] * (2 * STEPS // 5)


@pytest.mark.parametrize("settings", ["MBF", "KFAC"])
def test_weights_that_begin_at_zero(settings: str) -> None:
    """They count as a least size by their whole number, of which a process sees some."""
    kind, made = READERS[settings]

    def begun() -> nn.Sequential:
        model = network(torch.float64)
        nn.init.zeros_(model[5].weight)
        nn.init.zeros_(model[5].bias)
        return model

    def work(rank: int) -> list[Tensor]:
        model = sharded(begun(), (2,))
        train(model, kind(model, **made), torch.float64, rank, 2)
        return whole(model)

    model = begun()
    train(model, kind(model, **made), torch.float64)
    for found in in_threads(work, 2):
        assert_close(found, whole(model), torch.float64)


@pytest.mark.parametrize(
    ("settings", "renewing"),
    [
        ("MBF, along gradients", FisherBlocks),
        ("KFAC", FactorInverses),
        pytest.param("EKFAC", FactorBases, marks=pytest.mark.slow),
        pytest.param("EKFACAdam", FactorBases, marks=pytest.mark.slow),
    ],
)
def test_inverses_that_one_process_makes_for_all(settings: str, renewing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those of blocks that are divided, as of the normalisation in MBF, of which each has its own rows."""
    kind, made = READERS[settings]
    divided = set()
    here = threading.local()
    renew = renewing._renew

    def noting(self: Any, items: Any) -> Any:
        here.numbers.append([item.number for item in items])
        divided.update(item.number for item in items if kind is MBF and item.shards is not None)
        return renew(self, items)

    monkeypatch.setattr(renewing, "_renew", noting)

    def work(rank: int) -> tuple[list[Tensor], list[list[int]]]:
        here.numbers = []
        model = sharded(network(torch.float64), (2,))
        train(model, kind(model, **made, inverse_sharing="one_owner"), torch.float64, rank, 2)
        return whole(model), here.numbers

    here.numbers = []
    model = network(torch.float64)
    train(model, kind(model, **made, inverse_sharing="one_owner"), torch.float64)
    alone = here.numbers
    (first, ours), (second, others) = in_threads(work, 2)
    for found in (first, second):
        assert_close(found, whole(model), torch.float64)
    assert sum(map(len, alone)) > 20
    for all_of_them, mine, theirs in zip(alone, ours, others, strict=True):
        assert sorted({*mine, *theirs}) == all_of_them
        assert {*mine} & {*theirs} == divided & {*all_of_them}
        assert len(all_of_them) < 2 or (mine and theirs)
    assert bool(divided) == (kind is MBF)


@given(st.lists(st.integers(1, 1000), max_size=30), st.integers(1, 9))
def test_work_is_shared_out_evenly(costs: list[int], processes: int) -> None:
    """Nobody has more than an even share and the dearest piece."""
    found = owners(costs, processes)
    assert len(found) == len(costs)
    loads = [sum(c for c, owner in zip(costs, found, strict=True) if owner == rank) for rank in range(processes)]
    assert sum(loads) == sum(costs)
    assert max(loads) <= sum(costs) / processes + max(costs, default=0)


LINEARS = [(6, 12), (12, 7), (7, 3)]
BLOCK_NUMBERS = sum((i + 1) ** 2 for i, _ in LINEARS)
FACTOR_NUMBERS = sum((i + 1) ** 2 + o**2 for i, o in LINEARS)


@pytest.mark.parametrize(
    ("kind", "numbers", "gathers", "exchanges"),
    [(MBF, BLOCK_NUMBERS, 1, 0), (KFAC, FACTOR_NUMBERS, 0, 2), (EKFACAdam, FACTOR_NUMBERS, 0, 3)],
)
def test_what_a_step_and_a_refresh_send(
    kind: Any, numbers: int, gathers: int, exchanges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics once in a refresh, in float32; the shards of what has a matrix, and a few numbers for bounds.

    MBF's blocks of the normalisation are scattered in the precision of the state, and not gathered.
    """
    watched(monkeypatch)

    def work(rank: int) -> list[list[tuple[str, int]]]:
        model = sharded(network(torch.float32), (2,))
        optimizer = kind(model, refresh="constant", update_interval=3, inverse_interval=3)
        sent = []
        for step in range(8):
            optimizer.zero_grad()
            x, y = (part.chunk(2)[rank] for part in batch(step, torch.float32))
            F.cross_entropy(model(x), y).backward()
            with Collectives() as collectives:
                optimizer.step()
            sent.append(collectives.calls)
        return sent[-2:]

    shards = [4 * -(-o // 2) * n for i, o in LINEARS for n in (i, 1)]
    scattered = [("reduce-scatter", 4 * 12 * 2 * 2)] if kind is MBF else []
    # Rows, and what they became: columns.
    exchanged = ("all-to-all", 4 * 2 * sum(-(-o // 2) * -(-(i + 1) // 2) for i, o in LINEARS))
    turned = [exchanged] * 2 if kind is EKFACAdam else []  # second moments, in a new basis
    for refresh, other in in_threads(work, 2):
        *first, (name, size) = refresh[: len(scattered) + 1]
        rest = refresh[len(scattered) + 1 :]
        assert first == scattered
        assert name == "all-reduce"
        # Three counts of each of four layers, in three parts, and four flags.
        assert 4 * numbers <= size <= 4 * (numbers + (3 * 3 + 4) * 4)
        assert rest == [*turned, *other]
        sizes = [size for name, size in other if name == "all-gather"]
        assert sizes == [gathers * sum(shards)] * gathers  # for some million numbers
        # Of eight parameters three sums for the bounds and two counts; of the normalisation's Adam two means, and those
        # of second moments in three bases.
        sums = sum(size for name, size in other if name == "all-reduce")
        assert sums <= 8 * (3 + 2) * 8 + 2 * 4 + 3 * 8
        assert [call for call in other if call[0] == "all-to-all"] == [exchanged] * exchanges
        assert {name for name, _ in other} == {"all-reduce", "all-gather" if kind is MBF else "all-to-all"}


class Attending(nn.Module):
    """Weights that functions apply: three matrices in one, and one that is used outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1) * torch.tensor([[1.0], [0.5]])
        mixed = self.attention(h, h, h, need_weights=False)[0].mean(1)
        out: Tensor = F.linear(torch.tanh(mixed), self.head.weight, self.head.bias)
        return out


def attending() -> Attending:
    with making:
        torch.manual_seed(0)
        return Attending().double()


@pytest.mark.parametrize(
    "settings",
    ["AdaFisher", "KFAC", *(pytest.param(name, marks=pytest.mark.slow) for name in ("MBF", "EKFACAdam"))],
)
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("by_layer", [False, True])
def test_weights_that_functions_apply(settings: str, by_layer: bool) -> None:
    kind, made = READERS[settings]

    def work(rank: int) -> tuple[list[Tensor], list[Any]]:
        model = attending()
        mesh = init_device_mesh("cpu", (2,))
        if by_layer:
            fully_shard(model.attention, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = kind(model, **made)
        train(model, optimizer, torch.float64, rank, 2)
        return whole(model), [(row.name, row.rule) for row in optimizer.explain()]

    model = attending()
    optimizer = kind(model, **made)
    train(model, optimizer, torch.float64)
    rules = [(row.name, row.rule) for row in optimizer.explain()]
    assert not any(rule == "fallback" for _, rule in rules)
    for found, served in in_threads(work, 2):
        assert served == rules
        assert_close(found, whole(model), torch.float64)


@pytest.mark.parametrize("kind", [AdaFisher, MBF, KFAC, EKFACAdam])
def test_readers_made_before_their_model_is_sharded(kind: Any) -> None:
    """They follow the parameters by name in the first step, whose statistics have gone by."""

    def work(rank: int) -> list[str]:
        model = network(torch.float64)
        optimizer = kind(model, lr=1e-3)
        train(sharded(model, (2,)), optimizer, torch.float64, rank, 2)
        assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
        return [row.rule for row in optimizer.explain()]

    assert in_threads(work, 2) == [[row.rule for row in kind(network(torch.float64)).explain()]] * 2


@pytest.mark.parametrize("made_before", [False, True])
@pytest.mark.parametrize("settings", ["MBF", pytest.param("AdaFisher", marks=pytest.mark.slow)])
def test_models_that_have_no_memory_when_they_are_sharded(settings: str, made_before: bool) -> None:
    kind, made = READERS[settings]

    def work(rank: int) -> list[Tensor]:
        with torch.device("meta"):
            model: nn.Module = empty()
        model = sharded(model, (2,))
        optimizer = kind(model, **made) if made_before else None
        model.to_empty(device="cpu")
        with torch.no_grad():
            for p, q in zip(model.parameters(), network(torch.float64).parameters(), strict=True):
                p.copy_(distribute_tensor(q.detach(), p.device_mesh, p.placements))  # type: ignore[attr-defined]
        train(model, optimizer or kind(model, **made), torch.float64, rank, 2)
        return whole(model)

    model = network(torch.float64)
    train(model, kind(model, **made), torch.float64)
    for found in in_threads(work, 2):
        assert_close(found, whole(model), torch.float64)


@pytest.mark.parametrize("kind", [AdaFisher, MBF, KFAC])
def test_readers_know_the_processes(kind: Any) -> None:
    """Those of the mesh, which may be some of all."""

    def work(rank: int) -> list[Tensor]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "shard"))
        model = network(torch.float64)
        fully_shard(model, mesh=mesh["shard"])
        train(model, kind(model, lr=1e-3), torch.float64, mesh.get_local_rank("shard"), 2)
        return whole(model)

    model = network(torch.float64)
    train(model, kind(model, lr=1e-3), torch.float64)
    for found in in_threads(work, 4):
        assert_close(found, whole(model), torch.float64)


@pytest.mark.filterwarnings("ignore:.*layers have a gradient, and a refresh saw no use of them")
@pytest.mark.parametrize(
    "settings",
    [
        "AdaFisher, release",
        "MBF",
        "KFAC beside Adam",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("EKFAC", "EKFACAdam")),
    ],
)
def test_states_of_readers_are_loaded(settings: str) -> None:
    kind, made = READERS[settings]

    def work(rank: int) -> tuple[list[Tensor], list[Tensor]]:
        found = []
        for asked in (False, True):
            model = sharded(network(torch.float64), (2,))
            optimizer = kind(model, **made)
            if asked:
                state = get_optimizer_state_dict(model, optimizer)["state"]["0.weight"]
                assert state[kind.moment].placements == next(model.parameters()).placements  # type: ignore[attr-defined]
            train(model, optimizer, torch.float64, rank, 2)
            if asked:
                fresh = kind(model, **made)
                set_optimizer_state_dict(model, fresh, get_optimizer_state_dict(model, optimizer))
                optimizer.close()
                optimizer = fresh
            train(model, optimizer, torch.float64, rank, 2)
            found.append(whole(model))
        return found[0], found[1]

    for plain, resumed in in_threads(work, 2):
        for p, q in zip(plain, resumed, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("how", ["offloaded", "checkpointed"])
@pytest.mark.parametrize("settings", ["MBF", *(pytest.param(s, marks=pytest.mark.slow) for s in ("AdaFisher", "KFAC"))])
def test_parameters_on_the_cpu_and_activations_that_are_made_again(settings: str, how: str) -> None:
    kind, made = READERS[settings]

    def work(rank: int) -> list[Tensor]:
        model = network(torch.float64)
        if how == "offloaded":
            sharded(model, (2,), offload_policy=CPUOffloadPolicy(pin_memory=False))
        else:
            for i in (0, 3):
                model[i] = checkpoint_wrapper(model[i])
            sharded(model, (2,))
        train(model, kind(model, **made), torch.float64, rank, 2)
        return whole(model)

    model = network(torch.float64)
    train(model, kind(model, **made), torch.float64)
    for found in in_threads(work, 2):
        assert_close(found, whole(model), torch.float64)


@pytest.mark.parametrize("settings", ["AdaFisher", "MBF", "KFAC"])
def test_mixed_precision(settings: str) -> None:
    """Statistics are those of one process that trains in bfloat16 on the same parts; weights are in float32.

    Those of that process are rounded to 8 bits, before the step and after it.
    """
    kind, made = READERS[settings]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def one_step(model: nn.Module, optimizer: Any, dtype: torch.dtype, parts: list[int]) -> dict[str, Tensor]:
        for part in parts:
            x, y = (half.chunk(2)[part] for half in batch(0, dtype))
            (F.cross_entropy(model(x), y) / len(parts)).backward()
        optimizer.step()
        states = ((name, optimizer.state[p]) for name, p in model.named_parameters())
        found = {f"{n} {k}": v for n, state in states for k, v in state.items() if k in kind.statistics_state}
        return dict(zip(found, map(all_of, found.values()), strict=True))

    def work(rank: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        model = sharded(network(torch.float32), (2,), mp_policy=policy)
        found = one_step(model, kind(model, **made), torch.float32, [rank])
        return whole(model), found

    twin = network(torch.bfloat16)
    expected = one_step(twin, kind(twin, **made), torch.bfloat16, [0, 1])
    for weights, found in in_threads(work, 2):
        assert len(found) > 8
        assert found.keys() == expected.keys()
        for name, statistic in expected.items():
            assert_close([found[name]], [statistic], torch.float32)
        for p, q in zip(weights, whole(twin), strict=True):
            assert p.dtype == torch.float32
            assert float((p - q.float()).abs().max()) <= 2 * 2**-8 * float(p.abs().max())


@pytest.mark.parametrize("kind", [AdaFisher, MBF, KFAC])
def test_readers_accumulate(kind: Any) -> None:
    def work(rank: int) -> list[Tensor]:
        model = sharded(network(torch.float64), (2,))
        train(model, kind(model, lr=1e-3), torch.float64, rank, 2, parts=2)
        return whole(model)

    model = network(torch.float64)
    train(model, kind(model, lr=1e-3), torch.float64)
    for found in in_threads(work, 2):
        assert_close(found, whole(model), torch.float64)


OVER_GLOO: dict[str, tuple[Any, dict[str, Any]]] = {
    "SOFIM": (lambda model, **made: SOFIM(model.parameters(), **made), SOFIMS["momentum"]),
    **{name: READERS[name] for name in ("AdaFisher", "MBF", "EKFACAdam")},
    "KFAC": (KFAC, {**READERS["KFAC beside Adam"][1], "inverse_sharing": "one_owner"}),
}


def _state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _load(model: nn.Module, optimizer: Any, folder: Path, **how: Any) -> None:
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder, **how)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _over_gloo(rank: int, folder: Path) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Trained from the beginning, with a checkpoint, and trained on from that of one process."""
    found = {}
    for name, (make, made) in OVER_GLOO.items():
        model, other = (sharded(network(torch.float64), (2,)) for _ in range(2))
        optimizer = make(model, **made)
        train(model, optimizer, torch.float64, rank, 2)
        dcp.save(_state(model, optimizer), checkpoint_id=folder / f"{name} of two")
        resumed = make(other, **made)
        _load(other, resumed, folder / f"{name} of one")
        train(other, resumed, torch.float64, rank, 2)
        found[name] = whole(model), whole(other)
    return found


@needs_processes
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:.*layers have a gradient, and a refresh saw no use of them")
def test_checkpoints_of_two_processes_in_one_and_of_one_in_two(tmp_path: Path) -> None:
    ours = {}
    for name, (make, made) in OVER_GLOO.items():
        model = network(torch.float64)
        ours[name] = model, make(model, **made)
        train(*ours[name], torch.float64)
        dcp.save(_state(*ours[name]), checkpoint_id=tmp_path / f"{name} of one", no_dist=True)
    once = {name: [p.clone() for p in whole(model)] for name, (model, _) in ours.items()}
    for model, optimizer in ours.values():
        train(model, optimizer, torch.float64)
    for found in in_two_processes(functools.partial(_over_gloo, folder=tmp_path), tmp_path):
        for name, (trained_once, trained_on) in found.items():
            assert_close(trained_once, once[name], torch.float64)
            assert_close(trained_on, whole(ours[name][0]), torch.float64)
    for name, (make, made) in OVER_GLOO.items():
        twin = network(torch.float64)
        resumed = make(twin, **made)
        _load(twin, resumed, tmp_path / f"{name} of two", no_dist=True)
        train(twin, resumed, torch.float64)
        assert_close(whole(twin), whole(ours[name][0]), torch.float64)


@pytest.mark.parametrize("kind", [KFAC, pytest.param(MBF, marks=pytest.mark.slow)])
def test_labels_are_drawn_through_what_was_gathered(kind: Any) -> None:
    """Each process draws its own, so the same ones draw where gradients are averaged by hand."""

    def work(rank: int, shards: bool) -> list[Tensor]:
        model = network(torch.float64)
        model = sharded(model, (2,)) if shards else model
        group = {} if shards else {"process_group": dist.group.WORLD}
        optimizer = kind(model, lr=1e-2, fisher="sampled", **group)
        for step in range(STEPS):
            optimizer.zero_grad()
            x, y = (part.chunk(2)[rank] for part in batch(step, torch.float64))
            output = model(x)
            optimizer.sample(output)
            F.cross_entropy(output, y).backward()
            for p in () if shards else model.parameters():
                assert p.grad is not None
                dist.all_reduce(p.grad)
                p.grad /= 2
            optimizer.step()
        assert optimizer.statistics.refresh > 2
        return whole(model)

    found, expected = (in_threads(functools.partial(work, shards=shards), 2) for shards in (True, False))
    assert_close(found[0], expected[0], torch.float64)
    assert_close(found[1], expected[0], torch.float64)
