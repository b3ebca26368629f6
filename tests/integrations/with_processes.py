"""The Trainer in two processes of gloo, on tiny models; run by test_frameworks.py, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.two_processes import KINDS, trained, whole

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("default")]


def in_two(name: str, folder: Path) -> tuple[Any, Any]:
    """What a training of ``two_processes.py`` ends with in each process."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*run, "-m", "tests.integrations.two_processes", name, folder],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=260, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What one process ends with, on the same batches."""
    return {name: whole(trained(name, tmp_path_factory.mktemp(name))) for name in KINDS}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Sums in another order, in float64, times what six steps of curvature make of their rounding.
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11)


def test_processes_and_micro_batches_train_as_one(alone: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """Position embeddings too, whose ids are one row for a whole micro-batch."""
    first, second = in_two("ddp", tmp_path)
    for name, expected in alone.items():
        assert all(torch.equal(first[name][key], second[name][key]) for key in expected)
        assert_close(first[name], expected)


def test_shards_train_as_one_and_go_on_bit_for_bit(alone: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    first, _ = in_two("fsdp", tmp_path)
    for name, expected in alone.items():
        found, kinds = first[name]
        assert set(kinds) == {"DTensor"}
        assert_close(found, expected)
        assert all(torch.equal(first[f"{name}-again"][key], value) for key, value in found.items())
