"""A user's own model, by the name of the function that makes it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

_LIKE = "expected PACKAGE.MODULE:FUNCTION, such as my_project.models:make_model"


class UserModel(NamedTuple):
    """What the function returned."""

    model: nn.Module
    inputs: Any
    """Example arguments of the model's forward; None if there are none."""
    loss: Callable[[Any], Tensor] | None = None
    """What it makes -> the loss; None where nobody says."""
    plan: Mapping[str, Any] | None = None
    """How ``parallelize_module`` divides it; None where nobody says."""


def load(target: str) -> UserModel:
    """Import a module, from the current folder too, and call its function.

    Args:
        target: ``"package.module:function"``. The function takes no arguments and returns a model, or a tuple: a model
            and example inputs (a dict by name, a tuple or list by position, or the only argument), and if it likes a
            loss function, of what the model makes, and how ``parallelize_module`` divides the model.

    Raises:
        ValueError: there is no such function, it does not run, or it returns something else.
    """
    name, colon, path = target.partition(":")
    if not colon or not name or not path:
        raise ValueError(f"is {target!r}, {_LIKE}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(f"is {target!r}, and there is no module {error.name!r} here or installed") from error
        raise ValueError(f"{name} cannot be imported: {error}") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be imported: {said(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"is {target!r}, and {name} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"is {target!r}, and {path} is {_described(found)}, expected a function")
    try:
        made = found()
    except Exception as error:
        raise ValueError(f"{target} raised {said(error)}") from error
    found = UserModel(*made) if isinstance(made, tuple) and 2 <= len(made) <= 4 else UserModel(made, None)
    if not isinstance(found.model, nn.Module):
        raise ValueError(
            f"{target} returned {_described(made)}, expected a torch.nn.Module or a pair (model, example inputs)"
        )
    if found.loss is not None and not callable(found.loss):
        raise ValueError(f"{target} returned {_described(found.loss)} as third, expected a loss function")
    if found.plan is not None and not isinstance(found.plan, Mapping):
        raise ValueError(
            f"{target} returned {_described(found.plan)} as fourth, expected a dict for parallelize_module"
        )
    return found


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}, the first a {type(value[0]).__name__}" if value else "an empty tuple"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def said(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
