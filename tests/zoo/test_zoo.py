"""The optimizers on architectures that people train, each group of them in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.zoo import GROUPS, MODELS
from tests.zoo.checks import OPTIMIZERS, RARE

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.zoo", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def assert_all_pass(names: list[str], *options: str) -> None:
    result = run(*names, *options)
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    faults = [f"{r['architecture']}, {r['optimizer']}, {r['check']}: {r['fault']}" for r in found if r["fault"]]
    assert not faults, "\n".join(faults)
    assert result.returncode == 0, result.stderr
    assert {r["architecture"] for r in found} == set(names)


def require(group: str) -> None:
    if group != "torch" and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is missing (pip install 'fisher_kernels[zoo]')")


@pytest.mark.parametrize("groups", [("torch",), ("language", "vision")], ids="-".join)
def test_each_architecture_with_one_of_the_optimizers(groups: tuple[str, ...]) -> None:
    require(groups[0])
    assert_all_pass([name for group in groups for name in GROUPS[group]], "--one")


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)  # a process for each architecture would import for longer than it trains
def test_each_architecture_with_every_optimizer(group: str) -> None:
    require(group)
    assert_all_pass(list(GROUPS[group]), "--optimizers", ",".join({**OPTIMIZERS, **RARE}))


@pytest.mark.slow
def test_the_page_of_models_is_what_a_run_writes(tmp_path: Path) -> None:
    require("language")
    result = run("--page", str(tmp_path / "models.md"))
    assert result.returncode == 0, result.stdout + result.stderr
    written = (tmp_path / "models.md").read_text()
    if f"transformers {version('transformers')}." not in (page := (ROOT / "docs" / "models.md").read_text()):
        pytest.skip("docs/models.md is of another version of transformers")
    assert written == page, "make models"


def test_there_are_enough_architectures() -> None:
    assert len(MODELS) >= 25
