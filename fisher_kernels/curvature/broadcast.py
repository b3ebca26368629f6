"""Uses of a layer whose output is broadcast: one row of it serves many, as position embeddings of (1, T) serve a batch.

The derivative of such an output is already the sum over all rows that were served, and squares of sums depend on how a
batch is split. What has the derivatives one by one is the addition that broadcasts. It is found in the graph behind the
input of a layer that comes next, and what it is handed in the backward pass is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisher_kernels.curvature.gathered import all_of

DEPTH = 6
"""How many operations may lie between the addition and the input of the layer that comes next."""

TRIES = 4
"""The inputs of how many layers are looked behind."""

LAYOUTS = ("RedistributeBackward", "_ToTorchTensorBackward", "_FromTorchTensorBackward")
"""Nodes of the graph that say in another way which process has what of a tensor."""


class Broadcast:
    """One use of a layer whose output may be broadcast.

    Args:
        x: the layer's input.
        output: of the layer.
    """

    def __init__(self, x: Tensor, output: Tensor) -> None:
        self.x = x
        self.node: Any = output.grad_fn  # kept, so that it is the same object when it is met again
        self.tries = TRIES
        self.rows: list[Tensor] = []

    def find(self, behind: Tensor) -> bool:
        """Look for the addition behind the input of another layer; whether there is no more to look for."""
        self.tries -= 1
        front, seen = [behind.grad_fn], set()
        for _ in range(DEPTH):
            parents = []
            for node in front:
                for parent, _ in () if node is None else node.next_functions:
                    if _origin(parent) is self.node:
                        assert node is not None
                        # Both terms of a sum have the derivative of the sum, unless one was multiplied.
                        if node.name() == "AddBackward0" and getattr(node, "_saved_alpha", 1) == 1:
                            node.register_prehook(self._keep)
                        return True
                    if parent not in seen:
                        seen.add(parent)
                        parents.append(parent)
            front = parents
        return self.tries == 0

    def _keep(self, grads: tuple[Tensor | None, ...]) -> None:
        self.rows += [all_of(grad).detach() for grad in grads if grad is not None]

    def by_row(self, grad: Tensor) -> tuple[Tensor, Tensor] | None:
        """Input and derivative of every row that was served, if they are known and add up to the derivative given.

        They do not if something else reads the output too. Waits for a GPU.
        """
        rows, self.rows = self.rows, []
        if rows and rows[0].shape[-1] != grad.shape[-1]:
            raise RuntimeError(
                f"{rows[0].shape[-1]} of {grad.shape[-1]} features are in this process where the output is broadcast"
            )
        if len(rows) != 1 or rows[0].numel() <= grad.numel() or not _add_up(rows[0], grad):
            return None
        return self.x.expand(rows[0].shape[:-1]), rows[0]


def _origin(node: Any) -> Any:
    """What made a tensor, behind changes of its layout."""
    while node is not None and node.name() in LAYOUTS:
        node = node.next_functions[0][0]
    return node


def _add_up(rows: Tensor, total: Tensor) -> bool:
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        return True  # nothing can be read now, and the steps before have found out
    eps = torch.finfo(total.dtype).eps
    wide = torch.promote_types(total.dtype, torch.float32)
    rows, total = rows.to(wide), total.to(wide)
    off = torch.linalg.vector_norm(rows.sum_to_size(total.shape) - total)
    return bool(off <= 8 * eps * torch.linalg.vector_norm(rows))


def may_be_broadcast(tokens: Tensor) -> bool:
    """Whether tokens are so few dimensions, or so short in one, that their rows may serve several."""
    return tokens.dim() < 2 or 1 in tokens.shape
