"""DistributedDataParallel: ``torchrun --standalone --nproc-per-node 2 examples/distributed/ddp.py``.

Statistics are added up over the processes of DistributedDataParallel, once in each step that refreshes them.
"""

from __future__ import annotations

import torch.distributed as dist
from problem import batch, leave, network, tell
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fisher_kernels import AdaFisherW


def main() -> None:
    """Train in all processes of torchrun."""
    dist.init_process_group("gloo")  # "nccl" on GPUs
    model = DistributedDataParallel(network())
    optimizer = AdaFisherW(model, lr=3e-3, weight_decay=0.01)
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
