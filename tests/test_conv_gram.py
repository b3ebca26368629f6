"""conv_gram_ against its definition in float64."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fisher_kernels import use_backend
from fisher_kernels.backends import available
from fisher_kernels.ops import ACCUMULATOR, conv_gram, conv_gram_, weighted_gram_
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
from tests.cases.conv_gram import PATCHES, Patches
from tests.comparison import assert_same_bits, assert_within, surroundings, unit_roundoff

pytestmark = [pytest.mark.usefixtures("poisoned_memory", "one_thread"), pytest.mark.pairs_interpreted]

# On the CPU: unfolded, grouped, shifted, and shifted in every direction with pieces that few offsets share.
EACH_WAY = (
    Patches((3, 2, 5, 4), 3, padding=1, bias=True),
    Patches((3, 18, 5, 4), 3, padding=1, groups=9, bias=True),
    Patches((3, 17, 5, 4), 3, padding=1, bias=True),
    Patches((3, 8, 3, 4, 3), 2, padding=1, dilation=2, groups=1),
)


def lost(case: Patches, dtype: torch.dtype) -> Tensor:
    """An output whose old content is not to be read."""
    return torch.full(case.out_shape(), torch.nan, dtype=ACCUMULATOR[dtype])


def rows(case: Patches, x: Tensor) -> Tensor:
    """Patches (groups, N * L, D) in float64: what each offset of the kernel reads, one offset after the other."""
    spatial = x.dim() - 2
    kernel, stride, dilation = (per_dimension(v, spatial) for v in (case.kernel_size, case.stride, case.dilation))
    padding, x = padding_pairs(case.padding, spatial), x.double()
    sizes = [
        (x.shape[2 + d] + padding[2 * d] + padding[2 * d + 1] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in range(spatial)
    ]
    channels = x.shape[1] // case.groups
    reads = []
    for offset in itertools.product(*map(range, kernel)):
        read = x
        for d in range(spatial):
            places = torch.arange(sizes[d]) * stride[d] + offset[d] * dilation[d] - padding[2 * d]
            inside = (places >= 0) & (places < x.shape[2 + d])
            padded = torch.cat([read, x.new_zeros([*read.shape[: 2 + d], 1, *read.shape[3 + d :]])], 2 + d)
            read = padded.index_select(2 + d, torch.where(inside, places, x.shape[2 + d]))
        reads.append(read.reshape(len(x), case.groups, channels, math.prod(sizes)))
    patches = torch.stack(reads, -1)  # [N, groups, C / groups, L, n]
    flat = patches.permute(1, 0, 3, 2, 4).reshape(case.groups, len(x) * math.prod(sizes), channels * len(reads))
    return torch.nn.functional.pad(flat, (0, 1), value=1.0) if case.bias else flat


def defined(case: Patches, x: Tensor) -> Tensor:
    h = rows(case, x)
    return torch.einsum("gri,grj->gij", h, h)


def bound(case: Patches, x: Tensor) -> Tensor:
    """R products and sums and the scaling, each rounded once, of the magnitudes that are added up."""
    return (case.windows() + 4) * unit_roundoff(ACCUMULATOR[x.dtype]) * defined(case, x.abs())


def test_definition() -> None:
    """The patches are those of torch's unfold, and entries are ordered as the weight of a convolution is."""
    case = Patches((3, 4, 5, 6), (3, 2), (2, 1), (1, 2), (1, 2), groups=2, bias=True)
    x = random(case.shape, torch.float64)
    unfolded = torch.nn.functional.unfold(x, (3, 2), (1, 2), (1, 2), (2, 1))  # [N, C * n, L]
    h = torch.cat([unfolded.view(3, 2, 12, -1), torch.ones(3, 2, 1, unfolded.shape[-1], dtype=torch.float64)], 2)
    expected = torch.einsum("sgil,sgjl->gij", h, h)
    assert_within(defined(case, x), expected, 1e-11)
    weight = random((6, 2, 3, 2), torch.float64, 1)
    outputs = torch.nn.functional.conv2d(x, weight, None, (2, 1), (1, 2), (1, 2), 2)
    squares = outputs.square().sum((0, 2, 3))  # of each output channel: the factor in its weight
    flat, factors = weight.flatten(1), expected[:, :-1, :-1].repeat_interleave(3, 0)
    assert_within(squares, torch.einsum("oi,oij,oj->o", flat, factors, flat), 1e-11)
    with use_backend("reference"):
        out = lost(case, torch.float64)
        conv_gram_(out, x, *case.geometry)
        assert_within(out, expected, 1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PATCHES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(implementation: str, layout: str, case: Patches, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](random(case.shape, dtype))
    before, out = x.clone(), unaligned(lost(case, dtype))
    around = surroundings(out)
    conv_gram_(out, x, *case.geometry)
    assert_within(out, defined(case, x), bound(case, x))
    assert_same_bits(out, out.mT, "the upper triangle")
    assert_same_bits(x, before, "x")
    assert_same_bits(surroundings(out), around, "the memory around the result")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PATCHES, ids=str)
@pytest.mark.parametrize(("decay", "gain"), [(2.5, 1.5), (0.9, 0.1), (1.0, 0.0)])
def test_average(implementation: str, decay: float, gain: float, case: Patches, dtype: torch.dtype) -> None:
    """Two products and a sum more, each rounded once; of what is there the lower triangles count."""
    x = random(case.shape, dtype)
    lower = random(case.out_shape(), ACCUMULATOR[dtype], 2).tril()
    out = lower + torch.full_like(lower, torch.nan).triu(1)
    old = lower.double() + lower.double().tril(-1).mT
    conv_gram_(out, x, *case.geometry, decay, gain)
    rounding = 2 * gain * bound(case, x) + 4 * unit_roundoff(out.dtype) * decay * old.abs()
    assert_within(out, decay * old + gain * defined(case, x), rounding)
    assert_same_bits(out, out.mT, "the upper triangle")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_whole_numbers_are_exact(implementation: str, case: Patches, dtype: torch.dtype) -> None:
    x = integers(case.shape, dtype)
    out = integers(case.out_shape(), ACCUMULATOR[dtype], 1).tril()
    expected = 0.5 * (out + out.tril(-1).mT).double() + 2 * defined(case, x)
    conv_gram_(out, x, *case.geometry, 0.5, 2.0)
    assert_within(out, expected, 0.0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of NumPy, in Triton's interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", EACH_WAY, ids=str)
@pytest.mark.slow_interpreted
def test_what_is_not_finite_goes_where_it_is_multiplied(
    implementation: str, case: Patches, value: float, dtype: torch.dtype
) -> None:
    """Zeros of the padding are multiplied like all else; what meets no such number keeps its bits."""
    x, expected = random(case.shape, dtype), lost(case, dtype)
    conv_gram_(expected, x, *case.geometry)
    each = case.shape[1] // case.groups
    for channel in (0, case.shape[1] - 1):
        bad, out = x.clone(), lost(case, dtype)
        bad[1, channel].view(-1)[1] = value
        conv_gram_(out, bad, *case.geometry)
        wanted = defined(case, bad)
        assert not wanted.isfinite().all()
        assert_within(out, wanted, bound(case, x).max() + defined(case, x.abs()).max() * unit_roundoff(out.dtype))
        if implementation != "reference":  # whose sums PyTorch may order otherwise
            n = case.out_shape()[1] // each
            touched = torch.zeros(case.out_shape()[:2], dtype=torch.bool)
            touched[channel // each, channel % each * n : (channel % each + 1) * n] = True
            kept = ~(touched[:, :, None] | touched[:, None])
            assert_same_bits(out[kept], expected[kept], "another channel")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of NumPy, in Triton's interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EACH_WAY, ids=str)
def test_what_is_too_large_becomes_infinite(implementation: str, case: Patches, dtype: torch.dtype) -> None:
    """Products of two of the large numbers overflow, and stay infinite in the sum of what is positive."""
    x = random(case.shape, dtype).abs()
    x[1, 0].view(-1)[2:4] = 1e25
    out = lost(case, dtype)
    conv_gram_(out, x, *case.geometry)
    expected = defined(case, x)
    assert bool((expected > 1e39).any())
    assert_within(out, expected, bound(case, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Patches((20, 40, 9, 9), 3, padding=1, bias=True),
        Patches((64, 3, 20, 20), 5, padding=1, bias=True),
        Patches((64, 40, 9, 9), 3, padding=1, groups=40, bias=True),
    ],
    ids=str,
)
def test_same_bits_for_every_number_of_threads(
    implementation: str, set_threads: Callable[[int], None], case: Patches, dtype: torch.dtype
) -> None:
    if not implementation.startswith("cpu"):
        pytest.skip("no threads that this package starts")
    x, first = random(case.shape, dtype), lost(case, dtype)
    conv_gram_(first, x, *case.geometry)
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        out = lost(case, dtype)
        conv_gram_(out, x, *case.geometry)
        assert_same_bits(out, first, f"{threads} threads")


@pytest.mark.parametrize(
    "case", [Patches((20, 12, 5, 5), 3, padding=1, bias=True), Patches((9, 2, 9, 9), 3, bias=True)]
)
@pytest.mark.slow_interpreted
def test_agrees_with_the_gram_of_unfolded_patches(implementation: str, case: Patches) -> None:
    x, out, unfolded = integers(case.shape, torch.float32), lost(case, torch.float32), lost(case, torch.float32)
    conv_gram_(out, x, *case.geometry)
    weighted_gram_(unfolded[0], rows(case, x)[0].float())
    assert_same_bits(out, unfolded)


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.slow_interpreted
def test_long_sums_are_added_in_runs(implementation: str, channels: int) -> None:
    """2^18 equal terms, in float32: runs and their sums, where one after the other would lose far more.

    2^15 of them for Triton's interpreter.
    """
    if implementation == "reference":
        pytest.skip("PyTorch promises nothing of the kind")
    positions = 2**15 if implementation == "triton" else 2**18
    case = Patches((1, channels, positions), 1)
    x, out = torch.full(case.shape, 0.1), lost(case, torch.float32)
    conv_gram_(out, x, *case.geometry)
    expected = defined(case, x)
    assert_within(out, expected, (256 + positions / 64) * unit_roundoff(torch.float32) * expected)


# What CUDA's and Triton's kernels divide: tiles of 32, 64 and 128 columns, runs and shares of the windows.


@pytest.mark.parametrize("columns", [31, 32, 33, 64, 65, 256, 257])
@pytest.mark.parametrize("windows", [1, 17, 127, 128, 129, 700])
@pytest.mark.slow_on_host
def test_borders_of_tiles_runs_and_shares(cuda_backend: str, windows: int, columns: int) -> None:
    dtype = DTYPES[(windows + columns) % len(DTYPES)]
    case = Patches((1, columns // 2, windows + 1), 2, bias=columns % 2 == 1)
    x = integers(case.shape, dtype)
    for layout in (contiguous, channels_last):
        out = lost(case, dtype)
        conv_gram_(out, layout(x), *case.geometry)
        assert_within(out, defined(case, x), 0.0)


def test_what_a_gpu_cannot_count(cuda_backend: str) -> None:
    x, out = torch.ones(1, 1, 2), torch.ones(1, 1, 1)
    with pytest.raises(RuntimeError, match=r"^conv_gram_: a padded dimension is \d+, expected at most 536870911"):
        conv_gram_(out, x, 1, padding=2**29)
    assert bool((out == 1).all())


def triton_kernels() -> Any:
    if "triton" not in available():
        pytest.skip("no Triton")
    from fisher_kernels.triton_kernels import conv_gram

    return conv_gram


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_within_a_share(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Shares of the windows that are several runs and a part of one, and runs that are several steps."""
    kernels = triton_kernels()
    for name, value in (("_LEAST_ROWS", 100), ("_RUN", 48), ("_STEP", 16)):
        monkeypatch.setattr(kernels, name, value)
    case = Patches((3, 9, 10, 11), 2, bias=True)
    x, out = integers(case.shape, dtype), lost(case, dtype)
    with use_backend("triton"):
        conv_gram_(out, x, *case.geometry)
    assert_within(out, defined(case, x), 0.0)


@pytest.mark.parametrize("held", [1, 2])
def test_the_reference_unfolds_a_few_samples_at_a_time(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Patches((5, 4, 5, 6), 2, groups=2, bias=True)
    x, out = integers(case.shape, torch.float32), lost(case, torch.float32)
    numbers = 4 * 20 * 4  # of a sample: channels, windows and offsets
    monkeypatch.setattr(conv_gram, "_PATCHES", held * numbers)
    with use_backend("reference"):
        conv_gram_(out, x, *case.geometry)
    assert_within(out, defined(case, x), 0.0)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_samples_more_than_2_to_31_elements_apart(backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    case, far = Patches((3, 9, 4, 3), 2, bias=True), 2**30 + 7
    values = integers(case.shape, torch.bfloat16)
    memory = zeros_without_memory(2 * far + values[0].numel())
    x = memory.as_strided(values.shape, (far, *layout(values).stride()[1:])).copy_(values)
    out = lost(case, x.dtype)
    conv_gram_(out, x, *case.geometry)
    assert_within(out, defined(case, x), 0.0)


PEAK = """
import resource, sys, torch
from fisher_kernels import use_backend
from fisher_kernels.ops import conv_gram_
backend, samples, channels = map(str, sys.argv[1:])
torch.set_num_threads(2)
x = torch.ones(int(samples), int(channels), 16, 16)
out = torch.ones(1, 9 * int(channels), 9 * int(channels))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with use_backend(backend):
    conv_gram_(out, x, 3, padding=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set in KiB")
@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, 32])
def test_memory_does_not_grow_with_the_batch(host_backend: str, channels: int) -> None:
    """Patches of a sample of 32 channels are 295 KB: 19 MB for 64 samples, 151 MB for 512."""

    def peak(samples: int) -> int:
        command = [sys.executable, "-c", PEAK, host_backend, str(samples), str(channels)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.getcwd()).stdout)

    few, many = peak(64), peak(512)
    assert many < few + 8192, f"{few} KiB for 64 samples, {many} KiB for 512"
    if host_backend == "cpu":
        assert many < 8192
