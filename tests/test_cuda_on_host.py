"""CUDA on the host: what the stand-in for the CUDA runtime computes, sees and refuses."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import cuda_builds

KERNELS = Path(__file__).parent / "cuda_on_host"
pytestmark = pytest.mark.skipif(bool(cuda_builds.missing()), reason=f"needs {cuda_builds.missing()}")

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
SUCCESS = 0
INVALID_VALUE = 1
INVALID_CONFIGURATION = 9
ILLEGAL_ADDRESS = 700
LAUNCH_OUT_OF_RESOURCES = 701
LAUNCH_FAILURE = 719


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.last_message.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    names = ("computations", "conversions", "faults", "intrinsics", "launches", "orders", "tensor_cores")
    sources = [KERNELS / f"{name}.cu" for name in names]
    path = cuda_builds.build_library(tmp_path_factory.mktemp("cuda_on_host") / "kernels.so", sources, "-O1")
    library = load(path)
    library.error_string.restype = library.error_name.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session")
def ucontext_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """As processors other than x86-64 switch."""
    path = tmp_path_factory.mktemp("ucontext") / "kernels.so"
    flags = ("-O0", "-DFISHER_KERNELS_HOST_UCONTEXT")
    return load(cuda_builds.build_library(path, [KERNELS / "computations.cu"], *flags))


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return cuda_builds.build(tmp_path_factory.mktemp("sanitized") / "program", [KERNELS / "sanitized.cu"], *flags)


@pytest.fixture(params=["forward", "reverse", "1", "2"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FISHER_KERNELS_HOST_ORDER", request.param)
    return request.param


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def check(library: ctypes.CDLL, error: int) -> None:
    assert error == SUCCESS, library.last_message()
    assert library.last_message() == b""


# What kernels compute.


def check_sum(library: ctypes.CDLL, size: int, blocks: int, threads: int) -> None:
    x = torch.randint(-(2**31), 2**31, (size,), dtype=torch.int32)
    total = torch.zeros(1, dtype=torch.int64)
    check(library, library.sum(pointer(x), ctypes.c_int64(size), blocks, threads, pointer(total)))
    assert total.item() == x.to(torch.int64).sum().item()


@pytest.mark.parametrize("threads", [32, 96, 256])
@pytest.mark.parametrize(("size", "blocks"), [(1, 1), (63, 1), (1001, 7), (100_003, 40)])
def test_sums_by_shuffles_shared_memory_and_atomics(
    library: ctypes.CDLL, size: int, blocks: int, threads: int, order: str
) -> None:
    check_sum(library, size, blocks, threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_openmp_threads_may_run_the_blocks(library: ctypes.CDLL, threads: int) -> None:
    library.set_threads(threads)
    check_sum(library, 1_000_003, 200, 256)  # so long that they are all called
    library.set_threads(1)


@pytest.mark.slow
def test_ucontext_switches_as_well(ucontext_library: ctypes.CDLL) -> None:
    check_sum(ucontext_library, 10_001, 7, 96)


def test_grids_and_blocks_have_three_dimensions(library: ctypes.CDLL) -> None:
    depth, height, width = 2 * 4, 2 * 3, 3 * 5
    visits = torch.zeros(depth, height, width, dtype=torch.int32)
    places = torch.zeros(depth, height, width, 3, dtype=torch.int32)
    check(library, library.places(pointer(visits), pointer(places)))
    assert (visits == 1).all()
    axes = torch.meshgrid(torch.arange(depth), torch.arange(height), torch.arange(width), indexing="ij")
    assert torch.equal(places, torch.stack(axes[::-1], dim=-1).to(torch.int32))


def test_parameters_may_take_almost_32_kilobytes(library: ctypes.CDLL) -> None:
    numbers = torch.randint(2**62, (4000,))
    out = torch.zeros_like(numbers)
    check(library, library.table(pointer(numbers), pointer(out)))
    assert torch.equal(out, numbers)


def shuffled(values: list[Any], operand: int, width: int) -> list[list[Any]]:
    """What ``__shfl_sync`` and its up, down and xor forms give every thread."""

    def source(kind: str, lane: int) -> int:
        first = lane // width * width
        last = first + width - 1
        match kind:
            case "lane":
                return first + operand % width
            case "up":
                return lane - operand if lane - operand >= first else lane
            case "down":
                return lane + operand if lane + operand <= last else lane
            case _:
                return lane ^ operand if lane ^ operand <= last else lane

    lanes = [(i // 32 * 32, i % 32) for i in range(len(values))]
    return [[values[warp + source(kind, lane)] for warp, lane in lanes] for kind in ("lane", "up", "down", "xor")]


@pytest.mark.parametrize("width", [1, 2, 8, 32])
@pytest.mark.parametrize("operand", [0, 1, 5, 16, 31])
def test_shuffles_move_values_as_cuda_says(library: ctypes.CDLL, operand: int, width: int) -> None:
    for function, dtype in (
        (library.shuffles_of_32_bits, torch.float32),
        (library.shuffles_of_64_bits, torch.int64),
    ):
        values = (torch.randn(64) * 2**40).to(dtype)
        out = torch.zeros(4, 64, dtype=dtype)
        mask = ctypes.c_uint(0xFFFFFFFF)
        check(library, function(pointer(values), pointer(out), 64, operand, width, mask))
        assert out.tolist() == shuffled(values.tolist(), operand, width)


@pytest.mark.parametrize("threads", [1, 31, 33, 96])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_votes_count_every_lane_once(library: ctypes.CDLL, threads: int, share: float) -> None:
    predicates = (torch.rand(threads) < share).to(torch.int32) * 6
    out = torch.zeros(6, threads, dtype=torch.int32)
    check(library, library.votes(pointer(predicates), pointer(out), threads))
    holds = (predicates != 0).tolist()
    warps = [holds[i // 32 * 32 : i // 32 * 32 + 32] for i in range(threads)]
    assert (out[0].to(torch.int64) & 0xFFFFFFFF).tolist() == [sum(h << k for k, h in enumerate(w)) for w in warps]
    assert out[1].tolist() == [any(w) for w in warps]
    assert out[2].tolist() == [all(w) for w in warps]
    for row, expected in zip(out[3:].tolist(), (sum(holds), all(holds), any(holds)), strict=True):
        assert row == [expected] * threads


def test_halves_of_a_warp_meet_apart(library: ctypes.CDLL, order: str) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    check(library, library.halves(pointer(out)))
    assert out.tolist() == [sum(range(16))] * 16 + [31] * 16


def test_atomics_lose_nothing(library: ctypes.CDLL, order: str) -> None:
    blocks, threads = 40, 160
    size = blocks * threads
    cells = torch.zeros(6, dtype=torch.int32)
    total = torch.zeros(1, dtype=torch.int64)
    check(library, library.atomics(blocks, threads, pointer(cells), pointer(total)))
    assert cells.tolist() == [size - 1, 1 - size, -1, 2 * size, 1, 1]
    assert total.item() == size * (size - 1) // 2


def test_shared_memory_starts_as_nan_in_every_block(library: ctypes.CDLL) -> None:
    out = torch.zeros(1000, dtype=torch.uint8)
    check(library, library.unwritten(pointer(out), 1000, 3))
    assert (out == 0xFF).all()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert out.view(dtype).isnan().all()


# Intrinsics and the runtime's functions.


def test_bits_are_counted_and_carried_as_cuda_says(library: ctypes.CDLL) -> None:
    edges = [0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 1, 0x7FC00001, 0x12345678]
    x, y = zip(*itertools.product(edges, edges), strict=True)
    out = torch.zeros(14, len(x), dtype=torch.int32)
    arguments = [(ctypes.c_uint * len(x))(*numbers) for numbers in (x, y)]
    check(library, library.bits(*arguments, len(x), pointer(out)))

    def expected(a: int, b: int) -> list[int]:
        wide = a << 32 | b
        signed = [n - (n >> 31 << 32) for n in (a, b)]
        return [
            *(a.bit_count(), wide.bit_count()),
            *(32 - a.bit_length(), 64 - wide.bit_length()),
            *((n & -n).bit_length() for n in (a, wide)),
            *(a * b >> 32, wide * wide >> 96),
            *(min(a, b), max(signed)),
            *(a, a, a, b),
        ]

    rows = [[n % 2**32 for n in expected(a, b)] for a, b in zip(x, y, strict=True)]
    assert (out.T.to(torch.int64) & 0xFFFFFFFF).tolist() == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_arithmetic_rounds_to_nearest(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1.0, 3.0, torch.inf, torch.nan], dtype=dtype)
    ordinary = torch.randn(400, 2, dtype=dtype).abs()
    x, y = torch.cat([torch.cartesian_prod(special, special), ordinary]).T.contiguous()
    names = ["add", "sub", "mul", "div", "sqrt", "rcp", *(["frsqrt"] * (dtype == torch.float32)), "rsqrt"]
    out = torch.zeros(len(names) + 3, x.numel(), dtype=dtype)
    function = library.floats if dtype == torch.float32 else library.doubles
    check(library, function(pointer(x), pointer(y), x.numel(), pointer(out)))
    with np.errstate(all="ignore"):
        root = torch.from_numpy(np.sqrt(x.numpy()))  # torch's own is not always the nearest number
    exact = [x + y, x - y, x * y, x / y, root, 1 / x]
    torch.testing.assert_close(out[:6], torch.stack(exact), rtol=0, atol=0, equal_nan=True)
    roots = (1 / x.double().sqrt()).to(dtype).expand(len(names) - 6, -1)
    torch.testing.assert_close(out[6:-3], roots, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
    torch.testing.assert_close(out[-3], torch.fmin(x, y), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out[-2], torch.fmax(x, y), rtol=0, atol=0, equal_nan=True)
    # What a fused multiply-add keeps of a product is what its rounding lost.
    products = zip(*(t[-400:].tolist() for t in (x, y, x * y)), strict=True)
    lost = [float(Fraction(a) * Fraction(b) - Fraction(product)) for a, b, product in products]
    assert any(lost)
    assert out[-1][-400:].tolist() == lost


def test_products_and_sums_stay_apart(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    sums = ("__fadd_rn(__fmul_rn(x, y), z)", "__dadd_rn(__dmul_rn(x, y), z)", "x * y + z")
    types = ("float", "double", "float")
    lines = [
        f"{t} f{i}({t} x, {t} y, {t} z) {{ return {s}; }}" for i, (t, s) in enumerate(zip(types, sums, strict=True))
    ]
    source.write_text("\n".join(["#include <cuda_runtime.h>", *lines]))
    if platform.machine() != "x86_64":
        pytest.skip("reads the assembly of x86-64")
    command = ["g++", "-std=c++17", "-O2", "-mfma", "-S", "-o", "-", "-I", cuda_builds.STAND_IN]
    command += ["-isystem", cuda_builds.toolkit_include(), "-x", "c++", source]
    assembly = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert assembly.count("vfmadd") == 1  # of the third, which only shows that the compiler would


def test_the_runtime_answers_what_launchers_ask(library: ctypes.CDLL) -> None:
    numbers = torch.zeros(5, dtype=torch.int32)
    cells = torch.arange(5, dtype=torch.int32)
    assert library.runtime(pointer(numbers), pointer(cells), 4) == SUCCESS
    assert numbers[1:4].tolist() == [227 * 1024, 9, 0]
    assert numbers[0] > 1
    assert numbers[4] > 0
    assert cells.tolist() == [4, -1, -1, -1, 4]


# The toolkit's bfloat16 and half.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pattern_widens_as_in_torch(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    out = torch.zeros(patterns.numel())
    check(library, getattr(library, f"widen_{DTYPES[dtype]}")(pointer(patterns), pointer(out), out.numel()))
    torch.testing.assert_close(out, patterns.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_between_two_patterns_round_as_in_torch(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    finite = patterns[patterns.isfinite()].unique()
    halfway = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    infinity = torch.tensor(torch.inf)
    x = torch.cat([patterns, halfway, halfway.nextafter(infinity), halfway.nextafter(-infinity)])
    x = torch.cat([x, torch.tensor([65519.0, 65520.0, 3.4e38, -3.4e38, 1e-45, 2.0**-25, 2.0**-24])])
    out = torch.zeros(x.numel(), dtype=dtype)
    check(library, getattr(library, f"narrow_{DTYPES[dtype]}")(pointer(x), pointer(out), x.numel()))
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


# Tensor cores.


def fragments(matrix: np.ndarray) -> np.ndarray:
    """Of a 16-bit matrix with k last, the two numbers of each register of each lane: rows by 8, then k by 8."""
    rows = matrix.shape[0] // 8
    blocks = matrix.reshape(rows, 8, 2, 4, 2)  # [row block, lane / 4, k block, lane % 4, which]
    return np.ascontiguousarray(blocks.transpose(1, 3, 2, 0, 4)).reshape(32, 2 * rows, 2)


def cut_off(value: Fraction, exponent: int) -> Fraction:
    """What is left of a number without the bits below 2^exponent, towards 0."""
    unit = Fraction(2) ** exponent
    return unit * (abs(value) // unit) * (1 if value > 0 else -1)


def exponent_of(value: Fraction) -> int:
    """The largest power of 2 that is not above the magnitude."""
    return int(np.frexp(float(abs(value)))[1]) - 1


def cut_off_sum(total: float, products: list[Fraction]) -> float:
    """A sum as tensor cores make it: eight products at a time, and 24 bits from the highest of the largest on."""
    for first in (0, 8):
        addends = [Fraction(total), *products[first : first + 8]]
        last = exponent_of(max(addends, key=abs)) - 23
        exact = sum((cut_off(addend, last) for addend in addends), Fraction(0))
        total = float(cut_off(exact, exponent_of(exact) - 23)) if exact else 0.0
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_matrices_is_that_of_tensor_cores(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Random numbers of very different sizes: which lane has which, and what sums lose."""
    scale = 2.0 ** torch.randint(-6, 7, (3, 16, 16))
    a, b = ((torch.randn(rows, 16) * scale[i, :rows]).to(dtype) for i, rows in enumerate((16, 8)))
    start = torch.randn(16, 8) * scale[2, :, :8]
    sums = start.reshape(2, 8, 4, 2).permute(1, 2, 0, 3).contiguous()  # [lane / 4, lane % 4, row block, which]
    left, right = (torch.from_numpy(fragments(matrix.view(torch.int16).numpy())) for matrix in (a, b))
    check(library, getattr(library, f"multiply_{DTYPES[dtype]}")(pointer(left), pointer(right), pointer(sums)))
    found = sums.permute(2, 0, 1, 3).reshape(16, 8)
    expected = torch.empty(16, 8)
    for row, column in itertools.product(range(16), range(8)):
        numbers = zip(a[row].tolist(), b[column].tolist(), strict=True)
        products = [Fraction(x) * Fraction(y) for x, y in numbers]
        expected[row, column] = cut_off_sum(start[row, column].item(), products)
    assert torch.equal(found, expected)
    rounded = (start.double() + a.double() @ b.double().T).float()
    assert not torch.equal(found, rounded)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_row(library: ctypes.CDLL, value: float) -> None:
    a, b = torch.ones(16, 16, dtype=torch.bfloat16), torch.ones(8, 16, dtype=torch.bfloat16)
    a[3, 5] = value
    sums = torch.zeros(8, 4, 2, 2)
    left, right = (torch.from_numpy(fragments(matrix.view(torch.int16).numpy())) for matrix in (a, b))
    check(library, library.multiply_bfloat16(pointer(left), pointer(right), pointer(sums)))
    found = sums.permute(2, 0, 1, 3).reshape(16, 8)
    torch.testing.assert_close(found, a.float() @ b.float().T, rtol=0, atol=0, equal_nan=True)


def test_four_matrices_are_transposed(library: ctypes.CDLL) -> None:
    rows = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    out = torch.zeros(8, 4, 4, 2, dtype=torch.int16)  # [lane / 4, lane % 4, matrix, which]
    check(library, library.transpose(pointer(rows), pointer(out)))
    assert torch.equal(out.permute(2, 1, 3, 0).reshape(4, 8, 8), rows)


# Faults.

FAULTS = {  # in the order of faults.cu
    "return before barrier": (LAUNCH_FAILURE, "thread 0 waits at __syncthreads, thread 3 has ended"),
    "return before shuffle": (
        LAUNCH_FAILURE,
        "thread 0 waits at __shfl_sync with mask 0xffffffff, thread 9 has ended",
    ),
    "return before product": (
        LAUNCH_FAILURE,
        "thread 0 waits at mma.sync with mask 0xffffffff, thread 9 has ended",
    ),
    "barrier or warp": (
        LAUNCH_FAILURE,
        "thread 0 waits at __syncwarp with mask 0xffffffff, thread 5 waits at __syncthreads",
    ),
    "two barriers": (
        LAUNCH_FAILURE,
        "thread 0 waits at __syncthreads, thread 7 waits at __syncthreads_count",
    ),
    "two shuffles": (
        LAUNCH_FAILURE,
        "thread 0 waits at __shfl_down_sync with mask 0xffffffff, "
        "thread 1 waits at __shfl_up_sync with mask 0xffffffff",
    ),
    "two masks": (
        LAUNCH_FAILURE,
        "thread 0 waits at __ballot_sync with mask 0xffffffff, thread 2 waits at __ballot_sync with mask 0x0000ffff",
    ),
    "own lane": (
        LAUNCH_FAILURE,
        "thread 0 waits at __any_sync with mask 0xfffffffe, which leaves out its own lane",
    ),
    "lanes beyond": (
        LAUNCH_FAILURE,
        "thread 32 waits at __syncwarp with mask 0xffffffff, which names lanes beyond the threads of the block",
    ),
    "source lane": (
        LAUNCH_FAILURE,
        "thread 0 waits at __shfl_sync with mask 0x0000ffff, which leaves out its source lane 20",
    ),
    "width": (
        LAUNCH_FAILURE,
        "thread 0 waits at __shfl_sync with mask 0xffffffff and a width that is no power of two up to 32",
    ),
    "shared memory": (ILLEGAL_ADDRESS, "byte 70 was written, past the 64 bytes of shared memory"),
    "stack": (
        LAUNCH_OUT_OF_RESOURCES,
        "thread 0 overflowed its stack of 131072 bytes (FISHER_KERNELS_HOST_STACK_BYTES)",
    ),
    "exception": (LAUNCH_FAILURE, "thread 4 threw an exception: four"),
    "launch": (LAUNCH_FAILURE, "thread 0 launched a kernel"),
    "asynchronous copy": (
        LAUNCH_FAILURE,
        "thread 1 begins an asynchronous copy of 16 bytes between addresses that are no multiples of so many",
    ),
    "second block": (LAUNCH_FAILURE, "block (0,1,0): thread 1 waits at __syncthreads, thread 0 has ended"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_the_next_launch_runs(library: ctypes.CDLL, fault: str) -> None:
    error, message = FAULTS[fault]
    if not message.startswith("block"):
        message = f"block (0,0,0): {message}"
    library.last_error()
    assert library.faulty(list(FAULTS).index(fault)) == error
    assert library.last_message().decode() == message
    assert library.error_string(error).decode() == message
    assert library.last_error() == error
    assert library.last_error() == SUCCESS
    check_sum(library, 1001, 7, 96)


def test_the_lowest_stack_of_all_overflows(library: ctypes.CDLL) -> None:
    """Into memory that nobody else owns: the threads of a block have given their stacks back, the lowest one last."""

    def work() -> None:
        check_sum(library, 63, 1, 32)
        error, message = FAULTS["stack"]
        assert library.faulty(list(FAULTS).index("stack")) == error
        assert library.last_message().decode().endswith(message)
        check_sum(library, 63, 1, 32)

    with ThreadPoolExecutor(1) as pool:  # a thread has stacks of its own
        pool.submit(work).result()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_fault_is_named_by_whichever_openmp_thread_finds_it(library: ctypes.CDLL, threads: int) -> None:
    library.set_threads(threads)
    assert library.late(100) == LAUNCH_FAILURE
    assert library.last_message() == b"block (99,0,0): thread 1 waits at __syncthreads, thread 0 has ended"
    library.set_threads(1)
    library.last_error()


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "error", "message"),
    [
        ((0, 1), (32, 1), 0, INVALID_CONFIGURATION, "a grid of (0,1,1) blocks"),
        ((1, 65536), (32, 1), 0, INVALID_CONFIGURATION, "a grid of (1,65536,1) blocks"),
        ((2**32 - 1, 2**32 - 1), (32, 1), 0, INVALID_CONFIGURATION, "a grid of (4294967295,4294967295,1) blocks"),
        ((1, 1), (2**32 - 1, 2**32 - 1), 0, INVALID_CONFIGURATION, "a block of (4294967295,1,4294967295) threads"),
        ((1, 1), (0, 1), 0, INVALID_CONFIGURATION, "a block of (0,1,1) threads"),
        ((1, 1), (1025, 1), 0, INVALID_CONFIGURATION, "a block of (1025,1,1) threads"),
        ((1, 1), (1, 65), 0, INVALID_CONFIGURATION, "a block of (1,1,65) threads"),
        ((1, 1), (64, 17), 0, INVALID_CONFIGURATION, "a block of (64,1,17) threads"),
        ((1, 1), (32, 1), 48 * 1024 + 1, INVALID_VALUE, "49153 bytes of shared memory: the kernel may have 49152"),
    ],
)
def test_launches_that_cuda_refuses(
    library: ctypes.CDLL,
    grid: tuple[int, int],
    block: tuple[int, int],
    shared_bytes: int,
    error: int,
    message: str,
) -> None:
    assert library.empty(*map(ctypes.c_uint, (*grid, *block)), ctypes.c_size_t(shared_bytes)) == error
    assert library.last_message().decode().startswith(message)
    assert library.last_error() == error


def test_the_largest_launches_run(library: ctypes.CDLL) -> None:
    check(library, library.empty(1, 1, 1024, 1, ctypes.c_size_t(48 * 1024)))
    check(library, library.empty(1, 1, 16, 64, ctypes.c_size_t(0)))
    check(library, library.roomy(227 * 1024, ctypes.c_size_t(227 * 1024)))
    check(library, library.largest_table())


def test_a_kernel_gets_no_more_than_fits(library: ctypes.CDLL) -> None:
    assert library.roomy(60_000, ctypes.c_size_t(60_001)) == INVALID_VALUE
    assert library.last_message().startswith(b"60001 bytes of shared memory: the kernel may have 60000")
    assert library.roomy(227 * 1024 + 1, ctypes.c_size_t(0)) == INVALID_VALUE
    assert library.too_large_table() == INVALID_VALUE
    assert library.last_message() == b"32765 bytes of kernel parameters: at most 32764 fit"
    library.last_error()


def test_no_launch_takes_shared_memory_from_a_larger_one(library: ctypes.CDLL) -> None:
    # Of another thread, say, that was allowed it and has not launched yet.
    assert library.launched_in_turns(ctypes.c_size_t(90_000), ctypes.c_size_t(60_000)) == SUCCESS


def test_an_error_that_no_launch_explains_has_its_name(library: ctypes.CDLL) -> None:
    check(library, library.empty(1, 1, 32, 1, ctypes.c_size_t(0)))
    assert library.error_string(INVALID_VALUE) == library.error_name(INVALID_VALUE) == b"cudaErrorInvalidValue"


# The order of what a GPU runs at once.


def in_order(monkeypatch: pytest.MonkeyPatch, order: str, function: Any, *arguments: int, size: int) -> list[int]:
    monkeypatch.setenv("FISHER_KERNELS_HOST_ORDER", order)
    out = torch.full((size,), -7, dtype=torch.int32)
    assert function(pointer(out), *arguments) == SUCCESS
    return out.tolist()


@pytest.mark.parametrize(("kernel", "threads"), [("neighbours", 128), ("lanes", 32)])
def test_a_missing_barrier_shows_in_another_order(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, kernel: str, threads: int
) -> None:
    right, racy = (
        [
            in_order(monkeypatch, order, getattr(library, kernel), threads, barrier, size=threads)
            for order in ("forward", "reverse", "1", "2")
        ]
        for barrier in (True, False)
    )
    assert all(result == right[0] for result in right)
    for one, other in itertools.combinations(racy, 2):
        assert one != other


def test_threads_and_blocks_come_in_the_order_asked_for(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 6 * 70
    library.set_threads(1)
    forward, reverse, one, same, other = (
        in_order(monkeypatch, order, library.arrivals, 6, 70, size=size)
        for order in ("forward", "reverse", "1", "1", "2")
    )
    assert forward == list(range(size))
    assert reverse == forward[::-1]
    assert sorted(one) == sorted(other) == forward
    assert one == same
    assert one != other


@pytest.mark.parametrize("order", ["backward", "", "1x", "-"])
def test_an_order_that_is_none_is_an_error(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    monkeypatch.setenv("FISHER_KERNELS_HOST_ORDER", order)
    assert library.empty(1, 1, 32, 1, ctypes.c_size_t(0)) == INVALID_VALUE
    assert b"FISHER_KERNELS_HOST_ORDER" in library.last_message()
    assert order.encode() in library.last_message()
    library.last_error()


# What sanitizers see.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("none", ""),
        ("global", "heap-buffer-overflow"),
        ("shared", "use-after-poison"),
        ("misaligned", "misaligned address"),
    ],
)
def test_sanitizers_see_wrong_accesses(sanitized: Path, fault: str, report: str) -> None:
    # Looking for leaks needs rights that a sandbox may not give.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([sanitized, fault], env=environment, capture_output=True, text=True)
    assert (result.returncode == 0) == (not report), result.stderr
    assert report in result.stderr
    assert report or not result.stderr


# What does not compile.


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("__global__ void f() { __shared__ float x[32]; x[0] = 1; }", "on_host::shared_memory"),
        ("__global__ void f(float* x) { atomicAdd(x, 1.0f); }", "no matching function for call to .atomicAdd"),
        ("__global__ void f(double* x) { *x = __shfl_sync(~0u, short(1), 0); }", "arithmetic types of 4 or 8 bytes"),
        ("__global__ void f() { threadIdx.x = 1; }", "read-only"),
    ],
)
def test_what_only_seems_to_work_does_not_compile(tmp_path: Path, code: str, message: str) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text(f"#include <cuda_runtime.h>\n{code}\n")
    command = ["g++", "-std=c++17", "-fsyntax-only", "-I", cuda_builds.STAND_IN]
    command += ["-isystem", cuda_builds.toolkit_include(), "-x", "c++", source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert re.search(message, result.stderr)
