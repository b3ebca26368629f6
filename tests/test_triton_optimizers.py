"""Optimizers on Triton's kernels from end to end: the same training as on the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fisher_kernels import MBF, SOFIM, AdaFisher, AdaFisherW, backends, use_backend
from tests.small_network import network, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif("triton" not in backends.available(), reason=str(backends.reasons()["triton"])),
    pytest.mark.skipif(not backends.is_interpreted(), reason="CPU tensors need the interpreter"),
]

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdaFisher": lambda model: AdaFisher(model, lr=1e-2),
    "AdaFisher release": lambda model: AdaFisher(model, lr=1e-3, variant="release", update_interval=2),
    "AdaFisherW": lambda model: AdaFisherW(model, lr=1e-2, weight_decay=0.1, variant="relative"),
    "MBF": lambda model: MBF(model, lr=1e-2, kl_clip=1e-3),
    "MBF packed": lambda model: MBF(model, lr=1e-2, inverse_storage="packed", weight_decay=0.1),
    "SOFIM": lambda model: SOFIM(model.parameters(), lr=0.1),
    "SOFIM of each tensor": lambda model: SOFIM(model.parameters(), lr=0.1, direction="gradient", scope="tensor"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if " " in name else ()) for name in OPTIMIZERS]
)
def test_training_is_that_of_the_reference(name: str) -> None:
    """In float64, where a step that leaves anything out or takes anything twice stands out from rounding."""
    trained = []
    for backend in ("reference", "triton"):
        model = network(dtype=torch.float64)
        with use_backend(backend):
            optimizer = OPTIMIZERS[name](model)
            train(model, optimizer, range(3))
            state = optimizer.state_dict()["state"]
        trained.append((model, state))
    (expected, expected_state), (actual, actual_state) = trained
    before = network(dtype=torch.float64)
    for start, p, q in zip(before.parameters(), expected.parameters(), actual.parameters(), strict=True):
        assert not torch.equal(start, q)
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(actual_state, expected_state, rtol=1e-8, atol=1e-9)
