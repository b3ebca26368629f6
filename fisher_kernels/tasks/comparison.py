"""Several optimizers on one task: runs that take turns, and their summary over seeds."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby, islice, pairwise
from typing import Any

from fisher_kernels.tasks.optimizers import Recipe
from fisher_kernels.tasks.task import Hyperparameters, Metric, Task
from fisher_kernels.tasks.training import WARM_UP_STEPS, OnStep, Record, Settings, Training

# The optimizer that others are measured against, and how many of its epochs mark equal training times.
BASELINE = "adamw"
TIME_POINTS = 8


def compare(
    task: Task,
    recipes: Sequence[Recipe],
    seeds: Sequence[int],
    settings: Settings,
    on_step: OnStep | None = None,
    on_lap: OnStep | None = None,
) -> list[Record]:
    """Trains every recipe from every seed and returns the records, recipe by recipe."""
    comparison = Comparison(task, recipes, seeds, settings)
    comparison.run(on_step, on_lap)
    return comparison.records


class Comparison:
    """Every recipe trained from every seed; it can be stopped after any iteration, and go on in another process.

    The recipes take turns lap by lap, in an order that rotates, so that whatever else the machine is doing slows all of
    them alike and timings can be compared.
    """

    def __init__(self, task: Task, recipes: Sequence[Recipe], seeds: Sequence[int], settings: Settings) -> None:
        self.task, self.recipes, self.seeds, self.settings = task, recipes, seeds, settings
        self._done: list[Record] = []
        self._running: list[Training] = []

    def run(self, on_step: OnStep | None = None, on_lap: OnStep | None = None) -> None:
        """Trains what is left to train.

        Args:
            on_step: called after every iteration; what it raises stops the comparison, which ``run`` takes up again.
            on_lap: called after every lap, when its figures are in the record.
        """
        for recipe in self.recipes:
            warm_up(self.task, recipe, self.settings)
        done = {record.seed for record in self._done}
        for seed in self.seeds:
            if seed not in done:
                if not self._running:
                    self._running = self._start(seed)
                self._race(on_step, on_lap)

    @property
    def records(self) -> list[Record]:
        """Those of all runs that have begun, recipe by recipe."""
        for training in self._running:
            training.measure()
        order = [recipe.name for recipe in self.recipes]
        records = [*self._done, *(training.record for training in self._running)]
        return sorted(records, key=lambda record: order.index(record.optimizer))

    @property
    def done(self) -> dict[str, float]:
        """How much of ``Settings.length`` each optimizer has behind it, all seeds together."""
        done = {recipe.name: 0.0 for recipe in self.recipes}
        for record in self._done:
            done[record.optimizer] += self.settings.length(self.task)  # one that diverged has nothing left to do either
        for training in self._running:
            done[training.record.optimizer] += training.done
        return done

    def state_dict(self) -> dict[str, Any]:
        """All that ``load_state_dict`` needs to go on from here; numbers, names and tensors."""
        return {
            "done": [asdict(record) for record in self._done],
            "running": [training.state_dict() for training in self._running],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a comparison of the same task, recipes, seeds and settings where another left off."""
        self._done = [Record.of(plain) for plain in state["done"]]
        self._running = []
        for recipe, saved in zip(self.recipes, state["running"], strict=False):  # none between two seeds
            training = Training(self.task, recipe, saved["record"]["seed"], self.settings)
            training.load_state_dict(saved)
            self._running.append(training)

    def _start(self, seed: int) -> list[Training]:
        trainings = [Training(self.task, recipe, seed, self.settings) for recipe in self.recipes]
        for training in trainings:
            training.evaluate()
        return trainings

    def _race(self, on_step: OnStep | None, on_lap: OnStep | None) -> None:
        """Trains the runs of one seed to their ends."""
        trainings = self._running
        for lap in range(self.settings.laps):
            first = lap % len(trainings)
            for training in trainings[first:] + trainings[:first]:
                if not training.finished and training.record.laps == lap:
                    training.run_lap(on_step)
                    if on_lap is not None:
                        on_lap(training)
        for training in trainings:
            training.close()
        self._done += [training.record for training in trainings]
        self._running = []


@dataclass(frozen=True)
class Part:
    """What can be shown of a comparison that was stopped.

    Attributes:
        records: of the seeds all of whose runs have ended; where there are none, of the one that has begun.
        laps: how many of them there are to show.
    """

    records: list[Record]
    laps: int


def presentable(records: Sequence[Record], laps: int) -> Part:
    """The records that can be compared with one another: all of them, where all runs of so many laps have ended.

    A mean over the seeds that an optimizer happened to get to would be one of other things than its neighbour's.
    """
    unfinished = {record.seed for record in records if record.diverged is None and record.laps < laps}
    finished = [record for record in records if record.seed not in unfinished]
    if finished:
        return Part(finished, laps)
    return Part([*records], max((record.laps for record in records), default=0))


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

    Lists have an entry for each lap, after those before the first; it is None where a run had diverged by then: a mean
    over the survivors would flatter the optimizer. ``also`` is empty for a task without a second figure.
    """

    optimizer: str
    title: str
    hyperparameters: Hyperparameters
    overrides: Hyperparameters
    seeds: list[int]
    diverged: list[int]
    metric: list[Spread | None]
    also: list[Spread | None]
    seconds: list[float | None]
    processor_seconds: list[float | None]
    iterations: list[float | None]
    step_ms: float | None
    iteration_ms: float | None
    state_bytes_per_parameter: float | None


def summarize(records: Sequence[Record], laps: int) -> list[Summary]:
    """One summary per optimizer, in the order of the records, which are grouped by optimizer."""
    return [_summary(list(runs), laps) for _, runs in groupby(records, key=lambda record: record.optimizer)]


def _summary(runs: Sequence[Record], laps: int) -> Summary:
    def after(lap: int, curves: Sequence[Sequence[float]]) -> list[float]:
        return [curve[lap] for curve in curves] if all(len(curve) > lap for curve in curves) else []

    def median(values: Sequence[float]) -> float | None:
        return statistics.median(values) if values else None

    def medians(curves: Sequence[Sequence[float]]) -> list[float | None]:
        return [median(after(lap, curves)) for lap in range(laps + 1)]

    def spreads(curves: Sequence[Sequence[float]]) -> list[Spread | None]:
        values = [after(lap, curves) for lap in range(laps + 1)]
        return [Spread.of(value) if value else None for value in values]

    also = [run.also for run in runs]
    return Summary(
        optimizer=runs[0].optimizer,
        title=runs[0].title,
        hyperparameters=runs[0].hyperparameters,
        overrides=runs[0].overrides,
        seeds=[run.seed for run in runs],
        diverged=[run.seed for run in runs if run.diverged is not None],
        metric=spreads([run.metric for run in runs]),
        also=spreads(also) if any(also) else [],
        seconds=medians([run.seconds for run in runs]),
        processor_seconds=medians([run.processor_seconds for run in runs]),
        iterations=medians([run.iterations for run in runs]),
        step_ms=median([run.step_ms.median for run in runs if run.step_ms]),
        iteration_ms=median([run.iteration_ms.median for run in runs if run.iteration_ms]),
        state_bytes_per_parameter=median(
            [run.state_bytes_per_parameter for run in runs if run.state_bytes_per_parameter is not None]
        ),
    )


@dataclass(frozen=True)
class EqualTime:
    """How far each optimizer has come in the training time that one of them, the baseline, takes for its epochs.

    A run has come as far as the last epoch that it has finished by then. Times are compared seed by seed, because the
    runs of a seed take turns and what slows one of them slows the others.

    Attributes:
        baseline: the optimizer that sets the times.
        epochs: those of its epochs at whose ends the others are looked at; the last one among them.
        seconds: training time of the baseline up to there, median over seeds.
        metric: for each optimizer, one entry per time; None where a run of it has finished no epoch yet or has
            diverged, which a run counts as from the last epoch that it finished.
    """

    baseline: str
    epochs: list[int]
    seconds: list[float]
    metric: dict[str, list[Spread | None]]


def at_equal_time(records: Sequence[Record], epochs: int) -> EqualTime | None:
    """The records, which are grouped by optimizer, by training time.

    The baseline is AdamW, or the first of the records where AdamW is missing or has diverged; one that has diverged
    sets no times. None if that leaves nobody.
    """
    runs = {name: list(group) for name, group in groupby(records, key=lambda record: record.optimizer)}
    complete = [name for name, group in runs.items() if all(len(run.seconds) > epochs for run in group)]
    if not complete:
        return None
    baseline = BASELINE if BASELINE in complete else complete[0]
    clocks = {run.seed: run.seconds for run in runs[baseline]}
    ends = sorted({math.ceil(epochs * part / TIME_POINTS) for part in range(1, TIME_POINTS + 1)})

    def standing(group: Sequence[Record], end: int) -> Spread | None:
        values = [value for run in group if (value := _metric_by(clocks[run.seed][end], run)) is not None]
        return Spread.of(values) if len(values) == len(group) else None

    return EqualTime(
        baseline=baseline,
        epochs=ends,
        seconds=[statistics.median(clock[end] for clock in clocks.values()) for end in ends],
        metric={name: [standing(group, end) for end in ends] for name, group in runs.items()},
    )


def _metric_by(seconds: float, run: Record) -> float | None:
    finished = bisect_right(run.seconds, seconds) - 1
    has_diverged = run.diverged is not None and finished == len(run.metric) - 1
    return None if finished == 0 or has_diverged else run.metric[finished]


@dataclass(frozen=True)
class Reached:
    """When each optimizer was as good as the baseline is at its end, in runs planned for the same budget.

    Attributes:
        baseline: AdamW, or the first that did not diverge.
        value: its metric at its end, mean over seeds.
        seconds: processor time at which the mean over the seeds of an optimizer came to that value for the first time,
            on straight lines between the evaluations; None where it did not, or a run of it diverged.
    """

    baseline: str
    value: float
    seconds: dict[str, float | None]


def reached(metric: Metric, summaries: Sequence[Summary]) -> Reached | None:
    """Of runs with a budget; None if all have diverged."""
    complete = [summary for summary in summaries if summary.metric[-1] is not None]
    if not complete:
        return None
    baseline = next((summary for summary in complete if summary.optimizer == BASELINE), complete[0])
    (*_, last) = _points(baseline)
    return Reached(
        baseline=baseline.optimizer,
        value=last[1],
        seconds={
            summary.optimizer: _first_at(last[1], metric, [*_points(summary)]) if summary in complete else None
            for summary in summaries
        },
    )


def _points(summary: Summary) -> Iterator[tuple[float, float]]:
    """(seconds, metric) after each lap."""
    for seconds, spread in zip(summary.processor_seconds, summary.metric, strict=True):
        if seconds is not None and spread is not None:
            yield seconds, spread.mean


def _first_at(value: float, metric: Metric, points: Sequence[tuple[float, float]]) -> float | None:
    sign = 1 if metric.higher_is_better else -1
    for (before, low), (after, high) in pairwise(points):
        if sign * high >= sign * value:
            part = 1.0 if high == low else (value - low) / (high - low)
            return before + max(part, 0.0) * (after - before)
    return None


def warm_up(task: Task, recipe: Recipe, settings: Settings) -> None:
    """Lets the process do what it does only once, before anything is timed."""
    with closing(Training(task, recipe, 0, settings)) as training:
        for batch in islice(task.batches(0, 0, settings.batch_size), WARM_UP_STEPS):
            training.iterate(batch)
