"""Calls that the ops refuse: a table for each op, by stem. ``tests/test_bad_arguments.py`` makes them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Call = dict[str, Any]
"""The arguments of an op by name."""
Faults = dict[str, tuple[Callable[[Call], Any], type[Exception], str]]
"""Name -> what spoils a good call, the error, and what its message matches after the name of the op."""


@dataclass(frozen=True)
class Refused:
    """The faults of one op.

    Attributes:
        good: a call that passes, made anew each time.
        faults: what spoils it.
        numbers: what spoils it too, but only to one who can look at numbers in tensors.
    """

    good: Callable[[], Call]
    faults: Faults
    numbers: Faults = field(default_factory=dict)


def entry(name: str, make: Callable[[], Any], i: int = 1) -> Callable[[Call], None]:
    """Spoils a later tensor of a list: the first one must not be touched either."""

    def spoil(call: Call) -> None:
        call[name][i] = make()

    return spoil


def argument(name: str, make: Callable[[], Any]) -> Callable[[Call], None]:
    """Spoils an argument by what is made for it."""
    return lambda call: call.update({name: make()})


def value(name: str, number: Any) -> Callable[[Call], None]:
    """Spoils an argument that is a number, a name or a list of them."""
    return argument(name, lambda: number)


def shorter(name: str) -> Callable[[Call], None]:
    """Leaves out the last of a list."""
    return lambda call: call[name].pop()
