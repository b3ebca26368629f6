"""How many calls of an op are drawn, and how."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest

from tests.fuzz.calls import Call, Fuzz

_SHARES = {"cpu": 1.0, "reference": 0.1, "cuda": 0.05, "triton": 0.01}
"""Of the calls that the best of the CPU's kernels are given, how many others are: those that run what is compiled for
a GPU on the processor take a hundred times as long, and more in Triton's interpreter, for which calls are tiny too.
"""
_OTHER_CAPABILITIES = 0.1
_EXAMPLES = {"fast": 100, "all": 200}
"""How many calls the CPU's best kernels are given where `--fuzz` does not say."""


@pytest.fixture
def fuzz(
    implementation: str,
    request: pytest.FixtureRequest,
    poisoned_memory: None,
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Fuzz:
    """Draws calls from a strategy, which takes whether they are to be tiny, and hands each to a check."""
    if getattr(hypothesis, "__file__", None) is None:
        pytest.skip("hypothesis is not installed")
    examples = request.config.getoption("--fuzz")
    usual = _EXAMPLES["all" if request.config.getoption("--all") else "fast"]
    share = _SHARES[implementation.partition("-")[0]]
    if implementation.startswith("cpu-") and implementation != _best():
        share = _OTHER_CAPABILITIES

    def run(strategy: Callable[..., Any], check: Callable[[Call], None]) -> None:
        @hypothesis.settings(
            max_examples=max(3, round(share * (examples or usual))),
            derandomize=False,
            database=None,
            deadline=None,
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
            report_multiple_bugs=examples is not None,
            print_blob=examples is not None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(call=strategy(tiny=implementation == "triton"))
        def fuzzed(call: Call) -> None:
            check(call)

        if examples is None:  # the same at every run, and others for each implementation
            fuzzed = hypothesis.seed(zlib.crc32(request.node.name.encode()))(fuzzed)
            with monkeypatch.context() as patch:
                _without_numbers_of_imported_sources(patch)
                fuzzed()
        else:
            fuzzed()

    return run


def _without_numbers_of_imported_sources(patch: pytest.MonkeyPatch) -> None:
    """Hypothesis draws numbers that the imported sources contain too: more imports, or a new number, other calls.

    There is no setting for it. Where these names are others, calls are drawn that only a run of the same tests repeats.
    """
    from hypothesis.internal.conjecture import providers

    if hasattr(providers, "_get_local_constants") and hasattr(providers, "CONSTANTS_CACHE"):
        patch.setattr(providers, "_get_local_constants", providers.Constants)
        patch.setattr(providers, "CONSTANTS_CACHE", type(providers.CONSTANTS_CACHE)(1024))


def _best() -> str:
    from fisher_kernels._library import native_module

    native = native_module()
    return "" if native is None else f"cpu-{native.capabilities()[-1]}"
