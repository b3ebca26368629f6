"""What the rules of all layer types have in common: their interface, the sums they add up, and geometry.

A rule says what one type of layer yields for one kind of curvature:

- ``capture``: what the forward keeps of the layer's input;
- ``contribute``: the raw sums of one backward, from what was captured and the derivative of the output. Raw sums add up
  over uses, micro-batches and processes; ``powers`` says how each scales with the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

R = TypeVar("R", bound="Rule")
"""The kind of rule that an optimizer reads."""


@dataclass
class Sums:
    """Raw sums and, for each, how many terms went into it.

    Attributes:
        vectors: tensors of one dimension.
        counts: of each, a number: rows, samples, whatever a mean is to be taken over.
    """

    vectors: list[Tensor]
    counts: list[float]

    def __add__(self, other: Sums) -> Sums:
        lengths = [max(a.numel(), b.numel()) for a, b in zip(self.vectors, other.vectors, strict=True)]
        mine = self.padded(lengths)
        # Never in place: a graph that is kept for another backward still holds what its forward captured.
        vectors = torch._foreach_add(mine, [b.to(a) for a, b in zip(mine, other.padded(lengths), strict=True)])
        return Sums(list(vectors), [a + b for a, b in zip(self.counts, other.counts, strict=True)])

    def padded(self, lengths: Sequence[int]) -> list[Tensor]:
        """The vectors with zeros behind them: those over positions are as long as the longest sequence seen."""
        return [
            v if v.numel() == length else nn.functional.pad(v, (0, length - v.numel()))
            for v, length in zip(self.vectors, lengths, strict=True)
        ]


@dataclass(frozen=True)
class Use(Generic[R]):
    """One use of a layer: what its forward captured, and the derivative of the loss by its output."""

    module: Any
    rule: R
    captured: Sequence[Tensor]
    sizes: Sequence[int]
    grad: Tensor


class Rule:
    """Base of the rules of all layer types and optimizers.

    A rule of your own has a ``name``, ``powers``, and the methods :meth:`capture`, :meth:`contribute` and
    :meth:`sum_lengths`; all else has defaults. ``module`` is the layer as one of torch's own class.
    """

    name: ClassVar[str]
    powers: tuple[int, ...] = (0, 2)
    """Degree of each raw sum in the scale of the loss."""
    rows_are_inputs: ClassVar[bool] = False
    """Whether the weight's rows run over inputs, as in an Embedding, rather than over outputs."""
    keeps_input: ClassVar[bool] = False
    """Whether what is captured is as large as the layer's input."""
    reads_tokens: ClassVar[bool] = False
    """Whether the input are tokens, of which one row may serve many."""
    sees_bias: ClassVar[bool] = False
    """Whether what it gives to a bias is wrong for a function without one, if another function adds the bias."""
    needs_uses: ClassVar[bool] = True
    """Whether a parameter is served less well where its layer is not used, though it has a gradient."""
    sends_doubles: ClassVar[bool] = False
    """Whether processes add its sums up in float64, whatever the parameters are."""
    takes_parts: bool = False
    """Whether a function that is applied to some rows of a weight makes a contribution, by :meth:`contribute_part`."""
    of_samples: bool = False
    """Whether it must tell samples from the rows of one: the first dimension of its input has to be theirs."""
    together: bool = False
    """Whether all uses of a layer in one backward make one contribution, by :meth:`contribute_together`."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def layout(self) -> Any:
        """Sums of uses of one weight add up if their rules have the same layout."""
        return self.rows_are_inputs, type(self)

    def takes(self, module: Any, x: Tensor, output: Tensor) -> bool:
        """Whether ``capture`` can take an input. Asked while a model is compiled, where its error would end that."""
        return True

    def capture(self, module: Any, x: Tensor) -> tuple[list[Tensor], list[int]]:
        """Tensors and sizes that the backward needs of the input x."""
        raise NotImplementedError

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        """Raw sums of one backward; grad is the derivative of the loss by the layer's output."""
        raise NotImplementedError

    def contribute_part(
        self, operation: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor, start: int, whole: Any
    ) -> Sums:
        """Raw sums of a function on some rows of a weight, as if all rows had been used, and the others without effect.

        Args:
            operation: with the rows that were used.
            start: the first of them.
            whole: the operation on all rows.
        """
        return self.contribute(operation, captured, sizes, grad)

    def contribute_together(self, uses: Sequence[Use[Any]]) -> Sums:
        """Raw sums of all uses of a layer in one backward."""
        raise NotImplementedError

    def sum_lengths(self, module: Any) -> list[int | None]:
        """Length of each raw sum; None where only the data tell."""
        raise NotImplementedError

    def without_use(self, lengths: Sequence[int]) -> list[Tensor]:
        """Raw sums of these lengths of a process that did not use the layer in what others did."""
        return [torch.zeros(n, dtype=torch.float64, device="cpu") for n in lengths]

    def forget(self, last: int) -> None:
        """Forget what is known of backward passes whose gradients are gone, up to this one."""

    def complete(self, sums: Sums, module: nn.Module) -> None:
        """Put in place what sums of a layer are to have of backward passes of this step that did not use it."""


NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.RMSNorm,
)


class Product(nn.Module):
    """A Linear with a transposed weight: ``x @ weight + bias``, the weight being (inputs, outputs)."""


def is_transposed_linear(module: Any) -> bool:
    """Whether a module is a :class:`Product`.

    So is Hugging Face's Conv1D, known by its name and shape, so that transformers need not be imported.
    """
    if isinstance(module, Product):
        return True
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.dim() == 2


def fan_in(weight: Tensor, operation: Any = None) -> int:
    """How many numbers a weight reads for one that it makes, as torch counts when it draws weights.

    1 for what is multiplied or added element by element, or looked up. A stack of matrices has that of each of them; a
    transposed convolution that of its weight as it lies, which is what torch takes.

    Args:
        operation: the layer, as one of torch; None where no layer is known.
    """
    if weight.dim() < 2 or isinstance(operation, (nn.Embedding, nn.EmbeddingBag, *NORMS)):
        return 1
    if isinstance(operation, nn.Linear):
        read = weight.shape[-1]
    elif operation is not None and is_transposed_linear(operation):
        read = weight.shape[-2]
    else:
        read = math.prod(weight.shape[1:])
    return max(1, read)


def has_bias(module: nn.Module) -> bool:
    """Whether a module has a bias; some types have no attribute of that name."""
    return getattr(module, "bias", None) is not None


def unsqueeze_batch(x: Tensor, spatial: int) -> Tensor:
    """Add the batch dimension to x if it has none, which convolutions allow."""
    return x.unsqueeze(0) if x.dim() == spatial + 1 else x


def padded_input(module: Any, x: Tensor) -> tuple[Tensor, Any]:
    """A convolution's input, with its batch dimension, and the zeros that it is still to be padded with."""
    spatial = len(module.kernel_size)
    x = unsqueeze_batch(x, spatial)
    # torch keeps (before, after) of each dimension for every kind of padding, "same" included, last one first.
    flat = module._reversed_padding_repeated_twice
    if module.padding_mode != "zeros":
        return nn.functional.pad(x, flat, mode=module.padding_mode), 0
    return x, [(flat[2 * d], flat[2 * d + 1]) for d in reversed(range(spatial))] if any(flat) else 0


def transposed_windows(module: Any, sizes: Sequence[int], grad: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """The output derivative of a transposed convolution as the input of the convolution that it transposes.

    What the last window leaves unread at the end is cut off or taken from the padding, so that there are as many
    windows as input positions.

    Args:
        sizes: spatial sizes of the layer's input.
        grad: with its batch dimension.
    """
    padding = []
    for d, size in enumerate(sizes):
        extent = (size - 1) * module.stride[d] + module.dilation[d] * (module.kernel_size[d] - 1) + 1
        after = extent - module.padding[d] - grad.shape[2 + d]
        grad = grad.narrow(2 + d, 0, grad.shape[2 + d] + min(after, 0))
        padding.append((module.padding[d], max(after, 0)))
    return grad, padding
