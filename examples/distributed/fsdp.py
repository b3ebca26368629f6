"""FSDP2 and HSDP: ``torchrun --standalone --nproc-per-node 4 examples/distributed/fsdp.py --replicas 2``.

Each layer is divided by rows over the processes of a replica of the model; with one replica that is all of them.
"""

from __future__ import annotations

import argparse

import torch.distributed as dist
from problem import batch, leave, network, tell
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from fisher_kernels import KFAC


def main() -> None:
    """Train in all processes of torchrun."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=1, help="how many processes have the same shard")
    replicas = parser.parse_args().replicas
    dist.init_process_group("gloo")  # "nccl" on GPUs
    shape = (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    model = network()
    for layer in (model[0], model[3], model[5]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = KFAC(model, lr=0.1)  # of the sharded model
    for step in range(60):
        x, y = batch(step, dist.get_rank(), dist.get_world_size())
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            tell(step + 1, loss)


if __name__ == "__main__":
    main()
    leave()
