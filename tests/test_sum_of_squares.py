"""Sums of squares against their definition in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fisher_kernels import use_backend
from fisher_kernels._library import native_module, runs_cuda_on_host
from fisher_kernels.backends import available
from fisher_kernels.ops import ACCUMULATOR, channel_sum_of_squares, column_sum_of_squares, patch_sum_of_squares
from tests.cases import (
    DTYPES,
    LAYOUTS,
    channels_last,
    contiguous,
    integers,
    random,
    sliced,
    spread,
    unaligned,
    zeros_without_memory,
)
from tests.cases.sum_of_squares import CHANNEL_SHAPES, COLUMN_SHAPES, PATCHES, Patch
from tests.comparison import assert_same_bits, assert_within, unit_roundoff

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

Op = Callable[[Tensor], Tensor]

# NumPy, on which Triton's interpreter runs, warns of what IEEE arithmetic has a result for.
overflows = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def defined(op: Op, x: Tensor) -> Tensor:
    """The definition: the reference in float64."""
    with use_backend("reference"):
        return op(x.double())


def rounding(expected: Tensor, x: Tensor, kernels: bool = True) -> Tensor:
    """How far the sum of n squares may lie from its definition.

    All terms are nonnegative, so every rounding is relative to a partial sum that the whole exceeds. In float32 a term
    meets one rounding as it is squared, at most 63 in a run of 64, and a handful as runs are added up in float64: 72 u.
    In float64, where nothing wider follows, and in PyTorch's own sums, which promise no more, it may meet all n. A
    square below the normal numbers loses up to the smallest of them.
    """
    dtype = ACCUMULATOR[x.dtype]
    roundings = 72 if kernels and dtype == torch.float32 else 72 + x.numel() // max(1, expected.numel())
    return expected * (roundings * unit_roundoff(dtype)) + x.numel() * torch.finfo(dtype).smallest_normal


def check(implementation: str, op: Op, x: Tensor, what: str = "", exact: bool = False) -> None:
    before = x.clone()
    expected = defined(op, x)
    actual = op(x)
    assert actual.dtype == ACCUMULATOR[x.dtype]
    assert actual.is_contiguous()
    assert_within(actual, expected, 0.0 if exact else rounding(expected, x, implementation != "reference"), what)
    assert_same_bits(x, before, f"{what}: the input")


def patch_op(case: Patch) -> Op:
    return lambda x: patch_sum_of_squares(x, case.kernel_size, case.stride, case.padding, case.dilation)


# The definition itself, against formulas written in other words.


def windows(x: Tensor, case: Patch) -> Tensor:
    """The sum of squares that each kernel offset reads, from the unfolded patches of a padded copy."""
    spatial = x.dim() - 2

    def each(value: Any) -> list[Any]:
        return [value] * spatial if isinstance(value, int) else list(value)

    pairs = [(p, p) if isinstance(p, int) else p for p in each(case.padding)]
    sizes = [size + before + after for size, (before, after) in zip(x.shape[2:], pairs, strict=True)]
    padded = torch.zeros((*x.shape[:2], *sizes), dtype=torch.float64)
    middle = [slice(before, before + size) for size, (before, _) in zip(x.shape[2:], pairs, strict=True)]
    padded[(slice(None), slice(None), *middle)] = x.double()
    for d, (kernel, stride, dilation) in enumerate(
        zip(each(case.kernel_size), each(case.stride), each(case.dilation), strict=True)
    ):
        padded = padded.unfold(2 + d, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return padded.pow(2).sum((0, *range(2, 2 + spatial)))  # [N, C, *windows, *kernel] -> [C, *kernel]


def test_column_definition() -> None:
    x = random((3, 5, 7), torch.float64)
    rows = x.reshape(15, 7)
    expected = (rows.T @ rows).diagonal().clone()
    assert_within(defined(column_sum_of_squares, x), expected, 1e-14 * expected)


def test_channel_definition() -> None:
    x = random((3, 5, 7, 2), torch.float64)
    expected = torch.tensor([sum(float(v) ** 2 for v in x[:, c].flatten()) for c in range(5)], dtype=torch.float64)
    assert_within(defined(channel_sum_of_squares, x), expected, 1e-14 * expected)


@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_patch_definition(case: Patch) -> None:
    x = random(case.shape, torch.float64)
    expected = windows(x, case)
    assert_within(defined(patch_op(case), x), expected, 1e-14 * expected)


def test_patch_definition_by_unfold() -> None:
    x = random((4, 3, 9, 8), torch.float64)
    unfolded = torch.nn.functional.unfold(x, (3, 2), dilation=(2, 1), padding=(1, 2), stride=(2, 3))  # [N, C K, L]
    expected = unfolded.square().sum((0, 2)).view(3, 3, 2)
    actual = defined(lambda x: patch_sum_of_squares(x, (3, 2), (2, 3), (1, 2), (2, 1)), x)
    assert_within(actual, expected, 1e-14 * expected)


# Every implementation against the definition.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", COLUMN_SHAPES, ids=str)
def test_column(implementation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for name, layout in LAYOUTS.items():
        check(implementation, column_sum_of_squares, layout(random(shape, dtype)), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CHANNEL_SHAPES, ids=str)
def test_channel(implementation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for name, layout in LAYOUTS.items():
        check(implementation, channel_sum_of_squares, layout(random(shape, dtype)), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_patch(implementation: str, case: Patch, dtype: torch.dtype) -> None:
    for name, layout in LAYOUTS.items():
        check(implementation, patch_op(case), layout(random(case.shape, dtype)), name)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_whole_numbers_are_exact(implementation: str, dtype: torch.dtype) -> None:
    """Squares and sums below 2^24: nothing is rounded, whatever the order."""
    for layout in (contiguous, channels_last, sliced) if implementation != "triton" else (contiguous,):
        name = layout.__name__
        for shape in COLUMN_SHAPES:
            check(implementation, column_sum_of_squares, layout(integers(shape, dtype)), f"{name} {shape}", exact=True)
        for shape in CHANNEL_SHAPES:
            check(implementation, channel_sum_of_squares, layout(integers(shape, dtype)), f"{name} {shape}", exact=True)
        for case in PATCHES:
            check(implementation, patch_op(case), layout(integers(case.shape, dtype)), f"{name} {case}", exact=True)


def test_many_rows_are_summed_in_more_than_float32(implementation: str) -> None:
    """Equal terms are rounded the same way again and again: in float32 the error grows with the number of rows."""
    x = torch.linspace(0.51, 0.97, 9).expand(2**16, 9).contiguous()
    one_after_another = np.cumsum(x.square().numpy(), axis=0, dtype=np.float32)[-1]
    expected = defined(column_sum_of_squares, x)
    with pytest.raises(AssertionError, match="entries are off"):
        assert_within(torch.from_numpy(one_after_another), expected, rounding(expected, x))
    columns = x.T.reshape(1, 9, -1)
    check(implementation, column_sum_of_squares, x)
    check(implementation, channel_sum_of_squares, columns)
    if implementation == "triton":  # the rest comes to the same kernels, and interpreted takes long
        return
    check(implementation, column_sum_of_squares, spread(x))
    check(implementation, channel_sum_of_squares, x.view(-1, 9, 1))
    check(implementation, channel_sum_of_squares, columns.view(9, -1, 8).permute(1, 0, 2))
    check(implementation, patch_op(Patch((), 2)), columns)
    check(implementation, patch_op(Patch((), 2)), x.view(-1, 9, 1).expand(-1, 9, 2))


@overflows
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_beyond_the_range(implementation: str, dtype: torch.dtype) -> None:
    """Overflow gives infinity, NaN stays NaN, and neither spreads to the sums of other columns."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    special = [largest, -largest, math.inf, -math.inf, math.nan, smallest, -0.0, largest**0.5]
    for rows, columns in ((5, 70), (130, 9), (300, 33)):
        x = random((rows, columns), dtype)
        for i, value in enumerate(special):
            x[(31 * i) % rows, i] = value
        x[:, 8] = smallest
        check(implementation, column_sum_of_squares, x, f"columns of {rows} x {columns}")
        for layout in (contiguous, channels_last):
            check(
                implementation,
                channel_sum_of_squares,
                layout(x.T.reshape(1, columns, rows)),
                f"channels of {rows} x {columns}",
            )
            check(
                implementation,
                channel_sum_of_squares,
                layout(x.view(rows, columns, 1)),
                f"channels of {rows} x {columns}",
            )


@overflows
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_patches_spread_a_value_only_where_they_read_it(
    implementation: str, value: float, layout: Callable[[Tensor], Tensor]
) -> None:
    for case in PATCHES:
        clean = random(case.shape, torch.float32)
        spots = list(itertools.product(*(sorted({0, size // 2, size - 1}) for size in case.shape[2:])))
        if implementation == "triton":  # interpreted, each takes long: two corners
            spots = sorted({spots[0], spots[-1]})
        for spot in spots if clean.numel() else []:
            x = clean.clone()
            x[(-1, 0, *spot)] = value
            check(implementation, patch_op(case), layout(x), f"{case} {spot}")


@st.composite
def geometries(draw: st.DrawFn) -> Patch:
    spatial = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    sizes, kernel, stride, dilation = each(0, 12), each(1, 6), each(1, 4), each(1, 4)
    padding = []
    for size, k, d in zip(sizes, kernel, dilation, strict=True):
        missing = max(0, d * (k - 1) + 1 - size)  # else the kernel would not fit
        before = draw(st.integers(0, missing + 3))
        padding.append((before, draw(st.integers(max(0, missing - before), missing + 3))))
    shape = (draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 5, 33, 40])), *sizes)
    return Patch(shape, kernel, stride, tuple(padding), dilation)


@hypothesis.given(
    case=geometries(), layout=st.sampled_from([contiguous, channels_last, sliced]), dtype=st.sampled_from(DTYPES)
)
def test_patch_geometry(
    implementation: str, case: Patch, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = layout(integers(case.shape, dtype))
    assert_within(patch_op(case)(x), windows(x, case), 0.0, str(case))


def test_patch_arguments_may_be_numbers_or_one_for_each_dimension(implementation: str) -> None:
    x = integers((2, 3, 7, 8), torch.float32)
    expected = windows(x, Patch((), (2, 2), (3, 3), ((1, 1), (1, 1)), (2, 2)))
    assert_within(patch_sum_of_squares(x, 2, 3, 1, 2), expected, 0.0)
    assert_within(patch_sum_of_squares(x, [2, 2], (3, 3), [1, 1], (2, 2)), expected, 0.0)
    assert_within(patch_sum_of_squares(x, (2, 2), 3, ((1, 1), (1, 1)), 2), expected, 0.0)


# Bits.

# Enough elements that three threads have something to do.
LARGE: tuple[tuple[Op, tuple[int, ...]], ...] = (
    (column_sum_of_squares, (2501, 41)),
    (column_sum_of_squares, (34, 3001)),
    (column_sum_of_squares, (1301, 513)),
    (column_sum_of_squares, (35001, 3)),
    (channel_sum_of_squares, (7, 16, 1025)),
    (channel_sum_of_squares, (1, 2, 50001)),
    (channel_sum_of_squares, (501, 11, 21)),
    (patch_op(Patch((), 3, 2, 1)), (2, 40, 51, 53)),
    (patch_op(Patch((), 3)), (1, 3, 181, 191)),
)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(("op", "shape"), LARGE, ids=[f"{i}-{shape}" for i, (_, shape) in enumerate(LARGE)])
def test_same_bits_at_every_run_and_for_every_number_of_threads(
    implementation: str,
    set_threads: Callable[[int], None],
    op: Op,
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor],
) -> None:
    if implementation == "triton" and len(shape) > 3:
        shape = (2, 5, 40, 40)  # interpreted, the whole image takes long
    x = layout(random(shape, torch.float32))
    first = op(x)
    assert_same_bits(op(x), first, "repeated")
    check(implementation, op, x)
    # PyTorch's own reductions, which the reference is made of, promise no more than that.
    for threads in (1, 2, 3) if implementation.startswith("cpu") else ():
        set_threads(threads)
        assert_same_bits(op(x), first, f"{threads} threads")


# Where the kernels of a GPU change their ways.


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_every_height(implementation: str, dtype: torch.dtype) -> None:
    """Full tiles, what is left of them, rows that are joined, and more than one block, at every way to begin."""
    shapes = [(1, 8200), (7, 4104), (8, 512), (29, 520), (33, 136), (300, 192), (421, 24), (2051, 40)]
    if implementation != "triton":
        shapes += [(9, 256), (9, 260), (1500, 1), (257, 64), (4099, 3), (70, 517), (130, 1037)]
    for shape in shapes:
        x = integers(shape, dtype)
        for layout in (contiguous, unaligned, sliced):
            check(implementation, column_sum_of_squares, layout(x), f"{layout.__name__} {shape}", exact=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_of_many_pieces(implementation: str, dtype: torch.dtype) -> None:
    """Runs that begin between the places where 16 bytes are read."""
    x = integers((1, 3, 40003), dtype, limit=3)
    check(implementation, channel_sum_of_squares, x, exact=True)
    check(implementation, channel_sum_of_squares, unaligned(x), "unaligned", exact=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_of_every_length(implementation: str, dtype: torch.dtype) -> None:
    """Around what a warp of a GPU reads at once, from which it takes a run for itself, and of which a piece is made."""
    if implementation == "triton":
        pytest.skip("cuts runs elsewhere")
    elements = 32 * 16 // dtype.itemsize
    for round_elements in (1, 2, 4, 16):
        for size in range(round_elements * elements - 1, round_elements * elements + 3):
            x = integers((2, 3, size), dtype)
            check(implementation, channel_sum_of_squares, x, str(size), exact=True)
            check(implementation, channel_sum_of_squares, unaligned(x), f"unaligned {size}", exact=True)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_images_of_many_tiles(implementation: str, layout: Callable[[Tensor], Tensor]) -> None:
    cases = [
        Patch((1, 5, 37, 70), (6, 3), stride=(2, 3), padding=((0, 4), (2, 1)), dilation=(5, 2)),
        Patch((2, 3, 2100), 5, stride=2, padding=3, dilation=7),
        Patch((1, 2, 5, 9, 33), (3, 2, 4), stride=(2, 1, 3), padding=1),
    ]
    if implementation != "triton":
        cases += [
            Patch((1, 2, 4100), 19, stride=3, padding=40, dilation=5),
            Patch((1, 70, 66, 3), (3, 9), padding=(1, 5)),
            Patch((1, 37, 20, 20), 11, padding=5),
        ]
    for case in cases:
        x = layout(integers(case.shape, torch.float32))
        assert_within(patch_op(case)(x), windows(x, case), 0.0, str(case))


def test_threads_with_many_rows(implementation: str) -> None:
    """So many rows that a thread of a GPU adds more of them, and more blocks are no longer made."""
    rows = 4_300_001
    if implementation == "triton":
        pytest.skip("interpreted, it takes long")
    x = integers((1, 8), torch.bfloat16, limit=1).expand(rows, 8)
    assert_within(column_sum_of_squares(x), rows * x[0].double().square(), 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_changes_no_bit(cuda_backend: str, dtype: torch.dtype) -> None:
    """CUDA: what is added up in which order follows from the shape, however wide the loads are."""
    for op, shapes in (
        (column_sum_of_squares, [(1001, 3), (300, 192), (70, 517)]),
        (channel_sum_of_squares, [(2, 3, 5001), (33, 5, 49)]),
    ):
        for shape in shapes:
            x = random(shape, dtype)
            assert_same_bits(op(unaligned(x)), op(x), str(shape))


def test_a_gpu_refuses_a_kernel_of_millions_of_lines(cuda_backend: str) -> None:
    with pytest.raises(RuntimeError, match=r"^patch_sum_of_squares: kernel_size is too large for a GPU$"):
        patch_sum_of_squares(torch.ones(1, 1, 1, 1), (2**20 + 1, 1), padding=(2**20, 0))


# More than 2^31 elements.


needs_native = pytest.mark.skipif(native_module() is None, reason="the reference would take 16 GB of memory")


@needs_native
def test_more_than_2_to_31_elements() -> None:
    size = 2**30 + 4099
    x = zeros_without_memory(2 * size)
    for position, value in {0: 1.0, 5: 2.0, size: 3.0, 2**31 - 1: 4.0, 2**31: 5.0, 2 * size - 1: 6.0}.items():
        x[position] = value
    with use_backend("cpu"):
        actual = channel_sum_of_squares(x.view(1, 2, size))
    assert_within(actual, torch.tensor([1 + 4, 9 + 16 + 25 + 36], dtype=torch.float64), 0.0)


@needs_native
@pytest.mark.parametrize(("rows", "stride"), [(3, 2**30 + 7), (520, 2**23 + 3)])
def test_rows_more_than_2_to_31_elements_apart(rows: int, stride: int) -> None:
    """Offsets are tested, in no time: of rows within a block and of blocks of rows."""
    columns = 33
    x = zeros_without_memory((rows - 1) * stride + columns).as_strided((rows, columns), (stride, 1))
    x.copy_(integers((rows, columns), x.dtype))
    expected = x.double().square().sum(0)
    for backend in available():
        if backend == "reference" or (backend == "cuda" and not runs_cuda_on_host()):
            continue
        with use_backend(backend):
            assert_within(column_sum_of_squares(x), expected, 0.0, backend)
    sums = torch.empty(1, 1, 1, columns)
    native = native_module()
    assert native is not None
    native.patch_sum_of_squares(
        x.view(rows, 1, 1, 1, columns), sums, [1, 1, columns], [1, 1, 1], [0] * 6, [1, 1, 1], torch.get_num_threads()
    )
    assert_within(sums.flatten(), expected, 0.0)


@needs_native
def test_more_than_2_to_31_elements_at_the_same_addresses() -> None:
    """Counts are tested, and that nothing is copied: a stride of 0 needs no memory."""
    rows, columns = 2**19 + 3, 4096
    x = integers((1, columns), torch.bfloat16).expand(rows, columns)
    expected = rows * x[0].double().square()
    with use_backend("cpu"):
        assert_within(column_sum_of_squares(x), expected, 2 * unit_roundoff(torch.float32) * expected)
