"""The release variant against numbers computed with the authors' release, on three small models."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import fisher_kernels

TOLERANCE = 1e-5
"""Of each tensor's largest entry. The release computed in float32, and its rounding is in the files: 2e-6 at most after
12 steps. Here it is float64, so that no library's sums of float32 add to that."""

RECORDED_STEPS = (1, 2, 5, 12)

pytestmark = pytest.mark.usefixtures("host_backend", "one_thread")


def layer_from(text: str) -> nn.Module:
    """A layer from its repr, less arguments that this version of torch does not know."""
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Name)
    cls = getattr(nn, call.func.id)
    known = inspect.signature(cls).parameters
    positional = [ast.literal_eval(argument) for argument in call.args]
    named = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg in known}
    layer: nn.Module = cls(*positional, **named)
    return layer


def model_from(text: str) -> nn.Sequential:
    return nn.Sequential(*(layer_from(layer) for layer in re.findall(r"\(\d+\): (.+)", text)))


def assert_close(name: str, actual: Tensor, expected: npt.NDArray[Any]) -> None:
    wanted = torch.from_numpy(expected)
    assert actual.shape == wanted.shape, name
    error = float((actual - wanted).abs().max() / wanted.abs().max())
    assert error <= TOLERANCE, f"{name}: off by {error:.1e} of its largest entry"


@pytest.mark.parametrize("name", ["cnn", "mlp", "mlp_w"])
def test_follows_the_release(name: str) -> None:
    recorded = np.load(Path(__file__).parent / "data" / f"adafisher_release_{name}.npz")
    config = json.loads(str(recorded["config"]))
    model = model_from(config["model"])
    initial = {key.removeprefix("init."): recorded[key] for key in recorded.files if key.startswith("init.")}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in initial.items()})
    model.double()
    optimizer = getattr(fisher_kernels, config["optimizer"])(
        model,
        lr=config["lr"],
        weight_decay=config["weight_decay"],
        update_interval=config["TCov"],
        variant="release",
    )
    batches = zip(recorded["X"], recorded["Y"], recorded["losses"], strict=True)
    checked = 0
    for step, (x, y, recorded_loss) in enumerate(batches, start=1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.from_numpy(x).double()), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(float(recorded_loss), rel=TOLERANCE)
        for key in recorded.files:
            if not key.startswith(f"step{step}."):
                continue
            inside = key.removeprefix(f"step{step}.")
            kind, _, layer = inside.partition(".")
            if kind in ("H", "S"):
                state = optimizer.state[model.get_parameter(f"{layer}.weight")]
                assert_close(key, state["input_factor" if kind == "H" else "output_factor"], recorded[key])
            else:
                assert_close(key, model.get_parameter(inside).detach(), recorded[key])
            checked += 1
    factors = 2 * sum(len(list(layer.parameters())) > 0 for layer in model)
    assert checked == len(RECORDED_STEPS) * (len(list(model.parameters())) + factors)
