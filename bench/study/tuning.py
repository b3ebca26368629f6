"""The learning rates of all optimizers, each found with as many trials as the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from bench.study import plan, rates, runs
from bench.study.runs import Line, Run

TRIALS = 5
"""Rates that are tried for an optimizer, on a task at its own batch size."""
LARGE_BATCH_TRIALS = 3
"""At another batch size, around the one that was chosen for the task's own."""


def ensure(run: Run) -> Line:
    """A rate that was found on another machine is as good here."""
    return runs.ensure(run, here=False)


def search(task: str, batch_size: int, optimizer: str, line_of: Callable[[Run], Line] = ensure) -> dict[float, float]:
    """The rates that are tried, and what they lead to, the smaller the better; ``line_of`` has what a run leads to."""
    own = plan.own_batch_size(task)
    seeds = plan.tuning_seeds(task, batch_size)

    def loss(lr: float) -> float:
        made = (line_of(plan.tuning_run(task, batch_size, optimizer, lr, seed)) for seed in seeds)
        return statistics.fmean(line.loss for line in made)

    if batch_size == own:
        return rates.search(rates.quarters(plan.GUESSES[optimizer]), TRIALS, loss)
    around = rates.best(search(task, own, optimizer, line_of))
    return rates.search(rates.quarters(around), LARGE_BATCH_TRIALS, loss)


def tried(task: str, batch_size: int) -> dict[str, dict[float, float]]:
    """What ``search`` has found for each optimizer that is compared there.

    Raises:
        LookupError: it has not been to its end.
    """
    return {name: search(task, batch_size, name, runs.look_up) for name in plan.contestants(task, batch_size)}


def chosen(task: str, batch_size: int) -> dict[str, float]:
    """The rate of each optimizer; those that diverge at every one are left out.

    Raises:
        LookupError: as ``tried``.
    """
    return {
        name: rates.best(losses)
        for name, losses in tried(task, batch_size).items()
        if any(map(math.isfinite, losses.values()))
    }
