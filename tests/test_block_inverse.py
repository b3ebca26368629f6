"""Inverses of small blocks, solutions and products with them, against their definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from fisher_kernels import use_backend
from fisher_kernels._library import CUDA, native_module
from fisher_kernels.backends import available
from fisher_kernels.ops import block_apply, block_inverse, block_inverse_, block_solve
from tests.cases import LAYOUTS, WRITABLE_LAYOUTS, integers, random, unaligned
from tests.cases.block_inverse import COUNTS, LARGE, SIZES, blocks, conditioned
from tests.comparison import assert_same_bits, assert_within, surroundings, unit_roundoff
from tests.rounding import Array, textbook_inverse, to_bits

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

DTYPES = (torch.float32, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def damped(a: Tensor, damping: float) -> Tensor:
    """The matrix that is inverted, in float64."""
    return a.double() + damping * torch.eye(a.shape[-1], dtype=torch.float64)


def relative_rounding(a: Tensor, dtype: torch.dtype) -> Tensor:
    """How far an inverse may lie from the true one, as a share of the norm of that: [B].

    A Cholesky factorisation solves with A + E, |E| <= (n + 1) u times the norm of A to first order (Higham, Accuracy
    and Stability, theorem 10.3), and an inverse moves by as much times the condition number; forming the inverse
    triangle and its square cost as much again, each. The definition rounds too where the dtype is float64.
    """
    return 8 * (a.shape[-1] + 1) * unit_roundoff(dtype) * torch.linalg.cond(a)


def check_inverse(actual: Tensor, a: Tensor, damping: float, what: str = "") -> None:
    exact = damped(a, damping)
    expected = torch.linalg.inv(exact)
    norm = torch.linalg.matrix_norm(expected, 2) if a.numel() else exact.new_zeros(len(a))
    bound = (relative_rounding(exact, a.dtype) if a.numel() else norm) * norm
    assert actual.dtype == a.dtype
    assert actual.is_contiguous()
    assert_within(actual, expected, bound[:, None, None], what)
    assert_same_bits(actual, actual.mT, f"{what}: the mirror image")


def check_solution(actual: Tensor, a: Tensor, damping: float, rhs: Tensor, what: str = "") -> None:
    exact = damped(a, damping)
    size = torch.linalg.matrix_norm(torch.linalg.inv(exact), 2) * rhs.double().norm(dim=1)
    bound = (relative_rounding(exact, a.dtype) * size)[:, None]
    assert_within(actual, torch.linalg.solve(exact, rhs.double()), bound, f"{what}: the solution")


def most(implementation: str, n: int) -> int:
    """So many blocks are enough: more than a program of a Triton kernel works on, whose interpreter is slow."""
    return max(COUNTS) if implementation != "triton" else 33 if n <= 17 else 5


def good(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


# Values.


@pytest.mark.every_value_on_host
@each_dtype
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_inverse_and_solution(implementation: str, n: int, count: int, dtype: torch.dtype) -> None:
    count = min(count, most(implementation, n))
    a, rhs = blocks(count, n, dtype), random((count, n), dtype, 1)
    before = a.clone()
    inverse, info = block_inverse(a, 0.1)
    assert_same_bits(info, good(count))
    check_inverse(inverse, a, 0.1)
    out = torch.full_like(a, math.nan)
    assert_same_bits(block_inverse_(out, a, 0.1), info)
    assert_same_bits(out, inverse, "in place")
    x, solved = block_solve(a, 0.1, rhs)
    assert_same_bits(solved, good(count))
    assert x.is_contiguous()
    if count:
        check_solution(x, a, 0.1, rhs)
    assert_same_bits(a, before, "the input")


@each_dtype
@pytest.mark.parametrize("n", range(1, 65))
def test_every_size_in_lanes(implementation: str, n: int, dtype: torch.dtype) -> None:
    count = 2 if implementation == "triton" else 17
    a, rhs = blocks(count, n, dtype), random((count, n), dtype, 1)
    inverse, info = block_inverse(a, 0.1)
    assert_same_bits(info, good(count))
    check_inverse(inverse, a, 0.1)
    x, solved = block_solve(a, 0.1, rhs)
    assert_same_bits(solved, good(count))
    check_solution(x, a, 0.1, rhs)


@pytest.mark.every_value_on_host
@each_dtype
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_product(implementation: str, n: int, count: int, dtype: torch.dtype) -> None:
    """Of matrices that are not symmetric; sums of n products of whole numbers are exact."""
    count = min(count, most(implementation, n))
    a, v = random((count, n, n), dtype), random((count, n), dtype, 1)
    magnitude = (a.double().abs() @ v.double().abs()[..., None])[..., 0]
    expected = (a.double() @ v.double()[..., None])[..., 0]
    assert_within(block_apply(a, v), expected, 2 * (n + 1) * unit_roundoff(dtype) * magnitude)
    a, v = integers((count, n, n), dtype), integers((count, n), dtype, 1)
    product = block_apply(a, v)
    assert product.is_contiguous()
    assert_within(product, (a.double() @ v.double()[..., None])[..., 0], 0.0)


@each_dtype
@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 64, 65, 130])
def test_powers_of_two_are_exact(implementation: str, n: int, dtype: torch.dtype) -> None:
    """Diagonal blocks of powers of four, whose roots and reciprocals round nothing."""
    values = 4.0 ** integers((20, n), torch.float64, limit=3)
    a = torch.diag_embed(values).to(dtype)
    inverse, info = block_inverse(a, 0.0)
    assert_same_bits(info, good(20))
    assert_within(inverse, torch.diag_embed(1 / values), 0.0)
    rhs = integers((20, n), dtype)
    assert_within(block_solve(a, 0.0, rhs)[0], rhs.double() / values, 0.0)


# Precision.

ROUNDINGS = 2.0
"""What the mean error of an inverse is held to, in units of `rounding_error`. See there."""

LOST = 3
"""Bits that make a decimal digit, less a third of a bit."""

CONDITIONS = (1e1, 1e2, 1e4, 1e6)
each_conditioned = pytest.mark.parametrize(
    ("n", "condition"), [(n, condition) for n in (2, 3, 9, 25, 64) for condition in CONDITIONS]
)


def rounding_error(a: Array, inverse: Array, unit: float) -> Array:
    """By how much one rounding of each of n steps moves the inverse X of A, as a share of its Frobenius norm: [B].

    What a Cholesky factorisation finds is the factor of A + E, where e_ij is at most (n + 1) u sqrt(a_ii a_jj) (Demmel;
    Higham, Accuracy and Stability, theorem 10.5), and X moves by X E X. That all roundings of an entry point the same
    way, and those of all entries together, is what n + 1 stands for, and it does not happen: as independent errors
    (Higham and Mary, A new approach to probabilistic rounding error analysis) of terms whose squares add up to at most
    a_ii a_jj, they make an e_ij of size u sqrt(a_ii a_jj), and an X E X of size u sum_ij x_ij^2 a_jj. That is at most
    sqrt(n) u cond(A) times the norm of X.

    The inverse of the factor and the product of that with itself cost as much again, each: sqrt(3) of these units in
    all where every rounding is as large as can be, for which ROUNDINGS stands. It needs no particular algorithm:
    elimination without roots and sweeps round no more.
    """
    diagonal = np.diagonal(a, axis1=1, axis2=2)
    squares: Array = (inverse**2 * diagonal[:, None, :]).sum((1, 2))
    return unit * squares / np.sqrt((inverse**2).sum((1, 2)))


def mean_error(found: Array, a: Array, inverse: Array, unit: float) -> float:
    """The root of the mean square over blocks of the error, in units of `rounding_error`."""
    error = ((found - inverse) ** 2).sum((1, 2)) / (inverse**2).sum((1, 2))
    return float(np.sqrt((error / rounding_error(a, inverse, unit) ** 2).mean()))


@cache
def conditioned_and_inverse(count: int, n: int, condition: float, dtype: torch.dtype) -> tuple[Tensor, Array, Array]:
    """Blocks, and these and their inverses with more bits than any kernel has."""
    a = conditioned(count, n, condition, dtype)
    wide = a.numpy().astype(np.longdouble)
    return a, wide, textbook_inverse(wide)


def has_more_bits(dtype: torch.dtype) -> bool:
    """Whether there is a format to compare with."""
    return bool(np.finfo(np.longdouble).eps < 1e-2 * torch.finfo(dtype).eps)


@each_dtype
@each_conditioned
def test_error_is_that_of_rounding(implementation: str, n: int, condition: float, dtype: torch.dtype) -> None:
    """And a kernel that lost a digit would exceed the bound: it is reached up to a factor below 8."""
    count = 32 if n >= 25 else 200
    if not has_more_bits(dtype):
        pytest.skip("this machine has no format with more bits")
    a, wide, exact = conditioned_and_inverse(count, n, condition, dtype)
    inverse, info = block_inverse(a, 0.0)
    assert_same_bits(info, good(count))
    check_inverse(inverse, a, 0.0)
    error = mean_error(inverse.numpy(), wide, exact, unit_roundoff(dtype))
    assert error <= ROUNDINGS
    if implementation != "reference" and n > 3:  # LAPACK may be as exact as it likes
        assert error * 2**LOST > ROUNDINGS


@each_conditioned
def test_a_lost_digit_exceeds_the_bound(n: int, condition: float) -> None:
    """The textbook's algorithm keeps the bound, and exceeds it when each of its operations loses three bits."""
    a, wide, exact = conditioned_and_inverse(8 if n >= 25 else 200, n, condition, torch.float32)
    unit = unit_roundoff(torch.float32)
    for bits, keeps in ((24, True), (24 - LOST, False)):
        found = textbook_inverse(a.double().numpy(), to_bits(bits))
        assert (mean_error(found, wide, exact, unit) <= ROUNDINGS) == keeps, bits


def relative_errors(found: Tensor, a: Tensor) -> list[float]:
    """Of each number of inverses of 2 x 2, against rational ones."""
    errors = []
    for block, inverse in zip(a.tolist(), found.tolist(), strict=True):
        (p, _), (q, r) = ([Fraction(x) for x in row] for row in block)
        for row, wanted in zip(inverse, ((r, -q), (-q, p)), strict=True):
            for x, adjugate in zip(row, wanted, strict=True):
                errors.append(float(abs(Fraction(x) * (p * r - q * q) - adjugate) / abs(adjugate)))
    return errors


@each_dtype
@pytest.mark.parametrize("condition", CONDITIONS)
def test_an_inverse_of_two_rows_is_exact(implementation: str, condition: float, dtype: torch.dtype) -> None:
    """Each number to ten roundings, whatever the condition; without the correction it takes a tenth of it.

    With u for a rounding: l = a_10 / a_00 has 2 u, the pivot corrected by what rounding took from l 2 u, its reciprocal
    3 u, -l / pivot 6 u, l l / pivot 9 u, and 1 / a_00 added to that 10 u.
    """
    if implementation == "reference":
        pytest.skip("LAPACK promises no such thing")
    a = conditioned(200, 2, condition, dtype)
    inverse, info = block_inverse(a, 0.0)
    assert_same_bits(info, good(200))
    allowed = 10 * unit_roundoff(dtype)
    assert max(relative_errors(inverse, a)) <= allowed
    x, _ = block_solve(a, 0.0, torch.tensor([1.0, 0.0], dtype=dtype).expand(200, 2))
    assert max(relative_errors(torch.stack([x, x], 2), a)[::2]) <= allowed  # the first column of the inverse
    uncorrected = textbook_inverse(a.double().numpy(), to_bits(24))
    assert max(relative_errors(torch.from_numpy(uncorrected), a)) > condition / 10 * unit_roundoff(torch.float32)


@pytest.mark.parametrize("n", [3, 64, 65])
def test_nothing(implementation: str, n: int) -> None:
    for shape in ((0, n, n), (3, 0, 0), (0, 0, 0)):
        inverse, info = block_inverse(torch.ones(shape), 0.0)
        assert inverse.shape == shape
        assert_same_bits(info, good(shape[0]))
        assert_same_bits(block_inverse_(torch.ones(shape), torch.ones(shape), 0.0), good(shape[0]))
        x, solved = block_solve(torch.ones(shape), 0.0, torch.ones(shape[:2]))
        assert x.shape == shape[:2]
        assert_same_bits(solved, good(shape[0]))
        assert block_apply(torch.ones(shape), torch.ones(shape[:2])).shape == shape[:2]


# Layouts.


@each_dtype
@pytest.mark.parametrize("n", [3, 9, 17, 65])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(implementation: str, layout: str, n: int, dtype: torch.dtype) -> None:
    count = 3 if implementation == "triton" and n == 65 else 18
    x, y = LAYOUTS[layout](blocks(count, n, dtype)), LAYOUTS[layout](random((count, n), dtype, 1))
    inverse, _ = block_inverse(x, 0.1)
    assert_same_bits(inverse, block_inverse(x.contiguous(), 0.1)[0])
    assert_same_bits(block_solve(x, 0.1, y)[0], block_solve(x.contiguous(), 0.1, y.contiguous())[0])
    assert_same_bits(block_apply(x, y), block_apply(x.contiguous(), y.contiguous()))


@each_dtype
@pytest.mark.parametrize("n", [3, 9, 17, 65])
def test_into_every_layout(implementation: str, n: int, dtype: torch.dtype) -> None:
    a = blocks(18, n, dtype)
    a[5, 0, 0] = -9
    for name, layout in WRITABLE_LAYOUTS.items():
        out = layout(random(a.shape, dtype, 2))
        around, before = surroundings(out), out.clone()
        info = block_inverse_(out, a, 0.1)
        assert info.nonzero().flatten().tolist() == [5]
        assert_same_bits(out[5], before[5], name)
        expected, _ = block_inverse(a, 0.1)
        assert_same_bits(out[info == 0], expected[info == 0], name)
        assert_same_bits(surroundings(out), around, f"{name}: the memory around the result")


def begun_at(offset: int, x: Tensor) -> Tensor:
    """In row-major order, so many elements into an allocation."""
    around = torch.full((x.numel() + 8,), 7.0, dtype=x.dtype)
    return around[offset : offset + x.numel()].view(x.shape).copy_(x)


@each_dtype
@pytest.mark.parametrize("n", [1, 2, 4, 6, 8, 9, 11, 16, 25, 32, 33, 48, 49, 64, 65, 130])
def test_any_alignment_changes_no_bit(implementation: str, n: int, dtype: torch.dtype) -> None:
    """Nor do bad blocks, where only some of what was moved together is written."""
    if not implementation.startswith(("cpu", "cuda")):
        pytest.skip("none of the other kernels moves 16 bytes at a time by itself")
    count = 5000 if n == 1 else 70 if n <= 9 else 9  # more than are worked on together
    a, v = blocks(count, n, dtype), random((count, n), dtype, 1)
    a[1, 0, -1], a[-1, -1, -1] = math.nan, -1.0
    before = random(a.shape, dtype, 2)
    inverse, info = block_inverse(a, 0.1)
    assert info.nonzero().flatten().tolist() == [1, count - 1]
    (x, _), product = block_solve(a, 0.1, v), block_apply(before, v)
    kept = torch.where(info[:, None, None] != 0, before, inverse)
    for offset in (0, 1, 2, 3):
        b, w = begun_at(offset, a), begun_at(offset, v)
        assert_same_bits(block_inverse(b, 0.1)[0], inverse)
        for other in {0, 1, offset}:
            assert_same_bits(block_solve(b, 0.1, begun_at(other, v))[0], x)
            assert_same_bits(block_apply(begun_at(other, before), w), product)
            out = begun_at(other, before)
            around = surroundings(out)
            assert_same_bits(block_inverse_(out, b, 0.1), info)
            assert_same_bits(out, kept)
            assert_same_bits(surroundings(out), around, "the memory around the result")


@each_dtype
@pytest.mark.parametrize("n", [3, 8, 9, 16, 25, 49, 64])
def test_cuda_kernels_invert_in_place(n: int, dtype: torch.dtype) -> None:
    """What no op asks for, and other kernels do."""
    if "cuda" not in available():
        pytest.skip("needs CUDA kernels")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a = blocks(70, n, dtype).to(device)
    a[3, 0, 0] = math.nan
    info = torch.empty(70, dtype=torch.int64, device=device)
    with use_backend("cuda"):
        expected, expected_info = block_inverse(a, 0.1)
    CUDA.kernels.block_inverse(a, 0.1, a, info, CUDA.place(device))
    assert_same_bits(a.cpu(), expected.cpu())
    assert_same_bits(info.cpu(), expected_info.cpu())


# Bad blocks.


def indefinite(a: Tensor) -> None:
    a.diagonal()[-1] = -1.0


def singular(a: Tensor) -> None:
    a.zero_()


def entry(row: int, column: int, value: float) -> Callable[[Tensor], None]:
    def spoil(a: Tensor) -> None:
        a[row, column] = value

    return spoil


SPOILED: dict[str, Callable[[Tensor], None]] = {
    "indefinite": indefinite,
    "zero": singular,
    "NaN in the upper triangle only": entry(0, -1, math.nan),
    "NaN in the lower triangle only": entry(-1, 0, math.nan),
    "NaN on the diagonal": entry(-1, -1, math.nan),
    "infinite in the upper triangle only": entry(0, -1, -math.inf),
    "infinite in the lower triangle only": entry(-1, 0, math.inf),
    "infinite on the diagonal": entry(0, 0, math.inf),
}


@pytest.mark.slow_interpreted
@each_dtype
@pytest.mark.parametrize("fault", SPOILED)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 25, 64, 65])
def test_bad_blocks(implementation: str, n: int, fault: str, dtype: torch.dtype) -> None:
    """Marked and made NaN, or left as they were in place; their neighbours do not change by a bit."""
    count = 17 if implementation == "triton" else 37
    a, rhs = blocks(count, n, dtype), random((count, n), dtype, 1)
    a.diagonal(dim1=1, dim2=2).add_(0.5)
    clean, solved = block_inverse(a, 0.0)[0], block_solve(a, 0.0, rhs)[0]
    bad = torch.zeros(count, dtype=torch.bool)
    bad[[b for b in (0, 7, 16, 36) if b < count]] = True
    for b in bad.nonzero().flatten().tolist():
        SPOILED[fault](a[b])
    inverse, info = block_inverse(a, 0.0)
    x, solve_info = block_solve(a, 0.0, rhs)
    out = unaligned(random(a.shape, dtype, 2))
    before, around = out.clone(), surroundings(out)
    for found in (info, solve_info, block_inverse_(out, a, 0.0)):
        assert torch.equal(found != 0, bad), fault
    assert inverse[bad].isnan().all()
    assert x[bad].isnan().all()
    assert_same_bits(inverse[~bad], clean[~bad])
    assert_same_bits(x[~bad], solved[~bad])
    assert_same_bits(out[bad], before[bad])
    assert_same_bits(out[~bad], clean[~bad])
    assert_same_bits(surroundings(out), around, "the memory around the result")


@each_dtype
@pytest.mark.parametrize("n", [1, 2, 3, 9, 16, 64])
def test_all_faults_at_once(implementation: str, n: int, dtype: torch.dtype) -> None:
    a, rhs, out = blocks(20, n, dtype), random((20, n), dtype, 1), random((20, n, n), dtype, 2)
    a.diagonal(dim1=1, dim2=2).add_(0.5)
    clean, solved, before = block_inverse(a, 0.0)[0], block_solve(a, 0.0, rhs)[0], out.clone()
    for b, spoil in enumerate(SPOILED.values()):
        spoil(a[2 * b])
    bad = torch.arange(20) % 2 + torch.arange(20) // (2 * len(SPOILED)) == 0
    (inverse, info), (x, solve_info) = block_inverse(a, 0.0), block_solve(a, 0.0, rhs)
    for found in (info, solve_info, block_inverse_(out, a, 0.0)):
        assert torch.equal(found != 0, bad)
    assert_same_bits(inverse, clean.masked_fill(bad[:, None, None], math.nan))
    assert_same_bits(x, solved.masked_fill(bad[:, None], math.nan))
    assert_same_bits(out, torch.where(bad[:, None, None], before, clean))


@each_dtype
@pytest.mark.parametrize("n", [3, 9, 25])
def test_results_larger_than_caches(implementation: str, n: int, dtype: torch.dtype) -> None:
    """They are those of the same blocks in a small batch, wherever they are written to."""
    if not implementation.startswith("cpu"):
        pytest.skip("no other kernel writes around the caches, and LAPACK promises no such thing")
    part = blocks(96, n, dtype)
    entry(-1, 0, math.nan)(part[40])  # alone in its group
    part[64:80, 0, -1] = math.inf  # a whole group
    inverse, info = block_inverse(part, 0.1)
    assert info.nonzero().flatten().tolist() == [40, *range(64, 80)]
    times = 5_000_000 // (part.numel() * part.element_size()) + 1
    a = torch.cat([part.repeat(times, 1, 1), part[:7]])
    expected, expected_info = (
        torch.cat([inverse.repeat(times, 1, 1), inverse[:7]]),
        torch.cat([info.repeat(times), info[:7]]),
    )
    large, large_info = block_inverse(a, 0.1)
    assert_same_bits(large_info, expected_info)
    assert_same_bits(large, expected)
    for out in (torch.zeros_like(a), unaligned(torch.zeros_like(a))):
        around = surroundings(out)
        assert_same_bits(block_inverse_(out, a, 0.1), expected_info)
        assert_same_bits(out, torch.where(expected_info[:, None, None] != 0, torch.zeros_like(a), expected))
        assert_same_bits(surroundings(out), around, "the memory around the result")


@each_dtype
@pytest.mark.parametrize("n", [2, 9, 25])
def test_a_bad_block_in_any_lane(implementation: str, n: int, dtype: torch.dtype) -> None:
    for bad in range(0, 18, 5 if implementation == "triton" else 1):
        a = blocks(18, n, dtype)
        a[bad, 0, -1] = math.nan  # in the upper triangle, which is not inverted
        assert block_inverse(a, 0.1)[1].nonzero().flatten().tolist() == [bad]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of numpy, in Triton's interpreter
def test_inverses_that_overflow_are_bad(implementation: str) -> None:
    a = torch.stack([torch.full((1, 1), value) for value in (1e-42, 1.0, 3e38)])
    assert block_inverse(a, 0.0)[1].tolist() == [1, 0, 0]
    assert block_inverse(a, 2e38)[1].tolist() == [0, 0, 1]


def test_a_right_hand_side_that_is_not_finite_is_bad(implementation: str) -> None:
    for n in (2, 9, 65):
        rhs = torch.ones(20, n)
        rhs[3, -1], rhs[17, 0] = math.nan, math.inf
        x, info = block_solve(torch.eye(n).expand(20, n, n), 0.0, rhs)
        assert info.nonzero().flatten().tolist() == [3, 17]
        assert torch.equal(x.isnan().all(1), info != 0)


@each_dtype
@pytest.mark.parametrize("n", [2, 9, 17])
def test_the_lower_triangle_is_what_is_inverted(implementation: str, n: int, dtype: torch.dtype) -> None:
    a, rhs = blocks(18, n, dtype), random((18, n), dtype, 1)
    other = a.tril() + random(a.shape, dtype, 2).triu(1)
    assert_same_bits(block_inverse(other, 0.1)[0], block_inverse(a.tril() + a.tril(-1).mT, 0.1)[0])
    assert_same_bits(block_solve(other, 0.1, rhs)[0], block_solve(a.tril() + a.tril(-1).mT, 0.1, rhs)[0])


# Blocks that are too large for lanes.


def skip_what_lapack_does(implementation: str) -> None:
    if implementation != "reference" and not implementation.startswith("cpu"):
        pytest.skip("larger blocks go to LAPACK, as those of the reference")


@each_dtype
@pytest.mark.parametrize("n", LARGE)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_large_inverse(implementation: str, n: int, count: int, dtype: torch.dtype) -> None:
    skip_what_lapack_does(implementation)
    a = blocks(count, n, dtype)
    before = a.clone()
    inverse, info = block_inverse(a, 0.1)
    assert_same_bits(info, good(count))
    check_inverse(inverse, a, 0.1)
    out = unaligned(torch.full_like(a, math.nan))
    around = surroundings(out)
    assert_same_bits(block_inverse_(out, a, 0.1), info)
    assert_same_bits(out, inverse, "in place")
    assert_same_bits(surroundings(out), around, "the memory around the result")
    assert_same_bits(a, before, "the input")


def whole_numbers(count: int, n: int) -> tuple[Tensor, Tensor]:
    """Blocks L D L^T and their inverses, exact in float32: rows of L have one more 1 or -1, and D powers of four."""
    factors = torch.eye(n, dtype=torch.float64).repeat(count, 1, 1)
    before = (torch.rand(count, n, generator=torch.Generator().manual_seed(n)) * torch.arange(n)).long()
    signs = 2 * (integers((count, n), torch.float64, 1) > 0).double() - 1
    for i in range(1, n):
        factors[torch.arange(count), i, before[:, i]] = signs[:, i]
    pivots = 4.0 ** integers((count, n), torch.float64, 2, limit=1)
    inverses = torch.linalg.solve_triangular(factors, torch.eye(n, dtype=torch.float64), upper=False)
    return (factors * pivots[:, None]) @ factors.mT, (inverses.mT / pivots[:, None]) @ inverses


@each_dtype
@pytest.mark.parametrize("n", [*LARGE, 333, 513, 1000])
def test_whole_numbers_are_exact(implementation: str, n: int, dtype: torch.dtype) -> None:
    skip_what_lapack_does(implementation)
    a, expected = whole_numbers(2, n)
    inverse, info = block_inverse(a.to(dtype), 0.0)
    assert_same_bits(info, good(2))
    assert_within(inverse, expected, 0.0)


def graded(n: int) -> Tensor:
    scales = torch.logspace(-4, 0, n, dtype=torch.float64)
    return conditioned(1, n, 1e2, torch.float64) * scales * scales[:, None]


def of_rank(rank: int, n: int) -> Tensor:
    x = random((1, n, rank), torch.float64)
    return x @ x.mT / n


HARD: dict[str, Callable[[int, float], tuple[Tensor, float]]] = {
    "a condition of 1 / (100 u)": lambda n, u: (conditioned(1, n, 0.01 / u, torch.float64), 0.0),
    "scales up": lambda n, u: (graded(n), 0.0),
    "scales down": lambda n, u: (graded(n).flip(1, 2), 0.0),
    "rank 8": lambda n, u: (of_rank(8, n), 100 * u),
    "a quarter of the rank": lambda n, u: (of_rank(n // 4, n), 100 * u),
}
"""What is damped, in float64, and the damping."""


@each_dtype
@pytest.mark.parametrize("n", [65, 130])
@pytest.mark.parametrize("kind", HARD)
def test_error_of_a_large_inverse_is_that_of_rounding(
    implementation: str, kind: str, n: int, dtype: torch.dtype
) -> None:
    """Sweeps that multiply by the inverse of a panel's square exceed the bound, or find no inverse."""
    skip_what_lapack_does(implementation)
    a, damping = HARD[kind](n, unit_roundoff(dtype))
    a = a.to(dtype)
    inverse, info = block_inverse(a, damping)
    assert_same_bits(info, good(1))
    check_inverse(inverse, a, damping)
    if not has_more_bits(dtype):
        pytest.skip("this machine has no format with more bits")
    wide = (a + damping * torch.eye(n, dtype=dtype)).numpy().astype(np.longdouble)
    assert mean_error(inverse.numpy(), wide, textbook_inverse(wide), unit_roundoff(dtype)) <= ROUNDINGS


def pivot(place: int) -> Callable[[Tensor], None]:
    """The matrix above and left of this entry is positive definite, and not with it."""

    def spoil(a: Tensor) -> None:
        a[place, place] = 0.0

    return spoil


def overflowing(a: Tensor) -> None:
    a[40], a[:, 40] = 0.0, 0.0
    a[40, 40] = torch.finfo(a.dtype).tiny / 1e5


SPOILED_LARGE: dict[str, Callable[[Tensor], None]] = {
    **SPOILED,
    "the first pivot is 0": pivot(0),
    "one on the way is 0": pivot(50),
    "the last pivot is 0": pivot(-1),
    "the inverse overflows": overflowing,
}


@each_dtype
@pytest.mark.parametrize("fault", SPOILED_LARGE)
@pytest.mark.parametrize("n", [65, 97, 130])
def test_bad_large_blocks(implementation: str, n: int, fault: str, dtype: torch.dtype) -> None:
    skip_what_lapack_does(implementation)
    a = blocks(4, n, dtype)
    a.diagonal(dim1=1, dim2=2).add_(0.5)
    clean = block_inverse(a, 0.0)[0]
    for b in (1, 2):
        SPOILED_LARGE[fault](a[b])
    inverse, info = block_inverse(a, 0.0)
    assert info.tolist() == [0, 1, 1, 0]
    assert inverse[1:3].isnan().all()
    assert_same_bits(inverse[::3], clean[::3])
    out = unaligned(random(a.shape, dtype, 2))
    before, around = out.clone(), surroundings(out)
    assert_same_bits(block_inverse_(out, a, 0.0), info)
    assert_same_bits(out[1:3], before[1:3])
    assert_same_bits(out[::3], clean[::3])
    assert_same_bits(surroundings(out), around, "the memory around the result")


@each_dtype
@pytest.mark.parametrize("n", [65, 97, 130])
def test_the_lower_triangle_of_a_large_block_is_what_is_inverted(
    implementation: str, n: int, dtype: torch.dtype
) -> None:
    skip_what_lapack_does(implementation)
    a = blocks(2, n, dtype)
    other = a.tril() + random(a.shape, dtype, 2).triu(1)
    assert_same_bits(block_inverse(other, 0.1)[0], block_inverse(a.tril() + a.tril(-1).mT, 0.1)[0])


@each_dtype
@pytest.mark.parametrize("n", [65, 300, 513])
def test_threads_and_neighbours_change_no_bit_of_a_large_inverse(
    implementation: str, set_threads: Callable[[int], None], n: int, dtype: torch.dtype
) -> None:
    """Threads share out the blocks, or the tiles of one where there are fewer blocks than threads."""
    if not implementation.startswith("cpu"):
        pytest.skip("LAPACK promises no such thing")
    a = blocks(3, n, dtype)
    a[1, -1, -1] = -1.0
    expected, info = block_inverse(a, 0.1)
    assert info.tolist() == [0, 1, 0]
    for threads in (1, 2, 3):
        set_threads(threads)
        for first, last in ((0, 1), (1, 3), (0, 3)):
            assert_same_bits(block_inverse(a[first:last], 0.1)[0], expected[first:last])


# Determinism.


@pytest.mark.slow_interpreted
@each_dtype
@pytest.mark.parametrize("n", [1, 3, 9, 17, 64])
def test_a_block_does_not_depend_on_its_neighbours(implementation: str, n: int, dtype: torch.dtype) -> None:
    if implementation == "reference":
        pytest.skip("LAPACK and BLAS promise no such thing")
    a, v = blocks(35, n, dtype), random((35, n), dtype, 1)
    inverse, x, product = block_inverse(a, 0.1)[0], block_solve(a, 0.1, v)[0], block_apply(a, v)
    for b in (0, 34) if implementation == "triton" else (0, 1, 15, 16, 34):
        one, w = a[b : b + 1].clone(), v[b : b + 1].clone()
        assert_same_bits(block_inverse(one, 0.1)[0][0], inverse[b])
        assert_same_bits(block_solve(one, 0.1, w)[0][0], x[b])
        assert_same_bits(block_apply(one, w)[0], product[b])


@each_dtype
@pytest.mark.parametrize("n", [10, 40])
@pytest.mark.slow
def test_the_blocks_of_a_program_change_no_bit(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes more of them than a GPU."""
    block_inverse_kernels = pytest.importorskip("fisher_kernels.triton_kernels.block_inverse")
    a, rhs = blocks(3, n, dtype), random((3, n), dtype, 1)
    results = []
    with use_backend("triton"):
        for most in (1, 2, 4):
            monkeypatch.setattr(block_inverse_kernels, "_INTERPRETED_BLOCKS", most)
            results.append([*block_inverse(a, 0.1), *block_solve(a, 0.1, rhs)])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same_bits(got, want)


@pytest.mark.skipif(native_module() is None, reason="LAPACK promises no such thing")
@pytest.mark.parametrize("n", [9, 25, 64])
def test_same_bits_for_every_number_of_threads(set_threads: Callable[[int], None], n: int) -> None:
    a, v = blocks(1000, n, torch.float32), random((1000, n), torch.float32, 1)

    def run() -> list[Tensor]:
        return [*block_inverse(a, 0.1), *block_solve(a, 0.1, v), block_apply(a, v)]

    first = run()
    for threads in (1, 2, 3):
        set_threads(threads)
        for got, want in zip(run(), first, strict=True):
            assert_same_bits(got, want)
