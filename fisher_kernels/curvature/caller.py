"""Who calls an optimizer, or a forward, where that matters and no argument tells."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, TypeVar

T = TypeVar("T")


def calling(kind: type[T]) -> T | None:
    """The innermost object of a kind of which a method is on the stack, or None.

    Methods are those that the kind or a class derived from it defines. No other frame is asked for its variables: up
    to Python 3.12 it would go on to keep them alive after a ``del``.
    """
    codes = set(_codes(kind))
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes and isinstance(caller := frame.f_locals.get("self"), kind):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def is_within(module: str, function: str) -> bool:
    """Whether a function of a module is running; one of a module that is not imported is not."""
    found = getattr(sys.modules.get(module), function, None)
    return found is not None and is_running(found)


def is_running(function: Callable[..., Any]) -> bool:
    """Whether a function is on the stack."""
    code = inspect.unwrap(function).__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _codes(kind: type) -> Iterator[CodeType]:
    for function in vars(kind).values():
        if callable(function) and inspect.isfunction(own := inspect.unwrap(function)):
            yield own.__code__
    subclasses: list[type] = kind.__subclasses__()
    for derived in subclasses:
        yield from _codes(derived)
