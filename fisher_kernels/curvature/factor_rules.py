"""How each layer type yields the Kronecker factors of its Fisher block, and how they lie on its parameters.

The weight of a layer is seen as matrices of (rows, columns), one for each group of a convolution, with the bias as one
more column. With h what the columns read, s the derivative by what the rows make times the number M of terms of the
loss, and R the rows of the batch (positions of a convolution), the Fisher block of a matrix is taken for the Kronecker
product of

- the column factor A, the sum of ``h h^T`` over all R, divided by M;
- the row factor G, the mean of ``s s^T`` over them.

So what counts is how many terms the loss has, not how many rows a layer happens to see, and a Linear on sequences has
the factors of a 1 x 1 convolution. ``terms`` counts them. In a transposed convolution the rows read and the columns
make. Normalisations and embeddings have the 2 x 2 and 1 x 1 blocks of ``block_rules``, in the same units.

Sources: Martens and Grosse, arXiv 1503.05671; convolutions: Grosse and Martens, arXiv 1602.01407; weight sharing
("expand", "reduce"): Eschenhagen et al., arXiv 2311.00636; second moments in the eigenbasis: George et al., arXiv
1806.03884.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels.curvature.block_rules import (
    CHUNK,
    BlockRule,
    Blocks,
    EmbeddingBlocks,
    NormBlocks,
    Sharing,
    WeightUses,
    add_outer_products,
    bias_gradients,
)
from fisher_kernels.curvature.rules import (
    NORMS,
    Sums,
    has_bias,
    is_transposed_linear,
    padded_input,
    transposed_windows,
    unsqueeze_batch,
)
from fisher_kernels.curvature.terms import Terms
from fisher_kernels.ops import ACCUMULATOR, column_sum_of_squares, conv_gram_

# What the rules of one optimizer share.


class Basis(NamedTuple):
    """The eigenvectors of both factors of a layer, (groups, n, n); None for a diagonal factor, which needs none."""

    rows: Tensor | None
    columns: Tensor | None


class Context:
    """What the rules of one optimizer share beside their settings. A copy begins anew: it serves other weights.

    Attributes:
        terms: of its losses.
        bases: identity of a weight, and of each operation on it -> the basis in which its second moments are taken,
            once there is one.
    """

    def __init__(self) -> None:
        self.terms = Terms()
        self.bases: dict[int, Basis] = {}

    def basis_of(self, operation: Any) -> Basis | None:
        """That of an operation's weight. One that was gathered for this pass is another tensor than what is held."""
        found = self.bases.get(id(operation._parameters["weight"]))
        return self.bases.get(id(operation)) if found is None else found

    def __reduce__(self) -> tuple[Any, ...]:
        return Context, ()


@dataclass(frozen=True)
class Factoring:
    """The settings that rules depend on.

    Attributes:
        sequence: ``"expand"`` or ``"reduce"``.
        loss_reduction: ``"mean"`` or ``"sum"``.
        widest: size up to which a factor is a whole matrix; a wider one is diagonal.
        moments: whether second moments of per-sample gradients are taken in the basis of the factors.
    """

    sequence: str
    loss_reduction: str
    widest: int
    moments: bool

    @property
    def sharing(self) -> Sharing:
        """The same, for the rules of blocks."""
        return Sharing("shared", "expand", self.loss_reduction)


class Means(NamedTuple):
    """The statistics of one layer in the units of F, the mean over the terms of the loss.

    Attributes:
        terms: how many, of shape (1,).
        blocks: of block rules, with the numbers of samples.
        rows, columns: the factors, or their diagonals, end to end; empty where there were no rows.
        moments: second moments in the basis of the factors, where there is one.
    """

    terms: Tensor
    blocks: Sums
    rows: Tensor | None = None
    columns: Tensor | None = None
    moments: Tensor | None = None


# Rules.


class TermRule(BlockRule):
    """Base of all rules: the last of their raw sums is the number of terms of the loss.

    Attributes:
        factoring: the settings.
        context: what is shared with the other rules.
    """

    factoring: Factoring
    context: Context

    def _bind(self, factoring: Factoring, context: Context, powers: tuple[int, ...] = ()) -> None:
        """Complete what the base has set up with blocks alone."""
        self.factoring, self.context = factoring, context
        self.powers = (*self.powers, *powers, 0)
        self.together = False

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        terms = self._count(module, module, grad)
        sums = super().contribute(module, captured, sizes, grad)
        return Sums([*sums.vectors, terms], [*sums.counts, 1])

    def _count(self, operation: Any, whole: Any, grad: Tensor) -> Tensor:
        return self.context.terms.count(self._key(whole), operation, grad)

    def _key(self, module: Any) -> tuple[Any, ...]:
        """What the sums of a layer are of."""
        return id(module._parameters["weight"]), type(self)

    def sum_lengths(self, module: Any) -> list[int | None]:
        return [*super().sum_lengths(module), 1]

    def without_use(self, lengths: Sequence[int]) -> list[Tensor]:
        # Its terms are some of those of the loss, whether or not their rows have come to the layer.
        return [*super().without_use(lengths[:-1]), self.context.terms.pending()]

    def forget(self, last: int) -> None:
        self.context.terms.forget(last)

    def complete(self, sums: Sums, module: nn.Module) -> None:
        terms = sums.vectors[-1]
        terms.copy_(torch.maximum(terms, self.context.terms.pending(self._key(module)).to(terms)))

    def divisors(self, sums: Sums) -> list[float]:
        return [1.0] * len(sums.vectors)  # of the blocks of means

    def _of_blocks(self, sums: Sums) -> Sums:
        """Sums of squared derivatives as means over terms: a square of a mean loss's derivative hides 1 / M twice."""
        terms, n = sums.vectors[-1], len(self.blocks)
        by_terms = torch.mul if self.factoring.loss_reduction == "mean" else torch.div
        return Sums([by_terms(v, terms.to(v)) for v in sums.vectors[:n]], sums.counts[:n])

    def means(self, sums: Sums) -> Means:
        """Raw sums in the units of F."""
        return Means(sums.vectors[-1], self._of_blocks(sums))


class NormTerms(TermRule, NormBlocks):
    """Scale and shift of a normalisation: one 2 x 2 block a channel, 1 x 1 without a shift."""

    def __init__(self, factoring: Factoring, context: Context, channels: int, bias: bool) -> None:
        super().__init__(factoring.sharing, channels, bias)
        self._bind(factoring, context)


class EmbeddingTerms(TermRule, EmbeddingBlocks):
    """Embedding: 1 x 1 blocks, from the gradient of each sample."""

    def __init__(self, factoring: Factoring, context: Context, shape: tuple[int, int]) -> None:
        super().__init__(factoring.sharing, shape)
        self._bind(factoring, context)


class Elementwise(TermRule):
    """What has no factors, where nothing but the terms is wanted of it."""

    name: ClassVar[str] = "element-wise"
    keeps_input = False
    needs_uses = False

    def __init__(self, factoring: Factoring, context: Context) -> None:
        super().__init__(factoring.sharing, ())
        self._bind(factoring, context)

    def capture(self, module: Any, x: Tensor) -> tuple[list[Tensor], list[int]]:
        return [], []

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        return Sums([self._count(module, module, grad)], [1])


class FactorRule(TermRule):
    """Base of the rules of layers with Kronecker factors.

    The raw sums are those of ``blocks``, of both factors, of second moments if they are wanted, and the terms.

    Args:
        matrices: groups, rows and columns of the weight.
        bias: whether there is one more column, for a bias; a use without one leaves it zero.
        blocks: of what has no part in the factors.

    Attributes:
        shape: groups, rows, and columns with the bias.
        bias: whether the last column is a bias.
        transposed: whether the weight is (columns, rows).
    """

    rows_make: ClassVar[bool] = True
    """Whether the derivative runs over the rows; it runs over the columns else."""

    def __init__(
        self,
        factoring: Factoring,
        context: Context,
        matrices: tuple[int, int, int],
        bias: bool,
        blocks: tuple[Blocks, ...] = (),
        transposed: bool = False,
    ) -> None:
        super().__init__(factoring.sharing, blocks)
        groups, rows, columns = matrices
        self.shape, self.bias, self.transposed = (groups, rows, columns + bias), bias, transposed
        degrees = (2, 0) if self.rows_make else (0, 2)
        self._bind(factoring, context, degrees + ((2,) if factoring.moments else ()))

    @property
    def layout(self) -> Any:
        return type(self), self.shape, self.bias, self.transposed

    def is_whole(self, side: int) -> bool:
        """Whether the factor of the rows (0) or of the columns (1) is a whole matrix, not a diagonal."""
        return self.shape[1 + side] <= self.factoring.widest

    def factor_shape(self, side: int) -> tuple[int, ...]:
        """(groups, n, n), or (groups, n) for a diagonal."""
        n = self.shape[1 + side]
        return (self.shape[0], n, n) if self.is_whole(side) else (self.shape[0], n)

    def sum_lengths(self, module: Any) -> list[int | None]:
        lengths: list[int | None] = [blocks.numel for blocks in self.blocks]
        lengths += [math.prod(self.factor_shape(side)) for side in (0, 1)]
        return [*lengths, *([math.prod(self.shape)] if self.factoring.moments else []), 1]

    def samples(self, operation: Any, x: Tensor, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of the batch: what meets the rows and the columns of the weight, (samples, positions, groups, n).

        Second moments are those of the sums over the positions of a sample.
        """
        raise NotImplementedError

    def rows(self, operation: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor] | None:
        """What each row of the batch made, (R, rows), and read, (R, columns): the gradient is ``made.T @ read``.

        None where it is no such product, as with several groups.
        """
        return None

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        return self._contribute_to(module, captured[0], grad, module, self._count(module, module, grad))

    def _contribute_to(self, operation: Any, x: Tensor, grad: Tensor, whole: Any, terms: Tensor) -> Sums:
        wide = ACCUMULATOR[torch.promote_types(x.dtype, grad.dtype)]
        factors = [grad.new_zeros(self.factor_shape(side), dtype=wide) for side in (0, 1)]
        basis = self.context.basis_of(whole) if self.factoring.moments else None
        moments = [grad.new_zeros(self.shape, dtype=wide)] if self.factoring.moments else []
        count = self._add(operation, x, grad, factors, moments, basis) if grad.numel() else 0
        blocks = self._block_sums(operation, grad)
        vectors = [*blocks.vectors, *(f.flatten() for f in factors), *(v.flatten() for v in moments), terms]
        seen = [0 if basis is None else count] * len(moments)
        return Sums(vectors, [*blocks.counts, count, count, *seen, 1])

    def _add(
        self, operation: Any, x: Tensor, grad: Tensor, factors: list[Tensor], moments: list[Tensor], basis: Basis | None
    ) -> int:
        """Add a batch to both factors, and to second moments if there is a basis; returns the number of its rows."""
        count = 0
        for sides in self.samples(operation, x, grad):
            count += sides[0].shape[0] * sides[0].shape[1]
            for factor, side in zip(factors, sides, strict=True):
                _add_gram(factor, side.flatten(0, 1).to(factor.dtype))
            if basis is not None:
                _add_moments(moments[0], *sides, basis)
        return count

    def _block_sums(self, operation: Any, grad: Tensor) -> Sums:
        """The raw sums of what has no part in the factors."""
        return Sums([], [])

    def means(self, sums: Sums) -> Means:
        n, terms = len(self.blocks), sums.vectors[-1]
        rows, columns, *moments = sums.vectors[n:-1]
        count, _, *seen = sums.counts[n:-1]
        if not count:
            return Means(terms, self._of_blocks(sums))
        mean = self.factoring.loss_reduction == "mean"
        made, read = (rows, columns) if self.rows_make else (columns, rows)
        made = made * (terms.square() / count) if mean else made / count
        read = read / terms
        rows, columns = (made, read) if self.rows_make else (read, made)
        second = None
        if moments and seen[0]:
            second = moments[0] * terms if mean else moments[0] / terms
        return Means(terms, self._of_blocks(sums), rows, columns, second)

    # How it lies on the parameters.

    def to_matrices(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (groups, rows, columns without that of the bias)."""
        groups, rows, columns = self.shape
        if self.transposed:
            return weight.reshape(columns - self.bias, rows).t().unsqueeze(0)
        return weight.reshape(groups, rows, columns - self.bias)

    def from_matrices(self, matrices: Tensor, like: Tensor) -> Tensor:
        """Undoes :meth:`to_matrices`."""
        return (matrices[0].t() if self.transposed else matrices).reshape(like.shape)


def _add_gram(out: Tensor, v: Tensor) -> None:
    """Add the outer products of v (samples, groups, n) to out (groups, n, n), or their diagonals to out (groups, n)."""
    if out.dim() == 2:
        out += column_sum_of_squares(v.flatten(1)).view_as(out)
    else:
        add_outer_products(out, v, Blocks((), *out.shape[:2]))


def rotated(x: Tensor, basis: Tensor | None) -> Tensor:
    """Vectors (..., groups, n) in a basis (groups, n, n)."""
    return x if basis is None else torch.einsum("...gi,gij->...gj", x.to(basis.dtype), basis)


def _add_moments(out: Tensor, rows: Tensor, columns: Tensor, basis: Basis) -> None:
    """Add the squares of per-sample gradients in a basis to out (groups, rows, columns)."""
    rows, columns = rotated(rows.to(out.dtype), basis.rows), rotated(columns.to(out.dtype), basis.columns)
    if rows.shape[1] == 1:
        out += torch.einsum("ngr,ngc->grc", rows[:, 0].square(), columns[:, 0].square())
        return
    step = max(1, CHUNK // out.numel())
    for r, c in zip(rows.split(step), columns.split(step), strict=True):
        out += torch.einsum("ntgr,ntgc->ngrc", r, c).square_().sum(0)


class LinearFactors(FactorRule):
    """Linear, and Hugging Face's Conv1D: h is the input, [h, 1] with a bias.

    ``"expand"`` takes every row for a sample, ``"reduce"`` the mean of its inputs and the sum of its derivatives.
    """

    name: ClassVar[str] = "linear"

    def __init__(
        self, factoring: Factoring, context: Context, shape: tuple[int, int], bias: bool, transposed: bool
    ) -> None:
        outputs, inputs = reversed(shape) if transposed else shape
        super().__init__(factoring, context, (1, outputs, inputs), bias, transposed=transposed)
        self.of_samples = factoring.sequence == "reduce"
        self.takes_parts = not self.of_samples and not transposed

    def samples(self, operation: Any, x: Tensor, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if self.factoring.sequence == "reduce" and grad.dim() > 2:
            wide = ACCUMULATOR[torch.promote_types(x.dtype, grad.dtype)]
            x = x.reshape(len(x), -1, x.shape[-1]).mean(1, dtype=wide)
            grad = grad.reshape(len(grad), -1, grad.shape[-1]).sum(1, dtype=wide)
        made, read = self.rows(operation, x, grad)
        yield made[:, None, None], read[:, None, None]

    def rows(self, operation: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if self.bias:
            x = F.pad(x, (0, 1), value=float(has_bias(operation)))
        return grad, x

    def contribute_part(
        self, operation: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor, start: int, whole: Any
    ) -> Sums:
        terms = self._count(operation, whole, grad)  # of the features that it has
        grad = F.pad(grad, (start, self.shape[1] - start - grad.shape[-1]))
        return self._contribute_to(operation, captured[0], grad, whole, terms)


class ConvFactors(FactorRule):
    """Conv1d/2d/3d: h is the patch that a position reads, [h, 1] with a bias; every group has factors of its own.

    The factor of the patches is made without unfolding them. A diagonal one, and second moments, unfold a few samples
    at a time.
    """

    name: ClassVar[str] = "conv"

    def __init__(self, factoring: Factoring, context: Context, shape: Sequence[int], groups: int, bias: bool) -> None:
        super().__init__(factoring, context, (groups, shape[0] // groups, math.prod(shape[1:])), bias)

    def geometry(self, operation: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Any]:
        """What has a number for each position and row of the weight, what the patches are of, and its padding.

        Both are (samples, channels, positions...); the padding is (before, after) of each spatial dimension, or 0.
        """
        x, padding = padded_input(operation, x)
        return unsqueeze_batch(grad, len(operation.kernel_size)), x, padding

    def _add(
        self, operation: Any, x: Tensor, grad: Tensor, factors: list[Tensor], moments: list[Tensor], basis: Basis | None
    ) -> int:
        rows, images, padding = self.geometry(operation, x, grad)
        whole, positions = self.is_whole(1), math.prod(rows.shape[2:])
        if whole:
            self._add_patches(operation, images, padding, factors[1])
        unfolds = not whole or basis is not None
        numbers = positions * self.shape[0] * (self.shape[2] if unfolds else self.shape[1])
        step = max(1, CHUNK // max(1, numbers))
        for some, piece in zip(rows.split(step), images.split(step), strict=True):
            made = self._channels(some)
            _add_gram(factors[0], made.flatten(0, 1).to(factors[0].dtype))
            if unfolds:
                read = self._patches(operation, piece, padding)
                if not whole:
                    _add_gram(factors[1], read.flatten(0, 1).to(factors[1].dtype))
                if basis is not None:
                    _add_moments(moments[0], made, read, basis)
        return len(rows) * positions

    def _add_patches(self, operation: Any, images: Tensor, padding: Any, factor: Tensor) -> None:
        """Add the outer products of the patches to their factor, (groups, n, n)."""
        bias = self.bias and has_bias(operation)
        part = factor if bias or not self.bias else torch.zeros_like(factor[:, :-1, :-1]).contiguous()
        # Numbers of 16 bits are read as they are and summed in float32.
        images = images if ACCUMULATOR[images.dtype] == factor.dtype else images.to(factor.dtype)
        conv_gram_(
            part,
            images,
            operation.kernel_size,
            operation.stride,
            padding,
            operation.dilation,
            operation.groups,
            bias,
            1.0,
        )
        if part is not factor:  # a use without a bias of a weight that has one elsewhere
            factor[:, :-1, :-1] += part

    def rows(self, operation: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.shape[0] > 1 or not self.rows_make:
            return None
        made, images, padding = self.geometry(operation, x, grad)
        return self._channels(made).flatten(0, 2), self._patches(operation, images, padding).flatten(0, 2)

    def _patches(self, operation: Any, images: Tensor, padding: Any) -> Tensor:
        """The patches of some samples, with a 1 behind each if there is a bias."""
        columns = patches(operation, images, padding)
        return F.pad(columns, (0, 1), value=float(has_bias(operation))) if self.bias else columns

    def _channels(self, x: Tensor) -> Tensor:
        """(samples, channels, positions...) as (samples, positions, groups, channels of a group)."""
        return x.flatten(2).unflatten(1, (self.shape[0], -1)).permute(0, 3, 1, 2)


class ConvTransposeFactors(ConvFactors):
    """ConvTranspose1d/2d/3d: rows are input channels, columns the patch that a position makes; the bias is apart."""

    name: ClassVar[str] = "conv, transposed"
    rows_make: ClassVar[bool] = False

    def __init__(self, factoring: Factoring, context: Context, shape: Sequence[int], groups: int, bias: bool) -> None:
        blocks = (Blocks(("bias",), shape[1] * groups, 1),) if bias else ()
        matrices = (groups, shape[0] // groups, math.prod(shape[1:]))
        FactorRule.__init__(self, factoring, context, matrices, False, blocks)

    def geometry(self, operation: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Any]:
        spatial = len(operation.kernel_size)
        x, grad = unsqueeze_batch(x, spatial), unsqueeze_batch(grad, spatial)
        windows, padding = transposed_windows(operation, x.shape[2:], grad)
        return x, windows, padding if any(map(any, padding)) else 0

    def _block_sums(self, operation: Any, grad: Tensor) -> Sums:
        if not self.blocks:
            return Sums([], [])
        grad = unsqueeze_batch(grad, len(operation.kernel_size))
        return Sums([column_sum_of_squares(bias_gradients(operation, grad))], [grad.shape[0]])


def patches(module: Any, x: Tensor, padding: Any) -> Tensor:
    """What each position of a convolution reads: (samples, positions, groups, channels of a group x offsets).

    Args:
        x: with its batch dimension.
        padding: (before, after) of each spatial dimension, or 0.
    """
    spatial = len(module.kernel_size)
    if padding != 0:
        x = F.pad(x, [n for pair in reversed(padding) for n in pair])
    for d, (size, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + d, dilation * (size - 1) + 1, stride)[..., ::dilation]
    x = x.unflatten(1, (module.groups, -1))
    positions, offsets = range(3, 3 + spatial), range(3 + spatial, 3 + 2 * spatial)
    x = x.permute(0, *positions, 1, 2, *offsets)
    return x.reshape(len(x), math.prod(x.shape[1 : 1 + spatial]), module.groups, -1)


class FactorRules(WeightUses):
    """The rules of the layers of a model.

    A weight that is used in several ways, by an Embedding and a Linear or by Linears in both orientations, has the
    factors of the Linear: those of the other uses lie on other sides of it, and a sum of Kronecker products is none.
    They are left out, which :meth:`left_out` tells.
    """

    def __call__(self, module: Any, factoring: Factoring, context: Context) -> TermRule | None:
        """The rule that serves a module, or None."""
        weight = module._parameters.get("weight")
        if weight is None:
            return None
        uses = self.of(module)
        if self.leaves_out(module):
            return None
        bias = any(has_bias(use) for use in uses if _kind(use) == _kind(module))
        if isinstance(module, nn.Linear) or is_transposed_linear(module):
            return LinearFactors(factoring, context, weight.shape, bias, is_transposed_linear(module))
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            return ConvTransposeFactors(factoring, context, weight.shape, module.groups, bias)
        if isinstance(module, nn.modules.conv._ConvNd):
            return ConvFactors(factoring, context, weight.shape, module.groups, bias)
        if isinstance(module, NORMS):
            return NormTerms(factoring, context, weight.numel(), bias)
        if isinstance(module, nn.Embedding):
            return EmbeddingTerms(factoring, context, weight.shape)
        return None

    def leaves_out(self, module: Any) -> bool:
        """Whether the weight of a module has the factors of another of its uses."""
        return min(map(_kind, self.of(module))) < _kind(module)

    def left_out(self, module: Any) -> list[str]:
        """The classes of the other uses of the weight of a module that have no part in its statistics."""
        # What a user's class does with its weight is seen as the functions that it calls.
        others = (use for use in self.of(module) if _kind(module) != _kind(use) < len(_KINDS))
        return list(dict.fromkeys(type(use).__name__ for use in others))


def has_rows(module: Any) -> bool:
    """Whether a module is of a class whose outputs are rows of features, as all that have a rule here are."""
    known = _kind(module) < len(_KINDS) or is_transposed_linear(module)
    return known and module._parameters.get("weight") is not None


_KINDS: tuple[Any, ...] = (
    nn.Linear,
    (),
    nn.modules.conv._ConvTransposeNd,
    nn.modules.conv._ConvNd,
    NORMS,
    nn.Embedding,
)


def _kind(module: Any) -> int:
    """The number of the kind of a layer; of the kinds that share a weight the one with the lowest has factors."""
    if is_transposed_linear(module):
        return 1
    return next((number for number, kind in enumerate(_KINDS) if isinstance(module, kind)), len(_KINDS))
