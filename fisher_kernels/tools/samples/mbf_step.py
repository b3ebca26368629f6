"""Samples of mbf_step_."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_kernels import backends, ops
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.ops._blocks import pack
from fisher_kernels.tools.samples.sample import SUM_DTYPES, Device, Inputs, Sample, Source, Tolerance, last, random
from fisher_kernels.tools.samples.steps import Layout, Moments, as_made, in_turn, of_moment, on


class Parameter(NamedTuple):
    """Shapes of a parameter and of its inverse; None for a bias, which belongs to the one before it."""

    shape: tuple[int, ...]
    inverse: tuple[int, ...] | None


OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "decoupled": False,
    "maximize": False,
}


def block_size(packed: int) -> int:
    """n where a lower triangle of an n x n block has so many entries."""
    return next(n for n in itertools.count() if n * (n + 1) // 2 >= packed)


def symmetric(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: Device = None) -> Tensor:
    """Symmetric positive definite blocks, in the layout that the shape tells."""
    if len(shape) == 2:
        n = block_size(shape[1])
        return pack(symmetric((shape[0], n, n), dtype, seed, device))
    return _symmetric(shape, seed, device).to(dtype, copy=True)


@lru_cache(512)
def _symmetric(shape: tuple[int, ...], seed: int, device: Device) -> Tensor:
    # Kept: tests ask for the same blocks thousands of times.
    x = random(shape, torch.float64, seed, device)
    eye = torch.eye(shape[-1], dtype=torch.float64, device=device)
    return (x @ x.mT / max(1, shape[-1]) + 0.1 * eye).contiguous()


def step(
    parameters: Sequence[Parameter],
    dtype: torch.dtype | Sequence[torch.dtype],
    *,
    layout: Layout = as_made,
    grad_layout: Layout | None = None,
    moment_layout: Layout | None = None,
    inverse_layout: Layout = as_made,
    moments: Moments = None,
    storage: torch.dtype | None = None,
    device: Device = None,
    **options: Any,
) -> Inputs:
    """The arguments of a step of parameters in the middle of a run; dtypes in turn if there are several.

    Biases have the dtypes of what they go with. ``moments`` are those of the momentum, None being the wide one beside a
    parameter's, which is all there is beside float64; ``storage`` is that of the inverses where it is not the wide one.
    """
    dtypes, kept = in_turn(dtype), in_turn(moments)
    lists: dict[str, list[Any]] = {name: [] for name in ("params", "grads", "momentum_buffers", "inverses")}
    current, moment = torch.float32, torch.float32
    for i, (shape, inverse) in enumerate(parameters):
        if inverse is not None:
            current = next(dtypes)
            moment = of_moment(current, next(kept))
        wide = ACCUMULATOR[current]
        made = (
            layout(random(shape, current, 7 * i, device)),
            (grad_layout or layout)(random(shape, current, 7 * i + 1, device)),
            (moment_layout or layout)(random(shape, moment, 7 * i + 2, device)),
            None if inverse is None else inverse_layout(symmetric(inverse, storage or wide, 7 * i + 3, device)),
        )
        for tensors, tensor in zip(lists.values(), made, strict=True):
            tensors.append(tensor)
    return {**lists, **OPTIONS, **options}


# One block a kernel, packed ones, and inverses that the rows of a layer with a bias share.
_LAYERS = (
    Parameter((20, 3, 3, 3), (60, 9, 9)),
    Parameter((7, 5), (7, 15)),
    Parameter((12, 10), (1, 2, 6, 6)),
    Parameter((12,), None),
)
_OTHERS = (
    Parameter((50,), (50, 1, 1)),
    Parameter((3, 25), (3, 25, 25)),
    Parameter((6, 4), (6, 5, 5)),
    Parameter((6,), None),
    Parameter((2, 600), (1, 1, 601, 601)),
    Parameter((2,), None),
    Parameter((1, 513), (1, 513, 513)),
)
_FEW = (
    Parameter((3, 5, 1), (15, 1, 1)),
    Parameter((3, 5, 8), (15, 8, 8)),
    Parameter((5, 3, 5), (15, 15)),
    Parameter((0, 3), (1, 1, 3, 3)),
    Parameter((70,), (70, 2, 2)),
    Parameter((70,), None),
    Parameter((7, 11), (1, 1, 11, 11)),
)


def _inputs(layers: Sequence[Parameter], channels_last: bool, options: dict[str, Any], source: Source) -> Inputs:
    def layout(x: Tensor) -> Tensor:
        return last(x) if channels_last and x.dim() == 4 else x

    return step(layers, source.dtype, layout=layout, device=source.device, **options)


def _two_dtypes(options: dict[str, Any], source: Source) -> Inputs:
    return step(_FEW, (source.dtype, torch.bfloat16), device=source.device, **on(source.device, options))


def _tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    lr, beta, decay = (inputs[name] for name in ("lr", "momentum", "weight_decay"))
    params, scale = inputs["params"], float(inputs.get("grad_scale", 1.0))
    moments = [
        beta * m.abs() + g.abs() / scale + decay * w.abs()
        for w, g, m in zip(params, inputs["grads"], inputs["momentum_buffers"], strict=True)
    ]
    # The step of magnitudes leaves lr |P| |m| in parameters of 0.
    changes = [torch.zeros_like(m) for m in moments]
    with backends.use_backend("reference"):
        ops.mbf_step_(
            changes,
            [-m for m in moments],
            [torch.zeros_like(m) for m in moments],
            [None if x is None else x.abs() for x in inputs["inverses"]],
            **{**OPTIONS, "lr": lr},
        )
    of_params = [40 * u * (w.abs() + c + lr * decay * w.abs()) for w, c in zip(params, changes, strict=True)]
    # Of those that are shortened, |lr d| rounds as d does.
    capped = 0.0 if inputs.get("max_relative_step") is None else 64 * u
    return [*of_params, *(16 * u * m for m in moments), 0.0, 0.0, capped]


_DECAY: dict[str, Any] = {"weight_decay": 0.1}
_UNLIMITED = {"kl_clip": 1e6}
"""The step is measured, and not shortened: how a sum with signs would round is not known."""
_CAPPED = {"max_relative_step": 0.01, "floor": 0.1}
_ALL: dict[str, Any] = {
    **_DECAY,
    **_UNLIMITED,
    **_CAPPED,
    "kl_along": "gradient",
    "lr": torch.tensor(0.01),
    "decoupled": True,
    "maximize": True,
    "grad_scale": torch.tensor(2.0),
    "found_inf": torch.zeros(1),
}


def _samples() -> Iterator[Sample]:
    for name, layers, channels_last, options in (
        ("plain", _LAYERS, False, {}),
        ("weight decay in the gradient, maximised", _LAYERS, False, {**_DECAY, "maximize": True}),
        ("clipped, decoupled weight decay", _LAYERS, False, {**_DECAY, "decoupled": True, **_UNLIMITED}),
        ("capped, a weight and its bias apart", _LAYERS, False, {**_CAPPED, "layers": [0, 1, 0, 0]}),
        ("capped, floors of each", _LAYERS, False, {**_CAPPED, "floor": [0.1, 2.0, 0.5, 0.5]}),
        ("channels last", _LAYERS, True, _UNLIMITED),
        ("momentum in 16 bits", _LAYERS, False, {**_DECAY, "moments": torch.bfloat16}),
        ("other sizes", _OTHERS, False, {}),
        ("other sizes, clipped", _OTHERS, False, _UNLIMITED),
    ):
        inputs = partial(_inputs, layers, channels_last, options)
        yield Sample("mbf_step_", name, SUM_DTYPES, inputs, _tolerance)
    few: dict[str, dict[str, Any]] = {"two dtypes": {"lr": torch.tensor(0.01)}, "two dtypes, all options": _ALL}
    for name, options in few.items():
        yield Sample("mbf_step_", name, (torch.float32,), partial(_two_dtypes, options), _tolerance)


SAMPLES = tuple(_samples())
