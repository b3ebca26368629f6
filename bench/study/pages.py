"""The tables of each task in Markdown, for ``bench.tables`` to put into the documents."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

from bench.study import plan, rates, runs, tuning
from bench.study.results import Results
from fisher_kernels.tasks import find_task
from fisher_kernels.tasks.comparison import BASELINE, Summary
from fisher_kernels.tools.markdown import markdown_table

LINE = 120


def tables(results: Results) -> str:
    """Both tables of a task at a batch size."""
    seeds = ", ".join(map(str, plan.SEEDS))
    metric = results.task.metric
    better = "higher" if metric.higher_is_better else "lower"
    length = plan.LENGTHS[results.task.name][results.batch_size]
    steps = results.at_equal_steps[0].iterations[-1]
    machine = results.machine
    parts = [
        f"**Equal time.** Every run is planned for {length.seconds:g} s of processor time on one thread. "
        f"{_capital(metric.name)} in {metric.unit}, {better} is better: mean and deviation over the seeds {seeds}.",
        _time_table(results),
        f"**Equal steps.** {steps:.0f} steps for every optimizer, with the same rates.",
        _steps_table(results),
        f"Batches of {results.batch_size}; measured on {machine['processor']} ({machine['capability']}), torch "
        f"{machine['torch']}, Python {machine['python']}, fisher_kernels {machine['fisher_kernels']}.",
    ]
    return "\n\n".join(part if part.startswith("|") else textwrap.fill(part, LINE) for part in parts) + "\n"


def _time_table(results: Results) -> str:
    metric, goal = results.task.metric, results.goal
    header = (
        "optimizer",
        "lr",
        metric.name,
        "reaches AdamW's last after",
        "steps",
        "ms a step",
        "wall s",
        "processor s",
        "state B/param",
    )
    rows: list[tuple[str, ...]] = []
    for summary in ranked(results.at_equal_time, metric.higher_is_better):
        seconds = goal.seconds[summary.optimizer] if goal else None
        share = results.share(summary.optimizer)
        part = "" if share is None or summary.optimizer == BASELINE else f" ({share:.2f})"
        steps, processor = summary.iterations[-1], summary.processor_seconds[-1]
        per_step = 1e3 * processor / steps if steps and processor else None
        rows.append(
            (
                summary.title,
                f"{summary.hyperparameters['lr']:g}",
                figure(results, summary),
                "never" if seconds is None else f"{seconds:.2f} s{part}",
                _number(steps, ".0f"),
                _number(per_step, ".2f"),
                _number(summary.seconds[-1], ".1f"),
                _number(processor, ".1f"),
                _number(summary.state_bytes_per_parameter, ".1f"),
            )
        )
    titles = {**plan.titles(), **{summary.optimizer: summary.title for summary in results.at_equal_time}}
    rows += [(titles[name], "", "fails at every rate tried", *[""] * 6) for name in results.lost]
    return markdown_table(header, rows, right=range(1, len(header))).rstrip()


def _steps_table(results: Results) -> str:
    summaries = ranked(results.at_equal_steps, results.task.metric.higher_is_better)
    laps = len(results.at_equal_steps[0].metric) - 1
    shown = [max(1, round(laps * part)) for part in (0.25, 0.5, 1.0)]
    steps = [results.at_equal_steps[0].iterations[lap] for lap in shown]
    header = ("optimizer", *(f"after {_number(step, '.0f')}" for step in steps), "wall s", "processor s")
    rows = [
        (
            summary.title,
            *(figure(results, summary, lap) for lap in shown),
            _number(summary.seconds[-1], ".1f"),
            _number(summary.processor_seconds[-1], ".1f"),
        )
        for summary in summaries
    ]
    return markdown_table(header, rows, right=range(1, len(header))).rstrip()


def rates_table(task: str, batch_size: int) -> str:
    """Every rate that was tried on a task, what it led to, and on which machines."""
    metric, titles = find_task(task).metric, plan.titles()
    sign = -1 if metric.higher_is_better else 1
    rows = []
    for name, losses in tuning.tried(task, batch_size).items():
        lost = not any(map(math.isfinite, losses.values()))
        best = None if lost else rates.best(losses)
        cells = [
            f"{lr:g}: {metric.format(sign * loss) if math.isfinite(loss) else _failure(task, batch_size, name, lr)}"
            for lr, loss in losses.items()
        ]
        marked = [f"**{cell}**" if lr == best else cell for lr, cell in zip(losses, cells, strict=True)]
        rows.append((titles[name], ", ".join(marked)))
    return f"{markdown_table(('optimizer', 'rate: what it led to'), rows)}\n{_machines(task, batch_size)}\n"


def _failure(task: str, batch_size: int, optimizer: str, lr: float) -> str:
    """What became of a rate that led to no figure."""
    seeds = plan.tuning_seeds(task, batch_size)
    ends = [runs.look_up(plan.tuning_run(task, batch_size, optimizer, lr, seed)).diverged for seed in seeds]
    return "diverges" if any(end and end.startswith("loss ") for end in ends) else "error"


def _machines(task: str, batch_size: int) -> str:
    """Where the rates of a task were tried, for how long and from which seeds."""
    seeds = plan.tuning_seeds(task, batch_size)
    places = [(line.run["seed"], line.run["batch_size"], line) for line in runs.known(task).values()]
    tried = [line for seed, size, line in places if seed in seeds and size == batch_size]
    found = {f"{m['processor']} ({m['capability']}), torch {m['torch']}" for m in (line.machine for line in tried)}
    shown = f"seed{'s' * (len(seeds) > 1)} {' and '.join(map(str, seeds))}"
    return f"Runs of {plan.LENGTHS[task][batch_size].seconds:g} s, {shown}, on {'; '.join(sorted(found))}."


def ranked(summaries: Sequence[Summary], higher_is_better: bool) -> list[Summary]:
    """The best first, those that diverged last."""

    def loss(summary: Summary) -> float:
        last = summary.metric[-1]
        return math.inf if last is None or summary.diverged else (-last.mean if higher_is_better else last.mean)

    return sorted(summaries, key=loss)


def figure(results: Results, summary: Summary, lap: int = -1) -> str:
    """The metric after a lap, mean and deviation over the seeds."""
    spread = summary.metric[lap] if -len(summary.metric) <= lap < len(summary.metric) else None
    if spread is None or (lap == -1 and summary.diverged):
        return f"diverged ({len(summary.diverged)} of {len(summary.seeds)})"
    form: Callable[[float], str] = results.task.metric.format
    return f"{form(spread.mean)} ± {form(spread.deviation)}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
