"""What curvature costs on the user's own model, and which intervals keep it to a share of an iteration."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from fisher_kernels.optim.restored import restored

NOT_NOW = 1 << 40
"""An interval that no step meets."""

WARM_UP = 2
"""Iterations that are not timed: they allocate memory and build plans."""


@dataclass(frozen=True)
class Costs:
    """Medians of what was measured, in seconds, and what follows; prints as a table.

    Attributes:
        iteration: one iteration without new statistics and inverses; the step takes the inverses that are there.
        statistics: what taking statistics adds to an iteration.
        inverses: what making inverses adds.
        overhead: the share of ``iteration`` that both together may take on average.
    """

    iteration: float
    statistics: float
    inverses: float
    overhead: float

    @property
    def arguments(self) -> dict[str, int]:
        """The smallest intervals that keep to the overhead, two refreshes to an inversion, as arguments."""
        each = self.statistics + self.inverses / 2  # of a refresh
        interval = max(1, math.ceil(each / (self.overhead * self.iteration)))
        return {"update_interval": interval, "inverse_interval": 2 * interval}

    def __str__(self) -> str:
        rows = [("an iteration without a refresh", self.iteration), ("statistics", self.statistics)]
        rows.append(("inverses", self.inverses))
        lines = [f"{'':<32}{'ms':>10}{'share':>8}"]
        lines += [f"{name:<32}{1e3 * seconds:>10.3f}{seconds / self.iteration:>8.0%}" for name, seconds in rows]
        chosen = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        lines.append(f"at most {self.overhead:.0%} of an iteration on average: {chosen}")
        return "\n".join(lines)


class Measured(Optimizer):
    """Base of the optimizers whose groups have ``refresh``, ``update_interval`` and ``inverse_interval``."""

    _model: nn.Module

    def measure(self, step_fn: Callable[[], object], overhead: float = 0.25, repeats: int = 5) -> Costs:
        """Time statistics, inverses and an iteration without them, and propose intervals.

        Parameters, gradients, buffers, the state, the settings, what has been collected since the last step and torch's
        random numbers are as before afterwards. What ``step_fn`` changes besides, a learning rate schedule for one, is
        not.

        Args:
            step_fn: one iteration of training: ``zero_grad()``, forward, backward, ``step()``.
            overhead: the share of an iteration that statistics and inverses may take on average.
            repeats: how many iterations of each of the three kinds are timed, after two that are not.

        Returns:
            The times; ``print`` shows them as a table, and ``arguments`` has the intervals.

        Raises:
            TypeError, ValueError: ``step_fn`` cannot be called, or a number is out of range; the message names it.
        """
        if not callable(step_fn):
            raise TypeError(f"step_fn is {step_fn!r}, expected a function that runs one iteration")
        if not 0 < overhead < math.inf:
            raise ValueError(f"overhead is {overhead}, expected a finite number above 0")
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}, expected at least 1")
        intervals = {"plain": (NOT_NOW, NOT_NOW), "statistics": (1, NOT_NOW), "both": (1, 1)}
        found: dict[str, list[float]] = {name: [] for name in intervals}
        with restored(self, self._model):
            _follow(self, 1, 1)
            for _ in range(WARM_UP):
                step_fn()
            # In turn, so that what else the machine does meets all alike.
            for _ in range(repeats):
                for name, (update, inverse) in intervals.items():
                    _follow(self, update, inverse)
                    found[name].append(_seconds(step_fn, self._model))
        plain, with_statistics, with_both = (statistics.median(found[name]) for name in intervals)
        return Costs(plain, max(with_statistics - plain, 0.0), max(with_both - with_statistics, 0.0), float(overhead))


def _follow(optimizer: Optimizer, update: int, inverse: int) -> None:
    for group in optimizer.param_groups:
        # Not the first iteration of the group, which every interval meets.
        group.update(refresh="constant", update_interval=update, inverse_interval=inverse, iteration=1)
        group.update(overlap=False)  # what inverses cost, whoever pays
    optimizer.zero_grad()  # which tells the hooks


def _seconds(step_fn: Callable[[], object], model: nn.Module) -> float:
    _wait(model)
    begin = time.perf_counter()
    step_fn()
    _wait(model)
    return time.perf_counter() - begin


def _wait(model: nn.Module) -> None:
    for device in {p.device for p in model.parameters() if p.is_cuda}:
        torch.cuda.synchronize(device)
