"""``python -m bench.study``: searches for learning rates, carries out the runs, and writes tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import bench.tables
from bench.study import overviews, pages, pictures, plan, results, runs, tuning
from fisher_kernels.tasks import MissingDataError, MissingExtraError, files

PAGES = Path(__file__).parent.parent.parent / "docs" / "results" / "study"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_show_locals=False)
Names = Annotated[list[str] | None, typer.Argument(help="Tasks; all of them without one.")]


@app.command()
def tune(names: Names = None) -> None:
    """Search for the learning rate of each optimizer, on seeds that no table has."""
    jobs = [(task, size, name) for task, size in _places(names) for name in plan.contestants(task, size)]
    # Those for larger batches are searched for around those for the task's own.
    _work("rates", tuning.search, [job for job in jobs if job[1] == plan.own_batch_size(job[0])])
    _work("rates", tuning.search, [job for job in jobs if job[1] != plan.own_batch_size(job[0])])


@app.command()
def run(names: Names = None) -> None:
    """Carry out the runs of the tables, with the rates that were found."""
    planned: list[runs.Run] = []
    for task, size in _places(names):
        lrs = tuning.chosen(task, size)
        planned += [*plan.runs_at_equal_time(task, size, lrs), *plan.runs_at_equal_steps(task, size, lrs)]
    _work("runs", runs.ensure, [(run,) for run in planned])


@app.command()
def report(names: Names = None) -> None:
    """Write the tables and pictures of what has been run to docs/results/, and into the documents."""
    found = []
    PAGES.mkdir(parents=True, exist_ok=True)
    for task, size in _places(names):
        try:
            files.write(PAGES / f"rates-{task}-{size}.md", pages.rates_table(task, size).encode())
            found.append(results.results(task, size))
        except LookupError as error:
            typer.echo(f"{task} at batches of {size} is left out: {error.args[0]}")
            continue
        stem = PAGES / f"{task}-{size}"
        files.write(stem.with_suffix(".md"), pages.tables(found[-1]).encode())
        files.write(stem.with_suffix(".png"), pictures.picture(found[-1]))
    if names is None and found:
        for name, text in overviews.pages_of_all(found).items():
            files.write(PAGES / name, text.encode())
    bench.tables.update()


def _places(names: list[str] | None) -> list[tuple[str, int]]:
    unknown = [name for name in names or [] if name not in plan.LENGTHS]
    if unknown:
        raise typer.BadParameter(f"unknown task {unknown[0]!r}: choose from {', '.join(plan.LENGTHS)}")
    return [(task, size) for task in names or plan.LENGTHS for size in plan.LENGTHS[task]]


def _work(what: str, work: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> None:
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(calls))
        try:
            runs.each(work, calls, lambda: progress.advance(bar))
        except (MissingDataError, MissingExtraError) as error:
            progress.stop()
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
