"""What is asked of an optimizer on each architecture."""

from __future__ import annotations

import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fisher_kernels import EKFAC, KFAC, SOFIM, AdaFisher, AdaFisherW, EKFACAdam
from fisher_kernels.curvature.factor_rules import Elementwise
from fisher_kernels.optim import MBF
from fisher_kernels.optim.kronecker import KroneckerOptimizer
from fisher_kernels.tools.served import Kind, kinds_of
from tests.small_network import assert_same_parameters, saved_and_loaded
from tests.zoo.architecture import Architecture, cast, seeded
from tests.zoo.witness import Witness, check_blocks, check_factors, check_kronecker

BLOCKS = 8
"""Columns of MBF's blocks: few enough that no layer of the zoo has a large one."""

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "AdaFisher": lambda model: AdaFisher(model, lr=1e-4),
    "AdaFisherW": lambda model: AdaFisherW(model, lr=1e-4, weight_decay=0.01),
    "MBF": lambda model: MBF(model, lr=1e-3, linear_blocks=BLOCKS, inverse_interval=2),
    "KFAC": lambda model: KFAC(model, lr=1e-2),
    "SOFIM": lambda model: SOFIM(model.named_parameters(), lr=1e-3),
}
RARE: dict[str, Callable[[nn.Module], Any]] = {
    "EKFAC": lambda model: EKFAC(model, lr=1e-2, others="curvature"),
    "EKFACAdam": lambda model: EKFACAdam(model, lr=1e-3),
}
"""Those that read layers as K-FAC does: the slow tier alone examines them, and ``--optimizers`` by name."""


class Trial:
    """A small model of an architecture with an optimizer, and its iterations, each of which depends on its number."""

    def __init__(self, architecture: Architecture, optimizer: str, seed: int = 0, dtype: torch.dtype = torch.float32):
        self.architecture = architecture
        self.dtype = dtype
        self.model = seeded(seed, lambda: architecture.build(True)).to(dtype).train()
        if dtype == torch.float64 and hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")  # torch's grouped products are not for float64
        self.optimizer = {**OPTIMIZERS, **RARE}[optimizer](self.model)

    def loss(self, step: int) -> Tensor:
        batch = self.architecture.batch(torch.Generator().manual_seed(step))
        torch.manual_seed(step)  # dropout
        return self.architecture.loss(self.model(**cast(batch, self.dtype)))

    def iterate(self, step: int, autocast: bool = False) -> float:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = self.loss(step)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def names(self) -> dict[Parameter, str]:
        return {p: name for name, p in self.model.named_parameters()}


def trains(architecture: Architecture, optimizer: str, steps: int = 5, autocast: bool = False) -> list[Kind]:
    """Steps are finite, and leave no parameter out silently."""
    trial = Trial(architecture, optimizer)
    by_class = served(kinds_of(trial.model, trial.optimizer))
    for step in range(steps):
        loss = trial.iterate(step, autocast)
        assert math.isfinite(loss), f"the loss of step {step} is {loss}"
    for name, p in trial.model.named_parameters():
        assert bool(p.isfinite().all()), f"{name} is not finite"
    kinds = kinds_of(trial.model, trial.optimizer)
    require_nothing_silent(trial, by_class, served(kinds))
    return kinds


def served(kinds: Iterable[Kind]) -> set[str]:
    """The names of parameters that a rule serves."""
    return {name for kind in kinds if kind.served for name in kind.names}


def require_nothing_silent(trial: Trial, by_class: set[str], by_rule: set[str]) -> None:
    """Every parameter is reported: with statistics if it is said to be served, with the reason if its layer is not.

    Args:
        trial: after some steps.
        by_class: what was to be served as it began.
        by_rule: what is.
    """
    rows = {row.name: row for row in trial.optimizer.explain()}
    assert rows.keys() == {name for name, _ in trial.model.named_parameters()}
    for name in by_class - by_rule:
        assert "not served for" in rows[name].detail, f"{name} is not served any more, and nobody says why"
    if isinstance(trial.optimizer, SOFIM):
        assert by_rule == rows.keys() - {name for name, row in rows.items() if row.frozen}
        return
    informed = _informed(trial.optimizer)
    for name, p in trial.model.named_parameters():
        if p.requires_grad and p.grad is not None and bool(p.grad.any()):
            assert (name in by_rule) <= (p in informed), f"{name} is said to be served, and has no statistics"
            assert (p in informed) <= (name in by_rule), f"{name} has statistics, and is said to be a fallback"


def _informed(optimizer: AdaFisher | MBF | KroneckerOptimizer) -> set[Parameter]:
    """The parameters for whose layers the state has statistics, or Adam's moments where that is all they have."""
    found = set()
    for site in optimizer.statistics.sites:
        count = 0.0
        for layer in site.layers:
            for p in layer.parameters.values():
                state = optimizer.state.get(p, {})
                own = "exp_avg_updates" if isinstance(site.rule, Elementwise) else "fisher_updates"
                count += float(state.get(own, state.get("factor_weight", 0.0)))
        if count > 0:
            found.update(p for layer in site.layers for p in layer.parameters.values())
    return found


def statistics(architecture: Architecture, optimizer: str) -> None:
    """Those of one step in float64 are what the functions that the model calls say they must be."""
    trial = Trial(architecture, optimizer, dtype=torch.float64)
    witness = Witness(trial.model)
    with witness:
        loss = trial.loss(0)
    witness.close()
    loss.backward()
    before = {p: p.detach().clone() for p in trial.model.parameters()}
    trial.optimizer.step()
    for name, p in trial.model.named_parameters():
        least = 1e-12 * float(p.detach().abs().max())
        has_gradient = p.grad is not None and float(p.grad.abs().max()) > least
        assert not has_gradient or not torch.equal(p, before[p]), f"{name} has a gradient and was not moved"
    with torch.no_grad():  # the calls are made again with the parameters that they had
        for p, old in before.items():
            p.copy_(old)
    if isinstance(trial.optimizer, MBF):
        check_blocks(trial.optimizer, witness.seen(), trial.names(), linear_blocks=BLOCKS)
    elif isinstance(trial.optimizer, KroneckerOptimizer):
        check_kronecker(trial.optimizer, witness.seen(), trial.names())
    else:
        check_factors(trial.optimizer, witness.seen(), trial.names())


def resumes(architecture: Architecture, optimizer: str) -> None:
    """A checkpoint goes on to the same bits."""
    trial, twin = Trial(architecture, optimizer), Trial(architecture, optimizer, seed=1)
    for step in range(2):
        trial.iterate(step)
    twin.model.load_state_dict(saved_and_loaded(trial.model.state_dict()))
    twin.optimizer.load_state_dict(saved_and_loaded(trial.optimizer.state_dict()))
    for step in range(2, 4 if optimizer == "MBF" else 3):  # which inverts at every other
        assert trial.iterate(step) == twin.iterate(step)
    assert_same_parameters(trial.model, twin.model)


def autocasts(architecture: Architecture, optimizer: str, expected: list[Kind]) -> None:
    """Under bfloat16 autocast it trains, and the same layers are served."""
    found, wanted = served(trains(architecture, optimizer, steps=2, autocast=True)), served(expected)
    assert found == wanted, f"served under autocast alone: {found - wanted}, and not: {wanted - found}"


@dataclass(frozen=True)
class Result:
    """The outcome of one check; ``fault`` is None if it passed."""

    architecture: str
    optimizer: str
    check: str
    fault: str | None
    seconds: float


def examine(name: str, architecture: Architecture, optimizer: str) -> Iterator[Result]:
    """All checks of one architecture with one optimizer."""
    kinds: list[Kind] = []

    def checked(check: str, run: Callable[[], Any]) -> Result:
        began, fault = time.process_time(), None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fallbacks, which are looked at one by one
            try:
                run()
            except AssertionError as error:
                fault = str(error) or traceback.format_exc(limit=-2)
            except Exception:
                fault = traceback.format_exc(limit=-4)
        return Result(name, optimizer, check, fault, time.process_time() - began)

    yield checked("trains", lambda: kinds.extend(trains(architecture, optimizer)))
    if not kinds:
        return
    if optimizer != "SOFIM":
        yield checked("statistics", lambda: statistics(architecture, optimizer))
    yield checked("resumes", lambda: resumes(architecture, optimizer))
    yield checked("autocasts", lambda: autocasts(architecture, optimizer, kinds))
