"""Calls of the ops minmax, minmax_ and factor_ema_ that are refused."""

from __future__ import annotations

import math

import torch

from tests.bad_calls import Call, Faults, Refused, entry, shorter, value


def minmax_call() -> Call:
    return {"x": [torch.ones(3), torch.arange(4.0)], "eps": 1e-6, "weights": [torch.ones(()), torch.ones(1)]}


def ema_call() -> Call:
    return {
        "state": [torch.ones(3), torch.ones(4)],
        "new": [torch.ones(3), torch.arange(4.0)],
        "decay": 0.8,
        "gain": 0.2,
        "normalize": False,
        "eps": 1e-6,
        "joint": 1,
        "divisors": [1.0, 2.0],
    }


def into_call() -> Call:
    return {**minmax_call(), "out": [torch.ones(3), torch.ones(4)]}


FLOAT64 = r"(torch\.)?float64"
FLOAT32 = r"(torch\.)?float32"

BAD_MINMAX: Faults = {
    "x dtype": (
        entry("x", lambda: torch.ones(4, dtype=torch.bfloat16)),
        TypeError,
        r"x\[1\] has dtype (torch\.)?bfloat16, expected float32",
    ),
    "x shape": (entry("x", lambda: torch.ones(2, 2)), ValueError, r"x\[1\] has shape \(2, 2\).*expected"),
    "x 0-d": (entry("x", lambda: torch.ones(())), ValueError, r"x\[1\] has shape \(\).*expected"),
    "x strides": (entry("x", lambda: torch.ones(8)[::2]), ValueError, r"x\[1\].*strides \(2,\)"),
    "eps": (value("eps", -1.0), ValueError, r"eps is -1(\.0+)?, expected"),
    "eps NaN": (value("eps", math.nan), ValueError, r"eps is nan, expected"),
    "eps infinite": (value("eps", math.inf), ValueError, r"eps is inf, expected"),
    "weights for none": (value("weights", []), ValueError, r"weights has 0 \w+, expected 2"),
    "weights length": (shorter("weights"), ValueError, r"weights has 1 \w+, expected 2"),
    "weights shape": (
        entry("weights", lambda: torch.ones(2)),
        ValueError,
        r"weights\[1\] has shape \(2,\), expected one element",
    ),
    "weights empty": (
        entry("weights", lambda: torch.ones(0)),
        ValueError,
        r"weights\[1\] has shape \(0,\), expected one element",
    ),
    "weights dtype": (
        entry("weights", lambda: torch.ones((), dtype=torch.float64)),
        TypeError,
        rf"weights\[1\] has dtype {FLOAT64}, expected {FLOAT32}",
    ),
    "weights device": (
        entry("weights", lambda: torch.ones((), device="meta")),
        ValueError,
        r"weights\[1\] is on meta, expected cpu",
    ),
    "x device": (entry("x", lambda: torch.ones(4, device="meta")), ValueError, r".*is on \w+, expected \w+"),
}

BAD_EMA: Faults = {
    "state dtype": (
        entry("state", lambda: torch.ones(4, dtype=torch.float16)),
        TypeError,
        r"state\[1\] has dtype (torch\.)?float16, expected float32",
    ),
    "state shape": (entry("state", lambda: torch.ones(2, 2)), ValueError, r"state\[1\] has shape \(2, 2\)"),
    "state strides": (entry("state", lambda: torch.ones(8)[::2]), ValueError, r"state\[1\].*strides \(2,\)"),
    "state expanded": (entry("state", lambda: torch.ones(1).expand(4)), ValueError, r"state\[1\].*strides \(0,\)"),
    "new length": (shorter("new"), ValueError, r"new has 1 \w+, expected 2"),
    "new dtype": (
        entry("new", lambda: torch.ones(4, dtype=torch.float64)),
        TypeError,
        rf"new\[1\] has dtype {FLOAT64}, expected {FLOAT32}",
    ),
    "new shape": (entry("new", lambda: torch.ones(5)), ValueError, r"new\[1\] has shape \(5,\), expected \(4,\)"),
    "new too short": (entry("new", lambda: torch.ones(2)), ValueError, r"new\[1\] has shape \(2,\), expected \(4,\)"),
    "new 0-d": (entry("new", lambda: torch.ones(())), ValueError, r"new\[1\] has shape \(\).*expected"),
    "divisors length": (value("divisors", [1.0]), ValueError, r"divisors has 1 \w+, expected 2"),
    **{
        f"divisor {number}": (
            value("divisors", [1.0, number]),
            ValueError,
            rf"divisors\[1\] is {number}(0*)?, expected",
        )
        for number in (-0.5, math.inf, math.nan)
    },
    "new strides": (entry("new", lambda: torch.ones(8)[::2]), ValueError, r"new\[1\].*strides \(2,\)"),
    "new device": (
        entry("new", lambda: torch.ones(4, device="meta")),
        ValueError,
        r"new\[1\] is on meta, expected cpu",
    ),
    "joint": (value("joint", 3), ValueError, r"joint is 3, expected a divisor of .*2"),
    "joint zero": (value("joint", 0), ValueError, r"joint is 0, expected"),
    "joint negative": (value("joint", -1), ValueError, r"joint is -1, expected"),
    **{
        f"{name} {number}": (value(name, number), ValueError, rf"{name} is {number}(0*)?, expected")
        for name in ("decay", "gain", "eps")
        for number in (-0.5, math.inf, math.nan)
    },
}

BAD_INTO: Faults = {
    "out length": (shorter("out"), ValueError, r"out has 1 \w+, expected 2"),
    "out shape": (
        entry("out", lambda: torch.ones(3)),
        ValueError,
        r"out\[1\] has shape \(3,\), expected \(4,\)",
    ),
    "out dtype": (
        entry("out", lambda: torch.ones(4, dtype=torch.float64)),
        TypeError,
        rf"out\[1\] has dtype {FLOAT64}, expected {FLOAT32}",
    ),
    "out strides": (entry("out", lambda: torch.ones(8)[::2]), ValueError, r"out\[1\].*strides \(2,\)"),
}

REFUSED = {
    "minmax": Refused(minmax_call, BAD_MINMAX),
    "minmax_": Refused(into_call, BAD_INTO),
    "factor_ema_": Refused(ema_call, BAD_EMA),
}
