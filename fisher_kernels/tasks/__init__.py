"""Small real training tasks, the optimizers to train them with, and the comparison behind ``fisher-kernels``.

Adding a task is one module with a ``TASK`` and one entry in ``TASKS``; adding an optimizer is one entry in
``OPTIMIZERS``.
"""

from __future__ import annotations

from collections.abc import Mapping

from fisher_kernels.tasks import autoencoder, curves, digits, text
from fisher_kernels.tasks.comparison import Comparison, at_equal_time, compare, presentable, summarize
from fisher_kernels.tasks.optimizers import OPTIMIZERS, recipe
from fisher_kernels.tasks.task import LARGEST_SEED, MissingExtraError, Task
from fisher_kernels.tasks.training import Interrupted, Settings

__all__ = [
    "LARGEST_SEED",
    "OPTIMIZERS",
    "TASKS",
    "Comparison",
    "Interrupted",
    "MissingExtraError",
    "Settings",
    "Task",
    "at_equal_time",
    "compare",
    "find_task",
    "presentable",
    "recipe",
    "summarize",
]

TASKS: Mapping[str, Task] = {task.name: task for task in (digits.TASK, autoencoder.TASK, curves.TASK, text.TASK)}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    return TASKS[name]
