"""What an iteration of training costs beside one with fused AdamW, averaged over a run.

A run is a model's first iterations with the optimizer's own schedule: at first every step brings new statistics and
inverses, later few do, so no single iteration stands for it. All runs of a task go on in turn, a few iterations each,
so that whatever else the machine does meets all of them. Time is processor time, as in ``fisher_kernels.tasks``.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

from bench.interleaved import Row
from fisher_kernels.optim.refresh import inverts, is_due
from fisher_kernels.tasks import OPTIMIZERS, find_task, recipe
from fisher_kernels.tasks.task import Batch, Task

BASELINE = "adamw"

ITERATIONS = 200
"""Of a run: the ramps of all optimizers are over by then."""

AT_ONCE = 10
"""Iterations before it is another run's turn."""

WARM_UP = 3
"""Iterations of models that are thrown away, in which a process does what it does only once."""

GOALS = {
    ("autoencoder", 256): {"mbf": 1.5, "kfac": 2.0},
    ("digits", 64): {"mbf": 1.3, "kfac": 1.6},
}
"""How many times AdamW's iteration one may take; what misses that is reported, and fails nothing."""


class Iteration(NamedTuple):
    """Seconds of one iteration, and what was new in it."""

    backward: float  # with zero_grad, the forward, the loss and, where labels are drawn, what they cost
    step: float
    refreshes: bool
    inverts: bool

    @property
    def seconds(self) -> float:
        return self.backward + self.step


class Training:
    """A model, its optimizer and all iterations so far."""

    def __init__(self, task: Task, name: str, batches: Iterator[Batch]) -> None:
        self._task, self._batches = task, batches
        self._model = task.make_model(0)
        self.optimizer = recipe(task, name).build(self._model)
        self._sample: Callable[..., None] | None = getattr(self.optimizer, "sample", None)
        self.iterations: list[Iteration] = []

    def iterate(self) -> None:
        inputs, targets = next(self._batches)
        groups = [group for group in self.optimizer.param_groups if "update_interval" in group]
        refreshes = any(map(is_due, groups))
        renews = any("inverse_interval" in group and inverts(group, refreshes) for group in groups)
        begin = time.process_time()
        self.optimizer.zero_grad()
        output = self._model(inputs)
        loss = self._task.criterion(output, targets)
        if self._sample is not None:
            self._sample(output, self._task.distribution)
        loss.backward()
        between = time.process_time()
        self.optimizer.step()
        end = time.process_time()
        self.iterations.append(Iteration(between - begin, end - between, refreshes, renews))

    def close(self) -> None:
        """Removes the hooks of an optimizer that has any."""
        getattr(self.optimizer, "close", lambda: None)()


def mean_ms(iterations: list[Iteration]) -> float:
    return 1e3 * statistics.fmean(it.seconds for it in iterations)


def parts_of(iterations: list[Iteration]) -> dict[str, float]:
    """Milliseconds of a mean iteration: what every one has, and what statistics and inverses add to it.

    An iteration with new statistics takes as much longer as they cost, one with inverses besides as much longer still.
    An optimizer whose every step has new statistics has no iteration to compare with: they are in the other two.
    """

    def of(refreshes: bool, renews: bool) -> list[Iteration]:
        return [it for it in iterations if (it.refreshes, it.inverts) == (refreshes, renews)]

    def median(some: list[Iteration]) -> float:
        return statistics.median(it.seconds for it in some)

    plain = of(False, False) or iterations
    parts = {
        "forward, backward": statistics.median(it.backward for it in plain),
        "step": statistics.median(it.step for it in plain),
    }
    fresh, renewed = of(True, False), of(True, True)
    if fresh and plain is not iterations:
        parts["statistics"] = max(0.0, median(fresh) - median(plain)) * (len(fresh) + len(renewed)) / len(iterations)
    if fresh and renewed:
        parts["inverses"] = max(0.0, median(renewed) - median(fresh)) * len(renewed) / len(iterations)
    return {name: 1e3 * seconds for name, seconds in parts.items()}


@contextmanager
def threads_of(task: Task) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(task.threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def whole_batches(task: Task, size: int) -> Iterator[Batch]:
    """Batches of one size without end."""
    return itertools.cycle([batch for batch in task.batches(0, 1, size) if len(batch[0]) == size])


@pytest.mark.parametrize(("name", "batch_size"), [("autoencoder", 256), ("autoencoder", 32), ("digits", 64)])
def test_iterations_of_a_run(report: Callable[[list[Row]], None], name: str, batch_size: int) -> None:
    task = find_task(name)
    with threads_of(task) as threads:
        runs = _race(task, batch_size)
    baseline = mean_ms(runs[BASELINE])
    goals = GOALS.get((name, batch_size), {})
    report(
        [
            _row(f"{name}, batch {batch_size}, {threads} thread{'s' * (threads > 1)}", optimizer, made, baseline, goals)
            for optimizer, made in runs.items()
            if optimizer != BASELINE
        ]
    )


def _race(task: Task, batch_size: int) -> dict[str, list[Iteration]]:
    """All optimizers with curvature and the baseline; the iterations of each."""
    names = [name for name in OPTIMIZERS if name != "sgd"]
    for name in names:
        trial = Training(task, name, whole_batches(task, batch_size))
        for _ in range(WARM_UP):
            trial.iterate()
        trial.close()
    trainings = {name: Training(task, name, whole_batches(task, batch_size)) for name in names}
    for turn in range(ITERATIONS // AT_ONCE):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(AT_ONCE):
                trainings[name].iterate()
    for training in trainings.values():
        training.close()
    return {name: training.iterations for name, training in trainings.items()}


def _row(shape: str, name: str, made: list[Iteration], baseline_ms: float, goals: dict[str, float]) -> Row:
    ours_ms, most = mean_ms(made), goals.get(name)
    ratio = baseline_ms / ours_ms
    facts: dict[str, Any] = {"gigabytes_per_second": None, "fraction_of_limit": None}
    return Row(
        op="mean iteration",
        shape=f"{OPTIMIZERS[name].title}, {shape}",
        dtype="float32",
        baseline="AdamW(fused)",
        baseline_ms=baseline_ms,
        ours_ms=ours_ms,
        ratio=ratio,
        gate=None if most is None else 1 / most,
        held=most is None or ratio >= 1 / most,
        parts_ms=parts_of(made),
        **facts,
    )
