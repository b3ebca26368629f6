"""The output of a comparison: tables for the terminal, a JSON file, a picture."""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fisher_kernels.tasks.comparison import EqualTime, Spread, Summary, at_equal_time, presentable, summarize
from fisher_kernels.tasks.task import Metric, Task, require
from fisher_kernels.tasks.training import Record, Settings
from fisher_kernels.tools import environment
from fisher_kernels.tools.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by colour-blind readers too. Lines also differ in their markers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_DOTS_PER_INCH = 150
_LINE = 120  # of prose in a Markdown file


def tables(
    task: Task,
    settings: Settings,
    summaries: Sequence[Summary],
    equal_time: EqualTime | None,
    partial: str | None = None,
) -> Group:
    """The metric epoch by epoch and, of several optimizers, at equal training times; what the steps cost.

    ``partial`` says why there is not all that was asked for.
    """
    seeds = len(summaries[0].seeds)
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else f"seed {summaries[0].seeds[0]}"
    schedule = "cosine" if settings.cosine else "constant"
    metric = f"{task.metric.name} in {task.metric.unit}"
    parts: list[str | Table] = [f"Partial results: {partial}."] if partial else []
    parts += [
        f"{task.name}: {task.summary}; {settings.epochs} epochs, batch size {settings.batch_size}, "
        f"{schedule} learning rate",
        f"{metric} per epoch, {over}",
        _metric_table(task, summaries),
    ]
    if equal_time is not None and len(summaries) > 1:
        baseline = _title(equal_time.baseline, summaries)
        parts += [
            f"{metric} at equal training time, {over}. The times are those that {baseline} takes for so many epochs, "
            "seed by seed; the others are shown after the last epoch that they have finished by then (-: a run has "
            "finished none or has diverged).",
            _time_table(task, summaries, equal_time),
        ]
    parts += [
        "Cost, medians over iterations and seeds. Step: optimizer.step() alone. Iteration: zero_grad, forward, "
        "backward and step. Training: all iterations of a run, without evaluation.",
        _cost_table(summaries),
    ]
    return Group(*parts)


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
        cells = [_cell(task.also, summary.also[-1], summary, _diverged(summary)) for summary in summaries]
        table.add_row(task.also.name, *cells)
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


def _cost_table(summaries: Sequence[Summary]) -> Table:
    table = Table()
    table.add_column("optimizer", no_wrap=True)
    for name in ("lr", "weight decay", "step ms", "iteration ms", "training s", "state B/param"):
        table.add_column(name, justify="right")
    for summary in summaries:
        table.add_row(
            summary.title,
            _number(summary.hyperparameters.get("lr"), "g"),
            _number(summary.hyperparameters.get("weight_decay"), "g"),
            _number(summary.step_ms, ".3f"),
            _number(summary.iteration_ms, ".2f"),
            _number(summary.seconds[-1], ".2f"),
            _number(summary.state_bytes_per_parameter, ".2f"),
        )
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
    part = presentable(records, settings.epochs)
    parts = {
        "task": task.name,
        "partial": partial,
        "metric": task.metric,
        "also": task.also,
        "settings": settings,
        "environment": environment.describe(),
        "summary": summarize(part.records, part.epochs),
        "equal_time": at_equal_time(part.records, part.epochs),
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


def picture(task: Task, summaries: Sequence[Summary], partial: str | None = None) -> bytes:
    """A PNG: the metric after each epoch, against epochs and against training time, one line per optimizer.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # A Figure of its own: no pyplot, so no global state and no display.
    figure = require("matplotlib.figure", "matplotlib", "the picture of the curves").Figure(
        figsize=(12, 5.4), dpi=_DOTS_PER_INCH, layout="constrained"
    )
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    for index, summary in enumerate(summaries):
        # The untrained model, epoch 0, is left out: it would squeeze everything else into a corner.
        curve = {epoch: spread for epoch, spread in enumerate(summary.metric) if epoch and spread is not None}
        _draw_curve(by_epoch, list(curve), list(curve.values()), summary, index)
        _draw_curve(by_time, [summary.seconds[epoch] or 0.0 for epoch in curve], list(curve.values()), summary, index)
    seeds = len(summaries[0].seeds)
    figure.suptitle(
        f"{task.name}: {task.metric.name}"
        + (f" (mean and deviation over {seeds} seeds)" if seeds > 1 else "")
        + (", partial results" if partial else ""),
        fontsize="x-large",
    )
    by_epoch.set(xlabel="epoch", ylabel=f"{task.metric.name} ({task.metric.unit})", title="per epoch")
    by_time.set(xlabel="training time (s)", title="against training time")
    by_time.set_xlim(left=0)
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    if task.metric.unit == "%" and task.metric.higher_is_better:
        _stretch_towards_100(by_epoch)
    for axes in (by_epoch, by_time):
        axes.grid(alpha=0.3)
    # Beside the axes: within them it would hide a point sooner or later.
    figure.legend(*by_epoch.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(summaries), 6))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_curve(axes: Axes, x: Sequence[float], curve: Sequence[Spread], summary: Summary, index: int) -> None:
    lost = len(summary.diverged)
    label = summary.title + (f" (diverged: {lost} of {len(summary.seeds)})" if lost else "")
    mean = [spread.mean for spread in curve]
    deviation = [spread.deviation for spread in curve]
    axes.errorbar(
        x,
        mean,
        yerr=deviation,
        label=label,
        color=_COLORS[index % len(_COLORS)],
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=5,
        elinewidth=1,
        capsize=3,
    )


def _stretch_towards_100(axes: Axes) -> None:
    """Gives 98 to 99 % as much room as 80 to 90 %: a logarithmic axis of what is missing to 101 %."""
    import numpy as np  # which matplotlib brings, and nothing else here needs

    axes.set_yscale(
        "function",
        functions=(
            lambda accuracy: -np.log10(np.maximum(101 - accuracy, 1e-3)),
            lambda position: 101 - 10 ** (-position),
        ),
    )
    low = axes.get_ylim()[0]
    axes.set_ylim(low, 100.2)
    axes.set_yticks([tick for tick in (10, 30, 50, 70, 80, 90, 95, 97, 98, 99, 99.5, 100) if tick >= low])
    axes.yaxis.set_major_formatter("{x:g}")
