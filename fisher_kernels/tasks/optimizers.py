"""The optimizers that tasks can be trained with. Adding one is one entry in ``OPTIMIZERS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fisher_kernels.optim import MBF, SOFIM, AdaFisher, AdaFisherW
from fisher_kernels.tasks.task import Hyperparameters, Task


@dataclass(frozen=True)
class Entry:
    """How to build an optimizer, and which hyperparameters it takes.

    Attributes:
        build: (model, **hyperparameters) -> optimizer.
        options: names of the hyperparameters that ``build`` accepts.
        variants: accepted values of the hyperparameter ``variant``, the default first; empty if there is none.
    """

    title: str
    build: Callable[..., Optimizer]
    options: tuple[str, ...]
    variants: tuple[str, ...] = ()


def _adamw(model: nn.Module, **hyperparameters: Any) -> Optimizer:
    return AdamW(model.parameters(), fused=True, **hyperparameters)


def _sgd(model: nn.Module, **hyperparameters: Any) -> Optimizer:
    return SGD(model.parameters(), momentum=0.9, fused=True, **hyperparameters)


def _sofim(model: nn.Module, **hyperparameters: Any) -> Optimizer:
    return SOFIM(model.named_parameters(), **hyperparameters)


_ADAFISHER_OPTIONS = ("lr", "weight_decay", "update_interval", "damping")
_ADAFISHER_VARIANTS = ("paper", "release", "relative")

OPTIMIZERS: Mapping[str, Entry] = {
    "adamw": Entry("AdamW", _adamw, ("lr", "weight_decay")),
    "sgd": Entry("SGD", _sgd, ("lr", "weight_decay")),
    "adafisher": Entry("AdaFisher", AdaFisher, _ADAFISHER_OPTIONS, _ADAFISHER_VARIANTS),
    "adafisherw": Entry("AdaFisherW", AdaFisherW, _ADAFISHER_OPTIONS, _ADAFISHER_VARIANTS),
    "mbf": Entry("MBF", MBF, ("lr", "weight_decay", "update_interval", "damping")),
    "sofim": Entry("SOFIM", _sofim, ("lr", "weight_decay", "rho")),
}


@dataclass(frozen=True)
class Recipe:
    """An optimizer with all the hyperparameters it is built with."""

    name: str
    title: str
    build: Callable[[nn.Module], Optimizer]
    hyperparameters: Hyperparameters


def recipe(task: Task, name: str, overrides: Hyperparameters | None = None) -> Recipe:
    """The recipe that ``name``, which is ``optimizer`` or ``optimizer:variant``, stands for on this task.

    Hyperparameters come from ``overrides``, then from the task's table, then from the optimizer's own defaults.

    Raises:
        ValueError: the optimizer, the variant or an override is unknown; the message lists what there is.
    """
    optimizer, _, variant = name.partition(":")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}: choose from {', '.join(OPTIMIZERS)}")
    entry = OPTIMIZERS[optimizer]
    if variant and variant not in entry.variants:
        known = f"choose from {', '.join(entry.variants)}" if entry.variants else "it has none"
        raise ValueError(f"unknown variant {variant!r} of {optimizer}: {known}")
    overrides = overrides or {}
    for option in overrides:
        if option not in entry.options:
            raise ValueError(f"{optimizer} has no hyperparameter {option!r}: it takes {', '.join(entry.options)}")
    if entry.variants and variant == entry.variants[0]:
        variant = ""
    name = f"{optimizer}:{variant}" if variant else optimizer
    hyperparameters = {**task.hyperparameters.get(name, {}), **overrides}
    if variant:
        hyperparameters["variant"] = variant
    title = f"{entry.title} ({variant})" if variant else entry.title
    return Recipe(name, title, lambda model: entry.build(model, **hyperparameters), hyperparameters)
