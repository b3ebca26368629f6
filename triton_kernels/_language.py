"""What several kernels share on the device side."""

import triton
import triton.language as tl

from ._launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def narrow(x, T: tl.constexpr):
    """x in the dtype T, rounded to nearest, ties to even."""
    if _INTERPRETED and T == tl.bfloat16:
        # The interpreter's own conversion cuts bits off, and makes something of 0. Adding half a unit first, and one
        # more for an odd one, rounds.
        single = x.to(tl.float32)
        bits = single.to(tl.uint32, bitcast=True)
        rounded = tl.where(single == single, bits + 0x7FFF + ((bits >> 16) & 1), bits | (1 << 22))
        result = (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(T)
    return result


@triton.jit
def is_finite(x):
    """Whether x is neither NaN nor infinite."""
    return x - x == 0


@triton.jit
def divide(x, y):
    """x / y, rounded to nearest; Triton's own quotient of float32 is an approximation."""
    if x.dtype == tl.float64:
        quotient = x / y
    else:
        quotient = tl.div_rn(x, y)
    return quotient


@triton.jit
def divmod_from(first, lanes, size):
    """Quotients and remainders of ``first + lanes`` by ``size``, with one 32-bit division for each lane.

    ``first`` is a scalar below ``size``, both of them 64-bit; lanes are 32-bit and below 2^30. The quotients are
    32-bit, the remainders 64-bit.
    """
    left = tl.minimum(size - first, 1 << 30).to(tl.int32)  # lanes until the first remainder of 0
    narrow_size = tl.minimum(size, 1 << 30).to(tl.uint32)
    beyond = (lanes - left).to(tl.uint32)
    past = lanes >= left
    quotient = tl.where(past, (beyond // narrow_size).to(tl.int32) + 1, 0)
    remainder = tl.where(past, (beyond % narrow_size).to(tl.int64), first + lanes)
    return quotient, remainder
