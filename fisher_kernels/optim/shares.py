"""Parameters of which each process has a share: what torch divides, and what is to be said of it.

An optimizer that reads a norm over all parameters, or statistics of whole layers, would take those of its share for the
whole, and nothing would tell. Torch's own optimizers work on one number at a time and need not ask.
"""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch.nn import Parameter

from fisher_kernels.optim.caller import calling

_ZERO = ("torch.distributed.optim.zero_redundancy_optimizer", "ZeroRedundancyOptimizer")
_REMOTE = ("torch.distributed.optim.optimizer", "_LocalOptimizer")


def is_distributed(p: Parameter) -> bool:
    """Whether a parameter is a DTensor, as ``fully_shard`` and ``parallelize_module`` make them."""
    module = sys.modules.get("torch.distributed.tensor")  # which takes its time to import
    return module is not None and isinstance(p, module.DTensor)


def is_flattened(p: Parameter) -> bool:
    """Whether a parameter is one of FullyShardedDataParallel over several processes, or a part of one."""
    return getattr(p, "_fsdp_flattened", False) and dist.is_initialized() and dist.get_world_size() > 1


def divider() -> str | None:
    """The optimizer that is making one for a share of the parameters right now, by name, or None."""
    if (zero := _class(*_ZERO)) is not None and (found := calling(zero)) is not None and found.world_size > 1:
        return "ZeroRedundancyOptimizer"
    if (remote := _class(*_REMOTE)) is not None and calling(remote) is not None:
        return "DistributedOptimizer"
    return None


def _class(module: str, name: str) -> type | None:
    """A class of torch, if its module was imported: nobody uses it otherwise."""
    return getattr(sys.modules.get(module), name, None)
