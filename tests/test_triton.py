"""What Triton's kernels share: tables of addresses, rounding, 64-bit offsets, configurations."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import mmap
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fisher_kernels import backends, ops, use_backend
from fisher_kernels.ops import adafisher_step_
from tests.cases import WRITABLE_LAYOUTS, random
from tests.cases.adafisher_step import PARAMETERS, step
from tests.comparison import assert_same_bits

if "triton" not in backends.available():
    pytest.skip(f"no Triton: {backends.reasons()['triton']}", allow_module_level=True)

import triton
import triton.language as tl

from fisher_kernels import triton_kernels
from fisher_kernels.triton_kernels import _configs, _launch, _lists
from fisher_kernels.triton_kernels._language import divide, divmod_from, narrow

pytestmark = pytest.mark.skipif(not backends.is_interpreted(), reason="CPU tensors need the interpreter")


# The language.


@triton.jit
def _divmod_kernel(quotients, remainders, table, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    quotient, remainder = divmod_from(tl.load(table), lanes, tl.load(table + 1))
    tl.store(quotients + lanes, quotient)
    tl.store(remainders + lanes, remainder)


@pytest.mark.parametrize("size", [1, 2, 3, 9, 255, 256, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1, 2**31, 2**33 + 7])
def test_quotients_and_remainders_of_runs(size: int) -> None:
    lanes = torch.arange(256)
    for first in sorted({0, 1, size // 2, max(0, size - 100), size - 1}):
        if first >= size:
            continue
        quotients, remainders = torch.full((256,), -1, dtype=torch.int32), torch.full((256,), -1)
        _divmod_kernel[(1,)](quotients, remainders, torch.tensor([first, size]), LANES=256)
        assert quotients.tolist() == ((first + lanes) // size).tolist()
        assert remainders.tolist() == ((first + lanes) % size).tolist()


@triton.jit
def _narrow_kernel(x, out, T: tl.constexpr, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    tl.store(out + lanes, narrow(tl.load(x + lanes), T))


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)], ids=str)
def test_narrowing_rounds_to_nearest_even(dtype: torch.dtype, name: Any) -> None:
    patterns = torch.arange(2**16, dtype=torch.int32)[:: 2**2]
    x = ((patterns << 16) | (patterns * 40503 & 0xFFFF)).view(torch.float32)  # every 4th upper half, any lower half
    ties = ((patterns << 16) | 0x8000).view(torch.float32)
    for values in (x, ties, torch.tensor([0.0, -0.0, torch.inf, -torch.inf] * 4096)):
        out = torch.full(values.shape, 7.0, dtype=dtype)
        _narrow_kernel[(1,)](values, out, T=name, LANES=len(values))
        expected = values.to(dtype)
        assert torch.equal(out.isnan(), expected.isnan())
        assert_same_bits(out[~out.isnan()], expected[~out.isnan()])


@triton.jit
def _divide_kernel(x, y, out, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    tl.store(out + lanes, divide(tl.load(x + lanes), tl.load(y + lanes)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_quotients_round_to_nearest(dtype: torch.dtype) -> None:
    x, y = random((4096,), dtype), random((4096,), dtype, 1)
    out = torch.full_like(x, torch.nan)
    _divide_kernel[(1,)](x, y, out, LANES=4096)
    assert_same_bits(out, x / y)


@pytest.mark.parametrize("op", ["adafisher_step_", "mbf_step_", "sofim_step_"])
def test_scalars_may_be_on_the_device(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Learning rate and scale that a kernel reads give the bits of those that it is given, and stop it too."""
    param, grad, moment = (random((6, 9), torch.float32, seed) for seed in range(3))
    options: dict[str, Any] = {"lr": torch.tensor(0.3), "grad_scale": torch.tensor(3.0), "weight_decay": 0.1}
    options |= {"decoupled": True, "maximize": False}
    lists = {
        "adafisher_step_": ([torch.zeros(())], [torch.rand(6)], [torch.rand(9)]),
        "mbf_step_": ([random((6, 9, 9), torch.float32, 7)],),
        "sofim_step_": ([torch.zeros(())],),
    }[op]
    own = {
        "adafisher_step_": {"beta": 0.9, "damping": 0.1},
        "mbf_step_": {"momentum": 0.9, "kl_clip": 1e-3},
        "sofim_step_": {"beta": 0.9, "rho": 0.5, "direction": "gradient", "scope": "global"},
    }[op]
    results = []
    for on_device in (False, True):
        if on_device:
            module = importlib.import_module(f"fisher_kernels.triton_kernels.{op[:-1]}")
            monkeypatch.setattr(module, "scalar", lambda x: (1.0, x))
        w, m = param.clone(), moment.clone()
        counts = copy.deepcopy(lists)
        with use_backend("triton"):
            getattr(ops, op)([w], [grad], [m], *counts, **options, **own)
        results.append((w, m))
    assert not torch.equal(results[0][0], param)
    for given, read in zip(*results, strict=True):
        assert_same_bits(read, given)
    w, m = param.clone(), moment.clone()
    with use_backend("triton"):
        getattr(ops, op)([w], [grad], [m], *copy.deepcopy(lists), **options, **own, found_inf=torch.tensor(1.0))
    assert_same_bits(w, param)
    assert_same_bits(m, moment)


# Tables.


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lists, "_slots", {})
    monkeypatch.setattr(_lists, "_captured", [])


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch, no_tables: None) -> list[Tensor]:
    """Everything that goes to the device from here on."""
    seen: list[Tensor] = []
    upload = _lists._upload

    def record(host: Tensor, device: torch.device) -> Tensor:
        seen.append(host)
        return upload(host, device)

    monkeypatch.setattr(_lists, "_upload", record)
    return seen


def take(case: Any) -> None:
    with use_backend("triton"):
        case.run()


def check_step(case: Any) -> None:
    """The step as the reference takes it in float64, to what float32 leaves."""
    expected = case.double()
    with use_backend("reference"):
        expected.run()
    take(case)
    for x, y in zip(case.params, expected.params, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-5, atol=1e-5)


def test_a_table_is_uploaded_once(uploads: list[Tensor]) -> None:
    case = step(PARAMETERS[:3], torch.float32)
    take(case)
    first = len(uploads)
    assert first
    take(case)
    case.options["lr"] = 0.5
    take(case)
    assert len(uploads) == first


def test_new_gradients_change_addresses_alone(uploads: list[Tensor]) -> None:
    case = step(PARAMETERS[:3], torch.float32)
    take(case)
    first = len(uploads)
    for _ in range(3):
        case.grads = [g.clone() for g in case.grads]
        check_step(case)
    assert len(uploads) == first + 3


def test_another_layout_at_the_same_address_is_seen(uploads: list[Tensor]) -> None:
    """The memory of a parameter that was transposed in place, or resized."""
    case = step([PARAMETERS[27]], torch.float32)  # 63 x 17
    row = case.row_factors[0]
    check_step(case)
    for name in ("params", "grads", "exp_avgs"):
        getattr(case, name)[0] = getattr(case, name)[0].view(17, 63).t()
    check_step(case)
    for name in ("params", "grads", "exp_avgs"):
        getattr(case, name)[0] = getattr(case, name)[0].t()[:5]
    case.row_factors, case.column_factors = [row[:5].clone()], [random((63,), torch.float32).square()]
    check_step(case)


def test_lists_of_several_groups_take_turns(uploads: list[Tensor]) -> None:
    cases = [step(PARAMETERS[:3], torch.float32), step(PARAMETERS[3:6], torch.float32)]
    for case in cases:
        take(case)
    first = len(uploads)
    for case in cases * 2:
        take(case)
    assert len(uploads) == first


def test_tables_of_lists_that_are_gone_are_forgotten(no_tables: None) -> None:
    kept = [step([PARAMETERS[0]], torch.float32) for _ in range(_lists._SLOTS + 9)]
    for case in kept:
        take(case)
    assert len(_lists._slots["adafisher_step_"]) == _lists._SLOTS


def test_strided_tensors_that_cannot_be_joined_are_refused() -> None:
    shape = (2,) * 8
    around = [torch.zeros([3] * 8) for _ in range(3)]
    param, grad, moment = (x[(slice(0, 2),) * 8] for x in around)
    assert param.shape == shape
    with (
        use_backend("triton"),
        pytest.raises(ValueError, match=r"^adafisher_step_: tensor 0 of shape .* at most 6"),
    ):
        adafisher_step_(
            [param], [grad], [moment], [torch.zeros(())], [None], [None],
            lr=0.1, beta=0.9, damping=1.0, weight_decay=0.0, decoupled=False, maximize=False,
        )  # fmt: skip
    assert not any(x.any() for x in around)


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS.values(), ids=list(WRITABLE_LAYOUTS))
def test_neighbours_in_memory_are_joined(layout: Callable[[Tensor], Tensor]) -> None:
    x = layout(torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).float())
    dims = _lists._join([x, x])
    at, whole = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for size, contiguous_stride, stride, _ in dims:
        at = (at[:, None] + stride * torch.arange(size)).flatten()
        whole = (whole[:, None] + contiguous_stride * torch.arange(size)).flatten()
    storage = torch.empty(0).set_(x.untyped_storage())[x.storage_offset() :]
    assert torch.equal(storage[at], whole.float())
    assert len(dims) <= {"contiguous": 1, "unaligned": 1, "channels_last": 3}.get(layout.__name__, 4)


# Capture.


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch, no_tables: None) -> Callable[[bool], None]:
    capturing = False

    def switch(on: bool) -> None:
        nonlocal capturing
        capturing = on

    monkeypatch.setattr(_lists, "is_capturing", lambda device: capturing)
    return switch


def test_what_a_graph_refers_to_stays(capture: Callable[[bool], None]) -> None:
    case = step(PARAMETERS[:3], torch.float32)
    take(case)
    capture(True)
    take(case)
    captured = [x for tensors in _lists._captured for x in tensors]
    before = [x.clone() for x in captured]
    capture(False)
    case.grads = [g.clone() for g in case.grads]
    check_step(case)
    addresses = next(iter(_lists._slots["adafisher_step_"].values())).table.addresses
    assert addresses.data_ptr() not in [x.data_ptr() for x in captured]
    for x, y in zip(captured, before, strict=True):
        assert_same_bits(x, y)


def test_a_capture_refuses_what_is_not_on_the_device_yet(capture: Callable[[bool], None]) -> None:
    case = step(PARAMETERS[:3], torch.float32)
    before = case.copy()
    capture(True)
    with pytest.raises(RuntimeError, match=r"^adafisher_step_: lists that were not seen before while a CUDA graph is"):
        take(case)
    capture(False)
    take(before)
    capture(True)
    before.grads = [g.clone() for g in before.grads]
    unchanged = before.copy()
    with pytest.raises(RuntimeError, match=r"^adafisher_step_: addresses or numbers changed while a CUDA"):
        take(before)
    for x, y in zip(before.tensors(), unchanged.tensors(), strict=True):
        assert_same_bits(x, y)


# Offsets of 64 bits.


def sparse(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which only the pages that are touched take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.parametrize("form", ["wide", "narrow"])
def test_elements_past_2_to_31(form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_tables: None) -> None:
    """The last chunks of a long parameter are stepped; where their start is a 32-bit number, others are."""
    size = 2**31 + 3 * 8192 + 5
    # Room before the parameter too, where a start that is cut to 32 bits leads.
    params, grads, moments = (sparse(2 * size, d) for d in (torch.bfloat16, torch.bfloat16, torch.float32))
    param, grad, moment = (x[size:] for x in (params, grads, moments))
    grad[-9000:] = 1.0
    chunks = _lists._chunks
    monkeypatch.setattr(_lists, "_chunks", lambda *args: chunks(*args)[-2:])
    if form == "narrow":
        from fisher_kernels.triton_kernels import adafisher_step as original

        source = Path(original.__file__).read_text()
        wide = "tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK"
        assert source.count(wide) == 1
        file = tmp_path / "adafisher_step.py"
        file.write_text(source.replace(wide, wide.replace(".to(tl.int64)", "")))
        name = "fisher_kernels.triton_kernels.adafisher_step"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("fisher_kernels.triton_kernels.adafisher_step", module)
        spec.loader.exec_module(module)
    with use_backend("triton"):
        adafisher_step_(
            [param], [grad], [moment], [torch.zeros(())], [None], [None],
            lr=1.0, beta=0.5, damping=1.0, weight_decay=0.0, decoupled=False, maximize=False,
        )  # fmt: skip
    stepped = bool((param[-8197:] == -0.5).all() and (moment[-8197:] == 0.5).all())
    assert stepped is (form == "wide")


# Configurations.


def test_every_kernel_has_a_default_for_every_size() -> None:
    for kernel, entries in _configs.table().items():
        assert set(entries["default"]) == {"small", "large"}, kernel
        for sizes in entries.values():
            for block, warps in sizes.values():
                assert block & (block - 1) == 0
                assert warps in (1, 2, 4, 8, 16)


@pytest.mark.slow
def test_configurations_change_no_bits(no_tables: None) -> None:
    cases = [step(PARAMETERS[20:33], torch.float32, weight_decay=0.1) for _ in _configs.CANDIDATES[::5]]
    for case, chosen in zip(cases, _configs.CANDIDATES[::5], strict=True):
        with _configs.forced("adafisher_step", chosen):
            take(case)
    for case in cases[1:]:
        for x, y in zip(case.params, cases[0].params, strict=True):
            assert_same_bits(x, y)


def test_tuning_happens_only_when_asked_and_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[tuple[str, str]] = []

    def tune(kernel: str, device: torch.device, size: str) -> dict[_configs.Config, float]:
        measured.append((kernel, size))
        return {_configs.Config(256, 2): 2.0, _configs.Config(512, 8): 1.0}

    device = torch.device("cuda", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FISHER_KERNELS_AUTOTUNE", raising=False)
    monkeypatch.setattr(_configs, "INTERPRETED", False)
    monkeypatch.setattr(_configs, "device_name", lambda device: "cuda:999")
    monkeypatch.setattr(_configs, "tune", tune)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU of the future")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _configs._tuned.cache_clear()
    default = _configs.Config(*_configs.table()["adafisher_step"]["default"]["large"])
    assert _configs.config("adafisher_step", device, 2**25) == default
    assert measured == []
    monkeypatch.setenv("FISHER_KERNELS_AUTOTUNE", "1")
    for _ in range(2):
        assert _configs.config("adafisher_step", device, 2**25) == _configs.Config(512, 8)
    assert measured == [("adafisher_step", "large")]
    kept = json.loads((tmp_path / "fisher_kernels" / "configs.json").read_text())
    assert kept == {"adafisher_step": {"a GPU of the future": {"large": [512, 8]}}}
    _configs._tuned.cache_clear()
    assert _configs.config("adafisher_step", device, 2**25) == _configs.Config(512, 8)
    assert len(measured) == 1


for _module in pkgutil.iter_modules(triton_kernels.__path__):
    importlib.import_module(f"fisher_kernels.triton_kernels.{_module.name}")


def test_the_table_of_configurations_is_as_tuning_writes_it(tmp_path: Path) -> None:
    from bench import tune

    assert tune.layout(json.loads(tune.FILE.read_text())) == tune.FILE.read_text()
    copy = tmp_path / "configs.json"
    copy.write_text(tune.FILE.read_text())
    tune.write("adafisher_step", "cuda:999", "large", _configs.Config(512, 8), copy)
    default = _configs.table()["adafisher_step"]["default"]
    expected = {**_configs.table()["adafisher_step"], "cuda:999": {"small": default["small"], "large": [512, 8]}}
    assert json.loads(copy.read_text())["adafisher_step"] == expected


@pytest.mark.parametrize("kernel", sorted(_configs.trials()))
def test_trials_run(kernel: str) -> None:
    """What is measured launches the kernel it is said to measure, on tensors of its own."""
    launches: list[Any] = []
    with _launch.recording(launches.append):
        _configs._trials[kernel](torch.device("cpu"), _configs.SMALL // 16)()
    assert any("BLOCK" in launch.options for launch in launches)


# Where there is no Triton.


def test_reasons_why_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    assert backends.why_no_triton() == "Triton 3.5.1 is installed; triton >= 3.6 is needed"

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert str(backends.why_no_triton()).startswith("Triton is not installed (pip install 'triton>=3.6'")


@pytest.mark.slow
def test_without_triton_the_package_works_and_says_so() -> None:
    code = """
import importlib.metadata, sys
sys.modules["triton"] = None  # importing it fails
find = importlib.metadata.version
def version(name):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)
importlib.metadata.version = version
import torch, fisher_kernels
from fisher_kernels import ops
print(ops.column_sum_of_squares(torch.full((2, 1), 3.0)).item())
try:
    with fisher_kernels.use_backend("triton"):
        pass
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    value, reason = result.stdout.splitlines()
    assert value == "18.0"
    assert reason.startswith("backend 'triton' is not available: Triton is not installed")
