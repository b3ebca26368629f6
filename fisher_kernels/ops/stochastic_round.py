"""Stochastic rounding of float32 to bfloat16."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fisher_kernels._library import Native
from fisher_kernels.ops._define import define
from fisher_kernels.ops._rounding import Rounding, check_integer, random_bits, round_stochastically, rounding_base
from fisher_kernels.ops._step import as_moment

_OP = "stochastic_round"
_INDICES = 2**63


class _Call(NamedTuple):
    """The arguments of a call, in the order of the schema."""

    x: Tensor
    base: int
    step: int
    offset: int
    run: int | None
    pitch: int | None
    low: bool
    step_at: Tensor | None = None
    """Where the number of the step lies, which nobody waits for; in the place of ``step``."""

    def result(self) -> Tensor:
        """What is to be filled, after all checks."""
        x, run, offset = self.x, self.run, self.offset
        if x.dtype != torch.float32:
            raise TypeError(f"{_OP}: x has dtype {x.dtype}, expected float32")
        check_integer(_OP, "base", self.base, 32)
        check_integer(_OP, "step", self.step, 32)
        if (at := self.step_at) is not None:
            if at.dtype != torch.float32:
                raise TypeError(f"{_OP}: step has dtype {at.dtype}, expected float32, or an integer")
            if at.numel() != 1:
                raise ValueError(f"{_OP}: step has shape {tuple(at.shape)}, expected one element")
            if at.device != x.device:
                raise ValueError(f"{_OP}: step is on {at.device}, expected {x.device}, the device of x")
        if offset < 0:
            raise ValueError(f"{_OP}: offset is {offset}, expected at least 0")
        if run is None:
            if self.pitch is not None:
                raise ValueError(f"{_OP}: pitch is {self.pitch} without a run, expected both")
        elif run < 1 and (run < 0 or x.numel()):
            raise ValueError(f"{_OP}: run is {run}, expected at least 1")
        elif self.pitch is not None and self.pitch < run:
            raise ValueError(f"{_OP}: pitch is {self.pitch}, expected at least {run}, the run")
        length, distance = self.runs
        last = max(x.numel() - 1, 0)
        if offset + last // length * distance + last % length >= _INDICES:
            raise ValueError(f"{_OP}: offset is {offset}, expected indices below 2^63")
        return torch.empty_like(x, dtype=torch.bfloat16)

    @property
    def runs(self) -> tuple[int, int]:
        """Run and pitch as numbers: without them, all elements are one run."""
        if self.run is None:
            return max(self.x.numel(), 1), max(self.x.numel(), 1)
        return max(self.run, 1), self.run if self.pitch is None else self.pitch  # a run of no columns may be 0


def _reference(s: _Call) -> Tensor:
    out = s.result()
    length, distance = s.runs
    element = torch.arange(s.x.numel(), device=s.x.device)
    step = s.step if s.step_at is None else s.step_at.reshape(())
    random = random_bits(s.offset + element // length * distance + element % length, s.base, step)
    half = random & 0xFFFF if s.low else random >> 16
    return out.copy_(round_stochastically(s.x.resolve_neg().contiguous(), half.view(s.x.shape)))


def _native(on: Native, s: _Call) -> Tensor:
    out = s.result()
    rounded = out if out.is_contiguous() else torch.empty(s.x.shape, dtype=out.dtype, device=out.device)
    on.kernels.stochastic_round(
        s.x.contiguous(), rounded, s.base, s.step, s.offset, *s.runs, s.low, s.step_at, on.place(s.x.device)
    )
    return out if rounded is out else out.copy_(rounded)


def _triton(s: _Call) -> Tensor:
    from fisher_kernels.triton_kernels import stochastic_round

    out = s.result()
    rounded = out if out.is_contiguous() else torch.empty(s.x.shape, dtype=out.dtype, device=out.device)
    stochastic_round.stochastic_round(s.x.contiguous(), rounded, s.base, s.step, s.offset, *s.runs, s.low, s.step_at)
    return out if rounded is out else out.copy_(rounded)


_stochastic_round = define(
    "stochastic_round(Tensor x, int base, int step, int offset, int? run, int? pitch, bool low, Tensor? step_at=None) "
    "-> Tensor",
    arguments=_Call,
    fake=_Call.result,
    reference=_reference,
    native=_native,
    triton=_triton,
)

_HALVES = {"high": False, "low": True}


def stochastic_round(
    x: Tensor,
    *,
    seed: int = 0,
    ordinal: int = 0,
    step: int | Tensor = 0,
    offset: int = 0,
    run: int | None = None,
    pitch: int | None = None,
    half: str = "high",
) -> Tensor:
    r"""Round to one of the two neighbouring bfloat16 numbers at random, so that the mean is x.

    .. math::

        \mathrm{out}_i = \operatorname{sign}(x_i) \, (a_i \text{ or } b_i), \qquad
        P(b_i) = \frac{|x_i| - a_i}{b_i - a_i},

    where :math:`a_i \le |x_i| < b_i` are neighbours in bfloat16. The random integers are a function of the arguments
    alone, the same on every backend and device: a hash of seed, ordinal, step and the index of the element,

    .. math::

        \mathrm{index}_i = \mathrm{offset} + \lfloor i / \mathrm{run} \rfloor \, \mathrm{pitch} + i \bmod \mathrm{run},

    i being its row-major position in x, however x lies in memory. So parts of a tensor are rounded as the whole is:
    rows from r on of a tensor with n numbers in a row have ``offset = r * n``; columns c to d - 1 of it have
    ``offset = c, run = d - c, pitch = n``; rows and columns together both.

    A number that bfloat16 has stays what it is, as do infinities; a NaN stays a NaN. What is finite stays finite:
    between the largest number and the next power of two, it becomes the largest.

    Args:
        x: any shape and strides; float32.
        seed: of the run, 0 to 2^64 - 1.
        ordinal: of the tensor among those of a step, 0 to 2^32 - 1.
        step: 0 to 2^32 - 1, or a float32 tensor of one element, on the device of x, which is not waited for.
        offset: index of the first element, at least 0.
        run: how many elements have indices one after another before there is a gap; None if all have.
        pitch: distance between the first indices of two runs, at least ``run``; None if there are no gaps.
        half: which 16 of the 32 bits of an integer are used, "high" or "low". Two numbers that share seed, ordinal,
            step and index, as a parameter and its moment do, are rounded independently with one half each.

    Returns:
        bfloat16 with the shape of x, and its memory format where x has no gaps (as ``torch.empty_like``).

    Raises:
        TypeError: x is not float32, or another argument is no integer.
        ValueError: an argument is out of range, or an index would be 2^63 or more; the message names it.
    """
    if half not in _HALVES:
        raise ValueError(f"{_OP}: half is {half!r}, expected 'high' or 'low'")
    base, low = rounding_base(seed, ordinal, _OP), _HALVES[half]
    if isinstance(step, Tensor):
        return _round(_Call(x, base, 0, offset, run, pitch, low, step))
    return _round(_Call(x, base, step, offset, run, pitch, low))


def _round(call: _Call) -> Tensor:
    rounded: Tensor = _stochastic_round(call)
    return rounded


def narrowed(x: Tensor, dtype: torch.dtype, rounding: Rounding | None, step: Tensor | None, *, low: bool) -> Tensor:
    """What a step stores x as, that of a parameter or, by the lower halves of the integers, that of a moment.

    Args:
        dtype: what it is stored in; what is float32 and goes to bfloat16 is rounded at random.
        rounding, step: by which integers, and the number of the step; None rounds to nearest.
    """
    if rounding is None or dtype != torch.bfloat16 or x.dtype != torch.float32:
        return as_moment(x, dtype) if low else x.to(dtype)
    return _round(_Call(x, rounding.base, 0, rounding.offset, rounding.run, rounding.pitch, low, step))
