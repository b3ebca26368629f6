"""conv_mini_block_gram_ against its definition in float64."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fisher_kernels import backends, use_backend
from fisher_kernels.ops import ACCUMULATOR, conv_mini_block_gram_, mini_block_gram_
from fisher_kernels.ops._convolution import padding_pairs, per_dimension
from tests.cases import (
    DTYPES,
    LAYOUTS,
    channels_last,
    contiguous,
    integers,
    random,
    unaligned,
    zeros_without_memory,
)
from tests.cases.mini_block_gram import CONVOLUTIONS, Convolution
from tests.comparison import assert_same_bits, assert_within, surroundings, unit_roundoff

pytestmark = [pytest.mark.usefixtures("poisoned_memory", "one_thread"), pytest.mark.pairs_interpreted]

# Lanes of input channels, of output channels and of groups.
EACH_KIND = (
    Convolution((9, 17, 5, 4), 5, 3, padding=1),
    Convolution((3, 3, 5, 4), 18, 3),
    Convolution((3, 17, 5, 4), 17, 3, groups=17),
)


def lost(case: Convolution, dtype: torch.dtype) -> Tensor:
    """An output whose old content is not to be read."""
    return torch.full(case.out_shape(), torch.nan, dtype=ACCUMULATOR[dtype])


def inputs(case: Convolution, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return random(case.shape, dtype), random(case.grad_shape(), dtype, 1)


def gradients(case: Convolution, x: Tensor, grad: Tensor) -> Tensor:
    """Gradients (N, O, I / groups, n) of the kernels by each sample, one offset of the kernel after the other."""
    spatial = x.dim() - 2
    kernel, stride, dilation = (per_dimension(v, spatial) for v in (case.kernel_size, case.stride, case.dilation))
    before = padding_pairs(case.padding, spatial)[::2]
    x, grad = x.double(), grad.double()
    out = torch.zeros(len(x), *case.out_shape()[:3], dtype=torch.float64)
    for k, offset in enumerate(itertools.product(*map(range, kernel))):
        read = x
        for d in range(spatial):
            places = torch.arange(grad.shape[2 + d]) * stride[d] + offset[d] * dilation[d] - before[d]
            inside = (places >= 0) & (places < x.shape[2 + d])
            padded = torch.cat([read, torch.zeros_like(read.sum(2 + d, keepdim=True))], 2 + d)
            read = padded.index_select(2 + d, torch.where(inside, places, x.shape[2 + d]))
        reads = read.reshape(len(x), case.groups, x.shape[1] // case.groups, math.prod(grad.shape[2:]))
        grads = grad.reshape(len(x), case.groups, case.outputs // case.groups, math.prod(grad.shape[2:]))
        out[..., k] = torch.einsum("sgol,sgil->sgoi", grads, reads).reshape(out.shape[:3])
    return out


def defined(case: Convolution, x: Tensor, grad: Tensor) -> Tensor:
    by_sample = gradients(case, x, grad)
    return torch.einsum("soij,soik->oijk", by_sample, by_sample)


def bound(case: Convolution, x: Tensor, grad: Tensor) -> Tensor:
    """Two gradients of L products and sums, their product, N sums, the scaling: each rounded once, of magnitudes."""
    roundings = 2 * (math.prod(grad.shape[2:]) + 1) + len(x) + 3
    return roundings * unit_roundoff(ACCUMULATOR[x.dtype]) * defined(case, x.abs(), grad.abs())


def test_definition() -> None:
    """The gradients are those that autograd gives, one sample after the other."""
    case = Convolution((3, 4, 5, 6), 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2)
    x, grad = inputs(case, torch.float64)
    weight = torch.zeros(6, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(case.out_shape(), dtype=torch.float64)
    for s in range(3):
        y = torch.nn.functional.conv2d(x[s], weight, None, (2, 1), (1, 2), (1, 2), 2)
        (by_sample,) = torch.autograd.grad(y, weight, grad[s])
        flat = by_sample.flatten(2)
        expected += flat[..., :, None] * flat[..., None, :]
    assert_within(defined(case, x, grad), expected, 1e-11)
    with use_backend("reference"):
        out = lost(case, torch.float64)
        conv_mini_block_gram_(out, x, grad, *case.geometry)
        assert_within(out, expected, 1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(implementation: str, layout: str, case: Convolution, dtype: torch.dtype) -> None:
    x, grad = (LAYOUTS[layout](tensor) for tensor in inputs(case, dtype))
    before, out = (x.clone(), grad.clone()), unaligned(lost(case, dtype))
    around = surroundings(out)
    conv_mini_block_gram_(out, x, grad, *case.geometry)
    assert_within(out, defined(case, x, grad), bound(case, x, grad))
    assert_same_bits(out, out.mT, "the upper triangle")
    assert_same_bits(x, before[0], "x")
    assert_same_bits(grad, before[1], "grad_output")
    assert_same_bits(surroundings(out), around, "the memory around the result")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("inputs_each", "outputs_each"), [(2, 7), (3, 5), (1, 11), (9, 6), (17, 3)])
@pytest.mark.parametrize("groups", [1, 9, 17])
def test_no_samples_leave_the_decay(
    implementation: str, groups: int, inputs_each: int, outputs_each: int, dtype: torch.dtype
) -> None:
    """Also where the blocks of one unit of work are fewer than those of another."""
    case = Convolution((0, groups * inputs_each, 5), groups * outputs_each, 2, groups=groups)
    x, grad = inputs(case, dtype)
    for decay in (0.0, 0.5):
        out = torch.ones(case.out_shape(), dtype=dtype)
        conv_mini_block_gram_(out, x, grad, 2, groups=groups, decay=decay)
        assert_same_bits(out, torch.full_like(out, decay))


def test_every_axis_has_its_own_geometry(implementation: str) -> None:
    for case in (
        Convolution((3, 4, 5, 6), 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2),
        Convolution((2, 3, 4, 5, 6), 2, (2, 1, 3), (1, 2, 3), (0, 1, 2), (2, 3, 1)),
    ):
        x, grad = inputs(case, torch.float64)
        out = lost(case, torch.float64)
        conv_mini_block_gram_(out, x, grad, *case.geometry)
        assert_within(out, defined(case, x, grad), bound(case, x, grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("decay", "gain"), [(2.5, 1.5), (0.9, 0.1), (1.0, 0.0)])
def test_average(implementation: str, decay: float, gain: float, case: Convolution, dtype: torch.dtype) -> None:
    """Two products and a sum more, each rounded once; of what is there the lower triangles count."""
    x, grad = inputs(case, dtype)
    lower = random(case.out_shape(), ACCUMULATOR[dtype], 2).tril()
    out = lower + torch.full_like(lower, torch.nan).triu(1)
    old = lower.double() + lower.double().tril(-1).mT
    conv_mini_block_gram_(out, x, grad, *case.geometry, decay, gain)
    rounding = 2 * gain * bound(case, x, grad) + 4 * unit_roundoff(out.dtype) * decay * old.abs()
    assert_within(out, decay * old + gain * defined(case, x, grad), rounding)
    assert_same_bits(out, out.mT, "the upper triangle")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_whole_numbers_are_exact(implementation: str, case: Convolution, dtype: torch.dtype) -> None:
    x, grad = integers(case.shape, dtype, limit=2), integers(case.grad_shape(), dtype, 1, limit=2)
    expected = defined(case, x, grad)
    assert not expected.numel() or expected.max() < 2**24
    out = lost(case, dtype)
    conv_mini_block_gram_(out, x, grad, *case.geometry)
    assert_within(out, expected, 0.0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NumPy, in Triton's interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("case", EACH_KIND, ids=str)
@pytest.mark.slow_interpreted
def test_what_is_not_finite_stays_with_its_channel(
    implementation: str, case: Convolution, value: float, dtype: torch.dtype
) -> None:
    x, grad = inputs(case, dtype)
    expected, actual = lost(case, dtype), lost(case, dtype)
    conv_mini_block_gram_(expected, x, grad, *case.geometry)
    for o in (0, case.outputs - 1):
        bad = grad.clone()
        bad[1, o, 1, 1] = value
        conv_mini_block_gram_(actual, x, bad, *case.geometry)
        kept = torch.arange(case.outputs) != o
        assert not actual[o].isfinite().any()
        assert_same_bits(actual[kept], expected[kept], "another output channel")
    for i in (0, case.shape[1] - 1):
        bad = x.clone()
        bad[2, i, 2, 2] = value
        conv_mini_block_gram_(actual, bad, grad, *case.geometry)
        touched = torch.zeros(case.out_shape()[:2], dtype=torch.bool)
        if case.groups == 1:
            touched[:, i] = True
        else:
            touched[i] = True
        assert not actual[touched].isfinite().all(-1).all(-1).any()
        assert_same_bits(actual[~touched], expected[~touched], "another input channel")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Convolution((20, 64, 8, 8), 70, 3, padding=1),
        Convolution((20, 5, 16, 16), 64, 3, padding=1),
        Convolution((20, 70, 16, 16), 140, 3, padding=1, groups=70),
    ],
    ids=str,
)
def test_same_bits_for_every_number_of_threads(
    implementation: str, set_threads: Callable[[int], None], case: Convolution, dtype: torch.dtype
) -> None:
    if implementation in ("reference", "cuda", "triton"):
        pytest.skip("PyTorch promises nothing of the kind, and a GPU has no such threads")
    x, grad = inputs(case, dtype)
    first = lost(case, dtype)
    conv_mini_block_gram_(first, x, grad, *case.geometry)
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        out = lost(case, dtype)
        conv_mini_block_gram_(out, x, grad, *case.geometry)
        assert_same_bits(out, first, f"{threads} threads")


@pytest.mark.slow_interpreted
def test_agrees_with_the_gram_of_stored_gradients(implementation: str) -> None:
    case = Convolution((20, 16, 5, 5), 6, 3, padding=1)
    x, grad = integers(case.shape, torch.float32, limit=2), integers(case.grad_shape(), torch.float32, 1, limit=2)
    out, stored = lost(case, torch.float32), torch.empty(6 * 16, 9, 9)
    conv_mini_block_gram_(out, x, grad, *case.geometry)
    mini_block_gram_(stored, gradients(case, x, grad).float().flatten(1, 2))
    assert_same_bits(out.flatten(0, 1), stored)


@pytest.mark.slow_interpreted
def test_long_sums_are_added_in_segments(implementation: str) -> None:
    """2^18 equal terms, in float32: segments of 1024 and their sums, where one after the other would lose far more.

    2^15 of them for Triton's interpreter.
    """
    if implementation == "reference":
        pytest.skip("PyTorch promises nothing of the kind")
    positions = 2**15 if implementation == "triton" else 2**18
    case = Convolution((1, 1, positions), 1, 1)
    x, grad = torch.full(case.shape, 0.1), torch.full(case.grad_shape(), 0.7)
    out = lost(case, torch.float32)
    conv_mini_block_gram_(out, x, grad, *case.geometry)
    expected = defined(case, x, grad)
    assert_within(out, expected, 2 * (1024 + positions / 1024 + 4) * unit_roundoff(torch.float32) * expected)


@pytest.mark.parametrize("samples", [1, 256, 3000, 100_000])
@pytest.mark.parametrize("sizes", [(1, 512, 512, 9), (1, 64, 3, 49), (64, 1, 1, 9), (1, 2048, 512, 1)], ids=str)
def test_chunks_on_a_gpu_cover_all_blocks_and_fit(sizes: tuple[int, int, int, int], samples: int) -> None:
    kernels = pytest.importorskip("fisher_kernels.triton_kernels.conv_mini_block_gram")
    groups, rows, channels, n = sizes
    run, held, chunks = kernels.plan(samples, groups, rows, channels, n, torch.float32)
    seen = torch.zeros(groups, rows, channels, dtype=torch.int64)
    for c in chunks:
        seen[c.group : c.group + c.groups, c.row : c.row + c.rows, c.channel : c.channel + c.channels] += 1
        assert held * c.groups * c.rows * c.channels * n * 4 <= 2**25
    assert bool((seen == 1).all())
    assert held == samples or held % run == 0


@pytest.mark.slow
def test_more_samples_than_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of samples and of blocks give the bits of one."""
    kernels = pytest.importorskip("fisher_kernels.triton_kernels.conv_mini_block_gram")
    if "triton" not in backends.available() or backends.device_type("triton") != "cpu":
        pytest.skip("on the interpreter")
    case = Convolution((70, 4, 3), 3, 2)
    x, grad = inputs(case, torch.float32)
    first, out = (random(case.out_shape(), torch.float32, 2) for _ in range(2))
    with use_backend("triton"):
        conv_mini_block_gram_(first, x, grad, *case.geometry, 0.5, 0.25)
        monkeypatch.setattr(kernels, "_SAMPLES", 32)
        monkeypatch.setattr(kernels, "_WORKSPACE", 3000)
        conv_mini_block_gram_(out, x, grad, *case.geometry, 0.5, 0.25)
    assert_same_bits(out, first)


# What CUDA's kernels divide: tiles of rows and columns, segments and parts of positions, slabs of blocks and samples.


@pytest.mark.parametrize("columns", [31, 32, 33, 64, 65, 128])
@pytest.mark.parametrize("rows", [15, 16, 17, 63, 64, 65, 129])
def test_borders_of_tiles(cuda_backend: str, rows: int, columns: int) -> None:
    dtype = DTYPES[(rows + columns) % len(DTYPES)]
    case = Convolution((2, columns, 19), rows, 1)
    x, grad = integers(case.shape, dtype, limit=2), integers(case.grad_shape(), dtype, 1, limit=2)
    for layout in (contiguous, channels_last):
        out = lost(case, dtype)
        conv_mini_block_gram_(out, layout(x), layout(grad), *case.geometry)
        assert_within(out, defined(case, x, grad), 0.0)


@pytest.mark.parametrize("samples", [1, 600])
@pytest.mark.parametrize(
    "case",
    [
        Convolution((1, 4, 1033), 34, 8),  # a square tile, whose rows are aligned
        Convolution((1, 3, 1033), 34, 7),
        Convolution((1, 3, 1030), 1, 3),
        Convolution((1, 3, 2051), 3, 1, groups=3),
    ],
    ids=str,
)
def test_segments_of_positions(cuda_backend: str, case: Convolution, samples: int) -> None:
    """Few samples: segments are parts of their own. Many: one part adds its segments."""
    x, grad = integers(case.shape, torch.float32, limit=1), integers(case.grad_shape(), torch.float32, 1, limit=1)
    expected = samples * defined(case, x, grad)
    assert expected.max() < 2**24
    for layout in (contiguous, channels_last) if samples == 1 else (contiguous,):
        out = lost(case, torch.float32)
        many_x, many_grad = (layout(v).expand(samples, -1, -1) for v in (x, grad))
        conv_mini_block_gram_(out, many_x, many_grad, *case.geometry)
        assert_within(out, expected, 0.0)


@pytest.mark.parametrize(
    "case",
    [
        Convolution((600, 128, 1), 130, 1),  # rows
        Convolution((140, 1024, 1), 64, 1),  # samples
        Convolution((17, 60_001, 9), 1, 9),  # channels
        Convolution((17, 60_001, 9), 60_001, 9, groups=60_001),
    ],
    ids=str,
)
@pytest.mark.slow
def test_gradients_that_do_not_fit_the_workspace(cuda_backend: str, case: Convolution) -> None:
    x, grad = integers(case.shape, torch.float32, limit=2), integers(case.grad_shape(), torch.float32, 1, limit=2)
    out = integers(case.out_shape(), torch.float32, 2)
    expected = 0.5 * (out.tril() + out.tril(-1).mT)
    for of_x, of_grad in zip(x, grad.square()[..., None], strict=True):  # one window: w is x times a number
        products = of_x[:, :, None] * of_x[:, None]
        expected += 2 * (of_grad * products)[:, None] if case.groups > 1 else 2 * of_grad[..., None] * products
    conv_mini_block_gram_(out, x, grad, *case.geometry, 0.5, 2.0)
    assert bool((out == expected).all())


def test_what_a_gpu_cannot_count(cuda_backend: str) -> None:
    x, out = torch.ones(1, 1, 2), torch.ones(1, 1, 1, 1)
    with pytest.raises(
        RuntimeError, match=r"^conv_mini_block_gram_: a padded dimension is \d+, expected at most 536870911"
    ):
        conv_mini_block_gram_(out, x, x, 1, padding=2**29)
    assert bool((out == 1).all())


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_samples_more_than_2_to_31_elements_apart(backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    case, far = Convolution((3, 3, 4, 3), 5, 2), 2**30 + 7

    def apart(x: Tensor) -> Tensor:
        memory = zeros_without_memory(2 * far + x[0].numel())
        return memory.as_strided(x.shape, (far, *layout(x).stride()[1:])).copy_(x)

    x, grad = (apart(integers(shape, torch.bfloat16, limit=2)) for shape in (case.shape, case.grad_shape()))
    out = lost(case, x.dtype)
    conv_mini_block_gram_(out, x, grad, *case.geometry)
    assert_within(out, defined(case, x, grad), 0.0)


PEAK = """
import resource, sys, torch
from fisher_kernels import use_backend
from fisher_kernels.ops import conv_mini_block_gram_
backend, samples = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(2)
x, grad, out = torch.ones(samples, 32, 16, 16), torch.ones(samples, 32, 16, 16), torch.ones(32, 32, 9, 9)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with use_backend(backend):
    conv_mini_block_gram_(out, x, grad, 3, padding=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set in KiB")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_batch(host_backend: str) -> None:
    """Patches and gradients of a sample are 442 KB: 28 MB for 64 samples, 226 MB for 512."""

    def peak(samples: int) -> int:
        command = [sys.executable, "-c", PEAK, host_backend, str(samples)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.getcwd()).stdout)

    few, many = peak(64), peak(512)
    assert many < few + 8192, f"{few} KiB for 64 samples, {many} KiB for 512"
    if host_backend == "cpu":
        assert many < 8192
