"""A comparison on the terminal: progress, tables, files, and an end that loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from fisher_kernels import tasks, terminal
from fisher_kernels.tasks import files, pictures, report
from fisher_kernels.tasks.files import CHECKPOINT, Destination
from fisher_kernels.tasks.training import OnStep, Record, Training


@dataclass(frozen=True)
class Run:
    """A comparison to carry out, and where its files go.

    Attributes:
        command: of the command line, which takes it up again.
        force: replace files that are there; otherwise new ones get a number.
    """

    command: str
    comparison: tasks.Comparison
    destination: Destination
    force: bool

    def carry_out(self, as_json: bool) -> list[Record]:
        """Trains; prints tables or JSON; writes them, and a picture. Ends the program where that does not succeed.

        Whatever stops the training, what was done by then is printed and written first.
        """
        self._try_folder()
        with terminal.interruptible() as stopped:
            failure = self._train(stopped)
            records = self.comparison.records
            partial = None if failure is None else _partial(self.comparison, records, failure)
            complaints = self._report(records, partial, isinstance(failure, tasks.Interrupted), as_json)
        for complaint in complaints:
            terminal.line(complaint)
        if isinstance(failure, tasks.Interrupted | KeyboardInterrupt):
            raise typer.Exit(1 if complaints else terminal.INTERRUPTED)
        if failure is not None:
            raise failure
        if complaints:
            raise typer.Exit(1)
        return records

    def _try_folder(self) -> None:
        folder = self.destination.folder
        try:
            files.try_folder(folder)
        except FileExistsError:
            terminal.fail(f"--out: {folder} is a file, expected a folder")
        except OSError as error:
            terminal.fail(f"--out: no file can be written in {folder}: {error.strerror or error}")

    def _train(self, stopped: Callable[[], bool]) -> BaseException | None:
        """Trains to the end, or returns what came in between."""
        try:
            with _progress(self.comparison) as (on_step, on_lap):

                def watch(training: Training) -> None:
                    on_step(training)
                    if stopped():
                        raise tasks.Interrupted

                self.comparison.run(watch, on_lap)
        except (tasks.MissingExtraError, tasks.MissingDataError) as error:
            terminal.fail(str(error))
        except (KeyboardInterrupt, Exception) as error:
            return error
        return None

    def _report(self, records: list[Record], partial: str | None, resumable: bool, as_json: bool) -> list[str]:
        """Prints and writes what there is; returns what went wrong in doing so."""
        task, settings = self.comparison.task, self.comparison.settings
        destination = self.destination if self.force else self.destination.free()
        part = tasks.presentable(records, settings.laps)
        contents: dict[str, Callable[[], bytes]] = {}
        complaints: list[str] = []
        if part.laps:
            data = report.document(task, settings, records, partial)
            summaries = tasks.summarize(part.records, part.laps)
            equal_time = None if settings.epochs is None else tasks.at_equal_time(part.records, part.laps)
            tables = report.tables(task, settings, summaries, equal_time, partial)
            try:
                if as_json:
                    terminal.show_json(data)
                else:
                    terminal.show(tables)
                    for record in filter(lambda record: record.diverged, records):
                        terminal.show(f"[red]{record.title}, seed {record.seed}, diverged: {record.diverged}[/red]")
            except terminal.OutputError as error:
                complaints.append(str(error))
            except BrokenPipeError as error:
                complaints.append(f"standard output: {error.strerror}")
            contents = {
                ".json": lambda: report.as_json(data).encode(),
                ".md": lambda: report.markdown(tables).encode(),
                ".png": lambda: pictures.picture(task, settings, summaries, partial),
            }
        unheard = bool(complaints)
        if resumable:
            contents[CHECKPOINT] = lambda: files.checkpoint(self.command, self.comparison)
        written = [suffix for suffix, make in contents.items() if _write(destination.file(suffix), make, complaints)]
        if partial is None:
            destination.file(CHECKPOINT).unlink(missing_ok=True)
        shown = [suffix for suffix in written if suffix != CHECKPOINT]
        if shown and not as_json and not unheard:
            place = escape(str(destination.folder / destination.stem))
            terminal.show(f"files: {place}{_listed(shown)}", soft_wrap=True)
        if partial is not None:
            then = f"; to go on: fisher-kernels {self.command} --resume {destination.file(CHECKPOINT)}"
            terminal.note(f"{partial}{then if CHECKPOINT in written else ''}")
        return complaints


def _write(path: Path, make: Callable[[], bytes], complaints: list[str]) -> bool:
    """Whether a file could be made and written; the complaint is added to those there are."""
    try:
        files.write(path, make())
    except tasks.MissingExtraError as error:
        terminal.note(f"no picture: {error}")
        return False
    except OSError as error:
        complaints.append(f"{path} cannot be written: {error.strerror or error}")
        return False
    return True


def _listed(words: list[str]) -> str:
    """As .json, .md and .png."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _partial(comparison: tasks.Comparison, records: list[Record], failure: BaseException) -> str:
    """What came in between, and how far training had got by then."""
    interrupted = isinstance(failure, tasks.Interrupted | KeyboardInterrupt)
    why = "interrupted" if interrupted else f"ended by {type(failure).__name__}"
    settings, seeds = comparison.settings, comparison.seeds
    open_ones = [record for record in records if record.diverged is None and record.laps < settings.laps]
    if not open_ones:
        return f"{why} between two runs" if records else f"{why} before the first run began"
    least = min(record.laps for record in open_ones)
    if settings.budget is None:
        place = f"in epoch {least + 1} of {settings.epochs}"
    else:
        place = f"after {settings.budget * least / settings.laps:.3g} of {settings.budget:g} s"
    where = f"{why} {place}, seed {open_ones[0].seed}"
    return where if len(seeds) == 1 else f"{where} ({seeds.index(open_ones[0].seed) + 1} of {len(seeds)})"


@contextmanager
def _progress(comparison: tasks.Comparison) -> Iterator[tuple[OnStep, OnStep]]:
    """A line for each optimizer; yields what to call after every iteration, and after every lap."""
    task, settings = comparison.task, comparison.settings
    total = len(comparison.seeds) * settings.length(task)
    form = "{:.0f}/{:.0f}" if settings.budget is None else "{:.1f}/{:.1f} s"

    def standing(name: str) -> dict[str, Any]:
        done = min(comparison.done[name], total)  # the last iteration ends after the budget
        return {"completed": done, "count": form.format(done, total)}

    with terminal.training_progress() as progress:
        bars = {
            recipe.name: progress.add_task(recipe.title, total=total, status="", **standing(recipe.name))
            for recipe in comparison.recipes
        }

        def on_step(training: Training) -> None:
            name = training.record.optimizer
            progress.update(bars[name], **standing(name))

        def on_lap(training: Training) -> None:
            record = training.record
            if record.diverged:
                state = "diverged"
            else:
                lap = f"epoch {record.laps}" if settings.budget is None else f"{record.processor_seconds[-1]:.2f} s"
                state = f"{lap}: {task.metric.format(record.metric[-1])}"
            progress.update(bars[record.optimizer], status=f"seed {record.seed}, {state}")

        yield on_step, on_lap
