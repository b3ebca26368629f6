"""Solutions with a damped outer product, and inverses kept current, against their definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from fisher_kernels import use_backend
from fisher_kernels._library import native_module
from fisher_kernels.ops import (
    ACCUMULATOR,
    block_inverse,
    low_rank_inverse_update_,
    rank_one_inverse_update_,
    rank_one_solve,
)
from tests.cases import DTYPES, LAYOUTS, WRITABLE_LAYOUTS, integers, random, unaligned
from tests.cases.rank_one import SIZES, VECTORS, inverses, pieces, vectors
from tests.comparison import assert_same_bits, assert_within, surroundings, unit_roundoff
from tests.interpreted import far, far_partials, far_sums, interpreted

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

BLOCK_DTYPES = (torch.float32, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", BLOCK_DTYPES, ids=str)


# rank_one_solve. Per element: the dot products and the coefficient round in float64, then the coefficient, its product
# with u, the difference and the division round once each in the accumulation dtype, and storing rounds once more.


def check_solution(actual: list[Tensor], u: list[Tensor], x: list[Tensor], rho: float, what: str = "") -> None:
    exact_u, exact_x = (torch.cat([v.double().flatten() for v in vs]) for vs in (u, x))
    square, magnitude = exact_u @ exact_u, exact_u.abs() @ exact_x.abs()
    along = exact_u @ exact_x / (rho + square)
    # However the float64 sums are taken: n roundings of magnitudes.
    error_of_along = (len(exact_u) + 4) * unit_roundoff(torch.float64) * magnitude / (rho + square)
    assert len(actual) == len(x)
    for out, v, y in zip(actual, u, x, strict=True):
        assert (out.dtype, out.shape) == (y.dtype, y.shape)
        assert out.is_contiguous()
        expected = (y.double() - along * v.double()) / rho
        sizes = (y.double().abs() + along.abs() * v.double().abs()) / rho
        bound = 5 * unit_roundoff(ACCUMULATOR[y.dtype]) * sizes + error_of_along * v.double().abs() / rho
        assert_within(out, expected, bound + unit_roundoff(y.dtype) * expected.abs() + torch.finfo(y.dtype).tiny, what)


@pytest.mark.parametrize("rho", [0.5, 1e-3, 100.0])
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES], ids=str)
def test_solution(implementation: str, dtypes: tuple[torch.dtype, ...], rho: float) -> None:
    u, x = pieces(dtypes), pieces(dtypes, 100)
    before = [v.clone() for v in (*u, *x)]
    check_solution(rank_one_solve(u, x, rho), u, x, rho)
    for v, old in zip((*u, *x), before, strict=True):
        assert_same_bits(v, old, "the input")


@each_dtype
def test_solution_of_the_dense_system(implementation: str, dtype: torch.dtype) -> None:
    """The matrix has the condition number (rho + u.u) / rho, and none of what is rounded counts more than that."""
    for n in (1, 2, 9, 33):
        u, x = random((n,), dtype), random((n,), dtype, 1)
        matrix = torch.outer(u, u).double() + 0.3 * torch.eye(n, dtype=torch.float64)
        expected = torch.linalg.solve(matrix, x.double())
        condition = float(torch.linalg.cond(matrix))
        bound = 4 * (n + 4) * unit_roundoff(dtype) * condition * float(expected.norm())
        assert_within(rank_one_solve([u], [x], 0.3)[0], expected, bound)


def test_whole_numbers_are_exact(implementation: str) -> None:
    """u.u = 3 and rho = 1: a quarter of a sum of whole numbers, which no dtype here has to round."""
    u = torch.zeros(20_000)
    u[[0, 9000, 19_999]] = 1
    x = 4 * integers((20_000,), torch.float32)
    for dtype in DTYPES:
        expected = x.double() - u.double() * (u.double() @ x.double()) / 4
        assert_within(rank_one_solve([u.to(dtype)], [x.to(dtype)], 1.0)[0], expected, 0.0)


def test_sums_are_in_float64(implementation: str) -> None:
    """Ones added to a square of 1e8: in float32 each of them would be lost."""
    u = torch.ones(4097)
    u[0] = 1e4
    x = torch.zeros(4097)
    x[1:] = 1
    check_solution(rank_one_solve([u], [x], 1.0), [u], [x], 1.0)
    assert float(rank_one_solve([u], [x], 1.0)[0][0]) == pytest.approx(-1e4 * 4096 / (1e8 + 4097), rel=4e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.slow_interpreted
def test_however_the_vector_is_cut(implementation: str, dtype: torch.dtype) -> None:
    """The same numbers in other tensors: only the order of the float64 sums differs."""
    u, x = random((30_000,), dtype), random((30_000,), dtype, 1)
    for cut in ([30_000], [1, 29_999], [8192, 8192, 13_616], [100] * 300):
        parts = [[*v.split(cut)] for v in (u, x)]
        found = torch.cat(rank_one_solve(*parts, 0.5))
        check_solution([found], [u], [x], 0.5, str(cut))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_solution_in_every_layout(implementation: str, dtype: torch.dtype) -> None:
    shapes = [(3, 5), (2, 3, 4), (70,), (33, 270)]
    u, x = ([random(shape, dtype, seed) for shape in shapes] for seed in (0, 1))
    for name, layout in LAYOUTS.items():
        strided_u, strided_x = [layout(v) for v in u], [layout(v) for v in x]
        found = rank_one_solve(strided_u, strided_x, 0.5)
        plain = rank_one_solve([v.contiguous() for v in strided_u], [v.contiguous() for v in strided_x], 0.5)
        for got, want in zip(found, plain, strict=True):
            assert got.is_contiguous()
            if implementation != "reference":  # whose sums go in the order of memory
                assert_same_bits(got, want, name)
        check_solution(found, strided_u, strided_x, 0.5, name)


def test_solution_of_nothing(implementation: str) -> None:
    assert rank_one_solve([], [], 1.0) == []
    (found,) = rank_one_solve([torch.ones(0, 3)], [torch.ones(0, 3)], 1.0)
    assert found.shape == (0, 3)
    (found,) = rank_one_solve([torch.zeros(3)], [torch.tensor([1.0, -2.0, 4.0])], 0.5)
    assert_same_bits(found, torch.tensor([2.0, -4.0, 8.0]), "u = 0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_goes_through(implementation: str, dtype: torch.dtype) -> None:
    """As the formula has it: NaN in any product is NaN everywhere, and an infinite x at u = 0 as well (0 * inf)."""
    u, x = random((50,), dtype), random((50,), dtype, 1)
    for spoiled, value in ((0, math.nan), (0, math.inf), (1, math.nan), (1, -math.inf)):
        for place in (0, 49):
            pair = [u.clone(), x.clone()]
            pair[spoiled][place] = value
            exact_u, exact_x = (v.double() for v in pair)
            expected = (exact_x - exact_u * ((exact_u @ exact_x) / (0.5 + exact_u @ exact_u))) / 0.5
            (found,) = rank_one_solve([pair[0]], [pair[1]], 0.5)
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.isinf(), expected.isinf())
            assert not found.isfinite().all()


def test_squares_beyond_float32(implementation: str) -> None:
    u, x = torch.full((9,), 1e30), torch.full((9,), 1e25)
    check_solution(rank_one_solve([u], [x], 1.0), [u], [x], 1.0)


@pytest.mark.slow_interpreted
def test_same_solution_for_every_number_of_threads(implementation: str, set_threads: Callable[[int], None]) -> None:
    if implementation == "reference":
        pytest.skip("PyTorch's sums promise no such thing")
    u, x = ([random((200_000,), torch.float32, s), random((301, 333), torch.bfloat16, s)] for s in (0, 1))
    first = rank_one_solve(u, x, 0.5)
    for threads in (1, 2, 3):
        set_threads(threads)
        for got, want in zip(rank_one_solve(u, x, 0.5), first, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8192 + 5, 2 * 8192 - 1, 8192])
def test_full_chunks_of_a_solution(implementation: str, size: int, dtype: torch.dtype) -> None:
    """They have a path of wide accesses, unless they are not aligned: the same bits."""
    u, x = random((size,), dtype), random((size,), dtype, 1)
    (found,) = rank_one_solve([u], [x], 0.5)
    (moved,) = rank_one_solve([unaligned(u)], [unaligned(x)], 0.5)
    check_solution([found], [u], [x], 0.5)
    if implementation != "reference":
        assert_same_bits(moved, found)


def test_more_tensors_than_a_launch_takes(implementation: str) -> None:
    """Some 750 fill a table that is a kernel's parameter, and 256 chunks are what the second pass adds by itself."""
    count = 30 if implementation == "triton" else 800
    u, x = ([random((1 + i % 3,), torch.float32, seed + i) for i in range(count)] for seed in (0, 10_000))
    u[5], x[5] = u[5].bfloat16(), x[5].bfloat16()
    check_solution(rank_one_solve(u, x, 0.5), u, x, 0.5)


@interpreted
def test_a_solution_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk of a tensor of more than 2^31 elements, of which no other is there."""
    from fisher_kernels.triton_kernels import rank_one_solve as kernels

    u, x = random((100,), torch.bfloat16), random((100,), torch.bfloat16, 1)
    with use_backend("triton"):
        near = rank_one_solve([u], [x], 0.5)
        monkeypatch.setattr(kernels, "table", far(kernels.table, (2, 2), starts=2))
        monkeypatch.setattr(kernels, "new_partials", far_partials)
        monkeypatch.setattr(kernels, "add_chunks", far_sums)
        assert_same_bits(rank_one_solve([u], [x], 0.5)[0], near[0])


@interpreted
def test_solutions_are_tensors_of_their_own() -> None:
    """Though they share a stretch of memory: changing one is no change of another."""
    with use_backend("triton"):
        first, second = rank_one_solve([torch.ones(3), torch.ones(2, 5)], [torch.ones(3), torch.ones(2, 5)], 0.5)
    version, before = second._version, second.clone()
    first.add_(1)
    assert second._version == version
    assert not second._is_view()
    assert second.data_ptr() % 16 == 0
    assert_same_bits(second, before)


@pytest.mark.large
def test_a_large_solution(implementation: str) -> None:
    u = torch.zeros(2**31 + 9, dtype=torch.bfloat16)
    u[[0, -1]] = 1
    (found,) = rank_one_solve([u], [u], 1.0)
    assert found[[0, 1, -2, -1]].tolist() == [float(torch.tensor(1 / 3).bfloat16()), 0, 0, float(found[0])]


# Inverses.


def after(inverse: Tensor, u: Tensor, decay: float, gain: float) -> Tensor:
    """What an update should make, in float64; u is [B, k, n]."""
    wide = u.double()
    return torch.linalg.inv(decay * torch.linalg.inv(inverse.double()) + gain * wide.mT @ wide)


def rounding(before: Tensor, expected: Tensor, k: int, decay: float, dtype: torch.dtype) -> Tensor:
    """How far a result may lie from the true one: [B, 1, 1].

    v, the dot products and the sum of k outer products round n + k times each, relative to magnitudes that P / decay
    before or after bounds; an error in v enters with gain v v^T / den, so with the condition number of either.
    """
    norms = (torch.linalg.matrix_norm(before.double(), 2) / decay).maximum(torch.linalg.matrix_norm(expected, 2))
    condition = torch.linalg.cond(before.double()).maximum(torch.linalg.cond(expected))
    n = before.shape[-1]
    return (4 * (n + k + 2) * (k + 1) * unit_roundoff(dtype) * condition * norms)[:, None, None]


def check_update(
    found: Tensor, before: Tensor, u: Tensor, decay: float = 1.0, gain: float = 1.0, what: str = ""
) -> None:
    if found.numel():
        expected = after(before, u, decay, gain)
        assert_within(found, expected, rounding(before, expected, u.shape[1], decay, found.dtype), what)
    assert_same_bits(found, found.mT.contiguous(), f"{what}: the mirror image")


def good(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


@each_dtype
@pytest.mark.parametrize("n", SIZES)
def test_update(implementation: str, n: int, dtype: torch.dtype) -> None:
    for k in VECTORS:
        for decay, gain in ((1.0, 1.0), (0.95, 0.05), (1.5, 2.0), (0.9, -0.02)):
            p, u = inverses(5, n, dtype), vectors(5, k, n, dtype)
            found, u_before = p.clone(), u.clone()
            assert_same_bits(low_rank_inverse_update_(found, u, decay, gain), good(5))
            check_update(found, p, u, decay, gain, f"k = {k}, decay {decay}, gain {gain}")
            assert_same_bits(u, u_before, "the input")
    p, u = inverses(5, n, dtype), vectors(5, 1, n, dtype)
    one, several = p.clone(), p.clone()
    assert_same_bits(rank_one_inverse_update_(one, u[:, 0], 0.9, 0.3), good(5))
    low_rank_inverse_update_(several, u, 0.9, 0.3)
    assert_same_bits(one, several, "rank one is one vector")


@each_dtype
@pytest.mark.slow_interpreted
def test_every_size(implementation: str, dtype: torch.dtype) -> None:
    for n in range(1, 67):
        p, u = inverses(3, n, dtype), vectors(3, 1, n, dtype)
        found = unaligned(p)
        around = surroundings(found)
        assert_same_bits(rank_one_inverse_update_(found, u[:, 0]), good(3))
        check_update(found, p, u, what=f"n = {n}")
        assert_same_bits(surroundings(found), around, f"n = {n}: the memory around the result")


@each_dtype
@pytest.mark.parametrize("n", [131, 161, 200])
def test_blocks_of_many_rows(implementation: str, n: int, dtype: torch.dtype) -> None:
    """Beyond what fits into the shared memory of a GPU, in packs of 16 bytes and without."""
    for k in (1, 5):
        p, u = inverses(3, n, dtype), vectors(3, k, n, dtype)
        u[1, 0, -1] = math.nan
        for gain in (0.5, -0.001):
            found, moved = p.clone(), unaligned(p)
            around = surroundings(moved)
            assert low_rank_inverse_update_(found, u, 0.9, gain).tolist() == [0, 2, 0]
            check_update(found[::2], p[::2], u[::2], 0.9, gain, f"k = {k}, gain {gain}")
            assert_same_bits(found[1], p[1], "the block that is refused")
            low_rank_inverse_update_(moved, u, 0.9, gain)
            if implementation != "reference":  # whose products go in the order of memory
                assert_same_bits(moved, found, "not aligned")
            assert_same_bits(surroundings(moved), around, "the memory around the result")


@each_dtype
def test_powers_of_two_are_exact(implementation: str, dtype: torch.dtype) -> None:
    """P = I and unit vectors: den is 1 + gain, and everything is a power of two."""
    for n in (1, 2, 5, 9, 17, 65):
        p, u = torch.eye(n, dtype=dtype).repeat(n, 1, 1), torch.eye(n, dtype=dtype)
        assert_same_bits(rank_one_inverse_update_(p, u, 0.5, 0.5), good(n))
        expected = 2 * torch.eye(n, dtype=torch.float64).repeat(n, 1, 1)
        expected -= torch.diag_embed(torch.eye(n, dtype=torch.float64))
        assert_within(p, expected, 4 * unit_roundoff(dtype))  # the root of 1 / den is rounded
        assert_same_bits(p, p.mT.contiguous())


@each_dtype
def test_the_decay_alone(implementation: str, dtype: torch.dtype) -> None:
    p = inverses(4, 9, dtype)
    expected = p.double() / 0.5
    for u, gain in ((torch.zeros(4, 9, dtype=dtype), 1.0), (vectors(4, 1, 9, dtype)[:, 0], 0.0)):
        found = p.clone()
        assert_same_bits(rank_one_inverse_update_(found, u, 0.5, gain), good(4))
        assert_within(found, expected, 0.0)
    found = p.clone()
    assert_same_bits(low_rank_inverse_update_(found, vectors(4, 0, 9, dtype), 0.5), good(4))
    assert_within(found, expected, 0.0)


@each_dtype
def test_no_update_of_nothing(implementation: str, dtype: torch.dtype) -> None:
    for shape in ((0, 3, 3), (3, 0, 0), (0, 0, 0)):
        p = torch.ones(shape, dtype=dtype)
        assert_same_bits(rank_one_inverse_update_(p, torch.ones(shape[:2], dtype=dtype)), good(shape[0]))
        for k in (0, 2):
            u = torch.ones(shape[0], k, shape[1], dtype=dtype)
            assert_same_bits(low_rank_inverse_update_(p, u), good(shape[0]))


@each_dtype
@pytest.mark.parametrize("n", [3, 9, 17, 65])
def test_update_in_every_layout(implementation: str, n: int, dtype: torch.dtype) -> None:
    p, u = inverses(6, n, dtype), vectors(6, 2, n, dtype)
    p[4, 0, 0] = -1
    expected = p.clone()
    info = low_rank_inverse_update_(expected, u, 0.9)
    assert info.tolist() == [0, 0, 0, 0, 1, 0]
    # Products of the reference go in the order of memory.
    allowed = 8 * n * unit_roundoff(dtype) if implementation == "reference" else 0.0
    for name, layout in WRITABLE_LAYOUTS.items():
        found = layout(p)
        around = surroundings(found)
        assert_same_bits(low_rank_inverse_update_(found, layout(u), 0.9), info)
        assert_within(found, expected.double(), allowed, name)
        assert_same_bits(surroundings(found), around, f"{name}: the memory around the result")
    found = p.clone()
    rank_one_inverse_update_(found, LAYOUTS["expanded"](u[:, 0]), 0.9)
    plain = p.clone()
    rank_one_inverse_update_(plain, LAYOUTS["expanded"](u[:, 0]).contiguous(), 0.9)
    assert_within(found, plain.double(), allowed, "one vector for all")


@each_dtype
@pytest.mark.parametrize("k", [1, 4])
def test_an_update_and_its_opposite(implementation: str, k: int, dtype: torch.dtype) -> None:
    for n in (1, 2, 9, 25, 70):
        p, u = inverses(5, n, dtype), vectors(5, k, n, dtype)
        found = p.clone()
        assert_same_bits(low_rank_inverse_update_(found, u, 1.0, 0.5), good(5))
        between = found.clone()
        assert_same_bits(low_rank_inverse_update_(found, u, 1.0, -0.5), good(5))
        # The error of the first update is an error of the matrix too, and comes back amplified by the condition.
        bound = rounding(between, p.double(), k, 1.0, dtype)
        assert_within(found, p.double(), 2 * bound * torch.linalg.cond(p.double())[:, None, None], f"n = {n}")


@each_dtype
@pytest.mark.slow_interpreted
def test_several_vectors_are_as_many_updates(implementation: str, dtype: torch.dtype) -> None:
    for n in (1, 3, 9, 25, 70):
        for gain in (0.5, -0.01):
            p, u = inverses(5, n, dtype), vectors(5, 4, n, dtype)
            together, one_by_one = p.clone(), p.clone()
            assert_same_bits(low_rank_inverse_update_(together, u, 0.9, gain), good(5))
            for j in range(4):
                assert_same_bits(rank_one_inverse_update_(one_by_one, u[:, j], 0.9 if j == 0 else 1.0, gain), good(5))
            expected = after(p, u, 0.9, gain)
            assert_within(together, one_by_one.double(), 2 * rounding(p, expected, 4, 0.9, dtype), f"n = {n}, {gain}")


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    n=st.integers(1, 40),
    k=st.integers(0, 6),
    decay=st.floats(0.25, 4),
    gain=st.floats(-0.5, 4),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_update(n: int, k: int, decay: float, gain: float, double: bool, seed: int) -> None:
    """An update is good if and only if the matrix it stands for is positive definite, apart from what is close."""
    dtype = torch.float64 if double else torch.float32
    p, u = inverses(3, n, dtype, seed=seed), vectors(3, k, n, dtype, seed + 1)
    found = p.clone()
    info = low_rank_inverse_update_(found, u, decay, gain)
    wide = u.double()
    matrix = decay * torch.linalg.inv(p.double()) + gain * wide.mT @ wide
    lowest = torch.linalg.eigvalsh(matrix)[:, 0]
    near = lowest.abs() < 1e-3  # of matrices whose entries are about 1 to 80
    assert torch.equal(info[~near] != 0, lowest[~near] <= 0)
    assert_same_bits(found[info != 0], p[info != 0])
    sure = (info == 0) & ~near
    if sure.any():
        check_update(found[sure], p[sure], u[sure], decay, gain)


# Blocks that are refused.


def entry(row: int, column: int, value: float) -> Callable[[Tensor, Tensor], None]:
    def spoil(p: Tensor, u: Tensor) -> None:
        p[row, column] = p[column, row] = value

    return spoil


def one_entry(row: int, column: int, value: float) -> Callable[[Tensor, Tensor], None]:
    def spoil(p: Tensor, u: Tensor) -> None:
        p[row, column] = value

    return spoil


def vector(place: int, value: float) -> Callable[[Tensor, Tensor], None]:
    def spoil(p: Tensor, u: Tensor) -> None:
        u[-1, place] = value

    return spoil


def along_a_negative_direction(p: Tensor, u: Tensor) -> None:
    """Eigenvalue -1 along the last vector; the diagonal stays positive where there is more than one dimension."""
    direction = torch.nn.functional.normalize(torch.ones_like(u[-1]), dim=0)
    p.copy_(torch.eye(len(p), dtype=p.dtype) - 2 * torch.outer(direction, direction))
    u[-1] = direction


SPOILED: dict[str, tuple[Callable[[Tensor, Tensor], None], int]] = {
    "zero on the diagonal": (entry(0, 0, 0.0), 1),
    "negative on the diagonal": (entry(-1, -1, -0.5), 1),
    "a negative direction": (along_a_negative_direction, 1),
    "NaN on the diagonal": (entry(-1, -1, math.nan), 2),
    "NaN off the diagonal": (entry(0, -1, math.nan), 2),
    "NaN in the upper triangle only": (one_entry(0, -1, math.nan), 2),
    "NaN in the lower triangle only": (one_entry(-1, 0, math.nan), 2),
    "infinite in the upper triangle only": (one_entry(0, -1, math.inf), 2),
    "infinite in the lower triangle only": (one_entry(-1, 0, -math.inf), 2),
    "infinite on the diagonal": (entry(0, 0, math.inf), 2),
    "NaN in a vector": (vector(0, math.nan), 2),
    "infinity at the end of a vector": (vector(-1, -math.inf), 2),
}


@each_dtype
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 25, 64, 70, 161])
def test_refused_blocks(implementation: str, n: int, k: int, dtype: torch.dtype) -> None:
    """Each fault is marked, and its block left as it was, to the bit; their neighbours do not change by a bit.

    Two bad blocks, a good one, and so on: every fault is in two places, in one where blocks take long.
    """
    faults = [*SPOILED] * (1 if n > 100 or (implementation == "triton" and n > 8) else 2)
    count = 3 * len(faults) // 2 + 1
    places = [b for b in range(count) if b % 3 < 2][: len(faults)]
    p, u = inverses(count, n, dtype), vectors(count, k, n, dtype)
    clean = p.clone()
    assert_same_bits(low_rank_inverse_update_(clean, u, 0.9, 0.5), good(count))
    status = torch.zeros(count, dtype=torch.int64)
    for b, fault in zip(places, faults, strict=True):
        spoil, status[b] = SPOILED[fault]
        spoil(p[b], u[b])
    found = unaligned(p)
    before, around = found.clone(), surroundings(found)
    info = low_rank_inverse_update_(found, u, 0.9, 0.5)
    bad = status != 0
    assert info.tolist() == status.tolist(), dict(zip(places, faults, strict=True))
    for b in range(count):
        if bad[b]:
            assert_same_bits(found[b], before[b], f"block {b}")
        elif implementation != "reference":  # whose products depend on their number
            assert_same_bits(found[b], clean[b], f"block {b}")
    assert_same_bits(surroundings(found), around, "the memory around the result")


@each_dtype
@pytest.mark.parametrize("n", [1, 2, 5, 9, 17, 70])
def test_what_is_not_there_cannot_be_taken_out(implementation: str, n: int, dtype: torch.dtype) -> None:
    """A downdate of A = I by more than a unit vector, by just that, and by a little less."""
    direction = torch.nn.functional.normalize(random((n,), dtype, 3), dim=0)
    step = 64 * n * unit_roundoff(dtype)
    u = torch.stack([direction * size for size in (1.5, 1.0, 1 - step, 0.5)])
    p = torch.eye(n, dtype=dtype).repeat(4, 1, 1)
    info = rank_one_inverse_update_(p, u, 1.0, -1.0)
    assert info.tolist() == [1, 1, 0, 0]
    assert_same_bits(p[:2], torch.eye(n, dtype=dtype).repeat(2, 1, 1))
    check_update(p[3:], torch.eye(n, dtype=dtype)[None], u[3:, None], 1.0, -1.0)


@each_dtype
def test_the_second_vector_may_be_what_fails(implementation: str, dtype: torch.dtype) -> None:
    """Taking a vector out twice, which is there once: the first is fine, and nothing of it is written."""
    for n in (2, 9, 20):
        u = vectors(1, 1, n, dtype)
        p = torch.linalg.inv(torch.eye(n, dtype=torch.float64) + u[0].mT.double() @ u[0].double()).to(dtype)
        p = ((p + p.mT) / 2)[None]
        assert rank_one_inverse_update_(p.clone(), u[:, 0], 1.0, -1.0).tolist() == [0]
        big = 3 * u / u.norm()
        found = p.clone()
        info = low_rank_inverse_update_(found, torch.cat([u, big], 1), 1.0, -1.0)
        assert info.tolist() == [1]
        assert_same_bits(found, p)


@each_dtype
def test_what_rounding_would_make_indefinite_is_refused(implementation: str, dtype: torch.dtype) -> None:
    """So strong a vector across so large an inverse that nothing is left of it along the vector but rounding."""
    unit = unit_roundoff(dtype)
    for n in (2, 9, 17):
        direction = torch.nn.functional.normalize(random((n,), dtype, 5), dim=0)
        for strength, status in ((1e-2 / unit, 0), (1e2 / unit, 1)):
            p = torch.eye(n, dtype=dtype)[None].clone()
            info = rank_one_inverse_update_(p, direction[None] * strength**0.5)
            assert info.tolist() == [status], (n, strength)
            if status == 0:
                assert float(torch.linalg.eigvalsh(p.double()).min()) > -n * unit


@each_dtype
def test_vectors_too_small_to_matter_are_no_reason_to_refuse(implementation: str, dtype: torch.dtype) -> None:
    """Down to subnormal numbers, whose products vanish."""
    tiny = torch.finfo(dtype).tiny
    p = inverses(1, 9, dtype)
    for size in (unit_roundoff(dtype), tiny**0.5, 8 * tiny, tiny / 8):
        for gain in (1.0, -1.0):
            found = p.clone()
            assert rank_one_inverse_update_(found, torch.full((1, 9), size, dtype=dtype), 0.5, gain).tolist() == [0]
            assert_within(found, p.double() / 0.5, 4 * unit_roundoff(dtype) * float(p.abs().max()))


def test_den_and_results_that_overflow(implementation: str) -> None:
    """u^T P u above the range of float32; and entries that only the decay takes there."""
    for n in (1, 2, 9, 17, 70, 200):
        p = torch.eye(n).repeat(3, 1, 1)
        p[1] *= 1e38
        u = torch.full((3, n), 1e-25)
        u[0] = 1e20
        before = p.clone()
        assert rank_one_inverse_update_(p, u, 0.25).tolist() == [2, 2, 0]
        assert_same_bits(p[:2], before[:2])
        # A large P alone is no fault.
        p = 1e38 * torch.eye(n).repeat(2, 1, 1)
        assert low_rank_inverse_update_(p, torch.zeros(2, 0, n), 0.5).tolist() == [0, 0]
        assert_same_bits(p, 2e38 * torch.eye(n).repeat(2, 1, 1))


@each_dtype
@pytest.mark.parametrize("n", [1, 3, 8, 9, 17, 64])
def test_a_block_does_not_depend_on_its_neighbours(implementation: str, n: int, dtype: torch.dtype) -> None:
    if implementation == "reference":
        pytest.skip("BLAS promises no such thing")
    p, u = inverses(35, n, dtype), vectors(35, 2, n, dtype)
    together = p.clone()
    low_rank_inverse_update_(together, u, 0.9, 0.5)
    for b in (0, 1, 15, 16, 34):
        one = p[b : b + 1].clone()
        low_rank_inverse_update_(one, u[b : b + 1].clone(), 0.9, 0.5)
        assert_same_bits(one[0], together[b])


@pytest.mark.skipif(native_module() is None, reason="BLAS promises no such thing")
@pytest.mark.parametrize("n", [2, 9, 25, 64])
def test_same_bits_for_every_number_of_threads(set_threads: Callable[[int], None], n: int) -> None:
    p, u = inverses(997, n, torch.float32), vectors(997, 2, n, torch.float32)

    def run() -> Tensor:
        found = p.clone()
        low_rank_inverse_update_(found, u, 0.9, 0.5)
        return found

    first = run()
    for threads in (1, 2, 3):
        set_threads(threads)
        assert_same_bits(run(), first)


# Over time.

DECAY = 0.95


@each_dtype
@pytest.mark.slow_interpreted
@pytest.mark.slow_on_host
def test_errors_are_forgotten(backend: str, dtype: torch.dtype) -> None:
    """10,000 updates (200 in an interpreter) by vectors of every direction, against the inverse summed in float64.

    An error E of P is one of -A E A of the matrix that P stands for, and an update takes that matrix's errors times
    the decay, as it does the matrix. So what 10,000 updates leave is what about 1 / (1 - decay) = 20 do.
    """
    steps, n, count = 200 if backend == "triton" else 10_000, 9, 4
    u = random((steps, count, n), dtype)
    matrix = torch.eye(n, dtype=torch.float64).repeat(count, 1, 1)
    p = matrix.to(dtype, copy=True)
    worst = {"early": 0.0, "late": 0.0}
    for t in range(steps):
        assert not rank_one_inverse_update_(p, u[t], DECAY, 1 - DECAY).any()
        wide = u[t].double()
        matrix = DECAY * matrix + (1 - DECAY) * wide[:, :, None] * wide[:, None, :]
        if t % 100 == 99:
            expected = torch.linalg.inv(matrix)
            size = torch.linalg.matrix_norm(expected, 2)
            error = torch.linalg.matrix_norm(p.double() - expected, 2) / size
            allowed = torch.linalg.cond(matrix) * (n + 4) * unit_roundoff(dtype) / (1 - DECAY)
            assert bool((error <= allowed).all()), (t, error, allowed)
            half = "early" if t < steps / 2 else "late"
            worst[half] = max(worst[half], float((error / allowed).max()))
    assert worst["late"] <= 4 * worst["early"], worst


@pytest.mark.slow_on_host
@each_dtype
def test_wind_up_ends_in_a_refusal(backend: str, dtype: torch.dtype) -> None:
    """A direction that no vector excites grows as decay^-t: no entry ever becomes infinite or NaN."""
    n = 4
    u = random((15_000, 1, n), dtype)
    u[..., -1] = 0
    p = torch.eye(n, dtype=dtype)[None].clone()
    updates = 0
    if backend == "triton":  # whose interpreter is slow: the growth begins near its end
        updates = 1700 if dtype == torch.float32 else 13_800
        p[0, -1, -1] = DECAY**-updates
    while True:
        before = p.clone()
        info = int(rank_one_inverse_update_(p, u[updates], DECAY, 1 - DECAY))
        assert p.isfinite().all()
        if info:
            break
        updates += 1
    assert info == 2
    assert_same_bits(p, before)
    # The growth itself rounds at every update.
    expected = math.log(torch.finfo(dtype).max) / -math.log(DECAY)
    assert abs(updates - expected) < 2, (updates, expected)
    assert 1700 < updates < 1760 if dtype == torch.float32 else 13_800 < updates < 13_900


@each_dtype
def test_the_remedy_for_wind_up(host_backend: str, dtype: torch.dtype) -> None:
    """Keep the matrix as well, and invert it anew with damping now and then: nothing grows beyond its reach."""
    n, every, damping = 4, 100, 1e-3
    u = random((3000, 1, n), dtype)
    u[..., -1] = 0
    matrix = torch.eye(n, dtype=dtype)[None]
    p = matrix.clone()
    for t in range(3000):
        matrix = DECAY * matrix + (1 - DECAY) * u[t][:, :, None] * u[t][:, None, :]
        assert int(rank_one_inverse_update_(p, u[t], DECAY, 1 - DECAY)) == 0
        if t % every == every - 1:
            p, info = block_inverse(matrix, damping)
            assert int(info) == 0
        assert float(p.abs().max()) <= 1 / damping * DECAY**-every


# Precision, where a search finds the least of it.


def decoded(z: Tensor, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inverses and vectors with eigenvalues and lengths of any size, [B, n, n] and [B, k, n], from numbers [B, ...]."""
    turned, eigenvalues, directions, lengths = z.split([n * n, n, k * n, k], 1)
    q, _ = torch.linalg.qr(turned.reshape(-1, n, n))
    p = ((q * eigenvalues.clamp(-7, 7).exp()[:, None]) @ q.mT).to(dtype)
    u = directions.reshape(-1, k, n) * lengths.clamp(-12, 12).exp()[:, :, None]
    return p.tril() + p.tril(-1).mT, u.to(dtype)


def share_of_bound(p: Tensor, u: Tensor, decay: float, gain: float, between: bool = True) -> Tensor:
    """The error of each update as a share of the bound of docs/kernels/rank_one.md, -1 where nothing is promised.

    With ``between`` False the bound is another: of the condition numbers and norms before and after alone.
    """
    found = p.clone()
    info = low_rank_inverse_update_(found, u, decay, gain)
    n, k = p.shape[1], u.shape[1]
    matrices = [torch.linalg.inv(p.double())]
    for x in u.double().unbind(1):
        matrices.append(matrices[-1] + gain / decay * x[:, :, None] * x[:, None, :])
    eigenvalues = torch.stack([torch.linalg.eigvalsh(a) for a in matrices])  # [k + 1, B, n]
    low, high = eigenvalues.amin(2), eigenvalues.amax(2)
    if between:
        condition, norm = high.amax(0) / low.amin(0), (1 / low[0]).maximum(1 / low[-1])
    else:
        condition, norm = (high / low)[[0, -1]].amax(0), 1 / low[-1]
    expected = torch.linalg.inv(decay * matrices[-1])
    error = torch.linalg.matrix_norm(found.double() - expected, 2) * decay
    share = error / (8 * (n + k + 2) * unit_roundoff(p.dtype) * condition * norm)
    promised = (info == 0) & (low.amin(0) > 0) & (high.amax(0) < 1e6 * low.amin(0)) & share.isfinite()
    return torch.where(promised, share, -1.0)


@pytest.mark.parametrize(("decay", "gain"), [(1.0, 1.0), (0.9, 0.1), (1.0, -0.01)])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 3), (2, 2), (3, 1), (3, 3), (9, 4)])
@pytest.mark.slow_interpreted
def test_no_search_finds_more_than_the_bound(implementation: str, n: int, k: int, decay: float, gain: float) -> None:
    """The worst of many updates are varied, and the worst of these again. Small blocks come near the bound."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0] * n * n + [3.0] * n + [1.0] * k * n + [4.0] * k, dtype=torch.float64)
    z = spread * torch.randn(128, len(spread), generator=generator, dtype=torch.float64)
    share = torch.full((0,), -1.0, dtype=torch.float64)
    kept = z[:0]
    rounds = 4 if implementation in ("cuda", "triton") else 12
    for turn in range(12):
        # Where it begins differs with LAPACK's QR, so a short search goes on until it has come near.
        if turn >= rounds and (n > 3 or share[0] > 1 / 100):
            break
        z, share = (
            torch.cat([z, kept]),
            torch.cat([share_of_bound(*decoded(z, n, k, torch.float32), decay, gain), share]),
        )
        share, worst = share.topk(16)
        kept = z[worst]
        steps = 10 ** (-3 * torch.rand(128, 1, generator=generator, dtype=torch.float64))
        z = kept.repeat(8, 1) + steps * torch.randn(128, len(spread), generator=generator, dtype=torch.float64)
    assert share[0] <= 1
    assert n > 3 or share[0] > 1 / 100


def test_conditions_before_and_after_are_no_bound(implementation: str) -> None:
    """Vectors that span the space shrink all of P: its digits go, and info says 0 while there are some."""
    p, u = torch.eye(1)[None], torch.full((1, 1, 1), 100.0)
    assert share_of_bound(p, u, 1.0, 1.0, between=False) > 50
    assert 0 < share_of_bound(p, u, 1.0, 1.0) <= 1
    assert low_rank_inverse_update_(p, u).tolist() == [0]
    p = torch.eye(3)[None]
    assert low_rank_inverse_update_(p.clone(), 100 * torch.eye(3)[None]).tolist() == [0]
    assert low_rank_inverse_update_(p.clone(), 1e5 * torch.eye(3)[None]).tolist() == [1]
    assert low_rank_inverse_update_(torch.ones(1, 1, 1), torch.full((1, 1, 1), 1e4)).tolist() == [1]
