"""What tests of Triton's kernels share: its interpreter runs them on CPU tensors, and takes a hundred times as long."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fisher_kernels import backends

interpreted = pytest.mark.skipif(
    not (backends.is_interpreted() and "triton" in backends.available()), reason="needs Triton and its interpreter"
)


def only_program(monkeypatch: pytest.MonkeyPatch, kernels: Any, number: int) -> None:
    """Of what a module launches, one program runs: a late one of so many that all would take days."""
    from triton.runtime.interpreter import interpreter_builder

    def launch(kernel: Any, programs: Any, *args: Any, **options: Any) -> None:
        every(kernel, 1, *args, **options)

    def set_grid_idx(*_: int) -> None:
        interpreter_builder.grid_idx = (number, 0, 0)

    every = kernels.launch
    monkeypatch.setattr(kernels, "launch", launch)
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)


FAR_CHUNKS = 2**18
"""So many chunks of 8,192 elements begin beyond what 32 bits can count."""


def far(make: Callable[..., Any], sizes: tuple[int, ...], starts: int | None = None) -> Callable[..., Any]:
    """A ``table`` in which tensors of one chunk are the last of 2^31 elements that nobody has.

    Args:
        make: the table of what is there.
        sizes: bytes of an element in each of the first lists.
        starts: a column of the layout that counts elements from the start of a tensor, as addresses do bytes.
    """

    def table(*args: Any, **kwargs: Any) -> Any:
        plan = make(*args, **kwargs)
        elements = 8192 * FAR_CHUNKS
        addresses, layout = plan.addresses.clone(), plan.layout.clone()
        for row, size in enumerate(sizes):
            addresses[row] -= elements * size
        layout[:, 0] += elements
        if starts is not None:
            layout[:, starts] -= elements
        launches = [
            entry._replace(chunks=entry.chunks + torch.tensor([0, FAR_CHUNKS], dtype=torch.int32))
            for entry in plan.launches
        ]
        return dataclasses.replace(plan, addresses=addresses, layout=layout, launches=launches)

    return table


def far_partials(plan: Any, kinds: int, device: torch.device) -> torch.Tensor:
    """``new_partials`` for such a table of one tensor."""
    return torch.zeros(kinds, FAR_CHUNKS + 1, dtype=torch.float64)


def far_sums(plan: Any, partials: torch.Tensor) -> torch.Tensor:
    """``add_chunks`` for such a table of one tensor, all others being 0."""
    return partials[:, -1:].contiguous()
