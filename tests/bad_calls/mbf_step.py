"""Calls of the op mbf_step_ that are refused."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.bad_calls import Call, Faults, Refused, entry, value
from tests.bad_calls._steps import (
    NO_COEFFICIENTS,
    arguments,
    bad_arrays,
    bad_lists,
    bad_numbers,
    bad_one_or_each,
    bad_rates,
    bad_scalars,
    dtypes,
    shapes,
)
from tests.cases.mbf_step import NAMES, Parameter, step

BAD_INVERSES = (
    (24, 2, 2),
    (3, 8, 7),
    (5, 8, 8),
    (3, 35),
    (2, 1, 8, 8),
    (1, 1, 5, 5),
    (1, 3, 3, 3),
    (1, 1, 8, 7),
    (24,),
)
BAD_JOINED = ((4, 6, 6), (4, 21), (7, 4, 4), (1, 1, 4, 4), (1, 2, 2, 2))


def good() -> Call:
    chosen = [
        Parameter((2, 3), (2, 3, 3)),
        Parameter((4, 6), (3, 8, 8)),
        Parameter((5, 4), (5, 5, 5)),
        Parameter((5,), None),
        Parameter((4, 6), (1, 2, 3, 3)),
    ]
    return arguments(step(chosen, torch.float32), NAMES)


# Parameter 3 is the bias of parameter 2, and stepped with it.
OF_EACH: dict[str, list[Any]] = {
    "lr": [0.1, 0.1, 0.1, 0.2, 0.1],
    "weight_decay": [0.1, 0.1, 0.1, 0.2, 0.1],
    "floor": [0.1, 0.1, 0.1, 0.2, 0.1],
    "layers": [0, 1, 2, 3, 0],
}


def of_a_bias(name: str, values: list[Any]) -> tuple[Any, type[Exception], str]:
    together = r"expected the same, as params\[3\] is stepped together with params\[2\]"
    return value(name, values), ValueError, rf"{name}\[3\] is not {name}\[2\], {together}"


FAULTS: Faults = {
    **bad_lists(NAMES, 5),
    **bad_arrays("momentum_buffers"),
    **{
        f"inverses {shape}": (
            entry("inverses", lambda shape=shape: torch.ones(shape)),
            ValueError,
            rf"inverses\[1\]{shapes(', '.join(map(str, shape)) + ',' * (len(shape) == 1), 'B, n, n')} .*params\[1\]",
        )
        for shape in BAD_INVERSES
    },
    **{
        f"inverses of a bias {shape}": (
            entry("inverses", lambda shape=shape: torch.ones(shape), 2),
            ValueError,
            rf"inverses\[2\]{shapes(', '.join(map(str, shape)), 'B, n, n')} .*params\[3\]",
        )
        for shape in BAD_JOINED
    },
    "inverses dtype": (
        entry("inverses", lambda: torch.ones(3, 8, 8, dtype=torch.float64)),
        TypeError,
        r"inverses\[1\]" + dtypes("float64", "float32 or bfloat16"),
    ),
    "inverses float16": (
        entry("inverses", lambda: torch.ones(3, 8, 8, dtype=torch.float16)),
        TypeError,
        r"inverses\[1\]" + dtypes("float16", "float32 or bfloat16"),
    ),
    "inverses strides": (
        entry("inverses", lambda: torch.ones(3, 8, 8).mT),
        ValueError,
        r"inverses\[1\] is not contiguous",
    ),
    "inverses shared strides": (
        entry("inverses", lambda: torch.ones(1, 1, 6, 6).mT),
        ValueError,
        r"inverses\[1\] is not contiguous",
    ),
    "inverses device": (
        entry("inverses", lambda: torch.ones(3, 8, 8, device="meta")),
        ValueError,
        r"inverses\[1\] is on meta, expected cpu",
    ),
    "inverses None first": (entry("inverses", lambda: None, 0), ValueError, r"inverses\[0\] is None, expected"),
    "inverses None twice": (entry("inverses", lambda: None, 4), ValueError, r"inverses\[4\] is None, expected"),
    "momentum_buffers of a bias": (
        entry("momentum_buffers", lambda: torch.ones(5, dtype=torch.bfloat16), 3),
        TypeError,
        r"momentum_buffers\[3\]" + dtypes("bfloat16", "float32"),
    ),
    "bias size": (
        lambda call: [call[name].__setitem__(3, torch.ones(4)) for name in NAMES[:3]],
        ValueError,
        r"inverses\[2\] .*params\[3\] of shape \(4,\)",
    ),
    **bad_numbers(
        momentum=(-0.1, 1.0, 1.5, math.nan),
        kl_clip=(0.0, *NO_COEFFICIENTS),
        max_relative_step=(0.0, *NO_COEFFICIENTS),
    ),
    **bad_scalars("grad_scale", "found_inf"),
    **{
        f"kl_along {name!r}": (
            value("kl_along", name),
            ValueError,
            rf"kl_along is '{name}', expected one of 'momentum', 'gradient'",
        )
        for name in ("", "Momentum", "moment")
    },
    **bad_one_or_each(5, ("weight_decay", "floor")),
    **{
        f"layers of {length}": (
            value("layers", [0] * length),
            ValueError,
            rf"layers has {length} entries, expected 5, the length of params",
        )
        for length in (0, 1, 6)
    },
    **{f"{name} of a bias": of_a_bias(name, values) for name, values in OF_EACH.items() if name != "lr"},
}


# Fakes have no number to look at.
RATES: Faults = {**bad_rates([0.1, -1.0, 0.1, 0.1, 0.1]), "lr of a bias": of_a_bias("lr", OF_EACH["lr"])}

REFUSED = {"mbf_step_": Refused(good, FAULTS, RATES)}
