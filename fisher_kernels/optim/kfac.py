"""K-FAC: momentum preconditioned by Kronecker-factored approximations of the Fisher matrix.

Sources: Martens and Grosse, arXiv 1503.05671; convolutions: Grosse and Martens, arXiv 1602.01407.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from fisher_kernels.curvature.factor_rules import Elementwise, FactorRule, Means, TermRule
from fisher_kernels.curvature.operations import Choice
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.optim.adam_moments import average, unbiased
from fisher_kernels.optim.base import totals
from fisher_kernels.optim.factor_inverses import FactorInverses
from fisher_kernels.optim.fisher_blocks import ASIDE, BLOCK_STATE, New
from fisher_kernels.optim.floors import FLOOR
from fisher_kernels.optim.hyperparameters import require_choice, require_numbers
from fisher_kernels.optim.inverse_sharing import EVERY_RANK
from fisher_kernels.optim.kronecker import RAMP, Bounds, KroneckerOptimizer
from fisher_kernels.optim.kronecker_factors import KroneckerFactors, factor_state
from fisher_kernels.optim.momentum_image import HOLDS, IMAGE, MomentumImages
from fisher_kernels.optim.pending import PENDING
from fisher_kernels.optim.refresh import is_due
from fisher_kernels.optim.renewal import NEXT
from fisher_kernels.optim.shares import local, some_anywhere, whole
from fisher_kernels.optim.stages import require_group
from fisher_kernels.optim.term_blocks import TermBlocks
from fisher_kernels.optim.vectors import Vectors

OTHERS_LR = 0.1
"""Adam's learning rate beside that of the factors."""

EPS = 1e-8
"""Added to the root of Adam's second moments."""


class KFAC(KroneckerOptimizer):
    r"""K-FAC: heavy-ball momentum preconditioned by the Kronecker product of two small matrices for each layer.

    With h what a layer reads, [h, 1] where it has a bias, s the derivative by what it makes times the number M of terms
    of the loss, R the rows of the batch, and λ the damping:

    .. math::

        A &= \tfrac{1}{M} \sum_r h_r h_r^T, \quad G = \tfrac{1}{R} \sum_r s_r s_r^T
            && \text{every } \mathrm{update\_interval} \text{ steps} \\
        A, G &\leftarrow \text{their averages}
            && \text{the k-th with decay } \min(1 - 1/k,\, \beta_2) \\
        \pi &= \sqrt{\frac{\operatorname{tr}(A) / d_A}{\operatorname{tr}(G) / d_G}}
            && 1 \text{ where a trace is } 0 \\
        P_A &= (A + \pi \sqrt{\lambda}\, I)^{-1}, \quad P_G = (G + \sqrt{\lambda} / \pi\, I)^{-1}
            && \text{every } \mathrm{inverse\_interval} \text{ steps} \\
        g &= \nabla_W L \quad (+\, \mathrm{weight\_decay} \cdot W \text{ unless decoupled}) \\
        m &\leftarrow \mathrm{momentum} \cdot m + g \\
        D &= P_G\, m\, P_A && \text{m as a matrix } [W, b] \\
        \nu &= \min \left( 1,
            \sqrt{\frac{\mathrm{kl\_clip}}{\left| \sum \mathrm{lr}^2 \langle D, m \rangle \right|}} \right)
            && \text{one number for all parameters} \\
        c &= \min \left( 1, \frac{\mathrm{max\_relative\_step} \cdot \max(|W|, \mathrm{floor} \sqrt{n / f})}
            {\mathrm{lr}\, \nu\, |D|} \right) && \text{one for each layer of n numbers and fan-in f} \\
        W &\leftarrow W - \mathrm{lr}\, (c\, \nu\, D \quad (+\, \mathrm{weight\_decay} \cdot W \text{ if decoupled}))

    ==================== ============================================================================================
    layer                factors, or blocks of the Fisher matrix
    ==================== ============================================================================================
    Linear               A of [h, 1], G of s
    Conv                 A of [patch, 1] at each position, G of s; for each group apart
    ConvTranspose        A of h, G of the patch of derivatives that a position makes; the bias has 1 x 1 blocks
    normalisations       none: by Adam; ``others="curvature"``: one 2 x 2 block of scale and shift for each channel
    Embedding            the same; 1 x 1
    anything else        the same; 1 x 1 from M times the squared gradient of the batch; ``explain()`` names these
    ==================== ============================================================================================

    Adam has a rate of its own, ``others_lr * lr``; ν and c count nothing of what it trains.

    State of a weight: ``momentum_buffer``, ``row_factor``, ``column_factor``, (groups, n, n) or (groups, n) if they are
    diagonal, ``row_inverse``, ``column_inverse`` and ``fisher_updates``; what has blocks has the state of :class:`MBF`.
    With ``stochastic_rounding`` each has ``step`` and ``ordinal``.
    Before there are statistics the inverse is the identity. A factor that is not positive definite with its damping
    keeps the inverse it has, is counted in :meth:`metrics` and warned of once. What Adam trains has
    ``momentum_buffer``, ``exp_avg_sq`` and ``exp_avg_updates``. Large layers on the CPU have room for P_G m P_A,
    ``momentum_image`` (1, rows, columns), unless ``directions="dense"``; ``image_holds`` is 1 where it is that.

    Args:
        model: its layers are read through hooks; ``close()`` removes them. Inputs of layers are kept until the backward
            has passed.
        lr: learning rate, a number or a tensor of one element.
        momentum: 0 <= momentum < 1.
        damping: λ, in the units of squared per-sample gradients.
        kl_clip: bound of ``sum lr^2 <D, m>``, twice the change of the model's distribution, over all parameters; None
            for no bound.
        max_relative_step: how long the step of a layer may be beside its weights; None for no bound.
        floor: a layer's weights count there as at least ``floor / sqrt(fan_in)`` each, as in :class:`MBF`.
        beta2: decay of the factors, 0 <= beta2 < 1.
        update_interval: statistics are taken every so many steps; in between the hooks do nothing.
        inverse_interval: factors that have changed are inverted every so many steps.
        refresh: ``"ramp"``: both intervals grow from 1 to these over the first steps; ``"constant"``: they are what
            they are from the beginning.
        ramp: over how many steps they grow, as in :class:`MBF`.
        overlap: invert beside training, as in :class:`MBF`.
        delayed: take the statistics of each refresh in the next one, as in :class:`MBF`.
        inverse_sharing: who inverts where several processes train the model, as in :class:`MBF`; with ``"one_owner"``
            factors are divided by rows where ``fully_shard`` divides the parameters.
        fisher: ``"empirical"``: of the labels of the data; ``"sampled"``: of labels drawn from the model's own output,
            in :meth:`sample`.
        max_factor_size: wider factors are diagonal.
        sequence: what a Linear takes for a sample on inputs of three dimensions or more: ``"expand"`` every row;
            ``"reduce"`` the mean of a sample's inputs and the sum of its derivatives.
        loss_reduction: ``"mean"`` or ``"sum"``: how the loss makes one number of its terms.
        loss_terms: what these are. ``"rows"``: the rows of the model's output that have a derivative, pixels or tokens
            for instance; ``"samples"``: the entries of its first dimension that have one, for a loss that pools the
            others itself.
        others: how what has no factors is trained, normalisations, embeddings and parameters without a rule.
            ``"adam"``: by Adam with the decays ``momentum`` and ``beta2`` and eps 1e-8, at the rate ``others_lr * lr``;
            neither bound counts it. ``"curvature"``: by its blocks. The bias of a ConvTranspose always has blocks.
        others_lr: that rate beside ``lr``, at least 0.
        directions: how P_G m P_A is made between two inversions. ``"auto"``: on the CPU, where the batch has few rows
            beside the size of a layer, of its last value and of these rows, whose inputs and derivatives are kept until
            the step. ``"dense"``: always of m.
        weight_decay: at least 0.
        decoupled: decay the weights rather than add the decay to the gradient.
        maximize: ascend.
        moment_dtype: ``torch.bfloat16`` keeps the momentum in 16 bits: 2 bytes a parameter in place of 4. It is read,
            advanced in float32 and rounded; directions are made of what is kept, but for those that
            ``directions="auto"`` carries on, in float32. Second moments stay float32, and float64 parameters take none
            but None, which is float32 elsewhere.
        stochastic_rounding: round parameters and momentum in bfloat16 up or down at random, as in :class:`AdaFisher`,
            rather than to nearest: the same for all groups that have something in bfloat16.
        seed: of the random integers, 0 to 2^64 - 1.
        params: parameter groups, each with any of these hyperparameters; None takes all parameters of the model. The
            settings of a layer's factors are those of its weight's group. Where the bias is in another group, weight
            and bias are taken for uncorrelated.
        grad_scaler: the ``torch.amp.GradScaler`` in use, so that factors are in the units of unscaled gradients also
            after a manual ``unscale_``.
        process_group: over which statistics are added up, one all-reduce a refresh; None takes the processes of the
            mesh of sharded parameters, or those of the DistributedDataParallel that averages the gradients.
        pipeline_group: the processes that have the stages of a pipeline, one each, over which ``kl_clip`` bounds the
            step of all; None where this one has all parameters.
        fallback: ``"warn"`` of parameters that no layer rule serves, or ``"error"``: refuse to start, or to go on,
            training them.
        rules: class of a layer -> the name of the operation it computes, ``"rms_norm"`` for example, or a function that
            takes the layer and returns a layer of torch that computes the same, or a rule. It overrides the proof.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.

    Source: Martens and Grosse, arXiv 1503.05671 (sections 3, 6.3); convolutions: arXiv 1602.01407; ``"expand"`` and
    ``"reduce"``: arXiv 2311.00636; the trust region: arXiv 1705.09319.
    """

    moment = "momentum_buffer"
    factors_kind: ClassVar[type[KroneckerFactors]] = FactorInverses
    statistics_state = (*BLOCK_STATE, *factor_state("inverse"), IMAGE, HOLDS, *PENDING)
    later: ClassVar[Mapping[str, Any]] = {
        **KroneckerOptimizer.later,
        "others": "curvature",
        "others_lr": OTHERS_LR,
    }

    _images: MomentumImages | None = None

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.6,
        damping: float = 1e-3,
        kl_clip: float | None = 1e-2,
        max_relative_step: float | None = 0.05,
        floor: float = FLOOR,
        beta2: float = 0.95,
        update_interval: int = 10,
        inverse_interval: int = 20,
        refresh: Literal["ramp", "constant"] = "ramp",
        ramp: float = RAMP,
        overlap: bool = False,
        delayed: bool = False,
        inverse_sharing: Literal["every_rank", "one_owner"] = EVERY_RANK,
        fisher: Literal["empirical", "sampled"] = "empirical",
        max_factor_size: int = 4096,
        sequence: Literal["expand", "reduce"] = "expand",
        loss_reduction: Literal["mean", "sum"] = "mean",
        loss_terms: Literal["rows", "samples"] = "rows",
        others: Literal["curvature", "adam"] = "adam",
        others_lr: float = OTHERS_LR,
        directions: Literal["auto", "dense"] = "auto",
        weight_decay: float = 0.0,
        decoupled: bool = True,
        maximize: bool = False,
        moment_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        params: ParamsT | None = None,
        grad_scaler: Any = None,
        process_group: dist.ProcessGroup | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
        fallback: Literal["warn", "error"] = "warn",
        rules: Mapping[type, Choice] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "kl_clip": kl_clip,
            "max_relative_step": max_relative_step,
            "floor": floor,
            "beta2": beta2,
            "update_interval": update_interval,
            "inverse_interval": inverse_interval,
            "refresh": refresh,
            "ramp": ramp,
            "overlap": overlap,
            "delayed": delayed,
            "inverse_sharing": inverse_sharing,
            "fisher": fisher,
            "max_factor_size": max_factor_size,
            "sequence": sequence,
            "loss_reduction": loss_reduction,
            "loss_terms": loss_terms,
            "others": others,
            "others_lr": others_lr,
            "directions": directions,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "maximize": maximize,
            "moment_dtype": moment_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        self._by_adam: frozenset[Parameter] = frozenset()
        require_group("pipeline_group", pipeline_group)
        self._pipeline_group = pipeline_group
        super().__init__(model, params, defaults, grad_scaler, process_group, fallback, rules)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        require_choice(group, "others", ("curvature", "adam"))
        require_choice(group, "directions", ("auto", "dense"))
        require_numbers(group, ("others_lr",))
        if not 0 <= group["others_lr"] < math.inf:
            raise ValueError(f"others_lr is {group['others_lr']}, expected a finite number of at least 0")

    # What Adam trains.

    def _rule_for(self, module: nn.Module, owner: Parameter) -> TermRule | None:
        rule = super()._rule_for(module, owner)
        if rule is None or isinstance(rule, FactorRule) or self._groups[owner]["others"] == "curvature":
            return rule
        return Elementwise(rule.factoring, rule.context)

    def _found_by_adam(self) -> frozenset[Parameter]:
        """The parameters that no factors serve, where their group says so, or that of the weight of their layer."""
        served, elementwise = set(self._factors.served), set[Parameter]()
        for site in self.statistics.sites:
            # The bias of a transposed convolution is served.
            of_rule = elementwise if isinstance(site.rule, Elementwise) else served
            of_rule.update(p for layer in site.layers for p in layer.parameters.values())
        adam = {p for p, group in self._groups.items() if group["others"] == "adam" or p in elementwise}
        return frozenset(adam - served)

    def _make_squares(self, p: Parameter, steps: int = 0) -> None:
        state = self.state[p]
        state["exp_avg_sq"] = torch.zeros_like(state[self.moment], dtype=ACCUMULATOR[p.dtype])
        state["exp_avg_updates"] = torch.full((), steps, dtype=ACCUMULATOR[p.dtype], device=p.device)

    def _observe(self, params: list[Parameter], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Average squared gradients in, but for elements that stay."""
        known = []
        for p in params:
            state, group = self.state[p], self._groups[p]
            gradient, bad = self._gradient(p, group, grad_scale, found_inf)
            if "exp_avg_sq" not in state:  # a layer served it before, and its momentum is that of all steps
                self._make_squares(p, group["iteration"])
                local(state["exp_avg_sq"]).add_(gradient.square() * (1 - group["beta2"] ** group["iteration"]))
            average(local(state["exp_avg_sq"]), gradient.square(), group["beta2"], 1.0 if bad is None else ~bad)
            known.append(float(gradient.numel() > 0 or p.numel() == 0) if bad is None else (~bad).any())
        for p, some in zip(params, some_anywhere(params, known) if self._is_divided else known, strict=True):
            self.state[p]["exp_avg_updates"].add_(some)

    def _by_root(self, p: Parameter, vector: Tensor) -> Tensor:
        """Adam's direction; the momentum is a sum, which 1 - momentum makes an average."""
        state, group = self.state[p], self._groups[p]
        count, momentum = state["exp_avg_updates"], group["momentum"]
        mean = vector * ((1 - momentum) / unbiased(count, momentum)).to(vector.dtype)
        root = (local(state["exp_avg_sq"]) / unbiased(count, group["beta2"]).to(vector.dtype)).sqrt_()
        return mean / root.add_(EPS)

    # Blocks of what has no factors.

    def _fallback_detail(self, parameter: Parameter) -> str:
        return "Adam" if parameter in self._by_adam else "1 x 1 blocks from the squared gradient of the batch"

    def _rebuild(self) -> None:
        super()._rebuild()
        self._by_adam = self._found_by_adam()
        elsewhere = self._factors.served | self._by_adam
        sites: Any = self.statistics.sites
        self._blocks = TermBlocks(sites, self.state, self._groups, self._overlap, elsewhere)
        self._renewals = (self._factors, self._blocks)
        self._share_out()
        if self._images is not None:
            self._images.rows.close()
        self._images = MomentumImages(self._factors, self.statistics, self.state, self._groups, self.moment)

    def _set_aside(self, params: Collection[Parameter]) -> None:
        self._blocks.set_aside([p for p in params if p not in self._by_adam])
        self._blocks.couple()
        super()._set_aside(params)

    def _known_sites(self) -> Collection[int]:
        sites = enumerate(self.statistics.sites)
        by_adam = {index for index, site in sites if isinstance(site.rule, Elementwise)}
        return self._factors.known_sites | self._blocks.known_sites | by_adam

    def _without_statistics(self) -> Iterator[Parameter]:
        yield from super()._without_statistics()
        yield from self._blocks.aside_without_state()

    def _dtype_of(self, p: Parameter, name: str) -> torch.dtype:
        return super()._dtype_of(p, name.removeprefix(NEXT).removeprefix(ASIDE))

    def _prepare(self) -> None:
        super()._prepare()
        self._blocks.couple()
        if self._images is not None:
            self._images.make_room()

    def _make_state(self, p: Parameter) -> None:
        super()._make_state(p)
        if p in self._by_adam:
            self._make_squares(p)
        for part in self._blocks.parts:
            if any(p is q for q in part.params):
                self._blocks.averages(part)

    def _average(self, means: list[tuple[int, Means]], grad_scale: Tensor | None) -> None:
        super()._average(means, grad_scale)
        sites: Any = self.statistics.sites
        new = list(self._blocks.new_blocks(sites, [(index, found.blocks) for index, found in means]))
        if means or not sites:
            new += self._from_gradients([found.terms for _, found in means], grad_scale)
        if new:
            self._blocks.fold(new)

    def _from_gradients(self, terms: list[Tensor], grad_scale: Tensor | None) -> Iterator[New]:
        """Squared gradients of parameters without a rule, in the units of blocks: M times those of a mean over M."""
        most = torch.stack([t.to(terms[0]) for t in terms]).amax(0) if terms else None
        for part in self._blocks.fallbacks():
            group, gradient = self._groups[part.owner], part.owner.grad
            due = is_due(group) or not self._blocks.is_averaged(part)
            if gradient is not None and due and gradient.numel():
                wide = whole(gradient).to(ACCUMULATOR[gradient.dtype])
                if grad_scale is not None:
                    wide = wide / grad_scale.to(wide.device, wide.dtype)
                squares = wide.square().flatten()
                if most is not None:
                    by_terms = torch.mul if group["loss_reduction"] == "mean" else torch.div
                    squares = by_terms(squares, most.to(squares))
                yield part, squares, 1.0, 1.0

    # Step.

    def _keep_beside(self) -> Callable[[], None]:
        others = super()._keep_beside()
        rows = None if self._images is None else self._images.rows.keep_pending()

        def put_back() -> None:
            others()
            if self._images is not None and rows is not None:
                rows(self._images.rows)

        return put_back

    def _serving(self) -> tuple[int, ...]:
        return (*super()._serving(), self._blocks.version)

    def _arm(self) -> None:
        super()._arm()
        if self._images is not None:
            self._images.arm(self._inverting())

    def _refused(self) -> None:
        super()._refused()
        if self._images is not None:
            self._images.rows.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._images is not None:
            self._images.rows.clear()

    def close(self) -> None:
        super().close()
        if self._images is not None:
            self._images.rows.close()

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if self._images is not None:
            self._images.begin(self._inverting(), grad_scale)
        super()._update(grad_scale, found_inf)

    def _advance_moments(
        self, group: dict[str, Any], params: list[Parameter], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        skipped = super()._advance_moments(group, params, grad_scale, found_inf)
        self._observe([p for p in params if p in self._by_adam], grad_scale, found_inf)
        return skipped

    def _move(self, params: list[Parameter], stays: Mapping[Parameter, Tensor], found_inf: Tensor | None) -> None:
        by_adam = [p for p in params if p in self._by_adam]
        if len(by_adam) < len(params):
            super()._move([p for p in params if p not in self._by_adam], stays, found_inf)
        if by_adam:
            super()._move(by_adam, stays, found_inf)

    def _is_elementwise(self, p: Parameter) -> bool:
        return p in self._by_adam

    def _bounds(self, p: Parameter) -> Bounds:
        group = self._groups[p]
        return Bounds(group["others_lr"] * group["lr"], None, None) if p in self._by_adam else super()._bounds(p)

    def _layers_to_move(self, params: Collection[Parameter]) -> Iterator[list[Parameter]]:
        known = set(params)
        joint = [list(unit) for unit in self._blocks.layers(known.__contains__) if len(unit) > 1]
        beside = {p for unit in joint for p in unit}
        yield from super()._layers_to_move([p for p in params if p not in beside])
        yield from joint

    def _directions_of_step(
        self, vectors: Vectors, stays: Mapping[Parameter, Tensor]
    ) -> Iterator[tuple[Parameter, Tensor]]:
        found = {} if self._images is None else dict(self._images.directions(vectors, stays))
        yield from found.items()
        yield from super()._directions_of_step(vectors.only(lambda p: p not in found), stays)

    def _directions(self, vectors: Vectors) -> Iterator[tuple[Parameter, Tensor]]:
        yield from super()._directions(vectors)
        for p in vectors:
            if p in self._by_adam and "exp_avg_sq" in self.state[p]:
                yield p, self._by_root(p, vectors[p])
        yield from self._blocks.directions(vectors.only(lambda p: not self._factors.serves(p)))

    def _failures(self) -> tuple[dict[Parameter, int], dict[Parameter, int]]:
        found = super()._failures()
        for mine, counts in zip(found, (totals(self._blocks.bad), totals(self._blocks.refused)), strict=True):
            mine.update(
                {p: counts[part.number] for part in self._blocks.parts for p in part.params if part.number in counts}
            )
        return found
