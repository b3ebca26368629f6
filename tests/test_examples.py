"""The programs of examples/, as torchrun starts them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT
from tests.processes import needs_processes

pytestmark = needs_processes


def losses(processes: int, program: str, *arguments: str) -> dict[int, float]:
    """What a program prints, by the number of the step."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*run, ROOT / "examples" / "distributed" / program, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss (\S+)", done.stdout)}


@pytest.mark.parametrize(
    ("processes", "program", "arguments"),
    [
        (4, "fsdp.py", ["--replicas", "2"]),
        pytest.param(3, "fsdp.py", [], marks=pytest.mark.slow),
        pytest.param(2, "ddp.py", [], marks=pytest.mark.slow),
        pytest.param(4, "tensor_parallel.py", [], marks=pytest.mark.slow),
    ],
)
def test_it_trains(processes: int, program: str, arguments: list[str]) -> None:
    found = losses(processes, program, *arguments)
    assert [*found] == [20, 40, 60]
    assert found[60] < 0.4  # of log(5) = 1.6 at first


@pytest.mark.slow
def test_it_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """From a checkpoint of two three go on as one goes on from its own."""
    folders = tmp_path / "some", tmp_path / "one"
    shares = [losses(n, "resume.py", str(folders[0])) for n in (2, 3)]
    alone = [losses(1, "resume.py", str(folders[1])) for _ in range(2)]
    assert [[*found] for found in shares] == [[20, 40], [60, 80]]
    for found, expected in zip(shares, alone, strict=True):
        # Means of means over parts of unequal size are not the mean over the batch, by some per cent.
        assert found == pytest.approx(expected, rel=0.2)
