"""What the steps that take lists of parameters share."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._lists import Table

_LANES = 128


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
