"""Inverses with arithmetic of any precision, of which the tests of precision take their measure.

Every operation is one of numpy on an array, so that no vendor's library and no processor has a say in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def exactly(x: Array) -> Array:
    """No rounding but that of the array's own dtype."""
    return x


def to_bits(count: int) -> Callable[[Array], Array]:
    """Rounds to the nearest number with so many bits: the arithmetic of float64 becomes that of a shorter format."""

    def rounded(x: Array) -> Array:
        fraction, exponent = np.frexp(x)
        return np.ldexp(np.rint(np.ldexp(fraction, count)), exponent - count)

    return rounded


def textbook_inverse(a: Array, rounded: Callable[[Array], Array] = exactly) -> Array:
    """A^-1 = L^-T L^-1 with A = L L^T, as textbooks have it; what an operation yields is rounded: [B, n, n]."""
    n = a.shape[-1]
    rest, lower, inverse = a.copy(), np.zeros_like(a), np.zeros_like(a)
    for k in range(n):
        lower[:, k:, k] = rounded(rest[:, k:, k] / rounded(np.sqrt(rest[:, k, k]))[:, None])
        product = rounded(lower[:, k + 1 :, None, k] * lower[:, None, k + 1 :, k])
        rest[:, k + 1 :, k + 1 :] = rounded(rest[:, k + 1 :, k + 1 :] - product)
    triangle = np.zeros_like(a) + np.eye(n, dtype=a.dtype)
    for i in range(n):
        triangle[:, i] = rounded(triangle[:, i] / lower[:, i, i, None])
        product = rounded(lower[:, i + 1 :, i, None] * triangle[:, i, None, :])
        triangle[:, i + 1 :] = rounded(triangle[:, i + 1 :] - product)
    for k in range(n):
        inverse = rounded(inverse + rounded(triangle[:, k, :, None] * triangle[:, k, None, :]))
    return inverse
