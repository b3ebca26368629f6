"""What all optimizers share: parameter groups, the frame of a step, state that survives, reports."""

from __future__ import annotations

import copy
import itertools
import math
import operator
import textwrap
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, Generic, TypeVar, overload

import torch
from torch import Tensor, nn
from torch._C import _DisableAutocast
from torch._compile import _disable_dynamo
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fisher_kernels.curvature.caller import is_within
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.ops._arguments import lacks_memory
from fisher_kernels.optim.hyperparameters import require_bools, require_moment_dtype, require_numbers, require_seed
from fisher_kernels.optim.shares import divider, is_flattened, local
from fisher_kernels.optim.warn import warn

_STATE_DICTS = "torch.distributed.checkpoint.state_dict"

_WIDTH = 120
"""Columns of what is printed."""


@dataclass(frozen=True)
class Explanation:
    """How one parameter is treated."""

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
    """One :class:`Explanation` for each parameter; prints as a table."""

    def __str__(self) -> str:
        head = ("parameter", "shape", "group", "rule", "state bytes", "detail")
        rows = [head, tuple("-" * len(name) for name in head)]
        for row in self:
            rule = f"{row.rule}, frozen" if row.frozen else row.rule
            shape = " x ".join(map(str, row.shape)) or "scalar"
            # Its own name stands beside it; where other layers serve it too, each is named.
            detail = row.detail.removeprefix(f"{row.name}: ") if "; " not in row.detail else row.detail
            rows.append((row.name, shape, str(row.group), rule, f"{row.state_bytes:,}", detail))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        # The detail is a sentence: it goes on below itself, so that lines stay within a terminal.
        room = max(_WIDTH - sum(widths) - 2 * len(widths), 24)
        lines = ["How each parameter is served"]
        for *cells, detail in rows:
            first, *more = textwrap.wrap(detail, room) or [""]
            *left, last = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            start = "  ".join([*left, last.rstrip().rjust(widths[-1])])
            lines += [f"{start}  {first}".rstrip(), *(" " * (len(start) + 2) + line for line in more)]
        return "\n".join(lines)


class FisherOptimizer(Optimizer):
    """Base of all optimizers.

    Args:
        params: parameters or parameter groups, as every torch optimizer takes them.
        defaults: hyperparameters of groups that do not set them.
    """

    _step_supports_amp_scaling = True

    grad_scale: Tensor | None
    found_inf: Tensor | None

    moment: ClassVar[str]
    """State: the moment of a parameter, of its shape."""

    statistics_state: ClassVar[tuple[str, ...]] = ()
    """State: what is averaged of a layer's statistics, and what is made of it."""

    later: ClassVar[Mapping[str, Any]] = {"moment_dtype": None}
    """Hyperparameters that states saved by earlier versions lack -> as what they load."""

    _pipeline_group: Any = None
    """The processes with the stages of a pipeline, over which what is bounded over all parameters is summed."""

    _found: Sequence[tuple[dict[str, Any], list[Parameter]]] = ()  # groups, and what each had, when they were looked at
    _checked: Sequence[tuple[dict[str, Any], list[Any]]] = ()  # groups, and the settings in them that were found to do
    _turn = 0  # of the last step, counted over all optimizers
    _rivals: tuple[weakref.ref[FisherOptimizer], ...] = ()  # those that hold some of the same parameters,
    _rivals_of = -1  # as of this change of anybody's groups

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if isinstance(params, nn.Module):
            raise TypeError(
                f"params is a {type(params).__name__}, expected its parameters: pass model.parameters() to "
                f"{type(self).__name__}, or groups of them"
            )
        self._groups: dict[Parameter, dict[str, Any]] = {}
        self._skipped: Counters = {}
        self._warned: set[str] = set()
        super().__init__(params, defaults)

    # What subclasses define.

    def _prepare(self) -> None:
        """Make the state that the step of the parameters with a gradient needs, before anything is changed."""
        raise NotImplementedError

    def _make_entries(self) -> None:
        """Make all that a state may have, for another one to be loaded into."""
        self._prepare()

    def _advance(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update every parameter that has a gradient."""
        raise NotImplementedError

    def _refused(self) -> None:
        """Called when a step is skipped because gradients are known not to be finite."""

    def _regrouped(self) -> None:
        """Called when a group has been added."""

    def _restored(self) -> None:
        """Called in a copy, or when unpickled: whatever knows parameters by identity is out of date."""

    def _reloaded(self) -> None:
        """Called when another state has been loaded."""
        self._restored()

    def _served(self) -> Callable[[Parameter], tuple[str, str]]:
        """What says the rule that serves a parameter, and how."""
        raise NotImplementedError

    def _keep_beside(self) -> Callable[[], None]:
        """Keep what is not in the state: what reports count, and what has been collected since the last step.

        Returns:
            What puts it back, when the state that there was is in place again.
        """
        skipped = copy.deepcopy(self._skipped)

        def put_back() -> None:
            self._skipped = skipped

        return put_back

    # Groups.

    def _find_groups(self) -> None:
        self._groups = {p: group for group in self.param_groups for p in group["params"]}
        self._found = [(group, list(group["params"])) for group in self.param_groups]
        _living.add(self)
        global _changes
        _changes += 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; a group that is refused changes nothing."""
        super().add_param_group(param_group)
        try:
            self._check_whole(self.param_groups[-1])
            self._check_params(self.param_groups[-1])
            self._check_group(self.param_groups[-1])
            self._find_groups()
            self._regrouped()
        except (TypeError, ValueError):
            self.param_groups.pop()
            self._find_groups()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Check the hyperparameters of a group that is added, and again at each step: a schedule may have set them."""
        for name, value in self.later.items():
            group.setdefault(name, value)
        require_numbers(group, ("lr",), "a number or a tensor of one element")
        require_bools(group, ("maximize",))
        require_moment_dtype(group)
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if not lr.is_cpu:
                return  # reading it would wait for all the work queued there
            require_memory("lr", lr)
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr is {float(lr)}, expected a finite number of at least 0")

    def _check_whole(self, group: dict[str, Any]) -> None:
        """Refuse to be one of the optimizers among which another one divides the parameters."""
        if (name := divider()) is not None:
            raise ValueError(
                f"{type(self).__name__} needs all parameters of the model, and {name} gives each process a share of "
                "them: use DistributedDataParallel alone, with this optimizer in every process"
            )

    def _check_params(self, group: dict[str, Any]) -> None:
        """Refuse parameters that no step takes, and one that is there twice: it would be stepped twice, or once."""
        places: dict[Parameter, int] = {}
        for i, p in enumerate(group["params"]):
            if (first := places.setdefault(p, i)) != i:
                name = next(name for name, q in self._names() if q is p)
                raise ValueError(
                    f"params[{i}] is the same parameter as params[{first}] ({name}), expected each to be there once"
                )
            if p.is_nested or p.layout != torch.strided:
                kind = "a nested tensor" if p.is_nested else f"of layout {p.layout}"
                raise TypeError(f"params[{i}] is {kind}, expected a strided tensor with a shape")
            if is_flattened(p):
                raise TypeError(
                    f"params[{i}] is one of FullyShardedDataParallel, of which each process has a part: "
                    f"{type(self).__name__} needs whole parameters, as in DistributedDataParallel, which is also what "
                    "ShardingStrategy.NO_SHARD does"
                )
            if p.dtype not in ACCUMULATOR:
                raise TypeError(
                    f"params[{i}] has dtype {p.dtype}, expected float32, float64, bfloat16 or float16: "
                    f"{type(self).__name__} has no rule for others"
                )
            if p.dtype == torch.float64 and group.get("moment_dtype") is not None:
                raise ValueError(
                    f"moment_dtype is {group['moment_dtype']}, and params[{i}] has dtype torch.float64, expected None: "
                    "what is trained in float64 keeps moments in float64"
                )

    # Step.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo  # torch.compiler.disable would import the whole compiler along with this module
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; optimizers that read layers first average new statistics in.

        Under ``torch.compile`` the step stays outside the graph; it is one kernel for each parameter group already.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        self._take_up_groups()
        if not self.state:
            for group in self.param_groups:  # they may have been divided since
                self._check_params(group)
            # torch.distributed.checkpoint takes a step without gradients to have something to load into.
            if is_within(_STATE_DICTS, "_init_optim_state"):
                self._make_entries()
                return None
        self._take_turn()
        loss = evaluate_closure(closure)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and self._pipeline_group is not None:
            raise ValueError(
                "pipeline_group is given, and a GradScaler leaves out steps of the stage that saw a number that is not "
                "finite, for which the others would wait: expected no scaler, as bfloat16 needs none"
            )
        if found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf):
            self._refused()
            return loss
        self._check_settings()
        for group in self.param_groups:
            self._check_not_moved(group)
        with _DisableAutocast():  # its products keep the precision of the state
            self._advance(grad_scale, found_inf)
        return loss

    def _take_up_groups(self) -> None:
        """Go on with groups, or lists of parameters in them, that were put in place of those that were there."""
        if len(self.param_groups) == len(self._found) and all(
            group is before and are_same(group["params"], params)
            for group, (before, params) in zip(self.param_groups, self._found, strict=True)
        ):
            return
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            self._check_params(group)
            self._check_group(group)
        self._find_groups()
        self._regrouped()

    def _check_settings(self) -> None:
        """Check the groups whose settings are not the very objects that were checked last; numbers never change."""
        now = [(group, [group.get(name) for name in self.defaults]) for group in self.param_groups]
        if len(now) == len(self._checked) and all(
            group is before and are_same(settings, known)
            for (group, settings), (before, known) in zip(now, self._checked, strict=True)
        ):
            return
        for group in self.param_groups:
            self._check_group(group)
        # As the check leaves them. A tensor or a list may get other contents: these are looked at in every step.
        now = [(group, [group.get(name) for name in self.defaults]) for group in self.param_groups]
        constant = all(_CONSTANT.issuperset(map(type, settings)) for _, settings in now)
        self._checked = now if constant else []

    def _take_turn(self) -> None:
        """Say once if another optimizer has stepped some of the parameters since the last step of this one."""
        if self._rivals_of != _changes:
            others = [other for other in _living if other is not self]
            self._rivals = tuple(weakref.ref(o) for o in others if not o._groups.keys().isdisjoint(self._groups))
            self._rivals_of = _changes
        for reference in self._rivals:
            rival = reference()
            if rival is not None and rival._turn > self._turn > 0 and "rival" not in self._warned | rival._warned:
                self._warned.add("rival")
                warn(
                    f"{type(self).__name__}: another optimizer, {type(rival).__name__}, steps some of the same "
                    "parameters in turn with this one, and each moves them away from where the other believes them to "
                    "be: give each parameter to one of them, and close() or delete an optimizer that is no longer used"
                )
        self._turn = next(_turns)

    def _check_not_moved(self, group: dict[str, Any]) -> None:
        """Refuse a model that has changed its dtype or device since its state was made; checks one parameter."""
        for p in group["params"]:
            if (moment := self.state.get(p, {}).get(self.moment)) is not None:
                if moment.dtype != self._dtype_of(p, self.moment) or moment.device != p.device:
                    raise RuntimeError(
                        f"the model was moved to {p.dtype} on {p.device}, or moment_dtype set to "
                        f"{group['moment_dtype']}, after its optimizer state was made ({moment.dtype} on "
                        f"{moment.device}); move the state along with "
                        "optimizer.load_state_dict(optimizer.state_dict())"
                    )
                return

    def _check_rounding(self, group: dict[str, Any]) -> None:
        """Check ``stochastic_rounding`` and ``seed`` of a group of an optimizer that has them."""
        require_bools(group, ("stochastic_rounding",))
        require_seed(group)

    def _check_something_is_rounded(self, group: dict[str, Any]) -> None:
        """Refuse random rounding where nothing is in bfloat16."""
        dtypes, rounded = {p.dtype for p in group["params"]}, group.get("stochastic_rounding") is True
        if rounded and group.get("moment_dtype") is None and torch.bfloat16 not in dtypes:
            raise ValueError(
                "stochastic_rounding is True, and nothing is in bfloat16: parameters are in "
                f"{', '.join(sorted(map(str, dtypes)))} and moment_dtype is None"
            )

    def _ordinal(self, p: Parameter) -> Tensor:
        """The number of a parameter in the model, by which its random integers differ from those of others."""
        state = self.state[p]
        if "ordinal" not in state:
            number = next(i for i, q in enumerate(self._groups) if q is p)
            state["ordinal"] = torch.tensor(number, dtype=torch.int64, device=p.device)
        return state["ordinal"]

    def _with_gradients(self) -> list[tuple[dict[str, Any], Parameter]]:
        """The parameters that this step updates, with their groups; refused if one has a sparse gradient."""
        stepped = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, p in stepped:
            assert p.grad is not None
            if p.grad.is_sparse:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has a sparse gradient, expected a dense one: leave it to "
                    "torch.optim.SparseAdam (params=)"
                )
            for x in (p, p.grad):
                if lacks_memory(x):  # the name is made where it is needed: this runs for every parameter in every step
                    require_memory(f"{'a' if x is p else 'the gradient of a'} parameter of shape {tuple(p.shape)}", x)
        return stepped

    # State.

    def _dtype_of(self, p: Parameter, name: str) -> torch.dtype:
        """The dtype of a floating-point entry of a parameter's state."""
        if name == self.moment and ACCUMULATOR[p.dtype] != torch.float64:
            return self._groups[p].get("moment_dtype") or torch.float32
        return torch.float32 if name == "step" else ACCUMULATOR[p.dtype]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. The given state is copied; it is neither changed nor kept.

        Moments and factors keep their precision: they take the wide dtype of their parameter (float64 for float64,
        otherwise float32) and its device. Moments take the ``moment_dtype`` that their group has now, which stays.
        """
        self._take_up_groups()
        loaded = state_dict
        moment_dtypes = [group["moment_dtype"] for group in self.param_groups]

        def last_seen(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            nonlocal loaded
            self._check_kind(state_dict)
            self._check_shapes(state_dict)
            loaded = state_dict

        # Behind the hooks of others, which may have put another state in place.
        handle = self.register_load_state_dict_pre_hook(last_seen)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, dtype in zip(self.param_groups, moment_dtypes, strict=True):
            group["moment_dtype"] = dtype
        self._find_groups()
        ids = itertools.chain.from_iterable(group["params"] for group in loaded["param_groups"])
        parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(ids, parameters, strict=True):
            for name, value in loaded["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    dtype = self._dtype_of(p, name) if value.is_floating_point() else value.dtype
                    kept = value.detach()
                    if dtype == torch.bfloat16 != kept.dtype:  # beyond its largest number there is infinity
                        largest = torch.finfo(dtype).max
                        kept = kept.clamp(-largest, largest)
                    self.state[p][name] = kept.to(p.device, dtype, copy=True)
        for group in self.param_groups:
            self._check_group(group)
        self._reloaded()

    def _check_kind(self, state_dict: dict[str, Any]) -> None:
        """Refuse the state of another optimizer, before anything is changed."""
        if missing := {"state", "param_groups"} - state_dict.keys():
            raise ValueError(f"state_dict lacks {missing.pop()!r}, expected what state_dict() returns")
        for group in state_dict["param_groups"]:
            lacking = [name for name in self.defaults if name not in group and name not in self.later]
            if lacking:
                raise ValueError(
                    f"the state is that of another optimizer: its groups lack {', '.join(lacking)}, expected the state "
                    f"of {type(self).__name__}"
                )
            self._check_group(dict(group))
        for number, state in state_dict["state"].items():
            # A frozen weight may have nothing but the statistics that serve its bias.
            if self.moment not in state and not state.keys() <= set(self.statistics_state):
                raise ValueError(
                    f"the state is that of another optimizer: that of parameter {number!r} has {', '.join(state)}, "
                    f"expected {self.moment!r} among them"
                )

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        """Refuse the state of a model of other widths, before anything is changed."""
        ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, (name, p) in zip(ids, self._names(), strict=False):  # torch refuses other groups
            moment = state_dict["state"].get(number, {}).get(self.moment)
            if isinstance(moment, Tensor) and moment.shape != p.shape:
                raise ValueError(
                    f"the state of parameter {name!r} is that of another model: its {self.moment} has shape "
                    f"{tuple(moment.shape)}, expected {tuple(p.shape)}, the parameter's"
                )

    def _put_in_place(self) -> None:
        """Go on with state and groups that were written to, as with a state that was loaded."""
        self._find_groups()
        self._checked = []
        self._reloaded()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_skipped", "_warned")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it, and the next state would have to have it
        if "_skipped" in state:  # a copy or an unpickled optimizer; load_state_dict comes here too, with less
            self._find_groups()
            self._restored()

    # Reports.

    def _names(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter with its name, or its place where it has none."""
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names") or [
                f"param_groups[{g}]['params'][{i}]" for i in range(len(group["params"]))
            ]
            yield from zip(names, group["params"], strict=True)

    def explain(self) -> Explanations:
        """How each parameter is treated, as one row for each; ``print`` shows a table.

        A row names the rule (a layer type, for example, or ``"fallback"``) and what it does for this parameter, the
        group, whether it is frozen, and the bytes of its state so far.
        """
        self._take_up_groups()
        served = self._served()
        rows = []
        group_index = {id(group): i for i, group in enumerate(self.param_groups)}
        for name, p in self._names():
            rule, detail = served(p)
            state = self.state.get(p, {})
            size = sum(local(v).numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))
            group = group_index[id(self._groups[p])]
            rows.append(Explanation(name, tuple(p.shape), group, rule, detail, size, not p.requires_grad))
        return Explanations(rows)


_living: weakref.WeakSet[FisherOptimizer] = weakref.WeakSet()
_changes = 0  # of the groups of any optimizer
_turns = itertools.count(1)


_CONSTANT = frozenset({float, int, bool, str, NoneType, torch.dtype})
"""Types of settings whose values do not change."""


def are_same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def require_memory(name: str, x: Tensor | None) -> None:
    """Refuse a tensor whose storage was freed: functions of torch would read from address 0."""
    if x is not None and lacks_memory(x):
        raise ValueError(f"{name} has no memory to read, expected some for its shape: its storage was freed")


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


class Batch:
    """Parameters that one call of a step takes."""

    def __init__(self) -> None:
        self.numbers: tuple[int, ...] = ()
        self.params: list[Parameter] = []
        self.states: list[dict[str, Tensor]] = []

    def append(self, number: int, p: Parameter, state: dict[str, Tensor]) -> None:
        self.numbers += (number,)
        self.params.append(p)
        self.states.append(state)

    def of_each(self, name: str) -> list[Tensor]:
        """An entry of the states."""
        return [state[name] for state in self.states]


B = TypeVar("B", bound=Batch)


class Plan(Generic[B]):
    """What steps take while the same parameters have gradients.

    Making these lists would cost more than the step itself where there are many small parameters.

    Attributes:
        waiting: parameters that have no gradient.
        key: what else the lists depend on.
    """

    def __init__(self, batches: Sequence[B], waiting: Sequence[Parameter], key: object) -> None:
        self.batches, self.waiting, self.key = batches, waiting, key

    def gradients(self) -> list[list[Tensor]] | None:
        """Those of each batch; None unless all of its parameters, and none of those waiting, have a dense one."""
        if any(p.grad is not None for p in self.waiting):
            return None
        found = [[g for p in batch.params if (g := p.grad) is not None and not g.is_sparse] for batch in self.batches]
        complete = all(len(of) == len(batch.params) for of, batch in zip(found, self.batches, strict=True))
        return found if complete else None


def evaluate_closure(closure: Callable[[], float] | None) -> float | None:
    """The loss of a step's closure, with gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
