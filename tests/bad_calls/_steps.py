"""Faults that the steps which take lists of parameters share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fisher_kernels.ops import Rounding
from tests.bad_calls import Call, Faults, argument, entry, shorter, value


def arguments(case: Any, names: Sequence[str]) -> Call:
    """Those of a step, by name."""
    return {**dict(zip(names, case.lists(), strict=True)), **case.options}


def dtypes(found: str, wanted: str) -> str:
    return rf" .*(torch\.)?{found}.*, expected (torch\.)?{wanted}"


def shapes(found: str, wanted: str) -> str:
    return rf" has shape \({found}\), expected \({wanted}\)"


def bad_lists(names: Sequence[str], count: int) -> Faults:
    """Lists of different lengths, for a good call of ``count`` parameters."""
    first, *others = names
    return {
        **{f"{n} length": (shorter(n), ValueError, rf"{n} has {count - 1} \w+, expected {count}") for n in others},
        f"{first} length": (shorter(first), ValueError, rf"{others[0]} has {count} \w+, expected {count - 1}"),
    }


def bad_arrays(moments: str) -> Faults:
    """Parameters, gradients and moments that do not fit, for a parameter 1 of shape (4, 6)."""
    return {
        "params dtype": (
            entry("params", lambda: torch.ones(4, 6, dtype=torch.int64)),
            TypeError,
            r"params\[1\]" + dtypes("int64", "float32"),
        ),
        "params complex": (
            entry("params", lambda: torch.ones(4, 6, dtype=torch.complex64)),
            TypeError,
            r"params\[1\]" + dtypes("complex64", r"(a floating-point|float32)"),
        ),
        "params expanded": (
            entry("params", lambda: torch.ones(6).expand(4, 6)),
            ValueError,
            r"params\[1\] has strides \(0, 1\)",
        ),
        "grads shape": (entry("grads", lambda: torch.ones(6, 4)), ValueError, r"grads\[1\]" + shapes("6, 4", "4, 6")),
        "grads size": (entry("grads", lambda: torch.ones(24)), ValueError, r"grads\[1\]" + shapes("24,", "4, 6")),
        "grads dtype": (
            entry("grads", lambda: torch.ones(4, 6, dtype=torch.bfloat16)),
            TypeError,
            r"grads\[1\]" + dtypes("bfloat16", "float32"),
        ),
        "grads device": (
            entry("grads", lambda: torch.ones(4, 6, device="meta")),
            ValueError,
            r"grads\[1\] is on meta, expected cpu",
        ),
        f"{moments} shape": (
            entry(moments, lambda: torch.ones(4, 7)),
            ValueError,
            rf"{moments}\[1\]" + shapes("4, 7", "4, 6"),
        ),
        f"{moments} dtype": (
            entry(moments, lambda: torch.ones(4, 6, dtype=torch.float64)),
            TypeError,
            rf"{moments}\[1\]" + dtypes("float64", "float32"),
        ),
        f"{moments} in float16": (
            entry(moments, lambda: torch.ones(4, 6, dtype=torch.float16)),
            TypeError,
            rf"{moments}\[1\]" + dtypes("float16", "float32"),
        ),
        f"{moments} expanded": (
            entry(moments, lambda: torch.ones(4, 1).expand(4, 6)),
            ValueError,
            rf"{moments}\[1\] has strides \(1, 0\)",
        ),
        f"{moments} device": (
            entry(moments, lambda: torch.ones(4, 6, device="meta")),
            ValueError,
            rf"{moments}\[1\] is on meta, expected cpu",
        ),
    }


BAD_STEPS: Faults = {
    "steps dtype": (
        entry("steps", lambda: torch.tensor(1.0, dtype=torch.float64)),
        TypeError,
        r"steps\[1\]" + dtypes("float64", "float32"),
    ),
    "steps shape": (
        entry("steps", lambda: torch.ones(2)),
        ValueError,
        r"steps\[1\] .*shape \(2,\), expected .*one element",
    ),
    "steps device": (
        entry("steps", lambda: torch.ones((), device="meta")),
        ValueError,
        r"steps\[1\] is on meta, expected cpu",
    ),
}


def bad_numbers(**values: Sequence[float]) -> Faults:
    return {
        f"{name} {number}": (value(name, number), ValueError, rf"{name} is {number}, expected")
        for name in values
        for number in values[name]
    }


NO_COEFFICIENTS = (-1.0, math.inf, math.nan)


def bad_one_or_each(count: int, numbers: Sequence[str] = ("weight_decay",)) -> Faults:
    """Settings of which there is one for all of ``count`` parameters, or one for each: the rate, and numbers."""
    return {
        **{
            f"{name} of {length}": (
                value(name, [0.1] * length),
                ValueError,
                rf"{name} has {length} entries, expected 1 or {count}, the length of params",
            )
            for name in ("lr", *numbers)
            for length in (0, count + 1)
        },
        **{
            f"{name}[{i}] {number}": (
                value(name, [0.1] * i + [number] + [0.1] * (count - 1 - i) * (i > 0)),
                ValueError,
                rf"{name}\[{i}\] is {number}, expected",
            )
            for name in numbers
            for i in (0, 1)
            for number in NO_COEFFICIENTS
        },
        "lr shape": (
            argument("lr", lambda: torch.ones(2)),
            ValueError,
            r"lr\[0\] has shape \(2,\), expected one element",
        ),
        "lr dtype": (
            value("lr", [0.1, torch.tensor(1), *[0.1] * (count - 2)]),
            TypeError,
            r"lr\[1\] has dtype (torch\.)?int64, expected float32",
        ),
    }


def bad_rates(each: Sequence[float]) -> Faults:
    """Learning rates of one for all, and of one for each of which the second is bad."""
    return {
        **{
            f"lr {number}": (value("lr", number), ValueError, rf"lr\[0\] is {float(number)}, expected")
            for number in (*NO_COEFFICIENTS, torch.tensor(-1.0), torch.tensor(math.nan, dtype=torch.float64))
        },
        **{
            f"lr[1] {number}": (
                value("lr", [each[0], number, *each[2:]]),
                ValueError,
                rf"lr\[1\] is {number}, expected",
            )
            for number in NO_COEFFICIENTS
        },
    }


def bad_scalars(*names: str) -> Faults:
    """Tensors where one element of a float is wanted."""
    return {
        **{
            f"{name} shape": (
                argument(name, lambda: torch.ones(2)),
                ValueError,
                rf"{name} has shape \(2,\), expected one element",
            )
            for name in names
        },
        **{
            f"{name} dtype": (
                argument(name, lambda: torch.tensor(1)),
                TypeError,
                rf"{name} has dtype (torch\.)?int64, expected float32",
            )
            for name in names
        },
    }


def bad_roundings(count: int) -> Faults:
    """Random integers, and numbers of steps beside them, for a good call of ``count`` parameters that has neither."""

    def of(steps: Any, rounding: Any) -> Any:
        def spoil(call: Call) -> None:
            call["steps"], call["rounding"] = steps, rounding

        return spoil

    good, ones = [Rounding.of(0, i) for i in range(count)], [torch.ones(()) for _ in range(count)]
    return {
        "rounding length": (of(ones, good[1:]), ValueError, f"rounding has {count - 1} entries, expected {count}"),
        "rounding base": (
            of(ones, [*good[1:], Rounding(2**32)]),
            ValueError,
            rf"rounding\[{count - 1}\]\.base is 4294967296",
        ),
        "no steps": (of(None, good), ValueError, "steps is None, expected the number of the step for each parameter"),
        "steps length": (of(ones[1:], good), ValueError, rf"steps has {count - 1} \w+, expected {count}"),
        "steps shape": (
            of([*ones[1:], torch.ones(2)], good),
            ValueError,
            rf"steps\[{count - 1}\] has shape \(2,\), expected one element",
        ),
        "steps dtype": (
            of([*ones[1:], torch.ones((), dtype=torch.float64)], good),
            TypeError,
            rf"steps\[{count - 1}\]" + dtypes("float64", "float32"),
        ),
    }
