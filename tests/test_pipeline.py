"""Stages of a pipeline in two processes, compared with one process that has the whole model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.nn import functional as F

from fisher_kernels import EKFAC, KFAC, MBF, SOFIM, AdaFisherW, EKFACAdam
from tests.processes import in_two_processes, needs_processes
from tests.shards import READERS, SOFIMS, assert_close

pytestmark = [needs_processes, pytest.mark.usefixtures("one_thread")]

STEPS, BATCH, MICRO = 6, 64, 4
CLIP = 1e-4
"""So small that it binds."""

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "AdaFisherW": (AdaFisherW, {"lr": 1e-3, "weight_decay": 0.1}, False),
    "MBF": (MBF, {"lr": 1e-2, "kl_clip": CLIP}, True),
    "MBF, packed": (MBF, {**READERS["MBF, packed"][1], "lr": 1e-2, "kl_clip": CLIP}, True),
    "KFAC": (KFAC, {"lr": 0.1, "kl_clip": CLIP}, True),
    "EKFAC": (EKFAC, {"lr": 0.03, "kl_clip": CLIP}, True),
    "EKFACAdam": (EKFACAdam, {"lr": 0.01}, False),
    **{
        f"SOFIM, {name}": (lambda model, **made: SOFIM(model.parameters(), **made), made, True)
        for name, made in SOFIMS.items()
    },
}
"""With whether their steps depend on those of other stages."""


def layers() -> list[nn.Module]:
    """Four parts, of which neighbours follow one another."""
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh()).double(),
        nn.Sequential(nn.Linear(9, 8), nn.Tanh()).double(),
        nn.Sequential(nn.Linear(8, 7, bias=False), nn.Tanh()).double(),
        nn.Linear(7, 3).double(),
    ]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (BATCH,), generator=generator)


def alone(name: str) -> list[Tensor]:
    kind, made, _ = OPTIMIZERS[name]
    model = nn.Sequential(*layers())
    optimizer = kind(model, **made)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    if "kl_clip" in made:
        assert min(row.get("trust_scale", 1.0) for row in optimizer.metrics().values()) < 1
    return [p.detach() for p in model.parameters()]


def schedule_of(kind: Any, parts: list[tuple[int, nn.Module]], scales: bool = True) -> Any:
    """A schedule of the stages that this process has, given their numbers."""
    several = kind not in (ScheduleGPipe, Schedule1F1B)
    stages = [PipelineStage(part, i, 4 if several else 2, torch.device("cpu")) for i, part in parts]
    loss = F.cross_entropy if scales else lambda out, y: F.cross_entropy(out, y) / MICRO
    return kind(stages if several else stages[0], MICRO, loss_fn=loss, scale_grads=scales)


def parts_of(kind: Any, rank: int) -> list[tuple[int, nn.Module]]:
    parts = layers()
    if kind in (ScheduleGPipe, Schedule1F1B):
        return [(rank, nn.Sequential(*parts[2 * rank : 2 * rank + 2]))]
    return [(i, parts[i]) for i in (rank, rank + 2)]


def staged(rank: int, name: str, kind: Any, scales: bool = True, **given: Any) -> list[Tensor]:
    make, made, has_group = OPTIMIZERS[name]
    parts = parts_of(kind, rank)
    schedule = schedule_of(kind, parts, scales)
    model = parts[0][1] if len(parts) == 1 else nn.ModuleList(part for _, part in parts)
    group = {"pipeline_group": dist.group.WORLD} if has_group else {}
    optimizer = make(model, **{**made, **group, **given})
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        schedule.step(*([x] if rank == 0 else []), **({"target": y} if rank == 1 else {}))
        optimizer.step()
    return [p.detach() for p in model.parameters()]


FAST = {("KFAC", ScheduleInterleaved1F1B), ("MBF", Schedule1F1B), ("SOFIM, gradient", Schedule1F1B)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (name, kind) in FAST else pytest.mark.slow)
        for name in OPTIMIZERS
        for kind in (Schedule1F1B, ScheduleInterleaved1F1B)
    ],
)
def test_the_steps_are_those_of_the_whole_model(name: str, kind: Any, tmp_path: Path) -> None:
    found = in_two_processes(functools.partial(staged, name=name, kind=kind), tmp_path)
    if kind is ScheduleInterleaved1F1B:  # each has every other part
        first, second = ([ps[:4], ps[4:5]] if i == 0 else [ps[:2], ps[2:]] for i, ps in enumerate(found))
        found = [*first[0], *second[0]], [*first[1], *second[1]]
    assert_close([*found[0], *found[1]], alone(name), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdaFisherW", "KFAC"])
def test_losses_that_are_divided_beforehand(name: str, tmp_path: Path) -> None:
    work = functools.partial(staged, name=name, kind=ScheduleGPipe, scales=False)
    first, second = in_two_processes(work, tmp_path)
    assert_close([*first, *second], alone(name), torch.float64)


def _frozen(rank: int, name: str) -> list[Tensor]:
    """With a stage that is not trained for some steps, and one that Adam trains alone."""
    make, made, _ = OPTIMIZERS[name]
    part = [nn.LayerNorm(6), nn.Linear(6, 3)][rank].double()
    schedule = schedule_of(Schedule1F1B, [(rank, part)])
    optimizer = make(part, **made, pipeline_group=dist.group.WORLD)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        schedule.step(*([x] if rank == 0 else []), **({"target": y} if rank == 1 else {}))
        if step == 3 and rank == 0:
            optimizer.zero_grad()
        optimizer.step()
    return [p.detach() for p in part.parameters()]


@pytest.mark.parametrize(
    "name", ["KFAC", *(pytest.param(name, marks=pytest.mark.slow) for name in ("MBF", "SOFIM, momentum"))]
)
def test_a_stage_without_gradients_takes_part(name: str, tmp_path: Path) -> None:
    for p in (p for found in in_two_processes(functools.partial(_frozen, name=name), tmp_path) for p in found):
        assert bool(p.isfinite().all())


def _refused(rank: int) -> list[str]:
    told = []

    def ends(name: str, kind: Any = Schedule1F1B, **given: Any) -> None:
        try:
            staged(rank, name, kind, **given)
        except (ValueError, RuntimeError) as error:
            told.append(str(error))
        dist.barrier()

    for name in ("MBF", "KFAC", "SOFIM, momentum"):
        ends(name, pipeline_group=None)
    ends("KFAC", fisher="sampled")
    ends("AdaFisherW", ScheduleInterleavedZeroBubble)
    return told


def test_what_is_refused(tmp_path: Path) -> None:
    for told in in_two_processes(_refused, tmp_path):
        assert len(told) == 5
        for message, words in zip(
            told,
            (
                "kl_clip bounds the step of all parameters",
                "kl_clip bounds the step of all parameters",
                "these are those of a stage",
                "fisher is 'sampled'",
                "ScheduleInterleavedZeroBubble makes the derivatives of inputs and of parameters",
            ),
            strict=True,
        ):
            assert words in message


def test_what_is_no_group() -> None:
    for kind in (MBF, KFAC, EKFAC):
        with pytest.raises(TypeError, match="pipeline_group is 'all', expected a torch"):
            kind(nn.Linear(2, 2), pipeline_group="all")
    with pytest.raises(TypeError, match="pipeline_group is 'all', expected a torch"):
        SOFIM(nn.Linear(2, 2).parameters(), pipeline_group="all")  # type: ignore[arg-type]
