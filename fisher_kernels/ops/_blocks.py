"""What the ops on many small square matrices share: checks, and symmetric ones stored as triangles."""

from __future__ import annotations

import torch
from torch import Tensor


def check_blocks(op: str, name: str, blocks: Tensor) -> None:
    """Blocks are (B, n, n), float32 or float64."""
    if blocks.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} has dtype {blocks.dtype}, expected float32 or float64")
    if not (blocks.dim() == 3 and blocks.shape[1] == blocks.shape[2]):
        raise ValueError(f"{op}: {name} has shape {tuple(blocks.shape)}, expected (B, n, n)")


def check_partner(op: str, name: str, x: Tensor, shape: torch.Size, like: str, blocks: Tensor) -> None:
    """What goes with blocks has their dtype and device, and a shape that follows from theirs."""
    if x.dtype != blocks.dtype:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {blocks.dtype}, the dtype of {like}")
    if x.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    if x.device != blocks.device:
        raise ValueError(f"{op}: {name} is on {x.device}, expected {blocks.device}, the device of {like}")


def new_info(blocks: Tensor) -> Tensor:
    """An uninitialised status for each block."""
    return blocks.new_empty(blocks.shape[:1], dtype=torch.int64)


def pack(blocks: Tensor) -> Tensor:
    """(B, n (n + 1) / 2), the lower triangles of symmetric (B, n, n), row by row."""
    rows, columns = torch.tril_indices(*blocks.shape[1:], device=blocks.device)
    return blocks[:, rows, columns]


def unpack(packed: Tensor, n: int) -> Tensor:
    """(B, n, n) from the lower triangles."""
    index = torch.arange(n, device=packed.device)
    low, high = torch.minimum(index[:, None], index), torch.maximum(index[:, None], index)
    return packed[:, high * (high + 1) // 2 + low]
