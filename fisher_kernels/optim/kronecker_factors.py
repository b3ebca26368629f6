"""The averaged Kronecker factors of layers, kept in the optimizer's state, and the directions they give."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.curvature.factor_rules import FactorRule, Means, TermRule
from fisher_kernels.curvature.scattered import Division, flag, flagged
from fisher_kernels.curvature.sites import Site
from fisher_kernels.ops import ACCUMULATOR, factor_ema_
from fisher_kernels.optim.base import count
from fisher_kernels.optim.factor_shards import Divide, FactorShards, Rows, to_owners
from fisher_kernels.optim.inverse_sharing import ONE_OWNER
from fisher_kernels.optim.overlap import Overlap, Task
from fisher_kernels.optim.renewal import NEXT, Renewal
from fisher_kernels.optim.shares import local, whole
from fisher_kernels.optim.vectors import Vectors

SIDES = ("row", "column")

UPDATES = "fisher_updates"
"""State: how many batches were averaged."""


def factor_state(made: str) -> tuple[str, ...]:
    """The names in the state of both factors, and of what is made of them."""
    found = [f"{side}_{made}" for side in SIDES]
    return (*(f"{side}_factor" for side in SIDES), *found, *(NEXT + name for name in found))


@dataclass(eq=False)
class Pair:
    """Both factors of a site, and the parameters that they serve.

    Attributes:
        weight: None where the optimizer does not hold it.
        keys: what hooks know it by: the identity of the weight, and of the operations of its layers.
        coupled: whether weight and bias are stepped together. If not, they are taken for uncorrelated. None before it
            is known.
        placed: which processes have rows of the parameters, where ``fully_shard`` alone divides them.
        divides: whether they have rows of the factors, too.
    """

    number: int
    owner: Parameter
    rule: FactorRule
    weight: Parameter | None
    biases: tuple[Parameter, ...]
    keys: tuple[int, ...]
    coupled: bool | None = None
    placed: FactorShards | None = None
    divides: bool = False

    @property
    def shards(self) -> FactorShards | None:
        """Which processes have rows of the factors, where these are divided."""
        return self.placed if self.divides else None

    @property
    def params(self) -> tuple[Parameter, ...]:
        return (*(() if self.weight is None else (self.weight,)), *self.biases)

    def division(self, side: int) -> Division | None:
        """How the rows of a factor are divided; None where all are here.

        Diagonals, factors of several groups and those of fewer rows than processes, all of them small, are whole.
        """
        groups, n = self.rule.shape[0], self.rule.shape[1 + side]
        if self.shards is None or groups > 1 or not self.rule.is_whole(side) or n < self.shards.processes:
            return None
        return self.shards.division(n)

    @property
    def has_rows(self) -> bool:
        """Whether a process has rows of one matrix, with what one bias has beside them."""
        if self.placed is None or self.weight is None or len(self.biases) > self.rule.bias:
            return False
        return self.rule.shape[0] == 1 and not self.rule.transposed and self.placed.has_rows_of(self.params)

    def holds(self, p: Parameter) -> bool:
        """Whether it serves a parameter."""
        return any(p is q for q in self.params)

    def matrices(self, of: Callable[[Parameter], Tensor | None], bias: int = 0) -> Tensor:
        """What is given for the weight and one bias, as (groups, rows, columns); zero for None."""
        weight = None if self.weight is None or bias else of(self.weight)
        beside = of(self.biases[bias]) if self.biases else None
        groups, rows, columns = self.rule.shape
        if weight is not None:
            body = self.rule.to_matrices(weight)
        else:
            assert beside is not None
            body = beside.new_zeros((groups, rows, columns - self.rule.bias))
        if not self.rule.bias:
            return body
        last = body.new_zeros((groups, rows, 1)) if beside is None else beside.reshape(groups, rows, 1)
        return torch.cat([body, last], 2)

    def given(self, of: Callable[[Parameter], Tensor | None]) -> Iterator[tuple[int, Tensor]]:
        """For each bias for which, or for whose weight, anything is given: its number, and that as matrices.

        The first bias lies beside the weight, the others alone.
        """
        for bias in range(max(1, len(self.biases))):
            members = (*(() if bias or self.weight is None else (self.weight,)), *self.biases[bias : bias + 1])
            if any(of(p) is not None for p in members):
                yield bias, self.matrices(of, bias)

    def split(self, matrices: Tensor, bias: int = 0) -> Iterator[tuple[Parameter, Tensor]]:
        """What matrices say of the weight and one bias."""
        columns = self.rule.shape[2] - self.rule.bias
        if self.weight is not None and not bias:
            yield self.weight, self.rule.from_matrices(matrices[..., :columns], self.weight)
        if self.biases:
            yield self.biases[bias], matrices[..., columns].reshape(self.biases[bias].shape)


class KroneckerFactors(Renewal[Pair]):
    """Moving averages of the factors of every layer, and what directions are made of them.

    ``state[owner]`` has ``row_factor`` and ``column_factor``, (groups, n, n) or (groups, n) for diagonals, and
    ``fisher_updates``, how many batches were averaged. Subclasses add what they make of the factors. Factors that are
    divided lie there as ``factor_shards.py`` says.

    Attributes:
        pairs: all of them; their positions are their numbers.
        version: counts the changes of what serves which parameter.
        known_sites: indices of the sites that have statistics.
        bad: number of a pair -> how often a factor could not be used, and what there was stayed.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    """What subclasses keep for each side, after the side."""

    def __init__(
        self,
        sites: Sequence[Site[TermRule]],
        state: MutableMapping[Tensor, Any],
        groups: Mapping[Parameter, dict[str, Any]],
        overlap: Overlap,
        divide: Divide = lambda params: None,
    ) -> None:
        super().__init__(state, groups, overlap)
        self._divide = divide
        self._assembled: dict[tuple[int, int], Tensor] = {}  # while this process inverts divided factors, all of them
        self.pairs: list[Pair] = []
        self.version = 0
        self._aside: frozenset[Parameter] = frozenset()
        self._acting: dict[int, tuple[Parameter, ...]] = {}  # number of a pair -> whom it gives directions
        self._acting_as_of = -1  # the version they are of
        self._of_site: dict[int, Pair] = {}
        self.served: set[Parameter] = set()
        factored = [index for index, site in enumerate(sites) if isinstance(site.rule, FactorRule)]
        for index in factored:
            self._add(index, sites[index])
        self._counts = {pair.number: self._updates(pair) for pair in self.pairs}
        self.known_sites = {
            index for index in factored if (pair := self._of_site.get(index)) is None or self._counts[pair.number]
        }
        for pair in self.pairs:
            if self._counts[pair.number]:
                self._note_known(pair)

    def _add(self, index: int, site: Site[TermRule]) -> None:
        """The pair of one site. A parameter that another one serves already is not served twice."""
        assert isinstance(site.rule, FactorRule)
        held: dict[str, list[Parameter]] = {"weight": [], "bias": []}
        for layer in site.layers:
            for role, p in layer.parameters.items():
                if p not in self.served and (role == "weight" or site.rule.bias):
                    self.served.add(p)
                    held[role].append(p)
        if not any(held.values()):
            return
        weight, biases = next(iter(held["weight"]), None), tuple(held["bias"])
        keys = id(site.module._parameters["weight"]), *(id(layer.operation) for layer in site.layers)
        owner = biases[0] if weight is None else weight
        pair = self._of_site[index] = Pair(len(self.pairs), owner, site.rule, weight, biases, keys)
        self.pairs.append(pair)
        group = self.groups[owner]
        # What comes a refresh later is added up whole.
        pair.placed = self._divide(pair.params)
        pair.divides = group.get("inverse_sharing") == ONE_OWNER and not group.get("delayed")
        self._lay_out(pair)

    # State.

    def _lay_out(self, pair: Pair) -> None:
        """Let the factors of a state that was loaded lie as they are divided here."""
        state = self.state.get(pair.owner, {})
        for side, name in enumerate(f"{side}_factor" for side in SIDES):
            if name in state and pair.shards is not None and pair.division(side) is not None:
                state[name] = pair.shards.loaded(state[name], pair.rule.factor_shape(side), along=1)
            elif name in state:
                state[name] = whole(state[name])

    def _updates(self, pair: Pair) -> int:
        updates = self.state.get(pair.owner, {}).get(UPDATES)
        return 0 if updates is None else int(updates)

    def is_known(self, pair: Pair) -> bool:
        """Whether a pair has statistics."""
        return self._counts[pair.number] > 0

    def averages(self, pair: Pair) -> dict[str, Tensor]:
        """The state of a pair; made on first use."""
        state: dict[str, Tensor] = self.state[pair.owner]
        if "row_factor" not in state:
            wide, device = ACCUMULATOR[pair.owner.dtype], pair.owner.device
            for side, name in enumerate(SIDES):
                shape = pair.rule.factor_shape(side)
                if pair.shards is not None and pair.division(side) is not None:
                    state[f"{name}_factor"] = pair.shards.zeros(shape, 1, wide, device)
                else:
                    state[f"{name}_factor"] = torch.zeros(shape, dtype=wide, device=device)
                for kept in self.state_names:
                    state[f"{name}_{kept}"] = torch.zeros(shape, dtype=wide, device=device)
                    diagonal = state[f"{name}_{kept}"]
                    (diagonal if len(shape) == 2 else diagonal.diagonal(dim1=1, dim2=2)).fill_(1.0)
            state[UPDATES] = torch.zeros((), dtype=torch.float32, device=pair.owner.device)
            self._make_more(pair, state)
            if self._overlaps(pair):
                self._add_next(pair)
        return state

    def _make_more(self, pair: Pair, state: dict[str, Tensor]) -> None:
        """Make what a subclass keeps besides."""

    # Averages.

    def divisions(self) -> dict[tuple[int, int], Division]:
        """How raw sums are divided, by site and position."""
        found = {}
        for index, pair in self._of_site.items():
            for side in range(len(SIDES)):
                if (division := pair.division(side)) is not None:
                    found[index, len(pair.rule.blocks) + side] = division
        return found

    def divided_among(self, p: Parameter) -> int:
        """How many processes have different rows of the factors that serve a parameter; 0 where all have all."""
        for pair in self.pairs:
            if pair.shards is not None and pair.holds(p) and any(map(pair.division, range(len(SIDES)))):
                return pair.shards.processes
        return 0

    def moments_divided_among(self, p: Parameter) -> int:
        """How many have different columns of its second moments in a basis; 0 where all have all, or there are none."""
        return 0

    def _here(self, pair: Pair, side: int) -> Tensor:
        """The average that is here, end to end, or a number that stands for it where no row is."""
        own = local(self.averages(pair)[f"{SIDES[side]}_factor"])
        return own.view(-1) if own.numel() or pair.division(side) is None else own.new_zeros(1)

    def _own(self, pair: Pair, side: int, new: Tensor) -> Tensor:
        """That part of a new factor, which has come whole if it was on its way when factors were not divided yet."""
        division, n = pair.division(side), pair.rule.shape[1 + side]
        if division is None or new.numel() < n * n:
            return new
        own = new.view(n, n)[division.here].flatten()
        return flagged(own if own.numel() else own.new_zeros(1), flag(new))

    def fold(self, new: Sequence[tuple[int, Means]]) -> None:
        """Average new factors in: the k-th with ``decay = min(1 - 1 / k, beta2)``."""
        batches: dict[tuple[Any, ...], list[tuple[int, Pair, Means]]] = defaultdict(list)
        for index, means in new:
            pair = self._of_site.get(index)
            if pair is not None and means.rows is not None:
                decay = min(1 - 1 / (self._counts[pair.number] + 1), self.groups[pair.owner]["beta2"])
                state = self.averages(pair)
                batches[decay, state["row_factor"].dtype, state["row_factor"].device].append((index, pair, means))
        for (decay, dtype, _), batch in batches.items():
            averages = [self._here(pair, side) for _, pair, _ in batch for side in range(len(SIDES))]
            values = [
                self._own(pair, side, v.to(dtype))
                for _, pair, means in batch
                for side, v in enumerate((means.rows, means.columns))
                if v is not None
            ]
            flags = factor_ema_(averages, values, decay, 1 - decay, joint=2)
            # A GPU is waited for only where there may be no average yet.
            known = flags.tolist() if flags.is_cpu or decay == 0 else None
            for i, (index, pair, means) in enumerate(batch):
                if known is None or not known[i]:
                    self._mark(index, pair, flags[i])
                    if means.moments is not None:
                        self._fold_moments(pair, means.moments.to(dtype))
            if known is None or any(known):
                count(self.refused, tuple(pair.number for _, pair, _ in batch), flags)

    def _mark(self, index: int, pair: Pair, refused: Tensor) -> None:
        self.averages(pair)[UPDATES].add_(1 - refused)
        self._counts[pair.number] += 1
        self.known_sites.add(index)
        self._stale.add(pair.number)

    def _fold_moments(self, pair: Pair, new: Tensor) -> None:
        """Average second moments in: all of them, row after row, or the own columns, one after another."""
        raise NotImplementedError

    # What is made of them.

    def couple(self) -> None:
        """Find out which weights and biases are stepped together: those of one group that both have a gradient."""
        for pair in self.pairs:
            if not pair.rule.bias:
                continue
            live = [p for p in pair.params if p.grad is not None and p not in self._aside]
            groups = {id(self.groups[p]) for p in live}
            coupled = len(live) == len(pair.params) == 2 and len(groups) == 1
            if live and pair.coupled is not coupled:
                if pair.coupled is not None and self.is_known(pair):
                    self._unmake(pair.number)
                pair.coupled = coupled
                self.version += 1

    def _item(self, number: int) -> Pair:
        return self.pairs[number]

    def pair_of(self, index: int) -> Pair | None:
        """The pair of a site, by the index of that one; None where others serve its parameters."""
        return self._of_site.get(index)

    def _made_names(self, pair: Pair) -> Sequence[str]:
        return [f"{side}_{kept}" for side in SIDES for kept in self.state_names]

    def in_use(self, pair: Pair) -> list[Tensor]:
        """What is made of the factors, as directions use it now."""
        return [self.averages(pair)[name] for name in self._made_names(pair)]

    def _renew(self, pairs: Sequence[Pair]) -> Iterator[Tensor]:
        for pair in pairs:
            *made, bad = self._recipe(pair)(*self._sources(pair))
            self._put_to_use(pair, made)
            yield bad

    def _sources(self, pair: Pair) -> list[Tensor]:
        """Both factors, and what was made of them before."""
        return [self._row_factor(pair), self._column_factor(pair), *self.in_use(pair)]

    @contextmanager
    def _handed_over(self, pairs: Sequence[Pair], makers: Mapping[int, int]) -> Iterator[None]:
        ranks = dist.get_process_group_ranks(self.processes.group)
        rows = {}
        for pair in pairs:
            for side, n in enumerate(pair.rule.shape[1:]):
                if (division := pair.division(side)) is not None:
                    own = local(self.averages(pair)[f"{SIDES[side]}_factor"]).view(-1, n)
                    rows[pair.number, side] = Rows(own, division, ranks[makers[pair.number]])
        self._assembled = {place: x.unsqueeze(0) for place, x in to_owners(rows).items()}
        try:
            yield
        finally:
            self._assembled = {}

    def _cost(self, pair: Pair) -> float:
        groups, rows, columns = pair.rule.shape
        return groups * sum(n**3 if pair.rule.is_whole(side) else n for side, n in enumerate((rows, columns)))

    def _task(self, pair: Pair, old: Sequence[Tensor]) -> tuple[Task, Sequence[Tensor]]:
        rows, columns = self._row_factor(pair), self._column_factor(pair)
        copies = rows.clone(), columns if columns is not self.averages(pair)["column_factor"] else columns.clone()
        return partial(self._recipe(pair), *copies, *old), (*copies, *old)

    def _recipe(self, pair: Pair) -> Callable[..., tuple[Tensor, ...]]:
        """What makes new tensors of both factors, taking the place of others: of those where a factor is of no use.

        It refers to nothing here, since it may run beside training; it returns how many factors were bad as well.
        """
        raise NotImplementedError

    def _put_to_use(self, pair: Pair, made: Sequence[Tensor]) -> None:
        for name, x in zip(self._made_names(pair), made, strict=True):
            self.state[pair.owner][name].copy_(x)

    def _row_factor(self, pair: Pair) -> Tensor:
        """That of the rows; of one that is divided its owner alone has all."""
        return self._assembled.get((pair.number, 0), self.averages(pair)["row_factor"])

    def _column_factor(self, pair: Pair) -> Tensor:
        """That of the columns, without what weight and bias have in common where they are stepped apart."""
        factor = self._assembled.get((pair.number, 1), self.averages(pair)["column_factor"])
        if not pair.rule.bias or pair.coupled is not False or factor.dim() == 2:
            return factor
        factor = factor.clone()
        corner = factor[:, -1, -1].clone()
        factor[:, -1, :] = 0
        factor[:, :, -1] = 0
        factor[:, -1, -1] = corner
        return factor

    # Directions.

    def set_aside(self, params: Collection[Parameter]) -> None:
        """Let these parameters, whose layers were not used, be served by others."""
        if self._aside != params:
            self._aside = frozenset(params)
            self.version += 1

    def serves(self, p: Parameter) -> bool:
        """Whether a parameter takes its direction from here."""
        return p in self.served and p not in self._aside

    def directions(self, pair: Pair, vectors: Vectors) -> Iterator[tuple[Parameter, Tensor]]:
        """F^-1 v for those parameters of a pair that have a vector and take their direction from here."""
        given = vectors.of_all(self.acting_of(pair))
        for bias, matrices in pair.given(given.get):
            for p, d in pair.split(self._apply(pair, matrices), bias):
                if p in given:
                    yield p, d

    # Directions of which each process makes its part, as exchanged.py has it.

    def by_rows(self, pair: Pair, rows: Tensor) -> Tensor:
        """Of rows (r, columns) of a vector what is then multiplied from the left."""
        raise NotImplementedError

    def by_columns(self, pair: Pair, columns: Tensor, here: slice) -> Tensor:
        """Of columns (rows, c) of that, those in ``here`` of all, what is then multiplied from the right."""
        raise NotImplementedError

    def by_rows_again(self, pair: Pair, rows: Tensor) -> Tensor:
        """Of rows of that those of the direction."""
        raise NotImplementedError

    def acting_of(self, pair: Pair) -> tuple[Parameter, ...]:
        """The parameters of a pair that take their directions from here."""
        if self._acting_as_of != self.version:
            self._acting = {pair.number: tuple(filter(self.serves, pair.params)) for pair in self.pairs}
            self._acting_as_of = self.version
        return self._acting[pair.number]

    def _apply(self, pair: Pair, matrices: Tensor) -> Tensor:
        """F^-1 of matrices (groups, rows, columns)."""
        return self.direction_of(pair, self.image(pair, matrices))

    def sides(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """What the image is made with: ``left @ matrices @ right``, a diagonal having two dimensions."""
        raise NotImplementedError

    def image(self, pair: Pair, matrices: Tensor) -> Tensor:
        """That part of F^-1 which is linear in matrices and the same until it is made anew; a new tensor."""
        return multiplied(*self.sides(pair), matrices)

    def direction_of(self, pair: Pair, image: Tensor) -> Tensor:
        """F^-1 of what has an image."""
        raise NotImplementedError


def multiplied(left: Tensor, right: Tensor, matrices: Tensor) -> Tensor:
    """``left @ matrices @ right``, where a factor of two dimensions is a diagonal."""
    if len(matrices) == 1 and left.dim() == right.dim() == 3:  # products of batches are slower on the CPU
        return (left[0] @ matrices[0] @ right[0]).unsqueeze(0)
    matrices = left.unsqueeze(2) * matrices if left.dim() == 2 else left @ matrices
    return matrices * right.unsqueeze(1) if right.dim() == 2 else matrices @ right


def on_the_left(factor: Tensor, matrix: Tensor) -> Tensor:
    """A factor of one group, (1, n, n) or (1, n), times a matrix."""
    return factor[0].unsqueeze(1) * matrix if factor.dim() == 2 else factor[0] @ matrix


def on_the_right(matrix: Tensor, factor: Tensor) -> Tensor:
    """A matrix times a factor of one group."""
    return matrix * factor if factor.dim() == 2 else matrix @ factor[0]


def in_runs(pairs: Sequence[Pair], numbers: Callable[[Pair], int], most: int) -> Iterator[list[Pair]]:
    """Pairs one after another, as many at a time as have no more numbers together than ``most``; one at least."""
    run: list[Pair] = []
    size = 0
    for pair in pairs:
        if run and size + numbers(pair) > most:
            yield run
            run, size = [], 0
        run.append(pair)
        size += numbers(pair)
    if run:
        yield run


def mean_eigenvalue(factor: Tensor) -> Tensor:
    """Of each matrix of a factor, or of each diagonal: (groups,)."""
    return (factor if factor.dim() == 2 else factor.diagonal(dim1=1, dim2=2)).mean(1)
