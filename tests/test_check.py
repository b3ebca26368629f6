"""``fisher-kernels check``: how a user's own model is served, and what is said where there is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fisher_kernels.cli import app

MODELS = """
import torch
from torch import nn
from torch.nn import functional as F


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Padded(1, 4, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.output = nn.Linear(4, 3)

    def forward(self, x, twice=False):
        out = self.output((self.conv(x) * self.scale).mean((2, 3)))
        return {"logits": 2 * out if twice else out, "more": [None, out]}


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 3 * self.weight, self.bias)


def make():
    return Net()

def with_one():
    return Net(), torch.randn(2, 1, 5, 5)

def with_names():
    return Net(), {"x": torch.randn(2, 1, 5, 5), "twice": True}

def with_places():
    return Net(), (torch.randn(2, 1, 5, 5), True)

def with_wrong():
    return Net(), torch.randn(2, 7)

def scaled():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Scaled(4, 2), nn.LSTM(2, 3)), None

def proven():
    return scaled()[0][:2], torch.randn(5, 3)

def normalised():
    return nn.Sequential(nn.Embedding(2, 3), nn.LayerNorm(3), nn.Linear(3, 4)), torch.tensor([0, 1])

def without_derivative():
    return nn.Flatten(), torch.randn(5, 3)

def frozen():
    return nn.Linear(3, 4).requires_grad_(False)

def raising():
    raise OSError("no such file\\nand more of it")

def returning():
    return 3

def three():
    return make(), 1, 2

NUMBER = 4
"""


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current folder, which is not on Python's path."""
    files = {"zoo_of_mine": MODELS, "broken_models": "1 / 0\n", "needing": "import not_there_at_all\n"}
    for module, text in files.items():
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "zoo_of_mine"
    for module in files:
        sys.modules.pop(module, None)


def check(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "160", "NO_COLOR": "1"})


def kinds(result: Result) -> dict[str, tuple[str, str]]:
    """Parameter -> the rule that serves it, and why none does."""
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["kinds"]
    return {parameter: (kind["rule"], kind["reason"]) for kind in found for parameter in kind["names"]}


def test_layers_are_taken_for_what_their_class_says_without_inputs(name: str) -> None:
    result = check(f"{name}:make")
    assert result.exit_code == 0, result.output
    assert "AdaFisher serves 92.7 % of 55 trained parameters by a rule" in result.stdout
    assert "return (model, example inputs)" in result.stdout
    assert kinds(check(f"{name}:make", "--json")) == {
        "conv.weight": ("conv", ""),
        "output.weight": ("linear", ""),
        "output.bias": ("linear", ""),
        "scale": ("fallback", "a parameter of Net beside its layers"),
    }


@pytest.mark.parametrize("inputs", ["one", "names", "places"])
@pytest.mark.parametrize("optimizer", ["adafisher", "mbf", "kfac"])
def test_layers_prove_themselves_on_inputs(name: str, inputs: str, optimizer: str) -> None:
    found = kinds(check(f"{name}:with_{inputs}", "--json", "--optimizer", optimizer))
    assert found["output.weight"] == ("linear", "")
    rule, reason = found["conv.weight"]
    assert rule == "conv" or "shape" in reason  # padded by hand
    assert found["scale"][0] == "fallback"


def test_a_layer_that_does_something_else_is_named_with_the_reason(name: str) -> None:
    before = kinds(check(f"{name}:scaled", "--json"))
    assert before["1.weight"] == ("linear", "")
    assert before["2.weight_ih_l0"] == ("fallback", "a parameter of LSTM beside its layers")
    found = kinds(check(f"{name}:proven", "--json"))
    assert found["0.weight"] == ("linear", "")
    assert found["1.weight"] == ("fallback", "its output is not what nn.Linear computes")
    result = check(f"{name}:proven")
    assert "its output is not what nn.Linear computes" in " ".join(result.stdout.split())
    assert "61.5 % of 26" in result.stdout
    assert "example inputs" not in result.stdout


def test_what_kfac_trains_with_adam_is_said(name: str) -> None:
    result = check(f"{name}:normalised", "--optimizer", "kfac")
    assert result.exit_code == 0, result.output
    assert "KFAC serves 100.0 % of 28 trained parameters by a rule" in result.stdout
    assert "42.8 % have a rule and no factors: Adam trains them" in result.stdout
    assert "no factors: Adam trains it" in result.stdout
    assert "Adam" not in check(f"{name}:normalised", "--optimizer", "mbf").stdout


def test_the_exit_status_says_whether_enough_is_served(name: str) -> None:
    assert check(f"{name}:make", "--at-least", "0.9").exit_code == 0
    assert check(f"{name}:make", "--at-least", "0.95").exit_code == 1


def test_frozen_parameters_are_left_out(name: str) -> None:
    result = check(f"{name}:frozen")
    assert result.exit_code == 0
    assert "of 0 trained parameters" in result.stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("zoo_of_mine", "expected PACKAGE.MODULE:FUNCTION"),
        ("zoo_of_mine:", "expected PACKAGE.MODULE:FUNCTION"),
        ("zoo_of_yours:make", "there is no module 'zoo_of_yours'"),
        ("torch.no_such_module:make", "there is no module 'torch.no_such_module'"),
        ("broken_models:make", "broken_models cannot be imported: ZeroDivisionError: division by zero"),
        ("needing:make", "needing cannot be imported: No module named 'not_there_at_all'"),
        ("zoo_of_mine:made", "zoo_of_mine has no made"),
        ("zoo_of_mine:NUMBER", "NUMBER is an int, expected a function"),
        ("zoo_of_mine:raising", "zoo_of_mine:raising raised OSError: no such file"),
        ("zoo_of_mine:returning", "zoo_of_mine:returning returned an int, expected a torch.nn.Module or a pair"),
        ("zoo_of_mine:three", "zoo_of_mine:three returned an int as third, expected a loss function"),
    ],
)
@pytest.mark.usefixtures("name")
def test_what_is_no_model_is_told_in_one_line(target: str, message: str) -> None:
    result = check(target)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: PACKAGE.MODULE:FUNCTION: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("with_wrong", "zoo_of_mine:with_wrong: RuntimeError: "),
        ("without_derivative", "optimizer got an empty parameter list"),
    ],
)
@pytest.mark.usefixtures("name")
def test_a_model_that_does_not_run_is_told_in_one_line(function: str, message: str) -> None:
    result = check(f"zoo_of_mine:{function}")
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unknown_optimizer_is_refused(name: str) -> None:
    result = check(f"{name}:make", "--optimizer", "sofim")
    assert result.exit_code == 2
    assert "error: --optimizer: is 'sofim', expected one of adafisher, mbf" in result.stderr
