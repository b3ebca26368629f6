"""What a training task is: a model, seeded batches, a loss and a figure of merit."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

# A multiple of a seed is what torch is seeded with, in 64 bits.
LARGEST_SEED = 2**32 - 1

# Of a run with a budget, unless a task has its own number; tables show it at its eighths.
EVALUATIONS = 24

Batch = tuple[Tensor, Tensor]
Hyperparameters = Mapping[str, Any]


class MissingExtraError(ImportError):
    """A package of an extra is not installed."""

    exit_code = 1

    def format_message(self) -> str:
        """What the command line says of it, wherever it comes up."""
        return str(self)


class MissingDataError(FileNotFoundError):
    """The files of a data set are not there."""


def require(module: str, distribution: str, purpose: str, extra: str = "demo") -> ModuleType:
    """Imports ``module``, or raises ``MissingExtraError`` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs {distribution}, which could not be imported ({error}); "
            f"install it with: pip install 'fisher_kernels[{extra}]'"
        ) from error


@dataclass(frozen=True)
class Metric:
    """A figure that a model is judged by, measured on data that is never trained on."""

    name: str
    unit: str
    higher_is_better: bool
    decimals: int

    def format(self, value: float) -> str:
        """The value with as many decimals as mean something."""
        return f"{value:.{self.decimals}f}"


class Figures(NamedTuple):
    """What an evaluation yields: a value of ``Task.metric``, and one of ``Task.also`` where the task has it."""

    metric: float
    also: float | None = None


@dataclass(frozen=True)
class Task:
    """A small, real learning problem that needs no download.

    The seed alone fixes the initial model and the order of the batches, so every optimizer starts from the same
    parameters and sees the same data.

    Attributes:
        metric: the figure that optimizers are compared by.
        also: a second figure that is reported too; None if there is none.
        make_model: seed -> a model in training mode.
        batches: (seed, epoch, batch_size) -> the (inputs, targets) of one epoch.
        criterion: (output of the model, targets) -> the mean training loss, a scalar tensor.
        distribution: of the targets, whose parameters the output has: ``"categorical"`` or ``"bernoulli"``. Optimizers
            that estimate the Fisher from drawn labels draw from it.
        evaluate: model -> its figures; leaves the model as it was.
        steps_per_epoch: batch_size -> the number of batches of an epoch.
        hyperparameters: what each optimizer (``"name"`` or ``"name:variant"``) uses unless told otherwise.
        threads: processor threads that suit the task; None for one on each core.
        evaluations: of a run with a budget, at equal distances: a multiple of 8, smaller where one takes seconds.
    """

    name: str
    summary: str
    metric: Metric
    epochs: int
    batch_size: int
    make_model: Callable[[int], nn.Module]
    batches: Callable[[int, int, int], Iterator[Batch]]
    criterion: Callable[[Tensor, Tensor], Tensor]
    distribution: Literal["categorical", "bernoulli"]
    evaluate: Callable[[nn.Module], Figures]
    steps_per_epoch: Callable[[int], int]
    hyperparameters: Mapping[str, Hyperparameters]
    also: Metric | None = None
    threads: int | None = None
    evaluations: int = EVALUATIONS

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean training loss of a batch."""
        inputs, targets = batch
        return self.criterion(model(inputs), targets)


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Builds a model from ``seed`` without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; leaves the model in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def shuffled(size: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(size) fixed by the seed and the epoch."""
    return torch.randperm(size, generator=generator(seed, epoch))


def generator(seed: int, epoch: int) -> torch.Generator:
    """A random source for one epoch of one run; neighbouring runs do not meet each other's later epochs."""
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)
