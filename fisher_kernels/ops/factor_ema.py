"""Normalisation and moving average of diagonal factors, for lists of vectors in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fisher_kernels._library import Native
from fisher_kernels.ops._define import check_coefficient, define, device_of
from fisher_kernels.ops._step import check_distinct, check_lists

FLAT = 1e-5
"""A vector whose spread is at most this share of its largest entry is equal to rounding: it has no shape."""


def _check_vectors(op: str, name: str, vectors: Sequence[Tensor]) -> None:
    for i, x in enumerate(vectors):
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name}[{i}] has dtype {x.dtype}, expected float32 or float64")
        if not (x.dim() == 1 and x.is_contiguous()):
            raise ValueError(
                f"{op}: {name}[{i}] has shape {tuple(x.shape)} and strides {x.stride()}, expected a contiguous vector"
            )


def _check_like(op: str, name: str, vectors: Sequence[Tensor], like_name: str, like: Sequence[Tensor]) -> None:
    """Each vector has the shape, dtype and device of its partner."""
    if len(vectors) != len(like):
        raise ValueError(f"{op}: {name} has {len(vectors)} tensors, expected {len(like)}, the length of {like_name}")
    for i, (x, y) in enumerate(zip(vectors, like, strict=True)):
        if x.shape != y.shape:
            raise ValueError(
                f"{op}: {name}[{i}] has shape {tuple(x.shape)}, expected {tuple(y.shape)}, "
                f"the shape of {like_name}[{i}]"
            )
        _check_same(op, f"{name}[{i}]", x, f"{like_name}[{i}]", y)


def _check_same(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Same dtype and device."""
    if x.dtype != like.dtype:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {like.dtype}, the dtype of {like_name}")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, expected {like.device}, the device of {like_name}")


# minmax


def _check_minmax(op: str, x: Sequence[Tensor], eps: float, weights: Sequence[Tensor] | None) -> None:
    check_coefficient(op, "eps", eps)
    _check_vectors(op, "x", x)
    if weights is not None:
        if len(weights) != len(x):
            raise ValueError(f"{op}: weights has {len(weights)} tensors, expected {len(x)}, the length of x")
        for i, (w, v) in enumerate(zip(weights, x, strict=True)):
            if w.numel() != 1:
                raise ValueError(f"{op}: weights[{i}] has shape {tuple(w.shape)}, expected one element")
            _check_same(op, f"weights[{i}]", w, f"x[{i}]", v)


def _minmax(x: Tensor, eps: float) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    low, high = x.aminmax()
    spread = high - low
    # An infinite spread is never flat: inf <= FLAT * inf would hold.
    flat = (spread <= FLAT * torch.maximum(low.abs(), high.abs())) & spread.isfinite()
    scaled = (x - low) / (spread + eps)
    scaled = torch.where(spread.isfinite(), scaled, torch.nan)
    return torch.where(flat, torch.ones_like(x), scaled)


def _minmax_fake(x: Sequence[Tensor], eps: float, weights: Sequence[Tensor] | None = None) -> list[Tensor]:
    _check_minmax("minmax", x, eps, weights)
    return [torch.empty_like(v) for v in x]


def _minmax_reference(x: Sequence[Tensor], eps: float, weights: Sequence[Tensor] | None = None) -> list[Tensor]:
    _check_minmax("minmax", x, eps, weights)
    if weights is None:
        return [_minmax(v, eps) for v in x]
    return [
        torch.where(w.reshape(()) == 0, torch.ones_like(v), _minmax(v / w.reshape(()), eps))
        for v, w in zip(x, weights, strict=True)
    ]


def _minmax_native(
    on: Native, x: Sequence[Tensor], eps: float, weights: Sequence[Tensor] | None = None
) -> list[Tensor]:
    outs = [torch.empty_like(v) for v in x]
    on.kernels.minmax(outs, x, weights, eps, on.place(device_of(x)))
    return outs


def _minmax_triton(x: Sequence[Tensor], eps: float, weights: Sequence[Tensor] | None = None) -> list[Tensor]:
    outs = [torch.empty_like(v) for v in x]
    _fill("minmax", outs, x, eps, weights, lambda: _check_minmax("minmax", x, eps, weights))
    return outs


def _fill(
    op: str,
    out: Sequence[Tensor],
    x: Sequence[Tensor],
    eps: float,
    weights: Sequence[Tensor] | None,
    check: Callable[[], None],
) -> None:
    """Run Triton's minmax; ``check`` checks lists that it has not seen before."""
    from fisher_kernels.triton_kernels import factor_ema

    check_coefficient(op, "eps", eps)
    if not x:
        check()
        return
    factor_ema.minmax(op, out, x, eps, weights, check)


_minmax_op = define(
    "minmax(Tensor[] x, float eps, Tensor[]? weights=None) -> Tensor[]",
    fake=_minmax_fake,
    reference=_minmax_reference,
    native=_minmax_native,
    triton=_minmax_triton,
)


def minmax(x: Sequence[Tensor], eps: float = 1e-6, weights: Sequence[Tensor] | None = None) -> list[Tensor]:
    r"""Scale each vector to the unit interval.

    .. math:: \operatorname{minmax}(x) = \frac{x - \min x}{\max x - \min x + \mathrm{eps}}

    A vector whose entries are all equal to rounding (``max - min <= 1e-5 max |x|``) has no shape to normalise and
    becomes ones; one with a NaN or an infinity becomes NaN throughout. ``eps`` is in the units of x: entries far below
    it are squeezed towards 0 (AdaFisher, arXiv 2405.16397, section 3.2).

    Args:
        x: contiguous vectors, float32 or float64.
        eps: added to the spread, finite and at least 0.
        weights: a one-element tensor for each vector, by which it is divided first (the bias correction of a moving
            average); where it is 0, nothing was averaged yet, the result is ones. None divides by nothing.

    Returns:
        New vectors with the shapes and dtypes of x.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, length or range; the message names it.
    """
    try:
        lists = list(x), None if weights is None else list(weights)
    except TypeError:
        check_lists("minmax", {"x": x, "weights": weights or ()})
        raise
    return _minmax_op(lists[0], eps, lists[1])


# minmax_


def _into_fake(out: Sequence[Tensor], x: Sequence[Tensor], eps: float, weights: Sequence[Tensor] | None = None) -> None:
    _check_minmax("minmax_", x, eps, weights)
    _check_vectors("minmax_", "out", out)
    _check_like("minmax_", "out", out, "x", x)
    check_distinct("minmax_", "out", out)


def _into_reference(
    out: Sequence[Tensor], x: Sequence[Tensor], eps: float, weights: Sequence[Tensor] | None = None
) -> None:
    _into_fake(out, x, eps, weights)
    for o, v in zip(out, _minmax_reference(x, eps, weights), strict=True):
        o.copy_(v)


def _into_native(
    on: Native, out: Sequence[Tensor], x: Sequence[Tensor], eps: float, weights: Sequence[Tensor] | None = None
) -> None:
    on.kernels.minmax_(out, x, weights, eps, on.place(device_of(x)))
    increment_version(out)


def _into_triton(
    out: Sequence[Tensor], x: Sequence[Tensor], eps: float, weights: Sequence[Tensor] | None = None
) -> None:
    _fill("minmax_", out, x, eps, weights, lambda: _into_fake(out, x, eps, weights))
    increment_version(out)


_into = define(
    "minmax_(Tensor(a!)[] out, Tensor[] x, float eps, Tensor[]? weights=None) -> ()",
    fake=_into_fake,
    reference=_into_reference,
    native=_into_native,
    triton=_into_triton,
)


def minmax_(
    out: Sequence[Tensor], x: Sequence[Tensor], eps: float = 1e-6, weights: Sequence[Tensor] | None = None
) -> None:
    r""":func:`minmax` into vectors that exist already.

    .. math:: \mathrm{out}_i \leftarrow \operatorname{minmax}(x_i)

    Args:
        out: vectors with the shapes and dtypes of x, which share no memory with it nor with one another; one that is in
            the list twice is refused.
        x, eps, weights: as :func:`minmax`.

    Raises:
        TypeError, ValueError: as :func:`minmax`; nothing is changed.
    """
    try:
        lists = list(out), list(x), None if weights is None else list(weights)
    except TypeError:
        check_lists("minmax_", {"out": out, "x": x, "weights": weights or ()})
        raise
    _into(lists[0], lists[1], eps, lists[2])


# factor_ema_


class _Average(NamedTuple):
    """The arguments of a call, in the order of the schema."""

    state: Sequence[Tensor]
    new: Sequence[Tensor]
    decay: float
    gain: float
    normalize: bool = False
    eps: float = 1e-6
    joint: int = 1
    divisors: Sequence[float] | None = None

    def check_numbers(self) -> None:
        for name, value in (("decay", self.decay), ("gain", self.gain), ("eps", self.eps)):
            check_coefficient("factor_ema_", name, value)
        count = len(self.state)
        if not (self.joint >= 1 and count % self.joint == 0):
            raise ValueError(f"factor_ema_: joint is {self.joint}, expected a divisor of {count}, the length of state")

    def check(self) -> None:
        op, state, new = "factor_ema_", self.state, self.new
        _check_vectors(op, "state", state)
        _check_vectors(op, "new", new)
        for name, values in (("new", new), ("divisors", self.divisors)):
            if values is not None and len(values) != len(state):
                raise ValueError(f"{op}: {name} has {len(values)} entries, expected {len(state)}, the length of state")
        for i, (x, s) in enumerate(zip(new, state, strict=True)):
            if len(x) not in (len(s), len(s) - 1):
                raise ValueError(
                    f"{op}: new[{i}] has shape {tuple(x.shape)}, expected {tuple(s.shape)}, the shape of state[{i}], "
                    "or one entry less"
                )
            _check_same(op, f"new[{i}]", x, f"state[{i}]", s)
        for i, divisor in enumerate(self.divisors or ()):
            check_coefficient(op, f"divisors[{i}]", divisor)
        self.check_numbers()
        check_distinct(op, "state", state)

    def new_rejected(self) -> Tensor:
        """Whether each run was refused, to be filled."""
        return torch.empty(len(self.state) // self.joint, dtype=torch.int64, device=device_of(self.state))


def _ema_fake(a: _Average) -> Tensor:
    a.check()
    return a.new_rejected()


def _ema_reference(a: _Average) -> Tensor:
    rejected = _ema_fake(a).zero_()
    values = []
    for x, s, divisor in zip(a.new, a.state, a.divisors or [1.0] * len(a.state), strict=True):
        mean = x / divisor
        values.append(mean if len(x) == len(s) else torch.cat((mean, mean.new_ones(1))))
    for run in range(len(rejected)):
        members = range(run * a.joint, (run + 1) * a.joint)
        finite = torch.stack([values[i].isfinite().all() for i in members]).all()
        for i in members:
            value = _minmax(values[i], a.eps) if a.normalize else values[i]
            a.state[i].copy_(torch.where(finite, a.decay * a.state[i] + a.gain * value, a.state[i]))
        rejected[run] = ~finite
    return rejected


def _ema_native(on: Native, a: _Average) -> Tensor:
    if not a.joint >= 1:
        raise ValueError(f"factor_ema_: joint is {a.joint}, expected at least 1")
    rejected = a.new_rejected()
    on.kernels.factor_ema_(
        a.state, a.new, a.divisors, rejected, a.decay, a.gain, a.normalize, a.eps, a.joint, on.place(device_of(a.state))
    )  # fmt: skip
    increment_version(a.state)  # for backward passes that kept it
    return rejected


def _ema_triton(a: _Average) -> Tensor:
    from fisher_kernels.triton_kernels import factor_ema

    a.check_numbers()
    if not a.state:
        a.check()
        return a.new_rejected()
    rejected = factor_ema.average(a)
    increment_version(a.state)
    return rejected


_ema = define(
    "factor_ema_(Tensor(a!)[] state, Tensor[] new, float decay, float gain, bool normalize=False, float eps=1e-6, "
    "int joint=1, float[]? divisors=None) -> Tensor",
    arguments=_Average,
    fake=_ema_fake,
    reference=_ema_reference,
    native=_ema_native,
    triton=_ema_triton,
)


def factor_ema_(
    state: Sequence[Tensor],
    new: Sequence[Tensor],
    decay: float,
    gain: float,
    normalize: bool = False,
    eps: float = 1e-6,
    joint: int = 1,
    divisors: Sequence[float] | None = None,
) -> Tensor:
    r"""Moving average of factors, in place.

    .. math::

        \mathrm{state} \leftarrow
            \mathrm{decay} \cdot \mathrm{state} + \mathrm{gain} \cdot \mathrm{new} / \mathrm{divisor}

    With ``normalize`` each vector goes through :func:`minmax` after its division. Runs of ``joint`` consecutive vectors
    are taken or refused together: where one of a run holds a NaN or an infinity, the states of that run stay as they
    were, so one bad backward cannot poison the average (AdaFisher, arXiv 2405.16397, Eq. 4).

    Args:
        state: contiguous vectors, float32 or float64; changed in place. One that is in the list twice is refused.
        new: vectors with the shapes and dtypes of state. One that is an entry shorter is followed by a 1 after its
            division: the factor of the input [h, 1] of an affine layer from the sums of h^2 alone.
        decay: coefficient of the old, finite and at least 0.
        gain: coefficient of the new, finite and at least 0; the usual average has ``gain = 1 - decay``.
        normalize: scale each new vector to the unit interval first.
        eps: of :func:`minmax`.
        joint: length of a run; divides the number of vectors.
        divisors: for each new vector a number of at least 0, the count that makes a mean of a sum; None divides by
            nothing. Division of nothing by 0 gives a NaN, which is refused.

    Returns:
        int64 (len(state) / joint,): 1 for each run that was refused, else 0; on the device of the states.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, length or range; the message names it,
            and nothing is changed.
    """
    try:
        counts = None if divisors is None else list(divisors)
        a = _Average(list(state), list(new), decay, gain, normalize, eps, joint, counts)
    except TypeError:
        check_lists("factor_ema_", {"state": state, "new": new, "divisors": divisors or ()})
        raise
    rejected: Tensor = _ema(a)
    return rejected
