"""Calls of the op mbf_step_ that are refused."""

from __future__ import annotations

import math

import torch

from tests.bad_calls import Call, Faults, Refused, entry, value
from tests.bad_calls._steps import (
    NO_COEFFICIENTS,
    arguments,
    bad_arrays,
    bad_lists,
    bad_numbers,
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
    "bias size": (
        lambda call: [call[name].__setitem__(3, torch.ones(4)) for name in NAMES[:3]],
        ValueError,
        r"inverses\[2\] .*params\[3\] of shape \(4,\)",
    ),
    **bad_numbers(momentum=(-0.1, 1.0, 1.5, math.nan), weight_decay=NO_COEFFICIENTS, kl_clip=(0.0, *NO_COEFFICIENTS)),
    **bad_scalars("lr", "grad_scale", "found_inf"),
}


# Fakes have no number to look at.
RATES: Faults = {
    f"lr {number}": (value("lr", number), ValueError, rf"lr is {float(number)}, expected")
    for number in (-1.0, math.inf, math.nan, torch.tensor(-1.0), torch.tensor(math.nan, dtype=torch.float64))
}

REFUSED = {"mbf_step_": Refused(good, FAULTS, RATES)}
