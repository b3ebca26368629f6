"""Fixtures: every implementation of the ops that runs here, poisoned memory, numbers of threads."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import torch

# Before anything imports the kernels: without a GPU Triton's run in its interpreter and those in CUDA as they were
# compiled for the CPU, on CPU tensors.
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it
else:
    os.environ["TRITON_INTERPRET"] = "1"
    if list(Path(__file__).parents[1].glob(f"fisher_kernels/_cuda_on_host{sysconfig.get_config_var('EXT_SUFFIX')}")):
        os.environ.setdefault("FISHER_KERNELS_CUDA_ON_HOST", "1")

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from fisher_kernels import backends
from fisher_kernels._library import native_module
from fisher_kernels.optim import warn
from tests import covering, launches, no_hypothesis
from tests.checkout import nest_triton_kernels
from tests.round_trip import through

nest_triton_kernels()

try:
    import hypothesis
except ModuleNotFoundError:
    hypothesis = None
    no_hypothesis.install()
else:
    # The same examples at every run: a failure that comes and goes helps nobody.
    for tier, examples in (("fast", 12), ("all", 100)):
        hypothesis.settings.register_profile(
            tier,
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
        )

_BEGAN = time.monotonic()


@pytest.fixture(autouse=True)
def warnings_come_again() -> None:
    """What is said once in a process is said once in a test."""
    warn.forget()


def _backends() -> list[str]:
    return backends.available()


def _implementations() -> list[str]:
    native = native_module()
    capabilities = [] if native is None else [f"cpu-{name}" for name in native.capabilities()]
    return ["reference", *capabilities, *(name for name in ("cuda", "triton") if name in _backends())]


def _quicken_interpreter() -> None:
    """Let Triton's interpreter put its own language in place once a launch, not at every call within a kernel.

    It costs as much as all else that a small kernel does. Only the functions of Triton's standard library see another
    module than kernels do, and what is put there stays.
    """
    import triton.language
    from triton.runtime import interpreter

    seen: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = self.fn.__globals__
        if names.get("tl") is not triton.language and id(names) not in seen:
            interpreter._patch_lang(self.fn)
            seen.add(id(names))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if backends.is_interpreted() and "triton" in backends.available():
    _quicken_interpreter()
launches.record()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every case, not the fast tier's alone")
    parser.addoption("--large", action="store_true", help="run the tests that need more than 14 GB of memory too")
    parser.addoption(
        "--fuzz", type=int, metavar="N", help="draw N calls of each op at random, not a few hundred chosen ones"
    )
    parser.addoption("--seconds", type=float, help="skip what has not begun after so many seconds")


def pytest_configure(config: pytest.Config) -> None:
    if hypothesis is not None:
        hypothesis.settings.load_profile("all" if config.getoption("--all") else "fast")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _is_over(item.config):
        pytest.skip(f"not run: the {item.config.getoption('--seconds'):g} seconds of --seconds were over")


def _is_over(config: pytest.Config) -> bool:
    seconds = config.getoption("--seconds")
    return seconds is not None and time.monotonic() - _BEGAN > seconds


@pytest.hookimpl(trylast=True)  # what -k and -m leave is what is to be covered
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--large"):
        skip = pytest.mark.skip(reason="needs more than 14 GB of memory; --large runs it")
        for item in items:
            if item.get_closest_marker("large"):
                item.add_marker(skip)
    if any("[" in argument for argument in config.args):  # cases by their names
        return
    kept = covering.every(items) if config.getoption("--all") else covering.fast(items)
    if not config.getoption("--all"):
        config.stash[_TIER] = (len(kept), len(items))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


# What is collected stays: tens of thousands of cases are not looked through whenever Python looks for garbage.
def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


_TIER = pytest.StashKey[tuple[int, int]]()
"""How many cases the fast tier has, of how many."""
_LAUNCHED = pytest.StashKey[set[str]]()
"""The kernels of the GPU backends that this run has launched."""


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker of pytest-xdist collects the same cases and runs some of them."""
    output = getattr(node, "workeroutput", {})
    if "fast_tier" in output:
        node.config.stash[_TIER] = tuple(output["fast_tier"])
    node.config.stash.setdefault(_LAUNCHED, set()).update(output.get("launched", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run of all tests, in either tier, fails where it has launched no case of some kernel."""
    config = session.config
    config.stash.setdefault(_LAUNCHED, set()).update(launches.launched())
    if hasattr(config, "workeroutput"):
        config.workeroutput["launched"] = sorted(config.stash[_LAUNCHED])
        config.workeroutput["fast_tier"] = config.stash.get(_TIER, ())
    elif _runs_all_files(config) and launches.defined() - config.stash[_LAUNCHED]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _runs_all_files(config: pytest.Config) -> bool:
    narrowed = [config.getoption(name, None) for name in ("keyword", "markexpr", "deselect", "lf", "collectonly")]
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not any(narrowed) and not _is_over(config)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash.get(_TIER, ()):
        kept, all_of_them = config.stash[_TIER]
        terminalreporter.write_line(f"fast tier: {kept:,} of {all_of_them:,} cases; --all runs all")
    if _runs_all_files(config) and launches.defined():
        missing = sorted(launches.defined() - config.stash[_LAUNCHED])
        terminalreporter.write_line(
            f"kernels launched: {len(launches.defined()) - len(missing)} of {len(launches.defined())}"
            + (f"; never: {', '.join(missing)}" if missing else "")
        )


@contextmanager
def _using(name: str) -> Iterator[None]:
    """Run the ops on a backend, those of a GPU by way of the GPU if there is one."""
    on_a_gpu = name in ("cuda", "triton") and torch.cuda.is_available()
    with backends.use_backend(name), through(torch.device("cuda", 0)) if on_a_gpu else nullcontext():
        yield


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on each backend that is available here: for tests of the ops."""
    with _using(request.param):
        yield request.param


@pytest.fixture(params=[name for name in _backends() if name in ("reference", "cpu")])
def host_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same without what plays a GPU here, which is slow: for tests of what is built on the ops."""
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[name for name in _backends() if name == "cuda"])
def cuda_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """CUDA's kernels, where there are any: for tests of how they divide their work."""
    with _using(request.param):
        yield request.param


@pytest.fixture(params=_implementations())
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, but the native kernels run once for every instruction set of this processor."""
    name, _, capability = str(request.param).partition("-")
    native = native_module()
    with _using(name):
        if native is None or not capability:
            yield request.param
            return
        previous = native.capability()
        native.set_capability(capability)
        yield request.param
        native.set_capability(previous)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads that kernels may use, until the test ends."""
    previous = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(previous)


@pytest.fixture
def one_thread(set_threads: Callable[[int], None]) -> None:
    """For small tensors, on which threads do nothing but wait for each other."""
    set_threads(1)


@pytest.fixture
def in_float64() -> Iterator[None]:
    """New tensors are float64: the order in which a library adds up changes 16th digits, which no bound is near."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN in tensors, and under glibc numbers of 1e38 and more anywhere else."""
    m_perturb, fill = -6, 0x80  # allocations are filled with the complement of this byte, 0x7f
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    mallopt(m_perturb, fill)
    yield
    mallopt(m_perturb, 0)
    torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)
