"""Registration of an op: its schema, fake and implementations, with the choice of backend inside the op."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _after_autograd_keyset,
    _AutoDispatchBelowAutograd,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from fisher_kernels import backends
from fisher_kernels._library import CPU, CUDA, LIBRARY, UNRESOLVED
from fisher_kernels.ops._arguments import (
    Underived,
    arguments_of,
    check_memory,
    check_no_derivative,
    check_types,
    without_autocast,
)

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
    """Whether no tracer, mode, function transform, forward derivative or profiler is watching."""
    return not (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
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
    argument. No op has a derivative: a backward pass through one fails, and one that writes refuses what requires a
    gradient.

    Where the dispatcher would only call back, the call goes around it: its way to an op written in Python and back
    costs more than the kernel on the vectors of a small layer. Arguments by position in the schema must come by
    position. A native kernel that finds a tensor whose memory does not hold its numbers, which are negated when they
    are read or are zeros without memory, has written nothing: the call is made again with tensors that are resolved.

    A call that fails is looked at again for arguments of the wrong type, whose names a native kernel or a reference
    does not always know.

    Args:
        schema: the op's name, arguments and results.
        fake: checks the arguments, and makes empty results.
        reference, triton: the implementations.
        native: the one on the native kernels, whose first argument says which.
        arguments: a NamedTuple of the op's arguments in the order of the schema. Where it is given, the functions above
            take one of these in place of the arguments, and so does what is returned.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", 1)[0]
    op = getattr(torch.ops.fisher_kernels, name).default
    signature = arguments_of(op._schema)
    names = [a.name for a in signature]
    by_position = [i for i, a in enumerate(signature) if a.kind == "Tensor" and not a.by_name]
    by_name = [a.name for a in signature if a.kind == "Tensor" and a.by_name]
    options = [a.name for a in signature if a.by_name]
    numbers = [a.name for a in signature if a.kind == "Float" and not a.is_list]

    def values_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def of_bundle(s: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional = len(s) - len(options)
        return tuple(s[:positional]), dict(zip(options, s[positional:], strict=True))

    def guarded(implementation: Callable[..., Any], reads_memory: bool) -> Callable[..., Any]:
        """What the native entry points see to themselves."""

        def run(*args: Any, **kwargs: Any) -> Any:
            values = values_of(args if arguments is None else args[0], kwargs)
            for a in signature:
                if a.kind == "Tensor" and values.get(a.name) is not None:
                    if any(x.layout is not torch.strided for _, x in a.tensors(values[a.name])):
                        check_types(name, signature, values)
                    check_memory(name, a, values[a.name], reads_memory)
            # Of numpy, for example: the dispatcher and pybind11 take any real number for a float.
            odd = [of for of in numbers if type(values.get(of)) not in (float, int, NoneType)]
            if real := {of: float(values[of]) for of in odd if hasattr(values[of], "__float__")}:
                if arguments is not None:
                    return implementation(args[0]._replace(**real))
                args = tuple(real.get(of, value) for of, value in zip(names, args, strict=False))
                kwargs = {of: real.get(of, value) for of, value in kwargs.items()}
            return implementation(*args, **kwargs)

        return without_autocast(run)

    implementations: dict[str, Callable[..., Any]] = {
        "reference": guarded(reference, reads_memory=False),
        "cpu": functools.partial(native, CPU),
        "cuda": functools.partial(native, CUDA),
        "triton": guarded(triton, reads_memory=True),
    }

    def run(*args: Any, **kwargs: Any) -> Any:
        backend = backends.choose(name, _device_type(args[0]), implementations, args[0])
        if arguments is not None:
            return implementations[backend](arguments(*args, **kwargs))
        return implementations[backend](*args, **kwargs)

    def run_fake(*args: Any, **kwargs: Any) -> Any:
        return fake(*args, **kwargs) if arguments is None else fake(arguments(*args, **kwargs))

    def run_below_autograd(keys: Any, *args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            with _AutoDispatchBelowAutograd():
                return op.redispatch(keys & _after_autograd_keyset, *args, **kwargs)

        return run_underived(call, args, kwargs)

    def run_underived(call: Callable[[], Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        values = values_of(args, kwargs)
        check_no_derivative(name, signature, values)
        tensors = [x for a in signature for _, x in a.tensors(values.get(a.name))]
        if not (torch.is_grad_enabled() and any(map(_requires_grad, tensors))):
            return call()
        results = Underived.apply(name, call, *tensors)
        return list(results) if returns_list else results

    def run_resolved(*args: Any, **kwargs: Any) -> Any:
        kept: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: what is there twice stays the same tensor

        def resolve(value: Any, written: bool) -> Any:
            if isinstance(value, (list, tuple)):
                return [resolve(x, written) for x in value]
            if not isinstance(value, Tensor):
                return value
            if value._is_zerotensor() and not written:
                return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
            if not value.is_neg():
                return value
            if not written:
                return value.resolve_neg()
            if id(value) not in kept:
                kept[id(value)] = value, value.resolve_neg()
            return kept[id(value)][1]

        def is_written(i: int) -> bool:
            return signature[i].written

        try:
            results = op(
                *(resolve(x, is_written(i)) for i, x in enumerate(args)),
                **{key: resolve(x, is_written(names.index(key))) for key, x in kwargs.items()},
            )
        except UNRESOLVED as error:  # there is nothing to resolve: it has no memory
            raise ValueError(str(error)) from None
        for value, resolved in kept.values():
            value.copy_(resolved)
        return results

    # The dispatcher does not look into an optional list.
    dispatched_by_all = not any(a.kind == "Tensor" and a.is_list and a.optional for a in signature)
    returns_list = [r.type.kind() for r in op._schema.returns] == ["ListType"]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    LIBRARY.impl(name, run_below_autograd, "Autograd", with_keyset=True)
    LIBRARY.impl(name, run_resolved, "Negative")
    torch.library.register_fake(f"fisher_kernels::{name}", run_fake, lib=LIBRARY)

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        try:
            if dispatched_by_all:
                return op(*args, **kwargs)
            return run_underived(lambda: op(*args, **kwargs), args, kwargs)
        except UNRESOLVED as error:
            raise ValueError(str(error)) from None
        except Exception:
            check_types(name, signature, values_of(args, kwargs))
            raise

    def call_on_one(x: Any, *args: Any) -> Any:
        if is_compiling():  # first: compilers are to see nothing of the rest
            return op(x, *args)
        try:
            if _is_eager() and _is_plain(x):
                return implementations[backends.choose(name, _device_type(x), implementations, x)](x, *args)
        except UNRESOLVED:
            return run_resolved(x, *args)
        except Exception:
            check_types(name, signature, values_of((x, *args), {}))
            raise
        return dispatch(x, *args)

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return op(*args, **kwargs)
        try:
            if _is_eager():
                tensors = [args[i] for i in by_position if i < len(args)]
                if by_name:
                    tensors += map(kwargs.get, by_name)
                if all(map(_is_plain, tensors)):
                    return implementations[backends.choose(name, _device_type(args[0]), implementations, args[0])](
                        *args, **kwargs
                    )
        except UNRESOLVED:
            return run_resolved(*args, **kwargs)
        except Exception:
            check_types(name, signature, values_of(args, kwargs))
            raise
        return dispatch(*args, **kwargs)

    tensors_of = operator.itemgetter(*(i for i, a in enumerate(signature) if a.kind == "Tensor"))

    def call_on_bundle(s: Any) -> Any:
        if is_compiling():
            args, kwargs = of_bundle(s)
            return op(*args, **kwargs)
        try:
            if _is_eager() and all(map(_is_plain, tensors_of(s))):
                return implementations[backends.choose(name, _device_type(s[0]), implementations, s[0])](s)
        except UNRESOLVED:
            args, kwargs = of_bundle(s)
            return run_resolved(*args, **kwargs)
        except Exception:
            check_types(name, signature, values_of(s, {}))
            raise
        args, kwargs = of_bundle(s)
        return dispatch(*args, **kwargs)

    if arguments is not None:
        return call_on_bundle
    return call_on_one if by_position == [0] and not by_name else call
