"""K-FAC of the package asdfghjkl on these kernels: ``python examples/backend/asdfghjkl_kfac.py``.

The package (its module is ``asdl``, ``pip install 'fisher_kernels[compare]'``) makes Kronecker factors by
``torch.matmul`` and inverts them by a Cholesky factorisation. ``on_these_kernels`` hands both to ``fisher_kernels.ops``
without a change in the package, by putting other functions in the place of three of its own. The program trains the
same network with and without, and prints by how much the weights differ and what an iteration takes.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from statistics import median
from unittest.mock import patch

import asdl.operations.operation
import asdl.symmatrix
import torch
from asdl.operations import Linear
from asdl.precondition import KfacGradientMaker, PreconditioningConfig
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels import ops


def gram(module: nn.Module, rows: Tensor) -> Tensor:
    """``rows.T @ rows``, half of which the kernel computes and mirrors."""
    n = rows.shape[1]
    out = rows.new_empty(n, n, dtype=ops.ACCUMULATOR[rows.dtype])
    ops.weighted_gram_(out, rows.detach())
    return out.to(rows.dtype)


def inverse(matrix: Tensor, damping: float = 1e-7) -> Tensor:
    """The inverse of ``matrix + damping I``, and the error that torch raises where that is not positive definite."""
    inverses, info = ops.block_inverse(matrix[None], float(damping))
    if info.item():
        raise torch.linalg.LinAlgError(f"a factor of {len(matrix)} rows is not positive definite with its damping")
    return inverses[0]


@contextlib.contextmanager
def on_these_kernels() -> Iterator[None]:
    """Let asdfghjkl take its Gram matrices of Linear layers and its inverses from here."""
    with contextlib.ExitStack() as patches:
        for name in ("cov_kron_A", "cov_kron_B"):
            patches.enter_context(patch.object(Linear, name, staticmethod(gram)))
        for module in (asdl.symmatrix, asdl.operations.operation):
            patches.enter_context(patch.object(module, "cholesky_inv", inverse))
        yield


@contextlib.contextmanager
def without_nvtx() -> Iterator[None]:
    """Let asdfghjkl run on a torch that was built without CUDA: it marks what it does for NVIDIA's profiler."""
    if torch.version.cuda is not None:
        yield
        return
    with patch.object(torch.cuda.nvtx, "range", lambda *_: contextlib.nullcontext()):
        yield


def train(steps: int, width: int = 32, batch: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """All weights at the end, as one vector, and the median of the seconds of an iteration."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))
    model.to(dtype)
    teacher = torch.randn(20, 5, dtype=dtype)
    config = PreconditioningConfig(damping=0.03, ema_decay=0.1, data_size=batch)
    maker = KfacGradientMaker(model, config, fisher_type="fisher_emp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    seconds = []
    with without_nvtx():
        for _ in range(steps):
            x = torch.randn(batch, 20, dtype=dtype)
            y = (x @ teacher).argmax(1)
            start = time.perf_counter()
            optimizer.zero_grad()
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
            maker.forward_and_backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), median(seconds)


def main() -> None:
    """Compare both, by turns so that what else the machine does meets both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    theirs, ours = [], []
    for _ in range(options.rounds):
        expected, seconds = train(options.steps, options.width, options.batch)
        theirs.append(seconds)
        with on_these_kernels():
            found, seconds = train(options.steps, options.width, options.batch)
        ours.append(seconds)
    difference = (found - expected).norm() / expected.norm()
    print(f"weights after {options.steps} steps differ by {difference:.1e}")
    print(f"an iteration takes {min(theirs) * 1e3:.2f} ms as it is, {min(ours) * 1e3:.2f} ms on these kernels")


if __name__ == "__main__":
    main()
