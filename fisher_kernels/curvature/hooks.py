"""The hooks on a model: what they keep of a forward, and what they hand over in the backward.

The forward hook of a layer captures what its rule needs of the input and puts a hook on the output tensor; that one
hands the derivative of the output over. Hooks refer weakly to the statistics that they collect for, and copies of them,
which come with copies of a model, do nothing and go away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_current_graph_task_keep_graph, _top_saved_tensors_default_hooks
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from fisher_kernels.curvature.broadcast import Broadcast, may_be_broadcast
from fisher_kernels.curvature.functions import Call, Watches, take_derivative
from fisher_kernels.curvature.gathered import all_of, is_distributed
from fisher_kernels.curvature.sites import Layer, Site, first_input, overwritten, versions_of
from fisher_kernels.curvature.tap import tap


class Engine(Protocol):
    """What hooks ask of the statistics that they collect for."""

    sites: list[Site[Any]]

    def look(self, index: int, use: int, x: Tensor, output: Tensor) -> bool:
        """Whether nothing speaks against a layer, by its site and its place there."""

    def note_gathered(self, layer: Layer[Any], module: nn.Module) -> None:
        """Remember what a layer has in its forward in the place of DTensors."""

    def look_behind(self, x: Any) -> None:
        """Look behind the input of a layer for what broadcasts the output of another."""

    def expect_rows(self, x: Tensor, output: Tensor) -> Broadcast:
        """Look from now on for what broadcasts the output of a layer."""

    def claim(self, layer: Layer[Any], inputs: Iterable[Any], output: Tensor) -> bool:
        """Leave to a layer what functions did in its forward, unless it does more than they did; whether it is."""

    def add(
        self, site: Site[Any], layer: Layer[Any], captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor
    ) -> None:
        """Take the derivative of one use."""

    def fail(self, site: Site[Any], layer: Layer[Any], error: Exception) -> None:
        """Let a layer fall back."""


def drop_copies(module: nn.Module) -> None:
    """Remove the hooks that came along with a copy of a model, or out of a pickle."""
    hooks = (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    pre_hooks = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
    for kept, *others in (hooks, pre_hooks):
        for number, hook in list(kept.items()):
            copied = isinstance(hook, Hook) and hook.is_copy()
            if copied or getattr(hook, "__func__", None) is contextlib.nullcontext.__exit__:
                for entries in (kept, *others):
                    entries.pop(number, None)  # type: ignore[attr-defined]


def remove(handles: list[Any]) -> None:
    """Take hooks off."""
    for handle in handles:
        handle.remove()


_Tapped = tuple[Tensor, list[Tensor], Tensor, list[int]]
"""What :func:`tap` takes beside an output."""


class Hook:
    """Base of the hooks on modules. Copies and pickles of them, which come with copies of the model, do nothing.

    A copy goes away when it is first called, or when another optimizer is made for its model.
    """

    def is_copy(self) -> bool:
        """Whether this came along with a copy of a model."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # which torch.jit.script asks for, to compile the hook as a function
            raise AttributeError(
                "the hooks of an optimizer have no name; torch.jit.script cannot compile them: close() the optimizer "
                "first, or script a copy.deepcopy(model) that has run once"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        # Something of the standard library that takes any arguments and does nothing: a pickled model loads alone.
        return (getattr, (contextlib.nullcontext(), "__exit__"))


REMOVED: Any = object()
"""In the place of an output: torch calls a hook without its keyword arguments if it was removed while those before it
ran, as happens where Python collects an old optimizer in the middle of a forward."""


class ModelHook(Hook):
    """The hook that begins, or ends, to look for functions in a forward of the model."""

    def __init__(self, watches: Watches | None = None, ends: bool = False) -> None:
        self.watches, self.ends = watches, ends

    def is_copy(self) -> bool:
        return self.watches is None

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if is_compiling():
            return
        if self.watches is None:
            drop_copies(module)
        elif self.ends:
            self.watches.end()
        else:
            traced = peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None
            self.watches.begin(torch.is_grad_enabled() and not traced)


class ShowHook(Hook):
    """The forward hook that shows what a module has made, where a backward may follow."""

    def __init__(self, show: Callable[[Any], None] | None = None) -> None:
        self.show = show

    def is_copy(self) -> bool:
        return self.show is None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_compiling():
            return
        if self.show is None:
            drop_copies(module)
        elif torch.is_grad_enabled() and peek_interpreter_stack() is None and torch._C._get_tracing_state() is None:
            self.show(output)


class ForwardHook(Hook):
    """The forward hook of one layer.

    It refers to the engine weakly, because the model must not keep the optimizer's statistics alive.
    """

    def __init__(
        self,
        layer: Layer[Any] | None = None,
        address: tuple[int, int, int] = (-1, -1, -1),
        engine: Callable[[], Engine | None] = lambda: None,
    ) -> None:
        self.layer = layer
        self.address = address
        self.engine = engine
        self.armed = False
        self.awake = False
        self.token = torch.zeros(1, dtype=torch.float32, device="cpu")

    def is_copy(self) -> bool:
        return self.layer is None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = REMOVED) -> Any:
        if output is REMOVED:
            return None
        compiling = is_compiling()
        if self.layer is None:
            if not compiling:
                drop_copies(module)
            return None
        if not (self.awake if compiling else self.armed):
            return None
        if compiling:
            # The flag itself: to the compiler of torch 2.11 is_exporting() is always true.
            if torch.compiler._is_exporting_flag or (x := self.layer.input(module, args, kwargs, output)) is None:
                return None
            if not self.layer.rule.takes(module, x, output):
                return None
            return tap(output, *self._tapped(self.layer, x))
        if peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None:
            return None
        try:
            tapped = self._collect(self.layer, args, kwargs, output)
        except Exception as error:
            self.layer.proof.fail(error)
            return None
        # Not within the above: whoever saves tensors in another way may raise, as checkpointing does once it has all.
        return None if tapped is None else tap(output, *tapped)

    def _collect(self, layer: Layer[Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> _Tapped | None:
        """Put a hook on the output, or return what the output has to be tapped with."""
        x, engine = layer.input(layer.module, args, kwargs, output), self.engine()
        if x is None or engine is None or layer.proof.reason is not None:
            return None
        engine.note_gathered(layer, layer.module)
        x = all_of(x)
        _, index, use = self.address
        # What is as large as an input is kept as autograd keeps its own: checkpointing then recomputes it. No op can do
        # so with the output of a layer that processes divide among them.
        saves = layer.rule.keeps_input and _top_saved_tensors_default_hooks(True) is not None
        if saves and not is_distributed(output):
            return self._tapped(layer, x) if engine.claim(layer, (*args, *kwargs.values()), output) else None
        engine.look_behind(first_input(args, kwargs))
        if engine.look(index, use, x, output) and engine.claim(layer, (*args, *kwargs.values()), output):
            hook = OutputHook(self.engine, engine.sites[index], layer, *layer.rule.capture(layer.operation, x))
            take_derivative(output, hook)
            if layer.rule.keeps_input and output.grad_fn is not None:
                output.grad_fn.register_hook(hook.release)
            if layer.rule.reads_tokens and may_be_broadcast(x):
                hook.broadcast = engine.expect_rows(x, output)
        return None

    def _tapped(self, layer: Layer[Any], x: Tensor) -> _Tapped:
        captured, sizes = layer.rule.capture(layer.operation, x)
        return x, captured, self.token, [*self.address, *sizes]


class StackHook:
    """The hook on what a stack of matrices made: each matrix has a hook for its rows."""

    def __init__(self, hooks: Sequence[OutputHook], call: Call) -> None:
        assert call.split is not None
        self.hooks, self.split = hooks, call.split

    def __call__(self, grad: Tensor) -> None:
        for hook, part in zip(self.hooks, (part for part in self.split(grad) if part.numel()), strict=True):
            hook(part)


class OutputHook:
    """The hook on one output of one layer. The autograd graph keeps it alive, so it refers to the engine weakly."""

    def __init__(
        self,
        engine: Callable[[], Engine | None],
        site: Site[Any],
        layer: Layer[Any],
        captured: list[Tensor],
        sizes: list[int],
    ) -> None:
        self.engine, self.site, self.layer, self.sizes = engine, site, layer, sizes
        self.captured: list[Tensor] | None = captured
        self.versions = versions_of(captured)
        self.broadcast: Broadcast | None = None

    def __call__(self, grad: Tensor) -> None:
        engine = self.engine()
        if engine is not None:
            try:
                captured, sizes, grad = self._of_rows(self.layer, grad)
            except Exception as error:
                engine.fail(self.site, self.layer, error)
            else:
                engine.add(self.site, self.layer, captured, sizes, grad)

    def _of_rows(self, layer: Layer[Any], grad: Tensor) -> tuple[list[Tensor], list[int], Tensor]:
        """What was captured and the derivative, of every row that was served where the output was broadcast."""
        captured, grad = self._unchanged(layer), all_of(grad)
        if self.broadcast is not None and (by_row := self.broadcast.by_row(grad)) is not None:
            x, each = by_row
            return *layer.rule.capture(layer.operation, x), each
        return captured, self.sizes, grad

    def _unchanged(self, layer: Layer[Any]) -> list[Tensor]:
        if self.captured is None:
            raise RuntimeError(
                f"a second backward runs through module {layer.name!r}, whose input was freed by the first: specify "
                "retain_graph=True for that one"
            )
        if versions_of(self.captured) != self.versions:
            raise overwritten(layer, "its backward")
        return self.captured

    def release(self, *_: Any) -> None:
        """Let go of the input once the node of the layer has run, as autograd then lets go of what it saved."""
        if not _get_current_graph_task_keep_graph():
            self.captured = None
