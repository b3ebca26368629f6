"""Registration of an op: its schema, fake and implementations, with the choice of backend inside the op."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling
from torch.nn import Parameter

from fisher_kernels import backends
from fisher_kernels._library import CPU, CUDA, LIBRARY

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


def check_coefficient(op: str, name: str, value: float) -> None:
    """Coefficients of an average are finite and not negative."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{op}: {name} is {value}, expected a finite number of at least 0")


def device_of(tensors: Sequence[Tensor]) -> torch.device | None:
    """The device of a list: that of its first tensor; an empty one is on none."""
    return tensors[0].device if tensors else None


def _device_type(argument: Any) -> str:
    if isinstance(argument, (list, tuple)):
        return _device_type(argument[0]) if argument else "cpu"
    return "cpu" if argument.is_cpu else argument.device.type  # the flag costs a fifth of the device


_PLAIN = frozenset({Tensor, Parameter, type(None)})
_requires_grad = operator.attrgetter("requires_grad")


def _is_eager() -> bool:
    """Whether no compiler, tracer, mode, function transform or profiler is watching."""
    return not (
        is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def _is_plain(argument: Any) -> bool:
    """Whether a tensor or a list holds no subclass of Tensor, nor what makes the result remember a gradient."""
    if isinstance(argument, list):
        if not _PLAIN.issuperset(map(type, argument)):
            return False
        return not (torch.is_grad_enabled() and any(map(_requires_grad, [x for x in argument if x is not None])))
    if argument is None:
        return True
    return type(argument) in _PLAIN and not (argument.requires_grad and torch.is_grad_enabled())


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    native: Callable[..., Any],
    triton: Callable[..., Any],
    arguments: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``fisher_kernels::<schema>`` and return what calls it.

    Compilers see one op whatever backend runs it: the choice is made at each call, from the device of the first
    argument. The op is registered below autograd: none of them has a derivative.

    Where the dispatcher would only call back, the call goes around it: its way to an op written in Python and back
    costs more than the kernel on the vectors of a small layer. Arguments by position in the schema must come by
    position.

    Args:
        schema: the op's name, arguments and results.
        fake: checks the arguments, and makes empty results.
        reference, triton: the implementations.
        native: the one on the native kernels, whose first argument says which.
        arguments: a NamedTuple of the op's arguments in the order of the schema. Where it is given, the functions above
            take one of these in place of the arguments, and so does what is returned.
    """
    name = schema.split("(", 1)[0]
    implementations: dict[str, Callable[..., Any]] = {
        "reference": reference,
        "cpu": functools.partial(native, CPU),
        "cuda": functools.partial(native, CUDA),
        "triton": triton,
    }

    def run(*args: Any, **kwargs: Any) -> Any:
        backend = backends.choose(name, _device_type(args[0]), implementations, args[0])
        if arguments is not None:
            return implementations[backend](arguments(*args, **kwargs))
        return implementations[backend](*args, **kwargs)

    def run_fake(*args: Any, **kwargs: Any) -> Any:
        return fake(*args, **kwargs) if arguments is None else fake(arguments(*args, **kwargs))

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fisher_kernels::{name}", run_fake, lib=LIBRARY)
    op = getattr(torch.ops.fisher_kernels, name).default
    held = [(i, a.name, a.kwarg_only) for i, a in enumerate(op._schema.arguments) if "Tensor" in str(a.type)]
    by_position = [i for i, _, by_name_only in held if not by_name_only]
    by_name = [name for _, name, by_name_only in held if by_name_only]

    def call_on_one(x: Any, *args: Any) -> Any:
        if _is_eager() and _is_plain(x):
            return implementations[backends.choose(name, _device_type(x), implementations, x)](x, *args)
        return op(x, *args)

    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_eager():  # first: compilers are to see nothing of the rest
            tensors = [args[i] for i in by_position if i < len(args)]
            if by_name:
                tensors += map(kwargs.get, by_name)
            if all(map(_is_plain, tensors)):
                return implementations[backends.choose(name, _device_type(args[0]), implementations, args[0])](
                    *args, **kwargs
                )
        return op(*args, **kwargs)

    tensors_of = operator.itemgetter(*(i for i, _, _ in held))
    options = [a.name for a in op._schema.arguments if a.kwarg_only]

    def call_on_bundle(s: Any) -> Any:
        if _is_eager() and all(map(_is_plain, tensors_of(s))):
            return implementations[backends.choose(name, _device_type(s[0]), implementations, s[0])](s)
        positional = len(s) - len(options)
        return op(*s[:positional], **dict(zip(options, s[positional:], strict=True)))

    if arguments is not None:
        return call_on_bundle
    return call_on_one if by_position == [0] and not by_name else call
