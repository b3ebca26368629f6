"""Checkpoints that go on with another number of processes, or on another mesh, as training that does not stop."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC, MBF, SOFIM, AdaFisherW, EKFACAdam
from fisher_kernels.optim import shares
from tests.shards import assert_close, batch, network, sharded, whole
from tests.threads import in_threads

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]

BEFORE, AFTER = 8, 7
"""Steps: the last of the first ones is between two refreshes, and between two inversions."""

SETTINGS: dict[str, Any] = {"refresh": "constant", "update_interval": 3, "inverse_interval": 6}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdaFisherW": (AdaFisherW, {"lr": 1e-3, "weight_decay": 0.1, "update_interval": 3}),
    "MBF": (MBF, {"lr": 1e-3, **SETTINGS}),
    "KFAC": (KFAC, {"lr": 0.1, **SETTINGS}),
    "EKFAC": (EKFAC, {"lr": 0.03, **SETTINGS}),
    "KFAC, one owner": (KFAC, {"lr": 0.1, "inverse_sharing": "one_owner", **SETTINGS}),
    "EKFAC, one owner": (EKFAC, {"lr": 0.03, "inverse_sharing": "one_owner", **SETTINGS}),
    "EKFACAdam": (EKFACAdam, {"lr": 0.01, **SETTINGS}),
    "SOFIM": (lambda model, **made: SOFIM(model.parameters(), **made), {"lr": 0.05}),
}

TENSOR = "2 x 2 tensor"
MESHES: dict[str, tuple[int, ...]] = {"1": (), "2": (2,), "3": (3,), "4": (4,), "2 x 2": (2, 2), TENSOR: (2, 2)}
"""None in one process, FSDP2 on up to four, HSDP, and FSDP2 of layers that are divided on the last dimension."""

GO_ON = {
    "4": ("1", "2", "3", "2 x 2", TENSOR),
    "2 x 2": ("1", "4"),
    "1": ("3", "2 x 2", TENSOR),
    TENSOR: ("1", "2", "4"),
}


def divided(model: nn.Module) -> None:
    """By rows and columns that two processes do not divide evenly, and then by ``fully_shard``."""
    mesh = init_device_mesh("cpu", MESHES[TENSOR], mesh_dim_names=("data", "tensor"))
    plan = {
        "0": ColwiseParallel(output_layouts=Replicate()),
        "3": ColwiseParallel(use_local_output=False),
        "5": RowwiseParallel(),
    }
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])


def made(name: str, mesh: str) -> tuple[nn.Module, Any]:
    kind, settings = OPTIMIZERS[name]
    model: nn.Module = network(torch.float64)
    if mesh == TENSOR:
        divided(model)
    elif MESHES[mesh]:
        sharded(model, MESHES[mesh])
    return model, kind(model, **settings)


def train(model: nn.Module, optimizer: Any, steps: range, rank: int, mesh: str) -> None:
    """On a share of each batch, the loss of which is that share of the mean."""
    shape = MESHES[mesh]
    if mesh == TENSOR:  # those that divide a layer are neighbours, and have the same samples
        shape, rank = shape[:-1], rank // shape[-1]
    world = torch.Size(shape).numel()
    for step in steps:
        x, y = batch(step, torch.float64)
        share = slice(rank, None, world)
        optimizer.zero_grad()
        (world * F.cross_entropy(model(x[share]), y[share], reduction="sum") / len(x)).backward()
        optimizer.step()


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def on(mesh: str, work: Any) -> list[Any]:
    """What a function returns in each process of a mesh; one alone is this one."""
    return in_threads(work, torch.Size(MESHES[mesh]).numel()) if MESHES[mesh] else [work(0)]


def save(rank: int, name: str, mesh: str, folder: Path) -> None:
    model, optimizer = made(name, mesh)
    train(model, optimizer, range(BEFORE), rank, mesh)
    dcp.save(everything(model, optimizer), checkpoint_id=folder, no_dist=mesh == "1")


def go_on(rank: int, name: str, mesh: str, folder: Path) -> list[Tensor]:
    model, optimizer = made(name, mesh)
    state = everything(model, optimizer)
    dcp.load(state, checkpoint_id=folder, no_dist=mesh == "1")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, range(BEFORE, BEFORE + AFTER), rank, mesh)
    # Not by full_tensor(), which takes no rows that are divided twice, and not evenly.
    return [shares.whole(p.detach()) for p in model.parameters()]


FAST = {("KFAC, one owner", "4"), ("EKFAC", "2 x 2"), ("AdaFisherW", "2 x 2"), ("MBF", TENSOR)}


@pytest.mark.parametrize(
    ("name", "before"),
    [
        pytest.param(name, before, marks=() if (name, before) in FAST else pytest.mark.slow)
        for name in OPTIMIZERS
        for before in GO_ON
    ],
)
def test_it_goes_on_as_one_that_did_not_stop(name: str, before: str, tmp_path: Path) -> None:
    model, optimizer = made(name, "1")
    train(model, optimizer, range(BEFORE + AFTER), 0, "1")
    on(before, functools.partial(save, name=name, mesh=before, folder=tmp_path))
    for after in GO_ON[before]:
        for found in on(after, functools.partial(go_on, name=name, mesh=after, folder=tmp_path)):
            assert_close(found, whole(model), torch.float64)
