"""What the optimizers that read a model's layers share: hooks, parameter groups, state that survives, reports."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import Parameter
from torch.optim import Optimizer

from fisher_kernels.layers import Rule, Sums
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.statistics import Layer, Statistics, find_layers

FALLBACK_SHARE = 0.01
"""Share of the trained parameters above which fallbacks are worth a warning."""


@dataclass(frozen=True)
class Explanation:
    """How one parameter is served."""

    name: str
    shape: tuple[int, ...]
    group: int
    rule: str
    detail: str
    state_bytes: int
    frozen: bool

    @property
    def fallback(self) -> bool:
        return self.rule == "fallback"


class Explanations(tuple[Explanation, ...]):
    """One :class:`Explanation` a parameter; prints as a table."""

    def __str__(self) -> str:
        table = Table(title="How each parameter is served")
        for column in ("parameter", "shape", "group", "rule", "detail"):
            table.add_column(column, overflow="fold")
        table.add_column("state bytes", justify="right")
        for row in self:
            rule = f"{row.rule}, frozen" if row.frozen else row.rule
            shape = " x ".join(map(str, row.shape)) or "scalar"
            table.add_row(row.name, shape, str(row.group), rule, row.detail, f"{row.state_bytes:,}")
        console = Console(width=120, record=False)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


class LayerwiseOptimizer(Optimizer):
    """Base of the optimizers that read the layers of ``model``; subclasses say which rule serves a layer and step.

    Args:
        model: its supported modules are watched.
        params: parameter groups as every torch optimizer takes them; None takes all parameters of the model.
        defaults: hyperparameters of groups that do not set them.
        grad_scaler: the ``torch.amp.GradScaler`` whose scale is in the derivatives.
        process_group: over which statistics are added up; None takes the default group where there is one.
    """

    _step_supports_amp_scaling = True

    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
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
        self._model = model
        self._statistics: Statistics | None = None
        self._armed: list[bool] = []
        self._skipped: Counters = {}
        self._warned: set[str] = set()
        super().__init__(model.parameters() if params is None else params, defaults)
        self._watch(grad_scaler, process_group)
        self._warn_of_fallbacks(self.explain())

    # What subclasses define.

    def _rule_for(self, module: nn.Module, owner: Parameter) -> Rule | None:
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

    def _detail(self, role: str, layer: Layer) -> str:
        """What a layer gives to the parameter in one of its roles."""
        raise NotImplementedError

    moment: ClassVar[str]
    """State: the moment of a parameter, of its shape."""

    # Layers.

    @property
    def statistics(self) -> Statistics:
        assert self._statistics is not None
        return self._statistics

    def _watch(self, grad_scaler: Any, process_group: dist.ProcessGroup | None) -> None:
        old = self._statistics
        self._groups = {p: group for group in self.param_groups for p in group["params"]}
        layers = find_layers(self._model, self._rule_for, self._groups)
        self._statistics = Statistics(layers, grad_scaler, process_group)
        if old is not None:
            self._statistics.adopt(old)
            if not old.open:
                self._statistics.close()
            old.close()
        self._rewatched()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; layers of the model that its parameters belong to are watched from now on."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            if self._statistics is not None:
                self._watch(self._statistics.grad_scaler, self._statistics.process_group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            self._groups = {p: group for group in self.param_groups for p in group["params"]}
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        group.setdefault("iteration", 0)
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr has shape {tuple(lr.shape)}, expected a number or a tensor of one element")
        for i, p in enumerate(group["params"]):
            if p.dtype not in ACCUMULATOR:
                raise TypeError(
                    f"params[{i}] has dtype {p.dtype}, expected float32, float64, bfloat16 or float16: "
                    f"{type(self).__name__} has no rule for others"
                )

    def close(self) -> None:
        """Remove the hooks from the model; the optimizer goes on stepping with the factors it has."""
        self.statistics.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them the statistics of the backward passes that produced them."""
        self.statistics.clear()
        super().zero_grad(set_to_none)

    # Step.

    @_disable_dynamo  # torch.compiler.disable would import the whole compiler along with this module
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average the statistics in where it is time, then update every parameter that has a gradient.

        Under ``torch.compile`` the step stays outside the graph: it is one kernel a parameter group already.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = evaluate_closure(closure)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf):
            self.statistics.clear()  # a skipped step leaves nothing behind, and the refresh that was due is still due
            return loss
        for group in self.param_groups:
            self._check_not_moved(group)
        self._prepare()
        taken = self.statistics.take(grad_scale)
        if not taken:
            self._warn_if_silent()
        self._fold(taken, grad_scale)
        for group in self.param_groups:
            self._update(group, grad_scale, found_inf)
            group["iteration"] += 1
        self._arm()
        return loss

    def _arm(self) -> None:
        """Let the layers whose next step refreshes their statistics collect them."""
        armed = [is_due(group) for group in self.param_groups]
        if armed != self._armed:
            self._armed = armed
            for index, site in enumerate(self.statistics.sites):
                self.statistics.arm(index, is_due(self._groups[site.owner]))

    def _check_not_moved(self, group: dict[str, Any]) -> None:
        """Refuse a model that changed its dtype or device since its state was made; one parameter tells."""
        for p in group["params"]:
            if (moment := self.state.get(p, {}).get(self.moment)) is not None:
                if moment.dtype != ACCUMULATOR[p.dtype] or moment.device != p.device:
                    raise RuntimeError(
                        f"the model was moved to {p.dtype} on {p.device} after its optimizer state was made "
                        f"({moment.dtype} on {moment.device}); move the state along with "
                        "optimizer.load_state_dict(optimizer.state_dict())"
                    )
                return

    def _with_gradients(self) -> Iterator[tuple[dict[str, Any], Parameter]]:
        """The parameters that this step updates, with their groups; a sparse gradient is refused."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError(
                        f"a parameter of shape {tuple(p.shape)} has a sparse gradient, expected a dense one: leave it "
                        "to torch.optim.SparseAdam (params=)"
                    )
                yield group, p

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"{type(self).__name__}: {message}", stacklevel=6)

    def _warn_if_silent(self) -> None:
        """Say once that a refresh step had gradients and no statistics."""
        if "silent" in self._warned:
            return
        waiting = [site.owner.grad for site in self.statistics.sites if is_due(self._groups[site.owner])]
        if any(bool(grad.any()) for grad in waiting if grad is not None):
            self._warn_once(
                "silent",
                "a refresh step has gradients but saw no statistics of any layer. Was the model compiled and run "
                "before the optimizer was constructed, were the gradients set by hand, or was the optimizer closed? "
                "The step goes on with the statistics it has (curvature 1 if there are none)",
            )

    # State.

    def _dtype_of(self, p: Parameter, name: str) -> torch.dtype:
        """The dtype of a floating-point entry of a parameter's state."""
        return torch.float32 if name == "step" else ACCUMULATOR[p.dtype]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; what is given is copied, and neither changed nor kept.

        Moments and factors keep their precision: they take the wide dtype of their parameter (float64 for float64,
        otherwise float32) and its device.
        """
        loaded = state_dict

        def last_seen(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            nonlocal loaded
            loaded = state_dict

        # Behind the hooks of others, which may have put another state in place.
        handle = self.register_load_state_dict_pre_hook(last_seen)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        ids = itertools.chain.from_iterable(group["params"] for group in loaded["param_groups"])
        parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(ids, parameters, strict=True):
            for name, value in loaded["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    dtype = self._dtype_of(p, name) if value.is_floating_point() else value.dtype
                    self.state[p][name] = value.detach().to(p.device, dtype, copy=True)
        self._groups = {p: group for group in self.param_groups for p in group["params"]}
        self.statistics.clear()
        layers = [layer for site in self.statistics.sites for layer in site.layers]
        if all(self._rule_for(layer.module, layer.owner) == layer.rule for layer in layers):
            self._rewatched()
        else:  # the settings that came along have other rules
            self._watch(self.statistics.grad_scaler, self.statistics.process_group)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_model", "_statistics", "_skipped", "_warned")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_model" in state:  # a copy or an unpickled optimizer; load_state_dict comes here too, with less
            self._groups = {p: group for group in self.param_groups for p in group["params"]}
            self._rewatched()

    # Reports.

    def _names(self) -> Iterator[tuple[str, Parameter]]:
        names = {p: name for name, p in self._model.named_parameters()}
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                yield names.get(p, f"param_groups[{g}]['params'][{i}]"), p

    def _layers_of(self) -> dict[Parameter, list[tuple[str, Layer]]]:
        """Parameter -> the layers that serve it, with its role in each."""
        served: dict[Parameter, list[tuple[str, Layer]]] = {}
        for site in self.statistics.sites:
            for layer in site.layers:
                for role, p in layer.parameters.items():
                    served.setdefault(p, []).append((role, layer))
        return served

    def explain(self) -> Explanations:
        """How each parameter is served: one row a parameter; ``print`` shows a table.

        A row names the rule (a layer type, or ``"fallback"``), the factors over its rows and columns, its group,
        whether it is frozen, and the bytes of its state so far.
        """
        served = self._layers_of()
        rows = []
        group_index = {id(group): i for i, group in enumerate(self.param_groups)}
        for name, p in self._names():
            uses = served.get(p, [])
            rule = " + ".join(dict.fromkeys(layer.rule.name for _, layer in uses)) or "fallback"
            detail = "; ".join(self._detail(role, layer) for role, layer in uses) or self._fallback_detail(p)
            state = self.state.get(p, {})
            size = sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))
            group = group_index[id(self._groups[p])]
            rows.append(Explanation(name, tuple(p.shape), group, rule, detail, size, not p.requires_grad))
        return Explanations(rows)

    def _warn_of_fallbacks(self, rows: Explanations) -> None:
        sizes = {name: p.numel() for name, p in self._names() if p.requires_grad}
        fallbacks = [row.name for row in rows if row.fallback and not row.frozen]
        share = sum(sizes[name] for name in fallbacks) / max(sum(sizes.values()), 1)
        if share > FALLBACK_SHARE:
            shown = ", ".join(fallbacks[:5]) + (", ..." if len(fallbacks) > 5 else "")
            warnings.warn(
                f"{type(self).__name__}: {share:.0%} of the trained parameters have no layer rule and take a fallback "
                f"({shown}); print(optimizer.explain()) shows each",
                stacklevel=4,
            )


Counters = dict[tuple[int, ...], Tensor]
"""Numbers of parameters or of sites -> how often something happened to each, where it is counted."""


def count(counters: Counters, key: tuple[int, ...], new: Tensor) -> None:
    """Add counts where they are, without waiting for the device."""
    if key in counters:
        counters[key].add_(new)
    else:
        counters[key] = new


def totals(counters: Counters) -> dict[int, int]:
    """The counts of each number; waits for the device."""
    sums: dict[int, int] = {}
    for key, values in counters.items():
        for number, value in zip(key, values.tolist(), strict=True):
            sums[number] = sums.get(number, 0) + value
    return sums


def is_due(group: dict[str, Any]) -> bool:
    """Whether the next step of a group refreshes the statistics of its layers."""
    return bool(group["iteration"] % group["update_interval"] == 0)


def evaluate_closure(closure: Callable[[], Any] | None) -> Any:
    """The loss of a step's closure, with gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
