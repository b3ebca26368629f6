"""Files in the format of MNIST, as small as a test wants them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor


def write(path: Path, values: Tensor) -> None:
    """An array of unsigned bytes, compressed where the name ends in .gz."""
    content = bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape)
    content += bytes(values.flatten().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def fashion(folder: Path, training: int = 120, test: int = 40, suffix: str = ".gz") -> Path:
    """Stand-ins for the files of Fashion-MNIST: a bright bar in the rows of the class."""
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", training), ("t10k", test)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 100, (count, 28, 28), generator=generator)
        rows = torch.arange(28)[None, :, None] // 2
        images += 155 * (rows == 2 + labels[:, None, None]).expand(-1, -1, 28)
        write(folder / f"{name}-images-idx3-ubyte{suffix}", images.to(torch.uint8))
        write(folder / f"{name}-labels-idx1-ubyte{suffix}", labels.to(torch.uint8))
    return folder
