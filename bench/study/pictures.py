"""One picture for each table: the same optimizers by steps and by the clock."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from bench.study.results import Results
from fisher_kernels.tasks.comparison import BASELINE, Summary
from fisher_kernels.tasks.pictures import frame
from fisher_kernels.tasks.task import require

# Okabe and Ito's palette for ours, greys for what torch has, and thin broken lines for all others, so that every
# picture has the same line for the same optimizer.
_OURS = {
    "mbf": "#0072B2",
    "kfac": "#D55E00",
    "ekfac": "#E69F00",
    "ekfacadam": "#CC79A7",
    "adafisher": "#009E73",
    "adafisherw": "#56B4E9",
    "sofim": "#000000",
}
_GREYS = {BASELINE: "#5f6670", "sgd": "#a9b0b8"}
_OTHERS = {
    "adafisher:relative": "#009E73",
    "soap": "#7b3294",
    "muon": "#b2182b",
    "psgd": "#1b7837",
    "shampoo": "#8c510a",
    "kbfgs": "#01665e",
    "adahessian": "#c51b7d",
    "adagrad": "#4d9221",
    "rmsprop": "#542788",
    "lbfgs": "#b35806",
}


def picture(results: Results) -> bytes:
    """What is drawn, as a PNG."""
    file = io.BytesIO()
    draw(results).savefig(file, format="png")
    return file.getvalue()


def draw(results: Results) -> Any:
    """A figure of both tables; what is far off leaves it."""
    figure = require("matplotlib.figure", "matplotlib", "the picture of the curves").Figure(
        figsize=(12, 5.6), dpi=130, layout="constrained"
    )
    by_steps, by_clock = figure.subplots(1, 2, sharey=True)
    task = results.task
    curves = [_draw(by_clock, summary, summary.processor_seconds) for summary in results.at_equal_time]
    curves += [_draw(by_steps, summary, summary.iterations) for summary in results.at_equal_steps]
    frame(by_clock, task.metric, [curve for curve in curves if curve[0]])  # and the other one, which has its axis
    by_steps.set(xlabel="steps", ylabel=f"{task.metric.name} ({task.metric.unit})", title="at equal steps")
    by_clock.set(xlabel="training time (s of processor time)", title="planned for the same time")
    for axes in (by_steps, by_clock):
        axes.set_xlim(left=0)
        axes.grid(color="#e8eaed", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    title = f"{task.name}, batches of {results.batch_size}: {task.summary}"
    figure.suptitle(textwrap.fill(title, 112, break_on_hyphens=False), x=0.01, ha="left", fontsize=12.5, weight="bold")
    figure.legend(*by_clock.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _draw(
    axes: Any, summary: Summary, positions: Sequence[float | None]
) -> tuple[list[float], list[float], list[float]]:
    """The means with a band of one deviation, without the untrained model."""
    points = [(x, s) for x, s in zip(positions, summary.metric, strict=True) if x is not None and s is not None][1:]
    xs, means = [x for x, _ in points], [spread.mean for _, spread in points]
    deviations = [spread.deviation for _, spread in points]
    name = summary.optimizer
    color = _OURS.get(name) or _GREYS.get(name) or _OTHERS[name]
    style = (0, (4, 2)) if name in _OTHERS else "solid"
    axes.plot(xs, means, color=color, linestyle=style, linewidth=1.3 if name in _OTHERS else 2.2, label=summary.title)
    if name not in _OTHERS:
        low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
        high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
        axes.fill_between(xs, low, high, color=color, alpha=0.12, linewidth=0)
    return xs, means, deviations
