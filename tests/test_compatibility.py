"""docs/compatibility.md is what tests/integrations/compatibility.py writes."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.checkout import ROOT
from tests.integrations.compatibility import (
    ELSEWHERE,
    FEATURES,
    FRAMEWORKS,
    NOT_RUN,
    OPTIMIZERS,
    RUNS,
    WORKS,
    outcome,
    page,
)

PAGE = ROOT / "docs" / "compatibility.md"


def cells() -> dict[str, dict[str, dict[str, str]]]:
    """Framework -> feature -> optimizer -> what stands there, with its note in the place of a number."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        framework = section.splitlines()[0]
        notes = dict(re.findall(r"^(\d+)\. (.*)$", section, re.MULTILINE))
        rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
        for feature, *row in rows[2:]:
            texts = [notes[cell.strip("()")] if cell != WORKS else cell for cell in row]
            texts = [NOT_RUN if ELSEWHERE.get((framework, feature)) == text else text for text in texts]
            found.setdefault(framework, {})[feature] = dict(zip(OPTIMIZERS, texts, strict=True))
    return found


def test_the_page_is_that_of_the_script() -> None:
    """All but the figures that a run finds; and what there is said to be refused says why."""
    found = cells()
    assert [*found] == [*FRAMEWORKS] == [*RUNS]
    assert all([*of] == [*FEATURES] for of in found.values())
    versions = dict(re.findall(r"(\w+) (\d[\w.+]*)", PAGE.read_text().split("\n## ")[0]))
    assert set(FRAMEWORKS.values()) <= versions.keys()
    assert page(found, {package: versions[package].rstrip(".") for package in FRAMEWORKS.values()}) == PAGE.read_text()
    for of in found.values():
        for row in of.values():
            assert all(cell in (WORKS, NOT_RUN) or len(cell) > 20 for cell in row.values())


@pytest.mark.parametrize("feature", ["train", "resume"])
def test_a_cell_is_what_a_run_finds(feature: str) -> None:
    assert outcome("torch", "SOFIM", feature) == cells()["torch"][feature]["SOFIM"]


@pytest.mark.slow
@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if name != "torch"])
def test_a_cell_of_a_framework_is_what_a_run_finds(framework: str, tmp_path: Path) -> None:
    if find_spec(FRAMEWORKS[framework]) is None:
        pytest.skip(f"{FRAMEWORKS[framework]} cannot be imported; pip install 'fisher_kernels[integrations]'")
    assert outcome(framework, "KFAC", "resume") == cells()[framework]["resume"]["KFAC"]


def test_what_goes_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, feature: str, folder: Path) -> None:
        raise ValueError(f"{name} is refused\nat length")

    monkeypatch.setitem(RUNS, "torch", wrong)
    assert outcome("torch", "KFAC", "train") == "ValueError: KFAC is refused"
