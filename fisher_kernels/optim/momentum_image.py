r"""The momentum as the factors see it, carried on from step to step in place of products of large matrices.

The direction of a layer takes :math:`X = L\, m\, R`, with m of shape (O, I): K-FAC's inverses on both sides, or EKFAC's
bases. Between two renewals L and R stay as they are, so X follows the recursion of m:

.. math::

    m \leftarrow \mu m + g, \qquad g = c\, S^T H
    \qquad \Longrightarrow \qquad
    X \leftarrow \mu X + c\, (S L^T)^T (H R)

where the R rows of the batch read H and have the derivatives S. That takes R (O^2 + I^2 + O I) operations in place of
O I (O + I). Where L or R is new, in the turns of a group, X is made of m itself, so that rounding does not add up.
X stays in float32 where m is kept in 16 bits: until it is made anew it has none of the roundings of m since then.

The gradient is whatever ``.grad`` has when the step begins, and rows are what hooks have seen: clipping and loss scales
are between the two, and may be other losses, hooks on gradients, other processes or functions on the weight. So in
every step g is compared with c S^T H. Both are multiplied by a random vector v, which takes O I operations; c is that
of least squares. Where they differ by more than rounding X is made of m in this step. So it is where the step is no
sum of the two, since elements stay or decay enters the gradient.

The random vector follows from the number of the step, and X is part of the state, so a state that is loaded goes on to
the bit. There is room for X from the beginning, and a number that says whether it is that of the momentum beside it:
torch.distributed.checkpoint loads what is there before.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fisher_kernels.curvature.factor_rules import TermRule
from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.curvature.rows import Piece, Rows, Watched
from fisher_kernels.curvature.sites import versions_of
from fisher_kernels.curvature.statistics import Statistics
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.ops._arguments import lacks_memory
from fisher_kernels.optim.kronecker_factors import KroneckerFactors, Pair

IMAGE = "momentum_image"
"""State of the owner of a layer's factors: X, (1, rows, columns)."""

HOLDS = "image_holds"
"""State beside it: 1 where X is that of the momentum, 0 where it is of no use, ()."""

SHARE = 0.5
"""Of the operations of the dense product, how many rows may take at most."""

LEAST = 4_000_000
"""Multiplications of the dense product below which it takes less time than everything around the other one."""

SPREAD = 8.0
"""How many standard deviations of its rounding error the difference of both products may be."""


class MomentumImages:
    """The images of the layers that are large enough.

    Args:
        factors: what the images are made with.
        statistics: of the layers, by whose sites the factors are numbered.
        state, groups: of the optimizer.
        moment: name of the momentum in the state.

    Attributes:
        rows: what the hooks keep until the step.
    """

    def __init__(
        self,
        factors: KroneckerFactors,
        statistics: Statistics[TermRule],
        state: MutableMapping[Tensor, Any],
        groups: Mapping[Parameter, dict[str, Any]],
        moment: str,
    ) -> None:
        self._factors, self._statistics, self._moment = factors, statistics, moment
        self._state, self._groups = state, groups
        self._pairs: dict[int, Pair] = {}
        watched = {}
        for index, site in enumerate(statistics.sites):
            pair = factors.pair_of(index)
            if pair is not None and (most := _most_rows(pair)) and pair.weight is not None:
                self._pairs[pair.number] = pair
                watched[pair.number] = Watched(site, pair.weight, pair.rule.shape[1], most)
        self.rows = Rows(watched if statistics.open else {}, statistics.accumulates)
        for pair in factors.pairs:
            if pair.number not in self._pairs and pair.owner in state:
                for name in (IMAGE, HOLDS):
                    state[pair.owner].pop(name, None)
        # What each image was made of, with how often that had been written to. An image that is loaded is of the
        # momentum and the factors that are loaded with it.
        loaded = [pair for pair in self._pairs.values() if state.get(pair.owner, {}).get(HOLDS, 0)]
        self._made_of = {pair.number: self._sources(pair) for pair in loaded}
        self._due: Collection[int] = ()
        self._uses: dict[int, list[Piece]] = {}
        self._old: dict[int, Tensor | None] = {}  # of layers that had an image; None where it is of no use any more
        self._grad_scale: Tensor | None = None
        self._drawn: tuple[int, Tensor] | None = None

    def arm(self, due: Collection[int]) -> None:
        """Let the hooks keep what the next step needs, in which the groups in ``due``, by identity, have a turn."""
        self._uses, self._old = {}, {}
        self.rows.wanted = frozenset(
            number
            for number, pair in self._pairs.items()
            if id(self._groups[pair.owner]) not in due and self._applies(pair)
        )

    def make_room(self) -> None:
        """Make the state of images that there may be, of parameters that have a momentum."""
        for pair in self._pairs.values():
            state, group = self._state.get(pair.owner, {}), self._groups[pair.owner]
            if self._moment in state and HOLDS not in state and group["directions"] == "auto":
                dtype, device = ACCUMULATOR[pair.owner.dtype], pair.owner.device
                state[IMAGE] = torch.zeros(pair.rule.shape, dtype=dtype, device=device)
                state[HOLDS] = torch.zeros((), dtype=dtype, device=device)

    def begin(self, due: Collection[int], grad_scale: Tensor | None) -> None:
        """Take up what there is before the momentum advances, in a step in which the groups in ``due`` have a turn.

        No image is said to hold until the step has come to its layer: one that ends in an error leaves none that is not
        of the momentum beside it.

        Args:
            grad_scale: what gradients will be divided by.
        """
        self._uses, self._due, self._old, self._grad_scale = self.rows.take(), due, {}, grad_scale
        for number, pair in self._pairs.items():
            state = self._state.get(pair.owner, {})
            if not state.get(HOLDS, 0):
                continue
            same = not self._has_turn(pair) and self._applies(pair) and self._is_as_made(pair)
            advances = any(p.grad is not None for p in pair.params)
            if advances or not same:
                state[HOLDS].zero_()
                if advances:
                    self._old[number] = state[IMAGE] if same else None

    def directions(
        self, vectors: Mapping[Parameter, Tensor], stays: Collection[Parameter]
    ) -> Iterator[tuple[Parameter, Tensor]]:
        """The directions of layers that have an image, or get one, when the momentum has advanced.

        Args:
            vectors: the momentum of the parameters that are stepped.
            stays: those of which elements stay where they are.
        """
        for number, pair in self._pairs.items():
            whole = all(p in vectors and p not in stays for p in pair.params)
            pieces = self._uses.pop(number, None) if whole else None
            # In a turn there are no rows: what had an image is worth a new one.
            if not whole or not (pieces or (number in self._old and self._has_turn(pair))) or not self._applies(pair):
                continue
            image = self._old.pop(number, None)
            if pieces is None or image is None or not self._advance(pair, image, pieces):
                image = self._factors.image(pair, pair.matrices(vectors.get))
            state = self._state[pair.owner]
            state[IMAGE] = image
            state[HOLDS].fill_(1)
            self._made_of[number] = self._sources(pair)
            yield from pair.split(self._factors.direction_of(pair, image))

    def _has_turn(self, pair: Pair) -> bool:
        return id(self._groups[pair.owner]) in self._due

    def _applies(self, pair: Pair) -> bool:
        """Whether the image follows the momentum, as the settings are."""
        first = self._groups[pair.owner]
        for p in pair.params:
            group = self._groups[p]
            if group["directions"] != "auto" or (group["weight_decay"] and not group["decoupled"]):
                return False
            if any(group[name] != first[name] for name in ("momentum", "maximize")):
                return False
            if not p.requires_grad or not self._factors.serves(p):
                return False
        return self._factors.is_known(pair) and not self._has_company()

    def _has_company(self) -> bool:
        """Whether gradients are those of several processes, of whose rows this one has its own."""
        return self._statistics.processes.count > 1

    def _sources(self, pair: Pair) -> tuple[list[Tensor], list[int]]:
        moments = [m for p in pair.params if (m := self._state.get(p, {}).get(self._moment)) is not None]
        tensors = [*moments, *self._factors.in_use(pair)]
        return tensors, versions_of(tensors)

    def _is_as_made(self, pair: Pair) -> bool:
        """Whether momentum and factors are those that the image was made of."""
        if (made_of := self._made_of.get(pair.number)) is None:
            return False
        (then, versions), (now, versions_now) = made_of, self._sources(pair)
        return versions == versions_now and all(x is y for x, y in zip(then, now, strict=True))

    # One step.

    def _advance(self, pair: Pair, image: Tensor, pieces: Sequence[Piece]) -> bool:
        """Take the rows of a step into an image, in place; whether they are those of the gradient."""
        if any(lacks_memory(x) for piece in pieces for x in (piece.x, piece.grad)):
            return False
        found = [pair.rule.rows(*piece) for piece in pieces]
        sides = [side for side in found if side is not None]
        if len(sides) < len(found):
            return False
        made, read = (torch.cat(side) for side in zip(*sides, strict=True))
        scale = self._scale_of(pair, made, read)
        if scale is None:
            return False
        group, (left, right) = self._groups[pair.owner], self._factors.sides(pair)
        scale = -scale if group["maximize"] else scale
        scale = scale if self._grad_scale is None else scale / float(self._grad_scale)
        made, read = _through(made, left.mT if left.dim() == 3 else left), _through(read, right)
        image[0].addmm_(made.mT, read, beta=float(group["momentum"]), alpha=scale)
        return True

    def _scale_of(self, pair: Pair, made: Tensor, read: Tensor) -> float | None:
        r"""The number c with :math:`g = c\, S^T H`, or None where there is none but for rounding.

        With the signs of v random, :math:`|H \operatorname{diag}(v)|` (Frobenius) is the root mean square of what each
        row makes of v, and of its partial sums; so in row i no sum that is rounded is larger than
        :math:`|S_{:,i}|\, |H \operatorname{diag}(v)|` at a typical draw. A sum of n terms, each rounding of the size of
        eps / 2 beside it and of either sign, is off by :math:`\sqrt n\, \mathrm{eps} / 2` of that (Higham and Mary,
        2019). There are two sums over the rows, in g and in S^T (H v), and two over the columns, in g v and in H v.
        """
        weight, *biases = pair.params
        assert weight.grad is not None
        columns = read.shape[1]
        v = self._probe(pair).to(read.dtype)[:columns]
        seen = pair.rule.to_matrices(weight.grad)[0] @ v[: columns - len(biases)]
        for bias in biases:
            assert bias.grad is not None
            seen = seen + bias.grad.reshape(-1) * v[-1]
        expected = (made.mT @ (read @ v)).double()
        seen = seen.double()
        square = float(expected @ expected)
        scale = float(expected @ seen) / square if square > 0 else 0.0
        if not math.isfinite(scale):
            return None
        lengths = made.double().square().sum(0).sqrt()  # a quarter of the time of a norm along the columns
        lengths *= torch.linalg.vector_norm(read * v, dtype=torch.float64)
        rounding = torch.finfo(read.dtype).eps * (math.sqrt(len(read)) + math.sqrt(columns))
        bound = lengths * (SPREAD * rounding * abs(scale))
        return scale if bool(((seen - scale * expected).abs() <= bound).all()) else None

    def _probe(self, pair: Pair) -> Tensor:
        """A random vector of this step, as long as any row; its entries are of magnitude 1 to 2.

        None is near zero, so that a single element of the gradient that is another one is always seen. The random
        numbers of torch are left alone.
        """
        step = self._groups[pair.owner]["iteration"]
        if self._drawn is None or self._drawn[0] != step:
            longest = max(pair.rule.shape[2] for pair in self._pairs.values())
            generator = torch.Generator("cpu").manual_seed(step)
            drawn = 2 * torch.rand(longest, generator=generator, dtype=torch.float64, device="cpu") - 1
            self._drawn = step, drawn + drawn.sign()
        return self._drawn[1]


def _through(rows: Tensor, factor: Tensor) -> Tensor:
    """Rows (R, n) times a factor of one group, (1, n, n), or (1, n) for a diagonal."""
    return rows * factor if factor.dim() == 2 else rows @ factor[0]


def _most_rows(pair: Pair) -> int:
    """With how many rows the image of a layer is made in fewer operations; 0 where it is never worth it.

    On a GPU it never is: the host would have to wait to learn whether the rows are those of the gradient.
    """
    (groups, rows, columns), owner = pair.rule.shape, pair.owner
    if (
        is_distributed(owner)
        or groups > 1
        or not pair.rule.rows_make
        or not owner.is_cpu
        or owner.dtype not in (torch.float32, torch.float64)
    ):
        return 0
    if pair.weight is None or len(pair.biases) != pair.rule.bias:
        return 0
    left, right = (n if pair.rule.is_whole(side) else 1 for side, n in enumerate((rows, columns)))
    dense = rows * columns * (left + right)
    return int(SHARE * dense / (rows * left + columns * right + rows * columns)) if dense >= LEAST else 0
