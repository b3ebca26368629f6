"""Finding a first learning rate by a sweep, after which everything is where it was."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fisher_kernels.curvature.processes import Processes
from fisher_kernels.optim.layerwise import LayerwiseOptimizer
from fisher_kernels.optim.layouts import data_meshes, group_of
from fisher_kernels.optim.restored import restored
from fisher_kernels.optim.stages import require_group

LEFT_OUT = 20
"""So many iterations in a row may leave out their step: a scaler that begins at 2^16 has come down to 1 by then."""

DEVIATIONS = 4.0
"""By so many deviations from where losses began batches explain no difference."""


@dataclass(frozen=True)
class LearningRates:
    r"""The curve of a sweep, and what it suggests; prints as a table.

    .. math:: \text{suggestion} = \min\left(\sqrt{\text{steepest} \cdot \text{diverged} / 3}, \text{diverged} / 3\right)

    Attributes:
        rates: that were tried, of the group with the largest one; the others have theirs in proportion.
        losses: of each the loss that ``step_fn`` returned in the iteration after, averaged over processes.
        smoothed: the mean of each and its neighbours.
        steepest: the rate at which the loss falls fastest; None where it falls at none.
        diverged: the rate at which the loss left for good; None where it did not.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    steepest: float | None
    diverged: float | None

    @property
    def suggestion(self) -> float | None:
        """The rate to begin with, if the curve says any."""
        if self.steepest is None or self.diverged is None:
            return None
        most = self.diverged / 3
        return most if self.steepest > most else math.sqrt(self.steepest * most)

    def __str__(self) -> str:
        shown = range(0, len(self.rates), max(1, len(self.rates) // 16))
        lines = [f"{'lr':>10}{'loss':>14}{'smoothed':>14}"]
        lines += [f"{self.rates[i]:>10.2g}{self.losses[i]:>14.5g}{self.smoothed[i]:>14.5g}" for i in shown]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """What the curve says, in a sentence."""
        if self.steepest is None:
            return "the loss falls at none of these rates: no suggestion"
        fastest = f"the loss falls fastest at {self.steepest:.2g}"
        if self.suggestion is None:
            return f"{fastest}, and leaves at none of these rates, as where steps are bounded: no suggestion"
        return f"{fastest} and leaves at {self.diverged:.2g}: try lr={self.suggestion:.2g}"


def find_lr(
    step_fn: Callable[[], Any],
    optimizer: Optimizer,
    model: nn.Module | None = None,
    *,
    start: float = 1e-6,
    end: float = 10.0,
    steps: int = 100,
    also: Sequence[Any] = (),
    process_group: dist.ProcessGroup | None = None,
) -> LearningRates:
    r"""Train with a learning rate that grows from step to step, see where the loss falls, and put everything back.

    Iteration k = 0, 1, ... of n takes its step with the rate

    .. math:: \eta_k = \text{start} \, (\text{end} / \text{start})^{k / (n - 1)}

    What that rate does shows in the loss of the iteration after, so there is one iteration more. The curve ends where
    the loss leaves for good: it is not finite, or the mean of 2w + 1 of them, w = n // 20, is above the level
    :math:`L_0` at which they began by more than they had fallen, and by more than four deviations of the losses there;
    :math:`L_0` is the mean of the first n // 10, and of ten at least.

    Of every 2w + 1 neighbours the line through their losses over the logarithm of the rate is fitted by least squares;
    the middle of those with the most negative slope is where the loss falls fastest, if any mean of neighbours is below
    :math:`L_0` by more than four of its deviations. The suggestion is between that rate and a third of the one at which
    the loss leaves: their geometric mean, and no more than the third. Where it leaves at none, as with optimizers that
    bound their steps, the curve says too little, and there is none.

    Afterwards all is as it was, to the bit, also where ``step_fn`` raises: parameters, gradients, buffers and modes of
    modules, state and settings of the optimizer, what it has collected since its last step, the counts of its reports,
    torch's random numbers, and the ``grad_scaler`` that the optimizer was given. Data loaders and what else ``step_fn``
    changes are not, unless they are in ``also``. Meanwhile there is a second copy of all of it.

    Args:
        step_fn: one iteration of training, which returns its loss: forward, backward, ``step()``, ``zero_grad()``; with
            gradient accumulation all micro-batches of a step. Batches should differ as they do in training.
        optimizer: any of torch; what wraps one, as Accelerate does, is looked into.
        model: whose buffers are put back; None takes the model whose layers the optimizer reads.
        start, end: the smallest and the largest rate, of the group with the largest one.
        steps: how many rates are tried.
        also: what else is put back, by its ``state_dict`` and ``load_state_dict``: schedules, scalers.
        process_group: over which losses are averaged, so that all processes stop in the same iteration; None takes
            those over which the optimizer adds up statistics, or DistributedDataParallel averages gradients.

    Raises:
        TypeError: ``step_fn`` cannot be called or returns no loss, or ``model`` is missing where the optimizer takes
            parameters alone.
        ValueError: a number is out of range, or ``step_fn`` takes no step of the optimizer.
    """
    _check(step_fn, start, end, steps)
    require_group("process_group", process_group)
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    if model is None:
        if not isinstance(optimizer, LayerwiseOptimizer):
            raise TypeError(
                f"model is None, and {type(optimizer).__name__} knows no more than parameters: expected the model, "
                "whose buffers are put back"
            )
        model = optimizer._model
    scaler = optimizer.statistics.grad_scaler if isinstance(optimizer, LayerwiseOptimizer) else None
    others = [*also, *([] if scaler is None or any(thing is scaler for thing in also) else [scaler])]
    rates = [start * (end / start) ** (k / (steps - 1)) for k in range(steps)]
    with restored(optimizer, model, others), _Processes(optimizer, model, process_group) as processes:
        optimizer.zero_grad()
        losses, diverged = _sweep(step_fn, optimizer, rates, processes)
    half = _half(steps)
    smoothed = [statistics.fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
    fastest = _steepest(losses, steps) if losses else None
    return LearningRates(
        tuple(rates[: len(losses)]),
        tuple(losses),
        tuple(smoothed),
        None if fastest is None else rates[fastest],
        None if diverged is None else rates[diverged],
    )


def _check(step_fn: Any, start: float, end: float, steps: int) -> None:
    if not callable(step_fn):
        raise TypeError(f"step_fn is {step_fn!r}, expected a function that runs one iteration and returns its loss")
    if not 0 < start < math.inf:
        raise ValueError(f"start is {start}, expected a finite number above 0")
    if not start < end < math.inf:
        raise ValueError(f"end is {end}, expected a finite number above start, {start}")
    if steps < 20:
        raise ValueError(f"steps is {steps}, expected at least 20: fewer points say nothing about a slope")


def _half(steps: int) -> int:
    """How many neighbours on either side a point is taken with."""
    return max(1, steps // 20)


def _first(steps: int) -> int:
    """How many losses the level is of at which they began."""
    return max(10, steps // 10)


class _Rate:
    """Sets the rate of a step where it begins, whatever schedules have done by then, and counts steps."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.rate, self.taken = 0.0, 0
        bases = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        largest = max(bases)
        self._shares = [base / largest if largest else 1.0 for base in bases]

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        self.taken += not (isinstance(found_inf, Tensor) and bool(found_inf))
        for group, share in zip(optimizer.param_groups, self._shares, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.rate * share)
            else:
                group["lr"] = self.rate * share


def _sweep(
    step_fn: Callable[[], Any], optimizer: Optimizer, rates: Sequence[float], processes: _Processes
) -> tuple[list[float], int | None]:
    """The loss behind each rate, and the number of the one with which the losses left."""
    losses: list[float] = []
    rate, left_out = _Rate(optimizer), 0
    handle = optimizer.register_step_pre_hook(rate)
    try:
        while True:
            number, rate.rate = rate.taken, rates[min(rate.taken, len(rates) - 1)]
            loss = processes.mean(_loss(step_fn()))
            if not math.isfinite(loss):
                if not number:
                    raise ValueError(f"step_fn returned {loss} before any step, expected a finite loss to begin with")
                return losses, number - 1
            if len(losses) < number:
                losses.append(loss)
                if _has_left(losses, len(rates)):
                    return losses, number - 1 - _half(len(rates))  # the middle of those that are above
            if number == len(rates):
                return losses, None
            left_out = 0 if rate.taken > number else left_out + 1
            if left_out >= LEFT_OUT:
                raise ValueError(
                    f"step_fn took no step of the optimizer in {LEFT_OUT} iterations, expected one in each: does it "
                    "call step() of this one?"
                )
            if rate.taken > number + 1:
                raise ValueError(
                    f"step_fn took {rate.taken - number} steps of the optimizer, expected one in each iteration"
                )
    finally:
        handle.remove()


def _loss(found: Any) -> float:
    if isinstance(found, Tensor) and found.numel() == 1:
        return float(found.detach())
    if isinstance(found, bool) or not isinstance(found, float | int):
        raise TypeError(f"step_fn returned {found!r}, expected the loss: a number or a tensor of one element")
    return float(found)


def _has_left(losses: Sequence[float], steps: int) -> bool:
    """Whether the loss, which may go up and down with the batches, has gone up for good."""
    level, noise = _beginning(losses, steps)
    means = _means(losses, steps)
    if len(losses) < _first(steps) + 2 * _half(steps) + 1:
        return False
    return means[-1] > level + max(level - min(means), DEVIATIONS * noise)


def _steepest(losses: Sequence[float], steps: int) -> int | None:
    """The middle of the neighbours whose line falls most steeply; None where losses fall no more than batches do."""
    half, (level, noise), means = _half(steps), _beginning(losses, steps), _means(losses, steps)
    if not means or level - min(means) <= DEVIATIONS * noise / math.sqrt(2 * half + 1):
        return None
    slopes = {
        i: sum(j * losses[i + j] for j in range(-half, half + 1)) for i in range(half, len(losses) - half)
    }  # but for a factor: all points are at equal distances
    return min(slopes, key=lambda i: slopes[i])


def _beginning(losses: Sequence[float], steps: int) -> tuple[float, float]:
    """Where losses began, while rates were too small to do anything, and how they differed from batch to batch."""
    first = losses[: _first(steps)]
    return statistics.fmean(first), statistics.pstdev(first)


def _means(losses: Sequence[float], steps: int) -> list[float]:
    """Of all neighbours."""
    width = 2 * _half(steps) + 1
    return [statistics.fmean(losses[i : i + width]) for i in range(len(losses) - width + 1)]


class _Processes:
    """Those that train together, which stop together: they are known when a forward has been."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, given: dist.ProcessGroup | None) -> None:
        self._model = model
        self._params = {p: None for group in optimizer.param_groups for p in group["params"]}
        self._device = next(iter(self._params)).device
        if given is None and isinstance(optimizer, LayerwiseOptimizer):
            self._processes = lambda: optimizer.statistics.processes
        else:
            found = Processes(group_of(self._params, data_meshes(model)) if given is None else given)
            found.look_in(model, self._params)
            self._processes = lambda: found

    def __enter__(self) -> _Processes:
        # Where the model is within a DistributedDataParallel, that is seen in a forward.
        note = lambda *_: self._processes().note(self._params)  # noqa: E731
        self._handle = self._model.register_forward_pre_hook(note)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def mean(self, loss: float) -> float:
        """The mean of all processes, which is the same in each of them."""
        processes = self._processes()
        figure = torch.full((1,), loss, dtype=torch.float64, device=self._device)
        if processes.count > 1:
            dist.all_reduce(figure, group=processes.group)
        return float(processes.over_partners(figure / processes.count))
