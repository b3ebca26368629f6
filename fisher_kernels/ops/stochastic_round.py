"""Stochastic rounding of float32 to bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_kernels._library import Native
from fisher_kernels.ops._define import define
from fisher_kernels.ops._rounding import check_integer, random_bits, round_stochastically, rounding_base

_OP = "stochastic_round"
_INDICES = 2**63


def _runs(x: Tensor, run: int | None, pitch: int | None) -> tuple[int, int]:
    """Run and pitch as numbers: without them, all elements are one run."""
    if run is None:
        return max(x.numel(), 1), max(x.numel(), 1)
    return max(run, 1), run if pitch is None else pitch  # of columns of which there are none, a run may be 0


def _fake(x: Tensor, base: int, step: int, offset: int, run: int | None, pitch: int | None, low: bool) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError(f"{_OP}: x has dtype {x.dtype}, expected float32")
    check_integer(_OP, "base", base, 32)
    check_integer(_OP, "step", step, 32)
    if offset < 0:
        raise ValueError(f"{_OP}: offset is {offset}, expected at least 0")
    if run is None:
        if pitch is not None:
            raise ValueError(f"{_OP}: pitch is {pitch} without a run, expected both")
    elif run < 1 and (run < 0 or x.numel()):
        raise ValueError(f"{_OP}: run is {run}, expected at least 1")
    elif pitch is not None and pitch < run:
        raise ValueError(f"{_OP}: pitch is {pitch}, expected at least {run}, the run")
    length, distance = _runs(x, run, pitch)
    last = max(x.numel() - 1, 0)
    if offset + last // length * distance + last % length >= _INDICES:
        raise ValueError(f"{_OP}: offset is {offset}, expected indices below 2^63")
    return torch.empty_like(x, dtype=torch.bfloat16)


def _reference(x: Tensor, base: int, step: int, offset: int, run: int | None, pitch: int | None, low: bool) -> Tensor:
    out = _fake(x, base, step, offset, run, pitch, low)
    length, distance = _runs(x, run, pitch)
    element = torch.arange(x.numel(), device=x.device)
    random = random_bits(offset + element // length * distance + element % length, base, step)
    half = random & 0xFFFF if low else random >> 16
    return out.copy_(round_stochastically(x.resolve_neg().contiguous(), half.view(x.shape)))


def _native(
    on: Native, x: Tensor, base: int, step: int, offset: int, run: int | None, pitch: int | None, low: bool
) -> Tensor:
    out = _fake(x, base, step, offset, run, pitch, low)
    rounded = out if out.is_contiguous() else torch.empty(x.shape, dtype=out.dtype, device=out.device)
    on.kernels.stochastic_round(
        x.contiguous(), rounded, base, step, offset, *_runs(x, run, pitch), low, on.place(x.device)
    )
    return out if rounded is out else out.copy_(rounded)


def _triton(x: Tensor, base: int, step: int, offset: int, run: int | None, pitch: int | None, low: bool) -> Tensor:
    from fisher_kernels.triton_kernels import stochastic_round

    out = _fake(x, base, step, offset, run, pitch, low)
    rounded = out if out.is_contiguous() else torch.empty(x.shape, dtype=out.dtype, device=out.device)
    stochastic_round.stochastic_round(x.contiguous(), rounded, base, step, offset, *_runs(x, run, pitch), low)
    return out if rounded is out else out.copy_(rounded)


_stochastic_round = define(
    "stochastic_round(Tensor x, int base, int step, int offset, int? run, int? pitch, bool low) -> Tensor",
    fake=_fake,
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
    step: int = 0,
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
        step: 0 to 2^32 - 1.
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
    return _stochastic_round(x, rounding_base(seed, ordinal, _OP), step, offset, run, pitch, _HALVES[half])
