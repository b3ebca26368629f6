"""One run after the other in a process for each core; what is known already is not run again.

``bench/results/study/TASK.jsonl`` has a line for each run: its configuration, what it was measured on, its figures. A
run is known where a line has the hash of its configuration and, if it was planned for a time, of this machine. A
change of the code is not seen: delete the lines that it makes obsolete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from fisher_kernels.tasks import Settings, find_task, recipe
from fisher_kernels.tasks.comparison import warm_up
from fisher_kernels.tasks.task import EVALUATIONS
from fisher_kernels.tasks.training import Record, Training
from fisher_kernels.tools import environment

FOLDER = Path(__file__).parent.parent / "results" / "study"
POINTS = 24
"""Of a curve, that a line keeps at most."""
DIGITS = 7


@dataclass(frozen=True)
class Run:
    """One run: planned for ``seconds`` of processor time, or for ``epochs`` of at most ``max_steps`` iterations."""

    task: str
    optimizer: str
    lr: float
    batch_size: int
    seed: int
    seconds: float | None = None
    epochs: int | None = None
    max_steps: int | None = None
    evaluations: int | None = None

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """All that makes its figures, but the machine and the code."""
        hyperparameters = {**find_task(self.task).hyperparameters.get(self.optimizer, {}), "lr": self.lr}
        return {**asdict(self), "hyperparameters": hyperparameters}

    @cached_property
    def key(self) -> str:
        """A hash of the configuration."""
        return hashlib.sha256(json.dumps(self.configuration, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def settings(self) -> Settings:
        """As a comparison has them."""
        evaluations = self.evaluations or EVALUATIONS  # which are those of a run with a budget
        return Settings(self.epochs, self.batch_size, True, self.max_steps, self.seconds, evaluations)

    def carry_out(self) -> Line:
        """Trains from the first iteration to the last; what stops it is in the line."""
        task = find_task(self.task)
        chosen = recipe(task, self.optimizer, {"lr": self.lr})
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what an optimizer says of itself is for a person, once
            with closing(Training(task, chosen, self.seed, self.settings)) as training:
                try:
                    warm_up(task, chosen, self.settings)
                    training.evaluate()
                    while not training.finished:
                        training.run_lap()
                except (RuntimeError, ValueError, ArithmeticError) as error:  # torch's of linear algebra among them
                    training.record.diverged = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                training.measure()
        return Line.of(self, training.record, time.perf_counter() - begin)


@dataclass(frozen=True)
class Line:
    """What is kept of a run.

    ``metric``, ``also``, ``iterations`` and the two times have an entry for each evaluation, of which a long curve
    keeps some; the first is before the first iteration.
    """

    key: str
    run: dict[str, Any]
    machine: dict[str, Any]
    title: str
    metric: list[float]
    also: list[float]
    iterations: list[int]
    seconds: list[float]
    processor_seconds: list[float]
    step_ms: float | None
    iteration_ms: float | None
    state_bytes_per_parameter: float | None
    diverged: str | None
    took: float

    @classmethod
    def of(cls, run: Run, record: Record, took: float) -> Line:
        """The line of a run that has ended after so many seconds, evaluations included."""

        def some(values: Sequence[Any]) -> list[Any]:
            last = len(values) - 1
            kept = range(len(values)) if last <= POINTS else [round(last * i / POINTS) for i in range(POINTS + 1)]
            return [_rounded(values[i]) for i in kept]

        return cls(
            key=run.key,
            run=run.configuration,
            machine=machine(),
            title=record.title,
            metric=some(record.metric),
            also=some(record.also),
            iterations=some(record.iterations),
            seconds=some(record.seconds),
            processor_seconds=some(record.processor_seconds),
            step_ms=_rounded(record.step_ms.median) if record.step_ms else None,
            iteration_ms=_rounded(record.iteration_ms.median) if record.iteration_ms else None,
            state_bytes_per_parameter=_rounded(record.state_bytes_per_parameter),
            diverged=record.diverged,
            took=round(took, 1),
        )

    @property
    def loss(self) -> float:
        """The metric at the end, the smaller the better; infinite for a run that has diverged."""
        last = math.inf if self.diverged or not self.metric else self.metric[-1]
        sign = -1 if math.isfinite(last) and find_task(self.run["task"]).metric.higher_is_better else 1
        return sign * last if math.isfinite(last) else math.inf


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


@cache
def machine() -> dict[str, Any]:
    """What runs are measured on."""
    facts = environment.describe()
    return {name: facts[name] for name in ("processor", "capability", "torch", "python", "fisher_kernels")}


def known(task: str) -> dict[str, Line]:
    """The lines of a task by their keys; the last one where there are several."""
    path = FOLDER / f"{task}.jsonl"
    if not path.exists():
        return {}
    state = path.stat()
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _read(path: Path, *_: int) -> dict[str, Line]:
    """As the file is at a time and of a size."""
    lines = (Line(**json.loads(text)) for text in path.read_text().splitlines())
    return {line.key: line for line in lines}


def look_up(run: Run) -> Line:
    """The line of a run, of whatever machine.

    Raises:
        LookupError: there is none.
    """
    line = known(run.task).get(run.key)
    if line is None:
        raise LookupError(f"{run.task}, {run.optimizer} at {run.lr:g}, seed {run.seed}: has not been run")
    return line


def keep(line: Line) -> None:
    """Adds a line to the file of its task, whole, whoever else does so."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{line.run['task']}.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(asdict(line)) + "\n")
        file.flush()


def ensure(run: Run, here: bool = True) -> Line:
    """The line of a run, which is carried out if it is not known.

    Args:
        run: one run.
        here: of what was planned for a time, only a line of this machine will do.
    """
    line = known(run.task).get(run.key)
    if line is None or (here and run.seconds is not None and line.machine != machine()):
        line = run.carry_out()
        keep(line)
    return line


def each(work: Callable[..., Any], calls: Iterable[tuple[Any, ...]], on_done: Callable[[], None]) -> None:
    """Calls ``work`` with each of the arguments, in processes on one core and one thread each."""
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))
    free = context.Queue()
    for core in cores:
        free.put(core)
    with ProcessPoolExecutor(len(cores), context, initializer=_begin, initargs=(free,)) as pool:
        for future in as_completed([pool.submit(work, *arguments) for arguments in calls]):
            future.result()
            on_done()


def _begin(free: Any) -> None:
    os.sched_setaffinity(0, {free.get()})
    torch.set_num_threads(1)
