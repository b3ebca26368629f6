"""One training run, advanced epoch by epoch, with its timings and its record."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from fisher_kernels.tasks.optimizers import Recipe
from fisher_kernels.tasks.task import Batch, Hyperparameters, Task

# The first iterations of a run allocate memory and build plans; they are left out of the timings.
WARM_UP_STEPS = 5


OnStep = Callable[["Training"], None]


class Interrupted(Exception):  # noqa: N818  nothing is wrong
    """Raised by a caller's ``OnStep``: training stops after a whole iteration, and can go on from there."""


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison have in common."""

    epochs: int
    batch_size: int
    cosine: bool = True
    max_steps: int | None = None

    def steps_per_epoch(self, task: Task) -> int:
        """Iterations of one epoch."""
        steps = task.steps_per_epoch(self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call over a run, without its first calls."""

    median: float
    mean: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing | None:
        """Summary of the times of single calls in seconds; None if there was no call."""
        if not seconds:
            return None
        times = sorted(1e3 * second for second in (seconds[WARM_UP_STEPS:] or seconds))
        last = len(times) - 1
        return cls(
            median=statistics.median(times),
            mean=statistics.fmean(times),
            p20=times[round(0.2 * last)],
            p80=times[round(0.8 * last)],
        )


@dataclass
class Record:
    """The record of a run. Lists have one entry per epoch; all but ``training_loss`` start before the first.

    ``also`` is empty for a task without a second figure. ``seconds`` counts training iterations alone: no evaluation
    and no loading of data.
    """

    optimizer: str
    title: str
    seed: int
    hyperparameters: Hyperparameters
    metric: list[float] = field(default_factory=list)
    also: list[float] = field(default_factory=list)
    training_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    step_ms: Timing | None = None
    iteration_ms: Timing | None = None
    parameters: int = 0
    state_bytes_per_parameter: float | None = None
    diverged: str | None = None

    @property
    def epochs(self) -> int:
        """How many epochs were trained and evaluated."""
        return len(self.training_loss)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Record:
        """The record that ``dataclasses.asdict`` made plain."""
        timings = {name: plain[name] and Timing(**plain[name]) for name in ("step_ms", "iteration_ms")}
        return cls(**{**plain, **timings})


class Training:
    """Trains one model with one recipe from one seed: ``evaluate`` once, then ``run_epoch`` until ``finished``."""

    def __init__(self, task: Task, recipe: Recipe, seed: int, settings: Settings) -> None:
        self.task = task
        self.settings = settings
        self.seed = seed
        self.model = task.make_model(seed)
        self.optimizer = recipe.build(self.model)
        self.record = Record(recipe.name, recipe.title, seed, _hyperparameters(self.optimizer))
        total = settings.epochs * settings.steps_per_epoch(task)
        self.schedule = LambdaLR(self.optimizer, lambda step: cosine(step, total) if settings.cosine else 1.0)
        self._losses: list[float] = []  # of the epoch that has begun
        self._step_seconds: list[float] = []
        self._iteration_seconds: list[float] = []
        self.record.parameters = sum(p.numel() for p in self.model.parameters())

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or the run has diverged."""
        return self.record.diverged is not None or self.record.epochs >= self.settings.epochs

    @property
    def iterations(self) -> int:
        """How many there were."""
        return len(self._iteration_seconds)

    def run_epoch(self, on_step: OnStep | None = None) -> None:
        """Trains one epoch and evaluates; a run that diverges stops where it is and says so in its record.

        An epoch that ``on_step`` has left with an exception goes on after its last iteration.
        """
        epoch = self.record.epochs + 1
        batches = self.task.batches(self.seed, epoch, self.settings.batch_size)
        for batch in islice(batches, len(self._losses), self.settings.max_steps):
            loss = self.iterate(batch)
            self._losses.append(loss)
            if not math.isfinite(loss):
                self.record.diverged = f"loss {loss} in epoch {epoch}, step {len(self._losses)}"
                return self.measure()
            if on_step is not None:
                on_step(self)
        if not all(p.isfinite().all() for p in self.model.parameters()):
            self.record.diverged = f"parameters not finite after epoch {epoch}"
            return self.measure()
        mean, self._losses = statistics.fmean(self._losses), []
        self.evaluate()
        self.record.training_loss.append(mean)
        self.measure()

    def evaluate(self) -> None:
        """Records the task's figures, and the seconds that training has taken so far."""
        figures = self.task.evaluate(self.model)
        self.record.metric.append(figures.metric)
        if figures.also is not None:
            self.record.also.append(figures.also)
        self.record.seconds.append(sum(self._iteration_seconds))

    def iterate(self, batch: Batch) -> float:
        """One iteration, timed; returns the training loss before it."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model, batch)
        loss.backward()
        before_step = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self._step_seconds.append(end - before_step)
        self._iteration_seconds.append(end - begin)
        self.schedule.step()
        return loss.item()

    def measure(self) -> None:
        """Records what the iterations so far have cost."""
        self.record.step_ms = Timing.of(self._step_seconds)
        self.record.iteration_ms = Timing.of(self._iteration_seconds)
        self.record.state_bytes_per_parameter = state_bytes(self.optimizer) / self.record.parameters

    def state_dict(self) -> dict[str, Any]:
        """All that ``load_state_dict`` needs to go on from here, as if nothing had happened; numbers and tensors."""
        return {
            "record": asdict(self.record),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": self._losses,
            "step_seconds": self._step_seconds,
            "iteration_seconds": self._iteration_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a run of the same task, recipe, seed and settings where another left off."""
        self.record = Record.of(state["record"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self._losses = [*state["losses"]]
        self._step_seconds = [*state["step_seconds"]]
        self._iteration_seconds = [*state["iteration_seconds"]]

    def close(self) -> None:
        """Removes the hooks of an optimizer that has any."""
        close = getattr(self.optimizer, "close", None)
        if close is not None:
            close()


def _hyperparameters(optimizer: torch.optim.Optimizer) -> Hyperparameters:
    """Numbers and names the optimizer runs with, its own defaults included."""
    group = optimizer.param_groups[0]
    return {name: value for name, value in group.items() if isinstance(value, float | int | str | tuple)}


def cosine(step: int, total: int) -> float:
    """Factor of the learning rate: 1 at first, 0 after the last of ``total`` steps."""
    return 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, each storage counted once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(optimizer.state.values())}
    return sum(sizes.values())


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
