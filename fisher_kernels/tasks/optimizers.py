"""The optimizers that tasks can be trained with. Adding one is one entry in ``OPTIMIZERS``.

``CONTESTANTS`` are of other libraries, to compare with: of torch, of pytorch_optimizer and of asdfghjkl (the extra
``compare``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, AdamW, Optimizer, RMSprop

from fisher_kernels.optim import EKFAC, KFAC, MBF, SOFIM, AdaFisher, AdaFisherW, EKFACAdam
from fisher_kernels.tasks.options import Option, options
from fisher_kernels.tasks.task import Hyperparameters, Task, require


def _itself(model: nn.Module) -> Any:
    return model


def _parameters(model: nn.Module) -> Any:
    return model.named_parameters()


def _trained(model: nn.Module) -> Any:
    return [p for p in model.parameters() if p.requires_grad]


def _muon_groups(model: nn.Module) -> Any:
    """Weights of hidden layers for Muon; embeddings, the last layer and all that is no matrix for its AdamW."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    hidden = {layer.weight for layer in layers[:-1] if layer.weight.requires_grad}
    others = [p for p in _trained(model) if p not in hidden]
    return [{"params": [*hidden], "use_muon": True}, {"params": others, "use_muon": False}]


@dataclass(frozen=True)
class Packaged:
    """A class of a package that need not be installed."""

    name: str
    module: str = "pytorch_optimizer"
    distribution: str = "pytorch_optimizer"

    def load(self) -> Callable[..., Optimizer]:
        """The class.

        Raises:
            MissingExtraError: the package is not installed.
        """
        found: Callable[..., Optimizer] = getattr(
            require(self.module, self.distribution, f"the optimizer {self.name}", "compare"), self.name
        )
        return found


@dataclass(frozen=True)
class Entry:
    """How to build an optimizer.

    Attributes:
        constructor: the class; its arguments are the hyperparameters that the optimizer takes.
        of: model -> what the constructor takes first.
        defaults: values that stand in for the constructor's own.
        takes_closure: whether a step evaluates the loss itself, as often as it likes.
        differentiates_twice: whether a step needs the graph of the gradients.
    """

    title: str
    constructor: Callable[..., Optimizer] | Packaged
    of: Callable[[nn.Module], Any] = _itself
    defaults: Hyperparameters = field(default_factory=dict)
    takes_closure: bool = False
    differentiates_twice: bool = False

    @cached_property
    def maker(self) -> Callable[..., Optimizer]:
        """The class itself."""
        return self.constructor.load() if isinstance(self.constructor, Packaged) else self.constructor

    @cached_property
    def options(self) -> dict[str, Option]:
        """The hyperparameters by name."""
        return options(self.maker)

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """The values of the hyperparameter ``variant``, the default first; empty if there is none."""
        option = None if isinstance(self.constructor, Packaged) else self.options.get("variant")
        if option is None:
            return ()
        return (option.default, *(word for word in option.words if word != option.default))

    def build(self, model: nn.Module, **hyperparameters: Any) -> Optimizer:
        """The optimizer of a model."""
        return self.maker(self.of(model), **{**self.defaults, **hyperparameters})


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

CONTESTANTS: Mapping[str, Entry] = {
    "adagrad": Entry("Adagrad", Adagrad, _trained),
    "rmsprop": Entry("RMSprop", RMSprop, _trained),
    "lbfgs": Entry("L-BFGS", LBFGS, _trained, {"max_iter": 1, "history_size": 10}, takes_closure=True),
    "soap": Entry("SOAP", Packaged("SOAP"), _trained),
    "muon": Entry("Muon", Packaged("Muon"), _muon_groups),
    "psgd": Entry("PSGD-Kron", Packaged("Kron"), _trained),
    "shampoo": Entry("Shampoo", Packaged("ScalableShampoo"), _trained),
    "kbfgs": Entry("K-BFGS", Packaged("KBFGS", "fisher_kernels.tasks.kbfgs", "asdfghjkl")),
    "adahessian": Entry("AdaHessian", Packaged("AdaHessian"), _trained, differentiates_twice=True),
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
    takes_closure: bool = False
    differentiates_twice: bool = False


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
    return Recipe(
        name,
        title,
        lambda model: entry.build(model, **hyperparameters),
        hyperparameters,
        overrides,
        entry.takes_closure,
        entry.differentiates_twice,
    )


def hyperparameter(optimizer: str, name: str, text: str) -> Any:
    """The value of a hyperparameter of an optimizer, with a variant or without, that a text stands for.

    Raises:
        ValueError: the optimizer or the hyperparameter is unknown, or the text stands for no value of it; the message
            says what there is.
    """
    return _option(optimizer.partition(":")[0], name).parse(text)


def _entry(optimizer: str) -> Entry:
    known = {**OPTIMIZERS, **CONTESTANTS}
    if optimizer not in known:
        raise ValueError(f"unknown optimizer {optimizer!r}: choose from {', '.join(known)}")
    return known[optimizer]


def _option(optimizer: str, name: str) -> Option:
    known = _entry(optimizer).options
    if name not in known:
        raise ValueError(f"{optimizer} has no hyperparameter {name!r}: it takes {', '.join(known)}")
    return known[name]
