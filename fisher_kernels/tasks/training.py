"""One training run, advanced lap by lap, with its timings and its record.

A run lasts for so many epochs, or for a budget of processor time. A lap is what lies between two evaluations: an epoch,
or an equal part of the budget.

The budget is processor time, of all threads, and not time on the wall: what else runs on the machine then takes no step
from one run and gives it to another, a run that was interrupted goes on as if it had not been, and an optimizer that
works in a second thread pays for it. On one thread of an idle machine the two are the same. Only iterations count: no
evaluation and no loading of data. They count from the first one on, in which an optimizer allocates its state and makes
its first inverses; what a process does only once was done before, by iterations of every optimizer on models that are
thrown away (``comparison``).
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR

from fisher_kernels.optim import LearningRates, find_lr
from fisher_kernels.tasks.optimizers import Recipe
from fisher_kernels.tasks.task import EVALUATIONS, Batch, Hyperparameters, Task

# The first iterations of a run allocate memory and build plans; they are left out of the timings.
WARM_UP_STEPS = 5

OnStep = Callable[["Training"], None]


class Interrupted(Exception):  # noqa: N818  nothing is wrong
    """Raised by a caller's ``OnStep``: training stops after a whole iteration, and can go on from there."""


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison have in common: they last for so many epochs, or for a budget.

    Attributes:
        epochs: None where there is a budget.
        cosine: whether the learning rate falls to zero over the run, or stays.
        max_steps: iterations after which every epoch ends; None for all of them.
        budget: seconds of processor time; None where there are epochs.
        evaluations: within a budget, at equal distances.
    """

    epochs: int | None
    batch_size: int
    cosine: bool = True
    max_steps: int | None = None
    budget: float | None = None
    evaluations: int = EVALUATIONS

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.budget is None):
            raise ValueError(f"epochs is {self.epochs} and budget {self.budget}, expected one of them")

    @property
    def laps(self) -> int:
        """How often a run is evaluated."""
        return self.evaluations if self.epochs is None else self.epochs

    def steps_per_epoch(self, task: Task) -> int:
        """Iterations of one epoch."""
        steps = task.steps_per_epoch(self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def length(self, task: Task) -> float:
        """Of a run: iterations of all epochs, or the seconds of the budget."""
        if self.epochs is None:
            return self.budget or 0.0  # __post_init__ has made sure that there is one
        return self.epochs * self.steps_per_epoch(task)


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
    """The record of a run. Lists have one entry per lap; all but ``training_loss`` start before the first.

    ``also`` is empty for a task without a second figure. ``iterations`` are those made by then, ``seconds`` and
    ``processor_seconds`` what they took: no evaluation and no loading of data.

    ``hyperparameters`` are all that the optimizer has, ``overrides`` those that were asked for.
    """

    optimizer: str
    title: str
    seed: int
    hyperparameters: Hyperparameters
    overrides: Hyperparameters = field(default_factory=dict)
    metric: list[float] = field(default_factory=list)
    also: list[float] = field(default_factory=list)
    training_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    step_ms: Timing | None = None
    iteration_ms: Timing | None = None
    parameters: int = 0
    state_bytes_per_parameter: float | None = None
    diverged: str | None = None

    @property
    def laps(self) -> int:
        """How many were trained and evaluated."""
        return len(self.training_loss)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Record:
        """The record that ``dataclasses.asdict`` made plain."""
        timings = {name: plain[name] and Timing(**plain[name]) for name in ("step_ms", "iteration_ms")}
        return cls(**{**plain, **timings})


class Training:
    """Trains one model with one recipe from one seed: ``evaluate`` once, then ``run_lap`` until ``finished``."""

    def __init__(self, task: Task, recipe: Recipe, seed: int, settings: Settings) -> None:
        self.task = task
        self.settings = settings
        self.seed = seed
        self.model = task.make_model(seed)
        self.optimizer = recipe.build(self.model)
        hyperparameters = {**recipe.hyperparameters, **_hyperparameters(self.optimizer)}
        self.record = Record(recipe.name, recipe.title, seed, hyperparameters, recipe.overrides)
        # Of optimizers that draw labels from the output, in the iterations in which they want any.
        self._sample: Callable[..., None] | None = getattr(self.optimizer, "sample", None)
        # Of optimizers that are no more than a way to change gradients.
        self._forward_and_backward: Callable[..., Any] | None = getattr(self.optimizer, "forward_and_backward", None)
        self._takes_closure, self._differentiates_twice = recipe.takes_closure, recipe.differentiates_twice
        self._length = settings.length(task)
        self._losses: list[float] = []  # of the lap that has begun
        self._step_seconds: list[float] = []
        self._iteration_seconds: list[float] = []
        self._processor_seconds = 0.0
        self.schedule = LambdaLR(self.optimizer, lambda _: cosine(self.done, self._length) if settings.cosine else 1.0)
        self.record.parameters = sum(p.numel() for p in self.model.parameters())

    @property
    def finished(self) -> bool:
        """Whether all laps are done or the run has diverged."""
        return self.record.diverged is not None or self.record.laps >= self.settings.laps

    @property
    def iterations(self) -> int:
        """How many there were."""
        return len(self._iteration_seconds)

    @property
    def done(self) -> float:
        """How much of ``Settings.length`` is behind."""
        return self.iterations if self.settings.budget is None else self._processor_seconds

    def run_lap(self, on_step: OnStep | None = None) -> None:
        """Trains one lap and evaluates; a run that diverges stops where it is and says so in its record.

        The lap ends with the iteration in which its time is up. A lap that ``on_step`` has left with an exception goes
        on after its last iteration.
        """
        end = self._length * (self.record.laps + 1) / self.settings.laps
        batches = self._batches()
        while self.done < end:
            loss = self.iterate(next(batches))
            self._losses.append(loss)
            if not math.isfinite(loss):
                self.record.diverged = f"loss {loss} in {self._where()}"
                return self.measure()
            if on_step is not None:
                on_step(self)
        if not all(p.isfinite().all() for p in self.model.parameters()):
            self.record.diverged = f"parameters not finite after {self._where()}"
            return self.measure()
        # An iteration may last longer than a lap, and leave nothing to do in the next one.
        mean = statistics.fmean(self._losses) if self._losses else self.record.training_loss[-1]
        self._losses = []
        self.evaluate()
        self.record.training_loss.append(mean)
        self.measure()

    def _batches(self) -> Iterator[Batch]:
        """Those after the last iteration, epoch after epoch without end."""
        steps = self.settings.steps_per_epoch(self.task)
        epoch, made = divmod(self.iterations, steps)
        while True:
            epoch += 1
            yield from islice(self.task.batches(self.seed, epoch, self.settings.batch_size), made, steps)
            made = 0

    def _where(self) -> str:
        """The last iteration, for a person."""
        epoch, step = divmod(self.iterations - 1, self.settings.steps_per_epoch(self.task))
        return f"epoch {epoch + 1}, step {step + 1}"

    def evaluate(self) -> None:
        """Records the task's figures, and what training has taken so far."""
        figures = self.task.evaluate(self.model)
        self.record.metric.append(figures.metric)
        if figures.also is not None:
            self.record.also.append(figures.also)
        self.record.seconds.append(sum(self._iteration_seconds))
        self.record.processor_seconds.append(self._processor_seconds)
        self.record.iterations.append(self.iterations)

    def iterate(self, batch: Batch) -> float:
        """One iteration, timed; returns the training loss before it."""
        processor, begin = time.process_time(), time.perf_counter()
        loss = self._backward(batch)
        before_step = time.perf_counter()
        if self._takes_closure:
            first = [loss]  # a step begins by asking for the loss, which is there
            self.optimizer.step(lambda: first.pop() if first else self._backward(batch))  # type: ignore[arg-type, return-value]
        else:
            self.optimizer.step()
        end = time.perf_counter()
        self._processor_seconds += time.process_time() - processor
        self._step_seconds.append(end - before_step)
        self._iteration_seconds.append(end - begin)
        self.schedule.step()
        return loss.item()

    def _backward(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch, whose gradients are in place of those there were."""
        self.optimizer.zero_grad()
        if self._forward_and_backward is not None:
            made: torch.Tensor = self._forward_and_backward(self.model, self.task.criterion, batch)
            return made.detach()
        inputs, targets = batch
        # Of the ways to compute attention one alone has a second derivative.
        with sdpa_kernel(SDPBackend.MATH) if self._differentiates_twice else nullcontext():
            output = self.model(inputs)
        loss = self.task.criterion(output, targets)
        if self._sample is not None:
            self._sample(output, self.task.distribution)
        if self._differentiates_twice:
            with warnings.catch_warnings():
                # Gradients that refer to themselves are dropped by the next zero_grad().
                warnings.filterwarnings("ignore", "Using backward.. with create_graph=True", UserWarning)
                loss.backward(create_graph=True)
        else:
            loss.backward()
        return loss.detach()

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
            "processor_seconds": self._processor_seconds,
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
        self._processor_seconds = state["processor_seconds"]

    def close(self) -> None:
        """Removes the hooks of an optimizer that has any."""
        close = getattr(self.optimizer, "close", None)
        if close is not None:
            close()


def sweep(task: Task, recipe: Recipe, seed: int, settings: Settings) -> LearningRates:
    """What :func:`fisher_kernels.find_lr` finds on the model and the batches that a run begins with."""
    training = Training(task, recipe, seed, settings)
    batches = training._batches()
    try:
        return find_lr(lambda: training.iterate(next(batches)), training.optimizer, training.model)
    finally:
        training.close()


def _hyperparameters(optimizer: torch.optim.Optimizer) -> Hyperparameters:
    """Numbers and names the optimizer runs with, its own defaults included."""
    group = optimizer.param_groups[0]
    return {name: value for name, value in group.items() if isinstance(value, float | int | str | tuple | None)}


def cosine(done: float, length: float) -> float:
    """Factor of the learning rate: 1 at first, 0 at the end of a run of this length."""
    return 0.5 * (1 + math.cos(math.pi * min(done / length, 1.0)))


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
