"""The CUDA kernels as a backend: why they cannot run, what they were built for, and how they fare on the host."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fisher_kernels import backends, use_backend
from fisher_kernels._library import native_module, runs_cuda_on_host
from fisher_kernels.ops import column_sum_of_squares
from fisher_kernels.tools import environment

ROOT = Path(__file__).parents[1]


def toolkit() -> Any:
    """What the native module has inside, None without CUDA."""
    module = native_module()
    return None if module is None else module.cuda_toolkit()


with_cuda = pytest.mark.skipif(toolkit() is None, reason="the native module was built without CUDA kernels")
on_host = pytest.mark.skipif(not runs_cuda_on_host(), reason="the CUDA kernels were not compiled for the host")


def run_python(code: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, in which no CUDA kernel runs on the host unless the variables say so."""
    settings = {"PYTHONPATH": str(ROOT), "FISHER_KERNELS_CUDA_ON_HOST": "0", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(os.environ.get("FISHER_KERNELS_CUDA") != "on", reason="nobody insists on CUDA kernels")
def test_where_cuda_is_insisted_on_its_kernels_are_tested() -> None:
    assert toolkit() is not None
    assert torch.cuda.is_available() or runs_cuda_on_host()


# A module with CUDA inside, where there is no GPU.

WITHOUT_A_GPU = """
import torch
from fisher_kernels import backends, ops
from fisher_kernels._library import CPU, native_module

print(native_module().cuda_toolkit())
print(backends.reasons()["cuda"])
print(ops.column_sum_of_squares(torch.tensor([[3.0]])).item())
x, out = torch.ones(2, 2), torch.empty(2)
for call in (
    lambda: backends.use_backend("cuda").__enter__(),
    lambda: CPU.kernels.column_sum_of_squares(x, out, (0, 0)),
):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
"""


@with_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_module_loads_and_a_cuda_op_is_a_plain_error_without_a_gpu() -> None:
    result = run_python(WITHOUT_A_GPU)
    assert result.returncode == 0, result.stderr
    reason = "there is no GPU: torch.cuda.is_available() is False"
    assert result.stdout.splitlines() == [
        str(toolkit()),
        reason,
        "9.0",
        f"RuntimeError backend 'cuda' is not available: {reason}",
        "ValueError column_sum_of_squares: x is on cpu, expected cuda:0",
    ]


@with_cuda
def test_what_the_kernels_were_built_for_is_shown() -> None:
    architectures, runtime, _ = toolkit()
    shown = environment.describe()["cuda"]
    assert shown["architectures"] == architectures.split(",")
    assert all(int(x) >= 80 for x in shown["architectures"])
    assert shown["runtime"] == f"{runtime // 1000}.{runtime % 1000 // 10}"


class Module:
    """A native module for other GPUs and drivers."""

    def __init__(self, *built: Any) -> None:
        self.built = built

    def cuda_toolkit(self) -> Any:
        return self.built or None

    def why_no_cuda(self) -> str | None:
        return None if self.built else "there was no NVIDIA GPU at build time"


@pytest.mark.parametrize(
    ("built", "capability", "reason"),
    [
        (
            (),
            (9, 0),
            "built without CUDA kernels: there was no NVIDIA GPU at build time. Built with FISHER_KERNELS_CUDA=on",
        ),
        (("80,90", 13000, 13000), (9, 0), None),
        (("80,90", 13000, 13010), (8, 6), None),
        (("80,90", 13000, 13000), (12, 0), None),  # from PTX
        (("80,90", 13000, 12080), (9, 0), "built with CUDA 13.0, and the driver knows no more than CUDA 12.8"),
        (("80,90", 13000, 13000), (7, 5), "built for compute capabilities 80,90, and a GPU here has 75"),
        (("90,100", 13000, 13000), (8, 0), "has 80. Install again on this machine"),
        (("90,100", 13000, 13000), (8, 0), "or with FISHER_KERNELS_CUDA_ARCHS=80"),
        (("86", 13000, 13000), (8, 6), None),  # a build for the GPU of another machine
        (("86", 13000, 13000), (8, 9), None),
        (("86", 13000, 13000), (9, 0), None),
        (("86", 13000, 13000), (8, 0), "a GPU here has 80"),
        (("90a", 13000, 13000), (9, 0), None),  # neither its machine code nor its PTX runs elsewhere
        (("90a", 13000, 13000), (10, 0), "a GPU here has 100"),
        (("80,90a", 13000, 13000), (8, 6), None),
        (("80,90a", 13000, 13000), (10, 0), "a GPU here has 100"),
        (("100f", 13000, 13000), (10, 3), None),  # of one family
        (("100f", 13000, 13000), (12, 0), "a GPU here has 120"),
    ],
)
def test_why_cuda_is_refused(
    monkeypatch: pytest.MonkeyPatch, built: tuple[Any, ...], capability: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(backends, "native_module", lambda: Module(*built))
    monkeypatch.setattr(backends, "runs_cuda_on_host", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = backends._why_no_cuda() or backends._why_not_these_gpus.__wrapped__()
    # What was built for other GPUs is told to those as well who never ask.
    assert [str(warning.message) for warning in caught] == (
        [f"backend 'cuda' is not available: {found}"] if "a GPU here" in str(found) else []
    )
    assert found is None if reason is None else reason in str(found)


@pytest.mark.slow
def test_a_wrong_choice_of_the_host_module_is_an_error() -> None:
    result = run_python("import fisher_kernels", FISHER_KERNELS_CUDA_ON_HOST="yes")
    assert "FISHER_KERNELS_CUDA_ON_HOST is 'yes', expected '0', '1', 'sanitized' or 'traced'" in result.stderr


# On the host: every op of the self-test, again and again.

SELF_TEST = """
import hashlib, json, sys, torch
from fisher_kernels import backends
from fisher_kernels.tools import selftest

# The same tensors one element further on, where nothing begins at 16 bytes and the memory ends with them.
def begin_anywhere(value):
    if isinstance(value, dict):
        return {name: begin_anywhere(x) for name, x in value.items()}
    if isinstance(value, list):
        return [begin_anywhere(x) for x in value]
    if not isinstance(value, torch.Tensor) or not value.is_contiguous():
        return value
    moved = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape)
    return moved.copy_(value)

if "--anywhere" in sys.argv:
    for case in selftest.SAMPLES:
        inputs = case.inputs
        object.__setattr__(case, "inputs", lambda source, inputs=inputs: begin_anywhere(inputs(source)))

# Fresh memory holds NaN, so that what is not written shows.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
found = {}
for case in selftest.SAMPLES:
    outputs = []
    call = case.call
    def keep(inputs):
        results = call(inputs)
        outputs.append(results)
        return results
    object.__setattr__(case, "call", keep)
    for dtype in case.dtypes:
        result = selftest.check(case, dtype, "cuda", torch.device("cpu"))
        bits = hashlib.sha256()
        for x in outputs[-1]:
            bits.update(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found[f"{case.op}, {case.name}, {dtype}"] = [result.message, bits.hexdigest()]
print(json.dumps(found))
"""


def self_test(*options: str, **variables: str) -> dict[str, tuple[str | None, str]]:
    """What failed, and the bits of the results, of every case of the self-test on the CUDA kernels."""
    result = run_python(SELF_TEST, *options, **{"FISHER_KERNELS_CUDA_ON_HOST": "1", **variables})
    assert result.returncode == 0, result.stderr[-8000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@on_host
def test_the_order_of_threads_changes_no_bit() -> None:
    """A barrier that is missing shows where the threads after it run before those ahead of it."""
    forward = self_test()
    assert {name: message for name, (message, _) in forward.items() if message} == {}
    for order in ("reverse", "7"):
        assert self_test(FISHER_KERNELS_HOST_ORDER=order) == forward, order


def sanitizers() -> list[str]:
    """The libraries that a sanitized module needs to find loaded; empty where they are missing."""
    compiler = os.environ.get("CXX") or "c++"
    found = []
    for library in ("libasan.so", "libubsan.so", "libstdc++.so"):
        path = subprocess.run([compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=False)
        found.append(path.stdout.strip())
    return found if all(os.path.isabs(path) for path in found) else []


SANITIZED = {
    "FISHER_KERNELS_CUDA_ON_HOST": "sanitized",
    "LD_PRELOAD": " ".join(sanitizers()),
    "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has until the end
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

# The entry points trust the sizes that a tensor says it has.
OUT_OF_BOUNDS = """
import torch
from fisher_kernels._library import CUDA
x = torch.ones(1000, 64)
x.untyped_storage().resize_(4 * 999 * 64)
CUDA.kernels.column_sum_of_squares(x, torch.empty(64), (-1, 0))
"""


@pytest.mark.slow
@on_host
@pytest.mark.skipif(importlib.util.find_spec("fisher_kernels._cuda_on_host_sanitized") is None, reason="not built")
@pytest.mark.skipif(not sanitizers(), reason="the compiler has no AddressSanitizer")
def test_sanitizers_find_nothing_in_the_self_test_and_have_teeth() -> None:
    for options in ((), ("--anywhere",)):
        found = self_test(*options, **SANITIZED)
        assert {name: message for name, (message, _) in found.items() if message} == {}, options
    result = run_python(OUT_OF_BOUNDS, **SANITIZED)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


BETWEEN_SAMPLES = """
import ctypes, itertools, torch
from fisher_kernels import use_backend
from fisher_kernels.ops import mini_block_gram_
poison, unpoison = (getattr(ctypes.CDLL(None), f"__asan_{name}_memory_region") for name in ("poison", "unpoison"))
poison.argtypes = unpoison.argtypes = ctypes.c_void_p, ctypes.c_size_t
samples, shapes = 9, ((5, 9), (1, 3), (70, 4), (2, 12), (7, 13), (3, 49), (2, 60))
for dtype, (blocks, n) in itertools.product((torch.float32, torch.float64, torch.bfloat16, torch.float16), shapes):
    size, granule = blocks * n, 8 // dtype.itemsize  # samples begin at a multiple of 8 bytes, and end anywhere
    stride = (size // granule + 3) * granule
    memory = torch.ones(granule + samples * stride, dtype=dtype)
    v = memory.as_strided((samples, blocks, n), (stride, n, 1), granule)
    out = torch.zeros(blocks, n, n, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    poison(memory.data_ptr(), 8)
    for sample in v:
        poison(sample.data_ptr() + size * dtype.itemsize, (stride - size) * dtype.itemsize)
    with use_backend("cuda"):
        mini_block_gram_(out, v)
    unpoison(memory.data_ptr(), memory.nbytes)
    assert bool((out == samples).all()), (dtype, blocks, n)
"""


@pytest.mark.slow
@on_host
@pytest.mark.skipif(importlib.util.find_spec("fisher_kernels._cuda_on_host_sanitized") is None, reason="not built")
@pytest.mark.skipif(not sanitizers(), reason="the compiler has no AddressSanitizer")
def test_nothing_is_read_around_samples() -> None:
    """Copies of 16 bytes take nothing along from there: it may be another tensor's, or never have been written."""
    result = run_python(BETWEEN_SAMPLES, **SANITIZED)
    assert result.returncode == 0, result.stderr[-8000:]


def test_cuda_is_chosen_on_request_only_where_it_runs() -> None:
    x = torch.ones(3, 2)
    if backends.reasons()["cuda"] is None and backends.device_type("cuda") == "cpu":
        with use_backend("cuda"):
            assert column_sum_of_squares(x).tolist() == [3.0, 3.0]
    else:
        with pytest.raises(RuntimeError, match="backend 'cuda'"), use_backend("cuda"):
            column_sum_of_squares(x)
