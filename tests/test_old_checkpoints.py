"""Checkpoints that version 0.1 wrote are loaded, and training goes on as it did there.

``tests/data/checkpoints_0_1`` holds, for each optimizer, the state dicts of a small model and of its optimizer after
five steps, four more batches, and the parameters after each of those as that version computed them, on its reference in
PyTorch. State dicts are what is promised to load, not pickles of whole optimizers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisher_kernels import MBF, SOFIM, AdaFisher, AdaFisherW

FILES = sorted((Path(__file__).parent / "data" / "checkpoints_0_1").glob("*.pt"))
OPTIMIZERS: dict[str, Any] = {"AdaFisher": AdaFisher, "AdaFisherW": AdaFisherW, "MBF": MBF, "SOFIM": SOFIM}

# Another machine sums in another order: after a step parameters of about 1 differ by their own rounding, 2^-24 of
# them, and by that of the step. A step is at most about 0.1 here, and its relative error a few hundred roundings, for
# the condition of what is inverted or divided by; four steps, each of which passes on what it found.
ROUNDING = 4 * 256 * 2**-24


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 3),
    )


def loaded(saved: dict[str, Any]) -> tuple[nn.Module, Any]:
    model = network()
    made = OPTIMIZERS[saved["optimizer"]]
    # A new optimizer has other settings: those of the checkpoint count.
    optimizer = made(model.parameters() if made is SOFIM else model, lr=123.0, **structure(saved["options"]))
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["state"])
    return model, optimizer


def after(saved: dict[str, Any]) -> Tensor:
    """The parameters after each of the further batches."""
    model, optimizer = loaded(saved)
    found = []
    for x, y in zip(saved["inputs"], saved["labels"], strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    return torch.stack(found)


def structure(options: dict[str, Any]) -> dict[str, Any]:
    """What must be the same where a state is loaded: how the state is laid out."""
    return {name: x for name, x in options.items() if name in ("linear_blocks", "inverse_storage")}


def test_there_are_checkpoints_of_every_optimizer() -> None:
    assert {torch.load(file, weights_only=True)["optimizer"] for file in FILES} == set(OPTIMIZERS)
    assert sum(file.stat().st_size for file in FILES) < 200_000


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_number_is_there(file: Path) -> None:
    """What is loaded and saved again, without a step, is what was saved, bit for bit."""
    saved = torch.load(file, weights_only=True)
    now = loaded(saved)[1].state_dict()["state"]
    assert now.keys() == saved["state"]["state"].keys()
    for index, state in saved["state"]["state"].items():
        assert state.keys() <= now[index].keys()
        for name, x in state.items():
            torch.testing.assert_close(now[index][name], x, rtol=0, atol=0)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_training_goes_on_to_the_same_numbers(host_backend: str, file: Path) -> None:
    saved = torch.load(file, weights_only=True)
    torch.testing.assert_close(after(saved), saved["after"], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_not_loaded_shows(file: Path) -> None:
    """With a setting or one of its tensors changed training ends elsewhere: the bound has teeth."""
    saved = torch.load(file, weights_only=True)
    for group in saved["state"]["param_groups"]:
        group["lr"] *= 2
        if "kl_clip" in group:  # which takes the step back to its size
            group["kl_clip"] *= 4
    assert (after(saved) - saved["after"]).abs().max() > 2 * ROUNDING
    names = {name for state in saved["state"]["state"].values() for name in state}
    for name in sorted(names - {"factor_weight", "fisher_updates"}):  # how far an average is: it changes little by now
        changed = torch.load(file, weights_only=True)
        for state in changed["state"]["state"].values():
            if name in state:
                state[name] = 10 + 10 * state[name]
        assert (after(changed) - saved["after"]).abs().max() > 2 * ROUNDING, name
