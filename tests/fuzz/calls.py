"""A call of an op, and what is expected of every one of them, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from fisher_kernels import ops
from tests.fuzz.operands import Operand, Placed


@contextmanager
def _default_device(name: str) -> Iterator[None]:
    previous = torch.get_default_device()
    torch.set_default_device(name)
    yield
    torch.set_default_device(None if previous.type == "cpu" else previous)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(previous)


def _surroundings(name: str) -> AbstractContextManager[Any]:
    """What a caller may have set, none of which is the op's business."""
    if name == "autocast":
        return torch.autocast("cpu", dtype=torch.bfloat16)
    if name == "default device":
        return _default_device("meta")
    if name == "default dtype":
        return _default_dtype(torch.float64)
    return nullcontext()


surroundings = st.sampled_from(("", "", "", "", "", "autocast", "default device", "default dtype"))
threads = st.sampled_from((1, 1, 1, 2, 3))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    if count != previous:
        torch.set_num_threads(count)
    yield
    if count != previous:
        torch.set_num_threads(previous)


class Outcome:
    """What an op returned, and the tensors it was given, as they are after it."""

    def __init__(self, result: Any, arguments: Mapping[str, Any]) -> None:
        self.result = result
        self._arguments = arguments

    def __getitem__(self, name: str) -> Any:
        """An argument; a list of tensors for a list."""
        value = self._arguments[name]
        if isinstance(value, list):
            return [x.tensor if isinstance(x, Placed) else x for x in value]
        return value.tensor if isinstance(value, Placed) else value

    def tensors(self, writes: frozenset[str]) -> Iterator[Tensor]:
        """All that the op may have written."""
        for value in [self.result, *(self[name] for name in sorted(writes))]:
            yield from _leaves(value)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)


@dataclass(frozen=True)
class Call:
    """The name of an op, its arguments (an :class:`Operand` for each tensor), and which of them it writes."""

    op: str
    arguments: dict[str, Any]
    writes: frozenset[str] = frozenset()
    around: str = ""
    threads: int = 1
    refused: bool = field(default=False)  # whether it has to be

    def __repr__(self) -> str:
        lines = [f"{name}={value!r}," for name, value in self.arguments.items()]
        on = [f"# {self.threads} threads"] * (self.threads > 1) + [f"# {self.around}"] * bool(self.around)
        return "\n    ".join([f"{self.op}(", *lines, *on]) + "\n)"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def run(self, threads: int | None = None) -> Outcome | None:
        """Call the op; None where it refused tensors whose memory is not what they are, which it may."""
        placed: dict[str, Any] = {name: _place(value) for name, value in self.arguments.items()}
        outcome = Outcome(None, placed)
        refusal: Exception | None = None
        with ExitStack() as stack:
            stack.enter_context(_threads(threads or self.threads))
            stack.enter_context(_surroundings(self.around))
            try:
                outcome.result = getattr(ops, self.op)(**{name: outcome[name] for name in placed})
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                if not (self.refused or any(map(_is_lazy, self.arguments.values()))):
                    raise
                refusal = error
        assert refusal is not None or not self.refused, "it was not refused"
        written = self.writes if refusal is None else frozenset()
        for name, value in placed.items():
            for i, each in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(each, Placed):
                    at = f"{name}[{i}]" if isinstance(value, list) else name
                    if name not in written:
                        assert each.is_unchanged, f"{at}, which is only read, was changed"
                    else:
                        assert each.is_guarded, f"memory around {at} was written"
        return None if refusal is not None else outcome

    def run_repeatably(self) -> Outcome | None:
        """As ``run``, and once more on one thread: the bits are the same."""
        outcome = self.run()
        if outcome is None or self.threads == 1:
            return outcome
        again = self.run(threads=1)
        assert again is not None
        for one, other in zip(outcome.tensors(self.writes), again.tensors(self.writes), strict=True):
            assert _same_bits(one, other), f"{self.threads} threads and one give different bits"
        return outcome


def _place(value: Any) -> Any:
    if isinstance(value, list):
        return [_place(x) for x in value]
    return value.placed() if isinstance(value, Operand) else value


def _is_lazy(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_lazy, value))
    return isinstance(value, Operand) and value.layout.negated


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    one, other = (x.resolve_neg().contiguous().view(integers) for x in (one, other))
    return torch.equal(one, other)


Fuzz = Callable[[Callable[..., Any], Callable[[Call], None]], None]
"""The fixture that draws calls: from a strategy, which takes whether they are to be tiny, for a check."""
