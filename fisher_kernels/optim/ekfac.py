"""EKFAC, and Adam in the same basis: second moments in the eigenbasis of the Kronecker factors.

Source: George, Laurent, Bouthillier, Ballas and Vincent, arXiv 1806.03884.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from fisher_kernels.curvature.factor_rules import Elementwise, FactorRule, TermRule
from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.curvature.operations import Choice
from fisher_kernels.curvature.rounds import Key, key_of
from fisher_kernels.curvature.rules import Sums
from fisher_kernels.curvature.statistics import Statistics
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.optim.adam_moments import average, unbiased
from fisher_kernels.optim.exchanged import own_columns
from fisher_kernels.optim.factor_bases import MOMENT_UPDATES, MOMENTS, FactorBases, FactorMoments, Turn, turned
from fisher_kernels.optim.fisher_blocks import BLOCK_STATE
from fisher_kernels.optim.floors import FLOOR
from fisher_kernels.optim.inverse_sharing import EVERY_RANK
from fisher_kernels.optim.kfac import KFAC, OTHERS_LR
from fisher_kernels.optim.kronecker import RAMP, KroneckerOptimizer, goes_on
from fisher_kernels.optim.kronecker_factors import UPDATES, Pair, factor_state, on_the_left
from fisher_kernels.optim.momentum_image import HOLDS, IMAGE
from fisher_kernels.optim.pending import PENDING
from fisher_kernels.optim.shares import gathered_together, local, over_processes, some_anywhere
from fisher_kernels.optim.vectors import Vectors

TINY = 1e-16
"""Added to second moments beside what is relative to their mean, so that nothing is divided by 0."""

_BASIS_STATE = (*factor_state("basis"), MOMENTS)


class EKFAC(KFAC):
    r"""EKFAC: K-FAC whose eigenvalues are measured, as second moments of per-sample gradients in its eigenbasis.

    A, G, m, ν, c and the step are those of :class:`KFAC`. With g_n the gradient of sample n as [W, b], times M:

    .. math::

        Q_A, Q_G &= \text{eigenvectors of } A, G && \text{every } \mathrm{inverse\_interval} \text{ steps} \\
        V &\leftarrow (Q_G'^T Q_G)^{\circ 2}\, V\, (Q_A'^T Q_A)^{\circ 2\, T} && \text{in a new basis} \\
        V &\leftarrow \text{average of } \tfrac{1}{M} \sum_n (Q_G^T\, g_n\, Q_A)^{\circ 2}
            && \text{every } \mathrm{update\_interval} \text{ steps, at first } \lambda_G \lambda_A^T \\
        D &= Q_G \left( \frac{Q_G^T\, m\, Q_A}{V + \mathrm{damping}} \right) Q_A^T

    In a given basis this V is the diagonal that is nearest to the Fisher matrix (Proposition 1 of the paper). A Linear
    on sequences takes each row for a sample, or as ``sequence`` says; a convolution takes the sums over positions.

    State of a weight: ``momentum_buffer``, ``row_factor``, ``column_factor``, ``row_basis``, ``column_basis`` (groups,
    n, n), ``second_moment`` (groups, rows, columns), ``moment_updates`` and ``fisher_updates``. A factor whose
    eigenvectors cannot be found keeps those it has, is counted in :meth:`KFAC.metrics` and warned of once. Large layers
    on the CPU have room for the momentum in the basis, ``momentum_image`` (1, rows, columns), unless
    ``directions="dense"``; ``image_holds`` is 1 where it is that.

    All arguments but these are those of :class:`KFAC`:

    Args:
        lr: learning rate, a number or a tensor of one element.
        damping: added to V, and to the diagonal of blocks, in the units of squared per-sample gradients.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.

    Source: George et al., arXiv 1806.03884, Algorithm 1 with per-sample second moments.
    """

    factors_kind = FactorMoments
    moments = True
    statistics_state = (*BLOCK_STATE, *_BASIS_STATE, MOMENT_UPDATES, IMAGE, HOLDS, *PENDING)

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.03,
        *,
        momentum: float = 0.6,
        damping: float = 1e-3,
        kl_clip: float | None = 1e-3,
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
        super().__init__(
            model,
            lr,
            momentum=momentum,
            damping=damping,
            kl_clip=kl_clip,
            max_relative_step=max_relative_step,
            floor=floor,
            beta2=beta2,
            update_interval=update_interval,
            inverse_interval=inverse_interval,
            refresh=refresh,
            ramp=ramp,
            overlap=overlap,
            delayed=delayed,
            inverse_sharing=inverse_sharing,
            fisher=fisher,
            max_factor_size=max_factor_size,
            sequence=sequence,
            loss_reduction=loss_reduction,
            loss_terms=loss_terms,
            others=others,
            others_lr=others_lr,
            directions=directions,
            weight_decay=weight_decay,
            decoupled=decoupled,
            maximize=maximize,
            moment_dtype=moment_dtype,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            params=params,
            grad_scaler=grad_scaler,
            process_group=process_group,
            pipeline_group=pipeline_group,
            fallback=fallback,
            rules=rules,
        )

    def _rebuild(self) -> None:
        super()._rebuild()
        assert isinstance(self._factors, FactorMoments)
        sites = enumerate(self.statistics.sites)
        keys = {pair.number: key_of(site) for i, site in sites if (pair := self._factors.pair_of(i)) is not None}
        self._factors.on_turn = partial(_turn_later, self.statistics, keys)


def _turn_later(statistics: Statistics[TermRule], keys: Mapping[int, Key], pair: Pair, turns: Sequence[Turn]) -> None:
    """Turn second moments that a later refresh takes, which are in the basis of before."""
    place = len(pair.rule.blocks) + 2  # behind both factors

    def change(sums: Sums) -> Sums:
        vectors = list(sums.vectors)
        moments = vectors[place].view(pair.rule.shape).to(turns[0][1].dtype)
        vectors[place] = turned(moments, turns).flatten()
        return Sums(vectors, sums.counts)

    statistics.rounds.change(keys[pair.number], change)


class AdamBases(FactorBases):
    r"""The eigenvectors, with second moments of the gradients of batches in their basis.

    .. math:: D = Q_G \left( \frac{Q_G^T\, m\, Q_A}{\sqrt{V + \mathrm{damping} \cdot \operatorname{mean} V}} \right)
        Q_A^T

    They are divided by what a start at zero lacks. Before there are factors the basis is that of the numbers
    themselves. ``state[owner]`` has ``moment_updates``, how many gradients they are of.
    """

    _means: dict[int, Tensor]  # number of a pair whose second moments are divided -> the mean of all of them

    def _make_more(self, pair: Pair, state: dict[str, Tensor]) -> None:
        super()._make_more(pair, state)
        state[MOMENT_UPDATES] = torch.zeros((), dtype=ACCUMULATOR[pair.owner.dtype], device=pair.owner.device)

    def _fold_moments(self, pair: Pair, new: Tensor) -> None:
        raise AssertionError("no rule takes them")

    def serves(self, p: Parameter) -> bool:
        return p in self.served  # a layer that was not used keeps its basis

    def observe(self, pair: Pair, gradients: Mapping[Parameter, Tensor], going_on: float | Tensor) -> None:
        """Average the squares of the gradient of a batch in; not if ``going_on`` is 0."""
        found = [self.into(pair, matrices).square() for _, matrices in pair.given(gradients.get)]
        squares, division = torch.stack(found).sum(0) if len(found) > 1 else found[0], self.columns_of(pair)
        self._take(pair, squares if division is None else squares[:, :, division.here], going_on)

    def observe_columns(self, pair: Pair, columns: Tensor, going_on: float | Tensor) -> None:
        """The same, given the own columns of a gradient that is in the basis from the right."""
        rows = self.basis(pair).rows
        squares = (columns if rows is None else on_the_left(rows.mT, columns)).square()
        self._take(pair, squares.unsqueeze(0), going_on)

    def _take(self, pair: Pair, squares: Tensor, going_on: float | Tensor) -> None:
        average(self._moments(pair), squares, self.groups[pair.owner]["beta2"], going_on)
        self.averages(pair)[MOMENT_UPDATES].add_(going_on)

    def add_up(self, pairs: Sequence[Pair]) -> None:
        """Find the means of second moments that are divided, which each process needs in the directions of a step."""
        self._means = {}
        if pairs:
            here = torch.stack([self._moments(pair).double().sum() for pair in pairs])
            sums = over_processes([pair.owner for pair in pairs], here)
            self._means = {pair.number: x / math.prod(pair.rule.shape) for pair, x in zip(pairs, sums, strict=True)}

    def _divisors(self, pair: Pair, moments: Tensor) -> Tensor:
        mean = self._means[pair.number] if self.columns_of(pair) is not None else self._moments(pair).mean()
        return self._root(pair, moments, mean.to(moments.dtype))

    def _root(self, pair: Pair, moments: Tensor, mean: Tensor | None = None) -> Tensor:
        return _root(moments, self.averages(pair)[MOMENT_UPDATES], self.groups[pair.owner], mean)

    def _apply(self, pair: Pair, matrices: Tensor) -> Tensor:
        return self.out_of(pair, self.into(pair, matrices) / self._root(pair, self._all_moments(pair)))


def _root(moments: Tensor, count: Tensor, group: dict[str, Any], mean: Tensor | None = None) -> Tensor:
    """What Adam divides by; ``mean`` is that of all moments, if those here are a part of them."""
    share = unbiased(count, group["beta2"]).to(moments.dtype)
    filled = moments / share
    return filled.add_((filled.mean() if mean is None else mean / share) * group["damping"] + TINY).sqrt_()


class EKFACAdam(KroneckerOptimizer):
    r"""Adam in the eigenbasis of the Kronecker factors, which is SOAP with the factors of K-FAC in place of Shampoo's.

    A and G are those of :class:`KFAC`. With the gradient g of the batch as a matrix [W, b]:

    .. math::

        Q_A, Q_G &= \text{eigenvectors of } A, G && \text{every } \mathrm{inverse\_interval} \text{ steps} \\
        V &\leftarrow (Q_G'^T Q_G)^{\circ 2}\, V\, (Q_A'^T Q_A)^{\circ 2\, T} && \text{in a new basis} \\
        m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \quad
            V \leftarrow \beta_2 V + (1 - \beta_2) (Q_G^T\, g\, Q_A)^{\circ 2} && \text{every step} \\
        D &= Q_G \left( \frac{Q_G^T\, \hat m\, Q_A}{\sqrt{\hat V + \mathrm{damping} \cdot \operatorname{mean} \hat V}}
            \right) Q_A^T && \hat m,\ \hat V \text{ divided by } 1 - \beta^t \\
        W &\leftarrow W - \mathrm{lr}\, (c\, D \quad (+\, \mathrm{weight\_decay} \cdot W \text{ if decoupled}))

    What has no factors, normalisations and embeddings among it, is trained by Adam itself.

    State: ``exp_avg`` of each parameter and ``exp_avg_updates``, the number of its steps; of the weight of a layer
    ``row_factor``, ``column_factor``, ``row_basis``, ``column_basis``, ``fisher_updates``, ``second_moment`` (groups,
    rows, columns) and ``moment_updates``; of what has no factors ``exp_avg_sq``.

    All arguments but these are those of :class:`KFAC`, whose momentum and trust region it has not:

    Args:
        lr: learning rate, a number or a tensor of one element.
        beta1: decay of the moment, 0 <= beta1 < 1.
        beta2: decay of V and of the factors, 0 <= beta2 < 1.
        damping: added to V, relative to its mean.
        max_relative_step: how long the step of a layer may be beside its weights; None for no bound.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.

    Source: SOAP, arXiv 2409.11321, for Adam in a basis; the factors are those of arXiv 1503.05671.
    """

    moment = "exp_avg"
    factors_kind = AdamBases
    decay_of_moment = "beta1"
    statistics_state = (*_BASIS_STATE, MOMENT_UPDATES, UPDATES, *PENDING)

    _factors: AdamBases

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-2,
        *,
        beta1: float = 0.9,
        beta2: float = 0.95,
        damping: float = 1e-3,
        max_relative_step: float | None = None,
        floor: float = FLOOR,
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
        weight_decay: float = 0.0,
        decoupled: bool = True,
        maximize: bool = False,
        moment_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        params: ParamsT | None = None,
        grad_scaler: Any = None,
        process_group: dist.ProcessGroup | None = None,
        fallback: Literal["warn", "error"] = "warn",
        rules: Mapping[type, Choice] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "damping": damping,
            "max_relative_step": max_relative_step,
            "floor": floor,
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
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "maximize": maximize,
            "moment_dtype": moment_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        self._gradients: dict[Parameter, Tensor] = {}  # within a step
        super().__init__(model, params, defaults, grad_scaler, process_group, fallback, rules)

    def _rule_for(self, module: nn.Module, owner: Parameter) -> TermRule | None:
        rule = super()._rule_for(module, owner)
        if rule is None or isinstance(rule, FactorRule):
            return rule
        return Elementwise(rule.factoring, rule.context)

    def _fallback_detail(self, parameter: Parameter) -> str:
        return "Adam"

    def _restored(self) -> None:
        self._gradients = {}
        super()._restored()

    def _known_sites(self) -> Collection[int]:
        sites = enumerate(self.statistics.sites)
        return self._factors.known_sites | {index for index, site in sites if not isinstance(site.rule, FactorRule)}

    def _make_state(self, p: Parameter) -> None:
        super()._make_state(p)
        state = self.state[p]
        state["exp_avg_updates"] = torch.zeros((), dtype=ACCUMULATOR[p.dtype], device=p.device)
        if not self._factors.serves(p):
            state["exp_avg_sq"] = torch.zeros_like(state[self.moment], dtype=ACCUMULATOR[p.dtype])

    def _advance_moments(
        self, group: dict[str, Any], params: list[Parameter], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        skipped = torch.zeros(len(params), dtype=torch.int64, device=params[0].device)
        rounding = self._rounding(params)
        gradients: dict[Parameter, Tensor] = {}
        known: list[Tensor | float] = []
        for i, (p, moment) in enumerate(zip(params, self._local_moments(params), strict=True)):
            gradients[p], bad = self._gradient(p, group, grad_scale, found_inf)
            old = moment.to(ACCUMULATOR[p.dtype])
            new = old.lerp(gradients[p], 1 - group["beta1"])
            if bad is None:
                known.append(float(new.numel() > 0 or p.numel() == 0))
            else:
                new = torch.where(bad, old, new)
                known.append((~bad).any())
                skipped[i] = bad.sum()
            moment.copy_(rounding.narrow(i, new, moment.dtype, low=True))
        for p, some in zip(params, some_anywhere(params, known) if self._is_divided else known, strict=True):
            self.state[p]["exp_avg_updates"].add_(some)
        self._gradients.update(gradients)
        return skipped

    def _move(self, params: list[Parameter], stays: Mapping[Parameter, Tensor], found_inf: Tensor | None) -> None:
        gradients, self._gradients = self._gradients, {}
        going_on = goes_on(found_inf)
        self._observe(gradients, stays, going_on)
        for p, g in gradients.items():
            if not self._factors.serves(p):
                if "exp_avg_sq" not in self.state[p]:  # a layer served it before
                    zeros = torch.zeros_like(self.state[p][self.moment], dtype=ACCUMULATOR[p.dtype])
                    self.state[p]["exp_avg_sq"] = zeros
                    local(self.state[p]["exp_avg_sq"]).copy_(g.square())
                moving = ~stays[p] * going_on if p in stays else going_on
                average(local(self.state[p]["exp_avg_sq"]), g.square(), self._groups[p]["beta2"], moving)
        super()._move(params, stays, found_inf)

    def _observe(
        self, gradients: Mapping[Parameter, Tensor], stays: Mapping[Parameter, Tensor], going_on: float | Tensor
    ) -> None:
        """Average the squares of gradients in, of layers of which any process knows some number of a gradient."""

        def here(params: Sequence[Parameter]) -> dict[Parameter, Tensor]:
            return {p: gradients[p] for p in params if p in gradients}

        given = {pair.number: mine for pair in self._factors.pairs if (mine := here(pair.params))}
        unsure = [p for mine in given.values() for p in mine if p in stays]
        known = dict(zip(unsure, some_anywhere(unsure, [(~stays[p]).any() for p in unsure]), strict=True))

        def learning(pair: Pair) -> float | Tensor:
            any_known = [known.get(p) for p in given[pair.number]]
            sure = [x for x in any_known if x is not None]
            return going_on * (1.0 if len(sure) < len(any_known) else torch.stack(sure).amax())

        exchanged, others = list[Pair](), list[Pair]()
        for pair in (pair for pair in self._factors.pairs if pair.number in given):
            divided = pair.weight in gradients and self._factors.columns_of(pair) is not None
            (exchanged if divided else others).append(pair)
        for pair, columns in own_columns(self._factors, exchanged, here):
            self._factors.observe_columns(pair, columns, learning(pair))
        for pair in others:
            mine = given[pair.number]
            found = gathered_together([*mine], [*mine.values()])
            self._factors.observe(pair, dict(zip(mine, found, strict=True)), learning(pair))
        self._factors.add_up(exchanged)

    def _is_elementwise(self, p: Parameter) -> bool:
        return not self._factors.serves(p)

    def _own_vectors(self, params: Sequence[Parameter], stays: Mapping[Parameter, Tensor]) -> list[Tensor]:
        shares = [unbiased(self.state[p]["exp_avg_updates"], self._groups[p]["beta1"]) for p in params]
        return [v / share.to(v.dtype) for v, share in zip(super()._own_vectors(params, stays), shares, strict=True)]

    def _directions(self, vectors: Vectors) -> Iterator[tuple[Parameter, Tensor]]:
        yield from super()._directions(vectors)
        for p in vectors:
            if not self._factors.serves(p) and "exp_avg_sq" in self.state[p]:
                here, count = local(self.state[p]["exp_avg_sq"]), self.state[p]["exp_avg_updates"]
                mean = over_processes([p], here.sum().reshape(1))[0] / p.numel() if is_distributed(p) else None
                yield p, vectors[p] / _root(here, count, self._groups[p], mean)
