"""Kronecker factors of which each process has its rows, compared with one process on the joint batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC, EKFACAdam
from tests.collectives import Collectives, watched
from tests.shards import assert_close, making, sharded, whole
from tests.threads import in_threads

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.* of the trained parameters have no layer rule"),
]

ROWS, STEPS = 96, 6
"""More rows than a factor has: eigenvectors of eigenvalues that are all zero would be any."""

TURNS: dict[str, Any] = {"refresh": "constant", "update_interval": 2, "inverse_interval": 4}
OWNERS: dict[str, Any] = {"inverse_sharing": "one_owner"}
MESHES: dict[str, tuple[int, ...]] = {"1": (), "2": (2,), "3": (3,), "4": (4,), "5": (5,), "2 x 2": (2, 2)}
LINEARS = [(32, 11), (11, 3)]


def network() -> nn.Sequential:
    """Factors of more rows than there are processes and of fewer, of several groups, and one that is diagonal."""
    with making:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(6, 4, 2, groups=2),
            nn.ConvTranspose2d(4, 2, 2),
            nn.Flatten(),
            nn.LayerNorm(32),
            nn.Linear(32, 11, bias=False),
            nn.Tanh(),
            nn.Linear(11, 3),
        ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (ROWS,), generator=generator)


def made(mesh: str, kind: Any, **settings: Any) -> tuple[nn.Module, Any]:
    model: nn.Module = network()
    if MESHES[mesh]:
        sharded(model, MESHES[mesh])
    return model, kind(model, **{**TURNS, **OWNERS, **settings})


def train(model: nn.Module, optimizer: Any, rank: int, mesh: str, steps: range = range(STEPS)) -> None:
    """On parts of a batch that may be of unlike sizes."""
    world = torch.Size(MESHES[mesh]).numel()
    for step in steps:
        x, y = (part[rank::world] for part in batch(step))
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y, reduction="sum") * world / ROWS).backward()
        optimizer.step()


def on(mesh: str, work: Any) -> list[Any]:
    """What a function returns in each process of a mesh; one alone is this one."""
    return in_threads(work, torch.Size(MESHES[mesh]).numel()) if MESHES[mesh] else [work(0)]


def rows_here(n: int, processes: int, rank: int) -> int:
    """Of n rows, of which all but the last processes have as many."""
    size = -(-n // processes)
    return max(0, min(size, n - size * rank))


APART = {"params": "bias apart"}
"""The bias of the last layer in a group of its own, so that its column has nothing in common with others."""


def with_groups(mesh: str, kind: Any, settings: dict[str, Any]) -> tuple[nn.Module, Any]:
    if settings.get("params") != APART["params"]:
        return made(mesh, kind, **settings)
    model: nn.Module = network()
    if MESHES[mesh]:
        sharded(model, MESHES[mesh])
    *others, bias = model.parameters()
    return model, kind(model, **TURNS, **OWNERS, params=[{"params": others}, {"params": [bias], "lr": 0.01}])


@pytest.mark.parametrize(
    ("kind", "mesh", "settings"),
    [
        (KFAC, "5", {}),
        (EKFAC, "2 x 2", APART),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (KFAC, "2 x 2", {"max_factor_size": 20}),
                (KFAC, "3", APART),
                (EKFAC, "3", {}),
                (EKFAC, "4", {"max_factor_size": 20}),
                (EKFAC, "5", {"others": "curvature"}),
                (EKFACAdam, "4", {}),
                (EKFACAdam, "2", APART),
            )
        ),
    ],
)
def test_steps_are_those_of_one_process(kind: Any, mesh: str, settings: dict[str, Any]) -> None:
    """And each process has its rows of the averages, to the byte; what is made of them all have."""

    def work(rank: int) -> tuple[list[Tensor], dict[str, Any]]:
        model, optimizer = with_groups(mesh, kind, settings)
        train(model, optimizer, rank, mesh)
        return whole(model), {row.name: row for row in optimizer.explain()}

    model, optimizer = with_groups("1", kind, settings)
    train(model, optimizer, 0, "1")
    alone = {row.name: row.state_bytes for row in optimizer.explain()}
    processes = MESHES[mesh][-1]
    for rank, (found, here) in enumerate(on(mesh, work)):
        assert_close(found, whole(model), torch.float64)

        def others(n: int, place: int = rank % processes) -> int:
            return n - rows_here(n, processes, place)

        for name, sizes, columns in (("6.weight", (11, 32), 32), ("8.weight", (3, 12), 11)):
            divided = [n for n in sizes if processes <= n <= settings.get("max_factor_size", n)]
            less = 8 * columns * others(sizes[0]) + sum(8 * n * others(n) for n in divided)  # of the moment, and these
            less += 0 if kind is KFAC else 8 * sizes[0] * others(sizes[1])  # columns of second moments
            assert here[name].state_bytes == alone[name] - less
            assert f", divided among {processes} processes" in here[name].detail
        assert "divided" not in here["2.weight"].detail  # of two groups


@pytest.mark.parametrize("kind", [KFAC, EKFAC, pytest.param(EKFACAdam, marks=pytest.mark.slow)])
def test_what_a_refresh_and_an_inversion_send(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are scattered in a refresh; in an inversion they go to whom makes it, and what is made goes to all.

    In a step rows of a direction become columns in other processes, and rows again, and EKFACAdam's gradients columns.
    Second moments in a basis lie by columns, which become rows and columns again where it turns.
    """
    watched(monkeypatch)
    world = 3

    def work(rank: int) -> list[list[tuple[str, int]]]:
        with making:
            torch.manual_seed(0)
            model = sharded(nn.Sequential(nn.Linear(32, 11), nn.Tanh(), nn.Linear(11, 3)).double(), (world,))
        optimizer = kind(model, **TURNS, **OWNERS)
        sent = []
        for step in range(7):
            x, y = (part[rank::world] for part in batch(step))
            optimizer.zero_grad()
            F.cross_entropy(model(x.flatten(1)), y).backward()
            with Collectives() as seen:
                optimizer.step()
            sent.append(seen.calls)
        return sent[4:]

    sides = [n for inputs, outputs in LINEARS for n in (inputs + 1, outputs)]
    scattered = sum(8 * world * -(-n // world) * n for n in sides)
    if kind is EKFAC:  # squares of per-sample gradients
        scattered += sum(8 * world * -(-(i + 1) // world) * o for i, o in LINEARS)
    given = 0  # by all of them
    for rank, (turn, plain, refresh) in enumerate(on("3", work)):
        for calls in (turn, refresh):
            assert [size for name, size in calls if name == "reduce-scatter"] == [scattered]
            (first, *_) = (size for name, size in calls if name == "all-reduce")
            most = 4 + 3 * 3 + 4 * 2  # flags of four factors, counts, terms, and what is found of layers
            assert first <= 8 * (most + (2 * 2 if kind is EKFAC else 0))
        part = sum(8 * world * -(-o // world) * -(-(i + 1) // world) for i, o in LINEARS)
        every_step = [part] * (3 if kind is EKFACAdam else 2)
        for calls in (plain, refresh):
            assert [size for name, size in calls if name == "all-to-all"] == every_step
        assert {name for name, _ in plain} == {"all-reduce", "all-to-all"}
        assert "broadcast" not in {name for name, _ in refresh}
        own = sum(8 * rows_here(n, world, rank) * n for n in sides)
        turned = [] if kind is KFAC else [part, part]
        assert [size for name, size in turn if name == "all-to-all"] == [own, *turned, *every_step]
        inverses = sum(size for name, size in turn if name == "broadcast")
        assert inverses == 8 * sum(n * n for n in sides) + 8 * len(LINEARS)  # and how many were bad
        given += own
    assert given == 8 * sum(n * n for n in sides)


def test_what_overflows_in_the_rows_of_one_process_all_refuse() -> None:
    """One entry of a factor does, on its diagonal; what has no row of it, or none at all, refuses the factors too."""

    def steps(rank: int, mesh: str) -> tuple[list[Tensor], list[float]]:
        with making:
            torch.manual_seed(0)
            model: nn.Module = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
        if MESHES[mesh]:
            sharded(model, MESHES[mesh])
        optimizer = KFAC(model, refresh="constant", update_interval=1, inverse_interval=1, **OWNERS)
        world = torch.Size(MESHES[mesh]).numel()
        for step in range(5):
            x, y = batch(step)
            x = x.flatten(1)[:, :6].clone()
            if step == 2:
                x[0, 2] = 1e200  # whose square is not finite, and whose products with others are
            optimizer.zero_grad()
            (F.cross_entropy(model(x[rank::world]), y[rank::world], reduction="sum") * world / ROWS).backward()
            optimizer.step()
        return whole(model), [row["refused_statistics"] for row in optimizer.metrics().values()]

    expected, refused = steps(0, "1")
    assert refused == [1, 1, 0, 0]
    assert all(bool(p.isfinite().all()) for p in expected)
    for found, counts in on("4", lambda rank: steps(rank, "4")):
        assert counts == refused
        assert_close(found, expected, torch.float64)


@pytest.mark.parametrize("kind", [KFAC, pytest.param(EKFAC, marks=pytest.mark.slow)])
def test_settings_that_change(kind: Any) -> None:
    """From whole to divided factors and back, with statistics that come later and work beside training in between."""
    changes = {
        2: {"inverse_sharing": "one_owner"},
        4: {"delayed": True},
        7: {"delayed": False},  # while those of a refresh are on their way
        9: {"inverse_sharing": "every_rank", "overlap": True},
    }

    def work(rank: int, mesh: str) -> tuple[list[Tensor], list[bool]]:
        model, optimizer = made(mesh, kind, inverse_sharing="every_rank", update_interval=2, inverse_interval=2)
        is_divided = []
        for step in range(12):
            for group in optimizer.param_groups:
                group.update(changes.get(step, {}))
            train(model, optimizer, rank, mesh, range(step, step + 1))
            is_divided.append(hasattr(optimizer.state[model[6].weight]["column_factor"], "placements"))  # type: ignore[index]
        return whole(model), is_divided

    expected, _ = work(0, "1")
    for found, is_divided in on("3", lambda rank: work(rank, "3")):
        assert is_divided == [False] * 2 + [True] * 2 + [False] * 3 + [True] * 2 + [False] * 3
        assert_close(found, expected, torch.float64)


class Skipping(nn.Module):
    """Its layer in the middle may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(32, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.flatten(1)))
        out: Tensor = self.last(h if self.skips else h + torch.tanh(self.middle(h)))
        return out


def test_statistics_that_were_sent_whole_are_divided_when_they_come() -> None:
    """Of a layer that the refresh which takes them does not use, so that nothing newer takes their place."""

    def work(rank: int, mesh: str) -> list[Tensor]:
        with making:
            torch.manual_seed(0)
            model: Any = Skipping().double()
        if MESHES[mesh]:
            sharded(model, MESHES[mesh])
        optimizer = KFAC(model, **{**TURNS, "inverse_interval": 2}, **OWNERS, delayed=True)
        for step in range(10):
            optimizer.param_groups[0]["delayed"] = step < 5
            model.skips = step == 6
            train(model, optimizer, rank, mesh, range(step, step + 1))
        return whole(model)

    expected = work(0, "1")
    for found in on("3", lambda rank: work(rank, "3")):
        assert_close(found, expected, torch.float64)


def test_states_go_from_one_setting_to_the_other() -> None:
    """A state of whole factors, as it was once saved, is divided where it is loaded, and the other way round."""

    def work(rank: int) -> list[list[Tensor]]:
        found = []
        for before, after in (("every_rank", "one_owner"), ("one_owner", "every_rank"), ("one_owner", "one_owner")):
            model, optimizer = made("3", KFAC, inverse_sharing=before)
            train(model, optimizer, rank, "3", range(STEPS // 2))
            state = get_optimizer_state_dict(model, optimizer)
            for group in state["param_groups"]:
                group["inverse_sharing"] = after
            fresh = KFAC(model, **TURNS, inverse_sharing=after)
            set_optimizer_state_dict(model, fresh, state)
            optimizer.close()
            train(model, fresh, rank, "3", range(STEPS // 2, STEPS))
            factor = fresh.state[model[6].weight]["column_factor"]  # type: ignore[index]
            assert hasattr(factor, "placements") == (after == "one_owner")
            assert factor.shape == (1, 32, 32)
            found.append(whole(model))
        return found

    model, optimizer = made("1", KFAC)
    train(model, optimizer, 0, "1")
    for found in on("3", work):
        for one in found:
            assert_close(one, whole(model), torch.float64)


def test_a_factor_of_another_shape_is_refused() -> None:
    def work(rank: int) -> str:
        model, optimizer = made("2", KFAC)
        train(model, optimizer, rank, "2", range(1))
        optimizer.state[model[6].weight]["column_factor"] = torch.eye(31).unsqueeze(0)  # type: ignore[index]
        with pytest.raises(ValueError, match=r"a factor of shape \(1, 31, 31\), expected \(1, 32, 32\)") as error:
            optimizer.load_state_dict(optimizer.state_dict())
        return str(error.value)

    assert all("another model" in said for said in on("2", work))
