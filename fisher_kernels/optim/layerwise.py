"""What the optimizers that read a model's layers share: hooks, statistics, reports of what serves what."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar, Generic, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from fisher_kernels.curvature.hooks import Layer, Statistics, find_layers, times_attached
from fisher_kernels.curvature.rules import R, Sums
from fisher_kernels.optim.base import Explanations, FisherOptimizer
from fisher_kernels.optim.caller import calling
from fisher_kernels.optim.warn import warn, warn_once

FALLBACK_SHARE = 0.01
"""Share of the trained parameters above which fallbacks are worth a warning."""

MISFITS = "misfits"
"""Key of parameter groups: name of each layer that does not compute what its class documents -> the reason."""

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
        fallback: ``"warn"`` of parameters that no layer serves, or ``"error"``: refuse to train them.
    """

    statistics_state: ClassVar[tuple[str, ...]]
    """State: what is averaged of a layer's statistics, and what is made of it."""

    _looked_at = -1  # so many optimizers had been attached to models when others were looked for

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None,
        defaults: dict[str, Any],
        grad_scaler: Any,
        process_group: dist.ProcessGroup | None,
        fallback: Literal["warn", "error"] = "warn",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}, expected a torch.nn.Module: {type(self).__name__} reads its "
                "layers; give parameter groups as params="
            )
        for name, parameter in model.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"parameter {name!r} is not initialised: run a forward pass of the lazy module first")
        if fallback not in ("warn", "error"):
            raise ValueError(f"fallback is {fallback!r}, expected 'warn' or 'error'")
        self._model = model
        self._fallback = fallback
        self._statistics: Statistics[R] | None = None
        self._armed: tuple[Any, ...] | None = None
        self._misfits: dict[nn.Module, str] = {}
        self._unused: dict[Parameter, None] = {}
        super().__init__(model.parameters() if params is None else params, defaults)
        try:
            self._watch(grad_scaler, process_group)
            self._require_rules()
        except ValueError:
            if self._statistics is not None:
                self._statistics.close()
            raise
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

    def _known_sites(self) -> Collection[int]:
        """Indices of the sites that have statistics."""
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

    def _rule_if_served(self, module: nn.Module, owner: Parameter) -> R | None:
        return None if module in self._misfits else self._rule_for(module, owner)

    def _watch(self, grad_scaler: Any, process_group: dist.ProcessGroup | None) -> None:
        old = self._statistics
        layers = find_layers(self._model, self._rule_if_served, self._groups)
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
            self._require_rules()

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
        taken = self.statistics.take(self._loss_scale(grad_scale, found_inf))
        taken = self._leave_out_misfits(taken)
        self._require_served()
        self._note_unused({index for index, _ in taken})
        if not taken:
            self._warn_if_silent()
        self._fold(taken, grad_scale)
        for group in self.param_groups:
            self._update(group, grad_scale, found_inf)
            group["iteration"] += 1
        self._arm()

    def _loss_scale(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor | None:
        """The scale in the derivatives where no scaler was given: that of the one that calls this step, if there is one.

        It passes the scale unless gradients were unscaled before.
        """
        if grad_scale is not None or found_inf is None or self.statistics.grad_scaler is not None:
            return grad_scale
        scaler = calling(torch.amp.GradScaler)
        if scaler is None:
            raise RuntimeError(
                f"gradients were unscaled before the step, and {type(self).__name__} does not know the scale that is "
                "still in its statistics: construct it with grad_scaler=, the scaler in use"
            )
        scale: Tensor | None = scaler._get_scale_async()  # since the last update(), so in all that is pending
        return scale

    # Layers that are not what their class documents.

    def _leave_out_misfits(self, taken: list[tuple[int, Sums]]) -> list[tuple[int, Sums]]:
        """Let layers that were found out take a fallback from now on; returns what was taken of the others.

        The choice is part of the parameter groups, so that a state that is loaded goes on as it was saved.
        """
        found = [(layer, reason) for layer in self.statistics.layers() if (reason := layer.proof.reason) is not None]
        if not found:
            return taken
        old = self.statistics.sites
        for layer, reason in found:
            self._misfits[layer.module] = reason
            group = self._groups[layer.owner]
            group[MISFITS] = {**group.get(MISFITS, {}), layer.name: reason}
        keys = [(site.owner, site.rule.layout) for site in old]
        left = find_layers(self._model, self._rule_if_served, self._groups)
        still = {(layer.owner, layer.rule.layout) for layer in left}
        for owner, layout in keys:
            if (owner, layout) not in still:
                for name in [name for name in self.state.get(owner, {}) if name in self.statistics_state]:
                    del self.state[owner][name]
        self._watch(self.statistics.grad_scaler, self.statistics.process_group)
        self._prepare()
        told = "; ".join(f"{layer.name or 'model'} ({reason})" for layer, reason in found)
        if self._fallback == "warn":
            warn(
                f"{type(self).__name__}: {len(found)} layer{'s do' if len(found) > 1 else ' does'} not compute what "
                f"{'their classes document' if len(found) > 1 else 'its class documents'} and cannot be served by a "
                f"rule, so that their parameters take a fallback: {told}. print(optimizer.explain()) shows each"
            )
        places = {(site.owner, site.rule.layout): index for index, site in enumerate(self.statistics.sites)}
        return [(places[keys[index]], sums) for index, sums in taken if keys[index] in places]

    def _read_misfits(self) -> None:
        """What the parameter groups say of the model's layers."""
        named: dict[str, str] = {}
        for group in self.param_groups:
            named.update(group.get(MISFITS, {}))
        modules = dict(self._model.named_modules()) if named else {}
        self._misfits = {modules[name]: reason for name, reason in named.items() if name in modules}

    def _unserved(self) -> list[Parameter]:
        served = self._layers_of()
        return [p for p in self._groups if p not in served]

    def _refuse(self, names: list[str], kind: type[Exception]) -> None:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        reasons = "".join(
            f"; {name}: {reason}" for group in self.param_groups for name, reason in group.get(MISFITS, {}).items()
        )
        raise kind(
            f"{len(names)} trained parameters have no layer rule ({shown}{reasons}), and fallback='error' refuses to "
            "train them: leave them to another optimizer (params=), or take fallback='warn'"
        )

    def _require_rules(self) -> None:
        """Refuse trained parameters without a rule, if so asked."""
        if self._fallback == "error":
            unserved = {p for p in self._unserved() if p.requires_grad}
            if unserved:
                self._refuse([name for name, p in self._names() if p in unserved], ValueError)

    def _require_served(self) -> None:
        """Refuse to step a parameter without a rule, if so asked."""
        if self._fallback == "error":
            unserved = {p for p in self._unserved() if p.grad is not None}
            if unserved:
                self._refuse([name for name, p in self._names() if p in unserved], RuntimeError)

    def _arm(self) -> None:
        """Let the layers whose next step refreshes their statistics collect them, and those that have none yet."""
        known = self._known_sites()
        armed = (len(known), *map(is_due, self.param_groups))
        if armed != self._armed:
            self._armed = armed
            sites = enumerate(self.statistics.sites)
            self.statistics.arm({i for i, s in sites if i not in known or is_due(self._groups[s.owner])})

    def _note_unused(self, taken: set[int]) -> None:
        """Say once of each layer that a refresh found a gradient and no use; whether a call is seen again is noted.

        Where no layer gave statistics the cause is a common one, of which one warning is enough.
        """
        for index in taken:
            self._unused.pop(self.statistics.sites[index].owner, None)
        if not taken:
            return
        new = []
        for index, site in enumerate(self.statistics.sites):
            if index in taken or site.owner in self._unused or not is_due(self._groups[site.owner]):
                continue
            grads = (p.grad for layer in site.layers for p in layer.parameters.values() if p.requires_grad)
            if any(not grad.is_cpu or bool(grad.any()) for grad in grads if grad is not None):
                self._unused[site.owner] = None
                new += [layer.name or "model" for layer in site.layers]
        if new:
            shown = ", ".join(new[:5]) + (", ..." if len(new) > 5 else "")
            self._warn_once(
                f"unused {shown}",
                f"layers got a gradient but were not called, so that a refresh has no statistics of them: {shown}. Is "
                "a weight applied by a function instead, or was it reparametrised (pruned, for example)? They keep the "
                "curvature they have (1 if there is none); print(optimizer.explain()) shows each",
            )

    def _warn_if_silent(self) -> None:
        """Say once that a refresh step had gradients and no statistics."""
        if self._has_told("silent"):
            return
        waiting = [site.owner.grad for site in self.statistics.sites if is_due(self._groups[site.owner])]
        # Whether a gradient is all zeros is read on the CPU alone: elsewhere the step would wait for the device.
        if any(not grad.is_cpu or bool(grad.any()) for grad in waiting if grad is not None):
            self._warn_once(
                "silent",
                "a refresh step has gradients but saw no statistics of any layer. Was the model compiled and run "
                "before the optimizer was constructed, were the gradients set by hand, or was the optimizer closed? "
                "The step goes on with the statistics it has (curvature 1 if there are none)",
            )

    # State.

    def _reloaded(self) -> None:
        self.statistics.clear()
        before = dict(self._misfits)
        self._read_misfits()
        layers = [layer for site in self.statistics.sites for layer in site.layers]
        if before == self._misfits and all(self._rule_for(layer.module, layer.owner) == layer.rule for layer in layers):
            self._rewatched()
        else:  # the settings that came along have other rules
            self._watch(self.statistics.grad_scaler, self.statistics.process_group)

    def _restored(self) -> None:
        self._read_misfits()
        self._unused = {}
        self._rewatched()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_model", "_statistics", "_fallback")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

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
        names = {module: name for name, module in self._model.named_modules()} if self._misfits else {}
        left_out: dict[Parameter, list[str]] = {}
        for module, reason in self._misfits.items():
            for p in module._parameters.values():
                if p is not None:
                    left_out.setdefault(p, []).append(f"not served for {names.get(module) or 'model'}: {reason}")

        def by_rule(p: Parameter) -> tuple[str, str]:
            uses = served.get(p, [])
            rule = " + ".join(dict.fromkeys(layer.rule.name for _, layer in uses)) or "fallback"
            details = [self._detail(role, layer) for role, layer in uses] or [self._fallback_detail(p)]
            if any(layer.owner in self._unused for _, layer in uses):
                details.append("no statistics in the last refresh, though it has a gradient")
            return rule, "; ".join(details + left_out.get(p, []))

        return by_rule

    def _warn_of_fallbacks(self, rows: Explanations) -> None:
        sizes = {name: p.numel() for name, p in self._names() if p.requires_grad}
        fallbacks = [row.name for row in rows if row.fallback and not row.frozen]
        share = sum(sizes[name] for name in fallbacks) / max(sum(sizes.values()), 1)
        if share > FALLBACK_SHARE:
            shown = ", ".join(fallbacks[:5]) + (", ..." if len(fallbacks) > 5 else "")
            warn_once(
                f"{type(self).__name__}: {share:.0%} of the trained parameters have no layer rule and take a fallback "
                f"({shown}); print(optimizer.explain()) shows each"
            )


def is_due(group: dict[str, Any]) -> bool:
    """Whether the next step of a group refreshes the statistics of its layers."""
    return bool(group["iteration"] % group["update_interval"] == 0)
