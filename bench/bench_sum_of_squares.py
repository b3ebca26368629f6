"""Sums of squares: one read of the input each.

Before each timed call the input is read once, as the layer does in whose forward hook the sums are taken.
"""

from __future__ import annotations

import pytest
import torch

from bench.baselines import rows_and_slices, unfold_of_the_sum, unfold_of_x
from bench.interleaved import Case, RunCase
from bench.limits import stream_read
from fisher_kernels.ops import channel_sum_of_squares, column_sum_of_squares, patch_sum_of_squares


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1)])
def test_patch_sum_of_squares(run_case: RunCase, kernel: int, stride: int) -> None:
    x = torch.randn(64, 128, 32, 32)
    geometry = (kernel, stride, kernel // 2)
    for form in (unfold_of_the_sum, rows_and_slices, unfold_of_x):
        torch.testing.assert_close(patch_sum_of_squares(x, *geometry), form(x, *geometry), rtol=1e-4, atol=0)
    run_case(
        Case(
            op="patch_sum_of_squares",
            shape=f"64 x 128 x 32 x 32, {kernel} x {kernel}, stride {stride}",
            dtype=torch.float32,
            ours=lambda: patch_sum_of_squares(x, *geometry),
            baselines={
                "unfold of the sum": lambda: unfold_of_the_sum(x, *geometry),
                "addcmul_ and slices": lambda: rows_and_slices(x, *geometry),
                "unfold of x": lambda: unfold_of_x(x, *geometry),
            },
            gates={"unfold of the sum": 12.0, "addcmul_ and slices": 2.5, "unfold of x": 150.0},
            bytes_moved=x.nbytes,
            limit=lambda: stream_read(x),
            at_limit=0.8,
            before=lambda: stream_read(x),
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_and_columns", [(65536, 256), (4096, 4096)])
def test_column_sum_of_squares(run_case: RunCase, rows_and_columns: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(rows_and_columns).to(dtype)
    run_case(
        Case(
            op="column_sum_of_squares",
            shape=" x ".join(map(str, rows_and_columns)),
            dtype=dtype,
            ours=lambda: column_sum_of_squares(x),
            baselines={"x.float().square().sum(0)": lambda: x.float().square().sum(0)},
            bytes_moved=x.nbytes,
            limit=lambda: stream_read(x),
            before=lambda: stream_read(x),
        )
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channel_sum_of_squares(run_case: RunCase, layout: torch.memory_format) -> None:
    x = torch.randn(64, 128, 32, 32).contiguous(memory_format=layout)
    as_it_lies = x.movedim(1, -1) if layout == torch.channels_last else x
    run_case(
        Case(
            op="channel_sum_of_squares",
            shape=f"64 x 128 x 32 x 32, {str(layout).removeprefix('torch.')}",
            dtype=torch.float32,
            ours=lambda: channel_sum_of_squares(x),
            baselines={"x.square().sum((0, 2, 3))": lambda: x.square().sum((0, 2, 3))},
            bytes_moved=x.nbytes,
            limit=lambda: stream_read(as_it_lies),
            before=lambda: stream_read(as_it_lies),
        )
    )
