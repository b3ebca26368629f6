"""SOFIM: momentum preconditioned by a rank-one Fisher matrix, in the memory of SGD with momentum.

Source: SOFIM, arXiv 2403.02833, Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.ops import Rounding, sofim_step_
from fisher_kernels.ops.sofim_step import DIRECTIONS, SCOPES
from fisher_kernels.optim import shard_products, stages
from fisher_kernels.optim.base import Batch, FisherOptimizer, Plan, count, require_memory, totals
from fisher_kernels.optim.hyperparameters import require_bools, require_choice, require_numbers
from fisher_kernels.optim.row_pieces import index_of, own_slices
from fisher_kernels.optim.shard_products import Shard
from fisher_kernels.optim.shares import divider, like_parameter, local
from fisher_kernels.optim.stages import require_group

SHARED = ("rho", "beta", "direction", "decoupled", "maximize", "stochastic_rounding", "seed")
"""Hyperparameters on which all groups of scope ``"global"`` agree: they have one Fisher matrix."""

GLOBAL = "global"


class SOFIM(FisherOptimizer):
    r"""SOFIM: the Fisher information as one outer product of the mean gradient, inverted in closed form.

    With w all parameters as one vector (or each as one, with ``scope="tensor"``), λ the weight decay, at step t:

    .. math::

        g &= \nabla_w L \quad (+\, \lambda w \text{ unless decoupled}) \\
        m &\leftarrow \beta m + (1 - \beta)\, g \qquad u = m / (1 - \beta^t) \\
        F &= u u^T + \rho I \\
        w &\leftarrow w - \mathrm{lr}\, F^{-1} x \quad (-\, \mathrm{lr}\, \lambda w \text{ if decoupled})

    where x is u or g. The matrix is never formed, as Sherman and Morrison have it in closed form:

    .. math::

        F^{-1} u = \frac{u}{\rho + |u|^2} \qquad
        F^{-1} g = \frac{1}{\rho} \left( g - \frac{u^T g}{\rho + |u|^2}\, u \right)

    With x = u this is SGD with momentum at a rate of :math:`\mathrm{lr} / (\rho + |u|^2)`: about
    :math:`\mathrm{lr} / \rho` while gradients are small, and falling with their square once they are large. The longest
    step there can be is :math:`\mathrm{lr} / (2 \sqrt{\rho})`, at :math:`|u| = \sqrt{\rho}`.

    The state is one moment for each parameter (float32, float64 for float64 parameters, or ``moment_dtype``) and a step
    count for each tensor. Parameters may be DTensors, as ``fully_shard`` and ``parallelize_module`` make them: their
    moments are, too, and dot products are summed over the processes of their mesh, in one all-reduce for each of its
    dimensions.

    Args:
        params: parameters or parameter groups, each with any of these hyperparameters; no model is needed.
        lr: learning rate, a number or a tensor of one element.
        rho: regularisation of F, above 0, in units of squared gradients.
        beta: decay of the moment, 0 <= beta < 1.
        direction: ``"momentum"``, the paper's, or ``"gradient"``, for study: with a small rho it takes away most of the
            gradient along the moment, which is where the loss falls, and tends to diverge.
        scope: ``"global"``, one matrix over the parameters of all groups that have this scope, each group with its own
            lr and weight_decay; or ``"tensor"``, one for each parameter.
        weight_decay: decoupled, unless told otherwise.
        decoupled: False adds the decay to the gradient (L2).
        maximize: ascend.
        moment_dtype: ``torch.bfloat16`` keeps the moment in 16 bits, half of the state: a step reads it, advances it in
            float32 and rounds it. None is float32, or float64 for float64 parameters, which take no other.
        stochastic_rounding: round parameters and moments in bfloat16 up or down at random, so that the mean is right,
            rather than to nearest, which loses steps of less than 1 / 512 of a weight. By random integers that are a
            hash of seed, parameter, step and place: the same on every device and in every process.
        seed: of these integers, 0 to 2^64 - 1.
        pipeline_group: the processes that have the stages of a pipeline, one each, over which the dot products of scope
            ``"global"`` are summed; None where this one has all parameters.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, or groups of scope ``"global"`` differ
            in one of rho, beta, direction, decoupled, maximize, stochastic_rounding and seed; the message names it.

    Source: SOFIM, arXiv 2403.02833, Algorithm 1; ``"gradient"``, ``"tensor"`` and the weight decay are additions.
    """

    moment = "exp_avg"
    later: ClassVar[Mapping[str, Any]] = {**FisherOptimizer.later, "stochastic_rounding": False, "seed": 0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        rho: float = 0.01,
        beta: float = 0.9,
        direction: Literal["momentum", "gradient"] = "momentum",
        scope: Literal["global", "tensor"] = "global",
        weight_decay: float = 0.0,
        decoupled: bool = True,
        maximize: bool = False,
        moment_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        pipeline_group: dist.ProcessGroup | None = None,
    ) -> None:
        require_group("pipeline_group", pipeline_group)
        self._pipeline_group = pipeline_group
        self._plan: Plan[_Batch] | None = None
        defaults = {
            "lr": lr,
            "rho": rho,
            "beta": beta,
            "direction": direction,
            "scope": scope,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "maximize": maximize,
            "moment_dtype": moment_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    # Groups.

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        require_numbers(group, ("rho", "beta", "weight_decay"))
        require_bools(group, ("decoupled",))
        if not 0 <= group["weight_decay"] < math.inf:
            raise ValueError(f"weight_decay is {group['weight_decay']}, expected a finite number of at least 0")
        if not 0 < group["rho"] < math.inf:
            raise ValueError(f"rho is {group['rho']}, expected a finite number above 0")
        if not 0 <= group["beta"] < 1:
            raise ValueError(f"beta is {group['beta']}, expected 0 <= beta < 1")
        require_choice(group, "direction", DIRECTIONS)
        require_choice(group, "scope", SCOPES)
        self._check_rounding(group)

    def _check_params(self, group: dict[str, Any]) -> None:
        super()._check_params(group)
        self._check_something_is_rounded(group)

    def _regrouped(self) -> None:
        self._check_shared()
        self._restored()

    def _restored(self) -> None:
        self._plan = None

    def _check_shared(self) -> None:
        joint = [group for group in self.param_groups if group["scope"] == GLOBAL]
        for group in joint[1:]:
            for name in SHARED:
                if group[name] != joint[0][name]:
                    raise ValueError(
                        f"{name} is {group[name]!r} in one group and {joint[0][name]!r} in another, expected one "
                        "value: groups of scope 'global' share a matrix; scope='tensor' gives each parameter its own"
                    )

    def _check_whole(self, group: dict[str, Any]) -> None:
        if group["scope"] == GLOBAL and (name := divider()) is not None:
            raise ValueError(
                f"SOFIM of scope 'global' needs the norm over all parameters, and {name} gives each process a share of "
                "them: scope='tensor' is exact there"
            )

    # Step.

    def _advance(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._check_shared()
        if self._plan is None:
            self._check_stage()
        plan, gradients = self._plan, None
        if plan is not None and plan.key == self._scopes():
            gradients = plan.gradients()
        if plan is None or gradients is None:
            plan = self._plan = self._make_plan()
            gradients = plan.gradients()
            assert gradients is not None
        self._take_part(plan.batches)
        lists = self._lists(plan.batches, gradients, grad_scale)
        for batch, (params, grads, moments, steps, rounding) in zip(plan.batches, lists, strict=True):
            settings = batch.groups[0]
            skipped, batch.squares = sofim_step_(
                params,
                grads,
                moments,
                steps,
                lr=batch.setting("lr"),
                weight_decay=batch.setting("weight_decay"),
                rho=settings["rho"],
                beta=settings["beta"],
                direction=settings["direction"],
                scope=GLOBAL if batch.is_divided else settings["scope"],
                decoupled=settings["decoupled"],
                maximize=settings["maximize"],
                grad_scale=grad_scale,
                found_inf=found_inf,
                rounding=rounding,
            )
            count(self._skipped, batch.numbers, skipped[:-1] if batch.is_divided else skipped)

    def _lists(
        self, batches: Sequence[_Batch], gradients: Sequence[Sequence[Tensor]], grad_scale: Tensor | None
    ) -> list[tuple[Any, ...]]:
        """Parameters, gradients, moments, counts and rounding of each batch; of divided ones the shards that are here.

        Behind them is then the number that stands for those of other processes.
        """
        pairs = list(zip(batches, gradients, strict=True))
        shards = {i: batch.shards(grads) for i, (batch, grads) in enumerate(pairs) if batch.is_divided}
        lists: list[tuple[Any, ...]] = [
            () if i in shards else batch.lists(grads) for i, (batch, grads) in enumerate(pairs)
        ]
        if shards:
            others = shard_products.of_others(
                [
                    [(s, shard_products.products(s, batches[i].groups[0], grad_scale)) for s in mine]
                    for i, mine in shards.items()
                ],
                [self._group_of(batches[i]) for i in shards],
            )
            for (i, mine), sums in zip(shards.items(), others, strict=True):
                number = shard_products.stand_in(sums, batches[i].groups[0], grad_scale)
                rows = [shard.tensors for shard in mine] + [number]
                lists[i] = *zip(*rows, strict=True), batches[i].rounding_of_shards()
        return lists

    def _group_of(self, batch: _Batch) -> dist.ProcessGroup | None:
        """The processes with the other stages of a pipeline that have parameters of a batch."""
        return self._pipeline_group if batch.groups[0]["scope"] == GLOBAL else None

    def _take_part(self, batches: Sequence[_Batch]) -> None:
        """Let other stages know where this one has no gradient of scope ``"global"``."""
        joint = [group for group in self.param_groups if group["scope"] == GLOBAL]
        if joint and not any(batch.groups[0]["scope"] == GLOBAL for batch in batches):
            numbers = 1 if joint[0]["direction"] == "momentum" else 2
            stages.take_part(self._pipeline_group, numbers, joint[0]["params"][0].device)

    def _check_stage(self) -> None:
        """Refuse to take the parameters of a stage for all there are."""
        joint = {p for p, group in self._groups.items() if group["scope"] == GLOBAL}
        if self._pipeline_group is None and joint and stages.are_of_a_stage(joint):
            raise ValueError(
                "SOFIM of scope 'global' needs the norm over all parameters, and these are those of a stage of a "
                "pipeline: expected pipeline_group=, the group of the processes that have its stages, or scope='tensor'"
            )

    def _prepare(self) -> None:
        for _, p in self._with_gradients():
            if "step" not in (state := self.state[p]):
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, dtype=self._dtype_of(p, "exp_avg"))
            if self._groups[p]["stochastic_rounding"]:
                self._ordinal(p)

    def _scopes(self) -> list[tuple[Any, ...]]:
        return [(group["scope"], group["stochastic_rounding"], group["seed"]) for group in self.param_groups]

    def _make_plan(self) -> Plan[_Batch]:
        """One call for all groups of scope "global"; for the others one for each group and device."""
        self._prepare()
        batches: dict[Any, _Batch] = {}
        numbers = {p: number for number, p in enumerate(self._groups)}
        for group, p in self._with_gradients():
            key = GLOBAL if group["scope"] == GLOBAL else (id(group), p.device, p if is_distributed(p) else None)
            batches.setdefault(key, _Batch()).add(numbers[p], p, self.state[p], group)
        for batch in batches.values():
            if (group := batch.groups[0])["stochastic_rounding"]:
                # Read once for a plan: on a GPU that waits.
                batch.rounding = [Rounding.of(group["seed"], int(self._ordinal(p))) for p in batch.params]
        if self._pipeline_group is not None and GLOBAL in batches:
            batches[GLOBAL].is_divided = True
        waiting = [p for p in self._groups if p.grad is None]
        return Plan(list(batches.values()), waiting, self._scopes())

    # Reports.

    def _keep_beside(self) -> Callable[[], None]:
        others, plan = super()._keep_beside(), self._plan
        squares = [batch.squares for batch in plan.batches] if plan is not None else []

        def put_back() -> None:
            others()
            self._plan = plan  # of the states that are in place again
            for batch, of_last_step in zip(plan.batches if plan is not None else (), squares, strict=True):
                batch.squares = of_last_step

        return put_back

    def _served(self) -> Callable[[Parameter], tuple[str, str]]:
        def rank_one(p: Parameter) -> tuple[str, str]:
            group = self._groups[p]
            whole = "of all groups of this scope" if group["scope"] == GLOBAL else "of this parameter"
            return "rank one", f"u u^T + {group['rho']:g} I {whole}, x is the {group['direction']}"

        return rank_one

    @torch.no_grad()
    def metrics(self) -> dict[str, dict[str, float]]:
        """Figures of the last step, under ``"global"`` and the names of parameters of scope ``"tensor"``.

        - ``moment_norm``: ``|u|``, of the moment with its bias corrected.
        - ``shrinkage``: ``1 / (rho + |u|^2)``, by which the moment is multiplied; ``1 / rho`` is none.
        - ``cosine_with_sgd``: between ``F^-1 x``, x without weight decay, and the gradient (NaN without a gradient).
        - ``skipped_elements``: how many elements were left alone because their gradient was not finite, so far.

        Reading them waits for the device; the cosine takes a pass over gradients and moments.
        """
        skipped = totals(self._skipped)
        names = [name for name, _ in self._names()]
        report = {}
        for batch in self._plan.batches if self._plan is not None else ():
            squares, group = batch.squares.tolist(), batch.groups[0]
            scopes = {GLOBAL: [*range(len(batch.params))]}
            if group["scope"] != GLOBAL:
                scopes = {names[number]: [i] for i, number in enumerate(batch.numbers)}
            for name, members in scopes.items():
                square = sum(squares if batch.is_divided else (squares[i] for i in members))
                report[name] = {
                    "moment_norm": math.sqrt(square),
                    "shrinkage": 1 / (group["rho"] + square),
                    "cosine_with_sgd": self._cosine([batch.params[i] for i in members], group),
                    "skipped_elements": sum(skipped.get(batch.numbers[i], 0) for i in members),
                }
        return report

    def _cosine(self, params: list[Parameter], group: dict[str, Any]) -> float:
        """Between F^-1 x and the gradient g; from the dot products of g and u, whichever x is."""
        gg = ug = uu = 0.0
        for p in params:
            if p.grad is None:
                return math.nan
            state = self.state[p]
            require_memory("a gradient", p.grad)
            g = p.grad.double()
            u = state["exp_avg"].double() / (1 - group["beta"] ** state["step"].double())
            gg, ug, uu = (a + _number(x) for a, x in ((gg, g.square()), (ug, u * g), (uu, u.square())))
        if group["maximize"]:
            ug = -ug
        along, square = ug, uu  # of F^-1 x, times a positive number: the product with g, and with itself
        if group["direction"] == "gradient":
            share = ug / (group["rho"] + uu)
            along, square = gg - share * ug, gg - 2 * share * ug + share**2 * uu
        return along / math.sqrt(square * gg) if square * gg > 0 else math.nan


def _number(x: Any) -> float:
    """The sum of a tensor, of all its shards if it has any."""
    total = x.sum()
    return float(total.full_tensor() if is_distributed(total) else total)


class _Batch(Batch):
    """The lists that one call of the step takes."""

    is_divided = False  # whether other processes have shards of the parameters, or other ones

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[dict[str, Any]] = []
        self.squares = torch.zeros(0, dtype=torch.float64, device="cpu")  # of the last step
        self.rounding: list[Rounding] | None = None

    def add(self, number: int, p: Parameter, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        self.append(number, p, state)
        self.groups.append(group)
        self.is_divided = self.is_divided or is_distributed(p)

    def shards(self, gradients: Sequence[Tensor]) -> list[Shard]:
        """What this process has of each parameter."""
        found = self.rounding_of_shards()
        roundings: Sequence[Rounding | None] = [None] * len(self.params) if found is None else found[:-1]
        return [
            Shard(
                p,
                local(p),
                like_parameter(p, g),
                local(state["exp_avg"]),
                state["step"],
                0.0 if group["decoupled"] else group["weight_decay"],
                rounding,
            )
            for p, g, state, group, rounding in zip(
                self.params, gradients, self.states, self.groups, roundings, strict=True
            )
        ]

    def lists(self, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
        """Parameters, gradients, moments, counts and rounding."""
        return self.params, gradients, self.of_each("exp_avg"), self.of_each("step"), self.rounding

    def rounding_of_shards(self) -> list[Rounding] | None:
        """That of what this process has of each parameter, and of the number behind them."""
        if self.rounding is None:
            return None
        each = zip(self.rounding, self.params, strict=True)
        return [*(Rounding(of.base, *index_of(p, own_slices(p))) for of, p in each), Rounding(0)]

    def setting(self, name: str) -> Any:
        """A hyperparameter: one value if there is one group, otherwise one for each parameter of the call."""
        first, last = self.groups[0], self.groups[-1]
        if last is first:  # parameters come group by group
            return first[name]
        return [group[name] for group in (*self.groups, *([last] if self.is_divided else []))]
