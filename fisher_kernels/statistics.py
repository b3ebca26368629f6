"""What an optimizer of your own needs to read the layers of a model: :class:`Collector`, :class:`Rule`, :class:`Sums`.

A rule says what a layer yields, the collector puts hooks on the layers it serves, adds their sums up over backward
passes and processes, and hands them over in ``step()``. This module is the stable interface to ``curvature/``, whose
other names may change at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn import Parameter

from fisher_kernels.curvature.operations import Operations
from fisher_kernels.curvature.rules import Rule, Sums
from fisher_kernels.curvature.sites import find_layers
from fisher_kernels.curvature.statistics import Statistics
from fisher_kernels.optim.warn import warn

__all__ = ["Collector", "Rule", "Sums"]


class Collector:
    r"""Hooks on the layers of a model that a rule serves, and the sums they have collected.

    A backward counts if it accumulates the gradient of the layer's weight: evaluation, ``autograd.grad`` and
    recomputation under activation checkpointing count as they should. Sums of several backward passes add up, as
    gradients do. They end when a backward begins with ``weight.grad`` None, and when :meth:`take` hands them over.

    A layer is served only as long as it computes what its class of torch documents, which forwards check, and a rule
    that raises never ends a backward: the layer is left out from then on, and a warning and :meth:`unserved` say why.

    The model does not keep the collector alive, so hold it as long as you need it. It reads the weights that layers
    have when it is made: make a new one where a module gets other parameters.

    Args:
        model: whose layers are read. Construct this before ``torch.compile`` and before DistributedDataParallel.
        rule_for: returns for a layer the rule that serves it, None for one that is not to be served. The layer has the
            class of torch that it computes. It is asked for layers whose weight requires a gradient, and for the
            functions of torch that are applied to such a weight besides, as ``F.linear(x, layer.weight)``.
        grad_scaler: the ``torch.amp.GradScaler`` that scales the loss, whose scale is then divided out of every
            derivative. Without it, sums of scaled derivatives are scaled as ``Rule.powers`` says.
        process_group: of the processes whose sums are added up; None takes that of the DistributedDataParallel that the
            model trains in, or this process alone.

    Raises:
        TypeError: ``rule_for`` returned something that is neither a :class:`Rule` nor None.
        ValueError: one weight has layers of which the rules differ in their ``layout``; or an Embedding with
            ``sparse=True`` is to be served.
    """

    def __init__(
        self,
        model: nn.Module,
        rule_for: Callable[[Any], Rule | None],
        *,
        grad_scaler: Any = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._rule_for = rule_for
        trained = {p for p in model.parameters() if p.requires_grad}
        operations = Operations(None, Rule)
        layers = find_layers(model, lambda _, operation, owner: self._rule(operation, owner), trained, operations)
        self._statistics: Statistics[Rule] = Statistics(layers, grad_scaler, process_group)
        sites = self._statistics.sites
        if len({site.owner for site in sites}) < len(sites):
            shared = [site.layers[0].name or "model" for site in sites]
            raise ValueError(f"rules of different layouts serve layers that share a weight; served are {shared}")
        # Functions on weights of these layers alone: of no other weight would anybody take the sums.
        held = {p for layer in layers for p in layer.parameters.values()}
        self._statistics.watch_functions(model, self._rule, held)
        self._told: set[str] = set()
        self.collect()

    def _rule(self, operation: Any, owner: Parameter) -> Rule | None:
        if operation._parameters.get("weight") is not owner:  # the bias of a layer whose weight is not trained
            return None
        rule = self._rule_for(operation)
        if rule is not None and not isinstance(rule, Rule):
            raise TypeError(f"rule_for returned a {type(rule).__name__}, expected a Rule or None")
        return rule

    @property
    def weights(self) -> list[Parameter]:
        """The weights of the layers that are served, in the order of the model; each is there once."""
        left_out = self._left_out()
        return [site.owner for site in self._statistics.sites if site.owner not in left_out]

    def collect(self, on: bool = True) -> None:
        """Let backward passes whose forward follows give sums, or give none, which costs nothing.

        They do once a collector is made. Processes that train together have to say the same in the same step.
        """
        self._statistics.arm(range(len(self._statistics.sites)) if on else (), awake=on)

    def take(self) -> dict[Parameter, Sums]:
        """The sums of each weight that has any, over all processes; nothing stays pending.

        They are as if one process had gone through the joint batch with the mean of the processes' losses. All
        processes have to call this in the same step, and those that collect exchange their sums here, in one
        all-reduce. A weight whose layer was not used, or is not served any more, is missing.

        Returns:
            weight -> :class:`Sums`, the tensors of which belong to the caller.
        """
        taken = self._statistics.take()
        new = {name: reason for name, reason in self.unserved().items() if name not in self._told}
        if new:
            self._told.update(new)
            warn("statistics leave out " + "; ".join(f"{name} ({reason})" for name, reason in new.items()))
        left_out, sites = self._left_out(), self._statistics.sites
        return {sites[index].owner: sums for index, sums in taken if sites[index].owner not in left_out}

    def unserved(self) -> dict[str, str]:
        """Names of the layers that a rule was to serve and that are left out, with the reason."""
        reasons, layers = self._left_out(), self._statistics.layers()
        return {layer.name or "model": reasons[layer.owner] for layer in layers if layer.owner in reasons}

    def _left_out(self) -> dict[Parameter, str]:
        """Weights of which the sums would not be those of the whole gradient, and why."""
        found = {}
        for layer in self._statistics.layers():
            obstacles = self._statistics.obstacles
            reasons = [obstacles[p] for p in layer.parameters.values() if p in obstacles]
            if layer.proof.reason is not None and not layer.proof.inner:
                reasons.append(layer.proof.reason)
            if reasons:
                found[layer.owner] = reasons[0]
        return found

    def clear(self) -> None:
        """Drop what is pending, where a step is skipped."""
        self._statistics.clear()

    def close(self) -> None:
        """Remove the hooks, and drop what is pending."""
        self._statistics.close()
