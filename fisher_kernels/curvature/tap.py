"""Statistics inside ``torch.compile``: an identity op that keeps what a layer's backward needs.

A hook on a tensor breaks the graph of a compiled model. So where a model is being compiled, the forward hook sends the
output of the layer through ``fisher_kernels::tap``, whose derivative passes the gradient on and calls
``fisher_kernels::commit_``: opaque to the compiler, it hands the gradient to the engine as the compiled backward runs.
That costs a copy of the output in steps that refresh the factors; other steps are compiled without it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_kernels._library import LIBRARY

_ENGINES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(number: int, engine: Any) -> None:
    """Let compiled backward passes find the engine by its number, for as long as it lives."""
    _ENGINES[number] = engine


def _tap(output: Tensor, x: Tensor, captured: Sequence[Tensor], token: Tensor, address: Sequence[int]) -> Tensor:
    number, index, use, *_ = address
    engine = _ENGINES.get(number)
    if engine is not None and index in engine.armed:
        engine.look(index, use, x, output)
    return output.clone()


def _tap_fake(output: Tensor, x: Tensor, captured: Sequence[Tensor], token: Tensor, address: Sequence[int]) -> Tensor:
    return torch.empty_like(output)


def _commit(grad: Tensor, captured: Sequence[Tensor], token: Tensor, address: Sequence[int]) -> None:
    number, index, use, *sizes = address
    engine = _ENGINES.get(number)
    if engine is not None and index in engine.armed:
        engine.commit(index, use, captured, sizes, grad)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, captured, token, ctx.address = inputs
    ctx.save_for_backward(token, *captured)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, list[None], None, None]:
    token, *captured = ctx.saved_tensors
    torch.ops.fisher_kernels.commit_(grad, captured, token, ctx.address)
    return grad, None, [None] * len(captured), None, None


_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("tap(Tensor output, Tensor x, Tensor[] captured, Tensor token, SymInt[] address) -> Tensor", tags=_TAGS)
LIBRARY.impl("tap", _tap, "CompositeExplicitAutograd")
torch.library.register_fake("fisher_kernels::tap", _tap_fake, lib=LIBRARY)
# The token is what the op says it changes, so that no compiler drops a call without results.
LIBRARY.define("commit_(Tensor grad, Tensor[] captured, Tensor(a!) token, SymInt[] address) -> ()", tags=_TAGS)
LIBRARY.impl("commit_", _commit, "CompositeExplicitAutograd")
torch.library.register_fake("fisher_kernels::commit_", lambda *args: None, lib=LIBRARY)
torch.library.register_autograd("fisher_kernels::tap", _backward, setup_context=_keep, lib=LIBRARY)


def tap(output: Tensor, x: Tensor, captured: Sequence[Tensor], token: Tensor, address: Sequence[int]) -> Tensor:
    """Returns the output unchanged; in the backward pass its derivative is also handed to an engine.

    The engine looks at input and output as they are computed, because nothing can be looked at while it is compiled.

    Args:
        output: of a layer.
        x: its input.
        captured: what the engine needs of the forward.
        token: a tensor that makes the compiler believe that the backward changes something.
        address: number of the engine, index of the site, number of the layer in it, and what sizes the rule captured.
    """
    return torch.ops.fisher_kernels.tap(output, x, captured, token, address)
