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
def as_moment(x, T: tl.constexpr):
    """x in the dtype that a moment is kept in; what is finite stays so."""
    result = narrow(x, T)
    if T == tl.bfloat16:
        bits = result.to(tl.uint16, bitcast=True)
        over = ((bits & 0x7FFF) == 0x7F80) & is_finite(x)
        result = tl.where(over, bits - 1, bits).to(tl.uint16).to(tl.bfloat16, bitcast=True)
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


@triton.jit
def add_product(total, left, right, A: tl.constexpr):
    """total + left @ right in the dtype A; of 16-bit numbers the products are exact in float32."""
    if _INTERPRETED and left.dtype == tl.bfloat16:
        left, right = left.to(tl.float32), right.to(tl.float32)  # which the interpreter can multiply
    return tl.dot(left, right, total, input_precision="ieee", out_dtype=A)


@triton.jit
def tile_of_triangle(number):
    """Row and column of a tile of the lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row -= (row * (row + 1) // 2 > number).to(tl.int32)  # where the root was rounded up,
    row += ((row + 1) * (row + 2) // 2 <= number).to(tl.int32)  # and where down
    return row, number - row * (row + 1) // 2
