"""Processes whose parts of a batch are unlike: none at all, some layer not used, numbers that are not finite.

All take the steps of one process on the joint batch, where the parameters are sharded and where they are not.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC, SOFIM
from tests.shards import READERS, SOFIMS, assert_close, making, whole
from tests.threads import in_threads

pytestmark = pytest.mark.usefixtures("one_thread")

WORLD, STEPS, ROWS = 2, 6, 64
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SOFIM": (lambda model, **made: SOFIM(model.parameters(), **made), SOFIMS["momentum"]),
    **{name: READERS[name] for name in ("AdaFisherW", "MBF", "KFAC", "EKFAC", "EKFACAdam")},
    "MBF, convolution": READERS["MBF"],
    "KFAC, one owner": (KFAC, {**READERS["KFAC"][1], "inverse_sharing": "one_owner"}),
    "EKFAC, one owner": (EKFAC, {**READERS["EKFAC"][1], "inverse_sharing": "one_owner"}),
}


class Gated(nn.Module):
    """Its layer in the middle takes the rows whose first number is positive, and nothing calls it if there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(6, 9), nn.Linear(9, 3), nn.LayerNorm(9)
        self.middle: nn.Module = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = torch.tanh(self.norm(self.first(x))), x[:, 0] > 0
        if bool(gate.any()):
            h = h.index_add(0, gate.nonzero()[:, 0], torch.tanh(self.middle(h[gate])))
        out: Tensor = self.last(h)
        return out


class Pictures(nn.Module):
    """A convolution of pictures of 3 x 3 numbers, of which three channels are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.convolution(x.view(-1, 1, 3, 3))
        return out.sum(1).flatten(1)


def built(name: str) -> Gated:
    with making:
        torch.manual_seed(0)
        model = Gated()
        if name == "MBF, convolution":
            model.middle = Pictures()
        return model.double()


def batch(step: int, what: str) -> tuple[list[Tensor], list[Tensor]]:
    """The parts of two processes, which are unlike in some steps."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(ROWS, 6, generator=generator).double(), torch.randint(3, (ROWS,), generator=generator)
    part = step // 2 % 2  # of whom it is
    own = slice(part * ROWS // 2, (part + 1) * ROWS // 2)
    if what == "unused" and step % 2:
        x[own, 0] = -x[own, 0].abs()
    if what == "not finite" and step in (1, 3):
        x[own.start] = math.nan
    parts = [0, ROWS][:: 1 - 2 * part] if what == "empty" and step % 2 else [ROWS // 2] * 2
    return list(x.split(parts)), list(y.split(parts))


def sharded(model: nn.Module) -> None:
    """As one, so that all processes gather a layer that some do not use."""
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    assert isinstance(model, FSDPModule)
    model.set_reduce_scatter_unused_params(True)


def averaged(model: nn.Module) -> None:
    """The gradients, as DistributedDataParallel does it with ``find_unused_parameters``."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
        p.grad /= WORLD


def train(name: str, what: str, rank: int | None = None, shards: bool = False) -> list[Tensor]:
    """The parameters in the end; of one process on all parts if it has no number."""
    make, made = OPTIMIZERS[name]
    model: nn.Module = built(name)
    if shards:
        sharded(model)
    elif rank is not None and name != "SOFIM":
        made = {**made, "process_group": dist.group.WORLD}
    optimizer = make(model, **made)
    for step in range(STEPS):
        xs, ys = batch(step, what)
        x, y = (torch.cat(xs), torch.cat(ys)) if rank is None else (xs[rank], ys[rank])
        if step == 3:  # what no step takes counts for nothing
            F.cross_entropy(model(x), y, reduction="sum").backward()
            optimizer.zero_grad()
        model.zero_grad()
        loss = F.cross_entropy(model(x), y, reduction="sum") / ROWS
        (loss if rank is None else WORLD * loss).backward()
        if rank is not None and not shards:
            averaged(model)
        optimizer.step()
    return whole(model)


@pytest.mark.parametrize(
    "name", ["KFAC", *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS if name != "KFAC")]
)
@pytest.mark.parametrize("discards", [False, True])
def test_micro_batches_are_as_processes(name: str, discards: bool) -> None:
    """Of which some do not use a layer; what no step takes, and derivatives that are asked for, count for nothing."""
    make, made = OPTIMIZERS[name]
    model = built(name)
    optimizer = make(model, **made)
    for step in range(STEPS):
        parts = list(zip(*batch(step, "unused"), strict=True))
        if discards:
            for x, y in parts:
                F.cross_entropy(model(x), y).backward()
        model.zero_grad()
        for x, y in parts:
            if discards:
                torch.autograd.grad(model(x.clone().requires_grad_()).sum(), [*model.first.parameters()])
            (F.cross_entropy(model(x), y, reduction="sum") / ROWS).backward()
        optimizer.step()
    assert_close([p.detach() for p in model.parameters()], train(name, "unused"), torch.float64)


FAST = {
    ("KFAC", "unused"),
    ("MBF", "empty"),
    ("MBF, convolution", "unused"),
    ("AdaFisherW", "unused"),
    ("EKFAC, one owner", "unused"),
    ("EKFAC", "not finite"),
    ("SOFIM", "empty"),
}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        pytest.param(name, what, marks=() if (name, what) in FAST else pytest.mark.slow)
        for what in ("empty", "unused", "not finite")
        for name in OPTIMIZERS
    ],
)
@pytest.mark.parametrize("shards", [True, False])
def test_all_take_the_steps_of_one(name: str, what: str, shards: bool) -> None:
    if shards and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        pytest.skip("this torch has no gradients of layers that some processes do not use")
    expected = train(name, what)
    assert all(bool(p.isfinite().all()) for p in expected)
    for found in in_threads(lambda rank: train(name, what, rank, shards), WORLD):
        assert_close(found, expected, torch.float64)
