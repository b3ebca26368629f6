"""What the steps that take lists of parameters share."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._lists import Table, number

_LANES = 128

NO_TENSOR, SINGLE, DOUBLE = (tl.constexpr(k) for k in range(3))
"""What a learning rate on the device is."""


def scalar(x: Tensor | None) -> tuple[float, Tensor | None]:
    """An argument of one element as a number and a factor on the device, of which kernels take the product."""
    if x is None:
        return 1.0, None
    return (float(x.item()), None) if x.is_cpu else (1.0, x)


def of_each(values: Sequence[Any], count: int) -> Sequence[Any]:
    """What is one, or one for each tensor, for each."""
    return values if len(values) == count else [*values] * count


def split_rates(rates: Sequence[Tensor], count: int) -> tuple[list[float], list[Tensor | None]]:
    """Learning rates of each tensor as ``scalar`` has them; what is there several times is read once."""
    read = {key: scalar(rate) for key, rate in {id(rate): rate for rate in rates}.items()}
    split = [read[id(rate)] for rate in of_each(rates, count)]
    return [value for value, _ in split], [tensor for _, tensor in split]


def kind(rate: Tensor | None) -> int:
    """What a layout says of a learning rate on the device."""
    if rate is None:
        return NO_TENSOR.value
    return SINGLE.value if rate.dtype == torch.float32 else DOUBLE.value


@triton.jit
def rates_of(
    addresses, count, kinds, i, there, lr, lr_factor, TENSOR: tl.constexpr, NUMBER: tl.constexpr, EACH: tl.constexpr
):
    """The learning rates of some tensors: one for all, or each a number or a tensor of its own.

    ``kinds`` is where the layout has the kinds of these tensors.
    """
    if EACH:
        kind = tl.load(kinds, there, NO_TENSOR)
        pointer = tl.load(addresses + TENSOR * count + i, there, 0)
        single = tl.load(pointer.to(tl.pointer_type(tl.float32)), kind == SINGLE, 1.0).to(tl.float64)
        double = tl.load(pointer.to(tl.pointer_type(tl.float64)), kind == DOUBLE, 1.0)
        rate = number(addresses, count, NUMBER, i, there) * single * double
    else:
        rate = times(lr, lr_factor) + tl.zeros_like(i).to(tl.float64)
    return rate


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
