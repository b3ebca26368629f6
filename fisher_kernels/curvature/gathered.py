"""Parameters that ``fully_shard`` gathers for a forward: the model has whole ones in place of the DTensors it holds."""

from __future__ import annotations

import sys
from typing import Any

from torch.nn import Parameter


def is_distributed(x: Any) -> bool:
    """Whether a tensor is a DTensor, as ``fully_shard`` and ``parallelize_module`` make parameters."""
    module = sys.modules.get("torch.distributed.tensor")  # which takes its time to import
    return module is not None and isinstance(x, module.DTensor)


def is_gathered(p: Parameter, found: Any) -> bool:
    """Whether what a module has in the place of a DTensor parameter is the whole of it."""
    return is_distributed(p) and isinstance(found, Parameter) and not is_distributed(found) and found.shape == p.shape
