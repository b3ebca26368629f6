"""Small real training tasks, the optimizers to train them with, and the comparison behind ``fisher-kernels``.

Adding a task is one module with a ``TASK`` and one entry in ``TASKS``; adding an optimizer is one entry in
``OPTIMIZERS``.
"""

from __future__ import annotations

from collections.abc import Mapping

from fisher_kernels.tasks import (
    autoencoder,
    curves,
    digits,
    fashion,
    fashion_autoencoder,
    finetune,
    graph,
    text,
    vit,
)
from fisher_kernels.tasks.comparison import Comparison, at_equal_time, compare, presentable, summarize
from fisher_kernels.tasks.optimizers import CONTESTANTS, OPTIMIZERS, recipe
from fisher_kernels.tasks.task import LARGEST_SEED, MissingDataError, MissingExtraError, Task
from fisher_kernels.tasks.training import Interrupted, Settings, sweep

__all__ = [
    "CONTESTANTS",
    "LARGEST_SEED",
    "OPTIMIZERS",
    "TASKS",
    "Comparison",
    "Interrupted",
    "MissingDataError",
    "MissingExtraError",
    "Settings",
    "Task",
    "at_equal_time",
    "compare",
    "find_task",
    "presentable",
    "recipe",
    "summarize",
    "sweep",
]

TASKS: Mapping[str, Task] = {
    module.TASK.name: module.TASK
    for module in (digits, autoencoder, curves, fashion, fashion_autoencoder, vit, text, finetune, graph)
}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    return TASKS[name]
