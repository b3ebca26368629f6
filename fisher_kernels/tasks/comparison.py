"""Several optimizers on one task: runs that take turns, and their summary over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice

from fisher_kernels.tasks.optimizers import Recipe
from fisher_kernels.tasks.task import Hyperparameters, Task
from fisher_kernels.tasks.training import WARM_UP_STEPS, OnStep, Record, Settings, Training


def compare(
    task: Task,
    recipes: Sequence[Recipe],
    seeds: Sequence[int],
    settings: Settings,
    on_step: OnStep | None = None,
) -> list[Record]:
    """Trains every recipe from every seed and returns the records, recipe by recipe.

    The recipes take turns epoch by epoch, in an order that rotates, so that whatever else the machine is doing slows
    all of them alike and timings can be compared.
    """
    for recipe in recipes:
        _warm_up(task, recipe, settings)
    records = [record for seed in seeds for record in _race(task, recipes, seed, settings, on_step)]
    order = [recipe.name for recipe in recipes]
    return sorted(records, key=lambda record: order.index(record.optimizer))


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the deviation of one value is 0."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


@dataclass(frozen=True)
class Summary:
    """What the runs of one optimizer amount to. Figures of cost are medians over seeds.

    ``metric[e]`` and ``seconds[e]``, after e epochs, are None where a run had diverged by then: a mean over the
    survivors would flatter the optimizer.
    """

    optimizer: str
    title: str
    hyperparameters: Hyperparameters
    seeds: list[int]
    diverged: list[int]
    metric: list[Spread | None]
    seconds: list[float | None]
    step_ms: float | None
    iteration_ms: float | None
    state_bytes_per_parameter: float | None


def summarize(records: Sequence[Record], epochs: int) -> list[Summary]:
    """One summary per optimizer, in the order of the records, which are grouped by optimizer."""
    return [_summary(list(runs), epochs) for _, runs in groupby(records, key=lambda record: record.optimizer)]


def _summary(runs: Sequence[Record], epochs: int) -> Summary:
    def after(epoch: int, curves: Sequence[Sequence[float]]) -> list[float]:
        return [curve[epoch] for curve in curves] if all(len(curve) > epoch for curve in curves) else []

    def median(values: Sequence[float]) -> float | None:
        return statistics.median(values) if values else None

    metrics = [after(epoch, [run.metric for run in runs]) for epoch in range(epochs + 1)]
    return Summary(
        optimizer=runs[0].optimizer,
        title=runs[0].title,
        hyperparameters=runs[0].hyperparameters,
        seeds=[run.seed for run in runs],
        diverged=[run.seed for run in runs if run.diverged is not None],
        metric=[Spread.of(values) if values else None for values in metrics],
        seconds=[median(after(epoch, [run.seconds for run in runs])) for epoch in range(epochs + 1)],
        step_ms=median([run.step_ms.median for run in runs if run.step_ms]),
        iteration_ms=median([run.iteration_ms.median for run in runs if run.iteration_ms]),
        state_bytes_per_parameter=median(
            [run.state_bytes_per_parameter for run in runs if run.state_bytes_per_parameter is not None]
        ),
    )


def _warm_up(task: Task, recipe: Recipe, settings: Settings) -> None:
    """Has whatever a process does once done before anything is timed."""
    with closing(Training(task, recipe, 0, settings)) as training:
        for batch in islice(task.batches(0, 0, settings.batch_size), WARM_UP_STEPS):
            training.iterate(batch)


def _race(
    task: Task, recipes: Sequence[Recipe], seed: int, settings: Settings, on_step: OnStep | None
) -> Iterator[Record]:
    trainings = [Training(task, recipe, seed, settings) for recipe in recipes]
    for training in trainings:
        training.evaluate()
    for epoch in range(settings.epochs):
        first = epoch % len(trainings)
        for training in trainings[first:] + trainings[:first]:
            if not training.finished:
                training.run_epoch(on_step)
    for training in trainings:
        training.close()
        yield training.record
