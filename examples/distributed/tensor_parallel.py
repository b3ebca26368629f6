"""FSDP2 and tensor parallelism: ``torchrun --standalone --nproc-per-node 4 examples/distributed/tensor_parallel.py``.

Two processes share the columns and rows of the matrices, and each pair of them has its part of a batch. Statistics are
those of whole layers, and each sample counts once.
"""

from __future__ import annotations

import torch.distributed as dist
from problem import batch, leave, network, tell
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from fisher_kernels import KFAC


def main() -> None:
    """Train in all processes of torchrun."""
    dist.init_process_group("gloo")  # "nccl" on GPUs
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    model = network()
    plan = {"3": ColwiseParallel(), "5": RowwiseParallel(output_layouts=Replicate())}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    optimizer = KFAC(model, lr=0.1)  # of the model that is divided
    for step in range(60):
        x, y = batch(step, mesh.get_local_rank("data"), mesh["data"].size())
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            tell(step + 1, loss)


if __name__ == "__main__":
    main()
    leave()
