"""What the steps that take lists of parameters share."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._lists import TYPES, Cut, Layout, Table, element_chunks, number

_LANES = 128
_NO_TENSOR, _SINGLE, _DOUBLE = (tl.constexpr(k) for k in range(3))  # what a learning rate on the device is


def scalar(x: Tensor | None) -> tuple[float, Tensor | None]:
    """An argument of one element as a number and a factor on the device, of which kernels take the product."""
    if x is None:
        return 1.0, None
    return (float(x.item()), None) if x.is_cpu else (1.0, x)


@triton.jit
def is_off(found_inf):
    """Whether a step is to do nothing; None never is."""
    if found_inf is None:
        off = tl.full((), 0, tl.int1)
    else:
        off = tl.load(found_inf) != 0
    return off


@triton.jit
def times(value, pointer):
    """The product that ``scalar`` speaks of, in float64."""
    product = tl.full((), value, tl.float64)
    if pointer is not None:
        product *= tl.load(pointer).to(tl.float64)
    return product


@triton.jit
def rate_of(addresses, count, kinds, TENSOR: tl.constexpr, NUMBER: tl.constexpr, i, there):
    """The learning rates of some parameters: a number of the table, or a tensor of one element.

    Args:
        kinds: where for each of them stands what ``of_each`` says of it.
        TENSOR, NUMBER: which list of the table has the tensors, and which the numbers.
    """
    kind = tl.load(kinds, there, _NO_TENSOR)
    pointer = tl.load(addresses + TENSOR * count + i, there, 0)
    single = tl.load(pointer.to(tl.pointer_type(tl.float32)), kind == _SINGLE, 1.0).to(tl.float64)
    double = tl.load(pointer.to(tl.pointer_type(tl.float64)), kind == _DOUBLE, 1.0)
    return number(addresses, count, NUMBER, i, there) * single * double


def _kind(rate: Tensor | None) -> int:
    if rate is None:
        return _NO_TENSOR.value
    return _SINGLE.value if rate.dtype == torch.float32 else _DOUBLE.value


def of_each(
    lr: Sequence[Tensor], weight_decay: Sequence[float], count: int, each: bool
) -> tuple[list[Tensor | None], list[int], tuple[Sequence[float], ...]]:
    """Learning rates and decays of each parameter for a table.

    Args:
        each: whether there is more than one of either; else what all have goes to the kernels as a number.

    Returns:
        Learning rates that are on the device, what each of them is, and numbers: the other factor of each learning
        rate, and the decay.
    """
    on_device: list[Tensor | None] = [None] * count
    numbers: tuple[Sequence[float], ...] = ()
    if each:
        read = {id(rate): scalar(rate) for rate in {id(rate): rate for rate in lr}.values()}
        rates = [read[id(rate)] for rate in _each(lr, count)]
        on_device = [x for _, x in rates]
        numbers = [x for x, _ in rates], _each(weight_decay, count)
    return on_device, list(map(_kind, on_device)), numbers


def _each(values: Sequence[Any], count: int) -> Sequence[Any]:
    return values if len(values) == count else [*values] * count


def by_moment(rows: Sequence[Sequence[int]], moments: Sequence[Tensor]) -> Layout:
    """A layout whose cuts are by chunks of elements, and of the kind that the dtype of a moment is."""
    return Layout(rows, [Cut(i, TYPES[m.dtype], element_chunks(m.numel())) for i, m in enumerate(moments)])


@triton.jit(do_not_specialize=["count"])
def _advance(
    addresses, count, corrections, skipped, log_beta: tl.float64, found_inf, STEPS: tl.constexpr, LANES: tl.constexpr
):
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = i < count
    tl.store(skipped + i, tl.zeros_like(i).to(tl.int64), there)
    if not is_off(found_inf):
        pointers = tl.load(addresses + STEPS * count + i, there, 0).to(tl.pointer_type(tl.float32))
        t = tl.load(pointers, there, 0.0) + 1
        tl.store(pointers, t, there)
        tl.store(corrections + i, 1 - tl.exp(t.to(tl.float64) * log_beta), there)


def advance(
    table: Table, steps: int, beta: float, found_inf: Tensor | None, device: torch.device
) -> tuple[Tensor, ...]:
    """Count one more step of every tensor: ``t <- t + 1``.

    Args:
        steps: which of the lists has the counts.
        beta: of the moment.
        found_inf: where it is not 0, nothing counts.

    Returns:
        ``1 - beta^t`` for each tensor, float64, undefined where nothing counts; and zeros, int64, to count in.
    """
    corrections = torch.empty(table.count, dtype=torch.float64, device=device)
    skipped = torch.empty(table.count, dtype=torch.int64, device=device)
    log_beta = math.log(beta) if beta else -math.inf
    launch(
        _advance, triton.cdiv(table.count, _LANES), device,
        table.addresses, table.count, corrections, skipped, log_beta, found_inf, STEPS=steps, LANES=_LANES,
    )  # fmt: skip
    return corrections, skipped
