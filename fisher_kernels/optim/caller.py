"""Who calls an optimizer, where that matters and no argument tells."""

from __future__ import annotations

import sys
from typing import TypeVar

T = TypeVar("T")


def calling(kind: type[T]) -> T | None:
    """The innermost object of a kind whose method is on the stack, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, kind):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None
