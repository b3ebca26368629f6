"""How much of a model is served by a rule of an optimizer, and why the rest is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from fisher_kernels.curvature.factor_rules import Elementwise
from fisher_kernels.optim import KFAC, MBF, AdaFisher
from fisher_kernels.optim.base import Explanation, FisherOptimizer
from fisher_kernels.optim.unserved import UNUSED

OPTIMIZERS: dict[str, Callable[[nn.Module], FisherOptimizer]] = {
    "adafisher": lambda model: AdaFisher(model, lr=0.0),
    "mbf": lambda model: MBF(model, lr=0.0, linear_blocks=64),
    "kfac": lambda model: KFAC(model, lr=0.0),
}
"""Those that read layers, so that a step leaves a model as it is."""

BY_ADAM = "no factors: Adam trains it"

_FOUND_OUT = re.compile(r"not served for (?:(\S+): )?(.*?)(?=; not served for|$)")
_OFF = re.compile(r"its output is off by \S+ from what (\S+) computes.*")


@dataclass(frozen=True)
class Kind:
    """Trainable parameters of one class of module that are treated alike.

    Attributes:
        rule: what serves them; ``"fallback"`` if nothing does.
        layer: class of the modules that have them.
        reason: why no rule serves them; empty if one does.
        remark: what one of several layers that share them does not serve, and why; or that a rule has no factors.
        names: of the parameters.
        parameters: how many numbers they have together.
    """

    rule: str
    layer: str
    reason: str
    remark: str
    names: tuple[str, ...]
    parameters: int

    @property
    def served(self) -> bool:
        return not self.reason


def kinds_of(model: nn.Module, optimizer: FisherOptimizer) -> list[Kind]:
    """How the trainable parameters of a model are treated, the most numbers first.

    Frozen parameters are left out. Of an optimizer that has stepped, layers that turned out not to compute what their
    class documents, and those that were never called, count as fallbacks.
    """
    parameters = dict(optimizer._names())
    homes = _homes(model)
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for row in optimizer.explain():
        if row.frozen:
            continue
        home = homes.get(parameters[row.name])
        reason = _reason(row, home)
        remark = "" if row.fallback else _remark(row)
        found.setdefault((row.rule, home.layer if home else "", reason, remark), []).append(row.name)
    kinds = [
        Kind(*treated, tuple(names), sum(parameters[name].numel() for name in names))
        for treated, names in found.items()
    ]
    return sorted(kinds, key=lambda kind: -kind.parameters)


def share_served(kinds: Sequence[Kind]) -> float:
    """The share of all numbers that a rule serves."""
    total = sum(kind.parameters for kind in kinds)
    return sum(kind.parameters for kind in kinds if kind.served) / total if total else 1.0


def share_by_adam(kinds: Sequence[Kind]) -> float:
    """The share of all numbers whose layers have a rule and no factors."""
    total = sum(kind.parameters for kind in kinds)
    return sum(kind.parameters for kind in kinds if kind.remark == BY_ADAM) / max(total, 1)


@dataclass(frozen=True)
class _Home:
    """The module that has a parameter: its class, the parameter's name there, and a sentence on modules around it."""

    layer: str
    role: str
    around: str


def _homes(model: nn.Module) -> dict[Parameter, _Home]:
    homes: dict[Parameter, _Home] = {}
    for module, around in _modules(model):
        for role, p in module._parameters.items():
            if p is not None:
                homes.setdefault(p, _Home(type(module).__name__, role, around))
    return homes


def _modules(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module, and what its parent makes of its parameters."""
    around: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            around[module.out_proj] = "nn.MultiheadAttention applies it by a function"
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            around[module] = "a parametrization computes the layer's weight from it"
        yield module, around.get(module, "")


def _reason(row: Explanation, home: _Home | None) -> str:
    """Why no rule serves a parameter; empty if one does."""
    if not row.fallback:
        return ""
    if found_out := _FOUND_OUT.search(row.detail):
        return _in_short(found_out[2])
    if home is None:
        return "no module of the model has it"
    if home.around:
        return home.around
    if home.role in ("weight", "bias"):
        return f"there is no rule for {home.layer}"
    return f"a parameter of {home.layer} beside its layers"


def _remark(row: Explanation) -> str:
    """Which layers do not serve a parameter that another one serves, and what trains one without factors."""
    if row.rule == Elementwise.name:
        return BY_ADAM
    return "; ".join(f"not as {name}: {_in_short(why)}" for name, why in _FOUND_OUT.findall(row.detail))


def _in_short(why: str) -> str:
    """A reason without the figures of one layer."""
    if why == UNUSED:
        return "its layer is not called: a function takes it, or what is computed from it"
    return _OFF.sub(r"its output is not what \1 computes", why)


def run_once(model: nn.Module, optimizer: FisherOptimizer, inputs: Any) -> None:
    """One forward and backward pass, in which layers prove that they are what their class says.

    Args:
        model: as ``inputs`` say.
        optimizer: its next step leaves the model as it is if its rate is 0.
        inputs: arguments of the forward: a dict by name, a tuple or list by position, or the only one.
    """
    optimizer.zero_grad()
    loss_of(outputs_of(model, inputs)).backward()
    optimizer.step()


def outputs_of(model: nn.Module, inputs: Any) -> Any:
    """What a model makes of inputs: a dict by name, a tuple or list by position, or the only one."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def loss_of(outputs: Any) -> Any:
    """The model's own loss if it returned one, else the sum of squares of all its outputs."""
    own = outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
    if own is not None:
        return own
    total = [t.to(torch.promote_types(t.dtype, torch.float32)).square().sum() for t in differentiable(outputs)]
    if not total:
        raise ValueError("its outputs have no tensor with a derivative")
    return sum(total[1:], total[0])


def differentiable(value: Any) -> Iterator[Any]:
    """The tensors with a derivative in what a model returns."""
    if getattr(value, "requires_grad", False):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from differentiable(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from differentiable(entry)
