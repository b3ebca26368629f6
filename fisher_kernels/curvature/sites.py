"""Layers of a model that rules serve, and the sites at which the sums of their uses are added up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fisher_kernels.curvature.functions import Spec
from fisher_kernels.curvature.gathered import is_distributed, is_gathered
from fisher_kernels.curvature.operations import Operations
from fisher_kernels.curvature.proof import Proof, choose
from fisher_kernels.curvature.rules import R, Rule, Sums, Use, has_bias


@dataclass(eq=False)
class Layer(Generic[R]):
    """One supported module and those of its parameters that the optimizer holds.

    Attributes:
        operation: what the module is taken for, as a layer of torch's own class: itself if it is one. The rule reads
            this one.
        parameters: role (``"weight"``, ``"bias"``) -> parameter.
        candidates: what else it may be taken for, until a forward has told.
        spec: of a function that is applied to a parameter outside of any module that has a rule; the module is then
            the operation too, and the name that of the parameter.
        start: where this is one call of a function: the first row of its part of the weight.
        places: role -> what the module calls that parameter, where it is another name.
    """

    name: str
    module: nn.Module
    operation: nn.Module
    rule: R
    parameters: dict[str, Parameter]
    proof: Proof = field(default_factory=Proof)
    candidates: Sequence[nn.Module] = ()
    spec: Spec | None = None
    start: int | None = None
    places: dict[str, str] = field(default_factory=dict)

    def place(self, role: str) -> str:
        """How a parameter of the layer is called."""
        return f"{self.name or 'model'}.{role}" if self.spec is None else f"{self.name}, by function"

    @property
    def owner(self) -> Parameter:
        """The parameter that keeps the layer's factors in its state and its settings in its group."""
        return next(iter(self.parameters.values()))

    def input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """The input of a forward whose backward can count, else None."""
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        trained = False
        for role, p in self.parameters.items():
            found = module._parameters.get(self.places.get(role, role))
            if found is not p and not is_gathered(p, found):
                return None  # swapped, as functional_call does, or renamed, as pruning does: another is computed of it
            trained = trained or p.requires_grad
        if not trained:
            return None
        x = first_input(args, kwargs)
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            return None
        return x.detach() if x.requires_grad else x

    def holds(self, x: Tensor, output: Tensor, refresh: int) -> bool:
        """Whether nothing speaks against the layer, which is looked at if that is due."""
        if self.candidates and (found := choose(self.candidates, x, output)) is not None:
            self.operation, self.candidates = found, ()
        if self.operation is not self.module:
            self.operation.training = self.module.training
        if self._has_parts() and not is_distributed(output):
            self.proof.object("processes have parts of its parameters, and its output does not say who has what")
        return self.proof.holds(self.module, x, output, refresh, self.operation)

    def _has_parts(self) -> bool:
        """Whether the module has DTensors now, which are in the place of DTensors alone."""
        divided = [role for role, p in self.parameters.items() if is_distributed(p)]
        return any(is_distributed(self.module._parameters.get(self.places.get(role, role))) for role in divided)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of a layer among the arguments of its forward."""
    return args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)


class Kept(NamedTuple, Generic[R]):
    """A use that waits for the others of its backward, its layer, and how often its tensors had been written to."""

    use: Use[R]
    layer: Layer[R]
    versions: list[int]


@dataclass(eq=False)
class Site(Generic[R]):
    """Adds up the sums of all uses of one weight in one orientation, by one module or by several that share it."""

    owner: Parameter
    rule: R
    layers: list[Layer[R]] = field(default_factory=list)
    sums: Sums | None = None
    uses: dict[int, list[Kept[R]]] = field(default_factory=dict)  # of each backward, where they contribute together
    tasks: set[int] = field(default_factory=set)  # the backward passes that have contributed
    had_gradient: bool = False  # whether one of them found a gradient that is kept
    by_function: bool = False  # whether functions outside of modules that are served apply the weight

    @cached_property
    def module(self) -> nn.Module:
        """The module whose settings are used for the site: one with a bias if there is any."""
        return max((layer.operation for layer in self.layers), key=has_bias)

    @property
    def needs_functions(self) -> bool:
        """Whether some statistics come from functions that were seen to apply the weight."""
        return self.by_function or any(layer.proof.reason and layer.proof.inner for layer in self.layers)

    def is_trained(self) -> bool:
        """Whether any parameter of its layers is."""
        return any(p.requires_grad for layer in self.layers for p in layer.parameters.values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing is pending, as in most steps."""
        return self.sums is None and not self.uses and not self.tasks and not self.had_gradient

    def settle(self, running: Callable[[int], bool] = lambda task: False) -> Sums | None:
        """The pending sums, with what the uses of each backward that is not running any more make together."""
        for task in [task for task in self.uses if not running(task)]:
            kept = self.uses.pop(task)
            for use, layer, versions in kept:
                if versions_of(use.captured) != versions:
                    self.clear()
                    raise overwritten(layer, "the step")
            self.add(self.rule.contribute_together([use for use, _, _ in kept]))
        return self.sums

    def add(self, sums: Sums) -> None:
        self.sums = sums if self.sums is None else self.sums + sums

    def clear(self) -> None:
        self.sums, self.uses, self.tasks, self.had_gradient = None, {}, set(), False

    def pending(self) -> tuple[Any, ...]:
        """What is pending, for :meth:`put_back`; nothing that comes later is written to it."""
        return self.sums, {task: [*kept] for task, kept in self.uses.items()}, {*self.tasks}, self.had_gradient

    def put_back(self, pending: tuple[Any, ...]) -> None:
        self.sums, self.uses, self.tasks, self.had_gradient = pending

    def begins_anew(self, anchor: Parameter, gathered: bool) -> bool:
        """Whether the gradients of the backward passes that have contributed are gone.

        Args:
            gathered: whether ``fully_shard`` gathers the parameter for forwards.
        """
        before, self.had_gradient = self.had_gradient, anchor.grad is not None
        # That keeps gradients elsewhere until processes have added them up.
        return anchor.grad is None and (before or not gathered)


def find_layers(
    model: nn.Module,
    rule_for: Callable[[nn.Module, nn.Module, Parameter], R | None],
    held: Collection[Parameter],
    operations: Operations,
) -> list[Layer[R]]:
    """The modules of a model that a rule serves, with the parameters that the optimizer holds.

    Args:
        rule_for: (module, operation, owner) -> rule.
        operations: what each module is taken for.

    Raises:
        ValueError: an Embedding with ``sparse=True`` is among them: its gradient has no dense counterpart to step with.
    """
    layers = []
    skipped = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # whose hooks are compiled along with it
            continue
        if id(module) in skipped or not module._parameters:
            continue
        operation, *others = operations.of(module)
        parameters = {
            role: p for role in ("weight", "bias") if (p := operation._parameters.get(role)) is not None and p in held
        }
        if not parameters:
            continue
        rule = rule_for(module, operation, next(iter(parameters.values())))
        if rule is None:
            continue
        if getattr(operation, "sparse", False):
            which = f"module {name!r}" if name else "the model"
            raise ValueError(
                f"{which} is an Embedding with sparse=True, whose gradient is sparse; construct it with sparse=False, "
                "or leave its weight to torch.optim.SparseAdam (params=)"
            )
        candidates = [operation, *others] if others else ()
        layers.append(Layer(name, module, operation, rule, parameters, candidates=candidates))
        if operation is not module:
            named = {p: name for name, p in module._parameters.items() if p is not None}
            layers[-1].places = {role: named[p] for role, p in parameters.items() if p in named}
        layers[-1].proof.overridden = operations.choice(module) is not None
    return layers


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor has been written to. A rule that keeps an input needs it unchanged until it is read."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # those of inference mode do not count
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def overwritten(layer: Layer[Any], until: str) -> RuntimeError:
    """What to raise where the input of a layer was written to before it was read."""
    # Autograd tells in most cases, but it keeps a copy of its own under autocast and of an input that is padded.
    return RuntimeError(
        f"the input of module {layer.name!r} was modified in place before {until}, where its statistics need it as it "
        "was: modify a copy"
    )


def rescale(sums: Sums, rule: Rule, scale: Tensor) -> None:
    """Divide the scale of the loss out of raw sums."""
    for vector, power in zip(sums.vectors, rule.powers, strict=True):
        if power:
            # Twice by the scale, not once by its square, which may overflow.
            for _ in range(power):
                vector.div_(scale.to(vector.device))
