"""Pictures of a comparison: the metric by epochs and by time, or of runs with a budget against the clock."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fisher_kernels.tasks.comparison import BASELINE, Reached, Spread, Summary, reached
from fisher_kernels.tasks.task import Metric, Task, require
from fisher_kernels.tasks.training import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by colour-blind readers too. Lines also differ in their markers, or have names.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
GREY = "#5f6670"
DOTS_PER_INCH = 150


def picture(task: Task, settings: Settings, summaries: Sequence[Summary], partial: str | None = None) -> bytes:
    """A PNG of the metric after each lap, one line per optimizer.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    draw = _by_epoch if settings.budget is None else _by_clock
    # A Figure of its own: no pyplot, so no global state and no display.
    figure = require("matplotlib.figure", "matplotlib", "the picture of the curves").Figure(
        figsize=(12, 5.4) if settings.budget is None else (10, 5.6), dpi=DOTS_PER_INCH, layout="constrained"
    )
    draw(figure, task, settings, summaries, ", partial results" if partial else "")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


# Epochs: the same runs against epochs and against their time.


def _by_epoch(figure: Any, task: Task, settings: Settings, summaries: Sequence[Summary], remark: str) -> None:
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
        + remark,
        fontsize="x-large",
    )
    by_epoch.set(xlabel="epoch", ylabel=f"{task.metric.name} ({task.metric.unit})", title="per epoch")
    by_time.set(xlabel="training time (s)", title="against training time")
    by_time.set_xlim(left=0)
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    if _is_accuracy(task.metric):
        shown = [spread.mean for summary in summaries for spread in summary.metric[1:] if spread is not None]
        _stretch_towards_100(by_epoch, max(shown, default=100.0))
    for axes in (by_epoch, by_time):
        axes.grid(alpha=0.3)
    # Beside the axes: within them it would hide a point sooner or later.
    figure.legend(*by_epoch.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(summaries), 6))


def _draw_curve(axes: Axes, x: Sequence[float], curve: Sequence[Spread], summary: Summary, index: int) -> None:
    axes.errorbar(
        x,
        [spread.mean for spread in curve],
        yerr=[spread.deviation for spread in curve],
        label=summary.title + _lost(summary),
        color=COLORS[index % len(COLORS)],
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=5,
        elinewidth=1,
        capsize=3,
    )


# A budget: runs against the clock, with their names at their ends.


def _by_clock(figure: Any, task: Task, settings: Settings, summaries: Sequence[Summary], remark: str) -> None:
    axes = figure.subplots()
    budget = settings.length(task)
    others = iter(COLORS[index % len(COLORS)] for index in range(len(summaries)))
    colors = {s.optimizer: GREY if s.optimizer == BASELINE else next(others) for s in summaries}
    curves = {s.optimizer: _curve(s) for s in summaries}
    for summary in summaries:
        seconds, means, deviations = curves[summary.optimizer]
        color = colors[summary.optimizer]
        axes.plot(seconds, means, color=color, linewidth=2.6, solid_capstyle="round", zorder=3)
        low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
        high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
        axes.fill_between(seconds, low, high, color=color, alpha=0.16, linewidth=0)
    axes.set_xlim(0, budget)
    frame(axes, task.metric, [curve for curve in curves.values() if curve[0]])
    goal = reached(task.metric, summaries)
    if goal is not None and len(summaries) > 1:
        _draw_goal(axes, task.metric, goal, summaries, colors)
    shares = {s.optimizer: _share(goal, s.optimizer, summaries) for s in summaries}
    _name(axes, task.metric, summaries, curves, colors, shares)
    seeds = len(summaries[0].seeds)
    over = f"mean and deviation over {seeds} seeds" if seeds > 1 else f"seed {summaries[0].seeds[0]}"
    axes.set_title(
        f"{task.name}: {task.metric.name} against the clock{remark}", loc="left", fontsize=16, weight="bold", pad=40
    )
    axes.annotate(
        f"{task.summary}\nbatches of {settings.batch_size}; {over}",
        (0, 1),
        (0, 6),
        "axes fraction",
        "offset points",
        va="bottom",
        fontsize=10.5,
        color=GREY,
        linespacing=1.3,
        annotation_clip=False,
    )
    axes.set_ylabel(f"{task.metric.name} ({task.metric.unit})", fontsize=12)
    axes.set_xlabel("training time (seconds of processor time)", fontsize=12)
    axes.grid(color="#e8eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


Curve = tuple[list[float], list[float], list[float]]


def _curve(summary: Summary) -> Curve:
    """Seconds, means and deviations after each lap, without the untrained model."""
    points = zip(summary.processor_seconds, summary.metric, strict=True)
    known = [(s, spread.mean, spread.deviation) for s, spread in points if s is not None and spread is not None]
    seconds, means, deviations = ([point[i] for point in known[1:]] for i in range(3))
    return seconds, means, deviations


def frame(axes: Axes, metric: Metric, curves: Sequence[Curve]) -> None:
    """An axis with room for the ends of the runs; their first steps, and who is far off, may leave it."""
    if _is_accuracy(metric):
        _stretch_towards_100(axes, max((max(curve[1]) for curve in curves), default=100.0))
        return
    if not curves:
        return
    sign = 1 if metric.higher_is_better else -1
    ends = [curve[1][-1] for curve in curves]
    best = max(ends, key=lambda end: sign * end)
    # What the best has come from after an eighth of the time, and the ends of all that are not far off.
    early = next(curve[1][min(2, len(curve[1]) - 1)] for curve in curves if curve[1][-1] == best)
    come = max(abs(early - best), 1e-12)
    room = max(1.15 * come, *(1.6 * abs(end - best) for end in ends if abs(end - best) < 3 * come))
    edges = best + sign * 0.1 * room, best - sign * room
    axes.set_ylim(min(edges), max(edges))


def _draw_goal(axes: Axes, metric: Metric, goal: Reached, summaries: Sequence[Summary], colors: dict[str, str]) -> None:
    """Where the baseline ends, and when the others came to it: what is beyond lies to the right of each point."""
    title = next(summary.title for summary in summaries if summary.optimizer == goal.baseline)
    down = 1 if metric.higher_is_better else -1
    side = "bottom" if metric.higher_is_better else "top"
    axes.axhline(goal.value, color=GREY, linewidth=1.1, linestyle=(0, (2, 3)), zorder=2)
    style: dict[str, Any] = {"textcoords": "offset points", "va": side, "fontsize": 10.5, "zorder": 5}
    axes.annotate(
        f"where {title} ends", (0, goal.value), (5, 4 * down), xycoords=("axes fraction", "data"), color=GREY, **style
    )
    for name, seconds in goal.seconds.items():
        if seconds is not None and name != goal.baseline:
            axes.plot(seconds, goal.value, "o", color=colors[name], markersize=8, markeredgecolor="white", zorder=4)


def _share(goal: Reached | None, name: str, summaries: Sequence[Summary]) -> str:
    """In which part of the baseline's time an optimizer came to where that ends, as a line below its name."""
    if goal is None or name == goal.baseline:
        return ""
    seconds, base = goal.seconds[name], goal.seconds[goal.baseline]
    title = next(summary.title for summary in summaries if summary.optimizer == goal.baseline)
    return f"{seconds / base:.2f} of {title}'s time" if seconds is not None and base else ""


def _name(
    axes: Axes,
    metric: Metric,
    summaries: Sequence[Summary],
    curves: dict[str, Curve],
    colors: dict[str, str],
    shares: dict[str, str],
) -> None:
    """Names with their last figures, to the right of where the lines end, moved apart where those are close."""
    bottom, top = axes.get_ylim()
    to_axes = axes.transData + axes.transAxes.inverted()

    def height(value: float) -> float:
        """On the axis, from 0 to 1."""
        inside = min(max(value, bottom), top)
        return float(to_axes.transform((0, inside))[1])

    ends = sorted(
        (height(curves[s.optimizer][1][-1]) if curves[s.optimizer][1] else 1.0, i) for i, s in enumerate(summaries)
    )
    # Where there is room, a name has its share below it, and stands as much higher above the next one.
    show_shares = len(summaries) <= 4
    heights: list[float] = []
    free = -0.05
    for end, index in ends:
        apart = 0.1 if show_shares and shares[summaries[index].optimizer] else 0.058
        heights.append(max(end, free + apart))
        free = heights[-1]
    excess = max(0.0, heights[-1] - 1.0)
    for (_, index), place in zip(ends, heights, strict=True):
        summary = summaries[index]
        means = curves[summary.optimizer][1]
        figure = f"  {metric.format(means[-1])}" if means and not summary.diverged else _lost(summary)
        axes.annotate(
            f"{summary.title}{figure}",
            (1.012, place - excess),
            xycoords="axes fraction",
            va="center",
            color=colors[summary.optimizer],
            fontsize=12.5,
            fontweight="bold",
            annotation_clip=False,
        )
        if show_shares:
            axes.annotate(
                shares[summary.optimizer],
                (1.012, place - excess - 0.042),
                xycoords="axes fraction",
                va="center",
                color=colors[summary.optimizer],
                fontsize=9.5,
                annotation_clip=False,
            )


# What both have.


def _lost(summary: Summary) -> str:
    lost = len(summary.diverged)
    return f" (diverged: {lost} of {len(summary.seeds)})" if lost else ""


def _is_accuracy(metric: Metric) -> bool:
    return metric.unit == "%" and metric.higher_is_better


def _stretch_towards_100(axes: Axes, best: float) -> None:
    """Gives 98 to 99 % as much room as 80 to 90 %: a logarithmic axis of what is missing to 101 %, up to the best."""
    import numpy as np  # which matplotlib brings, and nothing else here needs

    axes.set_yscale(
        "function",
        functions=(
            lambda accuracy: -np.log10(np.maximum(101 - accuracy, 1e-3)),
            lambda position: 101 - 10 ** (-position),
        ),
    )
    low, high = axes.get_ylim()[0], min(100.2, 101 - (101 - best) / 1.4)
    axes.set_ylim(low, high)
    ticks = (10, 30, 50, 60, 70, 80, 85, 90, 95, 97, 98, 99, 99.5, 100)
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter("{x:g}")
