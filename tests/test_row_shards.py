"""Blocks that are divided with the rows of their parameters, compared with one process on the joint batch."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from fisher_kernels import MBF
from fisher_kernels.curvature.scattered import flag, flagged
from tests.collectives import Collectives, watched
from tests.shards import assert_close, making, sharded, whole
from tests.threads import in_threads

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:MBF. .* of the trained parameters have no layer rule"),
]

ROWS, STEPS = 24, 6
MESHES: dict[str, tuple[int, ...]] = {"1": (), "2": (2,), "3": (3,), "4": (4,), "2 x 2": (2, 2)}


class Scale(nn.Module):
    """A parameter that has no rule."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, channels)[:, None, None].repeat(1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.repeat(1, 2, 2)


def network() -> nn.Sequential:
    """Rows that two, three and four processes divide unevenly, fewer of them than processes, and both ways round."""
    with making:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 7, 3, padding=1),
            Scale(7),
            nn.Tanh(),
            nn.ConvTranspose2d(7, 3, 2, bias=False),
            nn.GroupNorm(3, 3),
            nn.Tanh(),
            nn.Conv2d(3, 1, 2),
            nn.Flatten(),
            nn.Linear(16, 5),
            nn.LayerNorm(5),
            nn.Linear(5, 3),
        ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (ROWS,), generator=generator)


def made(mesh: str, **settings: Any) -> tuple[nn.Module, MBF]:
    model: nn.Module = network()
    if MESHES[mesh]:
        sharded(model, MESHES[mesh])
    return model, MBF(model, **{"lr": 1e-2, **settings})


def backward(model: nn.Module, step: int, rank: int, mesh: str) -> None:
    x, y = (part[rank :: torch.Size(MESHES[mesh]).numel()] for part in batch(step))
    F.cross_entropy(model(x), y).backward()


def train(model: nn.Module, optimizer: MBF, rank: int, mesh: str, steps: range = range(STEPS)) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, rank, mesh)
        optimizer.step()


def on(mesh: str, work: Any) -> list[Any]:
    """What a function returns in each process of a mesh; one alone is this one."""
    return in_threads(work, torch.Size(MESHES[mesh]).numel()) if MESHES[mesh] else [work(0)]


LATE = {"overlap": True, "refresh": "constant", "update_interval": 2, "inverse_interval": 3}
BY_OUTPUT = {"inverse_storage": "packed", "linear_blocks": "per_output", "max_relative_step": 0.01}
DECAYED = {"weight_decay": 0.1, "decoupled": False, "kl_along": "gradient", "inverse_sharing": "one_owner"}


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        ("3", BY_OUTPUT),
        ("2 x 2", DECAYED),
        *(
            pytest.param(mesh, settings, marks=pytest.mark.slow)
            for mesh, settings in (("2", {}), ("4", BY_OUTPUT), ("3", DECAYED), ("2 x 2", LATE), ("4", LATE))
        ),
    ],
)
def test_steps_are_those_of_one_process(mesh: str, settings: dict[str, Any]) -> None:
    def work(rank: int) -> tuple[list[Tensor], dict[str, dict[str, float]], dict[str, int]]:
        model, optimizer = made(mesh, **settings)
        train(model, optimizer, rank, mesh)
        here = {row.name: row.state_bytes for row in optimizer.explain()}
        for name, p in model.named_parameters():
            state = optimizer.state[p]
            if name in ("0.weight", "3.weight"):  # (outputs, inputs, n, n), and the other way round
                assert state["fisher_blocks"].shape[:2] == p.shape[:2]
            if name not in ("8.weight", "10.weight") and "fisher_blocks" in state:
                assert state["fisher_blocks"].placements == p.placements  # type: ignore[attr-defined]
        return whole(model), optimizer.metrics(), here

    model, optimizer = made("1", **settings)
    train(model, optimizer, 0, "1")
    figures = optimizer.metrics()
    for rank, (found, metrics, here) in enumerate(on(mesh, work)):
        assert_close(found, whole(model), torch.float64)
        for name, row in figures.items():
            assert metrics[name] == pytest.approx(row, rel=1e-7)  # a cosine has cancelled
        share = -(-7 // MESHES[mesh][-1])
        own = max(0, min(share, 7 - share * (rank % MESHES[mesh][-1])))
        stored = {"packed": 45, "full": 81}[settings.get("inverse_storage", "full")]
        numbers = 2 * 9 + 2 * (81 + stored * (1 + settings.get("overlap", False)))  # of a row, and the moment
        assert here["0.weight"] == 8 * own * numbers + 4


@pytest.mark.slow
def test_inverses_in_16_bits() -> None:
    """Where sums of another order round an entry to its neighbour, directions change by that much and no more."""
    settings = {"inverse_storage": "bfloat16"}

    def work(rank: int) -> list[Tensor]:
        model, optimizer = made("3", **settings)
        train(model, optimizer, rank, "3")
        assert optimizer.state[next(model.parameters())]["inverse_blocks"].dtype == torch.bfloat16
        return whole(model)

    model, optimizer = made("1", **settings)
    start = [p.clone() for p in whole(model)]
    train(model, optimizer, 0, "1")
    for found in on("3", work):
        for p, q, begin in zip(found, whole(model), start, strict=True):
            assert float((p - q).norm()) <= 2**-8 * float((q - begin).norm())


def test_a_refresh_scatters_rows_and_a_step_gathers_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight of C columns with kernels of n numbers O C n^2 are put in, of which O C n^2 / w come back."""
    watched(monkeypatch)
    world = 3
    settings = {"refresh": "constant", "update_interval": 2, "inverse_interval": 2, "kl_clip": None}

    def work(rank: int) -> list[list[tuple[str, int]]]:
        model, optimizer = made("3", **settings)
        sent = []
        for step in range(2):
            optimizer.zero_grad()
            backward(model, step, rank, "3")
            with Collectives() as seen:
                optimizer.step()
            sent.append(seen.calls)
        return sent

    # Rows, filled up to shares of one size, and numbers of each: three convolutions, two biases, two normalisations.
    sums = [(7, 2 * 81), (7, 1), (7, 3 * 16), (1, 3 * 16), (1, 1), (3, 4), (5, 4)]
    scattered = sum(8 * world * -(-rows // world) * numbers for rows, numbers in sums)
    linear = sum(8 * -(-outputs // world) * (inputs + 1) for inputs, outputs in ((16, 5), (5, 3)))
    for refresh, other in on("3", work):
        calls: dict[str, list[int]] = {}
        for name, size in refresh:
            calls.setdefault(name, []).append(size)
        assert calls["reduce-scatter"] == [scattered]
        assert calls["all-reduce"][0] <= 8 * (17**2 + 6**2 + 7 + 9 + 4 * 7)  # blocks of columns, flags, counts
        assert [size for name, size in other if name == "all-gather"] == [linear]
        assert {name for name, _ in other} == {"all-gather", "all-reduce"}


GO_ON = {"3": ("1", "2", "4"), "1": ("3", "4"), "4": ("2", "2 x 2"), "2 x 2": ("3",)}


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def save(rank: int, mesh: str, folder: Path) -> None:
    model, optimizer = made(mesh, **LATE)
    train(model, optimizer, rank, mesh)
    state = everything(model, optimizer)
    if mesh != "1":
        blocks = state["optimizer"]["state"]["0.weight"]["fisher_blocks"]
        assert blocks.shape == (14, 9, 9)
        assert blocks.placements == next(model.parameters()).placements  # type: ignore[attr-defined]
    dcp.save(state, checkpoint_id=folder, no_dist=mesh == "1")


def go_on(rank: int, mesh: str, folder: Path) -> list[Tensor]:
    model, optimizer = made(mesh, **LATE)
    state = everything(model, optimizer)
    dcp.load(state, checkpoint_id=folder, no_dist=mesh == "1")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, rank, mesh, range(STEPS, 2 * STEPS))
    return whole(model)


@pytest.mark.parametrize("before", ["3", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("1", "4", "2 x 2"))])
def test_checkpoints_go_on_elsewhere(before: str, tmp_path: Path) -> None:
    model, optimizer = made("1", **LATE)
    train(model, optimizer, 0, "1", range(2 * STEPS))
    on(before, functools.partial(save, mesh=before, folder=tmp_path))
    for after in GO_ON[before]:
        for found in on(after, functools.partial(go_on, mesh=after, folder=tmp_path)):
            assert_close(found, whole(model), torch.float64)


def test_states_of_one_process_are_loaded() -> None:
    """By ``torch.distributed.checkpoint``, and back again, from and to plain tensors in memory."""
    model, optimizer = made("1")
    train(model, optimizer, 0, "1")
    saved = get_optimizer_state_dict(model, optimizer)
    weights = get_model_state_dict(model)
    whole_state = StateDictOptions(full_state_dict=True)

    def work(rank: int) -> dict[str, Any]:
        twin, fresh = made("3")
        # Which put what they make of a state into the dictionary that they are given.
        set_model_state_dict(twin, copy.deepcopy(weights), options=whole_state)
        set_optimizer_state_dict(twin, fresh, copy.deepcopy(saved), options=whole_state)
        return get_optimizer_state_dict(twin, fresh, options=whole_state)["state"]

    for found in on("3", work):
        for name, state in saved["state"].items():
            assert found[name].keys() == state.keys()
            for key, value in state.items():
                assert torch.equal(found[name][key], value), (name, key)


def test_blocks_of_another_model_are_refused() -> None:
    def work(rank: int) -> None:
        model, optimizer = made("2")
        train(model, optimizer, rank, "2", range(1))
        state = optimizer.state_dict()
        state["state"][0]["fisher_blocks"] = torch.zeros(13, 9, 9)
        with pytest.raises(ValueError, match="has 13 blocks of a weight, expected 14: it is that of another model"):
            optimizer.load_state_dict(state)

    on("2", work)


def poisoned(rank: int, mesh: str) -> tuple[list[Tensor], list[float], dict[str, dict[str, float]]]:
    """One process has a number in the first row of each sum, or of a gradient, that is not finite."""
    model, optimizer = made(mesh, lr=1e-3)
    scale = model[1].scale  # type: ignore[index]
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step, rank, mesh)
        if step == 1:
            if rank == max(0, torch.Size(MESHES[mesh]).numel() - 1):
                for site in optimizer.statistics.sites:
                    assert site.sums is not None
                    for vector in site.sums.vectors:
                        vector[0] = math.nan
            gradient = scale.grad.to_local() if mesh != "1" else scale.grad
            if mesh == "1" or rank % MESHES[mesh][-1] == 0:  # who has the first row
                gradient[0] = math.nan
        optimizer.step()
    updates = [float(state["fisher_updates"]) for state in optimizer.state.values() if "fisher_updates" in state]
    return whole(model), updates, optimizer.metrics()


@pytest.mark.parametrize("mesh", ["4", pytest.param("2 x 2", marks=pytest.mark.slow)])
def test_what_is_not_finite_in_one_row_is_left_out_of_all(mesh: str) -> None:
    """Some processes have no rows of what is poisoned, or of some sum at all."""
    (expected, updates, figures), *_ = on("1", functools.partial(poisoned, mesh="1"))
    assert updates == [2.0] * len(updates)
    for found, counts, metrics in on(mesh, functools.partial(poisoned, mesh=mesh)):
        assert_close(found, expected, torch.float64)
        assert counts == updates
        for name, row in figures.items():
            assert metrics[name] == pytest.approx(row, rel=1e-7)


def test_what_a_mean_may_make_infinite_is_not_finite() -> None:
    """Who has the largest number would refuse it, and others would not."""
    for dtype in (torch.float32, torch.float64):
        largest = torch.finfo(dtype).max
        for value, is_finite in ((largest, False), (-math.inf, False), (math.nan, False), (largest * 2.0**-33, True)):
            rows = torch.tensor([0.0, value], dtype=dtype)
            assert bool(flag(rows) == 0) == is_finite
            assert bool(flagged(torch.ones(2), flag(rows)).isfinite().all()) == is_finite
    assert bool(flag(torch.zeros(0)) == 0)


def bad(rank: int, mesh: str) -> tuple[list[Tensor], dict[str, dict[str, float]]]:
    """Blocks of two rows are not positive definite with their damping."""
    model, optimizer = made(mesh)
    train(model, optimizer, rank, mesh, range(1))
    blocks = optimizer.state[next(model.parameters())]["fisher_blocks"]
    if mesh == "1":
        blocks[[0, 13]] = -torch.eye(9, dtype=blocks.dtype)
    else:
        local = blocks.to_local().flatten(0, 1)
        if rank == 0:
            local[0] = -torch.eye(9, dtype=blocks.dtype)
        if rank == 2:
            local[-1] = -torch.eye(9, dtype=blocks.dtype)
    train(model, optimizer, rank, mesh, range(1, 3))
    return whole(model), optimizer.metrics()


@pytest.mark.filterwarnings("ignore:.*are not positive definite")
def test_bad_blocks_are_counted_over_all() -> None:
    ((expected, figures),) = on("1", functools.partial(bad, mesh="1"))
    assert figures["0.weight"]["bad_blocks"] >= 2
    for found, metrics in on("3", functools.partial(bad, mesh="3")):
        assert_close(found, expected, torch.float64)
        assert metrics["0.weight"] == pytest.approx(figures["0.weight"], rel=1e-7)


@pytest.mark.slow
def test_a_warm_start() -> None:
    def work(rank: int, mesh: str) -> list[Tensor]:
        model, optimizer = made(mesh)
        world = torch.Size(MESHES[mesh]).numel()

        def loss(step: int) -> Tensor:
            x, y = (part[rank::world] for part in batch(step))
            return F.cross_entropy(model(x), y)

        optimizer.warm_start(range(3), loss, progress=False)
        train(model, optimizer, rank, mesh)
        return whole(model)

    (expected,) = on("1", functools.partial(work, mesh="1"))
    for found in on("4", functools.partial(work, mesh="4")):
        assert_close(found, expected, torch.float64)


def test_another_process_group_has_all_blocks_everywhere() -> None:
    """Gradients are averaged by hand over two shards, of two processes each, that make no mesh of their own."""

    def work(rank: int) -> tuple[tuple[int, ...], bool]:
        model = network()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("by hand", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        optimizer = MBF(model, process_group=dist.group.WORLD)
        backward(model, 0, rank, "4")
        for p in model.parameters():
            local = p.grad.to_local()  # type: ignore[union-attr]
            dist.all_reduce(local, group=mesh.get_group("by hand"))
            local /= 2
        optimizer.step()
        blocks = optimizer.state[next(model.parameters())]["fisher_blocks"]
        return tuple(blocks.shape), hasattr(blocks, "placements")

    assert on("4", work) == [((14, 9, 9), False)] * 4
