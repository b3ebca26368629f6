"""The rows of a batch that the gradient of a matrix is made of: what each row read, and the derivative by what it made.

The gradient is the product of the two, ``S^T H``, and of low rank where a batch has few rows. The hooks here keep both
until the step: the input of a layer, which autograd keeps until its backward has passed, and the derivative of its
output. Nothing here makes sure that the product is what ends up in ``.grad``, which losses, hooks, clipping and other
processes have their part in: whoever takes the rows compares.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch._C._autograd import _get_current_graph_task_keep_graph, _top_saved_tensors_default_hooks
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling
from torch.nn import Parameter

from fisher_kernels.curvature.functions import take_derivative
from fisher_kernels.curvature.hooks import REMOVED, Hook, drop_copies, remove
from fisher_kernels.curvature.sites import Layer, Site
from fisher_kernels.ops import ACCUMULATOR


class Piece(NamedTuple):
    """One use of a matrix: the operation, its input, and the derivative by its output."""

    operation: Any
    x: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Watched:
    """A site whose rows are wanted.

    Attributes:
        made: how many numbers a row makes.
        most: how many rows are of use.
    """

    site: Site[Any]
    weight: Parameter
    made: int
    most: int


@dataclass
class _Pending:
    """The uses whose backward has passed, since the gradient was none; no pieces where there are too many rows."""

    task: int
    pieces: list[Piece] = field(default_factory=list)
    count: int = 0


class Rows:
    """Keeps the rows of every use of a matrix whose backward adds to the gradient, until they are taken.

    They live as long as the gradient: they are dropped when a backward begins with ``p.grad`` None and by
    :meth:`clear`. Of a matrix with more rows than are of use none are kept, so that all take less memory than its
    weights.

    Args:
        watched: the sites, by a number of the caller's.
        accumulates: whether the backward that is running adds to the gradient of a parameter.

    Attributes:
        wanted: the numbers of those that are kept from now on.
    """

    def __init__(self, watched: Mapping[int, Watched], accumulates: Callable[[Parameter], bool]) -> None:
        self.wanted: Collection[int] = ()
        self._watched, self._accumulates = watched, accumulates
        self._pending: dict[int, _Pending] = {}
        handles = []
        for number, one in watched.items():
            for layer in one.site.layers:
                if layer.spec is None:  # what functions do is seen in refreshes alone
                    drop_copies(layer.module)
                    hook = RowHook(layer, number, weakref.ref(self))
                    # First of all hooks: those of others may change the output, which is no doing of the layer.
                    handles.append(layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        self._detach = weakref.finalize(self, remove, handles)

    def close(self) -> None:
        """Take the hooks off; what is pending is dropped."""
        self._detach()
        self.clear()

    def clear(self) -> None:
        """Drop what is pending."""
        self._pending = {}

    def keep_pending(self) -> Callable[[Rows], None]:
        """Keep what is pending; returns what puts it back into others that watch the same matrices."""
        pending = {number: replace(kept, pieces=[*kept.pieces]) for number, kept in self._pending.items()}

        def put_back(rows: Rows) -> None:
            rows._pending = pending

        return put_back

    def take(self) -> dict[int, list[Piece]]:
        """What is pending, by number; nothing stays so."""
        pending, self._pending = self._pending, {}
        return {number: kept.pieces for number, kept in pending.items() if kept.pieces}

    def fits(self, number: int, x: Tensor, output: Tensor) -> bool:
        """Whether the rows of a use are of use: few, and in the precision of the state, as the gradient then is."""
        one = self._watched[number]
        wide = ACCUMULATOR[one.weight.dtype]
        plain = type(x) is Tensor and not x.is_nested and x.dtype == output.dtype == one.weight.dtype == wide
        return plain and output.numel() <= one.most * one.made

    def add(self, number: int, operation: Any, x: Tensor, grad: Tensor) -> None:
        """Take the derivative of one use."""
        one = self._watched[number]
        if number not in self.wanted or type(grad) is not Tensor or not self._accumulates(one.weight):
            return
        task, pending = _current_graph_task_id(), self._pending.get(number)
        if pending is None or (one.weight.grad is None and pending.task != task):
            pending = self._pending[number] = _Pending(task)
        pending.task = task
        pending.count += grad.numel()
        pending.pieces.append(Piece(operation, x, grad.detach()))
        if pending.count > one.most * one.made:
            pending.pieces = []


class RowHook(Hook):
    """The forward hook of one layer. In a compiled model it does nothing: there it would copy outputs in each step."""

    def __init__(
        self, layer: Layer[Any] | None = None, number: int = -1, rows: Callable[[], Rows | None] = lambda: None
    ) -> None:
        self.layer, self.number, self.rows = layer, number, rows

    def is_copy(self) -> bool:
        return self.layer is None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = REMOVED) -> None:
        if output is REMOVED or is_compiling():
            return
        if self.layer is None:
            drop_copies(module)
            return
        rows = self.rows()
        if rows is None or self.number not in rows.wanted:
            return
        traced = peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None
        # Where tensors are saved in another way, as checkpointing does, no input is to be kept.
        if traced or _top_saved_tensors_default_hooks(True) is not None:
            return
        x = self.layer.input(module, args, kwargs, output)
        if x is not None and rows.fits(self.number, x, output):
            take_derivative(output, _DerivativeHook(self.rows, self.number, self.layer.operation, x))


class _DerivativeHook:
    """The hook on one output, which the graph keeps alive. It lets go of the input when autograd does."""

    def __init__(self, rows: Callable[[], Rows | None], number: int, operation: Any, x: Tensor) -> None:
        self.rows, self.number, self.operation = rows, number, operation
        self.x: Tensor | None = x

    def __call__(self, grad: Tensor) -> None:
        rows, x = self.rows(), self.x
        if not _get_current_graph_task_keep_graph():
            self.x = None
        if rows is not None and x is not None:
            rows.add(self.number, self.operation, x, grad)
