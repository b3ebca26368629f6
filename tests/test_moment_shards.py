"""Second moments in an eigenbasis, of which each process has columns, compared with one process on the joint batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from fisher_kernels import EKFAC, EKFACAdam
from fisher_kernels.curvature.scattered import Division, scatter
from tests.shards import assert_close, making, sharded, whole
from tests.threads import in_threads

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 96
TURNS: dict[str, Any] = {"refresh": "constant", "update_interval": 2, "inverse_interval": 4}
SHAPES = {"0.weight": (7, 3), "2.weight": (5, 7), "4.weight": (3, 6)}
"""Rows and columns, that of a bias among them: of four processes the first has too few, and the last no part."""


def network(world: int) -> Any:
    with making:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(
            nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
        ).double()
    return model if world == 1 else sharded(model, (world,))


def train(model: Any, optimizer: Any, rank: int, world: int, steps: range, without: int | None = None) -> None:
    """On parts of a batch. In step ``without`` the weight of the last layer has no gradient."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (ROWS,), generator=generator)
        optimizer.zero_grad()
        (F.cross_entropy(model(x[rank::world]), y[rank::world], reduction="sum") * world / ROWS).backward()
        if step == without:
            model[4].weight.grad = None
        optimizer.step()


def on(world: int, work: Any) -> list[Any]:
    return in_threads(work, world) if world > 1 else [work(0)]


def columns_of(world: int, name: str, rank: int) -> int:
    """How many columns of its second moments a process has."""
    _, n = SHAPES[name]
    size = -(-n // world)
    return max(0, min(size, n - rank * size)) if n >= world else n


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        (EKFAC, 4),
        (EKFACAdam, 4),
        *(pytest.param(kind, world, marks=pytest.mark.slow) for kind in (EKFAC, EKFACAdam) for world in (2, 3)),
    ],
)
def test_steps_are_those_of_one_process(kind: Any, world: int) -> None:
    """In one of them a bias takes a direction without its weight, which is made of all second moments."""

    def work(rank: int, world: int) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Any]]:
        model = network(world)
        optimizer = kind(model, **TURNS)
        train(model, optimizer, rank, world, range(10), without=6)
        moments = {name: optimizer.state[p]["second_moment"] for name, p in model.named_parameters() if name in SHAPES}
        figures = {name: row["cosine_with_sgd"] for name, row in optimizer.metrics().items()}
        details = {row.name: row.detail for row in optimizer.explain()}
        here = {name: x.to_local() if hasattr(x, "to_local") else x for name, x in moments.items()}
        return whole(model), here, {"figures": figures, "details": details}

    expected, _, told = work(0, 1)
    for rank, (found, here, its) in enumerate(on(world, lambda rank: work(rank, world))):
        assert_close(found, expected, torch.float64)
        assert its["figures"] == pytest.approx(told["figures"], rel=1e-9)
        for name, (rows, n) in SHAPES.items():
            assert here[name].shape == (1, rows, columns_of(world, name, rank))
            assert (f"second moments divided among {world} processes" in its["details"][name]) == (n >= world)


@pytest.mark.parametrize("kind", [EKFAC, pytest.param(EKFACAdam, marks=pytest.mark.slow)])
def test_a_whole_state_is_divided_where_it_is_loaded(kind: Any) -> None:
    """As one process has it, and as states of earlier versions have it; one of another shape is refused."""

    def work(rank: int) -> list[Tensor]:
        model = network(3)
        optimizer = kind(model, **TURNS)
        train(model, optimizer, rank, 3, range(5))
        state = optimizer.state_dict()
        for of_one in state["state"].values():
            if "second_moment" in of_one:
                of_one["second_moment"] = of_one["second_moment"].full_tensor()
        fresh = kind(model, **TURNS)
        fresh.load_state_dict(state)
        optimizer.close()
        train(model, fresh, rank, 3, range(5, 10))
        assert fresh.state[model[4].weight]["second_moment"].to_local().shape == (1, 3, 2)
        state["state"][0]["second_moment"] = torch.ones(1, 7, 4)
        with pytest.raises(ValueError, match=r"second moments of shape \(1, 7, 4\), expected \(1, 7, 3\)"):
            fresh.load_state_dict(state)
        return whole(model)

    model = network(1)
    optimizer = kind(model, **TURNS)
    train(model, optimizer, 0, 1, range(10))
    for found in on(3, work):
        assert_close(found, whole(model), torch.float64)


@pytest.mark.parametrize("delayed", [False, True])
def test_what_overflows_in_the_columns_of_one_process_is_refused_by_all(delayed: bool) -> None:
    """Inputs have one feature each, so eigenvectors are features, and one feature is a column of one process."""

    def work(rank: int, world: int) -> tuple[Tensor, Tensor]:
        with making:
            torch.manual_seed(0)
            model: Any = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
        model = model if world == 1 else sharded(model, (world,))
        optimizer = EKFAC(model, refresh="constant", update_interval=1, inverse_interval=100, delayed=delayed)
        (weight,) = model.parameters()
        features = torch.eye(4, dtype=torch.float64)[torch.tensor([0, 0, 1, 2, 2, 2, 3, 3, 3, 3])]
        targets = torch.arange(10) % 3  # those of the first feature differ, so one of them is missed
        seen = []
        for scale in (1.0, 1.0, 1e100, 1.0):  # of the second moments of the first feature: to the fourth power
            x = torch.cat([features[:2] * scale, features[2:]])[rank::world]
            loss = F.cross_entropy(model(x), targets[rank::world], reduction="sum") * scale * world / 10
            optimizer.zero_grad()
            loss.backward()
            weight.grad.zero_()  # weights stay as they are
            optimizer.step()
            moments = optimizer.state[weight]["second_moment"]
            seen.append(moments.full_tensor() if world > 1 else moments.clone())
        return torch.stack(seen), optimizer.state[weight]["moment_updates"]

    expected, updates = work(0, 1)
    assert torch.equal(expected[2], expected[1]) is not delayed
    assert expected.isfinite().all()
    assert expected.max() < 1
    for found, its in in_threads(lambda rank: work(rank, 2), 2):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(its, updates)


@pytest.mark.parametrize("columns", [4, 5, 6, 9])
def test_own_columns_of_a_sum(columns: int) -> None:
    def work(rank: int) -> tuple[Tensor, slice]:
        mesh = init_device_mesh("cpu", (4,))
        division = Division(columns, mesh.get_group(0), (), "cpu", across=True)
        mine = torch.arange(3 * columns, dtype=torch.float64) + rank
        return scatter({0: mine}, {0: division})[0], division.here

    total = 4 * torch.arange(3 * columns, dtype=torch.float64).view(3, columns) + 6
    for found, here in in_threads(work, 4):
        own = total[:, here].t().flatten()
        assert torch.equal(found, own if own.numel() else torch.zeros(1, dtype=torch.float64))
