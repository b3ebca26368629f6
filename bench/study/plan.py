"""What is compared with what, for how long, from which seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from bench.study.runs import Run
from fisher_kernels.tasks import CONTESTANTS, OPTIMIZERS, find_task, recipe


@dataclass(frozen=True)
class Length:
    """How long the runs of a task at one batch size are.

    Attributes:
        seconds: of processor time, for the table at equal time.
        epochs, max_steps: for the table at equal steps; ``max_steps`` in each epoch, None for all there are.
    """

    seconds: float
    epochs: int
    max_steps: int | None = None


LENGTHS: Mapping[str, Mapping[int, Length]] = {
    "digits": {64: Length(3, 8), 256: Length(3, 20)},
    "autoencoder": {32: Length(4, 20), 256: Length(4, 60)},
    "curves": {500: Length(20, 10)},
    "fashion": {64: Length(15, 4, 100), 256: Length(15, 4, 40)},
    "fashion-autoencoder": {256: Length(24, 8, 20)},
    "vit": {64: Length(20, 4, 100), 256: Length(20, 4, 40)},
    "text": {8: Length(10, 8, 40), 32: Length(10, 8, 16)},
    "finetune": {8: Length(8, 8, 36), 32: Length(8, 8, 12)},
    "graph": {200: Length(3, 150)},
}
"""The task's own batch size comes first. Of text, one example is a sequence of 128 predictions."""

SEEDS = (0, 1, 2)
TUNING_SEEDS = (100, 101)
"""Rates are chosen on these, which no table has. Runs of more than ``LONG`` seconds take the first one alone."""
LONG = 5.0

OURS = (*OPTIMIZERS, "adafisher:relative")
"""And torch's AdamW and SGD; of AdaFisher's variants the default, and the one its page advises for new problems."""

FROM_OUTSIDE = ("autoencoder", "curves", "fashion-autoencoder", "text")
"""The tasks that optimizers of other libraries are compared on, at equal time and the task's own batch size."""

GUESSES: Mapping[str, float] = {
    "adamw": 3e-3,
    "sgd": 3e-2,
    "adafisher": 3e-3,
    "adafisherw": 3e-3,
    "adafisher:relative": 0.3,
    "mbf": 1e-3,
    "sofim": 0.3,
    "kfac": 0.1,
    "ekfac": 3e-2,
    "ekfacadam": 1e-2,
    "adagrad": 1e-2,
    "rmsprop": 1e-3,
    "lbfgs": 0.1,
    "soap": 3e-3,
    "muon": 1e-2,
    "psgd": 1e-3,
    "shampoo": 1e-2,
    "kbfgs": 0.03,
    "adahessian": 0.1,
}
"""Learning rates around which to search, the same on all tasks."""


def contestants(task: str, batch_size: int) -> list[str]:
    """The optimizers that are compared on a task."""
    outside = task in FROM_OUTSIDE and batch_size == own_batch_size(task)
    return [*OURS, *(CONTESTANTS if outside else ())]


@cache
def titles() -> dict[str, str]:
    """What pages call the optimizers."""
    known = {name: entry.title for name, entry in (*OPTIMIZERS.items(), *CONTESTANTS.items())}
    return {**known, **{name: recipe(find_task("digits"), name).title for name in OURS}}


def own_batch_size(task: str) -> int:
    """The one the task has by itself."""
    return next(iter(LENGTHS[task]))


def tuning_seeds(task: str, batch_size: int) -> tuple[int, ...]:
    """Those that rates are chosen on."""
    return TUNING_SEEDS if LENGTHS[task][batch_size].seconds <= LONG else TUNING_SEEDS[:1]


def tuning_run(task: str, batch_size: int, optimizer: str, lr: float, seed: int) -> Run:
    """A run that a rate is chosen by: planned for the time of the table, and evaluated at its end alone."""
    return Run(task, optimizer, lr, batch_size, seed, seconds=LENGTHS[task][batch_size].seconds, evaluations=1)


def runs_at_equal_time(task: str, batch_size: int, lrs: Mapping[str, float]) -> Iterator[Run]:
    """Those of the table at equal time, with the chosen rates."""
    seconds, evaluations = LENGTHS[task][batch_size].seconds, find_task(task).evaluations
    for optimizer, lr in lrs.items():
        for seed in SEEDS:
            yield Run(task, optimizer, lr, batch_size, seed, seconds=seconds, evaluations=evaluations)


def runs_at_equal_steps(task: str, batch_size: int, lrs: Mapping[str, float]) -> Iterator[Run]:
    """Those of the table at equal steps, of our own optimizers and torch's, with the chosen rates."""
    length = LENGTHS[task][batch_size]
    for optimizer in filter(lrs.__contains__, OURS):
        for seed in SEEDS:
            yield Run(
                task, optimizer, lrs[optimizer], batch_size, seed, epochs=length.epochs, max_steps=length.max_steps
            )
