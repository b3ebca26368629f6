"""What optimizers measure as flat numbers, in files and loggers, and as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fisher_kernels import KFAC, MBF, SOFIM, AdaFisher
from fisher_kernels.cli import app
from fisher_kernels.integrations.figures import Recorder, read, scalars

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS: list[Any] = [AdaFisher, MBF, KFAC, lambda model: SOFIM(model.parameters())]


class Run:
    """Stands in for one of Weights & Biases."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, figures: dict[str, float], step: int) -> None:
        self.logged.append((step, figures))


class Writer:
    """Stands in for TensorBoard's, which with_transformers.py has."""

    def __init__(self) -> None:
        self.added: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.added.append((name, value, step))


class Measured:
    def __init__(self, figures: dict[str, dict[str, float]]) -> None:
        self.figures = figures

    def metrics(self) -> dict[str, dict[str, float]]:
        return self.figures


def stepped(make: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = make(model)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    return optimizer


def test_figures_of_all_parameters_together() -> None:
    measured = Measured(
        {
            "a": {"smallest_step": 1.0, "largest_step": 4.0, "damping_share": 0.25, "skipped_blocks": 2},
            "b": {"smallest_step": 3.0, "largest_step": 2.0, "damping_share": 0.75, "skipped_blocks": 5},
            "c": {"smallest_step": math.nan, "largest_step": math.inf, "cosine_with_sgd": math.nan},
        }
    )
    expected = {"smallest_step": 1.0, "largest_step": 4.0, "damping_share": 0.5, "skipped_blocks": 7.0}
    assert scalars(measured) == {f"fisher/{name}": value for name, value in expected.items()}
    each = scalars(measured, each=True)
    assert each["fisher/damping_share/b"] == 0.75
    assert len(each) == 4 + 8
    with pytest.raises(TypeError, match="optimizer is a SGD, expected one of fisher_kernels"):
        scalars(torch.optim.SGD([torch.ones(1)]))


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_records_of_every_optimizer(make: Any, tmp_path: Path) -> None:
    path, run, writer = tmp_path / "run.jsonl", Run(), Writer()
    recorder = Recorder(path, run, writer)
    optimizer = stepped(make)
    figures = recorder.record(optimizer, 1)
    recorder.record(optimizer, 2)
    assert "fisher/cosine_with_sgd" in figures
    assert all(isinstance(value, float) and math.isfinite(value) for value in figures.values())
    assert run.logged == [(1, figures), (2, figures)]
    assert writer.added == [(name, value, step) for step in (1, 2) for name, value in figures.items()]
    assert read(path) == {name: {1: value, 2: value} for name, value in figures.items()}


def test_a_step_that_was_taken_again_counts_as_it_was_last(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = [{"step": 2, "name": "x", "value": 1.0}, {"step": 1, "name": "x", "value": 0.5}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {**lines[0], "value": 3}]))
    assert list(read(path)["x"].items()) == [(1, 0.5), (2, 3.0)]
    with path.open("a") as file:
        file.write('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"line 4 of .* expected step, name and value"):
        read(path)


def test_other_places_are_refused() -> None:
    with pytest.raises(TypeError, match="place is 3, expected a path"):
        Recorder(3)


def test_a_run_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.jsonl"
    for step in (1, 2):
        Recorder(path).record(stepped(MBF), step)
    result = CliRunner().invoke(app, ["plot", str(path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("text", "told"), [(None, "No such file"), ("", "has no lines"), ("{\n", "line 1 of")])
def test_what_is_no_record_is_an_error_of_one_line(text: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(app, ["plot", str(path)])
    assert result.exit_code != 0
    assert told in " ".join(result.output.split())
    assert not list(tmp_path.glob("*.png"))
