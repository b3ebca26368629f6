"""Uses of a layer whose output is broadcast: one row of it serves many, as position embeddings of (1, T) serve a batch.

The derivative of such an output is already the sum over all rows that were served, and squares of sums depend on how a
batch is split. What has the derivatives one by one is the addition that broadcasts. It is found in the graph behind the
input of a layer that comes next, and what it is handed in the backward pass is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DEPTH = 6
"""How many operations may lie between the addition and the input of the layer that comes next."""

TRIES = 4
"""The inputs of how many layers are looked behind."""


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
                    if parent is self.node:
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
        self.rows += [grad.detach() for grad in grads if grad is not None]

    def by_row(self, grad: Tensor) -> tuple[Tensor, Tensor] | None:
        """Input and derivative of every row that was served, if they are known and add up to the derivative given."""
        rows, self.rows = self.rows, []
        if len(rows) != 1 or rows[0].numel() <= grad.numel():
            return None
        (each,) = rows
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = each.to(wide).sum_to_size(grad.shape)
        # Not so if something else reads the output too.
        size = float(torch.linalg.vector_norm(each.to(wide)))
        if float((total - grad.to(wide)).norm()) > 8 * torch.finfo(grad.dtype).eps * size:
            return None
        return self.x.expand(each.shape[:-1]), each


def may_be_broadcast(tokens: Tensor) -> bool:
    """Whether tokens are so few dimensions, or so short in one, that their rows may serve several."""
    return tokens.dim() < 2 or 1 in tokens.shape
