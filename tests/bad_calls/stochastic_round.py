"""Calls of stochastic_round that are refused."""

from __future__ import annotations

from typing import Any

import torch

from tests.bad_calls import Call, Faults, Refused, argument, value


def good() -> Call:
    return {
        "x": torch.ones(3, 4),
        "seed": 1,
        "ordinal": 2,
        "step": 3,
        "offset": 4,
        "run": 4,
        "pitch": 9,
        "half": "low",
    }


def alone(**values: Any) -> Any:
    """Spoils several arguments at once."""
    return lambda call: call.update(values)


FAULTS: Faults = {
    **{
        f"dtype {dtype}": (
            argument("x", lambda dtype=dtype: torch.ones(3, 4, dtype=dtype)),
            TypeError,
            rf"x has dtype {dtype}, expected float32$",
        )
        for dtype in (torch.float64, torch.bfloat16, torch.int64)
    },
    **{
        f"{name} {number}": (value(name, number), ValueError, rf"{name} is {number}, expected 0 to 2\^{bits} - 1$")
        for name, bits in (("seed", 64), ("ordinal", 32), ("step", 32))
        for number in (-1, 2**bits)
    },
    **{
        f"{name} no integer": (value(name, 0.5), TypeError, rf"{name} is of type float, expected an integer$")
        for name in ("seed", "ordinal", "step", "offset", "run", "pitch")
    },
    "step of another dtype": (
        argument("step", lambda: torch.ones((), dtype=torch.float64)),
        TypeError,
        r"step has dtype torch.float64, expected float32, or an integer$",
    ),
    "steps": (argument("step", lambda: torch.ones(2)), ValueError, r"step has shape \(2,\), expected one element$"),
    "offset negative": (value("offset", -1), ValueError, r"offset is -1, expected at least 0$"),
    "offset too large": (
        value("offset", 2**63 - 20),
        ValueError,
        r"offset is \d+, expected indices below 2\^63$",
    ),
    "pitch too large": (value("pitch", 2**62), ValueError, r"offset is 4, expected indices below 2\^63$"),
    "run zero": (value("run", 0), ValueError, r"run is 0, expected at least 1$"),
    "run negative": (alone(run=-1, x=torch.ones(0)), ValueError, r"run is -1, expected at least 1$"),
    "pitch below run": (value("pitch", 3), ValueError, r"pitch is 3, expected at least 4, the run$"),
    "pitch without run": (value("run", None), ValueError, r"pitch is 9 without a run, expected both$"),
    "half": (value("half", "upper"), ValueError, r"half is 'upper', expected 'high' or 'low'$"),
}

REFUSED = {"stochastic_round": Refused(good, FAULTS)}
