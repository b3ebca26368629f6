"""Stands in for hypothesis where it is missing: tests with generated examples are skipped, those beside them run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest


class _Anything:
    """Whatever is built of strategies while a test module is imported."""

    def __getattr__(self, name: str) -> _Anything:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Anything:
        return self

    def __or__(self, other: Any) -> _Anything:
        return self


def _anything(name: str) -> _Anything:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything()


def _given(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return pytest.mark.skip(reason="hypothesis is not installed")


def _settings(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda test: test


def install() -> None:
    """Put the stand-in in the place of the package."""
    module, strategies = ModuleType("hypothesis"), ModuleType("hypothesis.strategies")
    module.given, module.settings, module.strategies = _given, _settings, strategies  # type: ignore[attr-defined]
    for each in (module, strategies):
        each.__spec__ = ModuleSpec(each.__name__, None)  # torch looks it up
        each.__getattr__ = _anything  # type: ignore[method-assign]
    sys.modules.update({"hypothesis": module, "hypothesis.strategies": strategies})
