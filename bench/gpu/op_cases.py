"""Statistics and inverses: sums of squares, Gram matrices, blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import columns_of_patches, outer_products_of_patches, rows_and_slices, unfold_of_the_sum
from bench.gpu.case import Case, Work
from bench.gpu.timing import Run
from fisher_kernels import ops

DAMPING = 0.1
SAMPLES = 4096
"""Blocks that an inverse is checked on."""

F32, BF16 = torch.float32, torch.bfloat16


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    """To a fraction of the largest entry."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=rtol * scale)


def summed(op: Run, definition: Run, x: Tensor, baselines: dict[str, Run]) -> Work:
    """An op that reads x once; the definition sums in float64."""
    return Work(op, baselines, lambda: close(op(), definition()), x.nbytes)


def column_sums(rows: int, columns: int, dtype: torch.dtype, compile_: bool, device: torch.device) -> Work:
    x = torch.randn(rows, columns, device=device).to(dtype)

    def eager(x: Tensor) -> Tensor:
        return x.float().square().sum(0)

    def definition() -> Tensor:
        return torch.stack([part.double().square().sum(0) for part in x.split(4096)]).sum(0)

    baselines: dict[str, Run] = {"eager": partial(eager, x)}
    if compile_:
        baselines["torch.compile"] = partial(torch.compile(eager), x)
    return summed(lambda: ops.column_sum_of_squares(x), definition, x, baselines)


def images(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: torch.device) -> Tensor:
    order = torch.channels_last if last else torch.contiguous_format
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=order)


def channel_sums(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: torch.device) -> Work:
    x = images(shape, dtype, last, device)

    def definition() -> Tensor:
        return torch.stack([part.double().square().sum((0, 2, 3)) for part in x.split(16)]).sum(0)

    baselines: dict[str, Run] = {"eager": lambda: x.float().square().sum((0, 2, 3))}
    return summed(lambda: ops.channel_sum_of_squares(x), definition, x, baselines)


def patch_sums(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: torch.device) -> Work:
    x = images(shape, dtype, last, device)
    geometry = (3, 1, 1)

    def definition() -> Tensor:
        return torch.stack([unfold_of_the_sum(part.double(), *geometry) for part in x.split(16)]).sum(0)

    baselines: dict[str, Run] = {
        "unfold of the sum": lambda: unfold_of_the_sum(x.float(), *geometry),
        "addcmul_ and slices": lambda: rows_and_slices(x.float(), *geometry),
    }
    return summed(lambda: ops.patch_sum_of_squares(x, *geometry), definition, x, baselines)


# Blocks.


def blocks(count: int, n: int, device: torch.device) -> Tensor:
    x = torch.randn(count, n, n + 2, device=device)
    return x @ x.mT / (n + 2)


def inverses(count: int, n: int, device: torch.device) -> Work:
    a = blocks(count, n, device)
    out, ready = torch.empty_like(a), a + DAMPING * torch.eye(n, device=device)

    def check() -> None:
        assert not bool(ops.block_inverse_(out, a, DAMPING).any())
        close(out[:SAMPLES], torch.linalg.inv(ready[:SAMPLES].double()), 1e-3)
        close(out[-SAMPLES:], torch.linalg.inv(ready[-SAMPLES:].double()), 1e-3)

    baselines: dict[str, Run] = {
        "linalg.inv_ex": lambda: torch.linalg.inv_ex(ready),
        "cholesky_inverse": lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(ready).L),
    }
    return Work(lambda: ops.block_inverse_(out, a, DAMPING), baselines, check, 2 * a.nbytes, flops=2.0 * n**3 * count)


def solutions(count: int, n: int, device: torch.device) -> Work:
    a, rhs = blocks(count, n, device), torch.randn(count, n, device=device)
    ready = a + DAMPING * torch.eye(n, device=device)

    def check() -> None:
        x, info = ops.block_solve(a, DAMPING, rhs)
        assert not bool(info.any())
        close(x[:SAMPLES], torch.linalg.solve(ready[:SAMPLES].double(), rhs[:SAMPLES].double()), 1e-3)

    baselines: dict[str, Run] = {
        "cholesky_solve": lambda: torch.cholesky_solve(rhs[..., None], torch.linalg.cholesky_ex(ready).L)
    }
    return Work(lambda: ops.block_solve(a, DAMPING, rhs), baselines, check, a.nbytes + 2 * rhs.nbytes)


def products(count: int, n: int, device: torch.device) -> Work:
    a, v = blocks(count, n, device), torch.randn(count, n, device=device)
    return Work(
        lambda: ops.block_apply(a, v),
        {"bmm": lambda: torch.bmm(a, v[..., None])},
        lambda: close(ops.block_apply(a, v)[:SAMPLES], (a[:SAMPLES].double() @ v[:SAMPLES, :, None].double())[..., 0]),
        a.nbytes + 2 * v.nbytes,
    )


def updates(count: int, n: int, device: torch.device) -> Work:
    inverse = torch.linalg.inv(blocks(count, n, device) + DAMPING * torch.eye(n, device=device))
    inverse = ((inverse + inverse.mT) / 2).contiguous()
    u = torch.randn(count, n, device=device)

    def eager() -> None:
        v = torch.bmm(inverse, u[..., None])[..., 0]
        den = 0.95 + 0.05 * (u * v).sum(1)
        inverse.sub_(torch.einsum("bi,bj->bij", v, v * (0.05 / den)[:, None])).div_(0.95)

    def check() -> None:
        ours = inverse[:SAMPLES].clone()
        ops.rank_one_inverse_update_(ours, u[:SAMPLES], 0.95, 0.05)
        w = u[:SAMPLES].double()
        known = 0.95 * torch.linalg.inv(inverse[:SAMPLES].double()) + 0.05 * w[:, :, None] * w[:, None]
        close(ours, torch.linalg.inv(known), 1e-3)

    moved = 2 * inverse.nbytes + u.nbytes
    return Work(lambda: ops.rank_one_inverse_update_(inverse, u, 0.95, 0.05), {"eager, in place": eager}, check, moved)


def several_updates(count: int, n: int, device: torch.device) -> Work:
    inverse = torch.linalg.inv(blocks(count, n, device) + DAMPING * torch.eye(n, device=device))
    inverse = ((inverse + inverse.mT) / 2).contiguous()
    u = torch.randn(count, 4, n, device=device)

    def eager() -> None:
        w = torch.bmm(u, inverse)
        s = 0.95 * torch.eye(4, device=device) + 0.05 * torch.bmm(w, u.mT)
        inverse.baddbmm_(w.mT, torch.linalg.solve(s, w), beta=1 / 0.95, alpha=-0.05 / 0.95)

    def check() -> None:
        ours = inverse[:SAMPLES].clone()
        ops.low_rank_inverse_update_(ours, u[:SAMPLES], 0.95, 0.05)
        w = u[:SAMPLES].double()
        close(ours, torch.linalg.inv(0.95 * torch.linalg.inv(inverse[:SAMPLES].double()) + 0.05 * w.mT @ w), 1e-3)

    moved = 2 * inverse.nbytes + u.nbytes
    return Work(lambda: ops.low_rank_inverse_update_(inverse, u, 0.95, 0.05), {"Woodbury, bmm": eager}, check, moved)


def long_solution(count: int, size: int, device: torch.device) -> Work:
    u, x = ([torch.randn(size, device=device) for _ in range(count)] for _ in range(2))
    rho = 0.5

    def solved(u: list[Tensor], x: list[Tensor]) -> list[Tensor]:
        square = torch.stack([v.square().sum() for v in u]).sum()
        along = torch.stack([(v * y).sum() for v, y in zip(u, x, strict=True)]).sum() / (rho + square)
        return [(y - along * v) / rho for v, y in zip(u, x, strict=True)]

    def check() -> None:
        exact = solved([v.double() for v in u], [y.double() for y in x])
        for actual, expected in zip(ops.rank_one_solve(u, x, rho), exact, strict=True):
            close(actual, expected)

    return Work(
        lambda: ops.rank_one_solve(u, x, rho), {"eager": partial(solved, u, x)}, check, 20 * count * size,
        held=12 * count * size,
    )  # fmt: skip


# Grams.


def mini_block_gram(samples: int, count: int, n: int, device: torch.device) -> Work:
    v, out = torch.randn(samples, count, n, device=device), torch.empty(count, n, n, device=device)

    def check() -> None:
        ops.mini_block_gram_(out, v, 0.0, 1.0)
        part = v[:, :SAMPLES].double()
        close(out[:SAMPLES], torch.einsum("nbi,nbj->bij", part, part))

    baselines: dict[str, Run] = {
        "einsum": lambda: torch.einsum("nbi,nbj->bij", v, v),
        "bmm": lambda: torch.bmm(v.permute(1, 2, 0), v.permute(1, 0, 2)),
    }
    run = partial(ops.mini_block_gram_, out, v, 0.0, 1.0)
    return Work(run, baselines, check, v.nbytes + out.nbytes, flops=float(samples * count * n * (n + 1)))


def convolution_gram(samples: int, channels: int, size: int, dtype: torch.dtype, device: torch.device) -> Work:
    x, grad = (torch.randn(samples, channels, size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(channels, channels, 9, 9, device=device)

    def run() -> None:
        ops.conv_mini_block_gram_(out, x, grad, 3, padding=1)

    def check() -> None:
        few = max(1, samples // 32)
        part = torch.empty_like(out)
        ops.conv_mini_block_gram_(part, x[:few], grad[:few], 3, padding=1)
        exact = outer_products_of_patches(x[:few].double(), grad[:few].double(), 3, 1)
        close(part, exact.view_as(part), 1e-3 if dtype == F32 else 2e-2)

    baselines: dict[str, Run] = {"unfold, bmm, einsum": lambda: outer_products_of_patches(x, grad, 3, 1)}
    n, positions = 9, size**2
    flops = 2.0 * samples * channels**2 * n * (positions + (n + 1) / 2)
    return Work(run, baselines, check, x.nbytes + grad.nbytes + out.nbytes, flops=flops)


def factor_of_input(samples: int, channels: int, size: int, dtype: torch.dtype, device: torch.device) -> Work:
    x = torch.randn(samples, channels, size, size, device=device).to(dtype)
    columns = 9 * channels + 1
    out = torch.empty(1, columns, columns, device=device)
    run = partial(ops.conv_gram_, out, x, 3, padding=1, bias=True)

    def product(x: Tensor) -> Tensor:
        h = columns_of_patches(x, 3, 1, 1, True)
        return h @ h.mT

    def check() -> None:
        few = max(1, samples // 32)
        part = torch.empty_like(out)
        ops.conv_gram_(part, x[:few], 3, padding=1, bias=True)
        close(part[0], product(x[:few].double()), 1e-3 if dtype == F32 else 2e-2)

    flops = float(samples * size**2 * columns * (columns + 1))
    return Work(run, {"unfold, matmul": partial(product, x)}, check, x.nbytes + out.nbytes, flops=flops)


def weighted_gram(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Work:
    x, weight = torch.randn(rows, columns, device=device).to(dtype), torch.rand(rows, device=device)
    out = torch.empty(columns, columns, device=device)

    def check() -> None:
        ops.weighted_gram_(out, x, weight)
        few = min(columns, 64)
        exact = (x.double()[:, :few] * weight.double()[:, None]).mT @ x.double()
        close(out[:few], exact, 1e-3 if dtype == F32 else 1e-2)

    baselines: dict[str, Run] = {
        "gemm of that size": lambda: x.mT @ x,
        "(x * w).T @ x": lambda: (x * weight[:, None].to(dtype)).mT @ x,
    }
    moved = x.nbytes + weight.nbytes + out.nbytes
    run = partial(ops.weighted_gram_, out, x, weight)
    return Work(run, baselines, check, moved, flops=2.0 * rows * columns**2)


# Factors.


def factor_average(count: int, device: torch.device) -> Work:
    lengths = [64, 576, 128, 1152, 256, 2304, 512, 4608] * count
    state, other, new = ([torch.rand(n, device=device) for n in lengths] for _ in range(3))

    def eager() -> None:
        torch._foreach_mul_(other, 0.8)
        torch._foreach_add_(other, new, alpha=0.2)

    def check() -> None:
        expected = [0.8 * s.double() + 0.2 * n.double() for s, n in zip(state, new, strict=True)]
        assert not bool(ops.factor_ema_(state, new, 0.8, 0.2).any())
        for actual, exact in zip(state, expected, strict=True):
            close(actual, exact)

    return Work(
        lambda: ops.factor_ema_(state, new, 0.8, 0.2),
        {"eager, foreach, nothing checked": eager},
        check,
        12 * sum(lengths),
    )


def normalised(count: int, device: torch.device) -> Work:
    lengths = [64, 576, 128, 1152, 256, 2304, 512, 4608] * count
    x, out = ([torch.rand(n, device=device) for n in lengths] for _ in range(2))

    def eager(vectors: list[Tensor]) -> list[Tensor]:
        ranges = [v.aminmax() for v in vectors]
        return [(v - low) / (high - low + 1e-6) for v, (low, high) in zip(vectors, ranges, strict=True)]

    def check() -> None:
        ops.minmax_(out, x)
        for actual, expected in zip(out, eager([v.double() for v in x]), strict=True):
            close(actual, expected)

    return Work(
        lambda: ops.minmax_(out, x), {"eager, flat vectors not looked for": partial(eager, x)}, check, 8 * sum(lengths)
    )


def batch_norm(shape: tuple[int, ...], last: bool, device: torch.device) -> Work:
    x, grad = (images(shape, F32, last, device) for _ in range(2))

    def eager(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        scale = (x - mean).mul_(grad).sum((2, 3)) * (variance[0, :, 0, 0] + 1e-5).rsqrt()
        return scale, grad.sum((2, 3))

    def check() -> None:
        for actual, expected in zip(ops.batch_norm_gradients(x, grad, 1e-5), eager(x, grad), strict=True):
            close(actual, expected, 1e-3)

    return Work(
        lambda: ops.batch_norm_gradients(x, grad, 1e-5),
        {"var_mean, products, sums": partial(eager, x, grad)},
        check,
        x.nbytes + grad.nbytes,
    )


def rounding(rows: int, columns: int, runs: bool, device: torch.device) -> Work:
    x = torch.randn(rows, columns, device=device)
    place: dict[str, Any] = {"offset": 3, "run": columns, "pitch": 2 * columns} if runs else {}

    def op() -> Tensor:
        return ops.stochastic_round(x, step=1, **place)

    def check() -> None:
        part = {**place, "offset": place.get("offset", 0) + (rows - 1) * place.get("pitch", columns)}
        last = ops.stochastic_round(x[-1].cpu(), step=1, **part)
        assert torch.equal(op()[-1].cpu(), last)

    return Work(op, {"to nearest": lambda: x.to(BF16)}, check, 6 * x.numel())


def cases(tiny: bool, compile_: bool) -> Iterator[Case]:
    """What has targets first."""

    def at(full: int, small: int) -> int:
        return small if tiny else full

    rows, columns = at(1 << 18, 33), at(1024, 8)
    shape = (at(256, 3), at(256, 4), at(56, 5), at(56, 5))
    name = " x ".join(map(str, shape))
    for dtype in (F32, BF16):
        prepare = partial(column_sums, rows, columns, dtype, compile_ and dtype == F32)
        yield Case("column_sum_of_squares", f"{rows} x {columns}", dtype, prepare, "read", {"read": 0.85})
        for last in (False, True):
            of = name + (", channels last" if last else "")
            channels, patches = (partial(f, shape, dtype, last) for f in (channel_sums, patch_sums))
            yield Case("channel_sum_of_squares", of, dtype, channels, "read", {"read": 0.85})
            yield Case("patch_sum_of_squares", of + ", 3 x 3", dtype, patches, "read", {"read": 0.85})
    for n, count, targets in (
        (9, at(1_000_000, 40), {"copy": 0.75, "linalg.inv_ex": 50.0}),
        (25, at(100_000, 20), {"linalg.inv_ex": 20.0}),
        (49, at(100_000, 10), {"linalg.inv_ex": 20.0}),
    ):
        of = f"{count} x {n} x {n}"
        yield Case("block_inverse_", of, F32, partial(inverses, count, n), "copy", targets)
    samples, count = at(256, 5), at(65_536, 10)
    prepare = partial(mini_block_gram, samples, count, 9)
    yield Case("mini_block_gram_", f"{samples} x {count} x 9", F32, prepare, "read", {"read": 0.80})
    for channels_, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        channels_, size, samples = at(channels_, 4), at(size, 5), at(256, 3)
        of = f"{samples} x {channels_} to {channels_} x {size} x {size}, 3 x 3"
        for dtype, least in ((F32, 1.5), (BF16, 3.0)):
            targets = {"unfold, bmm, einsum": least, "memory: unfold, bmm, einsum": 10.0}
            work = partial(convolution_gram, samples, channels_, size, dtype)
            limit = "float32" if dtype == F32 else "bfloat16"
            yield Case("conv_mini_block_gram_", of, dtype, work, limit, targets)
    for channels_, size in ((64, 56), (256, 14)):
        channels_, size, samples = at(channels_, 4), at(size, 5), at(256, 3)
        of = f"{samples} x {channels_} x {size} x {size}, 3 x 3"
        for dtype, limit in ((F32, "float32"), (BF16, "bfloat16")):
            yield Case("conv_gram_", of, dtype, partial(factor_of_input, samples, channels_, size, dtype), limit)
    for columns in (1024, 2048, 4096):
        rows, columns = at(65_536, 50), at(columns, 16)
        work = partial(weighted_gram, rows, columns, BF16)
        yield Case("weighted_gram_", f"{rows} x {columns}", BF16, work, "bfloat16", {"gemm of that size": 0.9})
    rows, columns = at(65_536, 50), at(1024, 16)
    yield Case("weighted_gram_", f"{rows} x {columns}", F32, partial(weighted_gram, rows, columns, F32), "float32")
    n, count = 9, at(1_000_000, 40)
    for op, make in (("block_solve", solutions), ("block_apply", products), ("rank_one_inverse_update_", updates)):
        yield Case(op, f"{count} x {n} x {n}", F32, partial(make, count, n))
    few = at(250_000, 10)
    yield Case("low_rank_inverse_update_", f"{few} x {n} x {n}, 4 vectors", F32, partial(several_updates, few, n))
    tensors, size = at(25, 2), at(1024**2, 50)
    yield Case("rank_one_solve", f"{tensors} x {size}", F32, partial(long_solution, tensors, size))
    count = at(12, 1)
    yield Case("minmax_", f"{8 * count} vectors", F32, partial(normalised, count), wall=True)
    yield Case("factor_ema_", f"{8 * count} vectors", F32, partial(factor_average, count), wall=True)
    rows, columns = at(16_384, 33), at(4096, 8)
    for runs in (False, True):
        of = f"{rows} x {columns}" + (", half of the columns" if runs else "")
        yield Case("stochastic_round", of, F32, partial(rounding, rows, columns, runs), "copy")
    for last in (False, True):
        of = name + (", channels last" if last else "")
        yield Case("batch_norm_gradients", of, F32, partial(batch_norm, shape, last), "read")
