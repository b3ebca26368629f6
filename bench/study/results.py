"""What the runs of a table amount to: a summary of each optimizer over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from bench.study import plan, runs, tuning
from bench.study.runs import Line
from fisher_kernels.tasks import Task, find_task
from fisher_kernels.tasks.comparison import Reached, Spread, Summary, reached


@dataclass(frozen=True)
class Results:
    """The tables of a task at a batch size.

    Attributes:
        at_equal_time, at_equal_steps: a summary for each optimizer.
        lost: those that diverge at every rate that was tried.
    """

    task: Task
    batch_size: int
    at_equal_time: list[Summary]
    at_equal_steps: list[Summary]
    lost: list[str]
    machine: dict[str, str]

    @property
    def goal(self) -> Reached | None:
        """When each optimizer was where the baseline ends."""
        return reached(self.task.metric, self.at_equal_time)

    def share(self, optimizer: str) -> float | None:
        """The part of the baseline's time after which an optimizer was there; None if it never was."""
        goal = self.goal
        seconds, base = (goal.seconds[optimizer], goal.seconds[goal.baseline]) if goal else (None, None)
        return seconds / base if seconds is not None and base else None


def results(name: str, batch_size: int) -> Results:
    """Those of runs that are known.

    Raises:
        LookupError: some are not.
        ValueError: runs of one table were made on several machines.
    """
    lrs = tuning.chosen(name, batch_size)
    at_equal_time = [runs.look_up(run) for run in plan.runs_at_equal_time(name, batch_size, lrs)]
    at_equal_steps = [runs.look_up(run) for run in plan.runs_at_equal_steps(name, batch_size, lrs)]
    machine = at_equal_time[0].machine
    if any(line.machine != machine for line in at_equal_time):
        raise ValueError(f"the runs of {name} at batches of {batch_size} are of several machines: run them again")
    lost = [optimizer for optimizer in plan.contestants(name, batch_size) if optimizer not in lrs]
    return Results(find_task(name), batch_size, _summaries(at_equal_time), _summaries(at_equal_steps), lost, machine)


def _summaries(lines: Sequence[Line]) -> list[Summary]:
    groups = groupby(lines, key=lambda line: line.run["optimizer"])
    return [_summary(name, [*group]) for name, group in groups]


def _summary(name: str, lines: Sequence[Line]) -> Summary:
    laps = max(len(line.metric) for line in lines)

    def over(curve: Callable[[Line], Sequence[float]], lap: int) -> list[float]:
        """One value for each seed, or none where a run had diverged by then."""
        values = [curve(line)[lap] for line in lines if len(curve(line)) > lap and not _is_lost(line, lap)]
        return values if len(values) == len(lines) else []

    def medians(curve: Callable[[Line], Sequence[float]]) -> list[float | None]:
        return [_median(over(curve, lap)) for lap in range(laps)]

    def spreads(curve: Callable[[Line], Sequence[float]]) -> list[Spread | None]:
        values = [over(curve, lap) for lap in range(laps)]
        return [Spread.of(value) if value else None for value in values]

    return Summary(
        optimizer=name,
        title=lines[0].title,
        hyperparameters=lines[0].run["hyperparameters"],
        overrides={},
        seeds=[line.run["seed"] for line in lines],
        diverged=[line.run["seed"] for line in lines if line.diverged],
        metric=spreads(lambda line: line.metric),
        also=spreads(lambda line: line.also) if any(line.also for line in lines) else [],
        seconds=medians(lambda line: line.seconds),
        processor_seconds=medians(lambda line: line.processor_seconds),
        iterations=medians(lambda line: line.iterations),
        step_ms=_median([line.step_ms for line in lines if line.step_ms is not None]),
        iteration_ms=_median([line.iteration_ms for line in lines if line.iteration_ms is not None]),
        state_bytes_per_parameter=_median(
            [line.state_bytes_per_parameter for line in lines if line.state_bytes_per_parameter is not None]
        ),
    )


def _is_lost(line: Line, lap: int) -> bool:
    """Whether a run had diverged by its last evaluation, whose figure is then not one to show."""
    return line.diverged is not None and lap == len(line.metric) - 1 and lap > 0


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
