"""Hyperparameters of an optimizer as text: which there are, and what a text means.

Both come from the optimizer's constructor, so that a new argument is an option without another line. An annotation
says what a value may be; where it cannot be read, the type of the default does. Arguments that no text can stand for
(models, parameters, process groups) are not options.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch


@dataclass(frozen=True)
class Kind:
    """One kind of value: how an error calls it, and what reads it, which raises ValueError for any other text."""

    name: str
    read: Callable[[str], Any]


@dataclass(frozen=True)
class Option:
    """A hyperparameter of a constructor.

    Attributes:
        kinds: what its values may be; a text is of the first one that reads it.
        words: the texts among them that are listed one by one.
        default: the constructor's.
    """

    name: str
    kinds: tuple[Kind, ...]
    words: tuple[str, ...]
    default: Any

    def parse(self, text: str) -> Any:
        """The value that a text stands for.

        Raises:
            ValueError: it stands for none; the message says what is expected.
        """
        return _first(self.kinds, text)


def options(constructor: Callable[..., Any]) -> dict[str, Option]:
    """The hyperparameters that a constructor takes and that a text can stand for, in its order."""
    found = {}
    for parameter in inspect.signature(constructor).parameters.values():
        annotation = _annotation(constructor, parameter)
        kinds = _kinds(annotation)
        if any(kind is not _NONE for kind in kinds):
            words = tuple(word for word in _words(annotation) if isinstance(word, str))
            found[parameter.name] = Option(parameter.name, tuple(kinds), words, parameter.default)
    return found


def _annotation(constructor: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """What is written there, as types; the type of the default where that is nothing or cannot be evaluated."""
    annotation = parameter.annotation
    function = constructor.__init__ if inspect.isclass(constructor) else constructor
    if annotation is not parameter.empty:
        written = SimpleNamespace(__annotations__={"it": annotation})
        with suppress(NameError, TypeError, AttributeError):  # a name that only type checkers import
            return get_type_hints(written, getattr(function, "__globals__", {}))["it"]
    default = parameter.default
    return NoneType if default is parameter.empty else int | float if type(default) is int else type(default)


def _alternatives(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _alternatives(part)
    else:
        yield annotation


def _words(annotation: Any) -> Iterator[Any]:
    for part in _alternatives(annotation):
        if get_origin(part) is Literal:
            yield from get_args(part)


def _kinds(annotation: Any) -> list[Kind]:
    """From the narrowest to the widest: an integer is a number, and everything is a text."""
    parts = [*_alternatives(annotation)]
    kinds = [_word(word) for word in _words(annotation)]
    kinds += [kind for of, kind in _SCALARS.items() if of in parts]
    kinds += [kind for part in parts if get_origin(part) is tuple and (kind := _tuple(part)) is not None]
    return kinds + [_TEXT] * (str in parts)


def _first(kinds: tuple[Kind, ...], text: str) -> Any:
    for kind in kinds:
        with suppress(ValueError):
            return kind.read(text)
    *names, last = dict.fromkeys(kind.name for kind in kinds)
    raise ValueError(f"is {text!r}, expected {' or '.join(filter(None, [', '.join(names), last]))}")


def _none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError(text)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _word(word: Any) -> Kind:
    def read(text: str) -> Any:
        if text != str(word):
            raise ValueError(text)
        return word

    return Kind(str(word), read)


def _tuple(annotation: Any) -> Kind | None:
    """Values with commas between them, in parentheses or not; None if no text can stand for one of them."""
    parts = get_args(annotation)
    repeated = len(parts) == 2 and parts[1] is Ellipsis
    kinds = [tuple(_kinds(part)) for part in (parts[:1] if repeated else parts)]
    if not all(kinds):
        return None

    def read(text: str) -> tuple[Any, ...]:
        inner = text.strip().removeprefix("(").removesuffix(")").removesuffix(",")
        texts = [item.strip() for item in inner.split(",")] if inner else []
        wanted = kinds * len(texts) if repeated else kinds
        if len(texts) != len(wanted):
            raise ValueError(text)
        return tuple(_first(kind, item) for kind, item in zip(wanted, texts, strict=True))

    return Kind("values with commas between them" if repeated else f"{len(parts)} values with a comma between", read)


def _dtype(text: str) -> Any:
    name = text.removeprefix("torch.")
    if not isinstance(dtype := getattr(torch, name, None), torch.dtype):
        raise ValueError(text)
    return dtype


_NONE = Kind("none", _none)
_TEXT = Kind("a text", str)
_SCALARS: Mapping[type, Kind] = {
    NoneType: _NONE,
    bool: Kind("true or false", _truth),
    int: Kind("an integer", int),
    float: Kind("a finite number", _number),
    torch.dtype: Kind("a dtype", _dtype),
}
