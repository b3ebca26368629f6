"""Layers that have a rule and are not served by it: which they are, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.curvature.sites import Layer
from fisher_kernels.optim.base import require_memory
from fisher_kernels.optim.shares import like_parameter, some_anywhere

UNSERVED = "unserved"
"""Key of parameter groups: name of each layer that is not served -> the reason."""

UNUSED = "no statistics in the last refresh, though it has a gradient"
"""The reason of a layer that is served again as soon as it is used."""


class Unserved:
    """The layers of a model that are not served, with the reason of each.

    They are part of the parameter groups, so that a state that is loaded goes on as it was saved.
    """

    def __init__(self) -> None:
        self._reasons: dict[nn.Module, str] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._reasons)

    def read(self, groups: Iterable[dict[str, Any]], modules: Mapping[str, nn.Module]) -> None:
        """Take over what the parameter groups say of the layers of a model, and of functions on its parameters."""
        named = {name: reason for group in groups for name, reason in group.get(UNSERVED, {}).items()}
        self._reasons = {modules[name]: reason for name, reason in named.items() if name in modules}

    def add(self, layer: Layer[Any], group: dict[str, Any], reason: str) -> None:
        self._reasons[layer.module] = reason
        group[UNSERVED] = {**group[UNSERVED], layer.name: reason}

    def remove(self, layer: Layer[Any], group: dict[str, Any]) -> None:
        del self._reasons[layer.module]
        group[UNSERVED] = {name: reason for name, reason in group[UNSERVED].items() if name != layer.name}

    def is_misfit(self, module: nn.Module) -> bool:
        """Whether a layer cannot be served by a rule, and is not looked at any more."""
        return self._reasons.get(module, UNUSED) != UNUSED

    def is_unused(self, module: nn.Module) -> bool:
        """Whether a refresh found a gradient of a layer and no use."""
        return self._reasons.get(module) == UNUSED

    def misfits(self) -> set[nn.Module]:
        return {module for module in self._reasons if self.is_misfit(module)}

    def without_use(self, layers: Iterable[Layer[Any]]) -> set[Parameter]:
        """The parameters of unused layers that no other layer serves."""
        unused: set[Parameter] = set()
        served: set[Parameter] = set()
        for layer in layers:
            (unused if self.is_unused(layer.module) else served).update(layer.parameters.values())
        return unused - served

    def of(self, modules: Mapping[str, nn.Module]) -> dict[Parameter, list[str]]:
        """What is to be said of each parameter of the layers that are not served."""
        names = {module: name for name, module in modules.items()} if self._reasons else {}
        said: dict[Parameter, list[str]] = {}
        for module, reason in self._reasons.items():
            for p in module._parameters.values():
                if p is not None:
                    said.setdefault(p, []).append(f"not served for {names.get(module) or 'model'}: {reason}")
        return said


def has_gradient(p: Parameter) -> bool:
    """Whether a parameter has a gradient that is not all zeros; waits for a GPU, unless a graph is being captured."""
    found = _own_gradient(p)
    if found is None:
        return False
    return bool(some_anywhere([p], [found])[0]) if is_distributed(p) else bool(found)


def has_own_gradient(p: Parameter) -> bool:
    """The same of what this process has of it."""
    found = _own_gradient(p)
    return found is not None and bool(found)


def _own_gradient(p: Parameter) -> Tensor | None:
    if p.grad is None or not p.requires_grad:
        return None
    require_memory(f"the gradient of a parameter of shape {tuple(p.shape)}", p.grad)
    if p.grad.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return like_parameter(p, p.grad).any()


def shown(names: list[str]) -> str:
    """A few of many names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
