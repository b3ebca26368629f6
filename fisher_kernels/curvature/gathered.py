"""Parameters and activations that are DTensors: what ``fully_shard`` gathers for a forward, and what is all of one."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

_PLAIN = (Tensor, Parameter)


def is_distributed(x: Any) -> bool:
    """Whether a tensor is a DTensor, as ``fully_shard`` and ``parallelize_module`` make parameters."""
    if type(x) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # which takes its time to import
    return module is not None and isinstance(x, module.DTensor)


def is_gathered(p: Any, found: Any) -> bool:
    """Whether what a module has in the place of a DTensor parameter is what ``fully_shard`` gathered of it.

    That is the whole, or a DTensor on fewer dimensions of the mesh where layers are divided besides.
    """
    if not is_distributed(p) or not isinstance(found, Parameter) or found.shape != p.shape:
        return False
    return not is_distributed(found) or found.device_mesh.ndim < p.device_mesh.ndim  # type: ignore[attr-defined]


def all_of(x: Any) -> Tensor:
    """All of an activation or a derivative: of a DTensor every process of its mesh has to ask.

    Modes that count what a forward does, as selective checkpointing has them, do not see it.
    """
    if type(x) in _PLAIN:
        return x
    if is_distributed(x):
        with torch.no_grad(), _disable_current_modes():
            x = x.detach().full_tensor()
    # What is still on its way is a tensor of a class of its own, which no kernel reads.
    return x.wait() if hasattr(x, "trigger_wait") else x
