"""What the benchmark of whole iterations makes of its times."""

from __future__ import annotations

import pytest

from bench.bench_iterations import Iteration, mean_ms, parts_of


def test_parts_of_a_run_add_up_to_its_mean() -> None:
    plain = [Iteration(2.0, 1.0, False, False)] * 6
    fresh = [Iteration(2.5, 1.5, True, False)] * 2
    inverted = [Iteration(2.5, 6.5, True, True)] * 2
    parts = parts_of(plain + fresh + inverted)
    # A refresh takes 1 s more in 4 of 10 iterations, inverses 5 s in 2 of them.
    assert parts == pytest.approx({"forward, backward": 2e3, "step": 1e3, "statistics": 400.0, "inverses": 1e3})
    assert sum(parts.values()) == pytest.approx(mean_ms(plain + fresh + inverted))


def test_parts_that_cannot_be_told_apart_are_not_named() -> None:
    always = [Iteration(2.0, 1.0, True, False)] * 3
    assert parts_of(always) == {"forward, backward": 2e3, "step": 1e3}
    assert parts_of([Iteration(2.0, 1.0, False, False)] * 3) == {"forward, backward": 2e3, "step": 1e3}
