"""What an op's arguments are, by its schema: their types, which are written, and what must not be given to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _DisableAutocast, _is_any_autocast_enabled
from torch.autograd import forward_ad
from torch.nn import Parameter

from fisher_kernels._library import UnresolvedError

_PLAIN = (Tensor, Parameter)
_INT64 = range(-(2**63), 2**63)


class Argument(NamedTuple):
    """An argument of an op.

    Attributes:
        kind: Tensor, Float, Int, Bool or String: of the entries if it is a list.
        optional: whether it may be None.
        optional_entries: whether an entry of the list may be.
        written: whether the op writes to it.
        by_name: whether it comes by name alone.
    """

    name: str
    kind: str
    is_list: bool
    optional: bool
    optional_entries: bool
    written: bool
    by_name: bool

    def entries(self, value: Any) -> Iterator[tuple[str, Any]]:
        """Each with what it is called in a message."""
        if self.is_list and value is not None:
            yield from ((f"{self.name}[{i}]", entry) for i, entry in enumerate(value))
        else:
            yield self.name, value

    def tensors(self, value: Any) -> Iterator[tuple[str, Tensor]]:
        """The tensors among the entries."""
        if self.kind == "Tensor":
            yield from ((name, x) for name, x in self.entries(value) if isinstance(x, Tensor))


def arguments_of(schema: Any) -> tuple[Argument, ...]:
    """The arguments of an op, in order."""

    def inner(t: Any) -> tuple[Any, bool]:
        optional = t.kind() == "OptionalType"
        return (t.getElementType() if optional else t), optional

    found = []
    for a in schema.arguments:
        of, optional = inner(a.type)
        is_list = of.kind() == "ListType"
        kind, optional_entries = inner(of.getElementType()) if is_list else (of, False)
        written = a.alias_info is not None and a.alias_info.is_write
        name = kind.kind().removesuffix("Type")
        found.append(Argument(a.name, name, is_list, optional, optional_entries, written, a.kwarg_only))
    return tuple(found)


_NUMBERS = {"Float": ("__float__", "a number"), "Int": ("__index__", "an integer"), "Bool": ("__bool__", "a bool")}


def check_types(op: str, arguments: Sequence[Argument], values: Mapping[str, Any]) -> None:
    """Refuse, by name, what is of no type that an argument takes. For calls that have failed: it takes its time."""
    for argument in arguments:
        if argument.name not in values or (argument.optional and values[argument.name] is None):
            continue
        value = values[argument.name]
        if argument.is_list and not isinstance(value, (list, tuple)):
            raise TypeError(f"{op}: {argument.name} is of type {_type(value)}, expected a list") from None
        for name, entry in argument.entries(value):
            if entry is not None or not argument.optional_entries:
                _check_type(op, name, argument.kind, entry)


def _check_type(op: str, name: str, kind: str, value: Any) -> None:
    if kind == "Tensor":
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} is of type {_type(value)}, expected a torch.Tensor") from None
        if value.is_nested:
            raise TypeError(f"{op}: {name} is a nested tensor, expected one with a shape") from None
        if value.layout != torch.strided:
            raise TypeError(f"{op}: {name} has layout {value.layout}, expected {torch.strided}") from None
    elif kind == "String":
        if not isinstance(value, str):
            raise TypeError(f"{op}: {name} is of type {_type(value)}, expected a str") from None
    elif kind in _NUMBERS:
        method, expected = _NUMBERS[kind]
        if not hasattr(value, method):
            raise TypeError(f"{op}: {name} is of type {_type(value)}, expected {expected}") from None
        if kind == "Int" and isinstance(value, int) and value not in _INT64:
            raise ValueError(f"{op}: {name} is {value}, expected an integer of 64 bits") from None


def _type(value: Any) -> str:
    return type(value).__name__


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with autocast off: products keep the precision of what they multiply."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not _is_any_autocast_enabled():
            return function(*args, **kwargs)
        with _DisableAutocast():
            return function(*args, **kwargs)

    return run


def check_memory(op: str, argument: Argument, value: Any, is_read: bool) -> None:
    """What the native entry points see to themselves: a tensor has memory, which holds its numbers and may be written.

    What was made in inference mode may not be written outside it, as torch has it. Where lists of tensors begin is
    known to those who read it.
    """
    tensors = [x for x in value if isinstance(x, Tensor)] if argument.is_list else [value]
    if is_read and any(map(Tensor.is_neg, tensors)):
        name = next(name for name, x in argument.tensors(value) if x.is_neg())
        raise UnresolvedError(f"{op}: {name} is negated when it is read (is_neg()), expected memory with its numbers")
    if any(map(Tensor._is_zerotensor, tensors)):  # of which torch itself does not keep the signs of zeros
        raise UnresolvedError(f"{op}: {argument.name} is or has zeros without memory")
    if not is_read or not argument.is_list:
        for name, x in argument.tensors(value):
            if lacks_memory(x):
                raise UnresolvedError(f"{op}: {name} has no memory to read, expected some for its shape")
    if argument.written and any(map(Tensor.is_inference, tensors)) and not torch.is_inference_mode_enabled():
        name = next(name for name, x in argument.tensors(value) if x.is_inference())
        raise RuntimeError(
            f"{op}: {name} is an inference tensor. Inplace update to inference tensor outside InferenceMode is not "
            "allowed: write to a clone of it"
        )


def lacks_memory(x: Tensor) -> bool:
    """Whether the storage of a tensor was freed. Functions of torch then read from address 0, and crash."""
    return type(x) in _PLAIN and not x.is_meta and x.numel() > 0 and not x._is_zerotensor() and x.data_ptr() == 0


def check_no_derivative(op: str, arguments: Sequence[Argument], values: Mapping[str, Any]) -> None:
    """Refuse what would need a derivative of an op that has none, except by a backward pass, which fails by itself."""
    for argument in arguments:
        for name, x in argument.tensors(values.get(argument.name)):
            if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(f"{op} has no derivative, and {name} has a tangent: detach it")
    written = any(argument.written for argument in arguments)
    if not (torch.is_grad_enabled() and (written or torch._C._functorch.peek_interpreter_stack() is not None)):
        return
    for argument in arguments:
        for name, x in argument.tensors(values.get(argument.name)):
            if not x.requires_grad:
                continue
            if argument.written and x.is_leaf:
                raise RuntimeError(
                    f"{op}: {name} is a leaf Variable that requires grad is being used in an in-place operation: call "
                    "it under torch.no_grad()"
                )
            raise RuntimeError(
                f"{op} has no derivative, and {name} requires grad: detach it, or call it under torch.no_grad()"
            )


class Underived(torch.autograd.Function):
    """An op without a derivative: its results remember that they depend on something, and a backward pass fails."""

    @staticmethod
    def forward(ctx: Any, op: str, call: Callable[[], Any], *tensors: Tensor) -> Any:
        ctx.op = op
        results = call()
        return tuple(results) if isinstance(results, list) else results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{ctx.op} has no derivative: detach its arguments")
