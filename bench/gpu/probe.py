"""Whether tensor cores do what the CUDA kernels take them to do: 1 where not, and then they go without."""

from __future__ import annotations

import sys

import torch

from fisher_kernels import backends
from fisher_kernels._library import CUDA

WRAPPERS = ("matrices read transposed", "products of bfloat16", "products of float16")


def wrong_numbers() -> dict[str, int]:
    """How many numbers each wrapper in ``csrc/cuda/mma.cuh`` has wrong, of every place of its matrices."""
    wrong = torch.full((len(WRAPPERS),), -1, device=backends.device_type("cuda"))
    CUDA.kernels.probe_tensor_cores(wrong, CUDA.place(wrong.device))
    return dict(zip(WRAPPERS, wrong.tolist(), strict=True))


def main() -> int:
    """The command."""
    reason = backends.reasons()["cuda"]
    if reason is not None:
        print(f"not probed: {reason}")
        return 0
    wrong = wrong_numbers()
    for wrapper, count in wrong.items():
        print(f"{wrapper}: {'as expected' if count == 0 else f'{count} numbers are wrong'}")
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
