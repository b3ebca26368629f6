"""What is drawn for the steps on lists of parameters, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor

from tests.fuzz.operands import SUM_DTYPES, Draw, Operand, accumulator, laid, layouts, numbers, sizes

RATES = (0.1, 0.0, 1.0, 1e-30, 1e30)
DECAYS = (0.0, 0.1, 1.0, 1e-20, 1e10)
BETAS = (0.9, 0.0, 0.5, 1 - 1e-9, float(np.nextafter(1, 0)))
SCALES = (1.0, 2.0, 1024.0, 3.0, 1e-20, 1e20)
COUNTS = (0.0, 1.0, 2.0, 1000.0, 2.0**24)


@st.composite
def shapes(draw: Draw, tiny: bool) -> list[int]:
    if not tiny and draw(st.integers(0, 39)) == 39:
        return draw(st.sampled_from(([9000], [3, 2731], [70_001])))
    return draw(st.lists(sizes(tiny, most=17), max_size=2 if tiny else 3))


@st.composite
def tensors(draw: Draw, shape: Sequence[int], dtype: torch.dtype, short: bool = False) -> dict[str, Operand]:
    """A parameter, its gradient and its moment, which is kept in 16 bits if ``short``, but not beside float64."""
    wide = accumulator(dtype)
    kept = torch.bfloat16 if short and wide == torch.float32 else wide
    values = {
        "params": draw(numbers()).fill(shape, dtype, 0),
        "grads": draw(numbers()).fill(shape, dtype, 1),
        "moments": draw(numbers()).fill(shape, kept, 2),
    }
    alike = draw(layouts(written=True, lazy=False))
    same = draw(st.booleans())  # all three lie alike, as they do in training
    return {name: laid(x, alike if same else draw(layouts(written=name != "grads"))) for name, x in values.items()}


def dtypes(draw: Draw, count: int) -> list[torch.dtype]:
    first = draw(st.sampled_from(SUM_DTYPES))
    return [first if draw(st.integers(0, 3)) else draw(st.sampled_from(SUM_DTYPES)) for _ in range(count)]


def scalar(value: float, form: str) -> Any:
    """A number in one of the forms in which it may come."""
    if form == "numpy":
        return np.float32(value)
    if form == "float32":
        return Operand(torch.tensor(value, dtype=torch.float32))
    if form == "float64":
        return Operand(torch.tensor([value], dtype=torch.float64))
    return value


rates = st.builds(scalar, st.sampled_from(RATES), st.sampled_from(("number", "numpy", "float32", "float64")))


def number(x: Any) -> Any:
    """What a scalar says, exactly."""
    return np.longdouble(x.values.item() if isinstance(x, Operand) else float(x))


@st.composite
def options(draw: Draw) -> dict[str, Any]:
    """Those that all steps have, but for the rate."""
    result: dict[str, Any] = {"decoupled": draw(st.booleans()), "maximize": draw(st.booleans())}
    if draw(st.booleans()):
        result["grad_scale"] = Operand(torch.tensor(draw(st.sampled_from(SCALES)), dtype=torch.float32))
    if draw(st.booleans()):
        result["found_inf"] = Operand(torch.full((1,), draw(st.sampled_from((0.0, 0.0, 0.0, 1.0)))))
    return result


def counts(draw: Draw, count: int) -> list[Operand]:
    return [Operand(torch.tensor(draw(st.sampled_from(COUNTS)), dtype=torch.float32)) for _ in range(count)]


def does_nothing(arguments: dict[str, Any]) -> bool:
    return "found_inf" in arguments and bool(arguments["found_inf"].values)


def assert_untouched(outcome: Any, arguments: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        for i, (now, before) in enumerate(zip(outcome[name], arguments[name], strict=True)):
            same = (now.resolve_neg() == before.values) | (now.isnan() & before.values.isnan())
            assert bool(same.all()), f"{name}[{i}] was changed though found_inf is set"


def assert_counted(outcome: Any, arguments: dict[str, Any]) -> None:
    for i, (now, before) in enumerate(zip(outcome["steps"], arguments["steps"], strict=True)):
        expected = (before.values + 1).item()
        assert now.item() == expected, f"steps[{i}] is {now.item()}, expected {expected}"


def skipped_within(what: str, found: Tensor | int, least: int, most: int) -> None:
    assert least <= int(found) <= most, f"{what} is {int(found)}, expected {least} to {most}"
