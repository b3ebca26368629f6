"""What the optimizers with Kronecker factors share: rules, statistics, sampled labels, the frame of the step."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from fisher_kernels.curvature.factor_rules import (
    Context,
    Elementwise,
    Factoring,
    FactorRule,
    FactorRules,
    Means,
    TermRule,
    has_rows,
)
from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.curvature.operations import Choice
from fisher_kernels.curvature.rules import Sums
from fisher_kernels.curvature.sites import Layer
from fisher_kernels.ops import ACCUMULATOR, direction_sums, heavy_ball_
from fisher_kernels.optim.base import Counters, count, require_memory, totals
from fisher_kernels.optim.exchanged import own_directions
from fisher_kernels.optim.factor_shards import factor_shards
from fisher_kernels.optim.floors import FLOOR, fan_ins
from fisher_kernels.optim.hyperparameters import require_bools, require_choice, require_counts, require_numbers
from fisher_kernels.optim.inverse_sharing import EVERY_RANK
from fisher_kernels.optim.kronecker_factors import UPDATES, KroneckerFactors, Pair
from fisher_kernels.optim.layouts import own_part
from fisher_kernels.optim.measure import Measured
from fisher_kernels.optim.random_rounding import RandomRounding
from fisher_kernels.optim.sampled import SampledLabels
from fisher_kernels.optim.shard_bounds import left_alone, of_all_shards
from fisher_kernels.optim.shares import (
    gathered,
    gathered_together,
    like_parameter,
    local,
    over_processes,
    whole,
)
from fisher_kernels.optim.stages import bounded_step, take_part
from fisher_kernels.optim.unserved import shown
from fisher_kernels.optim.vectors import Vectors

RAMP = 40
"""Steps over which intervals grow, unless told otherwise; inverses of whole factors are dear in short runs."""

PLANS = 16
"""How many sets of parameters that are stepped together are remembered."""


class Bounds(NamedTuple):
    """The learning rate of a parameter, and the bounds that count its step."""

    lr: float | Tensor
    kl_clip: float | None
    max_relative_step: float | None


@dataclass
class StepPlan:
    """What the step of the same parameters takes, while the same curvature serves them.

    Attributes:
        version: of what serves them.
        params, groups, numbers, layers: layer by layer the parameters, their groups, numbers and layers.
        roots: of the fan-ins.
        layer_of_each: the layers again, on the device.
    """

    version: tuple[int, ...]
    params: list[Parameter]
    groups: list[dict[str, Any]]
    numbers: tuple[int, ...]
    layers: list[int]
    roots: list[float]
    layer_of_each: Tensor


class KroneckerOptimizer(Measured, SampledLabels[TermRule], RandomRounding):
    """Base of the optimizers with Kronecker factors; subclasses say what they make of them, and the direction.

    Args:
        model, params, defaults, grad_scaler, process_group, fallback, rules: as for the base.
    """

    rule_kind = TermRule
    factors_kind: ClassVar[type[KroneckerFactors]]
    """What is kept of the factors."""

    moments: ClassVar[bool] = False
    """Whether second moments of per-sample gradients are taken in the basis of the factors."""

    decay_of_moment: ClassVar[str] = "momentum"
    """The hyperparameter by which the moment runs out."""

    _clipped = False  # whether this step has moved anything within a trust region

    later: ClassVar[Mapping[str, Any]] = {
        **RandomRounding.later,
        "floor": FLOOR,
        "inverse_sharing": EVERY_RANK,
        "delayed": False,
    }

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None,
        defaults: dict[str, Any],
        grad_scaler: Any,
        process_group: dist.ProcessGroup | None,
        fallback: Literal["warn", "error"] = "warn",
        rules: Mapping[type, Choice] | None = None,
    ) -> None:
        self._context = Context()
        self._capped: Counters = {}
        self._steps: dict[tuple[int, ...], int] = {}  # numbers of parameters -> how often these were stepped together
        self._limits: dict[int, tuple[Tensor, Tensor, int]] = {}  # scale of all, those of layers, which of these
        super().__init__(model, params, defaults, grad_scaler, process_group, fallback, rules)

    # Groups.

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        require_numbers(group, (self.decay_of_moment, "beta2", "damping", "weight_decay", "floor"))
        require_counts(group, ("update_interval", "inverse_interval", "max_factor_size"))
        require_bools(group, ("decoupled", "overlap"))
        for name in (self.decay_of_moment, "beta2"):
            if not 0 <= group[name] < 1:
                raise ValueError(f"{name} is {group[name]}, expected 0 <= {name} < 1")
        for name in ("damping", "weight_decay", "floor"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} is {group[name]}, expected a finite number of at least 0")
        for name in ("kl_clip", "max_relative_step"):
            if group.get(name) is not None:
                require_numbers(group, (name,), "a number or None")
                if not 0 < group[name] < math.inf:
                    raise ValueError(f"{name} is {group[name]}, expected a finite number above 0, or None")
        require_choice(group, "sequence", ("expand", "reduce"))
        require_choice(group, "loss_reduction", ("mean", "sum"))
        require_choice(group, "loss_terms", ("rows", "samples"))

    # Layers.

    def _watch(self, grad_scaler: Any, process_group: dist.ProcessGroup | None) -> None:
        self._counts_samples()  # before anything is put in place of what is there
        self._rules = self._new_rules()
        super()._watch(grad_scaler, process_group)

    def _rewatched(self) -> None:
        if not isinstance(self._model, torch.jit.ScriptModule):
            self.statistics.show_outputs(self._outputs())
        super()._rewatched()

    def _outputs(self) -> Iterator[tuple[nn.Module, Callable[[Any], None]]]:
        """The model and its layers, trained or not, and what looks at the derivatives by what they make."""
        expect = self._context.terms.expect
        for module in self._model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                operation = self._operations.of(module)[0]
                if has_rows(operation):
                    yield module, partial(expect, operation)
        yield self._model, partial(expect, None)

    def _arm(self) -> None:
        super()._arm()
        # Functions that no site was known for yet may be seen where no layer collects.
        self._context.terms.wanted = bool(self.statistics.armed) or self.statistics.awake
        self._context.terms.of_samples = self._counts_samples()

    def _check_pipeline(self) -> None:
        super()._check_pipeline()
        if not self.statistics.pipeline.has_end_alone and not self._counts_samples():
            self._warn_once(
                "terms of a stage",
                "the rows of what a stage of a pipeline hands on are taken for the terms of the loss, which this "
                "process does not see. That is right where every row of the last output is in the loss, as tokens of a "
                "language model without padding; else take loss_terms='samples', on all stages",
            )

    def _counts_samples(self) -> bool:
        """Whether each sample is one term of the loss."""
        kinds = {group["loss_terms"] for group in self.param_groups}
        if len(kinds) > 1:
            raise ValueError("loss_terms is 'rows' in some groups and 'samples' in others, expected one for all")
        return kinds == {"samples"}

    def _new_rules(self) -> FactorRules:
        self._rules = FactorRules(self._model, self._operations)
        self._rules.add_uses([made for _, made, _, _ in self._functions()])
        return self._rules

    def _rule_for(self, module: nn.Module, owner: Parameter) -> TermRule | None:
        """The rule that serves a module."""
        group = self._groups[owner]
        settings = Factoring(group["sequence"], self._reduction(group), group["max_factor_size"], self.moments)
        return self._rules(module, settings, self._context)

    def _leaves_out(self, operation: nn.Module) -> bool:
        return self._rules.leaves_out(operation)

    def _detail(self, role: str, layer: Layer[TermRule]) -> str:
        left_out = self._rules.left_out(layer.operation) if role == "weight" else []
        without = f", without the statistics of its use by {', '.join(left_out)}" if left_out else ""
        divided = self._factors.divided_among(layer.parameters[role])
        among = f", divided among {divided} processes" if divided else ""
        if moments := self._factors.moments_divided_among(layer.parameters[role]):
            among += ", second moments too" if divided else f", second moments divided among {moments} processes"
        return f"{layer.place(role)}{self._kinds(role, layer.rule)}{among}{without}"

    def _kinds(self, role: str, rule: TermRule) -> str:
        """What the factors or blocks of a layer are, or what trains it without."""
        for blocks in rule.blocks:
            if role in blocks.roles:
                return f": {blocks}"
        if not isinstance(rule, FactorRule):
            return ": Adam" if isinstance(rule, Elementwise) else ""
        groups, rows, columns = rule.shape
        kinds = [f"{n}{'' if rule.is_whole(side) else ', diagonal'}" for side, n in enumerate((rows, columns))]
        return f": factors of {kinds[0]} and {kinds[1]}{f' in each of {groups} groups' if groups > 1 else ''}"

    def _rebuild(self) -> None:
        self._rules = self._new_rules()  # which know parameters by identity: a copy has others
        self._numbers = {p: number for number, p in enumerate(self._groups)}
        self._plans: dict[tuple[int, ...], StepPlan] = {}
        divide = partial(factor_shards, meshes=self._data_meshes(), ranks=self.statistics.processes.ranks)
        self._factors = self.factors_kind(self.statistics.sites, self.state, self._groups, self._overlap, divide)
        self.statistics.divisions = self._factors.divisions()
        self._divided_as = self._sharing()
        self._renewals = (self._factors,)
        self._share_out()
        self._is_divided = any(map(is_distributed, self._groups))
        self._fan_ins = fan_ins(self.statistics.sites, self._groups)

    def _sharing(self) -> list[tuple[Any, ...]]:
        """The settings that say whether factors are divided."""
        return [(group["inverse_sharing"], group["delayed"]) for group in self.param_groups]

    def _set_aside(self, params: Collection[Parameter]) -> None:
        self._factors.set_aside(params)
        self._factors.couple()

    def _known_sites(self) -> Collection[int]:
        return self._factors.known_sites

    def _dtype_of(self, p: Parameter, name: str) -> torch.dtype:
        return torch.float32 if name == UPDATES else super()._dtype_of(p, name)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_context", "_capped", "_steps", "_limits")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    # Statistics.

    def _prepare(self) -> None:
        self._prepare_rounding()
        if self._is_divided and self._divided_as != self._sharing():
            self._rewatched()
        for _, p in self._with_gradients():
            if self.moment not in self.state[p]:
                self._make_state(p)
        self._factors.couple()

    def _make_state(self, p: Parameter) -> None:
        """Everything that the state of a parameter will have, so that a fresh optimizer has what a checkpoint has."""
        self.state[p][self.moment] = torch.zeros_like(p, dtype=self._dtype_of(p, self.moment))
        for pair in self._factors.pairs:
            if pair.holds(p):
                self._factors.averages(pair)

    def _fold(self, taken: list[tuple[int, Sums]], grad_scale: Tensor | None) -> None:
        self._context.terms.clear()
        means = [(index, self.statistics.sites[index].rule.means(sums)) for index, sums in taken]
        self._average(means, grad_scale)
        for p in self._groups:  # one that keeps statistics for others may be frozen
            if self.state.get(p) and self.moment not in self.state[p]:
                self._make_state(p)
        self._renew()

    def _average(self, means: list[tuple[int, Means]], grad_scale: Tensor | None) -> None:
        """Average new statistics in."""
        self._factors.fold(means)

    def _renew(self) -> None:
        """Make anew what directions are made of, where that is due."""
        due = self._inverting()
        self._warn_of_bad([item.owner for renewal in self._renewals for item in renewal.renew(due)])

    def _warn_of_bad(self, owners: list[Parameter]) -> None:
        if owners:
            names = {p: name for name, p in self._names()}
            self._warn_once(
                "bad",
                f"factors or blocks of {shown([names[p] for p in owners])} cannot be inverted with damping "
                f"{self._groups[owners[0]]['damping']}: what was made of them before stays in use. metrics() counts "
                "them; a larger damping= avoids it",
            )

    def _of_terms(self, number: int) -> AbstractContextManager[None]:
        return self._context.terms.given(number)

    # Step.

    def _refused(self) -> None:
        super()._refused()
        self._context.terms.clear()

    def _reloaded(self) -> None:
        super()._reloaded()
        self._context.terms.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._context.terms.clear()

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._count_steps(found_inf)
        by_group: dict[int, list[Parameter]] = defaultdict(list)
        for group, p in self._with_gradients():
            by_group[id(group)].append(p)
        stays: dict[Parameter, Tensor] = {}
        for params in by_group.values():
            skipped = self._advance_moments(self._groups[params[0]], params, grad_scale, found_inf)
            if self._is_divided:
                skipped = over_processes(params, skipped.double()).to(torch.int64)
            count(self._skipped, tuple(self._numbers[p] for p in params), skipped)
            stays.update(_not_finite(params, skipped))
        params = [p for of_group in by_group.values() for p in of_group]
        self._clipped = False
        if params:
            self._move(params, stays, found_inf)
        if not self._clipped and any(group.get("kl_clip") is not None for group in self.param_groups):
            take_part(self._pipeline_group, 1, next(iter(self._groups)).device)

    def _advance_moments(
        self, group: dict[str, Any], params: list[Parameter], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        """Take gradients into the moments; returns how many elements stayed because theirs is not finite."""
        return heavy_ball_(
            [local(p) for p in params],
            [like_parameter(p, p.grad) for p in params],
            self._local_moments(params),
            momentum=group["momentum"],
            weight_decay=0.0 if group["decoupled"] else group["weight_decay"],
            maximize=group["maximize"],
            grad_scale=grad_scale,
            found_inf=found_inf,
            **self._rounding(params)._asdict(),
        )

    def _local_moments(self, params: Iterable[Parameter]) -> list[Tensor]:
        """What this process has of the moments."""
        return [local(self.state[p][self.moment]) for p in params]

    def _gradient(
        self, p: Parameter, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient in the precision of the state, zero where it is bad, and where that is; None for nowhere.

        Of a DTensor what this process has.
        """
        assert p.grad is not None
        gradient = like_parameter(p, p.grad).to(ACCUMULATOR[p.dtype])
        if grad_scale is not None:
            gradient = gradient / grad_scale.to(gradient.device, gradient.dtype)
        gradient = -gradient if group["maximize"] else gradient
        if group["weight_decay"] and not group["decoupled"]:
            gradient = gradient.add(local(p).to(gradient.dtype), alpha=group["weight_decay"])
        # A sum that overflows though no element does costs a second look, nothing else.
        if found_inf is None and gradient.is_cpu and math.isfinite(float(gradient.sum())):
            return gradient, None
        bad = ~gradient.isfinite()
        bad = bad if found_inf is None else bad | found_inf.to(bad.device).bool()
        return gradient.masked_fill(bad, 0.0), bad

    def _move(self, params: list[Parameter], stays: Mapping[Parameter, Tensor], found_inf: Tensor | None) -> None:
        """Step along the directions of the moments, within the trust region and the caps."""
        directions = dict(self._directions_of_step(self._vectors(params, stays), stays))
        plan = self._plan(params)
        params, groups, bounds = plan.params, plan.groups, [self._bounds(p) for p in plan.params]
        weights = [local(p) for p in params]
        found = [directions[p] for p in params]
        found = [d.masked_fill(stays[p], 0.0) if p in stays else d for p, d in zip(params, found, strict=True)]
        clips = [bound.kl_clip for bound in bounds]
        clipped = any(clip is not None for clip in clips)
        self._clipped = self._clipped or clipped
        sums = direction_sums(weights, found, self._local_moments(params), products=clipped)
        floors = [group["floor"] / root for group, root in zip(groups, plan.roots, strict=True)]
        if self._is_divided:
            sums, floors = of_all_shards(params, sums, plan.layers, floors), [0.0] * len(params)
        if clipped and None in clips:
            sums[[i for i, clip in enumerate(clips) if clip is None], 0] = 0.0
        trust, caps, skipped = bounded_step(
            self._pipeline_group,
            weights,
            found,
            sums,
            plan.layers,
            lr=[bound.lr for bound in bounds],
            weight_decay=[group["weight_decay"] if group["decoupled"] else 0.0 for group in groups],
            kl_clip=min((clip for clip in clips if clip is not None), default=None),
            max_relative_step=[bound.max_relative_step for bound in bounds],
            floor=floors,
            found_inf=found_inf,
            **self._rounding(params)._asdict(),
        )
        if self._is_divided:
            skipped = left_alone(params, sums, plan.layers)
        caps = caps[plan.layer_of_each]
        count(self._skipped, plan.numbers, skipped)
        count(self._capped, plan.numbers, caps.lt(1).to(torch.int64))
        self._steps[plan.numbers] = self._steps.get(plan.numbers, 0) + 1
        self._limits.update({number: (trust, caps, i) for i, number in enumerate(plan.numbers)})

    def _plan(self, params: Sequence[Parameter]) -> StepPlan:
        """The lists of a step of these parameters, made anew where something else serves them than before."""
        key, version = tuple(self._numbers[p] for p in params), self._serving()
        plan = self._plans.get(key)
        if plan is None or plan.version != version:
            if len(self._plans) >= PLANS:  # of a model that uses other layers in every step
                self._plans.clear()
            layers = list(self._layers_to_move(params))
            ordered = [p for layer in layers for p in layer]
            places = [place for place, layer in enumerate(layers) for _ in layer]
            plan = self._plans[key] = StepPlan(
                version,
                ordered,
                [self._groups[p] for p in ordered],
                tuple(self._numbers[p] for p in ordered),
                places,
                [math.sqrt(self._fan_ins[p]) for p in ordered],
                torch.tensor(places, dtype=torch.int64, device=ordered[0].device),
            )
        return plan

    def _serving(self) -> tuple[int, ...]:
        """Changes with what serves the parameters."""
        return (self._factors.version,)

    def _bounds(self, p: Parameter) -> Bounds:
        """The rate of a parameter, and what bounds its step."""
        group = self._groups[p]
        return Bounds(group["lr"], group.get("kl_clip"), group["max_relative_step"])

    def _vectors(self, params: Sequence[Parameter], stays: Mapping[Parameter, Tensor]) -> Vectors:
        """What directions are made of: the moments, but for elements that stay.

        They are in the dtype of the factors. Of a DTensor all of it, unless its directions are made number by number.
        """

        def of(some: Sequence[Parameter]) -> list[Tensor]:
            found = self._own_vectors(some, stays)
            if not self._is_divided:
                return found
            matrices = {p: m for p, m in zip(some, found, strict=True) if not self._is_elementwise(p)}
            matrices = dict(zip(matrices, gathered_together([*matrices], [*matrices.values()]), strict=True))
            return [matrices.get(p, m) for p, m in zip(some, found, strict=True)]

        return Vectors(params, of)

    def _own_vectors(self, params: Sequence[Parameter], stays: Mapping[Parameter, Tensor]) -> list[Tensor]:
        """What this process has of them."""
        moments = [m.to(ACCUMULATOR[p.dtype]) for p, m in zip(params, self._local_moments(params), strict=True)]
        return [m.masked_fill(stays[p], 0.0) if p in stays else m for p, m in zip(params, moments, strict=True)]

    def _is_elementwise(self, p: Parameter) -> bool:
        """Whether the direction of each number of a parameter is made of that number alone."""
        return False

    def _layers_to_move(self, params: Collection[Parameter]) -> Iterator[list[Parameter]]:
        """The parameters that have a gradient, those of one layer together."""
        left = dict.fromkeys(params)
        for pair in self._factors.pairs:
            members = [p for p in pair.params if p in left and self._factors.serves(p)]
            if members:
                yield members
            for p in members:
                del left[p]
        for p in left:
            yield [p]

    def _directions_of_step(
        self, vectors: Vectors, stays: Mapping[Parameter, Tensor]
    ) -> Iterator[tuple[Parameter, Tensor]]:
        """The inverse curvature times the moments, with which a step has just begun: of DTensors the own part."""
        if self._is_divided:

            def here(some: Sequence[Parameter]) -> dict[Parameter, Tensor]:
                there = [p for p in some if p in vectors]
                return dict(zip(there, self._own_vectors(there, stays), strict=True))

            found = dict(own_directions(self._factors, here))
            yield from found.items()
            vectors = vectors.only(lambda p: p not in found)
        for p, direction in self._directions(vectors):
            yield p, direction if self._is_elementwise(p) else own_part(p, direction)

    def _directions(self, vectors: Vectors) -> Iterator[tuple[Parameter, Tensor]]:
        """The inverse curvature times vectors."""
        for pair in self._factors.pairs:
            yield from self._factors.directions(pair, vectors)

    # Reports.

    def _keep_beside(self) -> Callable[[], None]:
        others, terms = super()._keep_beside(), self._context.terms.keep_pending()
        counters = copy.deepcopy((self._capped, self._steps))
        limits, renewals = dict(self._limits), [(renewal.bad, renewal.refused) for renewal in self._renewals]

        def put_back() -> None:
            others()
            terms()
            self._capped, self._steps = counters
            self._limits = limits
            for renewal, (bad, refused) in zip(self._renewals, renewals, strict=True):  # others, of the state loaded
                renewal.bad, renewal.refused = bad, refused

        return put_back

    @torch.no_grad()
    def metrics(self) -> dict[str, dict[str, float]]:
        """Figures of the last step for each parameter that has taken one. Reading them waits for the device.

        - ``trust_scale``: what kl_clip scaled the last step of all parameters by.
        - ``cap``: what max_relative_step scaled the last step of the layer by.
        - ``capped_share``: the share of all steps so far in which it did. While one of the two binds, the learning rate
          does nothing.
        - ``cosine_with_sgd``: between direction and gradient (NaN without a gradient).
        - ``skipped_elements``: how many elements stayed where they were because something was not finite, so far.
        - ``bad_inverses``: how often a factor could not be used, and what there was stayed, so far.
        - ``refused_statistics``: how often the statistics of the layer were not finite and left out, so far.
        """
        skipped, capped = totals(self._skipped), totals(self._capped)
        steps: dict[int, int] = defaultdict(int)
        for numbers, times in self._steps.items():
            for number in numbers:
                steps[number] += times
        bad, refused = self._failures()
        stepped = [p for p in self._groups if self.moment in self.state.get(p, {})]
        cosines = {p: self._cosine(p, d) for p, d in self._directions(self._vectors(stepped, {}))}
        report = {}
        for name, p in self._names():
            number = self._numbers[p]
            if p in cosines and number in self._limits:
                trust, scales, i = self._limits[number]
                report[name] = {
                    "trust_scale": float(trust),
                    "cap": float(scales[i]),
                    "capped_share": capped[number] / steps[number],
                    "cosine_with_sgd": cosines[p],
                    "skipped_elements": skipped.get(number, 0),
                    "bad_inverses": bad.get(p, 0),
                    "refused_statistics": refused.get(p, 0),
                }
        return report

    def _failures(self) -> tuple[dict[Parameter, int], dict[Parameter, int]]:
        """For each parameter how often factors could not be used, and how often statistics were refused."""
        bad, refused = totals(self._factors.bad), totals(self._factors.refused)
        pairs = self._factors.pairs
        return _by_param(pairs, bad), _by_param(pairs, refused)

    def _cosine(self, p: Parameter, direction: Tensor) -> float:
        """Between the direction of a parameter and its gradient."""
        if p.grad is None:
            return math.nan
        require_memory("a gradient", p.grad)
        direction = gathered(p, direction) if self._is_elementwise(p) else direction
        gradient = whole(p.grad).to(direction.dtype) * (-1 if self._groups[p]["maximize"] else 1)
        tiny = torch.finfo(direction.dtype).tiny  # norms below eps count as eps
        return float(torch.cosine_similarity(direction.reshape(-1), gradient.reshape(-1), dim=0, eps=tiny))


def goes_on(found_inf: Tensor | None) -> float | Tensor:
    """1, or 0 where a scaler has found what is not finite; on the CPU there is no step then."""
    return 1.0 if found_inf is None or found_inf.is_cpu else 1 - found_inf.double().reshape(())


def _not_finite(params: Sequence[Parameter], skipped: Tensor) -> Iterator[tuple[Parameter, Tensor]]:
    """Where the gradients of parameters are not finite; on a GPU, which would be waited for, of all parameters."""
    known = skipped.tolist() if skipped.is_cpu else [1] * len(params)
    for p, some in zip(params, known, strict=True):
        if some and p.grad is not None:
            yield p, ~like_parameter(p, p.grad).isfinite()


def _by_param(pairs: Iterable[Pair], counts: Mapping[int, int]) -> dict[Parameter, int]:
    return {p: counts[pair.number] for pair in pairs for p in pair.params if pair.number in counts}
