"""The optimizers that tasks can be trained with. Adding one is one entry in ``OPTIMIZERS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fisher_kernels.optim import EKFAC, KFAC, MBF, SOFIM, AdaFisher, AdaFisherW, EKFACAdam
from fisher_kernels.tasks.options import Option, options
from fisher_kernels.tasks.task import Hyperparameters, Task


def _itself(model: nn.Module) -> Any:
    return model


def _parameters(model: nn.Module) -> Any:
    return model.named_parameters()


@dataclass(frozen=True)
class Entry:
    """How to build an optimizer.

    Attributes:
        constructor: the class; its arguments are the hyperparameters that the optimizer takes.
        of: model -> what the constructor takes first.
        defaults: values that stand in for the constructor's own.
    """

    title: str
    constructor: Callable[..., Optimizer]
    of: Callable[[nn.Module], Any] = _itself
    defaults: Hyperparameters = field(default_factory=dict)

    @cached_property
    def options(self) -> dict[str, Option]:
        """The hyperparameters by name."""
        return options(self.constructor)

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """The values of the hyperparameter ``variant``, the default first; empty if there is none."""
        option = self.options.get("variant")
        if option is None:
            return ()
        return (option.default, *(word for word in option.words if word != option.default))

    def build(self, model: nn.Module, **hyperparameters: Any) -> Optimizer:
        """The optimizer of a model."""
        return self.constructor(self.of(model), **{**self.defaults, **hyperparameters})


OPTIMIZERS: Mapping[str, Entry] = {
    "adamw": Entry("AdamW", AdamW, _parameters, {"fused": True}),
    "sgd": Entry("SGD", SGD, _parameters, {"momentum": 0.9, "fused": True}),
    "adafisher": Entry("AdaFisher", AdaFisher),
    "adafisherw": Entry("AdaFisherW", AdaFisherW),
    "mbf": Entry("MBF", MBF),
    "sofim": Entry("SOFIM", SOFIM, _parameters),
    "kfac": Entry("KFAC", KFAC, defaults={"fisher": "sampled"}),
    "ekfac": Entry("EKFAC", EKFAC, defaults={"fisher": "sampled"}),
    "ekfacadam": Entry("EKFACAdam", EKFACAdam),
}


@dataclass(frozen=True)
class Recipe:
    """An optimizer with the hyperparameters it is built with.

    Attributes:
        hyperparameters: all that are given to the constructor; the others have its defaults.
        overrides: those among them that were asked for, and are not from the task's table.
    """

    name: str
    title: str
    build: Callable[[nn.Module], Optimizer]
    hyperparameters: Hyperparameters
    overrides: Hyperparameters = field(default_factory=dict)


def recipe(task: Task, name: str, overrides: Hyperparameters | None = None) -> Recipe:
    """The recipe that ``name``, which is ``optimizer`` or ``optimizer:variant``, stands for on this task.

    Hyperparameters come from ``overrides``, then from the task's table, then from the optimizer's own defaults.

    Raises:
        ValueError: the optimizer, the variant or an override is unknown; the message lists what there is.
    """
    optimizer, _, variant = name.partition(":")
    entry = _entry(optimizer)
    overrides = dict(overrides or {})
    for option in overrides:
        _option(optimizer, option)
    if "variant" in overrides:
        if variant not in ("", overrides["variant"]):
            raise ValueError(f"variant is {overrides['variant']!r}, and {variant!r} in the name: give one of them")
        variant = overrides.pop("variant")
    if variant and variant not in entry.variants:
        known = f"choose from {', '.join(entry.variants)}" if entry.variants else "it has none"
        raise ValueError(f"unknown variant {variant!r} of {optimizer}: {known}")
    if entry.variants and variant == entry.variants[0]:
        variant = ""
    name = f"{optimizer}:{variant}" if variant else optimizer
    hyperparameters = {**task.hyperparameters.get(name, {}), **overrides}
    if variant:
        hyperparameters["variant"] = variant
    title = f"{entry.title} ({variant})" if variant else entry.title
    return Recipe(name, title, lambda model: entry.build(model, **hyperparameters), hyperparameters, overrides)


def hyperparameter(optimizer: str, name: str, text: str) -> Any:
    """The value of a hyperparameter of an optimizer, with a variant or without, that a text stands for.

    Raises:
        ValueError: the optimizer or the hyperparameter is unknown, or the text stands for no value of it; the message
            says what there is.
    """
    return _option(optimizer.partition(":")[0], name).parse(text)


def _entry(optimizer: str) -> Entry:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}: choose from {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[optimizer]


def _option(optimizer: str, name: str) -> Option:
    known = _entry(optimizer).options
    if name not in known:
        raise ValueError(f"{optimizer} has no hyperparameter {name!r}: it takes {', '.join(known)}")
    return known[name]
