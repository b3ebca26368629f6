"""Optimizer steps: whole models of 1e9 parameters, and many small tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.baselines import adamw, parameters
from bench.gpu.case import Case, Work
from bench.gpu.shapes import Shape, models
from bench.gpu.timing import Run
from fisher_kernels import MBF, SOFIM, AdaFisher, use_backend
from fisher_kernels.ops import adafisher_step_, mbf_step_, sofim_step_

ADAMW = "AdamW(fused)"
NEVER = 10**9
ADAFISHER: dict[str, Any] = {
    "lr": 1e-3, "beta": 0.9, "damping": 1e-3, "weight_decay": 0.0, "decoupled": True, "maximize": False,
}  # fmt: skip
SOFIM_OPTIONS: dict[str, Any] = {"lr": 1e-3, "beta": 0.9, "rho": 0.5}
MBF_OPTIONS: dict[str, Any] = {
    "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0, "decoupled": True, "maximize": False,
}  # fmt: skip
SAMPLE = 1 << 24
"""Parameters in the sample that a step is checked on."""

Lists = list[list[Tensor]]


def sampled(lists: Lists) -> Lists:
    """Copies of those tensors of each list that fit into a sample, the small ones first, and of the largest of them."""
    kept: list[int] = []
    total = 0
    for i in sorted(range(len(lists[0])), key=lambda i: lists[0][i].numel()):
        total += lists[0][i].numel()
        if kept and total > SAMPLE:
            break
        kept.append(i)
    return [[tensors[i].clone() for i in kept] for tensors in lists]


def check_step(step: Callable[[Lists], object], lists: Lists) -> None:
    """A step of a sample, on the backend in use, against the reference in float64."""
    ours = sampled(lists)
    exact = [[x if x.dim() == 0 else x.double() for x in tensors] for tensors in sampled(lists)]
    step(ours)
    with use_backend("reference"):
        step(exact)
    bits16 = ours[0][0].element_size() == 2
    for actual, expected in zip(ours[0] + ours[2], exact[0] + exact[2], strict=True):
        rtol = 2**-7 if bits16 and actual.element_size() == 2 else 1e-4
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=1e-4)


def tensors(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Lists:
    """Parameters, gradients, moments, step counts."""
    params, grads = ([torch.randn(s, device=device, dtype=dtype) for s in shapes] for _ in range(2))
    moments = [torch.zeros(s, device=device) for s in shapes]
    return [params, grads, moments, [torch.zeros((), device=device) for _ in shapes]]


def size(lists: Lists) -> int:
    return sum(x.numel() for x in lists[0])


def fused_adamw(lists: Lists) -> Run:
    params, grads, moments, _ = lists[:4]
    if params[0].element_size() == 2:  # as torch keeps them
        moments = [torch.zeros_like(p) for p in params]
    return adamw(parameters(params, grads), moments).step


def eager_adafisher(lists: Lists) -> None:
    """With the Kronecker product formed."""
    for w, g, m, t, r, c in zip(*lists, strict=True):
        t += 1
        m.mul_(0.9).add_(g, alpha=0.1)
        curvature = torch.outer(r, c.flatten()).view(w.shape) + 1e-3
        w.sub_(1e-3 * (m / (1 - 0.9**t)) / curvature)


def adafisher(shapes: Sequence[Shape], dtype: torch.dtype, compile_: bool, device: torch.device) -> Work:
    lists = tensors(shapes, dtype, device)
    lists.append([torch.rand(s[0], device=device) for s in shapes])
    lists.append([torch.rand(p[0].numel(), device=device) for p in lists[0]])

    def step(lists: Lists) -> None:
        params, grads, moments, steps, rows, columns = lists
        adafisher_step_(params, grads, moments, steps, rows, columns, **ADAFISHER)

    baselines: dict[str, Run] = {ADAMW: fused_adamw(lists)}
    if dtype == torch.float32:
        baselines["eager, Kronecker product"] = partial(eager_adafisher, lists)
        if compile_:
            baselines["torch.compile"] = partial(torch.compile(eager_adafisher), lists)
    moved = (20 if dtype == torch.float32 else 14) * size(lists)
    return Work(partial(step, lists), baselines, partial(check_step, step, lists), moved)


def eager_sofim(lists: Lists) -> None:
    """In as few passes as torch has calls for."""
    params, grads, moments, steps = lists
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(moments, grads, 0.1)
    correction = 1 - 0.9 ** steps[0]
    square = torch.stack(torch._foreach_norm(moments)).square().sum() / correction**2
    torch._foreach_add_(params, torch._foreach_mul(moments, -1e-3 / (correction * (0.5 + square))))


def sofim(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Work:
    lists = tensors(shapes, dtype, device)

    def step(lists: Lists) -> None:
        params, grads, moments, steps = lists
        sofim_step_(params, grads, moments, steps, **SOFIM_OPTIONS)

    baselines: dict[str, Run] = {ADAMW: fused_adamw(lists)}
    if dtype == torch.float32:
        baselines["eager, foreach"] = partial(eager_sofim, lists)
    moved = (24 if dtype == torch.float32 else 18) * size(lists)
    return Work(partial(step, lists), baselines, partial(check_step, step, lists), moved)


def mbf(shapes: Sequence[Shape], n: int, compile_: bool, device: torch.device) -> Work:
    """Blocks of ``n`` elements, one after another."""
    params, grads, moments, _ = tensors(shapes, torch.float32, device)
    inverses = []
    for p in params:
        x = torch.randn(p.numel() // n, n, n, device=device)
        inverses.append(x.add_(x.mT.clone()))
    lists = [params, grads, moments, inverses]

    def step(lists: Lists) -> None:
        params, grads, moments, inverses = lists
        mbf_step_(params, grads, moments, inverses, **MBF_OPTIONS)

    def eager(params: list[Tensor], grads: list[Tensor], moments: list[Tensor], inverses: list[Tensor]) -> None:
        torch._foreach_mul_(moments, 0.9)
        torch._foreach_add_(moments, grads)
        for w, m, p in zip(params, moments, inverses, strict=True):
            w.sub_(torch.einsum("bij,bj->bi", p, m.view(-1, n)).view_as(w), alpha=1e-3)

    def with_bmm() -> None:
        torch._foreach_mul_(moments, 0.9)
        torch._foreach_add_(moments, grads)
        for w, m, p in zip(params, moments, inverses, strict=True):
            w.sub_(torch.bmm(p, m.view(-1, n, 1)).view_as(w), alpha=1e-3)

    baselines: dict[str, Run] = {"eager, einsum": partial(eager, *lists), "eager, bmm": with_bmm}
    if compile_:
        baselines["torch.compile"] = partial(torch.compile(eager), *lists)
    return Work(partial(step, lists), baselines, partial(check_step, step, lists), (20 + 4 * n) * size(lists))


def mbf_linear(outputs: int, inputs: int, device: torch.device) -> Work:
    """One inverse shared by all rows: a matrix product."""
    params, grads, moments, _ = tensors([(outputs, inputs)], torch.float32, device)
    x = torch.randn(inputs, inputs, device=device) / inputs**0.5
    lists = [params, grads, moments, [(x + x.mT).view(1, 1, inputs, inputs)]]

    def step(lists: Lists) -> None:
        params, grads, moments, inverses = lists
        mbf_step_(params, grads, moments, inverses, **MBF_OPTIONS)

    product = {"the matrix product alone": lambda: moments[0] @ lists[3][0][0, 0]}
    moved = 20 * outputs * inputs + 4 * inputs**2
    return Work(partial(step, lists), product, partial(check_step, step, lists), moved, flops=2.0 * outputs * inputs**2)


# Whole optimizers.


def small_network(layers: int, width: int, device: torch.device) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(device)


def optimizer_step(
    make: Callable[[nn.Module], torch.optim.Optimizer], layers: int, width: int, bytes_each: int, device: torch.device
) -> Work:
    """``step()`` over a weight and a bias a layer, between two refreshes."""
    model = small_network(layers, width, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make(model)
    model(torch.randn(8, width, device=device)).square().mean().backward()
    optimizer.step()
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    moments = [torch.zeros_like(p) for p in params]
    other = adamw(params, moments)

    def check() -> None:
        """Against the same step on the reference, from the same state."""
        states = [v for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        held = [x.detach() for x in (*params, *states)]
        before = [x.clone() for x in held]
        optimizer.step()
        ours = [x.clone() for x in held]
        torch._foreach_copy_(held, before)
        with use_backend("reference"):
            optimizer.step()
        for actual, expected, old in zip(ours[: len(params)], held, before, strict=False):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            assert not torch.equal(actual, old), "nothing moved"

    count = sum(p.numel() for p in params)
    return Work(optimizer.step, {ADAMW: other.step}, check, bytes_each * count, held=28 * count)


# The cases, what has targets first.


def cases(tiny: bool, compile_: bool) -> Iterator[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    named = models(tiny)
    for name, shapes in named.items():
        targets = {"copy": 0.92, ADAMW: 1.30}
        yield Case("adafisher_step_", f"{name}, 1e9", f32, partial(adafisher, shapes, f32, False), targets=targets)
    for name, shapes in named.items():
        yield Case("sofim_step_", f"{name}, 1e9", f32, partial(sofim, shapes, f32), targets={"copy": 0.92})
    layers, width = (3, 8) if tiny else (150, 64)
    optimizers: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], int]] = {
        "AdaFisher": (lambda model: AdaFisher(model, update_interval=NEVER), 20),
        "SOFIM": (lambda model: SOFIM(model.parameters()), 24),
        "MBF": (lambda model: MBF(model, refresh="constant", update_interval=NEVER, inverse_interval=NEVER), 20),
    }
    for name, (make, bytes_each) in optimizers.items():
        targets = {} if name == "MBF" else {ADAMW: 1.5, f"wall: {ADAMW}": 1.0}
        yield Case(
            f"{name}.step", f"{2 * layers} small tensors", f32,
            partial(optimizer_step, make, layers, width, bytes_each), targets=targets, wall=True,
        )  # fmt: skip
    convolutions: list[Shape] = [(4, 4, 3, 3)] * 2 if tiny else [(512, 512, 3, 3)] * 128
    ones: list[Shape] = [(8, 4, 1, 1)] * 2 if tiny else [(2048, 512, 1, 1)] * 256
    for shapes, n in ((convolutions, 9), (ones, 1)):
        shape = f"{len(shapes)} x {' x '.join(map(str, shapes[0]))}"
        yield Case("mbf_step_", shape, f32, partial(mbf, shapes, n, False), targets={"copy": 0.92})
    rows, columns = (16, 8) if tiny else (4096, 1024)
    shape = f"Linear {rows} x {columns}"
    yield Case("mbf_step_", shape, f32, partial(mbf_linear, rows, columns), "float32")
    name, shapes = next(reversed(named.items()))
    yield Case("adafisher_step_", f"{name}, 1e9", bf16, partial(adafisher, shapes, bf16, False), targets={"copy": 0.92})
    yield Case("sofim_step_", f"{name}, 1e9", bf16, partial(sofim, shapes, bf16), targets={"copy": 0.92})
    large: list[Shape] = [(16, 16)] * 2 if tiny else [(8192, 4096)] * 4
    yield Case("adafisher_step_", "4 x 8192 x 4096", f32, partial(adafisher, large, f32, compile_))
    few = convolutions[: 1 if tiny else 16]
    yield Case("mbf_step_", f"{len(few)} convolutions", f32, partial(mbf, few, 9, compile_))
