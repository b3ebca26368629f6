"""The output of a comparison: tables for the terminal, Markdown, a JSON file."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fisher_kernels.tasks.comparison import (
    TIME_POINTS,
    EqualTime,
    Spread,
    Summary,
    at_equal_time,
    presentable,
    reached,
    summarize,
)
from fisher_kernels.tasks.task import Metric, Task
from fisher_kernels.tasks.training import Record, Settings
from fisher_kernels.tools import environment
from fisher_kernels.tools.markdown import markdown_table

_LINE = 120  # of prose in a Markdown file


def tables(
    task: Task,
    settings: Settings,
    summaries: Sequence[Summary],
    equal_time: EqualTime | None,
    partial: str | None = None,
) -> Group:
    """The metric lap by lap and, of several optimizers, at equal training times; what the steps cost.

    ``partial`` says why there is not all that was asked for.
    """
    seeds = len(summaries[0].seeds)
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else f"seed {summaries[0].seeds[0]}"
    schedule = "cosine" if settings.cosine else "constant"
    metric = f"{task.metric.name} in {task.metric.unit}"
    parts: list[str | Table] = [f"Partial results: {partial}."] if partial else []
    if settings.budget is None:
        parts += [
            f"{task.name}: {task.summary}; {settings.epochs} epochs, batch size {settings.batch_size}, "
            f"{schedule} learning rate",
            *_overrides(summaries),
            f"{metric} per epoch, {over}",
            _metric_table(task, summaries),
        ]
    else:
        parts += [
            f"{task.name}: {task.summary}; {settings.budget:g} s of processor time for each run, batch size "
            f"{settings.batch_size}, {schedule} learning rate" + (" planned for that time" if settings.cosine else ""),
            *_overrides(summaries),
            f"{metric} at equal training time, {over}",
            _budget_table(task, settings.budget, settings.laps, summaries),
        ]
    if equal_time is not None and len(summaries) > 1:
        baseline = _title(equal_time.baseline, summaries)
        parts += [
            f"{metric} at equal training time, {over}. The times are those that {baseline} takes for so many epochs, "
            "seed by seed; the others are shown after the last epoch that they have finished by then (-: a run has "
            "finished none or has diverged).",
            _time_table(task, summaries, equal_time),
        ]
    length = "Training: all iterations of a run, without evaluation." if settings.budget is None else ""
    parts += [
        "Cost, medians over iterations and seeds. Step: optimizer.step() alone. Iteration: zero_grad, forward, "
        f"backward and step. {length}".rstrip(),
        _cost_table(task, settings, summaries),
    ]
    return Group(*parts)


def _overrides(summaries: Sequence[Summary]) -> list[str]:
    """What was asked for, in place of the task's own hyperparameters."""
    asked = [f"{s.title} {', '.join(map(_setting, s.overrides.items()))}" for s in summaries if s.overrides]
    return [f"Set by hand: {'; '.join(asked)}."] if asked else []


def _setting(item: tuple[str, Any]) -> str:
    name, value = item
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


class _Pair:
    """A cell of two parts, side by side where the column is wide enough, else below each other."""

    def __init__(self, first: str, second: str) -> None:
        self.first, self.second = first, second

    def __str__(self) -> str:
        return f"{self.first} {self.second}"

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        narrow = max(len(self.first), len(self.second))
        return Measurement(narrow, len(str(self)) if len(str(self)) <= options.max_width else narrow)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fits = len(str(self)) <= options.max_width
        yield Text(str(self) if fits else f"{self.first}\n{self.second}")


def _add_columns(table: Table, summaries: Sequence[Summary]) -> None:
    """One for each optimizer, wide enough for every word of its name."""
    for summary in summaries:
        table.add_column(summary.title, justify="right", min_width=max(map(len, summary.title.split())))


def _metric_table(task: Task, summaries: Sequence[Summary]) -> Table:
    table = Table()
    table.add_column("epoch", justify="right")
    _add_columns(table, summaries)
    epochs = len(summaries[0].metric)
    for epoch in range(1, epochs):
        cells = [_cell(task.metric, summary.metric[epoch], summary, _diverged(summary)) for summary in summaries]
        table.add_row(str(epoch), *cells, style="bold" if epoch == epochs - 1 else None)
    if task.also is not None:
        table.caption = f"last row: {task.also.name} ({task.also.unit}) after the last epoch"
        table.add_section()
        _add_also(table, task.also, summaries)
    return table


def _add_also(table: Table, also: Metric, summaries: Sequence[Summary]) -> None:
    cells = [_cell(also, summary.also[-1], summary, _diverged(summary)) for summary in summaries]
    table.add_row(also.name, *cells)


def _budget_table(task: Task, budget: float, all_laps: int, summaries: Sequence[Summary]) -> Table:
    """At the eighths of the budget; of several optimizers, when each had come as far as the baseline comes."""
    table = Table()
    table.add_column("seconds", justify="right")
    _add_columns(table, summaries)
    laps = len(summaries[0].metric) - 1  # fewer where the runs were stopped
    shown = [lap for lap in range(1, laps + 1) if lap % max(all_laps // TIME_POINTS, 1) == 0] or [laps]
    for lap in shown:
        cells = [_cell(task.metric, summary.metric[lap], summary, _diverged(summary)) for summary in summaries]
        table.add_row(f"{budget * lap / all_laps:.2f}", *cells, style="bold" if lap == laps == all_laps else None)
    captions = []
    if task.also is not None:
        captions.append(f"{task.also.name} ({task.also.unit}) at the end")
        table.add_section()
        _add_also(table, task.also, summaries)
    goal = reached(task.metric, summaries)
    if goal is not None and len(summaries) > 1:
        captions.append(f"seconds until {_title(goal.baseline, summaries)}'s last {task.metric.name} was reached")
        table.add_section()
        times = (goal.seconds[summary.optimizer] for summary in summaries)
        table.add_row("reached after", *(_number(seconds, ".2f") for seconds in times))
    if captions:
        table.caption = f"last row{'s' * (len(captions) > 1)}: {'; '.join(captions)}"
    return table


def _time_table(task: Task, summaries: Sequence[Summary], equal_time: EqualTime) -> Table:
    table = Table()
    table.add_column(f"{_title(equal_time.baseline, summaries)} epoch", justify="right")
    _add_columns(table, summaries)
    for row, (epoch, seconds) in enumerate(zip(equal_time.epochs, equal_time.seconds, strict=True)):
        standings = ((equal_time.metric[summary.optimizer][row], summary) for summary in summaries)
        cells = [_cell(task.metric, spread, summary, "-") for spread, summary in standings]
        table.add_row(
            _Pair(str(epoch), f"({seconds:.2f} s)"), *cells, style="bold" if epoch == equal_time.epochs[-1] else None
        )
    return table


def _title(name: str, summaries: Sequence[Summary]) -> str:
    return next(summary.title for summary in summaries if summary.optimizer == name)


def _cell(metric: Metric, spread: Spread | None, summary: Summary, missing: str) -> str | _Pair:
    if spread is None:
        return missing
    mean = metric.format(spread.mean)
    return _Pair(mean, f"± {metric.format(spread.deviation)}") if len(summary.seeds) > 1 else mean


def _diverged(summary: Summary) -> str:
    """What stands where a figure is missing: of a run that has not come so far, nothing is known."""
    return f"[red]diverged ({len(summary.diverged)} of {len(summary.seeds)})[/red]" if summary.diverged else "-"


def _cost_table(task: Task, settings: Settings, summaries: Sequence[Summary]) -> Table:
    table = Table()
    table.add_column("optimizer", no_wrap=True)
    # What is not the same for all of them: how long a run took, or how many steps it made in its time.
    by_epoch = settings.budget is None
    length = "training s" if by_epoch else "steps"
    for name in ("lr", "weight decay", "step ms", "iteration ms", length, "state B/param"):
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    epochs = []
    for summary in summaries:
        iterations = summary.iterations[-1]
        if iterations is not None:
            epochs.append(f"{summary.title} {iterations / settings.steps_per_epoch(task):.1f}")
        table.add_row(
            summary.title,
            _number(summary.hyperparameters.get("lr"), "g"),
            _number(summary.hyperparameters.get("weight_decay"), "g"),
            _number(summary.step_ms, ".3f"),
            _number(summary.iteration_ms, ".2f"),
            _number(summary.seconds[-1], ".2f") if by_epoch else _number(iterations, ".0f"),
            _number(summary.state_bytes_per_parameter, ".2f"),
        )
    if epochs and not by_epoch:
        table.caption = f"epochs within the budget: {', '.join(epochs)}"
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def markdown(parts: Group) -> str:
    """The same sentences and tables as Markdown, with what they were measured on."""
    facts = environment.describe()
    paragraphs = []
    for part in parts.renderables:
        if isinstance(part, Table):
            paragraphs.append(_markdown_table(part))
        text = part.caption if isinstance(part, Table) else part
        if text:
            paragraphs.append(textwrap.fill(str(text), _LINE))
    machine = (
        f"Measured on {facts['processor']} with {facts['threads']} of its threads ({facts['capability']}), torch "
        f"{facts['torch']}, Python {facts['python']}, {datetime.date.today().isoformat()}."
    )
    return "\n\n".join([*paragraphs, textwrap.fill(machine, _LINE)]) + "\n"


def _markdown_table(shown: Table) -> str:
    def plain(cells: Iterable[RenderableType]) -> list[str]:
        return [Text.from_markup(str(cell)).plain for cell in cells]

    rows = zip(*(column.cells for column in shown.columns), strict=True)
    right = [i for i, column in enumerate(shown.columns) if column.justify == "right"]
    return markdown_table(plain(column.header for column in shown.columns), map(plain, rows), right).rstrip()


def document(task: Task, settings: Settings, records: Sequence[Record], partial: str | None = None) -> dict[str, Any]:
    """Everything that is known about a comparison, as plain JSON types; figures that are not finite become null.

    ``partial`` says why there is not all that was asked for. ``runs`` then has every run that has begun, the summary
    those that can be compared.
    """
    part = presentable(records, settings.laps)
    summaries = summarize(part.records, part.laps)
    budget = settings.budget is not None
    parts: dict[str, Any] = {
        "task": task.name,
        "partial": partial,
        "metric": task.metric,
        "also": task.also,
        "settings": settings,
        "date": datetime.date.today().isoformat(),
        "environment": environment.describe(),
        "summary": summaries,
        "equal_time": None if budget else at_equal_time(part.records, part.laps),
        "reached": reached(task.metric, summaries) if budget else None,
        "runs": records,
    }
    return {name: _plain(part) for name, part in parts.items()}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_json(data: dict[str, Any]) -> str:
    """Standard JSON: a figure that is not finite is an error here, see ``document``."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"
