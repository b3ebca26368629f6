"""Writes docs/models.md: how much of each published model a rule serves, and why the rest is not."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from fisher_kernels.tools.environment import version
from fisher_kernels.tools.markdown import markdown_table
from fisher_kernels.tools.served import BY_ADAM, Kind, share_served
from tests.zoo.architecture import Architecture
from tests.zoo.checks import trains
from tests.zoo.shares import published_sizes, transfer

READERS = ("AdaFisher", "MBF", "KFAC")
WIDTH = 120
GOAL = 0.95
"""Share of the parameters that rules serve of an architecture without an exemption."""

HEAD = """# Models

How much of a model the optimizers read, for architectures that people train. `make models` writes this page.

A **rule** knows the curvature of one type of layer: a linear map, a convolution, a norm, an embedding. Whatever no rule
serves takes a fallback, and none does so silently: `explain()` and this page name it with the reason. The rules are
those that a small model with random weights showed after five steps of training. So they are of layers that have proven
in their forward passes that they compute what their class documents. The shares are counted at the published size.
SOFIM needs no rules and serves every parameter.

KFAC gives Kronecker factors to linear maps and convolutions, and trains all else with Adam: norms and embeddings, which
it knows, and what takes a fallback. Its column is the share of the numbers that have factors. EKFAC and EKFACAdam have
the same. A weight that is an embedding as well as a linear map has the factors of the linear map. A factor of more than
4096 rows, as the head of a language model has for its tokens, is diagonal.

The tests train each of these architectures with every optimizer, in float32 and under bfloat16 autocast. The statistics
of every layer that is served are compared with those of a plain rewriting of the model, which must have the model's
gradients, and a checkpoint must go on to the same bits.

For your own model:

```bash
fisher-kernels check my_project.models:make_model
```

prints such a table. The function takes no arguments and returns a model, or a model and example inputs (a dict by name,
a tuple by position, or one tensor); with inputs the layers prove what they compute.
"""


class Counted(NamedTuple):
    """What is known of one architecture: how its published parameters are treated, by optimizer."""

    architecture: Architecture
    kinds: dict[str, list[Kind]]

    @property
    def parameters(self) -> int:
        return sum(kind.parameters for kind in self.kinds[READERS[0]])


def count(architecture: Architecture) -> Counted:
    """Train the small model, and count the published one."""
    sizes = published_sizes(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {name: transfer(trains(architecture, name), sizes) for name in READERS}
    return Counted(architecture, kinds)


def faults(counted: Counted) -> list[str]:
    """Where rules serve less of the published model than they should, or where an exemption is no longer needed."""
    architecture, found = counted.architecture, []
    for name in READERS:
        share = share_served(counted.kinds[name])
        if share < architecture.expected:
            found.append(f"{name} serves {percent(share)}, expected {percent(architecture.expected)} at least")
    if architecture.exempt and min(share_served(kinds) for kinds in counted.kinds.values()) >= GOAL:
        found.append(f"needs no exemption any more: {architecture.exempt}")
    return found


def percent(share: float) -> str:
    """Rounded down: 100 % is all."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    return "100 %" if share >= 1 else f"{int(share * 1000) / 10:.1f} %"


def page(counted: Sequence[Counted]) -> str:
    overview, left = [], []
    for entry in counted:
        architecture, total = entry.architecture, max(entry.parameters, 1)
        shares = [share_served(entry.kinds[name]) for name in READERS[:-1]] + [_share_factored(entry.kinds["KFAC"])]
        rules = _by_rule(entry.kinds[READERS[0]], total)
        overview.append((architecture.published, architecture.source, _size(total), *map(percent, shares), rules))
        left += [(architecture.published, *row) for row in _left(entry.kinds, total)]
    serves = [f"{name} serves" for name in READERS[:-1]]
    header = ("model", "configuration", "parameters", *serves, "KFAC has factors", "by rule of AdaFisher")
    caption = (
        f"Counted with torch {torch.__version__.partition('+')[0]} and transformers {version('transformers')}. Tied "
        "weights count once. Shares are rounded down."
    )
    return "\n".join(
        [
            HEAD,
            "## Shares\n",
            markdown_table(header, overview, right=(2, 3, 4, 5)),
            textwrap.fill(caption, WIDTH) + "\n",
            "## What takes a fallback\n",
            _why(),
            markdown_table(("model", "layer", "share", "parameters", "why"), left, right=(2,)),
        ]
    )


def _why() -> str:
    text = (
        "Everything that no rule of AdaFisher serves, by the class of the module that has it; `*` stands for a number. "
        "MBF takes a fallback for the same, and KFAC trains it with Adam. What these leave out besides is marked. Of a "
        "weight that several layers share one may be served and another not, which is said too."
    )
    return textwrap.fill(text, WIDTH) + "\n"


def _share_factored(kinds: Sequence[Kind]) -> float:
    """The share of all numbers that Kronecker factors serve; Adam trains the rest."""
    return share_served([replace(kind, reason=kind.remark) if kind.remark == BY_ADAM else kind for kind in kinds])


def _by_rule(kinds: Iterable[Kind], total: int) -> str:
    shares: dict[str, int] = {}
    for kind in kinds:
        if kind.served:
            shares[kind.rule] = shares.get(kind.rule, 0) + kind.parameters
    ordered = sorted(shares.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{rule} {percent(n / total)}" for rule, n in ordered)


def _left(kinds: dict[str, list[Kind]], total: int) -> list[tuple[str, str, str, str]]:
    rows = [_row(kind, total, "") for kind in kinds["AdaFisher"] if kind.reason or kind.remark]
    without = {name for kind in kinds["AdaFisher"] if not kind.served for name in kind.names}
    alone: dict[tuple[str, str, str, str], list[str]] = {}
    for name in READERS[1:]:
        for kind in kinds[name]:
            if not kind.served and not without & {*kind.names}:
                alone.setdefault(_row(kind, total, ""), []).append(name)
    return rows + [(*row, f"{' and '.join(names)}: {why}") for (*row, why), names in alone.items()]


def _row(kind: Kind, total: int, mark: str) -> tuple[str, str, str, str]:
    names = ", ".join(f"`{name}`" for name in kind.names[:3]) + (", ..." if len(kind.names) > 3 else "")
    why = kind.reason or f"served, but {kind.remark}"
    return kind.layer, percent(kind.parameters / total), names, mark + why.replace("|", "\\|")


def _size(parameters: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g} {name}"
    return str(parameters)
