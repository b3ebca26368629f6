"""The library needs torch and nothing else; the command line says what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CODE = '''
import sys

OTHERS = ("numpy", "rich", "typer", "click", "matplotlib", "sklearn", "pandas", "scipy")


class Without:
    """A finder that does not find the others."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in OTHERS else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Without, sys.meta_path)

import warnings

warnings.filterwarnings("ignore", "Failed to initialize NumPy")
import torch

import fisher_kernels
from fisher_kernels import EKFAC, KFAC, MBF, SOFIM, AdaFisher, AdaFisherW, EKFACAdam
from fisher_kernels.tools import samples, selftest

warnings.simplefilter("ignore")


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))


x, y = torch.randn(16, 5), torch.arange(16) % 3
for make in (AdaFisher, AdaFisherW, MBF, KFAC, EKFAC, EKFACAdam, lambda model: SOFIM(model.parameters())):
    model = network()
    optimizer = make(model)
    loss = lambda: torch.nn.functional.cross_entropy(model(x), y)
    first = float(loss())
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss()) < first, type(optimizer)
    if not isinstance(optimizer, SOFIM):
        print(optimizer.explain())

model = network()
optimizer = MBF(model)
batches = [(x[i::4], y[i::4]) for i in range(4)]
optimizer.warm_start(batches, lambda batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]), progress=True)
optimizer.explain()
assert selftest.check(samples.SAMPLES[0], torch.float32, "reference", torch.device("cpu")).passed
assert not set(OTHERS) & {name for name in sys.modules if sys.modules[name] is not None}
print("trained")

sys.argv = ["fisher-kernels", "info"]
from fisher_kernels.__main__ import main

main()
'''


def test_the_library_trains_with_torch_alone() -> None:
    """Where no other package can be imported; ``fisher-kernels`` then names the extra that brings them, and fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FISHER_KERNELS_BACKEND": "auto"}
    result = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert "trained" in result.stdout, result.stderr
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "the command line needs typer: pip install 'fisher_kernels[cli]'"


WITHOUT_NUMPY = (
    CODE.partition("import warnings")[0].replace('("numpy", "rich", "typer", "click", ', '("numpy", ')
    + """
import sys
import warnings

warnings.filterwarnings("ignore", "Failed to initialize NumPy")
from fisher_kernels.__main__ import main
from fisher_kernels.tools import selftest

selftest.SAMPLES = selftest.SAMPLES[:1]
sys.argv[0] = "fisher-kernels"
main()
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["selftest"], ["train", "text", "--optimizer", "sgd", "--max-steps", "1"]])
def test_the_command_line_works_without_numpy(arguments: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FISHER_KERNELS_BACKEND": "auto", "TRITON_INTERPRET": "0"}
    short = ["--epochs", "1", "--batch-size", "2"] if arguments[0] == "train" else []
    command = [sys.executable, "-c", WITHOUT_NUMPY, *arguments, *short]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert ("no picture: " in result.stderr) == (arguments[0] == "train")
