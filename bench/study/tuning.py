"""The learning rates of all optimizers, each found with as many trials as the others."""

from __future__ import annotations

import statistics

from bench.study import plan, rates, runs

TRIALS = 5
"""Rates that are tried for an optimizer, on a task at its own batch size."""
LARGE_BATCH_TRIALS = 3
"""At another batch size, around the one that was chosen for the task's own."""


def search(task: str, batch_size: int, optimizer: str) -> dict[float, float]:
    """The rates that were tried, and what they lead to, the smaller the better; carries out what is not known."""
    own = plan.own_batch_size(task)
    seeds = plan.tuning_seeds(task, batch_size)

    def loss(lr: float) -> float:
        made = (runs.ensure(plan.tuning_run(task, batch_size, optimizer, lr, seed)) for seed in seeds)
        return statistics.fmean(line.loss for line in made)

    if batch_size == own:
        return rates.search(rates.quarters(plan.GUESSES[optimizer]), TRIALS, loss)
    around = rates.best(search(task, own, optimizer))
    return rates.search(rates.quarters(around), LARGE_BATCH_TRIALS, loss)


def chosen(task: str, batch_size: int) -> dict[str, float]:
    """The rate of each optimizer that is compared there."""
    names = plan.contestants(task, batch_size)
    return {name: rates.best(search(task, batch_size, name)) for name in names}
