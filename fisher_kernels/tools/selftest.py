"""Every op on every available backend of this machine, checked against the reference in float64.

The same inputs, exactly, go to the backend under test and, converted to float64, to the reference. The difference may
be what rounding explains and no more: a tolerance is a small multiple of the unit roundoff u of the arithmetic, times
the magnitudes that are added up. NaN and infinities must be in the same places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_kernels import backends, ops
from fisher_kernels.ops import ACCUMULATOR

Inputs = dict[str, Any]
Tolerance = Tensor | float

_SUM_DTYPES = tuple(ACCUMULATOR)
_FACTOR_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Source:
    """Random tensors of one dtype on one device, the same numbers every time."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) in the accumulation dtype: factors."""
        return torch.rand(shape, generator=self.generator).to(self.device, ACCUMULATOR[self.dtype])


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        inputs: builds the arguments; in-place ops change them.
        call: runs the op and returns everything it computed or changed.
        tolerance: (the inputs in float64 and as they were, u) -> the largest admissible error of each output.
    """

    op: str
    name: str
    dtypes: Sequence[torch.dtype]
    inputs: Callable[[Source], Inputs]
    call: Callable[[Inputs], list[Tensor]]
    tolerance: Callable[[Inputs, list[Tensor], float], list[Tolerance]]


@dataclass(frozen=True)
class Result:
    """Outcome of one case; ``worst`` is the largest error in units of the tolerance."""

    op: str
    case: str
    backend: str
    device: str
    dtype: str
    passed: bool
    worst: float | None
    message: str | None


def run(only: str | None = None) -> Iterator[Result]:
    """Checks every case in every dtype on every available backend, or on one of them, one result each."""
    for backend, device in _places():
        if only not in (None, backend):
            continue
        for case in CASES:
            for dtype in case.dtypes:
                yield _check(case, dtype, backend, device)


def _places() -> list[tuple[str, torch.device]]:
    """Backends and the devices they run on."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        (backend, torch.device(kind))
        for backend in backends.available()
        for kind in (kinds if backend == "reference" else [backends.device_type(backend)])
    ]


def _check(case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> Result:
    def result(passed: bool, worst: float | None, message: str | None) -> Result:
        dtype_name = str(dtype).removeprefix("torch.")
        return Result(case.op, case.name, backend, device.type, dtype_name, passed, worst, message)

    inputs = case.inputs(Source(dtype, device, torch.Generator().manual_seed(0)))
    exact = _in_float64(inputs)
    try:
        with backends.use_backend("reference"):
            expected = case.call(_in_float64(exact))
        with backends.use_backend(backend):
            actual = case.call(inputs)
        tolerances = case.tolerance(exact, expected, torch.finfo(ACCUMULATOR[dtype]).eps / 2)
        worst = max(_worst(*triple) for triple in zip(actual, expected, tolerances, strict=True))
    except Exception as error:  # a self-test reports whatever goes wrong and carries on
        return result(False, None, f"{type(error).__name__}: {error}")
    if worst <= 1:
        return result(True, worst, None)
    return result(False, worst if math.isfinite(worst) else None, f"error is {worst:.3g} of what rounding explains")


def _in_float64(value: Any) -> Any:
    """A copy of nested inputs on the CPU, floating-point tensors in float64 except step counters."""
    if isinstance(value, dict):
        return {name: [t.cpu().clone() for t in v] if name == "steps" else _in_float64(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_in_float64(item) for item in value]
    if isinstance(value, Tensor):
        return value.to("cpu", torch.float64, copy=True)
    return value


def _worst(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> float:
    """Largest error in units of the tolerance; infinite where the shape is wrong or only one side is finite."""
    if actual.shape != expected.shape:
        return math.inf
    x = actual.to("cpu", torch.float64)
    error = (x - expected).abs() / tolerance
    error = error.masked_fill((x == expected) | (x.isnan() & expected.isnan()), 0)
    return float(error.nan_to_num(nan=math.inf).max()) if error.numel() else 0.0


# Sums of squares: all terms are positive, so the relative error of a sum of n rounded squares in any order stays,
# with overwhelming probability, below a few sqrt(n) u (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).


def _sum_tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    terms = max(inputs["x"].numel() // max(len(expected[0]), 1), 1)
    return [4 * math.sqrt(terms) * u * expected[0].abs() + torch.finfo(torch.float32).tiny]


def _sum_cases(op: str, layouts: dict[str, Callable[[Source], Tensor]], **arguments: Any) -> list[Case]:
    function = getattr(ops, op)

    def case(name: str, layout: Callable[[Source], Tensor]) -> Case:
        return Case(
            op,
            name,
            _SUM_DTYPES,
            lambda source: {"x": layout(source)},
            lambda inputs: [function(inputs["x"], **arguments)],
            _sum_tolerance,
        )

    return [case(name, layout) for name, layout in layouts.items()]


def _with_non_finite(x: Tensor) -> Tensor:
    """x with a NaN and an infinity in two places of its first sample."""
    flat = x.view(-1)
    flat[1], flat[-1] = math.nan, -math.inf
    return x


_COLUMNS: dict[str, Callable[[Source], Tensor]] = {
    "257 x 33": lambda s: s.normal(257, 33),
    "1 x 1": lambda s: s.normal(1, 1),
    "5 x 7 x 19": lambda s: s.normal(5, 7, 19),
    "rows of a wider tensor": lambda s: s.normal(63, 50)[:, 3:40],
    "every other column": lambda s: s.normal(63, 50)[:, ::2],
    "transposed": lambda s: s.normal(31, 500).t(),
    "no rows": lambda s: s.normal(0, 5),
    "not finite": lambda s: _with_non_finite(s.normal(9, 17)),
    "many rows": lambda s: s.normal(9000, 8),
}

_CHANNELS: dict[str, Callable[[Source], Tensor]] = {
    "3 x 5 x 7 x 9": lambda s: s.normal(3, 5, 7, 9),
    "channels last": lambda s: s.normal(3, 37, 5, 9).to(memory_format=torch.channels_last),
    "one dimension": lambda s: s.normal(4, 6, 131),
    "long runs": lambda s: s.normal(2, 2, 5001),
    "three dimensions": lambda s: s.normal(2, 3, 4, 5, 6),
    "no spatial dimension": lambda s: s.normal(65, 12),
    "slice": lambda s: s.normal(3, 8, 9, 9)[:, 1:6, 2:, ::2],
    "no samples": lambda s: s.normal(0, 4, 3, 3),
    "not finite": lambda s: _with_non_finite(s.normal(2, 5, 3, 3)),
}


def _patch_cases() -> list[Case]:
    def case(name: str, layout: Callable[[Source], Tensor], **arguments: Any) -> list[Case]:
        return _sum_cases("patch_sum_of_squares", {name: layout}, **arguments)

    return [
        *case("3 x 3", lambda s: s.normal(3, 5, 9, 11), kernel_size=3, padding=1),
        *case("5 x 3, stride 2", lambda s: s.normal(3, 4, 13, 10), kernel_size=(5, 3), stride=2, padding=(2, 0)),
        *case("dilated", lambda s: s.normal(2, 3, 17, 16), kernel_size=3, dilation=(3, 2), padding=2),
        *case("uneven padding", lambda s: s.normal(2, 3, 8, 7), kernel_size=4, padding=((1, 2), (0, 3)), stride=3),
        *case("1 x 1", lambda s: s.normal(4, 33, 6, 6), kernel_size=1, stride=2),
        *case("one dimension", lambda s: s.normal(4, 6, 101), kernel_size=7, padding=3, stride=2),
        *case("three dimensions", lambda s: s.normal(2, 3, 5, 6, 7), kernel_size=(3, 2, 3), padding=1),
        *case(
            "channels last",
            lambda s: s.normal(3, 18, 9, 7).to(memory_format=torch.channels_last),
            kernel_size=3,
            padding=1,
            stride=2,
        ),
        *case(
            "one dimension, channels last",
            lambda s: s.normal(2, 6, 19).movedim(1, -1).contiguous().movedim(-1, 1),
            kernel_size=3,
        ),
        *case("slice", lambda s: s.normal(2, 6, 12, 12)[:, ::2, 1:, :-3], kernel_size=3),
        *case("no samples", lambda s: s.normal(0, 4, 5, 5), kernel_size=3),
    ]


# Factors. The difference v - min v is exact to u of max |v|, so minmax has the error u * max |v| / (max v - min v) that
# its input's own rounding causes, plus a few roundings of a result that is at most 1.


def _minmax_error(v: Tensor, u: float) -> float:
    if not v.numel() or not v.isfinite().all() or v.max() == v.min():
        return u
    return 8 * u * (1 + float(v.abs().max() / (v.max() - v.min())))


def _minmax_inputs(source: Source) -> Inputs:
    constant = torch.full_like(source.uniform(9), 0.3)
    vectors = [source.uniform(n) for n in (1, 2, 37, 1000, 0)]
    return {"x": [*vectors, 100 + source.uniform(50), constant, _with_non_finite(source.uniform(8))]}


def _weights(source: Source, inputs: Inputs) -> Inputs:
    return {**inputs, "weights": [1 + source.uniform(1) for _ in inputs["x"]]}


def _minmax_tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
    return [_minmax_error(v, u) for v in inputs["x"]]


def _minmax_into(inputs: Inputs) -> list[Tensor]:
    out = [torch.full_like(v, torch.nan) for v in inputs["x"]]
    ops.minmax_(out, inputs["x"], 1e-6, inputs["weights"])
    return out


def _ema_inputs(source: Source) -> Inputs:
    sizes = (3, 37, 1000, 5, 8, 8)
    state = [source.uniform(n) for n in sizes]
    new = [source.uniform(n) for n in sizes]
    _with_non_finite(new[3])
    return {"state": state, "new": new}


def _ema_case(name: str, decay: float, gain: float, **arguments: Any) -> Case:
    def call(inputs: Inputs) -> list[Tensor]:
        refused = ops.factor_ema_(inputs["state"], inputs["new"], decay, gain, **arguments)
        return [*inputs["state"], refused]

    def tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
        errors = []
        for state, new in zip(inputs["state"], inputs["new"], strict=True):
            of_new = _minmax_error(new, u) if arguments.get("normalize") else 0.0
            errors.append(4 * u * (decay * state.abs() + gain) + gain * of_new)
        return [*errors, u]

    return Case("factor_ema_", name, _FACTOR_DTYPES, _ema_inputs, call, tolerance)


# The step: about ten roundings, each of a term that is no larger than the sum of the magnitudes below, and one of the
# stored parameter. Elements with a gradient that is not finite must keep their values exactly.

_SHAPES: tuple[tuple[tuple[int, ...], tuple[int, int, int]], ...] = (
    # (shape of the parameter, (groups, rows of each group, columns))
    ((7, 13), (1, 7, 13)),
    ((64, 130), (1, 64, 130)),
    ((6, 3, 3, 3), (2, 3, 27)),
    ((33,), (1, 33, 1)),
    ((), (1, 1, 1)),
    ((0, 4), (1, 0, 4)),
    ((5, 9), (1, 1, 45)),
)


def _step_inputs(source: Source) -> Inputs:
    wide = Source(ACCUMULATOR[source.dtype], source.device, source.generator)
    params = [source.normal(*shape) for shape, _ in _SHAPES]
    params.append(source.normal(12, 10).t())
    params.append(source.normal(4, 6, 3, 3).to(memory_format=torch.channels_last))
    views = [*(view for _, view in _SHAPES), (1, 10, 12), (1, 4, 54)]
    grads = [source.normal(*p.shape) for p in params]
    _with_non_finite(grads[1])
    return {
        "params": params,
        "grads": grads,
        "exp_avgs": [wide.normal(*p.shape) for p in params],
        "steps": [torch.full((), float(i), device=source.device) for i in range(len(params))],
        # The seventh parameter has no factors at all, the fourth no column factor.
        "row_factors": [None if i == 6 else source.uniform(g * r) for i, (g, r, _) in enumerate(views)],
        "column_factors": [None if i in (3, 6) else source.uniform(g, c) for i, (g, _, c) in enumerate(views)],
        "views": views,
    }


_BETA, _DAMPING, _LR = 0.9, 1e-2, 1e-2


def _step_case(name: str, *, scale: float | None = None, found_inf: bool = False, **options: Any) -> Case:
    decay = options.setdefault("weight_decay", 0.0)
    options = {"decoupled": False, "maximize": False, **options}

    def call(inputs: Inputs) -> list[Tensor]:
        device = inputs["params"][0].device
        skipped = ops.adafisher_step_(
            *(inputs[name] for name in ("params", "grads", "exp_avgs", "steps", "row_factors", "column_factors")),
            lr=_LR,
            beta=_BETA,
            damping=_DAMPING,
            grad_scale=None if scale is None else torch.tensor([scale], device=device),
            found_inf=None if scale is None else torch.tensor([float(found_inf)], device=device),
            **options,
        )
        return [*inputs["params"], *inputs["exp_avgs"], *inputs["steps"], skipped]

    def tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
        of_params, of_moments = [], []
        for i, view in enumerate(inputs["views"]):
            w, g, m = (inputs[name][i] for name in ("params", "grads", "exp_avgs"))
            moment = _BETA * m.abs() + (1 - _BETA) * (g.abs() / (scale or 1) + decay * w.abs())
            curvature = _naive_curvature(inputs["row_factors"][i], inputs["column_factors"][i], view).reshape(w.shape)
            update = moment / (1 - _BETA ** (i + 1)) / curvature + decay * w.abs()
            finite = g.isfinite()
            stored = inputs["stored_u"] * expected[i].abs()
            of_params.append(torch.where(finite, 16 * u * (w.abs() + _LR * update) + stored, 0))
            of_moments.append(torch.where(finite, 16 * u * moment, 0))
        return [*of_params, *of_moments, *(0.0 for _ in inputs["steps"]), 0.0]

    def inputs(source: Source) -> Inputs:
        return {**_step_inputs(source), "stored_u": torch.finfo(source.dtype).eps / 2}

    return Case("adafisher_step_", name, _SUM_DTYPES, inputs, call, tolerance)


def _naive_curvature(row: Tensor | None, column: Tensor | None, view: tuple[int, int, int]) -> Tensor:
    groups, rows, columns = view
    product = torch.ones(view, dtype=torch.float64)
    if row is not None:
        product = product * row.view(groups, rows, 1)
    if column is not None:
        product = product * column.view(groups, 1, columns)
    return product + _DAMPING


# One block a kernel, packed ones, and inverses that the rows of a layer with a bias share.
_MbfShapes = Sequence[tuple[tuple[int, ...], tuple[int, ...] | None]]  # of a parameter and of its inverse
_MBF: _MbfShapes = (((20, 3, 3, 3), (60, 9, 9)), ((7, 5), (7, 15)), ((12, 10), (1, 2, 6, 6)), ((12,), None))
_MBF_OTHERS: _MbfShapes = (
    ((50,), (50, 1, 1)),
    ((3, 25), (3, 25, 25)),
    ((6, 4), (6, 5, 5)),
    ((6,), None),
    ((2, 600), (1, 1, 601, 601)),
    ((2,), None),
    ((1, 513), (1, 513, 513)),
)


def _mbf_inputs(source: Source, shapes: _MbfShapes, channels_last: bool) -> Inputs:
    wide = Source(ACCUMULATOR[source.dtype], source.device, source.generator)
    inverses = [None if shape is None else wide.normal(*shape) for _, shape in shapes]
    for x in inverses:
        if x is not None and x.dim() > 2:
            x.add_(x.mT.clone())

    def tensors(source: Source) -> list[Tensor]:
        made = [source.normal(*shape) for shape, _ in shapes]
        return [x.to(memory_format=torch.channels_last) if x.dim() == 4 and channels_last else x for x in made]

    return {
        "params": tensors(source),
        "grads": tensors(source),
        "momentum_buffers": tensors(wide),
        "inverses": inverses,
        "stored_u": torch.finfo(source.dtype).eps / 2,
    }


def _mbf_case(name: str, shapes: _MbfShapes = _MBF, channels_last: bool = False, **options: Any) -> Case:
    def step(inputs: Inputs, **options: Any) -> list[Tensor]:
        names = ("params", "grads", "momentum_buffers", "inverses")
        plain = {"lr": _LR, "momentum": _BETA, "weight_decay": 0.0, "decoupled": False, "maximize": False}
        skipped, _ = ops.mbf_step_(*(inputs[name] for name in names), **{**plain, **options})
        return [*inputs["params"], *inputs["momentum_buffers"], skipped]

    def tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
        decay = options.get("weight_decay", 0.0)
        moments = [
            _BETA * m.abs() + g.abs() + decay * w.abs()
            for w, g, m in zip(inputs["params"], inputs["grads"], inputs["momentum_buffers"], strict=True)
        ]
        # The step of magnitudes leaves lr |P| |m| in parameters of 0.
        sizes = {
            "params": [torch.zeros_like(m) for m in moments],
            "grads": [-m for m in moments],
            "momentum_buffers": [torch.zeros_like(m) for m in moments],
            "inverses": [None if x is None else x.abs() for x in inputs["inverses"]],
        }
        with backends.use_backend("reference"):
            changes = step(sizes)[: len(moments)]
        of_params = [
            40 * u * (w.abs() + change + _LR * decay * w.abs()) + inputs["stored_u"] * e.abs()
            for w, change, e in zip(inputs["params"], changes, expected, strict=False)
        ]
        return [*of_params, *(16 * u * m for m in moments), 0.0]

    return Case(
        "mbf_step_",
        name,
        _SUM_DTYPES,
        lambda source: _mbf_inputs(source, shapes, channels_last),
        lambda inputs: step(inputs, **options),
        tolerance,
    )


# SOFIM: rounded moments and gradients change the dot products, which change the coefficients; all terms are bounded by
# their magnitudes.


def _sofim_inputs(source: Source) -> Inputs:
    wide = Source(ACCUMULATOR[source.dtype], source.device, source.generator)
    params = [source.normal(*shape) for shape in ((7, 13), (33,), (), (0, 4), (50, 70))]
    params.append(source.normal(12, 10).t())
    params.append(source.normal(4, 6, 3, 3).to(memory_format=torch.channels_last))
    grads = [torch.empty_like(p).copy_(source.normal(*p.shape)) for p in params]
    params.append(source.normal(9, 14))
    grads.append(source.normal(14, 9).t())  # in another order than its parameter
    _with_non_finite(grads[1])
    return {
        "params": params,
        "grads": grads,
        "exp_avgs": [torch.empty_like(p, dtype=wide.dtype).copy_(wide.normal(*p.shape)) for p in params],
        "steps": [torch.full((), float(i), device=source.device) for i in range(len(params))],
        "stored_u": torch.finfo(source.dtype).eps / 2,
    }


def _sofim_case(direction: str, scope: str, of_each: bool = False) -> Case:
    """With ``of_each`` a learning rate for each parameter, on its device, and weight decay in the gradient."""
    rho, decay = 5.0, 0.1

    def rates(steps: list[Tensor]) -> list[Tensor]:
        dtypes = torch.float32, torch.float64
        return [torch.full((), _LR, dtype=dtypes[i % 2], device=t.device) for i, t in enumerate(steps)]

    def call(inputs: Inputs) -> list[Tensor]:
        skipped, squares = ops.sofim_step_(
            *(inputs[name] for name in ("params", "grads", "exp_avgs", "steps")),
            lr=rates(inputs["steps"]) if of_each else _LR,
            beta=_BETA,
            rho=rho,
            direction=direction,
            scope=scope,
            weight_decay=decay,
            decoupled=not of_each,
        )
        return [*inputs["params"], *inputs["exp_avgs"], *inputs["steps"], squares, skipped]

    def tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
        gradients = [g.abs().nan_to_num(0, 0, 0) for g in inputs["grads"]]
        if of_each:
            gradients = [g + decay * w.abs() for g, w in zip(gradients, inputs["params"], strict=True)]
        moments = [_BETA * m.abs() + (1 - _BETA) * g for m, g in zip(inputs["exp_avgs"], gradients, strict=True)]
        corrected = [m / (1 - _BETA ** (i + 1)) for i, m in enumerate(moments)]
        squares = torch.stack([c.square().sum() for c in corrected])
        products = torch.stack([(c * g).sum() for c, g in zip(corrected, gradients, strict=True)])
        exact = expected[-2]
        if scope == "global":
            exact, all_squares, all_products = (x.sum().expand(len(x)) for x in (exact, squares, products))
        else:
            all_squares, all_products = squares, products
        of_params = []
        for i, (w, g, c) in enumerate(zip(inputs["params"], gradients, corrected, strict=True)):
            bottom = rho + exact[i]
            change = c / bottom * (1 + all_squares[i] / bottom)
            if direction == "gradient":
                change = (g + change * all_products[i]) / rho
            bound = 40 * u * (w.abs() + _LR * (change + decay * w.abs())) + inputs["stored_u"] * expected[i].abs()
            of_params.append(torch.where(inputs["grads"][i].isfinite(), bound, 0))
        of_moments = [torch.where(g.isfinite(), 16 * u * m, 0) for g, m in zip(inputs["grads"], moments, strict=True)]
        return [*of_params, *of_moments, *(0.0 for _ in inputs["steps"]), 32 * u * squares, 0.0]

    name = f"{direction}, {scope}" + (", rates of each" if of_each else "")
    return Case("sofim_step_", name, _SUM_DTYPES, _sofim_inputs, call, tolerance)


# Blocks. A factorisation moves the block by (n + 1) u of its norm at most, which the condition number amplifies;
# forming the inverse costs as much again, twice.


def _blocks(source: Source, n: int) -> Inputs:
    x = source.normal(37, n, n + 2)
    blocks = x @ x.mT / (n + 2)
    blocks[3, 0, -1] = math.nan  # for n > 1 in the triangle that is not inverted
    return {"blocks": blocks, "rhs": source.normal(37, n), "out": source.normal(37, n, n)}


def _block_errors(inputs: Inputs, u: float) -> Tensor:
    """Error of the inverse of each block in its 2-norm, and a number that counts for nothing where there is none."""
    n = inputs["blocks"].shape[-1]
    values = torch.linalg.eigvalsh(inputs["blocks"].nan_to_num() + _DAMPING * torch.eye(n, dtype=torch.float64))
    return 8 * (n + 1) * u * values[:, -1] / values[:, 0].square()


def _block_cases(n: int) -> list[Case]:
    def case(op: str, call: Callable[[Inputs], list[Tensor]], tolerance: Callable[..., list[Tolerance]]) -> Case:
        return Case(op, f"{n} x {n}", _FACTOR_DTYPES, lambda source: _blocks(source, n), call, tolerance)

    def of_inverse(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
        return [_block_errors(inputs, u)[:, None, None], u]

    def of_solution(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
        return [(_block_errors(inputs, u) * inputs["rhs"].norm(dim=1))[:, None], u]

    def of_product(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
        return [2 * (n + 1) * u * (inputs["out"].abs() @ inputs["rhs"].abs()[..., None])[..., 0]]

    def into(inputs: Inputs) -> list[Tensor]:
        info = ops.block_inverse_(inputs["out"], inputs["blocks"], _DAMPING)
        return [inputs["out"], info]

    return [
        case("block_inverse", lambda inputs: [*ops.block_inverse(inputs["blocks"], _DAMPING)], of_inverse),
        case("block_inverse_", into, of_inverse),
        case("block_solve", lambda i: [*ops.block_solve(i["blocks"], _DAMPING, i["rhs"])], of_solution),
        case("block_apply", lambda inputs: [ops.block_apply(inputs["out"], inputs["rhs"])], of_product),
    ]


# Inverses kept current: v, q and the outer products round about n times relative to P, and an error in v counts by the
# condition number. P is the inverse of a matrix whose eigenvalues lie between 0.5 and about 4.


def _update_inputs(source: Source, n: int, vectors: Sequence[int]) -> Inputs:
    x = source.normal(37, n, n + 2)
    inverse = torch.linalg.inv(x @ x.mT / (n + 2) + 0.5 * torch.eye(n, dtype=x.dtype, device=x.device))
    inverse = (inverse + inverse.mT) / 2
    inverse[3, 0, -1] = math.nan
    return {"inverse": inverse, "u": source.normal(37, *vectors, n)}


def _update_cases(n: int) -> list[Case]:
    def case(op: str, vectors: Sequence[int]) -> Case:
        function = getattr(ops, op)

        def call(inputs: Inputs) -> list[Tensor]:
            info = function(inputs["inverse"], inputs["u"], 0.9, 0.1)
            return [inputs["inverse"], info]

        def tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
            rounds = sum(vectors) or 1
            return [64 * (n + rounds) * rounds * u * expected[0].nan_to_num().abs().amax(), 0.0]

        return Case(op, f"{n} x {n}", _FACTOR_DTYPES, lambda s: _update_inputs(s, n, vectors), call, tolerance)

    return [case("rank_one_inverse_update_", ()), case("low_rank_inverse_update_", (3,))]


def _solve_case() -> Case:
    rho, shapes = 0.5, ((7, 13), (), (0, 3), (20_000,))

    def inputs(source: Source) -> Inputs:
        u, x = ([source.normal(*shape) for shape in shapes] for _ in range(2))
        return {"u": u, "x": x, "stored_u": torch.finfo(source.dtype).eps / 2}

    def tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
        square = sum(v.square().sum() for v in inputs["u"])
        along = sum((v * y).abs().sum() for v, y in zip(inputs["u"], inputs["x"], strict=True)) / (rho + square)
        return [
            8 * u * (y.abs() + along * v.abs()) / rho + inputs["stored_u"] * z.abs()
            for v, y, z in zip(inputs["u"], inputs["x"], expected, strict=True)
        ]

    return Case(
        "rank_one_solve",
        "four tensors",
        _SUM_DTYPES,
        inputs,
        lambda inputs: ops.rank_one_solve(inputs["u"], inputs["x"], rho),
        tolerance,
    )


# Grams: each entry is a sum of as many products as there are samples or rows, rounded as the sums of squares are but
# for signs: the magnitudes of the products stand for their sum.


def _mini_block_case(name: str, samples: int, blocks: int, n: int, decay: float = 0.0) -> Case:
    def call(inputs: Inputs) -> list[Tensor]:
        ops.mini_block_gram_(inputs["out"], inputs["v"], decay, 0.1)
        return [inputs["out"]]

    def tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
        v, old = inputs["v"].abs(), inputs["out"].abs()
        magnitude = 0.1 * torch.einsum("nbi,nbj->bij", v, v) + decay * (old.tril() + old.tril(-1).mT)
        return [(samples + 4) * u * magnitude]

    return Case(
        "mini_block_gram_",
        name,
        _SUM_DTYPES,
        lambda source: {"out": source.uniform(blocks, n, n), "v": source.normal(samples, blocks, n)},
        call,
        tolerance,
    )


def _convolution_case(
    name: str, channels: int, outputs: int, decay: float = 0.0, groups: int = 1, samples: int = 3
) -> Case:
    size, n = 6, 9

    def call(inputs: Inputs) -> list[Tensor]:
        ops.conv_mini_block_gram_(inputs["out"], inputs["x"], inputs["grad_output"], 3, 1, 1, 1, groups, decay, 0.1)
        return [inputs["out"]]

    def tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
        magnitude = inputs["out"].abs()
        with backends.use_backend("reference"):
            ops.conv_mini_block_gram_(
                magnitude, inputs["x"].abs(), inputs["grad_output"].abs(), 3, 1, 1, 1, groups, decay, 0.1
            )
        return [(2 * (size * size + 1) + samples + 4) * u * magnitude]

    return Case(
        "conv_mini_block_gram_",
        name,
        _SUM_DTYPES,
        lambda source: {
            "out": source.uniform(outputs, channels // groups, n, n),
            "x": source.normal(samples, channels, size, size),
            "grad_output": source.normal(samples, outputs, size, size),
        },
        call,
        tolerance,
    )


def _batch_norm_case(name: str, shape: tuple[int, ...], last: bool = False, given: bool = False) -> Case:
    channels, eps = shape[1], 1e-3

    def inputs(source: Source) -> Inputs:
        x, grad = (source.normal(*shape) for _ in range(2))
        if last:
            x, grad = (v.movedim(1, -1).contiguous().movedim(-1, 1) for v in (x, grad))
        mean, variance = (source.uniform(channels), source.uniform(channels)) if given else (None, None)
        return {"x": x, "grad_output": grad, "mean": mean, "variance": variance}

    def call(inputs: Inputs) -> list[Tensor]:
        return [*ops.batch_norm_gradients(inputs["x"], inputs["grad_output"], eps, inputs["mean"], inputs["variance"])]

    def tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
        x, size = (inputs[name].reshape(*shape[:2], -1) for name in ("x", "grad_output"))
        own_variance, own_mean = torch.var_mean(x, (0, 2), correction=0)
        mean, variance = (inputs["mean"], inputs["variance"]) if given else (own_mean, own_variance)
        distance = (x - mean[:, None]).abs() + own_variance.sqrt()[:, None]
        roundings = x.numel() // channels + 20
        products = (size.abs() * distance).sum(2) * (variance + eps).rsqrt()
        return [2 * roundings * u * products, roundings * u * size.abs().sum(2)]

    return Case("batch_norm_gradients", name, _SUM_DTYPES, inputs, call, tolerance)


def _gram_case(name: str, rows: int, columns: int, decay: float = 0.0, weighted: bool = True) -> Case:
    def inputs(source: Source) -> Inputs:
        out, x = source.uniform(columns, columns), source.normal(rows, columns)
        return {"out": out, "x": x, "weight": source.uniform(rows) if weighted else None}

    def call(inputs: Inputs) -> list[Tensor]:
        ops.weighted_gram_(inputs["out"], inputs["x"], inputs["weight"], decay, 0.1)
        return [inputs["out"]]

    def tolerance(inputs: Inputs, expected: list[Tensor], u: float) -> list[Tolerance]:
        x, old = inputs["x"].abs(), inputs["out"].abs()
        weighted = x if inputs["weight"] is None else x * inputs["weight"][:, None]
        return [(rows + 5) * u * (0.1 * weighted.mT @ x + decay * (old.tril() + old.tril(-1).mT))]

    return Case("weighted_gram_", name, _SUM_DTYPES, inputs, call, tolerance)


CASES: Sequence[Case] = (
    *_sum_cases("column_sum_of_squares", _COLUMNS),
    *_sum_cases("channel_sum_of_squares", _CHANNELS),
    *_patch_cases(),
    Case(
        "minmax",
        "vectors",
        _FACTOR_DTYPES,
        _minmax_inputs,
        lambda inputs: ops.minmax(inputs["x"], 1e-6),
        _minmax_tolerance,
    ),
    Case(
        "minmax",
        "weights",
        _FACTOR_DTYPES,
        lambda source: _weights(source, _minmax_inputs(source)),
        lambda inputs: ops.minmax(inputs["x"], 1e-6, inputs["weights"]),
        _minmax_tolerance,
    ),
    Case(
        "minmax_",
        "weights",
        _FACTOR_DTYPES,
        lambda source: _weights(source, _minmax_inputs(source)),
        _minmax_into,
        _minmax_tolerance,
    ),
    _ema_case("raw", 0.8, 0.2),
    _ema_case("sums and counts", 0.8, 0.2, divisors=(7.0, 3.0, 64.0, 5.0, 1.0, 9.0)),
    _ema_case("normalised", 0.08, 0.008, normalize=True, eps=1e-6),
    _ema_case("in pairs", 0.8, 0.2, joint=2),
    *(case for n in (1, 9, 16, 25, 64) for case in _block_cases(n)),
    *(case for n in (1, 4, 9, 25, 64, 70) for case in _update_cases(n)),
    _solve_case(),
    _mini_block_case("3 x 3 kernels", 65, 35, 9),
    _mini_block_case("no samples", 0, 3, 4, decay=0.9),
    *(_mini_block_case(f"one run of {n}", 7, 5, n, decay=0.9) for n in (1, 5, 9, 12, 25, 40)),
    *(_mini_block_case(f"runs of {n}", 33, 5, n) for n in (1, 5, 12, 25, 40)),
    _convolution_case("many input channels", 35, 7),
    _convolution_case("average of few input channels", 3, 37, decay=0.9, samples=9),
    _convolution_case("channel by channel", 18, 18, groups=18),
    _convolution_case("one input channel", 1, 7),
    _convolution_case("one input channel, average of many output channels", 1, 37, decay=0.9),
    _convolution_case("one output channel", 5, 1),
    _batch_norm_case("images", (7, 5, 5, 7)),
    _batch_norm_case("channels last", (5, 37, 3, 3), last=True),
    _batch_norm_case("short runs", (9, 21, 2, 3)),
    _batch_norm_case("given statistics", (9, 37), given=True),
    _batch_norm_case("vectors", (9, 37)),
    _batch_norm_case("long runs", (2, 3, 1030)),
    _batch_norm_case("long runs, channels last", (2, 5, 70), last=True),
    _gram_case("weighted", 131, 67),
    _gram_case("average", 600, 33, decay=0.9),
    _gram_case("without weights", 17, 130, weighted=False),
    _gram_case("no rows", 0, 5, decay=0.9),
    _gram_case("weighted, columns in sixteens", 131, 144),
    _gram_case("columns in sixteens", 70, 48, weighted=False),
    _gram_case("more columns in sixteens", 70, 144, weighted=False),
    _step_case("plain"),
    _step_case("weight decay in the gradient", weight_decay=0.1),
    _step_case("decoupled weight decay", weight_decay=0.1, decoupled=True),
    _step_case("maximised and scaled", maximize=True, scale=1024.0),
    _step_case("nothing at all after an overflow", scale=2.0, found_inf=True),
    _mbf_case("plain"),
    _mbf_case("weight decay in the gradient, maximised", weight_decay=0.1, maximize=True),
    _mbf_case("clipped, decoupled weight decay", weight_decay=0.1, decoupled=True, kl_clip=1e6),
    _mbf_case("channels last", channels_last=True, kl_clip=1e6),
    _mbf_case("other sizes", _MBF_OTHERS),
    _mbf_case("other sizes, clipped", _MBF_OTHERS, kl_clip=1e6),
    _sofim_case("momentum", "global"),
    _sofim_case("momentum", "tensor"),
    _sofim_case("gradient", "global"),
    _sofim_case("gradient", "tensor"),
    _sofim_case("momentum", "global", of_each=True),
    _sofim_case("gradient", "global", of_each=True),
)
