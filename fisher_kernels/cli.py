"""The command line: ``fisher-kernels``, or ``python -m fisher_kernels``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fisher_kernels import __version__, backends, tasks
from fisher_kernels.tasks import report
from fisher_kernels.tasks.optimizers import Recipe
from fisher_kernels.tasks.task import Task
from fisher_kernels.tasks.training import Record, Settings, Training
from fisher_kernels.tools import environment, inspection, selftest

app = typer.Typer(
    name="fisher-kernels",
    help="Fisher-information optimizers on fast kernels: what is installed, self-test, training tasks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

_TASKS = ", ".join(tasks.TASKS)
_OPTIMIZERS = ", ".join(
    name + "".join(f", {name}:{variant}" for variant in entry.variants[1:]) for name, entry in tasks.OPTIMIZERS.items()
)

TaskName = Annotated[str, typer.Argument(metavar="TASK", help=f"One of: {_TASKS}.", show_default=False)]
Epochs = Annotated[int | None, typer.Option(min=1, help="Epochs to train.", show_default="the task's")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Samples per iteration.", show_default="the task's")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Stop every epoch after so many iterations.")]
Schedule = Annotated[str, typer.Option(help="Learning rate over the run: cosine (to zero) or constant.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Processor threads.", show_default="the task's")]
Out = Annotated[Path | None, typer.Option(help="Folder for the files.", show_default="results/TASK")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fisher_kernels {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def info(as_json: Json = False) -> None:
    """Show versions, the processor, and which backends are available."""
    facts = environment.describe()
    if as_json:
        _print_json(facts)
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if name != "backends":
            table.add_row(name, _fact(value))
    availability = Table("backend", "available", title="backends", title_justify="left")
    for name, reason in facts["backends"].items():
        availability.add_row(name, "[green]yes[/green]" if reason is None else f"[yellow]no:[/yellow] {escape(reason)}")
    Console().print(table, "", availability)


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_fact(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_fact, value))
    return "none" if value is None else str(value)


@app.command()
def train(
    task: TaskName,
    optimizer: Annotated[str, typer.Option(help=f"One of: {_OPTIMIZERS}.", show_default=False)],
    variant: Annotated[str | None, typer.Option(help="The same as --optimizer NAME:VARIANT.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate.", show_default="tuned")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="Weight decay.", show_default="tuned")] = None,
    update_interval: Annotated[int | None, typer.Option(min=1, help="Steps between refreshes of the factors.")] = None,
    damping: Annotated[float | None, typer.Option(min=0, help="Constant added to the curvature.")] = None,
    rho: Annotated[float | None, typer.Option(min=0, help="Regularisation of SOFIM's matrix.")] = None,
    epochs: Epochs = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the initial model and the order of the batches.")] = 0,
    batch_size: BatchSize = None,
    max_steps: MaxSteps = None,
    schedule: Schedule = "cosine",
    threads: Threads = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train one optimizer on a task. Exits with 1 if training diverges."""
    given = {
        "lr": lr,
        "weight_decay": weight_decay,
        "update_interval": update_interval,
        "damping": damping,
        "rho": rho,
    }
    overrides = {name: value for name, value in given.items() if value is not None}
    name = optimizer if variant is None else f"{optimizer}:{variant}"
    with _usage_errors():
        chosen = tasks.find_task(task)
        recipes = [tasks.recipe(chosen, name, overrides)]
        settings = _settings(chosen, epochs, batch_size, max_steps, schedule)
    _set_threads(threads or chosen.threads)
    stem = recipes[0].name.replace(":", "-")
    records = _run(chosen, recipes, [seed], settings, out, stem, as_json)
    if records[0].diverged:
        raise typer.Exit(1)


@app.command()
def compare(
    task: TaskName,
    optimizers: Annotated[str, typer.Option(help=f"Comma-separated, of: {_OPTIMIZERS}.")] = ",".join(tasks.OPTIMIZERS),
    epochs: Epochs = None,
    seeds: Annotated[str, typer.Option(help="How many seeds (3 means 0, 1, 2), or a list such as 4,7 or 4,.")] = "3",
    batch_size: BatchSize = None,
    max_steps: MaxSteps = None,
    schedule: Schedule = "cosine",
    threads: Threads = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train several optimizers side by side on a task, from the same initial models and batches.

    Shows how far each has come after each epoch and after equal training time, and what its steps cost.

    A run that diverges is reported as such and does not stop the others.
    """
    with _usage_errors():
        chosen = tasks.find_task(task)
        names = dict.fromkeys(name.strip() for name in optimizers.split(","))
        recipes = [tasks.recipe(chosen, name) for name in names]
        settings = _settings(chosen, epochs, batch_size, max_steps, schedule)
        numbers = _seeds(seeds)
    _set_threads(threads or chosen.threads)
    _run(chosen, recipes, numbers, settings, out, "compare", as_json)


@app.command("selftest")
def self_test(as_json: Json = False) -> None:
    """Check every op on every available backend against the reference in float64. Exits with 1 on any failure."""
    results = list(selftest.run())
    failures = [result for result in results if not result.passed]
    if as_json:
        checks = [dataclasses.asdict(result) for result in results]
        _print_json({"passed": not failures, "environment": environment.describe(), "checks": checks})
    else:
        console = Console()
        console.print(_selftest_table(results))
        for failed in failures:
            where = f"{failed.op}, {failed.case}, {failed.dtype} on {failed.backend} ({failed.device})"
            console.print(
                f"[red]failed:[/red] {where}: {escape(failed.message or '')}", highlight=False, soft_wrap=True
            )
        for backend, reason in backends.reasons().items():
            if reason is not None:
                console.print(f"not tested: {backend}: {escape(reason)}", highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


@app.command()
def inspect(
    target: Annotated[
        list[str] | None, typer.Option(help=f"One of: {', '.join(inspection.TARGETS)}.", show_default="all")
    ] = None,
    kernels: Annotated[str, typer.Option(help="Regular expression that names of kernels match.")] = "",
    sample: Annotated[bool, typer.Option("--sample", help="One variant of each kernel only.")] = False,
    backend: Annotated[
        list[str] | None,
        typer.Option(help=f"One of: {', '.join(inspection.BACKENDS)}.", show_default="all that can be inspected here"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what the code of every GPU kernel needs, for GPUs that need not be here.

    Triton's kernels are compiled for it, those in CUDA are read from the native module. Exits with 1 where a kernel
    does not compile, keeps registers in memory, or reads a stream in narrow pieces.
    """
    reasons = {name: part.why_not() for name, part in inspection.BACKENDS.items()}
    chosen = backend or [name for name, reason in reasons.items() if reason is None] or list(reasons)
    try:
        with _usage_errors(), _inspection_progress() as watch:
            rows = list(watch(inspection.run(target or inspection.TARGETS, kernels, sample, chosen)))
    except RuntimeError as error:
        _fail(str(error))
    faults = [(row, fault) for row in rows for fault in row.faults]
    if as_json:
        _print_json({"passed": bool(rows) and not faults, "variants": [dataclasses.asdict(row) for row in rows]})
    else:
        console = Console()
        Console(width=max(console.width, 140)).print(_inspection_table(rows))
        for name, reason in reasons.items():
            if name not in chosen:
                console.print(f"not inspected: {name}: {escape(str(reason))}", highlight=False, soft_wrap=True)
        for name, note in sorted({(row.kernel, row.note) for row in rows if row.note}):
            console.print(f"accepted: {name}: {note}", highlight=False, soft_wrap=True)
        for row, fault in faults:
            where = f"{row.backend}, {row.target}, {row.kernel}, {row.arguments}"
            console.print(f"[red]failed:[/red] {escape(where)}: {escape(fault)}", highlight=False, soft_wrap=True)
    if faults or not rows:
        raise typer.Exit(1)


@contextmanager
def _inspection_progress() -> Iterator[Callable[[Iterator[inspection.Row]], Iterator[inspection.Row]]]:
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed} variants"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("inspecting", total=None)

        def watch(rows: Iterator[inspection.Row]) -> Iterator[inspection.Row]:
            for row in rows:
                progress.update(bar, advance=1)
                yield row

        yield watch


def _inspection_table(rows: Sequence[inspection.Row]) -> Table:
    """One row for each target and kernel, over all its variants."""
    table = Table(caption="shared, stack: bytes; loads, stores: widths in bytes; over all variants")
    for name in ("target", "backend", "kernel"):
        table.add_column(name, no_wrap=True)
    for name in ("variants", "registers", "shared", "stack", "loads", "stores", "seconds"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str, str], list[inspection.Row]] = {}
    for row in rows:
        groups.setdefault((row.target, row.backend, row.kernel), []).append(row)
    for (target, backend, kernel), group in sorted(groups.items()):
        colour = "red" if any(row.faults for row in group) else "green"
        figures = (_range([getattr(row, name) for row in group]) for name in ("registers", "shared", "stack"))
        widths = (_widths(group, kind) for kind in ("load", "store"))
        seconds = sum(row.seconds for row in group)
        name = f"[{colour}]{kernel}[/{colour}]"
        table.add_row(target, backend, name, str(len(group)), *figures, *widths, f"{seconds:.1f}")
    return table


def _range(values: Sequence[int | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return str(known[0]) if min(known) == max(known) else f"{min(known)}-{max(known)}"


def _widths(rows: Sequence[inspection.Row], kind: str) -> str:
    """The widths in bytes of all accesses of a kind, the widest first."""
    names = {tuple(name.split()) for row in rows for name in row.accesses}
    return " ".join(str(width) for width in sorted((int(w) for k, w in names if k == kind), reverse=True))


def _selftest_table(results: Sequence[selftest.Result]) -> Table:
    table = Table(caption="largest error: in units of what rounding explains")
    for name in ("op", "backend", "device"):
        table.add_column(name, no_wrap=True)
    for name in ("checks", "passed", "largest error"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str, str], list[selftest.Result]] = {}
    for result in results:
        groups.setdefault((result.op, result.backend, result.device), []).append(result)
    for key, group in sorted(groups.items()):
        passed = sum(result.passed for result in group)
        colour = "green" if passed == len(group) else "red"
        worst = max((result.worst for result in group if result.worst is not None), default=0.0)
        table.add_row(*key, str(len(group)), f"[{colour}]{passed}[/{colour}]", f"{worst:.2f}")
    return table


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Turns a ValueError into a message and the exit status of wrong usage."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _settings(task: Task, epochs: int | None, batch_size: int | None, max_steps: int | None, schedule: str) -> Settings:
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"unknown schedule {schedule!r}: choose from cosine, constant")
    return Settings(epochs or task.epochs, batch_size or task.batch_size, schedule == "cosine", max_steps)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if "," not in text:
        numbers = [seed for count in numbers for seed in range(count)]
    if not numbers or min(numbers) < 0:
        raise ValueError(f"seeds is {text!r}, expected how many (3) or a list (4,7)")
    return list(dict.fromkeys(numbers))


def _run(
    task: Task,
    recipes: Sequence[Recipe],
    seeds: Sequence[int],
    settings: Settings,
    out: Path | None,
    stem: str,
    as_json: bool,
) -> list[Record]:
    """Trains, prints tables or JSON, and writes ``stem``.json, ``stem``.md and ``stem``.png."""
    folder = out or Path("results") / task.name
    try:
        _require_backend()
        report.require_plotting()
        folder.mkdir(parents=True, exist_ok=True)
        with _progress(task, recipes, seeds, settings) as on_step:
            records = tasks.compare(task, recipes, seeds, settings, on_step)
    except (tasks.MissingExtraError, OSError) as error:
        _fail(str(error))
    data = report.document(task, settings, records)
    summaries = tasks.summarize(records, settings.epochs)
    tables = report.tables(task, settings, summaries, tasks.at_equal_time(records, settings.epochs))
    report.write_json(folder / f"{stem}.json", data)
    (folder / f"{stem}.md").write_text(report.markdown(tables))
    report.draw(folder / f"{stem}.png", task, summaries)
    if as_json:
        _print_json(data)
    else:
        console = Console()
        console.print(tables)
        for record in records:
            if record.diverged:
                console.print(f"[red]{record.title}, seed {record.seed}, diverged: {record.diverged}[/red]")
        console.print(f"files: {folder / stem}.png, .md and .json", soft_wrap=True)
    return records


def _require_backend() -> None:
    """Fails early, with the reason, if ``FISHER_KERNELS_BACKEND`` names a backend that cannot run here."""
    try:
        with backends.use_backend(environment.default_backend()):
            pass
    except (ValueError, RuntimeError) as error:
        _fail(f"FISHER_KERNELS_BACKEND: {error}")


@contextmanager
def _progress(
    task: Task, recipes: Sequence[Recipe], seeds: Sequence[int], settings: Settings
) -> Iterator[Callable[[Training], None]]:
    """One bar per optimizer on standard error; yields what to call after every iteration."""
    total = len(seeds) * settings.epochs * settings.steps_per_epoch(task)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = {recipe.name: progress.add_task(recipe.title, total=total, status="") for recipe in recipes}

        def on_step(training: Training) -> None:
            record = training.record
            status = f"seed {record.seed}, epoch {len(record.metric)}, {task.metric.name} "
            progress.update(bars[record.optimizer], advance=1, status=status + task.metric.format(record.metric[-1]))

        yield on_step


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(f"[red]error:[/red] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(1)
