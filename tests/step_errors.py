"""Bad arguments of the steps that take lists of parameters, for their tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Bad = dict[str, tuple[Callable[[Any], None], type[Exception], str]]
"""Name -> what spoils a good call, the error, and what its message matches after the name of the op."""


def tensor(name: str, value: Callable[[], Tensor | None], i: int = 1) -> Callable[[Any], None]:
    """Spoils a later tensor of a list: the first one must not be touched either."""

    def spoil(case: Any) -> None:
        getattr(case, name)[i] = value()

    return spoil


def option(name: str, value: Any) -> Callable[[Any], None]:
    return lambda case: case.options.update({name: value})


def shorter(name: str) -> Callable[[Any], None]:
    return lambda case: getattr(case, name).pop()


def dtypes(found: str, wanted: str) -> str:
    return rf" .*(torch\.)?{found}.*, expected (torch\.)?{wanted}"


def shapes(found: str, wanted: str) -> str:
    return rf" has shape \({found}\), expected \({wanted}\)"


def bad_lists(names: Sequence[str], count: int) -> Bad:
    """Lists of different lengths, for a good call of ``count`` parameters."""
    first, *others = names
    return {
        **{f"{n} length": (shorter(n), ValueError, rf"{n} has {count - 1} \w+, expected {count}") for n in others},
        f"{first} length": (shorter(first), ValueError, rf"{others[0]} has {count} \w+, expected {count - 1}"),
    }


def bad_arrays(moments: str) -> Bad:
    """Parameters, gradients and moments that do not fit, for a parameter 1 of shape (4, 6)."""
    return {
        "params dtype": (
            tensor("params", lambda: torch.ones(4, 6, dtype=torch.int64)),
            TypeError,
            r"params\[1\]" + dtypes("int64", "float32"),
        ),
        "params complex": (
            tensor("params", lambda: torch.ones(4, 6, dtype=torch.complex64)),
            TypeError,
            r"params\[1\]" + dtypes("complex64", r"(a floating-point|float32)"),
        ),
        "params expanded": (
            tensor("params", lambda: torch.ones(6).expand(4, 6)),
            ValueError,
            r"params\[1\] has strides \(0, 1\)",
        ),
        "grads shape": (tensor("grads", lambda: torch.ones(6, 4)), ValueError, r"grads\[1\]" + shapes("6, 4", "4, 6")),
        "grads size": (tensor("grads", lambda: torch.ones(24)), ValueError, r"grads\[1\]" + shapes("24,", "4, 6")),
        "grads dtype": (
            tensor("grads", lambda: torch.ones(4, 6, dtype=torch.bfloat16)),
            TypeError,
            r"grads\[1\]" + dtypes("bfloat16", "float32"),
        ),
        "grads device": (
            tensor("grads", lambda: torch.ones(4, 6, device="meta")),
            ValueError,
            r"grads\[1\] is on meta, expected cpu",
        ),
        f"{moments} shape": (
            tensor(moments, lambda: torch.ones(4, 7)),
            ValueError,
            rf"{moments}\[1\]" + shapes("4, 7", "4, 6"),
        ),
        f"{moments} dtype": (
            tensor(moments, lambda: torch.ones(4, 6, dtype=torch.float64)),
            TypeError,
            rf"{moments}\[1\]" + dtypes("float64", "float32"),
        ),
        f"{moments} expanded": (
            tensor(moments, lambda: torch.ones(4, 1).expand(4, 6)),
            ValueError,
            rf"{moments}\[1\] has strides \(1, 0\)",
        ),
        f"{moments} device": (
            tensor(moments, lambda: torch.ones(4, 6, device="meta")),
            ValueError,
            rf"{moments}\[1\] is on meta, expected cpu",
        ),
    }


BAD_STEPS: Bad = {
    "steps dtype": (
        tensor("steps", lambda: torch.tensor(1.0, dtype=torch.float64)),
        TypeError,
        r"steps\[1\]" + dtypes("float64", "float32"),
    ),
    "steps shape": (
        tensor("steps", lambda: torch.ones(2)),
        ValueError,
        r"steps\[1\] .*shape \(2,\), expected .*one element",
    ),
    "steps device": (
        tensor("steps", lambda: torch.ones((), device="meta")),
        ValueError,
        r"steps\[1\] is on meta, expected cpu",
    ),
}


def bad_numbers(**values: Sequence[float]) -> Bad:
    return {
        f"{name} {value}": (option(name, value), ValueError, rf"{name} is {value}, expected")
        for name in values
        for value in values[name]
    }


NO_COEFFICIENTS = (-1.0, math.inf, math.nan)


def bad_scalars(*names: str) -> Bad:
    """Tensors where one element of a float is wanted."""
    return {
        **{
            f"{name} shape": (
                option(name, torch.ones(2)),
                ValueError,
                rf"{name} has shape \(2,\), expected one element",
            )
            for name in names
        },
        **{
            f"{name} dtype": (
                option(name, torch.tensor(1)),
                TypeError,
                rf"{name} has dtype (torch\.)?int64, expected float32",
            )
            for name in names
        },
    }
