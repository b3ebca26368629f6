"""Every layer type: MBF against a naive float64 implementation that forms the gradient of every sample."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisher_kernels import MBF
from tests.layer_cases import (
    LAYERS,
    Batch,
    assert_same_moves,
    batch_of,
    convolutions,
    loss_of,
)
from tests.naive_mbf import NaiveMBF

TOLERANCE = 1e-9
"""Of the distance travelled, relative to the longest move of the tensor, and of blocks, relative to the largest entry.
Sums of some thousand float64 terms are good to 1e-14. An inverse multiplies that by the condition number of a damped
block, 1e4 at most here (entries up to some hundreds over a damping of 0.05), and steps carry it on. A wrong
coefficient shows at 1e-2 or more."""

pytestmark = [
    pytest.mark.usefixtures("backend", "one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.05, "beta2": 0.7, "momentum": 0.6, "inverse_interval": 1}
"""What the tests use where they do not say otherwise: every coefficient has an effect within a few steps."""


def everything(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def split(batch: tuple[Any, ...], parts: int) -> list[tuple[Any, ...]]:
    return list(zip(*(x.chunk(parts) for x in batch), strict=True))


def follow(
    model: nn.Module,
    batch: Batch,
    *,
    steps: int = 3,
    parts: int = 1,
    tolerance: float = TOLERANCE,
    params: Callable[[nn.Module], list[dict[str, Any]]] = everything,
    before: Callable[[nn.Module, int], None] = lambda model, step: None,
    **hyperparameters: Any,
) -> tuple[MBF, NaiveMBF]:
    """Train two copies of a model, one with each implementation, and compare moves and blocks after every step."""
    hyperparameters = {**SETTINGS, **hyperparameters}
    model = model.double()
    twin = copy.deepcopy(model)
    ours = MBF(model, params=params(model), **hyperparameters)
    hyperparameters.pop("inverse_storage", None)
    naive = NaiveMBF(twin, params=params(twin), **hyperparameters)
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for step in range(steps):
        for net, opt in ((model, ours), (twin, naive)):
            generator = torch.Generator().manual_seed(step)
            before(net, step)
            opt.zero_grad()
            for part in split(batch(generator), parts) if parts > 1 else [batch(generator)]:
                loss_of(net(*part), generator).backward()
                if opt is naive:
                    naive.backward_done()
            opt.step()
        assert_same_moves(model, twin, start, tolerance)
        assert_same_blocks(model, ours, twin, naive, tolerance)
    return ours, naive


def assert_same_blocks(model: nn.Module, ours: MBF, twin: nn.Module, naive: NaiveMBF, tolerance: float) -> None:
    """The averages as they stand in the state of the parameter that owns them."""
    partners = {id(q): p for p, q in zip(model.parameters(), twin.parameters(), strict=True)}
    names = {id(q): name for name, q in twin.named_parameters()}
    for block in naive.blocks:
        state, name = ours.state[partners[id(block.owner)]], f"{block.role} blocks of {names[id(block.owner)]}"
        if block.average is None:
            assert not state.get("fisher_updates", 0), name
            continue
        assert state["fisher_blocks"].shape == block.average.shape, name
        error = float((state["fisher_blocks"] - block.average).abs().max())
        largest = float(block.average.abs().max())
        assert error <= tolerance * max(largest, 1e-300), f"{name}: off by {error:.1e} beside {largest:.1e}"


def assert_no_fallback(optimizer: MBF) -> None:
    assert not any(row.fallback for row in optimizer.explain())


# Every layer.


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer: str, sequence: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    optimizer, _ = follow(build(), batch_of(*shape), sequence=sequence, weight_decay=0.01)
    assert_no_fallback(optimizer)


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("linear_blocks", ["shared", "per_output", 1, 2, 5, 9])
@pytest.mark.parametrize("sequence", ["expand", "reduce"])
@pytest.mark.parametrize(
    "layer", ["linear", "linear-3d", "linear-1d", "linear-one-input-no-bias", "linear-one-output", "hf-conv1d-3d"]
)
def test_blocks_of_linear_layers(layer: str, sequence: str, linear_blocks: str | int, loss_reduction: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    follow(
        build(),
        batch_of(*shape),
        steps=2,
        sequence=sequence,
        linear_blocks=linear_blocks,
        loss_reduction=loss_reduction,
    )


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("kl_clip", [None, 1e-3])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(
    "layer", ["linear-3d", "hf-conv1d", "conv2d-groups", "deconv2d-stride-padding", "batchnorm2d", "layernorm-3d"]
)
def test_decay_trust_region_and_intervals(
    layer: str, decoupled: bool, kl_clip: float | None, loss_reduction: str
) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    _, naive = follow(
        build(),
        batch_of(*shape),
        steps=7,
        decoupled=decoupled,
        kl_clip=kl_clip,
        loss_reduction=loss_reduction,
        weight_decay=0.1,
        maximize=not decoupled,
        update_interval=2,
        inverse_interval=3,
        lr=0.02,
    )
    assert (naive.groups[0]["scale"] < 1) == (kl_clip is not None)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=convolutions(), sequence=st.sampled_from(["expand", "reduce"]))
def test_convolutions_of_any_geometry(case: tuple[nn.Module, tuple[int, ...]], sequence: str) -> None:
    module, shape = case
    follow(module, batch_of(*shape), steps=2, sequence=sequence)
