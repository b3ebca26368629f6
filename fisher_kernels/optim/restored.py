"""A model and its optimizer are put back where they were, to the bit, whatever is tried meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fisher_kernels.optim.base import FisherOptimizer

PutBack = Callable[[], None]


@contextmanager
def restored(optimizer: Optimizer, model: nn.Module, also: Sequence[Any] = ()) -> Iterator[None]:
    """Put everything back at the end of the block, also where that is an error.

    That is parameters, gradients, buffers and modes of modules, state and settings of the optimizer, what it has
    collected since its last step, what its reports count, and torch's random numbers, those of the GPUs in use among
    them. Tensors stay where they are and get their values back, so that what refers to them, a CUDA graph for one,
    stays right. Meanwhile there is a second copy of all.

    Args:
        also: what is put back by its ``state_dict`` and ``load_state_dict``: a schedule, a scaler.
    """
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [*dict.fromkeys([*model.parameters(), *model.buffers(), *grouped])]
    devices = {x.device.index for x in tensors if x.is_cuda} - {None}
    back = [_tensors(tensors), _modules(model), _optimizer(optimizer), *map(_by_state, also)]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for put_back in back:
                put_back()


def _tensors(tensors: Sequence[Tensor]) -> PutBack:
    kept = [(x, x.detach().clone(), x.grad, None if x.grad is None else x.grad.clone()) for x in tensors]

    def put_back() -> None:
        for x, value, grad, gradient in kept:
            x.copy_(value)
            x.grad = grad if grad is None or gradient is None else grad.copy_(gradient)

    return put_back


def _modules(model: nn.Module) -> PutBack:
    # Of those that are scripted, buffers are no dictionary, which nobody can change.
    buffers = [(m._buffers, dict(m._buffers)) for m in model.modules() if isinstance(m._buffers, dict)]
    modes = [(module, module.training) for module in model.modules()]

    def put_back() -> None:
        for held, were in buffers:
            held.clear()
            held.update(were)
        for module, training in modes:
            module.training = training

    return put_back


def _optimizer(optimizer: Optimizer) -> PutBack:
    """State and settings; the same dictionaries and tensors are in their places afterwards."""
    ours = optimizer if isinstance(optimizer, FisherOptimizer) else None
    optimizer.state_dict()  # what is made or sent beside training is waited for, and put into the state
    states = {p: (entries, _dictionary(entries)) for p, entries in optimizer.state.items()}
    groups = [(group, list(group["params"]), _dictionary(group, but="params")) for group in optimizer.param_groups]
    beside = None if ours is None else ours._keep_beside()

    def put_back() -> None:
        optimizer.state_dict()
        optimizer.state.clear()
        for p, (entries, values) in states.items():
            values()
            optimizer.state[p] = entries
        for group, params, settings in groups:
            settings()
            group["params"] = params
        optimizer.param_groups[:] = [group for group, _, _ in groups]
        if ours is not None and beside is not None:
            ours._put_in_place()
            beside()

    return put_back


def _dictionary(values: MutableMapping[Any, Any], but: str | None = None) -> PutBack:
    kept = [
        (name, value, value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value))
        for name, value in values.items()
        if name != but
    ]

    def put_back() -> None:
        values.clear()
        values.update({name: x.copy_(y) if isinstance(x, Tensor) else y for name, x, y in kept})

    return put_back


def _by_state(thing: Any) -> PutBack:
    state = copy.deepcopy(thing.state_dict())
    return lambda: thing.load_state_dict(state)
