"""Stochastic rounding to bfloat16 in plain Python: random integers by seed, parameter, step and place, and their use.

What ``csrc/common/rounding.h`` and ``triton_kernels/_rounding.py`` compute too, to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index as as_integer
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fisher_kernels.ops._step import as_moment, check_count, check_lengths

_MASK = 2**32 - 1
_START = 0x9E3779B9  # so that a seed of 0 is a seed like all others
_SIGN, _LARGEST, _INFINITY, _QUIET = -(2**31), 0x7F7FFFFF, 0x7F800000, 0x400000

Bits = TypeVar("Bits", int, Tensor)
"""Whole numbers of 32 bits, one or an int64 tensor of them."""


def lowbias32(x: Bits) -> Bits:
    """A bijection of 32 bits in which every bit of x changes every bit of the result with a probability near 1/2."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK  # int64 keeps the lower bits of a product, however large it is
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def absorb(state: Bits, word: Bits) -> Bits:
    """Mix a word into a state. Both are hashed: states that differ little never lead to one sequence in two orders."""
    return lowbias32(state ^ lowbias32(word))


def check_integer(op: str, name: str, value: int, bits: int) -> int:
    """A whole number of so many bits, without a sign; whatever counts as an integer becomes one."""
    if not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} is of type {type(value).__name__}, expected an integer")
    if not 0 <= value < 2**bits:
        raise ValueError(f"{op}: {name} is {value}, expected 0 to 2^{bits} - 1")
    return as_integer(value)


def rounding_base(seed: int, ordinal: int, op: str = "rounding_base") -> int:
    """What the random integers of one parameter come from, whatever the step: a number of 32 bits.

    Args:
        seed: 0 to 2^64 - 1, of the run.
        ordinal: 0 to 2^32 - 1, of the parameter: without one, all parameters of a step would have the same integers.
        op: whom errors name.

    Raises:
        TypeError: one of them is no integer.
        ValueError: one of them is out of range.
    """
    seed, ordinal = check_integer(op, "seed", seed, 64), check_integer(op, "ordinal", ordinal, 32)
    return absorb(absorb(absorb(_START, seed & _MASK), seed >> 32), ordinal)


class Rounding(NamedTuple):
    """By which random integers a step rounds one parameter and its moment; :meth:`of` makes one.

    Attributes:
        base: what they have in common, whatever the step: a number of 32 bits.
        offset, run, pitch: the indices of the elements, as :func:`fisher_kernels.ops.stochastic_round` has them.
    """

    base: int
    offset: int = 0
    run: int | None = None
    pitch: int | None = None

    @classmethod
    def of(cls, seed: int, ordinal: int, offset: int = 0, run: int | None = None, pitch: int | None = None) -> Rounding:
        """Of a parameter, by the seed of the run, 0 to 2^64 - 1, and its ordinal in the model, 0 to 2^32 - 1.

        Raises:
            TypeError, ValueError: one of these is no integer, or out of range.
        """
        return cls(rounding_base(seed, ordinal, "Rounding"), offset, run, pitch)

    def numbers(self, numel: int) -> tuple[int, int, int, int]:
        """All four as numbers: without a run, all of so many elements are one."""
        run = max(numel, 1) if self.run is None else max(self.run, 1)
        return self.base, self.offset, run, run if self.pitch is None else self.pitch


def check_rounding(op: str, i: int, base: int, offset: int, run: int, pitch: int) -> None:
    """The numbers of parameter i are in range."""
    check_integer(op, f"rounding[{i}].base", base, 32)
    if offset < 0:
        raise ValueError(f"{op}: rounding[{i}].offset is {offset}, expected at least 0")
    if run < 1:
        raise ValueError(f"{op}: rounding[{i}].run is {run}, expected at least 1")
    if pitch < run:
        raise ValueError(f"{op}: rounding[{i}].pitch is {pitch}, expected at least {run}, the run")


def check_roundings(op: str, rounding: Sequence[int] | None, count: int) -> None:
    """There are four numbers for each parameter, and they are in range."""
    if rounding is None:
        return
    if len(rounding) != 4 * count:
        raise ValueError(f"{op}: rounding has {len(rounding) // 4} entries, expected {count}, the length of params")
    for i in range(count):
        check_rounding(op, i, *rounding[4 * i : 4 * i + 4])


def numbers_of_roundings(op: str, rounding: Sequence[Rounding] | None, params: Sequence[Tensor]) -> list[int] | None:
    """Four numbers for each parameter, one after another.

    Raises:
        TypeError: it is no list, or an entry is no :class:`Rounding`.
    """
    if rounding is None:
        return None
    if not isinstance(rounding, Sequence):
        raise TypeError(f"{op}: rounding is of type {type(rounding).__name__}, expected a list of Rounding")
    for i, entry in enumerate(rounding):
        if not isinstance(entry, Rounding):
            raise TypeError(f"{op}: rounding[{i}] is of type {type(entry).__name__}, expected a Rounding")
    sizes = [p.numel() for p in params] if len(params) == len(rounding) else [1] * len(rounding)
    return [x for r, numel in zip(rounding, sizes, strict=True) for x in r.numbers(numel)]


def check_steps(
    op: str, steps: Sequence[Tensor] | None, rounding: Sequence[int] | None, params: Sequence[Tensor]
) -> None:
    """What rounds at random knows the number of its step, one float32 element beside each parameter."""
    if rounding is None:
        return
    if steps is None:
        raise ValueError(f"{op}: steps is None, expected the number of the step for each parameter beside rounding")
    check_lengths(op, params, {"steps": steps})
    for i, (t, p) in enumerate(zip(steps, params, strict=True)):
        check_count(op, i, t, p)


class Rounder:
    """Rounds float32 to the dtype of what keeps it, for one parameter in one step."""

    def __init__(self, like: Tensor, numbers: Sequence[int], step: int | Tensor) -> None:
        base, offset, run, pitch = numbers
        element = torch.arange(like.numel(), device=like.device).view(like.shape)
        self._random = random_bits(offset + element // run * pitch + element % run, base, step)

    def round(self, x: Tensor, dtype: torch.dtype, low: bool) -> Tensor:
        """By the lower or the upper half of the integers; what is not kept in bfloat16 is rounded to nearest."""
        if dtype != torch.bfloat16 or x.dtype != torch.float32:
            return x.to(dtype)
        half = self._random & 0xFFFF if low else self._random >> 16
        return round_stochastically(x.resolve_neg().contiguous(), half)


def stored(
    x: Tensor, dtype: torch.dtype, rounding: Sequence[int] | None, steps: Sequence[Tensor] | None, i: int, low: bool
) -> Tensor:
    """What parameter i, or by the lower halves its moment, is stored as: to nearest where there is no rounding."""
    if rounding is None or steps is None:
        return as_moment(x, dtype) if low else x.to(dtype)
    return Rounder(x, rounding[4 * i : 4 * i + 4], steps[i].reshape(())).round(x, dtype, low)


def random_bits(index: Tensor, base: int, step: int | Tensor) -> Tensor:
    """Random integers of 32 bits in int64, one for each element of ``index``, which is int64 and not negative."""
    state = torch.as_tensor(base, dtype=torch.int64, device=index.device)
    step = torch.as_tensor(step, dtype=torch.int64, device=index.device)
    key = absorb(absorb(state, step), index >> 32)
    return lowbias32((index & _MASK) ^ key)


def round_stochastically(x: Tensor, half: Tensor) -> Tensor:
    """Round float32 to bfloat16, away from zero with a probability that is the fraction of the distance.

    Args:
        half: random integers of 16 bits in int64, one for each element.
    """
    bits = x.view(torch.int32).to(torch.int64)
    magnitude = bits & 0x7FFFFFFF
    finite = (magnitude + half).clamp(max=_LARGEST)
    special = torch.where(magnitude > _INFINITY, magnitude | _QUIET, magnitude)
    rounded = torch.where(magnitude < _INFINITY, finite, special) | (bits & _SIGN)
    return (rounded >> 16).to(torch.int16).view(torch.bfloat16)
