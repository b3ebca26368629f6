"""examples/backend: an optimizer of others trains the same on these kernels."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkout import ROOT

STEPS = 6


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("asdl", reason="pip install 'fisher_kernels[compare]'")
    path = ROOT / "examples" / "backend" / "asdfghjkl_kfac.py"
    spec = importlib.util.spec_from_file_location("asdfghjkl_kfac", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")  # of asdfghjkl
def test_it_trains_the_same_on_these_kernels(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding in float64, which a change of the damping by a millionth is not."""
    expected, _ = example.train(STEPS, dtype=torch.float64)
    inverse, gram, conditions, grams = example.inverse, example.gram, [], []

    def watched(matrix: Tensor, damping: Any = 1e-7) -> Tensor:
        damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
        conditions.append(torch.linalg.cond(damped).item() * len(matrix))
        return inverse(matrix, damping)

    def counted(*arguments: Any) -> Tensor:
        grams.append(arguments[1].shape)
        return gram(*arguments)

    monkeypatch.setattr(example, "inverse", watched)
    monkeypatch.setattr(example, "gram", counted)
    with example.on_these_kernels():
        found, _ = example.train(STEPS, dtype=torch.float64)
    assert len(conditions) == len(grams) == STEPS * 3 * 2  # both factors of three layers

    # An inverse is off by at most its condition times n roundings; each step has one on either side of a gradient. What
    # all steps add to the weights is smaller than the weights.
    bound = STEPS * 2 * max(conditions) * torch.finfo(torch.float64).eps
    assert bound < 1e-9
    assert (found - expected).norm() <= bound * expected.norm()

    monkeypatch.setattr(example, "inverse", lambda matrix, damping=1e-7: inverse(matrix, damping * (1 + 1e-6)))
    with example.on_these_kernels():
        other, _ = example.train(STEPS, dtype=torch.float64)
    assert (other - expected).norm() > bound * expected.norm()
    again, _ = example.train(STEPS, dtype=torch.float64)
    assert torch.equal(again, expected)  # nothing is left in the package
