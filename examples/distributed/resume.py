"""A checkpoint that goes on with another number of processes.

The directory for checkpoints is what is named:

    torchrun --standalone --nproc-per-node 2 examples/distributed/resume.py /tmp/checkpoint
    torchrun --standalone --nproc-per-node 3 examples/distributed/resume.py /tmp/checkpoint

Every call trains for 40 steps, from the beginning or from where the last one has stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from problem import batch, network, tell
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from fisher_kernels import MBF


def main(folder: Path) -> None:
    """Train in all processes of torchrun, with checkpoints in a directory."""
    dist.init_process_group("gloo")  # "nccl" on GPUs
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = MBF(model, lr=1e-3)

    def state() -> dict[str, Any]:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        return {"model": of_model, "optimizer": of_optimizer}

    first = max((int(there.name) for there in folder.glob("*")), default=0)
    if first:
        saved = state()  # what it is loaded into
        dcp.load(saved, checkpoint_id=folder / str(first))
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    for step in range(first, first + 40):
        x, y = (part.tensor_split(dist.get_world_size())[dist.get_rank()] for part in batch(step, 0, 1))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            tell(step + 1, loss)
    dcp.save(state(), checkpoint_id=folder / str(first + 40))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
