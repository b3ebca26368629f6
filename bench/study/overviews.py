"""Tables over all tasks in Markdown, for ``bench.tables`` to put into the documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.study import plan, tuning
from bench.study.pages import figure, ranked
from bench.study.results import Results
from fisher_kernels.tasks import CONTESTANTS
from fisher_kernels.tasks.comparison import BASELINE, Summary
from fisher_kernels.tools.markdown import markdown_table

STRANGERS = ("adamw", "sgd", *CONTESTANTS)
"""Optimizers that are not ours."""

PAGES = {
    "adafisher": ("adafisher", "adafisherw", "adafisher:relative"),
    "mbf": ("mbf",),
    "kfac": ("kfac", "ekfac", "ekfacadam"),
    "sofim": ("sgd", "sofim"),
}
"""What is beside AdamW on the pages of the optimizers."""


def pages_of_all(all_results: Sequence[Results]) -> dict[str, str]:
    """The text of each file by its name."""
    found = {"overview.md": overview(all_results), "rates.md": chosen_table()}
    return {**found, **{f"of-{page}.md": page_of(names, all_results) for page, names in PAGES.items()}}


def overview(all_results: Sequence[Results]) -> str:
    """A line for each task and batch size: AdamW beside the best of ours, and of the others."""
    header = (
        "task",
        "batch",
        "s",
        "AdamW",
        "best of ours",
        "first of ours at AdamW's last",
        "best of the others",
        "equal steps: AdamW",
        "equal steps: best of ours",
    )
    rows = []
    for results in all_results:
        higher = results.task.metric.higher_is_better
        time = {summary.optimizer: summary for summary in ranked(results.at_equal_time, higher)}
        steps = {summary.optimizer: summary for summary in ranked(results.at_equal_steps, higher)}
        ours = [summary for name, summary in time.items() if name not in STRANGERS]
        others = [summary for name, summary in time.items() if name in STRANGERS and name != BASELINE]
        best_in_steps = next(summary for name, summary in steps.items() if name not in STRANGERS)
        rows.append(
            (
                f"`{results.task.name}`",
                results.batch_size,
                f"{plan.LENGTHS[results.task.name][results.batch_size].seconds:g}",
                figure(results, time[BASELINE]),
                _titled(results, ours[0]),
                _first(results, ours),
                _titled(results, others[0]),
                figure(results, steps[BASELINE]),
                _titled(results, best_in_steps),
            )
        )
    return markdown_table(header, rows, right=(1, 2, 3, 7))


def _first(results: Results, summaries: Sequence[Summary]) -> str:
    """Who of some is the first where AdamW ends, and in which part of the time that takes AdamW."""
    shares = [
        (share, summary.title) for summary in summaries if (share := results.share(summary.optimizer)) is not None
    ]
    if not shares:
        return "none"
    share, title = min(shares)
    return f"{title} in {share:.2f} of its time"


def chosen_table() -> str:
    """The rate of each of our optimizers, and of torch's, on every task that has been searched."""
    header = ("task", "batch", *(plan.titles()[name] for name in plan.OURS))
    rows = []
    for task, sizes in plan.LENGTHS.items():
        for size in sizes:
            try:
                lrs = tuning.chosen(task, size)
            except LookupError:
                continue
            rows.append((f"`{task}`", size, *(f"{lrs[name]:g}" if name in lrs else "-" for name in plan.OURS)))
    return markdown_table(header, rows, right=range(1, len(header)))


def page_of(names: Sequence[str], all_results: Sequence[Results]) -> str:
    """Some optimizers beside AdamW at equal time, and in which part of its time they are where it ends."""
    titles = [plan.titles()[name] for name in names]
    header = ("task", "batch", "s", "AdamW", *(column for title in titles for column in (title, "at AdamW's last")))
    rows: list[tuple[Any, ...]] = []
    for results in all_results:
        length = plan.LENGTHS[results.task.name][results.batch_size]
        found = {summary.optimizer: summary for summary in results.at_equal_time}
        cells: list[str] = []
        for name in names:
            cells += [figure(results, found[name]), _share(results, name)] if name in found else ["-", "-"]
        task = f"`{results.task.name}`, {results.task.metric.unit}"
        rows.append((task, results.batch_size, f"{length.seconds:g}", figure(results, found[BASELINE]), *cells))
    return markdown_table(header, rows, right=range(1, len(header)))


def _share(results: Results, optimizer: str) -> str:
    share = results.share(optimizer)
    return "never" if share is None else f"{share:.2f}"


def _titled(results: Results, summary: Summary) -> str:
    return f"{summary.title} {figure(results, summary)}"
