"""Warnings that point at the line of the user, and come once."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings

import torch

# Where a call of the user passes through on its way to a warning.
_INSIDE = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    contextlib.__file__,
    functools.__file__,
)

_TOLD: set[str] = set()


def warn(message: str) -> None:
    """Warn, at the innermost line that is neither of this library nor of torch."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def warn_once(message: str) -> None:
    """Warn, unless this process has said the same before: in a notebook a cell is run many times.

    Python's own filter would forget that whenever anybody changes the filters for a while.
    """
    if message not in _TOLD:
        _TOLD.add(message)
        warn(message)


def forget() -> None:
    """Let ``warn_once`` say everything again; for tests."""
    _TOLD.clear()
