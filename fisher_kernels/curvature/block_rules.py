"""How each layer type yields the mini-blocks of its empirical Fisher matrix, and how they lie on its parameters.

A block is the mean over samples of the outer product of the gradient of one small group of weights:

- convolutions: one n x n block for each pair of an output and an input channel, n being the kernel's size;
- Linear: [weight, bias] row by row, one block for all rows (``"shared"``), one for each (``"per_output"``), or shared
  blocks of so many columns (an integer);
- normalisations: one 2 x 2 block of scale and shift for each channel, from the gradient of the normalised input;
- Embedding, and the bias of a convolution: 1 x 1 blocks.

Source: MBF, arXiv 2202.04124; weight sharing ("expand", "reduce"): arXiv 2311.00636.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from fisher_kernels.curvature.operations import Operations
from fisher_kernels.curvature.rules import (
    NORMS,
    Rule,
    Sums,
    Use,
    has_bias,
    is_transposed_linear,
    padded_input,
    transposed_windows,
    unsqueeze_batch,
)
from fisher_kernels.ops import (
    ACCUMULATOR,
    batch_norm_gradients,
    channel_sum_of_squares,
    column_sum_of_squares,
    conv_mini_block_gram_,
    mini_block_gram_,
    weighted_gram_,
)

SMALL = 64
"""Blocks of up to this size are many and small; larger ones are few and large, and go to matrix products."""

CHUNK = 1 << 22
"""How many numbers of per-sample gradients are held at once."""


WIDEST = 8192
"""Columns up to which the rows of a Linear share one block by default: a wider one is cut."""

CUT = 1024
"""Columns of the shared blocks that it is cut into."""

PIECE = 1 << 15
"""How many numbers of an activation are worked on at once, where that needs memory of its own."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of one or two parameters of a layer.

    Attributes:
        roles: of the parameters; two lie side by side, as the rows of [weight, bias].
        count: of blocks.
        size: of a block; it is size x size.
        shared_by: how many rows share the blocks. Block s then acts on columns s * size and following of every row,
            and the last one may reach beyond them. None where each block has entries of its own.
        columns: of such a row.
        transposed: the weight is seen as its transpose.
    """

    roles: tuple[str, ...]
    count: int
    size: int
    shared_by: int | None = None
    columns: int = 0
    transposed: bool = False

    @property
    def rows(self) -> int:
        return self.shared_by or 1

    @property
    def last_column(self) -> tuple[int, int]:
        """Block and column of the last column of a row that shares blocks: the bias of joint ones."""
        return divmod(self.columns - 1, self.size) if self.shared_by else (0, self.size - 1)

    @property
    def numel(self) -> int:
        return self.count * self.size**2

    def __str__(self) -> str:
        blocks = "1 block" if self.count == 1 else f"{self.count:,} blocks"
        shared = f", shared by {self.shared_by:,} rows" if self.shared_by else ""
        return f"{blocks} of {self.size} x {self.size}{shared}"


@dataclass(frozen=True)
class Sharing:
    """How weights that meet many rows of one sample are treated, and how blocks divide a Linear layer."""

    linear_blocks: str | int
    sequence: str
    loss_reduction: str


class BlockRule(Rule):
    """Base of the rules of all layer types: per-sample gradients, and sums of their outer products."""

    keeps_input = True
    sees_bias = True

    def __init__(self, sharing: Sharing, blocks: tuple[Blocks, ...]) -> None:
        self.sharing = sharing
        self.blocks = blocks
        self.powers = (2,) * len(blocks)
        self.together = self.of_samples = sharing.sequence == "reduce"

    @property
    def layout(self) -> Any:
        return self.blocks

    def capture(self, module: Any, x: Tensor) -> tuple[list[Tensor], list[int]]:
        # Autograd keeps the input of a layer whose weight it trains: nobody may write to it, which the engine checks.
        return [x if module.weight.requires_grad else x.clone()], []

    def sum_lengths(self, module: Any) -> list[int | None]:
        return [blocks.numel for blocks in self.blocks]

    def per_sample(self, module: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
        """The gradients of each sample, for each of ``blocks`` a tensor (samples, rows, columns of its blocks)."""
        raise NotImplementedError

    def batched(self, module: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output derivative with the samples as their first dimension."""
        return x, grad

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        if grad.numel() == 0:
            return Sums([self._zeros(grad, b).flatten() for b in self.blocks], [0] * len(self.blocks))
        return self._contribute(module, captured[0], grad)

    def _contribute(self, module: Any, x: Tensor, grad: Tensor) -> Sums:
        """Raw sums of one use; rules that have a kernel for it do not go by way of per-sample gradients."""
        return self._contribute_together([Use(module, self, [x], [], grad)])

    def contribute_together(self, uses: Sequence[Use[BlockRule]]) -> Sums:
        filled = [use for use in uses if use.grad.numel() > 0]
        if filled:
            return self._contribute_together(filled)
        first = uses[0]
        return self.contribute(first.module, first.captured, first.sizes, first.grad)

    def _contribute_together(self, uses: Sequence[Use[BlockRule]]) -> Sums:
        """Outer products of the sums over uses of per-sample gradients, a bounded number of samples at a time.

        Uses on different numbers of samples are of different samples.
        """
        total: Sums | None = None
        batches = [(use, *use.rule.batched(use.module, use.captured[0], use.grad)) for use in uses]
        for samples, group in groupby(sorted(batches, key=_samples), key=_samples):
            members = list(group)
            sums = [self._zeros(members[0][2], blocks) for blocks in self.blocks]
            entries = max(1, sum(blocks.rows * blocks.count * blocks.size for blocks in self.blocks))
            for begin in range(0, samples, max(1, CHUNK // entries)):
                part = slice(begin, begin + max(1, CHUNK // entries))
                gradients = [use.rule.per_sample(use.module, x[part], grad[part]) for use, x, grad in members]
                for blocks, out, *parts in zip(self.blocks, sums, *gradients, strict=True):
                    add_outer_products(out, torch.stack(parts).sum(0) if len(parts) > 1 else parts[0], blocks)
            new = Sums([out.flatten() for out in sums], [samples] * len(sums))
            total = new if total is None else total + new
        assert total is not None
        return total

    def _zeros(self, like: Tensor, blocks: Blocks) -> Tensor:
        return like.new_zeros((blocks.count, blocks.size, blocks.size), dtype=ACCUMULATOR[like.dtype])

    def divisors(self, sums: Sums) -> list[float]:
        """What the raw sums are divided by to give the mean over samples (and rows that share a block)."""
        mean = self.sharing.loss_reduction == "mean"
        # A mean loss hides 1/N in each derivative, which the outer product has twice.
        return [b.rows / n if mean else b.rows * n for b, n in zip(self.blocks, sums.counts, strict=True)]


def _samples(batch: tuple[Use[BlockRule], Tensor, Tensor]) -> int:
    return batch[2].shape[0]


def add_outer_products(out: Tensor, gradients: Tensor, blocks: Blocks) -> None:
    """Add the outer products of gradients (samples, rows, columns) to out (count, size, size)."""
    padded = blocks.count * blocks.size
    if blocks.shared_by:
        gradients = gradients.reshape(-1, gradients.shape[-1])
        gradients = F.pad(gradients, (0, padded - gradients.shape[1]))
    v = gradients.reshape(-1, blocks.count, blocks.size)
    if blocks.size == 1:
        out += column_sum_of_squares(v.flatten(1)).view_as(out)
    elif blocks.size <= SMALL:
        mini_block_gram_(out, v, 1.0, 1.0)
    else:
        for b in range(blocks.count):
            weighted_gram_(out[b], v[:, b], None, 1.0, 1.0)


class LinearBlocks(BlockRule):
    """Linear: the gradient of a sample is the sum over its rows of ``s [h, 1]^T``.

    Under ``"expand"`` every row is a sample, and a block is ``(rows / O) sum_r |s_r|^2 [h_r, 1] [h_r, 1]^T``.

    Args:
        bias: whether the block has a column for a bias; a layer without one leaves it zero.
        swapped: the weight is used in the other orientation: derivative and input change places.
        stored_transposed: the weight of the module that the blocks are named after is (inputs, outputs).
    """

    name: ClassVar[str] = "linear"

    def __init__(
        self, sharing: Sharing, shape: tuple[int, int], bias: bool, swapped: bool, stored_transposed: bool
    ) -> None:
        outputs, inputs = reversed(shape) if stored_transposed else shape
        columns = inputs + bias
        roles = ("weight", "bias") if bias else ("weight",)
        size = sharing.linear_blocks
        if size == "shared" and columns > WIDEST:
            size = CUT
        if size == "shared":
            blocks = Blocks(roles, 1, columns, outputs, columns, stored_transposed)
        elif size == "per_output":
            blocks = Blocks(roles, outputs, columns, transposed=stored_transposed)
        else:
            assert isinstance(size, int)
            size = min(size, columns)
            blocks = Blocks(roles, math.ceil(columns / size), size, outputs, columns, stored_transposed)
        super().__init__(sharing, (blocks,))
        self.bias, self.swapped = bias, swapped
        # A part has the blocks of the whole where all outputs share them and every row is a sample.
        by_output = not swapped and not blocks.transposed
        self.takes_parts = sharing.sequence == "expand" and blocks.shared_by is not None and by_output

    def _rows(self, module: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """What runs over columns and what over rows of the weight; the columns with one more for the bias."""
        columns, rows = (grad, x) if self.swapped else (x, grad)
        if not self.bias:
            return columns, rows
        last = 1.0 if has_bias(module) and not self.swapped else 0.0
        return F.pad(columns, (0, 1), value=last), rows

    def batched(self, module: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        if self.sharing.sequence == "expand" or grad.dim() == 1:
            return x.reshape(-1, 1, x.shape[-1]), grad.reshape(-1, 1, grad.shape[-1])
        samples = grad.shape[0]
        return x.reshape(samples, -1, x.shape[-1]), grad.reshape(samples, -1, grad.shape[-1])

    def per_sample(self, module: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
        columns, rows = self._rows(module, x, grad)
        wide = ACCUMULATOR[grad.dtype]
        gradients = torch.einsum("nto,nti->noi", rows.to(wide), columns.to(wide))
        return [gradients]

    def _contribute(self, module: Any, x: Tensor, grad: Tensor) -> Sums:
        (blocks,) = self.blocks
        columns, rows = self._rows(module, x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]))
        out = self._zeros(columns, blocks)
        if blocks.shared_by:
            weights = channel_sum_of_squares(rows.unsqueeze(0)).to(out.dtype)
            for b, block in enumerate(out):
                part = columns[:, b * blocks.size : (b + 1) * blocks.size]
                weighted_gram_(block, F.pad(part, (0, blocks.size - part.shape[1])), weights)
        else:
            for block, weights in zip(out, rows.to(out.dtype).square().T.contiguous(), strict=True):
                weighted_gram_(block, columns, weights)
        return Sums([out.flatten()], [rows.shape[0]])


class EmbeddingRows(LinearBlocks):
    """An Embedding whose weight a Linear has too: it is that Linear, used in the other orientation on one-hot rows."""

    name: ClassVar[str] = "embedding"
    reads_tokens = True

    def _one_hot(self, module: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        hot = F.one_hot(tokens, module.num_embeddings).to(dtype)
        if module.padding_idx is not None:
            hot[..., module.padding_idx] = 0
        return hot

    def batched(self, module: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, grad = super().batched(module, x.unsqueeze(-1), grad)
        return x.squeeze(-1), grad

    def per_sample(self, module: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
        return super().per_sample(module, self._one_hot(module, x, grad.dtype), grad)

    def _contribute(self, module: Any, x: Tensor, grad: Tensor) -> Sums:
        if not self.blocks[0].shared_by:
            return self._contribute_together([Use(module, self, [x], [], grad)])
        # All that a shared block needs of a one-hot row is its square: 1, or 0 for padding.
        ones = torch.ones_like(x, dtype=grad.dtype)
        if module.padding_idx is not None:
            ones = ones.masked_fill(x == module.padding_idx, 0.0)
        return super()._contribute(module, ones.unsqueeze(-1), grad)


class ConvBlocks(BlockRule):
    """Conv1d/2d/3d: one block for each output and input channel, of the size of the kernel; the bias has 1 x 1."""

    name: ClassVar[str] = "conv"

    def __init__(self, sharing: Sharing, shape: Sequence[int], bias: bool) -> None:
        weight = Blocks(("weight",), shape[0] * shape[1], math.prod(shape[2:]))
        super().__init__(sharing, (weight, Blocks(("bias",), shape[0], 1)) if bias else (weight,))
        self.shape = tuple(shape)

    def batched(self, module: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        spatial = len(module.kernel_size)
        return unsqueeze_batch(x, spatial), unsqueeze_batch(grad, spatial)

    def _geometry(self, module: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Input and output derivative of the convolution that has the weight's gradient, and its padding."""
        x, padding = padded_input(module, x)
        return x, grad, padding

    def _contribute(self, module: Any, x: Tensor, grad: Tensor) -> Sums:
        x, grad = self.batched(module, x, grad)
        inputs, outputs, padding = self._geometry(module, x, grad)
        if inputs.dtype != outputs.dtype:  # autocast
            wide = torch.promote_types(inputs.dtype, outputs.dtype)
            inputs, outputs = inputs.to(wide), outputs.to(wide)
        size = self.blocks[0].size
        out = inputs.new_empty((*self.shape[:2], size, size), dtype=ACCUMULATOR[inputs.dtype])
        conv_mini_block_gram_(
            out, inputs, outputs, module.kernel_size, module.stride, padding, module.dilation, module.groups
        )
        sums = [out.flatten()]
        if len(self.blocks) > 1:
            sums.append(column_sum_of_squares(bias_gradients(module, grad)))
        return Sums(sums, [grad.shape[0]] * len(sums))

    def per_sample(self, module: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
        inputs, outputs, padding = self._geometry(module, x, grad)
        wide = torch.promote_types(ACCUMULATOR[inputs.dtype], ACCUMULATOR[outputs.dtype])
        flat = [] if padding == 0 else [n for pair in reversed(padding) for n in pair]
        inputs = F.pad(inputs.to(wide), flat).unsqueeze(1)

        def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
            size = _WEIGHT_GRADIENT[len(module.kernel_size)]
            return size(x, self.shape, grad, module.stride, 0, module.dilation, module.groups)

        gradients = torch.func.vmap(weight_gradient)(inputs, outputs.to(wide).unsqueeze(1))
        parts = [gradients.flatten(1).unsqueeze(1)]
        return [*parts, bias_gradients(module, grad).unsqueeze(1)] if len(self.blocks) > 1 else parts


_WEIGHT_GRADIENT: dict[int, Callable[..., Tensor]] = {
    1: conv1d_weight,
    2: conv2d_weight,
    3: conv3d_weight,
}


def bias_gradients(module: Any, grad: Tensor) -> Tensor:
    """(samples, channels) from (samples, channels, positions...); zeros for a use of the weight without a bias."""
    if not has_bias(module):
        return grad.new_zeros(grad.shape[:2], dtype=ACCUMULATOR[grad.dtype])
    return grad.flatten(2).sum(2, dtype=ACCUMULATOR[grad.dtype])


class ConvTransposeBlocks(ConvBlocks):
    """ConvTranspose1d/2d/3d: the convolution that it transposes reads the derivative and yields the input."""

    name: ClassVar[str] = "conv, transposed"

    def __init__(self, sharing: Sharing, shape: Sequence[int], bias: bool, groups: int) -> None:
        super().__init__(sharing, shape, False)
        if bias:
            self.blocks += (Blocks(("bias",), shape[1] * groups, 1),)
            self.powers = (2, 2)

    def _geometry(self, module: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Any]:
        windows, padding = transposed_windows(module, x.shape[2:], grad)
        return windows, x, padding


class NormBlocks(BlockRule):
    """Scale and shift of a normalisation: one 2 x 2 block a channel, 1 x 1 without a shift."""

    name: ClassVar[str] = "norm"

    def __init__(self, sharing: Sharing, channels: int, bias: bool) -> None:
        roles = ("weight", "bias") if bias else ("weight",)
        super().__init__(sharing, (Blocks(roles, channels, len(roles)),))

    def batched(self, module: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of scale and of shift, both (samples, channels).

        All samples at once, as those of a batch normalisation depend on each other; the others piece by piece: what is
        as large as x would be fresh memory each time.
        """
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = module.training or module.running_mean is None
            mean, variance = (None, None) if own else (module.running_mean, module.running_var)
            return batch_norm_gradients(x, grad, module.eps, mean, variance)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            shape = tuple(module.normalized_shape)
            if grad.dim() == len(shape):
                x, grad = x.unsqueeze(0), grad.unsqueeze(0)
            positions = list(range(1, grad.dim() - len(shape)))
        else:
            if isinstance(module, nn.modules.instancenorm._InstanceNorm):
                spatial = module._get_no_batch_dim() - 1
                x, grad = unsqueeze_batch(x, spatial), unsqueeze_batch(grad, spatial)
            positions = list(range(2, grad.dim()))
        wide = ACCUMULATOR[grad.dtype]
        scales, shifts = [], []
        size = max(1, PIECE // max(1, grad[0].numel()))
        for piece, derivative in zip(x.split(size), grad.split(size), strict=True):
            derivative = derivative.to(wide)
            scale = _normalised(module, piece.to(wide)).mul_(derivative)
            scales.append(_sum_over(scale, positions).flatten(1))
            shifts.append(_sum_over(derivative, positions).flatten(1))
        return torch.cat(scales), torch.cat(shifts)

    def per_sample(self, module: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
        (blocks,) = self.blocks
        parts = [x]
        if blocks.size == 2:
            parts.append(grad if has_bias(module) else torch.zeros_like(grad))
        return [torch.stack(parts, -1).flatten(1).unsqueeze(1)]


def _sum_over(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims) if dims else x


def _normalised(module: Any, x: Tensor) -> Tensor:
    """What a normalisation of single samples multiplies by its scale, as a new tensor."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    own = module.training or not module.track_running_stats
    mean, variance = (None, None) if own else (module.running_mean.to(x.dtype), module.running_var.to(x.dtype))
    return F.instance_norm(x, mean, variance, use_input_stats=own, eps=module.eps)


class EmbeddingBlocks(BlockRule):
    """Embedding: 1 x 1 blocks, the mean square over samples of a sample's gradient; padding has none."""

    name: ClassVar[str] = "embedding"
    reads_tokens = True

    def __init__(self, sharing: Sharing, shape: tuple[int, int]) -> None:
        super().__init__(sharing, (Blocks(("weight",), math.prod(shape), 1),))

    def batched(self, module: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        samples = x.shape[0] if x.dim() else 1
        return x.reshape(samples, -1), grad.reshape(samples, -1, module.embedding_dim)

    def _contribute_together(self, uses: Sequence[Use[BlockRule]]) -> Sums:
        """Sums over tokens of one kind in one sample, squared; only tokens that occur are held."""
        (blocks,) = self.blocks
        out = self._zeros(uses[0].grad, blocks).view(-1, uses[0].module.embedding_dim)
        count = 0
        batches = [(use, *use.rule.batched(use.module, use.captured[0], use.grad)) for use in uses]
        for samples, group in groupby(sorted(batches, key=_samples), key=_samples):
            keys, rows = [], []
            for use, tokens, grad in group:
                keys.append(_keys(tokens, use.module.num_embeddings).flatten())
                rows.append(grad.flatten(0, 1).to(out.dtype))
                if use.module.padding_idx is not None:
                    padding = tokens.flatten() == use.module.padding_idx
                    rows[-1] = rows[-1].masked_fill(padding.unsqueeze(1), 0.0)
            occurring, where = _distinct(torch.cat(keys))
            totals = out.new_zeros(len(occurring), out.shape[1]).index_add_(0, where, torch.cat(rows))
            out.index_add_(0, occurring % len(out), totals.square_())
            count += samples
        return Sums([out.flatten()], [count])


def _keys(tokens: Tensor, kinds: int) -> Tensor:
    """A number for each kind of token in each sample."""
    return tokens + kinds * torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)


def _distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct numbers, and for each number its place among them."""
    return keys.unique(return_inverse=True) if keys.is_cpu else distinct_padded(keys)


def distinct_padded(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The same, padded with zeros to the length of ``keys``, because reading their number would wait for a GPU."""
    ordered, order = keys.sort(stable=True)
    places = F.pad(ordered.diff() != 0, (1, 0))[: len(keys)].cumsum(0)
    where = torch.empty_like(order).scatter_(0, order, places)
    return torch.zeros_like(keys).scatter_(0, places, ordered), where


def _uses_of(model: nn.Module, operations: Operations) -> dict[int, list[nn.Module]]:
    """What the modules that hold each weight are taken for, by its identity."""
    uses: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        operation = operations.of(module)[0]
        if (weight := operation._parameters.get("weight")) is not None:
            uses.setdefault(id(weight), []).append(operation)
    return uses


class WeightUses:
    """What the modules of a model that hold each weight are taken for."""

    def __init__(self, model: nn.Module, operations: Operations) -> None:
        self._uses = _uses_of(model, operations)

    def add_uses(self, operations: Sequence[nn.Module]) -> None:
        """Count functions that are applied to weights of modules among the uses of these weights."""
        for operation in operations:
            weight = operation._parameters["weight"]
            if id(weight) in self._uses:
                self._uses[id(weight)].append(operation)

    def of(self, module: nn.Module) -> list[nn.Module]:
        """All uses of the weight of a module, or of a function that is applied to it."""
        uses = self._uses.get(id(module._parameters["weight"]), [])
        return uses if module in uses else [*uses, module]


class BlockRules(WeightUses):
    """The rules of the layers of a model. Weights that several layers share have the blocks of one of them.

    Layers with the rule of the same layout add their outer products. A weight of a Linear and an Embedding, or of
    Linears in both orientations, has the blocks of the Linear, and the others add in its orientation.
    """

    def __call__(self, module: Any, sharing: Sharing) -> BlockRule | None:
        """The rule that serves a module, or None."""
        weight = module._parameters.get("weight")
        if weight is None:
            return None
        uses = self.of(module)
        matrices: list[nn.Module] = [use for use in uses if isinstance(use, nn.Linear)]
        matrices += [use for use in uses if is_transposed_linear(use)]
        if matrices and (isinstance(module, (nn.Linear, nn.Embedding)) or is_transposed_linear(module)):
            transposed = is_transposed_linear(matrices[0])
            bias = any(has_bias(use) for use in matrices if is_transposed_linear(use) == transposed)
            if not isinstance(module, nn.Embedding):
                swapped = is_transposed_linear(module) != transposed
                return LinearBlocks(sharing, weight.shape, bias, swapped, transposed)
            # With Hugging Face's Conv1D the columns would be one-hot: nobody does that.
            return None if transposed else EmbeddingRows(sharing, weight.shape, bias, True, False)
        # Convolutions in both directions that share a weight have biases of different lengths.
        both = len({isinstance(use, nn.modules.conv._ConvTransposeNd) for use in uses}) > 1
        bias = not both and any(map(has_bias, uses))
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            return ConvTransposeBlocks(sharing, weight.shape, bias, module.groups)
        if isinstance(module, nn.modules.conv._ConvNd):
            return ConvBlocks(sharing, weight.shape, bias)
        if isinstance(module, NORMS):
            return NormBlocks(sharing, weight.numel(), bias)
        if isinstance(module, nn.Embedding):
            return EmbeddingBlocks(sharing, weight.shape)
        return None
