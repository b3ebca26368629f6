"""The adapters with the frameworks themselves: the tests of each run in a process of its own, which it may set up."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = {
    "transformers": ("transformers", "accelerate"),
    "lightning": ("lightning",),
    "accelerate": ("accelerate",),
    "processes": ("transformers", "accelerate"),
}
"""The file with_NAME.py -> the packages that it needs."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_with(name: str) -> None:
    missing = [package for package in FRAMEWORKS[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} cannot be imported; pip install 'fisher_kernels[integrations]'")
    path = ROOT / "tests" / "integrations" / f"with_{name}.py"
    # Nothing is to be fetched, and one thread is enough for models of this size.
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "RANK", "WORLD_"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--all", "-q", str(path)]
    result = subprocess.run(
        command, cwd=ROOT, env={**environment, **settings}, capture_output=True, text=True, check=False, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
