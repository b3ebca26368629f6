"""Registration of an op: its schema, fake and implementations, with the choice of backend inside the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fisher_kernels import backends
from fisher_kernels._library import LIBRARY

ACCUMULATOR = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""Storage dtype -> dtype of sums, moments and factors."""


def check_floating(op: str, name: str, dtype: torch.dtype) -> None:
    """Only the dtypes of :data:`ACCUMULATOR` are taken."""
    if dtype not in ACCUMULATOR:
        raise TypeError(f"{op}: {name} has dtype {dtype}, expected float32, float64, bfloat16 or float16")


def _device_type(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        return argument.device.type
    return argument[0].device.type if argument else "cpu"


def define(
    schema: str, *, fake: Callable[..., Any], **implementations: Callable[..., Any]
) -> torch._ops.OpOverload[Any, Any]:
    """Define ``fisher_kernels::<schema>`` and return it.

    Compilers see one op whatever backend runs it: the choice is made at each call, from the device of the first
    argument. The op is registered below autograd: none of them has a derivative.
    """
    name = schema.split("(", 1)[0]

    def run(*args: Any, **kwargs: Any) -> Any:
        backend = backends.choose(name, _device_type(args[0]), implementations)
        return implementations[backend](*args, **kwargs)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fisher_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fisher_kernels, name).default
