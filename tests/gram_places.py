"""A kernel that tells which tiles Triton's weighted_gram_ works on; to be imported where there is Triton."""

import triton
import triton.language as tl

from fisher_kernels.triton_kernels._language import tile_of_triangle


@triton.jit
def places(rows, columns, tiles, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    row, column = tile_of_triangle(tl.load(tiles + at))
    tl.store(rows + at, row)
    tl.store(columns + at, column)
