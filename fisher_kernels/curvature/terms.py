"""How many terms the loss of each backward has, seen from the derivatives that arrive."""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch.autograd import Variable
from torch.utils.checkpoint import CheckpointFunction

from fisher_kernels.curvature.gathered import all_of
from fisher_kernels.curvature.pipeline import running_stage
from fisher_kernels.curvature.rules import is_transposed_linear, unsqueeze_batch
from fisher_kernels.ops import ACCUMULATOR


class _Backward:
    """A backward that is running: how many terms its loss has, and for which sums that has been counted.

    One that runs within another belongs to the same loss, so what either has counted is counted for both.

    Attributes:
        terms: of shape (1,); None before the first layer.
        unknown: why nobody can tell.
        outputs: the derivatives by the model's outputs that have arrived before it.
        stage: the number of the stage of a pipeline that it goes through; None where there is none.
    """

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.terms: Tensor | None = None
        self.counted: set[Any] = set()
        self.stage: int | None = None
        self.unknown: str | None = None
        self.outputs: list[Tensor] = []
        self.ended = False

    def __call__(self) -> None:
        """What the engine calls at its end, and keeps until then; one that ends in an error is not called, but let go.

        That others may keep it longer, as whoever goes through all objects does, is no reason to take it for running.
        """
        self.ended = True


class Terms:
    """How many terms the loss of each backward has.

    The first layer whose derivative arrives is the last one of the forward, be it trained or not. Its rows are the
    terms, but for those whose derivative is zero throughout: samples of a classifier, pixels of a segmentation, tokens
    of a language model without those that a mask leaves out. If the model's output has another size, because something
    between the two pools, interpolates or picks, its own rows are the terms: the first dimension of an output of two,
    else all dimensions but the one that the layer's features lie on. A backward within another, as activation
    checkpointing starts them, has the terms of the outer one. Where they are known, :meth:`given` says so.

    Attributes:
        wanted: whether statistics are taken now.
        of_samples: whether every entry of the first dimension of the output is one term, whatever its other ones are.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.of_samples = False
        self._running: weakref.WeakValueDictionary[int, _Backward] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()  # backward passes may run in several threads
        self._given: int | None = None
        self._hidden = False  # in a backward within another, before that one had brought anything
        # Whether terms were given -> backward -> its stage and terms.
        self._pending: dict[bool, dict[int, tuple[int | None, Tensor]]] = {}
        self._stages: dict[Any, int | None] = {}  # by what sums are of

    def pending(self, key: Any = None) -> Tensor:
        """Those of all backward passes since :meth:`clear` that brought sums, of shape (1,).

        Where some were given, of these alone. Of several stages of a pipeline each has backward passes of its own, of
        the same loss: those of the stage that has brought sums of the key count, or of the one with the most terms.
        """
        found: dict[int | None, Tensor] = {}
        for stage, terms in (self._pending.get(True) or self._pending.get(False) or {}).values():
            found[stage] = terms + found[stage].to(terms) if stage in found else terms
        if key in self._stages and self._stages[key] in found:
            return found[self._stages[key]]
        sums = list(found.values()) or [torch.zeros(1, dtype=torch.float32, device="cpu")]
        return torch.stack([terms.to(sums[0]) for terms in sums]).amax(0)

    def keep_pending(self) -> Callable[[], None]:
        """Keep those of the backward passes that there were; returns what puts them back."""
        pending, stages = {given: {**passed} for given, passed in self._pending.items()}, {**self._stages}

        def put_back() -> None:
            self._pending, self._stages = pending, stages

        return put_back

    def clear(self) -> None:
        """Forget the terms of the backward passes that there were."""
        self._pending, self._stages = {}, {}

    @contextmanager
    def given(self, number: int) -> Iterator[None]:
        """Let the backward passes that begin within have so many terms."""
        self._given = number
        try:
            yield
        finally:
            self._given = None

    # What arrives.

    def expect(self, operation: Any, output: Any) -> None:
        """Look at the derivative by an output, which a forward has just made.

        Args:
            operation: what the module is, as a layer of torch's own class; None for the whole model.
        """
        if self.wanted:
            for t in _tensors(output):
                plain = t.is_floating_point() and t.layout == torch.strided and not t.is_nested
                if plain and t.grad_fn is not None and t.dim() and _fits(operation, t):
                    t.register_hook(partial(self._arrive, operation, running_stage()))

    def _arrive(self, operation: Any, stage: int | None, grad: Tensor) -> None:
        with self._lock:
            backward = self._backward()
            if backward.terms is not None:
                return
            backward.stage = stage
            grad = all_of(grad)
            if operation is None:
                backward.outputs.append(grad)
            else:
                self._find(backward, operation, grad)

    def count(self, key: Any, operation: Any, grad: Tensor) -> Tensor:
        """The number of terms, of shape (1,), where a backward brings the first sums of this kind; else zero.

        Args:
            key: what the sums are of. Those of several uses add up, and the terms of these uses are the same.
            operation, grad: a layer, and the derivative by its output that has arrived.
        """
        with self._lock:
            backward = self._backward()
            if backward.terms is None:
                self._find(backward, operation, grad)
            if self._hidden:
                raise RuntimeError(
                    "the last layer is within a checkpoint of use_reentrant=True, where the number of terms of the "
                    "loss cannot be seen: take use_reentrant=False"
                )
            if backward.unknown is not None or backward.terms is None:
                raise RuntimeError(backward.unknown or "the number of terms of the loss cannot be seen")
            terms = backward.terms.to(grad.device, ACCUMULATOR[grad.dtype])
            if not backward.counted:  # one that is asked for derivatives alone brings no sums
                found = backward.stage, backward.terms
                self._pending.setdefault(self._given is not None, {})[_current_graph_task_id()] = found
            self._stages[key] = backward.stage
            if key in backward.counted:
                return torch.zeros_like(terms)
            backward.counted.add(key)
        return terms

    def forget(self, last: int) -> None:
        """Forget the terms of backward passes whose gradients are gone, up to this one."""
        with self._lock:
            for given, passed in self._pending.items():
                self._pending[given] = {task: found for task, found in passed.items() if task > last}

    def _backward(self) -> _Backward:
        """The backward that is running, or the one that it runs within if that has no terms yet."""
        task, thread = _current_graph_task_id(), threading.get_ident()
        backward = self._running.get(task)
        if backward is None:
            # One that has begun within another runs in the same thread; others may run beside it.
            others = (other for other in self._running.values() if not other.ended)
            outer = next((other for other in others if other.thread == thread), None)
            if outer is not None and outer.terms is None:
                return outer
            backward = _Backward(thread)
            if outer is not None:
                backward.terms, backward.counted, backward.stage = outer.terms, outer.counted, outer.stage
                backward.unknown = outer.unknown
            if task >= 0:
                self._running[task] = backward
                Variable._execution_engine.queue_callback(backward)
        return backward

    # The number.

    def _find(self, backward: _Backward, operation: Any, grad: Tensor) -> None:
        """Find the terms, given the derivative by the last layer's output."""
        backward.terms = self._terms_of(backward, operation, grad)

    def _terms_of(self, backward: _Backward, operation: Any, grad: Tensor) -> Tensor:
        self._hidden = self._hidden or (self._given is None and not backward.outputs and _is_within_checkpoint())
        outputs, backward.outputs = backward.outputs, []
        if self._given is not None:
            return torch.full((1,), self._given, dtype=torch.float32, device=grad.device)
        rows = self._rows(outputs, operation, grad)
        if rows is not None:
            return rows.ne(0).any(1).sum(dtype=torch.float32).reshape(1)
        backward.unknown = (
            f"the model's output has shape {tuple(outputs[0].shape)}, that of its last layer {tuple(grad.shape)}, "
            "and which of its numbers are one term of the loss cannot be seen: take loss_terms='samples' if each "
            "sample is one, or fisher='sampled'"
        )
        return torch.zeros(1, dtype=torch.float32, device=grad.device)

    def _rows(self, outputs: Sequence[Tensor], operation: Any, grad: Tensor) -> Tensor | None:
        """A derivative with a row for each term that there may be; None if nobody can tell."""
        if self.of_samples:
            derivative = outputs[0] if outputs else _batched(operation, grad)
            return derivative.reshape(len(derivative), -1)
        rows = as_rows(operation, grad)
        if not outputs or any(output.numel() == grad.numel() for output in outputs):
            return rows
        for output in outputs:
            if output.dim() <= 2:
                return output.reshape(len(output), -1)
            dim = 1 if _has_channels(operation) else -1
            if output.shape[dim] == rows.shape[1]:
                return output.movedim(dim, -1).reshape(-1, rows.shape[1])
            if output.numel() == output.shape[dim] * len(rows):  # some of the features, or in another shape
                return rows
        return None


def _is_within_checkpoint() -> bool:
    """Whether this is called in the backward of a checkpoint that starts one of its own."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.backward.__code__:
        frame = frame.f_back
    return frame is not None


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a module returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _tensors(part)


# Layouts.


def _has_channels(module: Any) -> bool:
    """Whether the features of a layer lie on the dimension behind that of samples; on the last ones else."""
    last = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.Linear, nn.Embedding)) or is_transposed_linear(module)
    return not last


def _batched(module: Any, grad: Tensor) -> Tensor:
    """A derivative by a layer's output with its dimension of samples."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return unsqueeze_batch(grad, len(module.kernel_size))
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return unsqueeze_batch(grad, module._get_no_batch_dim() - 1)
    own = len(module.normalized_shape) if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else 1
    return grad.unsqueeze(0) if not _has_channels(module) and grad.dim() <= own else grad


def as_rows(module: Any, grad: Tensor) -> Tensor:
    """A derivative by a layer's output as (rows, features)."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return grad.reshape(-1, math.prod(module.normalized_shape))
    if not _has_channels(module):
        return grad.reshape(-1, grad.shape[-1])
    grad = _batched(module, grad)
    return grad.movedim(1, -1).reshape(-1, grad.shape[1])


def _fits(module: Any, output: Tensor) -> bool:
    """Whether an output can be that of a layer of its class; a layer that is not trained here is not compared."""
    if module is None:
        return True
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return output.shape[-len(module.normalized_shape) :] == tuple(module.normalized_shape)
    if not _has_channels(module):
        weight = module._parameters.get("weight")
        features = -1 if weight is None else weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1]
        return int(output.shape[-1]) == features
    if isinstance(module, nn.modules.conv._ConvNd):
        spatial = len(module.kernel_size)
        return output.dim() in (spatial + 1, spatial + 2) and output.shape[-spatial - 1] == module.out_channels
    return output.dim() >= 2
