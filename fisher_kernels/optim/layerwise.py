"""What the optimizers that read a model's layers share: hooks, statistics, reports of what serves what."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from fisher_kernels.curvature.hooks import Layer, Statistics, find_layers, times_attached
from fisher_kernels.curvature.rules import R, Sums
from fisher_kernels.optim.base import Explanations, FisherOptimizer, require_memory
from fisher_kernels.optim.warn import warn, warn_once

FALLBACK_SHARE = 0.01
"""Share of the trained parameters above which fallbacks are worth a warning."""

# What each model has been warned of. Not kept by the optimizers: a notebook makes one after the other for a model.
_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


class LayerwiseOptimizer(FisherOptimizer, Generic[R]):
    """Base of the optimizers that read the layers of ``model``; subclasses say which rule serves a layer and step.

    Args:
        model: its supported modules are watched.
        params: parameter groups as every torch optimizer takes them; None takes all parameters of the model.
        defaults: hyperparameters of groups that do not set them.
        grad_scaler: the ``torch.amp.GradScaler`` whose scale is in the derivatives.
        process_group: over which statistics are added up; None takes the default group where there is one.
    """

    _looked_at = -1  # so many optimizers had been attached to models when others were looked for

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None,
        defaults: dict[str, Any],
        grad_scaler: Any,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}, expected a torch.nn.Module: {type(self).__name__} reads its "
                "layers; give parameter groups as params="
            )
        for name, parameter in model.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"parameter {name!r} is not initialised: run a forward pass of the lazy module first")
        _check_kinds(grad_scaler, process_group)
        self._model = model
        self._statistics: Statistics[R] | None = None
        self._armed: list[bool] = []
        super().__init__(model.parameters() if params is None else params, defaults)
        if self._groups.keys().isdisjoint(model.parameters()):
            raise ValueError(
                f"params has no parameter of model: none of these {len(self._groups)} is in the {type(model).__name__} "
                "whose layers are read, expected those of one model"
            )
        self._watch(grad_scaler, process_group)
        self._warn_of_fallbacks(self.explain())

    # What subclasses define.

    def _rule_for(self, module: nn.Module, owner: Parameter) -> R | None:
        """The rule that serves a module whose settings are those of ``owner``'s group."""
        raise NotImplementedError

    def _fallback_detail(self, parameter: Parameter) -> str:
        """What happens to a parameter that no rule serves."""
        raise NotImplementedError

    def _rewatched(self) -> None:
        """Called when the watched layers or the state have changed; ends with :meth:`_arm`."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Make the state that the step needs, before anything is changed."""
        raise NotImplementedError

    def _fold(self, taken: list[tuple[int, Sums]], grad_scale: Tensor | None) -> None:
        """Average new statistics in."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Step the parameters of a group that have a gradient."""
        raise NotImplementedError

    def _detail(self, role: str, layer: Layer[R]) -> str:
        """What a layer gives to the parameter in one of its roles."""
        raise NotImplementedError

    # Layers.

    @property
    def statistics(self) -> Statistics[R]:
        assert self._statistics is not None
        return self._statistics

    def _watch(self, grad_scaler: Any, process_group: dist.ProcessGroup | None) -> None:
        old = self._statistics
        layers = find_layers(self._model, self._rule_for, self._groups)
        self._statistics = Statistics(layers, grad_scaler, process_group)
        if old is not None:
            self._statistics.adopt(old)
            if not old.open:
                self._statistics.close()
            old.close()
        self._rewatched()

    def _regrouped(self) -> None:
        if self._statistics is not None:
            self._watch(self._statistics.grad_scaler, self._statistics.process_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        group.setdefault("iteration", 0)
        super()._check_group(group)

    def close(self) -> None:
        """Remove the hooks from the model. The optimizer can go on stepping with the curvature it has."""
        self.statistics.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them the statistics of the backward passes that produced them."""
        self.statistics.clear()
        super().zero_grad(set_to_none)

    # Step.

    def _refused(self) -> None:
        self.statistics.clear()  # a skipped step leaves nothing behind, and the refresh that was due is still due

    def _warn_once(self, what: str, message: str) -> None:
        """Once for each model and kind of optimizer."""
        if not self._has_told(what):
            _told.setdefault(self._model, set()).add(f"{type(self).__name__} {what}")
            warn(f"{type(self).__name__}: {message}")

    def _has_told(self, what: str) -> bool:
        return f"{type(self).__name__} {what}" in _told.get(self._model, ())

    def _look_for_other_readers(self) -> None:
        """Say once if other optimizers read the same layers; not at construction, when an old one is still around."""
        self._looked_at = times_attached()
        if self.statistics.open and not self._has_told("readers") and self.statistics.other_readers():
            gc.collect()  # what only cycles keep alive costs nothing after this
            if others := self.statistics.other_readers():
                self._warn_once(
                    "readers",
                    f"{len(others) + 1} living optimizers read layers of this model, and each makes every iteration "
                    "slower: close() those that are no longer used",
                )

    def _advance(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if self._looked_at != times_attached():
            self._look_for_other_readers()
        self._prepare()
        taken = self.statistics.take(grad_scale)
        if not taken:
            self._warn_if_silent()
        self._fold(taken, grad_scale)
        for group in self.param_groups:
            self._update(group, grad_scale, found_inf)
            group["iteration"] += 1
        self._arm()

    def _arm(self) -> None:
        """Let the layers whose next step refreshes their statistics collect them."""
        armed = [is_due(group) for group in self.param_groups]
        if armed != self._armed:
            self._armed = armed
            for index, site in enumerate(self.statistics.sites):
                self.statistics.arm(index, is_due(self._groups[site.owner]))

    def _warn_if_silent(self) -> None:
        """Say once that a refresh step had gradients and no statistics."""
        if self._has_told("silent"):
            return
        waiting = [site.owner.grad for site in self.statistics.sites if is_due(self._groups[site.owner])]
        for grad in waiting:
            require_memory("a gradient", grad)
        # Whether a gradient is all zeros is read on the CPU alone: elsewhere the step would wait for the device.
        if any(not grad.is_cpu or bool(grad.any()) for grad in waiting if grad is not None):
            self._warn_once(
                "silent",
                "a refresh step has gradients but saw no statistics of any layer. Was this model, or another one of "
                "its class, compiled and run before the optimizer was constructed (torch.compile then goes on with "
                "what it compiled, without the hooks: call torch._dynamo.reset() after the constructor and compile "
                "again)? Were the gradients set by hand, are the inputs nested or sparse tensors, or was the optimizer "
                "closed? The step goes on with the statistics it has (curvature 1 if there are none)",
            )

    # State.

    def _reloaded(self) -> None:
        self.statistics.clear()
        layers = [layer for site in self.statistics.sites for layer in site.layers]
        if all(self._rule_for(layer.module, layer.owner) == layer.rule for layer in layers):
            self._rewatched()
        else:  # the settings that came along have other rules
            self._watch(self.statistics.grad_scaler, self.statistics.process_group)

    def _restored(self) -> None:
        self._rewatched()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": self._model, "_statistics": self._statistics}

    # Reports.

    def _names(self) -> Iterator[tuple[str, Parameter]]:
        names = {p: name for name, p in self._model.named_parameters()}
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                yield names.get(p, f"param_groups[{g}]['params'][{i}]"), p

    def _layers_of(self) -> dict[Parameter, list[tuple[str, Layer[R]]]]:
        """Parameter -> the layers that serve it, with its role in each."""
        served: dict[Parameter, list[tuple[str, Layer[R]]]] = {}
        for site in self.statistics.sites:
            for layer in site.layers:
                for role, p in layer.parameters.items():
                    served.setdefault(p, []).append((role, layer))
        return served

    def _served(self) -> Callable[[Parameter], tuple[str, str]]:
        served = self._layers_of()
        there = set(self._model.parameters())

        def by_rule(p: Parameter) -> tuple[str, str]:
            uses = served.get(p, [])
            rule = " + ".join(dict.fromkeys(layer.rule.name for _, layer in uses)) or "fallback"
            details = [self._detail(role, layer) for role, layer in uses] or [self._fallback_detail(p)]
            if p not in there:
                details.insert(0, "not in the model")
            return rule, "; ".join(details)

        return by_rule

    def _warn_of_fallbacks(self, rows: Explanations) -> None:
        sizes = {name: p.numel() for name, p in self._names() if p.requires_grad}
        fallbacks = [row.name for row in rows if row.fallback and not row.frozen]
        share = sum(sizes[name] for name in fallbacks) / max(sum(sizes.values()), 1)
        if share > FALLBACK_SHARE:
            shown = ", ".join(fallbacks[:5]) + (", ..." if len(fallbacks) > 5 else "")
            strangers = self._groups.keys() - set(self._model.parameters())
            where = f", of which {len(strangers)} are not in the model" if strangers else ""
            warn_once(
                f"{type(self).__name__}: {share:.0%} of the trained parameters have no layer rule and take a fallback "
                f"({shown}){where}; print(optimizer.explain()) shows each"
            )


def _check_kinds(grad_scaler: Any, process_group: Any) -> None:
    """Refuse what is no scaler and no group; a scaler is known by what is asked of it."""
    asked = ("is_enabled", "_get_scale_async")
    if grad_scaler is not None and (
        isinstance(grad_scaler, type) or not all(callable(getattr(grad_scaler, name, None)) for name in asked)
    ):
        raise TypeError(f"grad_scaler is {grad_scaler!r}, expected a torch.amp.GradScaler or None")
    if process_group is None or (dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER):
        return
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group is {process_group!r}, expected a torch.distributed.ProcessGroup or None")


def is_due(group: dict[str, Any]) -> bool:
    """Whether the next step of a group refreshes the statistics of its layers."""
    return bool(group["iteration"] % group["update_interval"] == 0)
