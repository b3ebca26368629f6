"""How each layer type yields the diagonal factors of its Fisher block, and how they sit on its parameters.

A rule says three things about one type of layer:

- ``capture``: what the forward keeps of the layer's input (raw sums, never the input itself);
- ``contribute``: the raw sums of one backward, from what was captured and the derivative of the output. Raw sums add up
  over uses, micro-batches and processes; ``powers`` says how each scales with the loss;
- ``means`` and ``place``: the factors H (``input_factor``) and S (``output_factor``) that those sums give, and which of
  them runs over the rows and which over the columns of weight and bias.

Sources: AdaFisher, arXiv 2405.16397; Kronecker factors of convolutions, arXiv 1602.01407.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisher_kernels.curvature.rules import (
    NORMS,
    Rule,
    Sums,
    has_bias,
    is_transposed_linear,
    padded_input,
    transposed_windows,
    unsqueeze_batch,
)
from fisher_kernels.ops import ACCUMULATOR, channel_sum_of_squares, column_sum_of_squares, patch_sum_of_squares

Factors = dict[str, Tensor]
Means = dict[str, tuple[Tensor, float]]
"""Factor name -> (vector, divisor): the factor is their quotient, completed by a 1 if the vector is an entry short."""

Placement = dict[str, tuple[Tensor | None, Tensor | None]]
"""Parameter name -> (row factor, column factor); None stands for 1."""


class DiagonalRule(Rule):
    """How a layer type yields the diagonals of its Kronecker factors."""

    sends_doubles = True
    """Its sums are vectors, small beside the gradients, and minmax enlarges their rounding."""

    def shapes(self, module: Any) -> dict[str, int]:
        """Names and lengths of the factors, in the order of :meth:`means`."""
        raise NotImplementedError

    def means(self, module: Any, sums: Sums) -> Means:
        """Factors from raw sums. A layer with a bias has one entry more, the mean of 1^2, which may be left out."""
        raise NotImplementedError

    def place(self, module: Any, factors: Mapping[str, Tensor]) -> Placement:
        """Row and column factors of ``weight`` and ``bias``."""
        raise NotImplementedError


class Linear(DiagonalRule):
    """``a = W h + b``: H is the mean over rows of h^2 with a 1 for the bias, S the mean over rows of s^2."""

    name = "linear"
    takes_parts = True

    def _inputs(self, module: Any) -> int:
        return module.in_features

    def _outputs(self, module: Any) -> int:
        return module.out_features

    def capture(self, module: Any, x: Tensor) -> tuple[list[Tensor], list[int]]:
        return [column_sum_of_squares(x)], []

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        rows = grad.numel() // max(grad.shape[-1], 1)
        return Sums([captured[0], column_sum_of_squares(grad)], [rows, rows])

    def contribute_part(
        self, operation: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor, start: int, whole: Any
    ) -> Sums:
        sums = self.contribute(operation, captured, sizes, grad)
        along = 0 if self.rows_are_inputs else 1
        used, rows = sums.vectors[along].numel(), self.sum_lengths(whole)[along]
        if rows is not None and used < rows:
            sums.vectors[along] = nn.functional.pad(sums.vectors[along], (start, rows - start - used))
        return sums

    def shapes(self, module: Any) -> dict[str, int]:
        return {
            "input_factor": self._inputs(module) + has_bias(module),
            "output_factor": self._outputs(module),
        }

    def sum_lengths(self, module: Any) -> list[int | None]:
        return [self._inputs(module), self._outputs(module)]

    def means(self, module: Any, sums: Sums) -> Means:
        inputs, outputs = zip(sums.vectors, sums.counts, strict=True)
        return {"input_factor": inputs, "output_factor": outputs}

    def place(self, module: Any, factors: Mapping[str, Tensor]) -> Placement:
        inputs, outputs = factors["input_factor"], factors["output_factor"]
        columns = self._inputs(module)
        return {"weight": (outputs, inputs[:columns]), "bias": (outputs, inputs[columns:])}


class TransposedLinear(Linear):
    """Hugging Face's ``Conv1D``: a Linear whose weight is (inputs, outputs)."""

    name = "linear, transposed"
    rows_are_inputs = True

    def _inputs(self, module: Any) -> int:
        return module.weight.shape[0]

    def _outputs(self, module: Any) -> int:
        return module.weight.shape[1]

    def place(self, module: Any, factors: Mapping[str, Tensor]) -> Placement:
        placed = super().place(module, factors)
        outputs, inputs = placed["weight"]
        return {**placed, "weight": (inputs, outputs)}


class Conv(DiagonalRule):
    """Conv1d/2d/3d: H[group, channel, kernel offset], the mean square of what each offset reads; S over channels."""

    name = "conv"

    def takes(self, module: Any, x: Tensor, output: Tensor) -> bool:
        spatial = len(module.kernel_size)
        x, output = unsqueeze_batch(x, spatial), unsqueeze_batch(output, spatial)
        if not x.dim() == output.dim() == spatial + 2 or x.shape[1] != module.in_channels:
            return False
        for d in range(spatial):
            last = spatial - 1 - d  # torch keeps (before, after) of the last dimension first
            size = x.shape[2 + d] + sum(module._reversed_padding_repeated_twice[2 * last : 2 * last + 2])
            extent = module.dilation[d] * (module.kernel_size[d] - 1) + 1
            if (size - extent) // module.stride[d] + 1 != output.shape[2 + d]:
                return False
        return True

    def capture(self, module: Any, x: Tensor) -> tuple[list[Tensor], list[int]]:
        x, padding = padded_input(module, x)
        return [patch_sum_of_squares(x, module.kernel_size, module.stride, padding, module.dilation).flatten()], []

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        grad = unsqueeze_batch(grad, len(module.kernel_size))
        positions = grad.numel() // module.out_channels
        return Sums([captured[0], channel_sum_of_squares(grad)], [positions, positions])

    def shapes(self, module: Any) -> dict[str, int]:
        return {
            "input_factor": module.in_channels * math.prod(module.kernel_size) + has_bias(module),
            "output_factor": module.out_channels,
        }

    def sum_lengths(self, module: Any) -> list[int | None]:
        return [module.in_channels * math.prod(module.kernel_size), module.out_channels]

    def means(self, module: Any, sums: Sums) -> Means:
        inputs, outputs = zip(sums.vectors, sums.counts, strict=True)
        return {"input_factor": inputs, "output_factor": outputs}

    def place(self, module: Any, factors: Mapping[str, Tensor]) -> Placement:
        inputs, outputs = factors["input_factor"], factors["output_factor"]
        columns = module.in_channels * math.prod(module.kernel_size)
        return {"weight": (outputs, inputs[:columns].view(module.groups, -1)), "bias": (outputs, inputs[columns:])}


class ReleaseConv(Conv):
    """The released code divides H by the size of a patch once more, which matters only next to the eps of minmax."""

    def means(self, module: Any, sums: Sums) -> Means:
        means = super().means(module, sums)
        patch = module.in_channels // module.groups * math.prod(module.kernel_size)
        inputs, count = means["input_factor"]
        if has_bias(module):  # its entry is divided too
            inputs = torch.cat((inputs / count, inputs.new_ones(1)))
            count = 1
        return {**means, "input_factor": (inputs, count * patch)}


class ConvTranspose(DiagonalRule):
    """ConvTranspose1d/2d/3d: H over input channels; S over (group, channel, kernel offset), the patch form of s."""

    name = "conv, transposed"
    powers = (0, 2, 2)
    rows_are_inputs = True

    def capture(self, module: Any, x: Tensor) -> tuple[list[Tensor], list[int]]:
        x = unsqueeze_batch(x, len(module.kernel_size))
        return [channel_sum_of_squares(x)], list(x.shape[2:])

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        grad = unsqueeze_batch(grad, len(module.kernel_size))
        by_channel = channel_sum_of_squares(grad)
        windows, padding = transposed_windows(module, sizes, grad)
        by_offset = patch_sum_of_squares(windows, module.kernel_size, module.stride, padding, module.dilation)
        positions = grad.shape[0] * math.prod(sizes)
        return Sums(
            [captured[0], by_offset.flatten(), by_channel],
            [positions, positions, grad.numel() // module.out_channels],
        )

    def shapes(self, module: Any) -> dict[str, int]:
        shapes = {
            "input_factor": module.in_channels,
            "output_factor": module.out_channels * math.prod(module.kernel_size),
        }
        return {**shapes, "bias_factor": module.out_channels} if has_bias(module) else shapes

    def sum_lengths(self, module: Any) -> list[int | None]:
        return [module.in_channels, module.out_channels * math.prod(module.kernel_size), module.out_channels]

    def means(self, module: Any, sums: Sums) -> Means:
        # Without a bias its factor, the last one, is not wanted.
        return dict(zip(self.shapes(module), zip(sums.vectors, sums.counts, strict=True), strict=False))

    def place(self, module: Any, factors: Mapping[str, Tensor]) -> Placement:
        by_offset = factors["output_factor"].view(module.groups, -1)
        return {"weight": (factors["input_factor"], by_offset), "bias": (factors.get("bias_factor"), None)}


class Norm(DiagonalRule):
    """Scale and shift of a normalisation: ``S[c] = (sum of s over batch and positions)^2 / N``, H = 1."""

    name = "norm"
    powers: tuple[int, ...] = (1,)

    def capture(self, module: Any, x: Tensor) -> tuple[list[Tensor], list[int]]:
        return [], []

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            reduced = tuple(range(grad.dim() - len(module.normalized_shape)))
        else:
            if isinstance(module, nn.modules.instancenorm._InstanceNorm):
                grad = unsqueeze_batch(grad, module._get_no_batch_dim() - 1)
            reduced = (0, *range(2, grad.dim()))
        wide = ACCUMULATOR[grad.dtype]
        total = grad.sum(reduced, dtype=wide) if reduced else grad.to(wide)
        return Sums([total.flatten() if total.dim() != 1 else total], [grad.shape[0] if reduced else 1])

    def shapes(self, module: Any) -> dict[str, int]:
        return {"output_factor": module.weight.numel()}

    def sum_lengths(self, module: Any) -> list[int | None]:
        return [module.weight.numel()]

    def means(self, module: Any, sums: Sums) -> Means:
        return {"output_factor": (sums.vectors[-1].square(), sums.counts[-1])}

    def place(self, module: Any, factors: Mapping[str, Tensor]) -> Placement:
        outputs = factors["output_factor"]
        return {"weight": (outputs, None), "bias": (outputs, None)}


class ReleaseNorm(Norm):
    """The released code's two input numbers: ``H = [sum_c u_c^2, C] / N^2`` with ``u_c`` the sum of h over T^2."""

    powers = (0, 1)

    def capture(self, module: Any, x: Tensor) -> tuple[list[Tensor], list[int]]:
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            x = unsqueeze_batch(x, module._get_no_batch_dim() - 1)
        # Whatever the layer normalises, the released code calls dimension 1 of its input the channels.
        x = x.reshape(1, -1) if x.dim() < 2 else x
        reduced = [0, *range(2, x.dim())]
        positions = math.prod(x.shape[2:])
        wide = torch.promote_types(x.dtype, torch.float32)
        return [x.sum(reduced, dtype=wide) / positions**2], []

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        sums = super().contribute(module, captured, sizes, grad)
        return Sums([captured[0], *sums.vectors], [*sums.counts, *sums.counts])

    def shapes(self, module: Any) -> dict[str, int]:
        return {"input_factor": 2, **super().shapes(module)}

    def sum_lengths(self, module: Any) -> list[int | None]:
        by_feature = isinstance(module, (nn.LayerNorm, nn.RMSNorm))  # their dimension 1 may be the positions
        return [None if by_feature else module.weight.numel(), *super().sum_lengths(module)]

    def means(self, module: Any, sums: Sums) -> Means:
        u, samples = sums.vectors[0], sums.counts[0]
        inputs = torch.stack((u.square().sum(), u.new_full((), float(u.numel()))))
        return {"input_factor": (inputs, samples**2), **super().means(module, sums)}

    def place(self, module: Any, factors: Mapping[str, Tensor]) -> Placement:
        inputs, outputs = factors["input_factor"], factors["output_factor"]
        return {"weight": (outputs, inputs[:1]), "bias": (outputs, inputs[1:])}


class Embedding(DiagonalRule):
    """H[v] is the share of token v in the batch, S the mean over tokens of s^2; padding counts in neither."""

    name = "embedding"
    rows_are_inputs = True
    reads_tokens = True

    def takes(self, module: Any, x: Tensor, output: Tensor) -> bool:
        return x.dtype in (torch.int64, torch.int32)

    def capture(self, module: Any, x: Tensor) -> tuple[list[Tensor], list[int]]:
        tokens = x.flatten()
        counts = torch.zeros(module.num_embeddings, dtype=torch.float32, device=x.device)
        counts.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.float32))
        if module.padding_idx is None:
            return [counts], []
        counts[module.padding_idx] = 0
        return [counts, tokens != module.padding_idx], []

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        rows = grad.reshape(-1, module.embedding_dim)
        if len(captured) > 1:
            rows = rows.masked_fill(~captured[1].unsqueeze(1), 0.0)
        outputs = column_sum_of_squares(rows)
        # That there is nothing but padding is known without waiting on the CPU alone; elsewhere the average refuses it.
        used = float(len(rows) > 0 and (len(captured) == 1 or not rows.is_cpu or bool(captured[1].any())))
        return Sums([captured[0].to(outputs.dtype), outputs], [used, used])

    def shapes(self, module: Any) -> dict[str, int]:
        return {"input_factor": module.num_embeddings, "output_factor": module.embedding_dim}

    def sum_lengths(self, module: Any) -> list[int | None]:
        return [module.num_embeddings, module.embedding_dim]

    def means(self, module: Any, sums: Sums) -> Means:
        counts, outputs = sums.vectors
        # The number of tokens stays on the device: with padding nobody else knows it. Without any the means are NaN,
        # which the average refuses.
        tokens = counts.sum()
        return {"input_factor": (counts / tokens, 1), "output_factor": (outputs / tokens, 1)}

    def place(self, module: Any, factors: Mapping[str, Tensor]) -> Placement:
        return {"weight": (factors["input_factor"], factors["output_factor"])}


def rule_for(module: nn.Module, variant: str) -> DiagonalRule | None:
    """The rule that serves a module under a variant of AdaFisher, or None."""
    release = variant == "release"
    if isinstance(module, nn.Linear):
        return Linear()
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return ConvTranspose()
    if isinstance(module, nn.modules.conv._ConvNd):
        return ReleaseConv() if release else Conv()
    if isinstance(module, NORMS):
        if module._parameters.get("weight") is None:  # a shift alone
            return None
        return ReleaseNorm() if release else Norm()
    if isinstance(module, nn.Embedding):
        return Embedding()
    return TransposedLinear() if is_transposed_linear(module) else None
