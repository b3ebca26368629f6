"""The command line: ``fisher-kernels``, or ``python -m fisher_kernels``."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn, TimeElapsedColumn
from rich.table import Table

from fisher_kernels import __version__, backends, tasks, terminal
from fisher_kernels.integrations import figures
from fisher_kernels.runs import Run
from fisher_kernels.tasks import fashion_images, files
from fisher_kernels.tasks.files import Destination
from fisher_kernels.tasks.optimizers import Recipe, hyperparameter
from fisher_kernels.tasks.run_picture import run_picture
from fisher_kernels.tasks.task import MissingExtraError, Task
from fisher_kernels.tasks.training import Settings
from fisher_kernels.tools import environment, inspection, plan_models, selftest, served, user_model
from fisher_kernels.tools import plan as planning
from fisher_kernels.tools.inspection import traces

app = typer.Typer(
    name="fisher-kernels",
    cls=terminal.Program,
    help="Fisher-information optimizers on fast kernels: what is installed, self-test, training tasks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

_TASKS = ", ".join(tasks.TASKS)
_OPTIMIZERS = ", ".join(
    name + "".join(f", {name}:{variant}" for variant in entry.variants[1:])
    for name, entry in {**tasks.OPTIMIZERS, **tasks.CONTESTANTS}.items()
)

_MOST_SEEDS = 1000

TaskName = Annotated[str | None, typer.Argument(metavar="TASK", help=f"One of: {_TASKS}.", show_default=False)]
Epochs = Annotated[int | None, typer.Option(min=1, help="Epochs to train.", show_default="the task's")]
Budget = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Train each run for so much processor time, for which the learning rate is planned; instead of --epochs.",
        show_default=False,
    ),
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Samples per iteration.", show_default="the task's")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Stop every epoch after so many iterations.")]
Schedule = Annotated[str, typer.Option(help="Learning rate over the run: cosine (to zero) or constant.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Processor threads.", show_default="the task's")]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Where Fashion-MNIST lies, for the tasks on it.", show_default="build/data, or /usr"
    ),
]
Out = Annotated[Path | None, typer.Option(help="Folder for the files.", show_default="results/TASK")]
Force = Annotated[bool, typer.Option("--force", help="Replace files of that name; by default new ones get a number.")]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Go on with what was interrupted, and has its files there.", show_default=False
    ),
]
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
        terminal.show_json(facts)
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if name != "backends":
            table.add_row(name, _fact(value))
    availability = Table("backend", "available", title="backends", title_justify="left")
    for name, reason in facts["backends"].items():
        availability.add_row(name, "[green]yes[/green]" if reason is None else f"[yellow]no:[/yellow] {escape(reason)}")
    terminal.show(table, "", availability)


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_fact(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_fact, value))
    return "none" if value is None else str(value)


@app.command()
def train(
    context: typer.Context,
    task: TaskName = None,
    optimizer: Annotated[str | None, typer.Option(help=f"One of: {_OPTIMIZERS}.", show_default=False)] = None,
    variant: Annotated[str | None, typer.Option(help="The same as --optimizer NAME:VARIANT.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate.", show_default="tuned")] = None,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Train with the learning rate that a sweep suggests; instead of --lr.")
    ] = False,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="Weight decay.", show_default="tuned")] = None,
    update_interval: Annotated[int | None, typer.Option(min=1, help="Steps between refreshes of the factors.")] = None,
    damping: Annotated[float | None, typer.Option(min=0, help="Constant added to the curvature.")] = None,
    rho: Annotated[float | None, typer.Option(min=0, help="Regularisation of SOFIM's matrix.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="Any hyperparameter of the optimizer, instead of the tuned value or its default.",
            show_default=False,
        ),
    ] = None,
    epochs: Epochs = None,
    budget: Budget = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=tasks.LARGEST_SEED, help="Fixes the initial model and the order of the batches."),
    ] = 0,
    batch_size: BatchSize = None,
    max_steps: MaxSteps = None,
    schedule: Schedule = "cosine",
    threads: Threads = None,
    data: Data = None,
    out: Out = None,
    force: Force = False,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Train one optimizer on a task. Exits with 1 if training diverges, with 130 if Ctrl-C ends it."""
    _look_in(data)
    if resume is not None:
        run = _resumed(context, resume, task)
    else:
        given = {
            "lr": lr,
            "weight_decay": weight_decay,
            "update_interval": update_interval,
            "damping": damping,
            "rho": rho,
        }
        overrides = {name: value for name, value in given.items() if value is not None}
        chosen = _task(task)
        if optimizer is None:
            terminal.refuse("--optimizer", f"is missing, expected one of {_OPTIMIZERS}")
        name = optimizer if variant is None else f"{optimizer}:{variant}"
        with terminal.refusing("--optimizer"):
            tasks.recipe(chosen, name, overrides)
        says = {given_name: _option(given_name) for given_name in overrides}
        for text in option or []:
            key, value = _setting(text, "NAME=VALUE")
            with terminal.refusing(f"-o {key}"):
                if key in overrides:
                    raise ValueError("is given twice")
                overrides[key] = hyperparameter(name, key, value)
            says[key] = f"-o {key}"
        with terminal.refusing("--optimizer"):
            recipe = tasks.recipe(chosen, name, overrides)
        _require_values(recipe, overrides, says, "--optimizer")
        settings = _settings(chosen, epochs, budget, batch_size, max_steps, schedule)
        if find_lr:
            if "lr" in overrides:
                terminal.refuse("--find-lr", f"goes without {says['lr']}: the learning rate is found or given")
            overrides["lr"] = _found_lr(chosen, recipe, seed, settings, threads, as_json)
            recipe = tasks.recipe(chosen, name, overrides)
        stem = recipe.name.replace(":", "-")
        run = _run("train", chosen, [recipe], [seed], settings, threads, out, stem, force)
    records = run.carry_out(as_json)
    if records[0].diverged:
        raise typer.Exit(1)


@app.command()
def compare(
    context: typer.Context,
    task: TaskName = None,
    optimizers: Annotated[str, typer.Option(help=f"Comma-separated, of: {_OPTIMIZERS}.")] = ",".join(tasks.OPTIMIZERS),
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="OPTIMIZER.NAME=VALUE",
            help="Any hyperparameter of one of them, instead of the tuned value or its default.",
            show_default=False,
        ),
    ] = None,
    epochs: Epochs = None,
    budget: Budget = None,
    seeds: Annotated[str, typer.Option(help="How many seeds (3 means 0, 1, 2), or a list such as 4,7 or 4,.")] = "3",
    batch_size: BatchSize = None,
    max_steps: MaxSteps = None,
    schedule: Schedule = "cosine",
    threads: Threads = None,
    data: Data = None,
    out: Out = None,
    force: Force = False,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Train several optimizers side by side on a task, from the same initial models and batches.

    Shows how far each has come after each epoch and after equal training time, and what its steps cost; with --budget
    how far each comes in that time, for which its learning rate is planned.

    A run that diverges is reported as such and does not stop the others. Exits with 130 if Ctrl-C ends it.
    """
    _look_in(data)
    if resume is not None:
        run = _resumed(context, resume, task)
    else:
        chosen = _task(task)
        with terminal.refusing("--optimizers"):
            names = dict.fromkeys(name.strip() for name in optimizers.split(",") if name.strip())
            if not names:
                raise ValueError(f"is {optimizers!r}, expected names with commas between them, of {_OPTIMIZERS}")
            recipes = {(recipe := tasks.recipe(chosen, name)).name: recipe for name in names}
        recipes = _with_options(chosen, recipes, option or [])
        settings = _settings(chosen, epochs, budget, batch_size, max_steps, schedule)
        run = _run("compare", chosen, [*recipes.values()], _seeds(seeds), settings, threads, out, "compare", force)
    run.carry_out(as_json)


@app.command("selftest")
def self_test(as_json: Json = False) -> None:
    """Check every op on every available backend against the reference in float64. Exits with 1 on any failure."""
    results: list[selftest.Result] = []
    interrupted = False
    try:
        for result in selftest.run():
            results.append(result)  # noqa: PERF402  one by one: what came before an interruption is kept
    except KeyboardInterrupt:
        interrupted = True
    failures = [result for result in results if not result.passed]
    if as_json:
        checks = [dataclasses.asdict(result) for result in results]
        passed = not failures and not interrupted
        terminal.show_json({"passed": passed, "environment": environment.describe(), "checks": checks})
    else:
        terminal.show(_selftest_table(results))
        for failed in failures:
            where = f"{failed.op}, {failed.case}, {failed.dtype} on {failed.backend} ({failed.device})"
            _show_line(f"[red]failed:[/red] {where}: {escape(failed.message or '')}")
        for backend, reason in backends.reasons().items():
            if reason is not None:
                _show_line(f"not tested: {backend}: {escape(reason)}")
    if interrupted:
        terminal.note(f"interrupted after {len(results)} checks")
        raise typer.Exit(terminal.INTERRUPTED)
    if failures:
        raise typer.Exit(1)


def _show_line(text: str) -> None:
    terminal.show(text, highlight=False, soft_wrap=True)


@app.command()
def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:FUNCTION",
            help="A function without arguments that returns a model, or a model and example inputs.",
        ),
    ],
    optimizer: Annotated[str, typer.Option(help=f"One of: {', '.join(served.OPTIMIZERS)}.")] = "adafisher",
    at_least: Annotated[
        float, typer.Option(min=0, max=1, help="Exit with 1 where rules serve less than this share of the parameters.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Show how much of your own model is served by a rule of an optimizer, and why the rest is not.

    With example inputs (a dict by name, a tuple by position, or one tensor) the model makes one forward and backward
    pass, in which every layer proves that it computes what its class documents.
    """
    if optimizer not in served.OPTIMIZERS:
        terminal.refuse("--optimizer", f"is {optimizer!r}, expected one of {', '.join(served.OPTIMIZERS)}")
    with terminal.refusing("PACKAGE.MODULE:FUNCTION"):
        model, inputs, *_ = user_model.load(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says all that they do
        try:
            reader = served.OPTIMIZERS[optimizer](model)
            if inputs is not None:
                served.run_once(model, reader, inputs)
        except Exception as error:
            terminal.fail(f"{target}: {user_model.said(error)}")
    kinds = served.kinds_of(model, reader)
    share = served.share_served(kinds)
    if as_json:
        rows = [dataclasses.asdict(kind) for kind in kinds]
        terminal.show_json({"optimizer": optimizer, "proven": inputs is not None, "share": share, "kinds": rows})
    else:
        terminal.show(_served_table(kinds), width=max(Console().width, 100))
        total = sum(kind.parameters for kind in kinds)
        _show_line(f"{type(reader).__name__} serves {_percent(share)} of {total:,} trained parameters by a rule")
        if by_adam := served.share_by_adam(kinds):
            _show_line(f"{_percent(by_adam)} have a rule and no factors: Adam trains them, and what has no rule")
        if inputs is None:
            _show_line("by the classes of the layers alone: return (model, example inputs) to see what they compute")
    if share < at_least:
        raise typer.Exit(1)


def _served_table(kinds: Sequence[served.Kind]) -> Table:
    table = Table()
    for name in ("rule", "layer"):
        table.add_column(name)
    for name in ("tensors", "parameters", "share"):
        table.add_column(name, justify="right")
    table.add_column("why not")
    total = sum(kind.parameters for kind in kinds)
    for kind in kinds:
        colour = "green" if kind.served else "yellow"
        names = ", ".join(kind.names[:2]) + (", ..." if len(kind.names) > 2 else "")
        why = "" if kind.served else f"{kind.reason} ({names})"
        why = why or kind.remark
        share = _percent(kind.parameters / max(total, 1))
        cells = (str(len(kind.names)), f"{kind.parameters:,}", share, escape(why))
        table.add_row(f"[{colour}]{kind.rule}[/{colour}]", escape(kind.layer), *cells)
    return table


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(metavar="RUN.jsonl", help="Lines that a Recorder or a callback has written.")],
    out: Annotated[
        Path | None, typer.Option(help="The picture.", show_default="RUN.png beside it; it is replaced")
    ] = None,
) -> None:
    """Draw what was recorded of a run as a PNG: damping share, effective step, cosine with SGD, skipped blocks."""
    target = out or run.with_suffix(".png")
    try:
        with terminal.refusing("RUN.jsonl"):
            recorded = figures.read(run)
            if not recorded:
                raise ValueError(f"{run} has no lines")
        target.write_bytes(run_picture(recorded, run.stem))
    except MissingExtraError as error:
        terminal.fail(str(error))
    except OSError as error:
        terminal.fail(f"{error.filename}: {error.strerror}")
    _show_line(f"wrote {escape(str(target))}")


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=f"One of {', '.join(plan_models.MODELS)}, or PACKAGE.MODULE:FUNCTION that returns a model, example "
            "inputs, and if it likes a loss function and a plan for parallelize_module.",
        ),
    ],
    mesh: Annotated[str, typer.Option(help="Processes: SHARDS or REPLICASxSHARDS, or SHARDSxTENSOR.")] = "8",
    parallel: Annotated[
        str, typer.Option(help=f"{planning.HSDP} (fully_shard), or {planning.TENSOR} (with parallelize_module).")
    ] = planning.HSDP,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples of each process.", show_default="the model's")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens in each.", show_default="the model's")] = None,
    optimizers: Annotated[
        str,
        typer.Option("--optimizers", "--optimizer", help=f"Separated by commas, of: {', '.join(planning.OPTIMIZERS)}."),
    ] = ",".join(planning.OPTIMIZERS),
    dtype: Annotated[str, typer.Option(help="Of what is gathered for the passes: bfloat16 or float32.")] = "bfloat16",
    option: Annotated[
        list[str] | None, typer.Option("-o", metavar="NAME=VALUE", help="An argument of all optimizers but AdamW.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Count what optimizers take on many processes, beside AdamW: memory in each, and what they send.

    A step is made in one process, of tensors without memory, and nothing is sent.
    """
    if dtype not in ("bfloat16", "float32"):
        terminal.refuse("--dtype", f"is {dtype!r}, expected bfloat16 or float32")
    if parallel not in planning.EXPECTED:
        terminal.refuse("--parallel", f"is {parallel!r}, expected {' or '.join(planning.EXPECTED)}")
    names = [name.strip() for name in optimizers.split(",")]
    for name in names:
        if name not in planning.OPTIMIZERS:
            terminal.refuse("--optimizers", f"has {name!r}, expected some of {', '.join(planning.OPTIMIZERS)}")
    names = list(dict.fromkeys(["adamw", *names]))
    given = dict(_setting(text, "NAME=VALUE") for text in option or ())
    with terminal.refusing("-o"):
        settings = {name: {key: hyperparameter(name, key, v) for key, v in given.items()} for name in names[1:]}
    with terminal.refusing("--mesh"):
        on = planning.Mesh.of(mesh, parallel)
    with terminal.refusing("MODEL"):
        find = partial(plan_models.find, model, batch, seq_len, on.tensor)
        try:
            plans = planning.plans(find, names, on, getattr(torch, dtype), settings)
        except planning.RefusedError as error:
            terminal.refuse(f"--optimizers {error.name}", str(error))
    if as_json:
        terminal.show_json({"model": model, "plans": [planning.as_numbers(one) for one in plans]})
        return
    terminal.show(_plan_table(plans), width=max(Console().width, 100))
    dividing = "fully_shard" if parallel == planning.HSDP else "fully_shard and parallelize_module"
    model_itself = f"{planning.size(plans[0].sent_by_model)} a step, in {_calls(plans[0].passes)}"
    _show_line(
        f"{plans[0].parameters:,} parameters, {on.processes:,} processes; {dividing} itself moves {model_itself}"
    )
    for one in plans:
        if one.step or one.refresh:
            more = f"; {_calls(one.refresh)} more in a refresh" if one.refresh else ""
            _show_line(f"{one.optimizer}: {_calls(one.step)} in a step{more}")
    for note in dict.fromkeys(note for one in plans for note in one.notes):
        _show_line(escape(note))


def _calls(calls: Sequence[Any]) -> str:
    return ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in planning.kinds_of(calls).items()) or "no call"


def _plan_table(plans: Sequence[planning.Plan]) -> Table:
    table = Table(caption="for each process: bytes that stay, and bytes that pass the network")
    table.add_column("optimizer")
    for name in ("weights, gradients", "moments", "curvature", "gathered at a time", "each step", "a refresh more"):
        table.add_column(name, justify="right")
    for one in plans:
        stay = (one.weights, one.moments, one.curvature, one.largest)
        table.add_row(one.optimizer, *map(planning.size, (*stay, one.sent_in_a_step, one.sent_in_a_refresh)))
    return table


def _percent(share: float) -> str:
    """Rounded down, so that only what is complete is 100 %."""
    return f"{math.floor(1000 * share) / 10:.1f} %"


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
    traffic: Annotated[
        bool,
        typer.Option("--traffic", help="What the CUDA kernels move and whether they race, as they run on the host."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what the code of every GPU kernel needs, for GPUs that need not be here.

    Triton's kernels are compiled for it, those in CUDA are read from the native module. Exits with 1 where a kernel
    does not compile, keeps registers in memory, or reads a stream in narrow pieces. With --traffic the self-test runs
    on the CUDA kernels of a traced build instead, and a race is a failure; with --kernels source lines are shown too.
    """
    if traffic:
        _inspect_traffic(kernels, as_json)
        return
    reasons = {name: part.why_not() for name, part in inspection.BACKENDS.items()}
    chosen = backend or [name for name, reason in reasons.items() if reason is None] or list(reasons)
    with terminal.refusing("--kernels"):
        try:
            re.compile(kernels)
        except re.error as error:
            raise ValueError(f"is {kernels!r}, expected a regular expression: {error}") from error
    rows: list[inspection.Row] = []
    interrupted = False
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed} variants"), TimeElapsedColumn())
    try:
        with terminal.refusing("--target, --backend or --kernels"), terminal.progress(columns) as progress:
            bar = progress.add_task("inspecting", total=None)
            for row in inspection.run(target or inspection.TARGETS, kernels, sample, chosen):
                rows.append(row)
                progress.update(bar, advance=1)
    except typer.Exit:  # a RuntimeError too
        raise
    except RuntimeError as error:
        terminal.fail(str(error))
    except KeyboardInterrupt:
        interrupted = True
    faults = [(row, fault) for row in rows for fault in row.faults]
    if as_json:
        passed = bool(rows) and not faults and not interrupted
        terminal.show_json({"passed": passed, "variants": [dataclasses.asdict(row) for row in rows]})
    else:
        terminal.show(_inspection_table(rows), width=max(Console().width, 140))
        for name, reason in reasons.items():
            if name not in chosen:
                _show_line(f"not inspected: {name}: {escape(str(reason))}")
        for name, remark in sorted({(row.kernel, row.note) for row in rows if row.note}):
            _show_line(f"accepted: {name}: {remark}")
        for row, fault in faults:
            where = f"{row.backend}, {row.target}, {row.kernel}, {row.arguments}"
            _show_line(f"[red]failed:[/red] {escape(where)}: {escape(fault)}")
    if interrupted:
        terminal.note(f"interrupted after {len(rows)} variants")
        raise typer.Exit(terminal.INTERRUPTED)
    if faults or not rows:
        raise typer.Exit(1)


def _inspect_traffic(kernels: str, as_json: bool) -> None:
    with terminal.refusing("--kernels"):
        try:
            wanted = re.compile(kernels)
        except re.error as error:
            raise ValueError(f"is {kernels!r}, expected a regular expression: {error}") from error
    try:
        launches = [launch for launch in traces.self_test() if wanted.search(launch.kernel)]
    except RuntimeError as error:
        terminal.fail(str(error))
    findings = traces.summary(launches)
    costs = traces.costs(launches, by_place=bool(kernels))
    if as_json:
        rows = [
            {"kernel": kernel, "what": what, "place": place, **cost._asdict()}
            for (kernel, what, place), cost in costs.items()
        ]
        terminal.show_json({"passed": bool(launches) and not findings, "findings": findings, "traffic": rows})
    else:
        terminal.show(_traffic_table(costs), width=max(Console().width, 140))
        for finding in findings:
            _show_line(f"[red]failed:[/red] {escape(finding)}")
    if findings or not launches:
        raise typer.Exit(1)


def _traffic_table(costs: Mapping[tuple[str, str, str], traces.Cost]) -> Table:
    table = Table(
        caption="of the self-test; units: sectors of 32 bytes in memory of the device, wavefronts in shared memory; "
        "ratio: to those that would hold the distinct bytes of each request"
    )
    by_place = any(place for _, _, place in costs)
    for name in ("kernel", "what", "place")[: 3 if by_place else 2]:
        table.add_column(name, no_wrap=name != "place")
    for name in ("requests", "bytes", "units a request", "ratio"):
        table.add_column(name, justify="right")
    for key, cost in costs.items():
        table.add_row(
            *key[: 3 if by_place else 2],
            f"{cost.requests:,}",
            f"{cost.bytes:,}",
            f"{cost.each:.2f}",
            f"{cost.ratio:.2f}",
        )
    return table


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


def _look_in(data: Path | None) -> None:
    """Let data sets be looked for in a folder."""
    if data is not None:
        try:
            fashion_images.look_in(data)
        except tasks.MissingDataError as error:
            terminal.refuse("--data", str(error))


def _task(name: str | None) -> Task:
    with terminal.refusing("TASK"):
        if name is None:
            raise ValueError(f"is missing, expected one of {_TASKS}")
        return tasks.find_task(name)


def _with_options(task: Task, recipes: Mapping[str, Recipe], texts: Sequence[str]) -> dict[str, Recipe]:
    """The recipes, with the hyperparameters that ``-o OPTIMIZER.NAME=VALUE`` gives to some of them."""
    given: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, value = _setting(text, "OPTIMIZER.NAME=VALUE")
        with terminal.refusing(f"-o {key}"):
            optimizer, point, name = key.rpartition(".")
            if not point:
                raise ValueError("is of no optimizer, expected OPTIMIZER.NAME=VALUE")
            optimizer = tasks.recipe(task, optimizer).name
            if optimizer not in recipes:
                raise ValueError(f"is not of an optimizer that is compared: {', '.join(recipes)}")
            if name == "variant":
                raise ValueError(f"goes into the name of the optimizer, as {optimizer.partition(':')[0]}:{value}")
            if name in given.setdefault(optimizer, {}):
                raise ValueError("is given twice")
            given[optimizer][name] = hyperparameter(optimizer, name, value)
    changed = {name: tasks.recipe(task, name, overrides) for name, overrides in given.items()}
    for name, overrides in given.items():
        says = {option: f"-o {name}.{option}" for option in overrides}
        _require_values(changed[name], overrides, says, f"-o {name}")
    return {**recipes, **changed}


def _setting(text: str, form: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        terminal.refuse("-o", f"is {text!r}, expected {form}")
    return key.strip(), value.strip()


def _require_values(recipe: Recipe, overrides: Mapping[str, Any], says: Mapping[str, str], otherwise: str) -> None:
    """Refuse, as it was said, a hyperparameter that the optimizer does not take; it knows best what that is."""
    for name, value in overrides.items():
        if isinstance(value, float) and not math.isfinite(value):
            terminal.refuse(says[name], f"is {value}, expected a finite number")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model that is trained brings them
            recipe.build(torch.nn.Linear(1, 1))
    except (TypeError, ValueError, RuntimeError) as error:
        name, _, rest = str(error).partition(" ")
        if name in overrides:
            terminal.refuse(says[name], rest)
        terminal.refuse(otherwise, str(error))


def _settings(
    task: Task, epochs: int | None, budget: float | None, batch_size: int | None, max_steps: int | None, schedule: str
) -> Settings:
    if schedule not in ("cosine", "constant"):
        terminal.refuse("--schedule", f"unknown schedule {schedule!r}: choose from cosine, constant")
    if budget is None:
        epochs = epochs or task.epochs
    elif epochs is not None:
        terminal.refuse("--budget", "goes without --epochs: a run lasts for the one or for the other")
    elif not 0 < budget < math.inf:
        terminal.refuse("--budget", f"is {budget}, expected seconds above 0")
    return Settings(epochs, batch_size or task.batch_size, schedule == "cosine", max_steps, budget, task.evaluations)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if "," not in text and numbers:
        numbers = [*range(min(numbers[0], _MOST_SEEDS + 1))]
    if not numbers or min(numbers) < 0 or max(numbers) > tasks.LARGEST_SEED or len(numbers) > _MOST_SEEDS:
        terminal.refuse(
            "--seeds",
            f"seeds is {text!r}, expected how many (3) or a list (4,7): at most {_MOST_SEEDS}, each from 0 to "
            f"{tasks.LARGEST_SEED}",
        )
    return list(dict.fromkeys(numbers))


def _run(
    command: str,
    task: Task,
    recipes: Sequence[Recipe],
    seeds: Sequence[int],
    settings: Settings,
    threads: int | None,
    out: Path | None,
    stem: str,
    force: bool,
) -> Run:
    _set_up(task, threads)
    comparison = tasks.Comparison(task, recipes, seeds, settings)
    return Run(command, comparison, Destination(out or Path("results") / task.name, stem), force)


def _set_up(task: Task, threads: int | None) -> None:
    _require_backend()
    threads = threads or task.threads
    if threads is not None:
        torch.set_num_threads(threads)


def _found_lr(task: Task, recipe: Recipe, seed: int, settings: Settings, threads: int | None, as_json: bool) -> float:
    """The learning rate that a sweep suggests, on the model and the batches that training will begin with."""
    _set_up(task, threads)
    try:
        found = tasks.sweep(task, recipe, seed, settings)
    except tasks.MissingDataError as error:
        terminal.fail(str(error))
    if found.suggestion is None:
        terminal.fail(f"--find-lr: {found.verdict}; give --lr, or leave it out for the tuned one")
    if as_json:
        terminal.note(found.verdict)
    else:
        terminal.show(str(found), highlight=False)
    return float(f"{found.suggestion:.2g}")  # the curve says no more than that


_BESIDE_RESUME = ("context", "task", "threads", "data", "resume", "as_json")


def _resumed(context: typer.Context, place: Path, task: str | None) -> Run:
    """What was interrupted, with the settings that it began with."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _BESIDE_RESUME and source and source.name == "COMMANDLINE":
            terminal.refuse("--resume", f"goes on with the settings that the run began with: leave out {_option(name)}")
    with terminal.refusing("--resume"):
        restored = files.restore(str(context.info_name), place)
        if task is not None and task != restored.comparison.task.name:
            raise ValueError(f"{place} has a run of {restored.comparison.task.name}, not of {task}")
    _require_backend()
    torch.set_num_threads(context.params["threads"] or restored.threads)
    return Run(str(context.info_name), restored.comparison, restored.destination, force=True)


def _require_backend() -> None:
    """Fails early, with the reason, if ``FISHER_KERNELS_BACKEND`` names a backend that cannot run here."""
    try:
        backends.require(environment.default_backend())
    except (ValueError, RuntimeError) as error:
        terminal.fail(f"FISHER_KERNELS_BACKEND: {error}")
