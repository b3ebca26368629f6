"""Products of many small matrices and vectors: the matrices are read once, n^2 + 2 n numbers a block."""

import triton
import triton.language as tl
from torch import Tensor

from ._language import divmod_from
from ._launch import launch

_TILE = 1024
"""Numbers of matrices that a program reads at a time."""
_COLUMNS = 128
"""The longest part of a row in a tile; longer rows are read part by part."""
_WARPS = 4  # part of the order in which a row is added up, as the sizes of a tile are


@triton.jit(do_not_specialize=["n"])
def kernel(
    inverse,  # [rows, n], n rows a block
    vectors,  # [rows / n, n]
    out,  # [rows]
    rows: tl.int64,
    n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some rows of the matrices, one behind the other whatever block they belong to."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    here = (row < rows - first)[:, None]
    size = n.to(tl.int64)
    block, _ = divmod_from(first % size, row, size)
    matrix, vector = inverse + first * size, vectors + first // size * size
    of_row, of_block = row[:, None] * n, block[:, None] * n
    total = tl.zeros((ROWS, COLUMNS), inverse.dtype.element_ty)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = here & (column < n)
        total += tl.load(matrix + (of_row + column), mask, 0.0) * tl.load(vector + (of_block + column), mask, 0.0)
    tl.store(out + first + row, tl.sum(total, 1), row < rows - first)


def apply(inverse: Tensor, vectors: Tensor, out: Tensor) -> None:
    """The products of contiguous matrices and vectors."""
    n = vectors.shape[1]
    columns = min(triton.next_power_of_2(max(n, 1)), _COLUMNS)
    rows = _TILE // columns
    launch(
        kernel, triton.cdiv(vectors.numel(), rows), vectors.device,
        inverse, vectors, out, vectors.numel(), n,
        ROWS=rows, COLUMNS=columns, warps=_WARPS,
    )  # fmt: skip
