"""AdaFisher and AdaFisherW: diagonal Kronecker factors of the Fisher information of every layer.

Source: AdaFisher, arXiv 2405.16397 (ICLR 2025), Eq. 3, Eq. 4 and Algorithm 1; thesis arXiv 2504.20096.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from fisher_kernels.curvature.diagonal_rules import DiagonalRule, rule_for
from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.curvature.operations import Choice
from fisher_kernels.curvature.rules import Sums
from fisher_kernels.curvature.sites import Layer
from fisher_kernels.ops import ACCUMULATOR, Rounding, adafisher_step_
from fisher_kernels.optim.base import Batch, FisherOptimizer, Plan, count, require_memory, totals
from fisher_kernels.optim.diagonal_factors import VARIANTS, DiagonalFactors, Place
from fisher_kernels.optim.hyperparameters import require_choice, require_counts, require_numbers
from fisher_kernels.optim.layerwise import LayerwiseOptimizer
from fisher_kernels.optim.pending import COUNTS, SUMS
from fisher_kernels.optim.row_pieces import pieces_of
from fisher_kernels.optim.shares import whole


class AdaFisher(LayerwiseOptimizer[DiagonalRule]):
    r"""AdaFisher: momentum divided by a Kronecker-factored diagonal of the Fisher information.

    For a layer :math:`a = W h + b` with s the derivative of the loss by a, and λ the weight decay:

    .. math::

        H &= \operatorname{mean}_r\, [h_r, 1]^2 \qquad S = \operatorname{mean}_r\, s_r^2
            \qquad \text{over the rows of a batch, both averaged over time} \\
        F_{oi} &= S'_o H'_i + \mathrm{damping} \qquad \text{with } S', H' \text{ normalised as the variant says} \\
        g &= \nabla_w L + \lambda w \qquad \text{(AdaFisherW decays the weights instead)} \\
        m &\leftarrow \beta m + (1 - \beta)\, g \\
        w &\leftarrow w - \mathrm{lr}\, \frac{m}{(1 - \beta^t)\, F}

    F is never formed: the step reads one number for each row and one for each column. The state is one moment for each
    parameter (float32, float64 for float64 parameters, or ``moment_dtype``) and one number for each row and column of a
    layer. Linear, convolutions and transposed convolutions, normalisations and Embedding have rules; other parameters
    take a fallback that ``explain()`` names. Parameters may be DTensors, of ``fully_shard`` and ``parallelize_module``;
    factors are whole in every process.

    ========== ============================================= ================================ ======================
    variant    averaged over time                            F                                lr, damping, interval
    ========== ============================================= ================================ ======================
    paper      H and S, decay gamma, bias-corrected          minmax(S) minmax(H) + damping    3e-3, 1e-3, 1
    release    minmax(H), minmax(S) from 1, decay gamma / 10 S H + damping                    1e-3, 1e-3, 100
               gain gamma / 100
    relative   as paper                                      S H / mean(S H) + damping        1.0, 0.1, 1
    ========== ============================================= ================================ ======================

    Args:
        model: its layers are read through hooks; ``close()`` removes them.
        lr: learning rate, a number or a tensor of one element; None takes the variant's default, as for ``damping`` and
            ``update_interval``.
        beta: decay of the moment, 0 <= beta < 1.
        gamma: decay of the factors, 0 <= gamma < 1.
        damping: added to the curvature; in units of the mean curvature for ``"relative"``.
        variant: ``"paper"``, ``"release"`` or ``"relative"``.
        update_interval: factors are refreshed every so many steps; between refreshes the hooks do nothing.
        delayed: take the statistics of each refresh in the next one; they are added up over processes beside training,
            so that none waits for another. The first of a layer are waited for.
        eps: of minmax, in the units of S: it makes the paper variant depend on the scale of the loss.
        weight_decay: L2 for AdaFisher, decoupled for AdaFisherW.
        maximize: ascend.
        moment_dtype: ``torch.bfloat16`` keeps the moment in 16 bits, half of the state: a step reads it, advances it in
            float32 and rounds it. None is float32, or float64 for float64 parameters, which take no other.
        stochastic_rounding: round parameters and moments in bfloat16 up or down at random, so that the mean is right,
            rather than to nearest, which loses steps of less than 1 / 512 of a weight. By random integers that are a
            hash of seed, parameter, step and place: the same on every device and in every process.
        seed: of these integers, 0 to 2^64 - 1.
        params: parameter groups, each with any of these hyperparameters; None takes all parameters of the model. The
            factor settings of a layer (variant, gamma, update_interval, eps) are those of its weight's group.
        grad_scaler: the ``torch.amp.GradScaler`` in use, so that S is in the units of unscaled gradients also after a
            manual ``unscale_``.
        fallback_curvature: F of parameters without a rule; None takes the median over layers of ``mean(S') mean(H') +
            damping``, or 1 for ``"release"``.
        process_group: over which statistics are added up, one all-reduce a refresh; None takes the processes of the
            mesh of sharded parameters, or those of the DistributedDataParallel that averages the gradients.
        fallback: ``"warn"`` of parameters that no layer rule serves, or ``"error"``: refuse to start, or to go on,
            training them.
        rules: class of a layer -> the name of the operation it computes, ``"rms_norm"`` for example, or a function that
            takes the layer and returns a layer of torch that computes the same, or a rule. It overrides the proof.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.

    Source: AdaFisher, arXiv 2405.16397, Eq. 3, Eq. 4, Algorithm 1.
    """

    decoupled: ClassVar[bool] = False
    rule_kind = DiagonalRule
    moment = "exp_avg"
    later: ClassVar[Mapping[str, Any]] = {
        **FisherOptimizer.later,
        "stochastic_rounding": False,
        "seed": 0,
        "delayed": False,
    }
    statistics_state = tuple(
        prefix + name
        for prefix in ("", "tied_")
        for name in ("input_factor", "output_factor", "bias_factor", "factor_weight", SUMS, COUNTS)
    )

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor | None = None,
        *,
        beta: float = 0.9,
        gamma: float = 0.8,
        damping: float | None = None,
        variant: Literal["paper", "release", "relative"] = "paper",
        update_interval: int | None = None,
        delayed: bool = False,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        maximize: bool = False,
        moment_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        params: ParamsT | None = None,
        grad_scaler: Any = None,
        fallback_curvature: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        fallback: Literal["warn", "error"] = "warn",
        rules: Mapping[type, Choice] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "gamma": gamma,
            "damping": damping,
            "variant": variant,
            "update_interval": update_interval,
            "delayed": delayed,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "moment_dtype": moment_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "fallback_curvature": fallback_curvature,
        }
        super().__init__(model, params, defaults, grad_scaler, process_group, fallback, rules)

    # Groups.

    def _check_group(self, group: dict[str, Any]) -> None:
        require_choice(group, "variant", VARIANTS)
        variant = VARIANTS[group["variant"]]
        for name in ("lr", "damping", "update_interval"):
            if group[name] is None:
                group[name] = getattr(variant, name)
        super()._check_group(group)
        require_numbers(group, ("beta", "gamma", "damping", "eps", "weight_decay"))
        if group["fallback_curvature"] is not None:
            require_numbers(group, ("fallback_curvature",), "a positive number or None")
        if group["fallback_curvature"] is not None and not 0 < group["fallback_curvature"] < math.inf:
            raise ValueError(f"fallback_curvature is {group['fallback_curvature']}, expected a positive number or None")
        require_counts(group, ("update_interval",))
        self._check_rounding(group)
        for name in ("beta", "gamma"):
            if not 0 <= group[name] < 1:
                raise ValueError(f"{name} is {group[name]}, expected 0 <= {name} < 1")
        for name in ("damping", "eps", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} is {group[name]}, expected a finite number of at least 0")

    def _check_params(self, group: dict[str, Any]) -> None:
        super()._check_params(group)
        self._check_something_is_rounded(group)

    # Layers.

    def _rule_for(self, module: nn.Module, owner: Parameter) -> DiagonalRule | None:
        return rule_for(module, self._groups[owner]["variant"])

    def _detail(self, role: str, layer: Layer[DiagonalRule]) -> str:
        shapes = layer.rule.shapes(layer.operation)
        if role == "bias":
            return f"{layer.place(role)}: output factor"
        factors = " and ".join(f"{name.replace('_', ' ')} ({length})" for name, length in shapes.items())
        return f"{layer.place(role)}: {factors}"

    def _fallback_detail(self, parameter: Parameter) -> str:
        group = self._groups[parameter]
        if group["fallback_curvature"] is not None:
            return f"curvature {group['fallback_curvature']}"
        return "curvature 1" if group["variant"] == "release" else "median curvature of the group's layers"

    def _rebuild(self) -> None:
        self._numbers = {p: number for number, p in enumerate(self._groups)}
        self._plans: dict[int, _Plan] = {}
        self._factors = DiagonalFactors(self.statistics.sites, self.state, self._groups)

    def _set_aside(self, params: Collection[Parameter]) -> None:
        self._factors.set_aside(params)

    def _known_sites(self) -> Collection[int]:
        return self._factors.known

    # Step.

    def _prepare(self) -> None:
        plans = [self._plans.get(id(group)) for group in self.param_groups]
        found = [plan is not None and plan.find() for plan in plans]
        if all(found):
            return
        fresh = False
        for _, p in self._with_gradients():
            state = self.state[p]
            if "step" not in state:
                fresh = True
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, dtype=self._dtype_of(p, "exp_avg"))
            if self._groups[p]["stochastic_rounding"]:
                self._ordinal(p)
        if fresh:
            # Averages too, so that a checkpoint made from a fresh optimizer has every entry to load into.
            for index, site in enumerate(self.statistics.sites):
                if any(p.grad is not None for layer in site.layers for p in layer.parameters.values()):
                    self._factors.averages(index)

    def _fold(self, taken: list[tuple[int, Sums]], grad_scale: Tensor | None) -> None:
        if taken:
            self._factors.fold(taken)

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for group in self.param_groups:
            self._step_group(group, grad_scale, found_inf)

    def _step_group(self, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Step one group: parameters with factors in one call, those of constant curvature in another."""
        plan = self._plans.get(id(group))
        if plan is None or plan.key != self._key(group) or plan.found is None:
            plan = self._plans[id(group)] = self._plan(group)
            plan.find()
        gradients, plan.found = plan.found, None  # a plan must not keep gradients alive
        assert gradients is not None
        for batch, grads, damping in zip(plan.batches, gradients, (group["damping"], 0.0), strict=True):
            if grads:
                numbers, rounding, *lists = batch.lists(grads)
                skipped = adafisher_step_(
                    *lists,
                    lr=group["lr"],
                    beta=group["beta"],
                    damping=damping,
                    weight_decay=group["weight_decay"],
                    decoupled=self.decoupled,
                    maximize=group["maximize"],
                    grad_scale=grad_scale,
                    found_inf=found_inf,
                    rounding=rounding,
                )
                count(self._skipped, numbers, skipped)

    def _key(self, group: dict[str, Any]) -> object:
        """What a plan depends on beside gradients."""
        return self._factors.version, group["stochastic_rounding"], group["seed"]

    def _plan(self, group: dict[str, Any]) -> _Plan:
        served, constant, waiting = _Batch(), _Batch(), []
        for p in group["params"]:
            if p.grad is None:
                waiting.append(p)
            elif (place := self._factors.place_of(p)) is not None:
                served.add(self._numbers[p], p, self.state[p], place)
            else:
                constant.add(self._numbers[p], p, self.state[p], (self._factors.constant(p), None))
        if group["stochastic_rounding"]:
            for batch in (served, constant):
                # Read once for a plan: on a GPU that waits.
                batch.rounding = [Rounding.of(group["seed"], int(self._ordinal(p))) for p in batch.params]
        return _Plan((served, constant), waiting, self._key(group))

    # Reports.

    def _keep_beside(self) -> Callable[[], None]:
        others, refused = super()._keep_beside(), copy.deepcopy(self._factors.refused)

        def put_back() -> None:
            others()
            self._factors.refused = refused

        return put_back

    @torch.no_grad()
    def metrics(self) -> dict[str, dict[str, float]]:
        """Figures of the last step for each parameter that has taken one. Reading them waits for the device.

        - ``damping_share``: mean of damping / F; near 1 the method has become plain momentum SGD.
        - ``smallest_step``, ``largest_step``: extremes of lr / F.
        - ``cosine_with_sgd``: between the preconditioned moment and the gradient (NaN without a gradient).
        - ``skipped_elements``: how many elements were left alone because their gradient was not finite, so far.
        - ``refused_statistics``: how often the statistics of its layer were not finite and left out, so far.
        """
        skipped = totals(self._skipped)
        refused = totals(self._factors.refused)
        sites = {
            p: index
            for index, site in enumerate(self.statistics.sites)
            for layer in site.layers
            for p in layer.parameters.values()
        }
        report = {}
        for name, p in self._names():
            state, group = self.state.get(p, {}), self._groups[p]
            if "exp_avg" not in state:
                continue
            curvature, damping = self._curvature(p)
            step = float(group["lr"]) / curvature
            direction = whole(state["exp_avg"]).to(ACCUMULATOR[p.dtype]) / curvature
            cosine = math.nan
            if p.grad is not None:
                require_memory("a gradient", p.grad)
                gradient = whole(p.grad).to(direction)
                # Norms below eps count as eps: its default of 1e-8 is no small gradient.
                eps = torch.finfo(direction.dtype).tiny
                cosine = float(torch.cosine_similarity(direction.flatten(), gradient.flatten(), dim=0, eps=eps))
            report[name] = {
                "damping_share": float((damping / curvature).mean()),
                "smallest_step": float(step.min()) if step.numel() else math.nan,
                "largest_step": float(step.max()) if step.numel() else math.nan,
                "cosine_with_sgd": -cosine if group["maximize"] else cosine,
                "skipped_elements": skipped.get(self._numbers[p], 0),
                "refused_statistics": refused.get(sites.get(p, -1), 0),
            }
        return report

    def _curvature(self, p: Parameter) -> tuple[Tensor, float]:
        """The curvature F of one parameter, which a step never forms, and the damping in it."""
        exp_avg = whole(self.state[p]["exp_avg"]).to(ACCUMULATOR[p.dtype])
        place = self._factors.place_of(p)
        if place is None:
            constant = self._factors.constant(p)
            return torch.ones_like(exp_avg) * (1.0 if constant is None else constant), 0.0
        row, column = (exp_avg.new_ones(1) if factor is None else factor for factor in place)
        groups = column.shape[0] if column.dim() == 2 else 1
        product = row.reshape(groups, -1, 1) * column.reshape(groups, 1, -1)
        damping = self._groups[p]["damping"]
        return product.reshape(p.shape) + damping, damping


class AdaFisherW(AdaFisher):
    """AdaFisher with decoupled weight decay: ``w <- w - lr * (m / (1 - beta^t) / F + weight_decay * w)``.

    Everything else, the arguments included, is as in :class:`AdaFisher`.
    """

    decoupled = True


class _Batch(Batch):
    """The lists that one call of the step takes."""

    is_divided = False  # whether other processes have rows of the parameters

    def __init__(self) -> None:
        super().__init__()
        self.row_factors: list[Tensor | None] = []
        self.column_factors: list[Tensor | None] = []
        self.rounding: list[Rounding] | None = None

    def add(self, number: int, p: Parameter, state: dict[str, Tensor], place: Place) -> None:
        self.append(number, p, state)
        self.row_factors.append(place[0])
        self.column_factors.append(place[1])
        self.is_divided = self.is_divided or is_distributed(p)

    def lists(self, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
        """Numbers, rounding, parameters, gradients, moments, counts, row and column factors; of shards their pieces."""
        if not self.is_divided:
            moments, steps = self.of_each("exp_avg"), self.of_each("step")
            factors = self.row_factors, self.column_factors
            return self.numbers, self.rounding, self.params, gradients, moments, steps, *factors
        places = zip(self.row_factors, self.column_factors, strict=True)
        each = zip(self.numbers, self.params, gradients, self.states, places, strict=True)
        pieces = [[*pieces_of(*one)] for one in each]
        rounding = None
        if self.rounding is not None:
            each_whole = zip(self.rounding, pieces, strict=True)
            rounding = [Rounding(whole.base, *piece.at) for whole, some in each_whole for piece in some]
        rows = [(piece.number, *piece.tensors, *piece.place) for some in pieces for piece in some]
        numbers, *lists = zip(*rows, strict=True)
        return numbers, rounding, *lists


class _Plan(Plan[_Batch]):
    """What the step of one group takes: a batch with factors, and one of constant curvature."""

    found: list[list[Tensor]] | None = None

    def find(self) -> bool:
        """Whether exactly the parameters of the batches have gradients, which are kept for the step."""
        self.found = self.gradients()
        return self.found is not None
