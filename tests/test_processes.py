"""Which processes add up their statistics: those that train one model together, and no others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from fisher_kernels import KFAC, SOFIM, AdaFisher
from fisher_kernels.curvature import statistics, terms
from tests.processes import in_two_processes, needs_processes
from tests.threads import in_threads

pytestmark = pytest.mark.usefixtures("one_thread")


def built() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def batch(number: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def train(model: nn.Module, optimizer: Any, first: int = 0, averages: bool = False) -> list[Tensor]:
    for step in range(3):
        optimizer.zero_grad()
        model(batch(first + 10 * step)).square().mean().backward()
        for p in model.parameters() if averages else ():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


OF_STRANGERS = "1 other processes are there, and no DistributedDataParallel averages the gradients of this model"


@pytest.mark.parametrize("kind", [AdaFisher, KFAC])
def test_each_trains_a_model_of_its_own(kind: Any) -> None:
    def work(rank: int) -> list[Tensor]:
        model = built()
        return train(model, kind(model, lr=1e-2), rank)

    with pytest.warns(UserWarning, match=f"^{kind.__name__}: {OF_STRANGERS}"):
        found = in_threads(work, 2)
    for rank, params in enumerate(found):
        model = built()
        for p, q in zip(params, train(model, kind(model, lr=1e-2), rank), strict=True):
            assert torch.equal(p, q)


def test_a_backward_has_ended_whoever_keeps_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As what goes through all objects does: the one after it is none within it, and has terms of its own."""
    kept: list[Any] = []
    for kind in (terms._Backward, statistics._Running):
        begin = kind.__init__

        def keeping(self: Any, *args: Any, begin: Any = begin) -> None:
            kept.append(self)
            begin(self, *args)

        with monkeypatch.context() as keeper:
            model = built()
            expected = train(model, KFAC(model, lr=1e-2))
            keeper.setattr(kind, "__init__", keeping)
            twin = built()
            for p, q in zip(train(twin, KFAC(twin, lr=1e-2)), expected, strict=True):
                assert torch.equal(p, q)
    assert len(kept) > 4


def test_a_group_that_is_given_is_taken() -> None:
    """Where gradients are averaged by hand; and one of its own, where they are not."""

    def work(rank: int) -> tuple[list[Tensor], list[Tensor]]:
        together, alone = built(), built()
        groups = [dist.new_group([0]), dist.new_group([1])]
        shared = train(together, AdaFisher(together, lr=1e-2, process_group=dist.group.WORLD), rank, averages=True)
        return shared, train(alone, AdaFisher(alone, lr=1e-2, process_group=groups[rank]), rank)

    (first, alone), (second, other) = in_threads(work, 2)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(alone, other, strict=True))
    model = built()
    for p, q in zip(alone, train(model, AdaFisher(model, lr=1e-2)), strict=True):
        assert torch.equal(p, q)


def _in_processes(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    inner = built()
    model = DistributedDataParallel(inner)
    optimizer = AdaFisher(inner, lr=1e-2)
    found["within"] = train(model, optimizer, rank)
    assert optimizer.statistics.processes.group is model.process_group
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = AdaFisher(inner, lr=1e-2, update_interval=2)  # its first step brings no statistics
        resumed.load_state_dict(optimizer.state_dict())
        optimizer.close()
        resumed.param_groups[0]["update_interval"] = 2
        train(model, resumed, rank)
        optimizer = resumed
    later = built()
    made_before = AdaFisher(later, lr=1e-2)
    found["made before"] = train(DistributedDataParallel(later), made_before, rank)
    for name, made in (("join", optimizer), ("join, SOFIM", SOFIM(inner.parameters()))):
        with Join([model]):
            try:
                train(model, made, rank)
            except RuntimeError as error:
                found[name] = str(error)
    both = nn.ModuleList([DistributedDataParallel(built()), DistributedDataParallel(built(), None, None, None)])
    both[1].process_group = dist.new_group([0, 1])
    of_two = AdaFisher(both, lr=1e-2)
    (both[0](batch(0)) + both[1](batch(0))).sum().backward()
    try:
        of_two.step()
    except ValueError as error:
        found["two groups"] = str(error)
    _alone_beside_another(rank)
    return found


def _alone_beside_another(rank: int) -> None:
    """What averages the gradients of one part of a model says nothing about another part, whose warning is due when
    there are statistics."""
    first = built()
    optimizer = AdaFisher(first, lr=1e-2, update_interval=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(first, optimizer, rank)
    part, other = both = nn.ModuleList([built(), DistributedDataParallel(built())])
    resumed = AdaFisher(both, lr=1e-2, update_interval=2, params=part.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    for expected in ([], [True]):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            (part(batch(rank)) + other(batch(rank))).square().mean().backward()
            resumed.step()
        assert [OF_STRANGERS in str(warning.message) for warning in told] == expected
    assert resumed.statistics.processes.group is None


@needs_processes
def test_processes_are_those_of_the_wrapper_whose_join_is_refused(tmp_path: Path) -> None:
    first, second = in_two_processes(_in_processes, tmp_path)
    for found in (first, second):
        assert found["join"].startswith("AdaFisher adds up statistics over processes, and in a Join those that")
        assert "join, SOFIM" not in found
        assert "averages the gradients of some parameters over other processes" in found["two groups"]
    for name in ("within", "made before"):
        assert all(torch.equal(p, q) for p, q in zip(first[name], second[name], strict=True))
        assert all(torch.equal(p, q) for p, q in zip(first["within"], first[name], strict=True))
