"""A checkpoint that goes on with another number of processes.

The directory for checkpoints is what is named:

    torchrun --standalone --nproc-per-node 2 examples/distributed/resume.py /tmp/checkpoints
    torchrun --standalone --nproc-per-node 3 examples/distributed/resume.py /tmp/checkpoints

Every call trains for 40 steps, from the beginning or from the last checkpoint, with one after every 20. So a process
that torchrun starts again after a failure, with as many others as are left, goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from problem import batch, leave, network, tell
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from fisher_kernels import MBF


def main(folder: Path, steps: int) -> None:
    """Train in all processes of torchrun, with checkpoints in a directory."""
    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (processes,)))
    optimizer = MBF(model, lr=1e-3)

    def state() -> dict[str, Any]:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        return {"model": of_model, "optimizer": of_optimizer}

    # One whose writing was interrupted has no such file.
    first = max((int(there.parent.name) for there in folder.glob("*/.metadata")), default=0)
    if first:
        saved = state()  # what it is loaded into
        dcp.load(saved, checkpoint_id=folder / str(first))
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    for step in range(first, first + steps):
        x, y = (part.tensor_split(processes)[rank] for part in batch(step, 0, 1))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            tell(step + 1, loss)
            dcp.save(state(), checkpoint_id=folder / str(step + 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    main(**vars(parser.parse_args()))
    leave()
