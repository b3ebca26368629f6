"""The learning rate that a sweep finds, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, AdamW

from fisher_kernels import KFAC, MBF, SOFIM, AdaFisher, EKFACAdam, LearningRates, find_lr
from fisher_kernels.optim import momentum_image
from tests.processes import in_two_processes, needs_processes
from tests.small_network import assert_same_parameters, assert_same_state, backward, network, train
from tests.threads import in_threads

pytestmark = pytest.mark.usefixtures("one_thread")

BESIDE = {"refresh": "constant", "update_interval": 2, "inverse_interval": 4, "overlap": True, "delayed": True}
TURNS = {"refresh": "constant", "update_interval": 2, "inverse_interval": 4}

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "AdaFisher": lambda model: AdaFisher(model, update_interval=3),
    "MBF": lambda model: MBF(model, update_interval=3),
    "KFAC": lambda model: KFAC(model, **TURNS),
    "KFAC-beside": lambda model: KFAC(model, **BESIDE),
    "EKFACAdam": lambda model: EKFACAdam(model, **TURNS),
    "SOFIM": lambda model: SOFIM(model.parameters()),
    "AdamW": lambda model: AdamW(model.parameters()),
    "LBFGS": lambda model: LBFGS(model.parameters(), lr=0.1, max_iter=2),
}


@pytest.fixture(autouse=True)
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers of K-FAC carry on images of the momentum that are too small to gain anything."""
    monkeypatch.setattr(momentum_image, "LEAST", 0)


def step(model: nn.Module, optimizer: Any, number: int) -> float:
    """An iteration of any optimizer; of one that evaluates the loss itself too."""
    torch.rand(1)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses.append(backward(model, number))
        return losses[-1].detach()

    if isinstance(optimizer, LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    return losses[0].item()


def figures(optimizer: Any) -> Any:
    return optimizer.metrics() if hasattr(optimizer, "metrics") else None


@pytest.mark.parametrize("how", ["ends", pytest.param("raises", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pending", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_everything_is_where_it_was(name: str, pending: bool, how: str) -> None:
    """Between two steps, and between two backward passes of one, of which K-FAC collects rows or statistics."""
    model, twin = network(), network()
    ours, plain = OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    for net, optimizer in ((model, ours), (twin, plain)):
        for number in range(7):
            step(net, optimizer, number)
        if pending:
            optimizer.zero_grad()
            backward(net, 7)
    places = {p: {n: id(x) for n, x in entries.items()} for p, entries in ours.state.items()}
    gradients = {p: (p.grad, copy.deepcopy(p.grad)) for p in model.parameters()}
    state, report, random = copy.deepcopy(ours.state_dict()), figures(ours), torch.get_rng_state()
    numbers = iter(range(90, 200))

    def iteration() -> float:
        if (number := next(numbers)) == 110 and how == "raises":
            model.eval()
            backward(model, number)
            raise KeyError(number)
        model[1].running_var = torch.ones(4) * number  # another buffer
        return step(model, ours, number)

    if how == "raises":
        with pytest.raises(KeyError):
            find_lr(iteration, ours, model, end=1e-3, steps=30)
    else:
        assert len(find_lr(iteration, ours, model, end=1e-3, steps=20).rates) == 20
    assert_same_parameters(model, twin)
    for (key, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), key
    for p, (grad, values) in gradients.items():
        assert p.grad is grad
        torch.testing.assert_close(grad, values, rtol=0, atol=0)
    assert model.training
    if name != "LBFGS":
        assert_same_state(ours.state_dict(), state)
        # Where somebody knows tensors of the state, they are the same ones.
        kept = {p: {n: id(x) for n, x in entries.items()} for p, entries in ours.state.items()}
        assert all(kept[p][n] == place for p, of in places.items() for n, place in of.items() if "pending" not in n)
    torch.testing.assert_close(figures(ours), report, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), random)
    for net, optimizer in ((model, ours), (twin, plain)):
        if pending and name != "LBFGS":
            backward(net, 8)
            optimizer.step()
        for number in range(9, 18):
            step(net, optimizer, number)
    assert_same_parameters(model, twin)
    if name != "LBFGS":
        assert_same_state(ours.state_dict(), plain.state_dict())


class Either(nn.Module):
    """Two layers, of which a forward may use both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        out: Tensor = self.one(x)
        return out + self.other(x) if both else out


@pytest.mark.parametrize("steps", [6, 7])
def test_k_fac_goes_on_between_two_backward_passes(steps: int) -> None:
    """In step 6 it has counted the terms of a loss that not all layers are in, in step 7 it keeps the rows."""

    def pieces(net: nn.Module, number: int) -> None:
        x = torch.randn(2, 24, generator=torch.Generator().manual_seed(number))
        net(x, both=bool(number % 2) or steps == 7).square().mean().backward()

    def iterate(net: nn.Module, optimizer: Any, number: int) -> float:
        optimizer.zero_grad()
        pieces(net, 2 * number)
        pieces(net, 2 * number + 1)
        optimizer.step()
        return 0.0

    model, twin = Either(), Either()
    ours, plain = KFAC(model, **TURNS), KFAC(twin, **TURNS)
    for net, optimizer in ((model, ours), (twin, plain)):
        for number in range(steps):
            iterate(net, optimizer, number)
        optimizer.zero_grad()
        pieces(net, 2 * steps)
    find_lr(lambda: iterate(model, ours, 90), ours, end=1e-3, steps=20)
    for net, optimizer in ((model, ours), (twin, plain)):
        pieces(net, 2 * steps + 1)
        optimizer.step()
    assert_same_parameters(model, twin)
    assert_same_state(ours.state_dict(), plain.state_dict())


class ByFunction(nn.Module):
    """A weight that a function applies, which the first refresh finds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.last = nn.Parameter(torch.randn(5, 32) / 6), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(F.linear(x.flatten(1), self.weight)))
        return out


@pytest.mark.parametrize("how", ["find_lr", "measure"])
def test_a_new_optimizer_is_as_new(how: str) -> None:
    """Also what looks at the first refreshes alone."""
    model, twin = ByFunction(), ByFunction()
    ours, plain = MBF(model), MBF(twin)
    numbers = iter(range(90, 200))

    def iteration() -> float:
        return step(model, ours, next(numbers))

    if how == "find_lr":
        find_lr(iteration, ours, start=1e-5, end=1e-3, steps=20)
    else:
        ours.measure(iteration, repeats=2)
    assert not ours.state
    for net, optimizer in ((model, ours), (twin, plain)):
        train(net, optimizer, range(3))
    assert ours.explain() == plain.explain()
    assert not ours.explain()[0].fallback
    assert_same_parameters(model, twin)


def test_the_curve_is_that_of_the_steps() -> None:
    """The loss beside a rate is the one that a step with it has led to."""
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    found = find_lr(_quadratic(x, optimizer := SGD([x], lr=0.1)), optimizer, nn.Module(), start=1e-3, end=0.5, steps=20)
    assert x.item() == 1.0
    expected, value = [], 1.0
    for k in range(20):
        rate = 1e-3 * 500 ** (k / 19)
        assert found.rates[k] == pytest.approx(rate, rel=1e-12)
        value -= rate * value
        expected.append(value**2 / 2)
    assert found.losses == pytest.approx(expected, rel=1e-9)
    assert found.smoothed[0] == pytest.approx(sum(expected[:2]) / 2)
    assert found.smoothed[7] == pytest.approx(sum(expected[6:9]) / 3)
    assert found.diverged is None


def _quadratic(x: Tensor, optimizer: Any) -> Callable[[], Tensor]:
    def iteration() -> Tensor:
        optimizer.zero_grad()
        loss = x.square().sum() / 2
        loss.backward()
        optimizer.step()
        return loss

    return iteration


def along(curve: Callable[[float], float], **settings: Any) -> LearningRates:
    """What is found where the loss is a function of the rate of the step before, and of the batch."""
    x = nn.Parameter(torch.ones(1))
    optimizer = SGD([x], lr=0.0)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0)).tolist()
    settings = {"start": 1e-6, "end": 10.0, "steps": 100, **settings}

    def iteration() -> float:
        rate = optimizer.param_groups[0]["lr"]
        x.grad = torch.zeros(1)
        optimizer.step()
        return curve(rate) + 0.02 * noise.pop()

    return find_lr(iteration, optimizer, nn.Module(), **settings)


def falling(middle: float) -> Callable[[float], float]:
    """From 1 to -1 around a rate: losses may be negative."""
    return lambda rate: -math.tanh(2 * math.log(max(rate, 1e-9) / middle))


NEAR = 1.175**5
"""So far the neighbours reach that a slope, or a mean, is of."""


@pytest.mark.parametrize("middle", [1e-4, 1e-2])
def test_it_finds_where_the_loss_falls_fastest(middle: float) -> None:
    found = along(falling(middle))
    assert middle / NEAR < found.steepest < middle * NEAR  # type: ignore[operator]
    assert found.diverged is None
    assert found.suggestion is None
    assert "leaves at none of these rates" in str(found)


@pytest.mark.parametrize("leaves", ["up", "nan"])
@pytest.mark.parametrize("end", [1e-1, 1e-2])
def test_the_suggestion_is_between_the_fall_and_where_the_loss_leaves(end: float, leaves: str) -> None:
    def curve(rate: float) -> float:
        if rate < end:
            return falling(1e-3)(rate)
        return math.nan if leaves == "nan" else 9.0

    found = along(curve)
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < 85
    assert all(map(math.isfinite, found.losses))
    assert end / NEAR < found.diverged < end * NEAR  # type: ignore[operator]
    assert 1e-3 / NEAR < found.steepest < 1e-3 * NEAR  # type: ignore[operator]
    assert found.suggestion == pytest.approx(math.sqrt(found.steepest * found.diverged / 3))  # type: ignore[operator]
    assert f"try lr={found.suggestion:.2g}" in str(found)


def test_the_suggestion_is_a_third_of_where_the_loss_leaves_at_most() -> None:
    found = along(lambda rate: falling(1e-3)(rate) if rate < 1.5e-3 else math.nan)
    assert found.diverged / 3 < found.steepest  # type: ignore[operator]
    assert found.suggestion == found.diverged / 3  # type: ignore[operator]


def test_batches_that_differ_are_no_divergence() -> None:
    assert along(lambda rate: 0.0).diverged is None


def test_nothing_is_suggested_where_the_loss_never_falls() -> None:
    found = along(lambda rate: 1e3 * rate, steps=20)
    assert found.steepest is None
    assert found.suggestion is None
    assert "falls at none of these rates: no suggestion" in str(found)


def test_groups_keep_their_proportion_and_schedules_do_not_disturb() -> None:
    """What a warm-up begins at says nothing; a rate that is a tensor stays the same one."""
    model = network()
    rate = torch.tensor(0.1)
    groups = [{"params": model[0].parameters(), "lr": rate}, {"params": model[4].parameters(), "lr": 0.02}]
    ours = AdaFisher(model, params=groups)
    schedule = torch.optim.lr_scheduler.LinearLR(ours, start_factor=1e-3, total_iters=5)
    before = copy.deepcopy(schedule.state_dict())
    seen, numbers = [], iter(range(100))

    def look(optimizer: Any, *_: Any) -> None:
        seen.append(tuple(float(group["lr"]) for group in optimizer.param_groups))

    def iteration() -> float:
        loss = step(model, ours, next(numbers))
        schedule.step()
        return loss

    # Behind the hook of the sweep, which is there for the sweep alone.
    def first() -> float:
        if not seen:
            handles.append(ours.register_step_pre_hook(look))
        return iteration()

    handles: list[Any] = []
    now = [float(group["lr"]) for group in ours.param_groups]
    found = find_lr(first, ours, end=0.1, steps=20, also=[schedule])
    assert [a for a, _ in seen[:-1]] == pytest.approx(found.rates, rel=1e-6)
    assert [b for _, b in seen[:-1]] == pytest.approx([r / 5 for r in found.rates], rel=1e-6)
    assert ours.param_groups[0]["lr"] is rate
    assert [float(group["lr"]) for group in ours.param_groups] == now
    assert schedule.state_dict() == before
    handles[0].remove()
    step(model, ours, 0)
    assert [float(group["lr"]) for group in ours.param_groups] == now


@pytest.mark.parametrize("name", ["AdaFisher", "SGD"])
def test_steps_that_a_scaler_leaves_out_are_taken_again(name: str) -> None:
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ours: Any = SGD(model.parameters(), lr=0.1)
    if name == "AdaFisher":
        ours = AdaFisher(model, grad_scaler=scaler)
    calls = iter(range(100))

    def iteration() -> Tensor:
        call = next(calls)
        ours.zero_grad()
        loss = model(torch.ones(8, 2, 4, 4)).square().mean()
        scaler.scale(loss * (math.inf if call in (0, 1, 7) else 1)).backward()
        scaler.step(ours)
        scaler.update()
        return loss

    found = find_lr(iteration, ours, model, end=1e-3, steps=20, also=[] if name == "AdaFisher" else [scaler])
    assert next(calls) == 24  # of 20 rates, one more, and three that took no step
    assert len(found.rates) == 20
    assert scaler.get_scale() == 2.0**10


class _Wrapper:
    """What frameworks put around an optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_what_wraps_an_optimizer_is_looked_into() -> None:
    model = network()
    ours = AdaFisher(model)
    numbers = iter(range(100))
    wrapped: Any = _Wrapper(_Wrapper(ours).optimizer)
    found = find_lr(lambda: step(model, ours, next(numbers)), wrapped, end=1e-3, steps=20)
    assert len(found.rates) == 20


def test_what_is_refused() -> None:
    model = network()
    ours = AdaFisher(model)
    numbers: Iterator[int] = iter(range(1000))

    def iteration() -> float:
        return step(model, ours, next(numbers))

    for settings, message in (
        ({"start": 0.0}, "start is 0.0, expected"),
        ({"start": math.nan}, "start is nan, expected"),
        ({"end": 1e-7}, "end is 1e-07, expected"),
        ({"end": math.inf}, "end is inf, expected"),
        ({"steps": 19}, "steps is 19, expected"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            find_lr(iteration, ours, **settings)
    with pytest.raises(TypeError, match=r"^step_fn is 3, expected"):
        find_lr(3, ours)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^optimizer is a Sequential, expected"):
        find_lr(iteration, model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^model is None, and SOFIM knows no more than parameters"):
        find_lr(iteration, SOFIM(model.parameters()))
    with pytest.raises(TypeError, match=r"^process_group is 3"):
        find_lr(iteration, ours, process_group=3)  # type: ignore[arg-type]
    for returned in (None, "1", torch.ones(2), True):
        with pytest.raises(TypeError, match=r"^step_fn returned .*expected the loss"):
            find_lr(lambda returned=returned: returned, ours)  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"^step_fn returned nan before any step"):
        find_lr(lambda: math.nan, ours)
    with pytest.raises(ValueError, match=r"^step_fn took no step of the optimizer in 20 iterations"):
        find_lr(lambda: 1.0, ours)
    with pytest.raises(ValueError, match=r"^step_fn took 2 steps of the optimizer"):
        find_lr(lambda: iteration() + iteration(), ours)
    assert_same_parameters(model, network())


def _sweep(rank: int, ours: Any, model: nn.Module, trained: nn.Module, group: Any = None) -> LearningRates:
    """Of losses that differ, and that of one process leaves long before that of the other."""
    calls = iter(range(1000))

    def iteration() -> float:
        loss = step(trained, ours, call := 2 * next(calls) + rank)
        return loss + (100.0 if rank and call > 40 else 0.0)

    return find_lr(iteration, ours, model, end=1e-3, steps=40, process_group=group)


def assert_together(found: list[LearningRates]) -> None:
    assert found[0] == found[1]
    assert 20 <= len(found[0].rates) < 30


@pytest.mark.parametrize("kind", [AdaFisher, SGD])
def test_processes_of_a_group_stop_together(kind: Any) -> None:
    """The one reads layers and knows the group, the other is told."""

    def work(rank: int) -> LearningRates:
        model = ByFunction()  # of a seed
        group = dist.group.WORLD
        if kind is AdaFisher:
            return _sweep(rank, AdaFisher(model, process_group=group), model, model)
        return _sweep(rank, SGD(model.parameters(), lr=0.1), model, model, group)

    assert_together(in_threads(work, 2))


def _in_parallel(rank: int) -> list[LearningRates]:
    found = []
    for make in (lambda model: AdaFisher(model), lambda model: SGD(model.parameters(), lr=0.1)):
        model = network()
        found.append(_sweep(rank, make(model), model, DistributedDataParallel(model)))
        assert_same_parameters(model, network())
    return found


@pytest.mark.slow
@needs_processes
def test_processes_of_distributed_data_parallel_stop_together(tmp_path: Path) -> None:
    for found in zip(*in_two_processes(_in_parallel, tmp_path), strict=True):
        assert_together([*found])
