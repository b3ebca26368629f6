"""The step along preconditioned momentum of a list of parameters, bounded over all and layer by layer.

Three ops, as an optimizer multiplies matrices between the first two: ``heavy_ball_`` advances the momentum,
``direction_sums`` adds up what the bounds need, ``capped_step_`` takes the step. Nothing is read on the host.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fisher_kernels._library import Native
from fisher_kernels.ops._define import ACCUMULATOR, check_coefficient, check_floating, define, device_of
from fisher_kernels.ops._rounding import Rounding, check_roundings, check_steps, numbers_of_roundings, stored
from fisher_kernels.ops._step import (
    check_distinct,
    check_lengths,
    check_like,
    check_lists,
    check_moment,
    check_one_device,
    check_one_element,
    check_one_or_each,
    check_rates,
    check_result,
    check_written,
    floors_of_layers,
    found_on_device,
    numbers_of,
    one_or_each,
    rates_of,
    real,
)

_MOMENTUM, _SUMS, _STEP = "heavy_ball_", "direction_sums", "capped_step_"

_ROW = 4096
"""Elements that the reference adds up at a time: few enough for one thread."""


# The momentum.


class _Momentum(NamedTuple):
    """The arguments of heavy_ball_, in the order of the schema."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momentum_buffers: Sequence[Tensor]
    momentum: float
    weight_decay: float
    maximize: bool
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    steps: Sequence[Tensor] | None = None
    rounding: Sequence[int] | None = None

    def check_numbers(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"{_MOMENTUM}: momentum is {self.momentum}, expected 0 <= momentum < 1")
        check_coefficient(_MOMENTUM, "weight_decay", self.weight_decay)
        for name, scalar in (("grad_scale", self.grad_scale), ("found_inf", self.found_inf)):
            check_one_element(_MOMENTUM, name, scalar, device_of(self.params))
        check_roundings(_MOMENTUM, self.rounding, len(self.params))

    def check_lists(self) -> None:
        check_lengths(_MOMENTUM, self.params, {"grads": self.grads, "momentum_buffers": self.momentum_buffers})
        check_one_device(_MOMENTUM, self.params)
        for i, (p, g, m) in enumerate(zip(*self[:3], strict=True)):
            check_floating(_MOMENTUM, f"params[{i}]", p.dtype)
            check_like(_MOMENTUM, f"grads[{i}]", g, p.dtype, i, p)
            check_moment(_MOMENTUM, f"momentum_buffers[{i}]", m, i, p)
            check_written(_MOMENTUM, f"momentum_buffers[{i}]", m)
        check_distinct(_MOMENTUM, "momentum_buffers", self.momentum_buffers)
        check_steps(_MOMENTUM, self.steps, self.rounding, self.params)


def _skipped(params: Sequence[Tensor]) -> Tensor:
    """The number of skipped elements of each parameter, none so far."""
    return torch.zeros(len(params), dtype=torch.int64, device=device_of(params))


def _momentum_fake(s: _Momentum) -> Tensor:
    s.check_numbers()
    s.check_lists()
    return _skipped(s.params)


def _momentum_reference(s: _Momentum) -> Tensor:
    skipped = _momentum_fake(s)
    if s.found_inf is not None and bool(s.found_inf):
        return skipped
    for i, (w, g, m) in enumerate(zip(*s[:3], strict=True)):
        dtype = ACCUMULATOR[w.dtype]
        g = g.to(dtype)
        if s.grad_scale is not None:
            g = g / s.grad_scale.to(m.device, dtype).reshape(())
        if s.maximize:
            g = -g
        if s.weight_decay:
            g = g + s.weight_decay * w.to(dtype)
        new = s.momentum * m.to(dtype) + g
        finite = new.isfinite()
        skipped[i] = finite.numel() - finite.sum()
        m.copy_(torch.where(finite, stored(new, m.dtype, s.rounding, s.steps, i, low=True), m))
    return skipped


def _momentum_native(on: Native, s: _Momentum) -> Tensor:
    skipped = _skipped(s.params)
    on.kernels.heavy_ball_(*s, skipped, on.place(device_of(s.params)))
    return skipped  # the momentum is in no graph


def _momentum_triton(s: _Momentum) -> Tensor:
    from fisher_kernels.triton_kernels import capped_step

    s.check_numbers()
    nothing, found_inf = found_on_device(s.found_inf, device_of(s.params))
    if nothing or not s.params:
        s.check_lists()
        return _skipped(s.params)
    return capped_step.advance_momentum(s._replace(found_inf=found_inf), _skipped(s.params))


_heavy_ball = define(
    "heavy_ball_(Tensor[] params, Tensor[] grads, Tensor(a!)[] momentum_buffers, *, float momentum, "
    "float weight_decay, bool maximize, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor[]? steps=None, "
    "int[]? rounding=None) -> Tensor",
    arguments=_Momentum,
    fake=_momentum_fake,
    reference=_momentum_reference,
    native=_momentum_native,
    triton=_momentum_triton,
)


def heavy_ball_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    steps: Sequence[Tensor] | None = None,
    rounding: Sequence[Rounding] | None = None,
) -> Tensor:
    r"""Heavy-ball momentum of a list of parameters, in place, in one pass over memory.

    .. math::

        m \leftarrow \mathrm{momentum} \cdot m
            \pm \mathrm{grad} / \mathrm{grad\_scale} + \mathrm{weight\_decay} \cdot w

    The gradient is negated to maximise. An element whose momentum would not be finite, as after a gradient that is NaN
    or infinite, keeps the momentum it has. Where ``found_inf`` is not 0 nothing changes (Polyak, 1964; K-FAC's is
    preconditioned after it, :func:`capped_step_`).

    Args:
        params: float32, float64, bfloat16 or float16, any shapes and strides, on one device; read only where there is
            a weight decay.
        grads: of the shapes and dtypes of params.
        momentum_buffers: m, of the shapes of params, without overlap; float64 for float64 parameters, else float32 or
            bfloat16. One in bfloat16 is rounded as it is written: what is made of it later, directions and sums, is
            made of that. One that is in the list twice, or begins where another does, is refused.
        momentum: 0 <= momentum < 1.
        weight_decay: the one that enters the gradient (L2), at least 0.
        maximize: ascend rather than descend.
        grad_scale: one element by which gradients are divided, or None.
        found_inf: one element; the whole call does nothing where it is not 0.
        steps: with ``rounding``, the number of the step, one float32 element for each parameter; only read.
        rounding: for each parameter, by which random integers its momentum is rounded where it is bfloat16: the lower
            halves of those of the step; None rounds to nearest.

    Returns:
        int64 (len(params),): how many elements of each parameter were skipped, on the device of the parameters.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, length or range; the message names it,
            and nothing is changed.
    """
    try:
        s = _Momentum(
            list(params), list(grads), list(momentum_buffers),
            momentum=momentum, weight_decay=weight_decay, maximize=maximize, grad_scale=grad_scale, found_inf=found_inf,
            steps=None if steps is None else list(steps), rounding=numbers_of_roundings(_MOMENTUM, rounding, params),
        )  # fmt: skip
    except TypeError:
        given = dict(zip(_Momentum._fields, (params, grads, momentum_buffers), strict=False))
        check_lists(_MOMENTUM, given if steps is None else {**given, "steps": steps})
        raise
    skipped: Tensor = _heavy_ball(s)
    return skipped


# The sums.


class _Sums(NamedTuple):
    """The arguments of direction_sums, in the order of the schema."""

    params: Sequence[Tensor]
    directions: Sequence[Tensor]
    momentum_buffers: Sequence[Tensor]
    skipped: Tensor | None = None
    products: bool = True
    weights: bool = True

    def check_lengths(self) -> None:
        lists = {"directions": self.directions, "momentum_buffers": self.momentum_buffers}
        check_lengths(_SUMS, self.params, lists)
        if self.skipped is not None:
            check_result(_SUMS, "skipped", self.skipped, torch.int64, (len(self.params),), device_of(self.params))

    def check_lists(self) -> None:
        check_one_device(_SUMS, self.params)
        for i, (p, d, m) in enumerate(zip(*self[:3], strict=True)):
            check_floating(_SUMS, f"params[{i}]", p.dtype)
            check_like(_SUMS, f"directions[{i}]", d, ACCUMULATOR[p.dtype], i, p)
            check_moment(_SUMS, f"momentum_buffers[{i}]", m, i, p)


def _new_sums(s: _Sums) -> Tensor:
    return torch.empty(len(s.params), 3, dtype=torch.float64, device=device_of(s.params))


def _sums_fake(s: _Sums) -> Tensor:
    s.check_lengths()
    s.check_lists()
    return _new_sums(s)


def _total(x: Tensor) -> Tensor:
    """The sum of all elements, in an order that neither strides nor the number of threads change."""
    flat = x.reshape(-1)
    whole = len(flat) // _ROW * _ROW
    return flat[:whole].view(-1, _ROW).sum(1).sum() + flat[whole:].sum()


def _sums_reference(s: _Sums) -> Tensor:
    sums = _sums_fake(s).zero_()
    for i, (w, d, m) in enumerate(zip(*s[:3], strict=True)):
        wide = d.double()
        if s.products:
            sums[i, 0] = _total(wide * m.double())
        sums[i, 1] = _total(wide.square())
        if s.weights:
            sums[i, 2] = _total(w.double().square())
    if s.skipped is not None:
        sums.masked_fill_((s.skipped > 0).unsqueeze(1), math.nan)
    return sums


def _sums_native(on: Native, s: _Sums) -> Tensor:
    sums = _new_sums(s)
    on.kernels.direction_sums(*s, sums, on.place(device_of(s.params)))
    return sums


def _sums_triton(s: _Sums) -> Tensor:
    from fisher_kernels.triton_kernels import capped_step

    s.check_lengths()
    if not s.params:
        return _sums_fake(s)
    return capped_step.add_up(s, _new_sums(s))


_direction_sums = define(
    "direction_sums(Tensor[] params, Tensor[] directions, Tensor[] momentum_buffers, *, Tensor? skipped=None, "
    "bool products=True, bool weights=True) -> Tensor",
    arguments=_Sums,
    fake=_sums_fake,
    reference=_sums_reference,
    native=_sums_native,
    triton=_sums_triton,
)


def direction_sums(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    skipped: Tensor | None = None,
    products: bool = True,
    weights: bool = True,
) -> Tensor:
    r"""What the bounds of a step need to know of a list of parameters, in one pass over memory.

    .. math::

        \mathrm{sums}_{i} = \left( \langle d_i, m_i \rangle, \; |d_i|^2, \; |w_i|^2 \right)

    with d the direction of parameter w, which came of its momentum m. All is added up in float64: squares of what
    float32 holds fit. Sums that pass the range of float64 are infinite or NaN, and :func:`capped_step_` takes no step
    with those.

    Args:
        params: float32, float64, bfloat16 or float16, any shapes and strides, on one device.
        directions: of the shapes of params; float64 for float64 parameters, else float32.
        momentum_buffers: likewise, or bfloat16 where that is float32.
        skipped: what :func:`heavy_ball_` returned, int64 (len(params),), or None: the sums of a parameter of which an
            element was skipped are NaN.
        products: whether ``<d, m>`` is wanted; if not it is 0, and the momentum is not read.
        weights: whether ``|w|^2`` is wanted; if not it is 0, and the parameters are not read.

    Returns:
        float64 (len(params), 3), on the device of the parameters. Those of parts of a tensor add up to those of all of
        it.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or length; the message names it.
    """
    try:
        s = _Sums(list(params), list(directions), list(momentum_buffers), skipped, products, weights)
    except TypeError:
        check_lists(_SUMS, dict(zip(_Sums._fields, (params, directions, momentum_buffers), strict=False)))
        raise
    sums: Tensor = _direction_sums(s)
    return sums


# The step.


class _Step(NamedTuple):
    """The arguments of capped_step_, in the order of the schema."""

    params: Sequence[Tensor]
    directions: Sequence[Tensor]
    sums: Tensor
    layers: Sequence[int]
    lr: Sequence[Tensor]
    weight_decay: Sequence[float]
    kl_clip: float | None
    max_relative_step: Sequence[float]
    floor: Sequence[float]
    found_inf: Tensor | None = None
    steps: Sequence[Tensor] | None = None
    rounding: Sequence[int] | None = None

    @property
    def layer_count(self) -> int:
        """What it is where the numbers of the layers are good, and no more than there can be where they are not."""
        return max(0, min(self.layers[-1] + 1, len(self.layers))) if self.layers else 0

    def floors(self) -> list[float]:
        """The floor of the layer of each parameter."""
        return floors_of_layers(self.floor, self.layers)

    def check_numbers(self) -> None:
        if self.kl_clip is not None and not 0 < self.kl_clip < math.inf:
            raise ValueError(f"{_STEP}: kl_clip is {self.kl_clip}, expected a finite number above 0, or None")
        for name in ("lr", "weight_decay", "max_relative_step", "floor"):
            check_one_or_each(_STEP, name, getattr(self, name), self.params)
        for name in ("weight_decay", "floor"):
            for i, value in enumerate(getattr(self, name)):
                check_coefficient(_STEP, f"{name}[{i}]", value)
        for i, most in enumerate(self.max_relative_step):
            if not most > 0:
                raise ValueError(f"{_STEP}: max_relative_step[{i}] is {most}, expected a number above 0, or None")
        device = device_of(self.params)
        for name, scalar in (*((f"lr[{i}]", x) for i, x in enumerate(self.lr)), ("found_inf", self.found_inf)):
            check_one_element(_STEP, name, scalar, device)
        check_result(_STEP, "sums", self.sums, torch.float64, (len(self.params), 3), device)
        check_roundings(_STEP, self.rounding, len(self.params))
        self.check_layers()

    def check_layers(self) -> None:
        if len(self.layers) != len(self.params):
            raise ValueError(
                f"{_STEP}: layers has {len(self.layers)} entries, expected {len(self.params)}, the length of params"
            )
        before = -1
        for i, layer in enumerate(self.layers):
            if layer != before + 1 and (i == 0 or layer != before):
                wanted = f"{before} or {before + 1}, as layers are numbered in order" if i else "0"
                raise ValueError(f"{_STEP}: layers[{i}] is {layer}, expected {wanted}")
            before = layer

    def check_lists(self) -> None:
        check_lengths(_STEP, self.params, {"directions": self.directions})
        check_one_device(_STEP, self.params)
        for i, (p, d) in enumerate(zip(self.params, self.directions, strict=True)):
            check_floating(_STEP, f"params[{i}]", p.dtype)
            check_like(_STEP, f"directions[{i}]", d, ACCUMULATOR[p.dtype], i, p)
            check_written(_STEP, f"params[{i}]", p)
        check_distinct(_STEP, "params", self.params)
        check_steps(_STEP, self.steps, self.rounding, self.params)


def _results(s: _Step) -> tuple[Tensor, Tensor, Tensor]:
    """The scale of all, the factor of each layer, the number of skipped elements of each parameter: to be filled."""
    device = device_of(s.params)
    return (
        torch.empty((), dtype=torch.float64, device=device),
        torch.empty(s.layer_count, dtype=torch.float64, device=device),
        torch.empty(len(s.params), dtype=torch.int64, device=device),
    )


def _nothing(s: _Step) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a step that does nothing."""
    scale, factors, skipped = _results(s)
    return scale.fill_(1), factors.fill_(1), skipped.zero_()


def _step_fake(s: _Step) -> tuple[Tensor, Tensor, Tensor]:
    s.check_numbers()
    s.check_lists()
    return _results(s)


def _of_each(values: Sequence[Any], s: _Step) -> Sequence[Any]:
    return values if len(values) == len(s.params) else [*values] * len(s.params)


def _members(s: _Step) -> list[range]:
    """The parameters of each layer."""
    firsts = [i for i, layer in enumerate(s.layers) if i == 0 or layer != s.layers[i - 1]]
    return [range(*ends) for ends in itertools.pairwise([*firsts, len(s.layers)])]


def _step_reference(s: _Step) -> tuple[Tensor, Tensor, Tensor]:
    s.check_numbers()
    s.check_lists()
    check_rates(_STEP, s.lr)
    scale, factors, skipped = _nothing(s)
    if s.found_inf is not None and bool(s.found_inf):
        return scale, factors, skipped
    layers = _members(s)
    rates = [rate.to(scale.device, torch.float64).reshape(()) for rate in _of_each(s.lr, s)]
    taken = [bool(s.sums[members.start : members.stop].isfinite().all()) for members in layers]
    total = torch.zeros_like(scale)
    for members in (members for members, takes in zip(layers, taken, strict=True) if takes):
        for i in members:
            total += rates[i] ** 2 * s.sums[i, 0]
    if s.kl_clip is not None and not total.abs() <= s.kl_clip:
        scale.copy_(torch.where(total.isfinite(), (s.kl_clip / total.abs()).sqrt(), 0.0))
    caps, floors, decays = _of_each(s.max_relative_step, s), s.floors(), _of_each(s.weight_decay, s)
    for layer, members in enumerate(layers):
        if not taken[layer]:
            factors[layer] = 0
            for i in members:
                skipped[i] = s.params[i].numel()
            continue
        length, weight = torch.zeros_like(scale), torch.zeros_like(scale)
        for i in members:
            length += rates[i] ** 2 * s.sums[i, 1]
            weight += s.sums[i, 2]
        least = floors[members.start] * math.sqrt(sum(s.params[i].numel() for i in members))
        limit = min(caps[i] for i in members) * weight.sqrt().clamp(min=least)
        length = scale * length.sqrt()
        if length > limit:
            factors[layer] = limit / length
        for i in members:
            w, d = s.params[i], s.directions[i]
            wide = w.to(d.dtype)
            step = (rates[i] * scale * factors[layer]).to(d.dtype) * d
            if decays[i]:
                step = step + (rates[i] * decays[i]).to(d.dtype) * wide
            w.copy_(stored(wide - step, w.dtype, s.rounding, s.steps, i, low=False))
    return scale, factors, skipped


def _step_native(on: Native, s: _Step) -> tuple[Tensor, Tensor, Tensor]:
    results = _results(s)
    on.kernels.capped_step_(*s, *results, on.place(device_of(s.params)))
    increment_version(s.params)  # for backward passes that kept them
    return results


def _step_triton(s: _Step) -> tuple[Tensor, Tensor, Tensor]:
    from fisher_kernels.triton_kernels import capped_step

    s.check_numbers()
    check_rates(_STEP, s.lr)
    nothing, found_inf = found_on_device(s.found_inf, device_of(s.params))
    if nothing or not s.params:
        s.check_lists()
        return _nothing(s)
    results = _results(s)
    capped_step.step(s._replace(found_inf=found_inf), *results)
    increment_version(s.params)
    return results


_capped_step = define(
    "capped_step_(Tensor(a!)[] params, Tensor[] directions, Tensor sums, int[] layers, *, Tensor[] lr, "
    "float[] weight_decay, float? kl_clip, float[] max_relative_step, float[] floor, Tensor? found_inf=None, "
    "Tensor[]? steps=None, int[]? rounding=None) -> (Tensor, Tensor, Tensor)",
    arguments=_Step,
    fake=_step_fake,
    reference=_step_reference,
    native=_step_native,
    triton=_step_triton,
)


def _caps(max_relative_step: Any) -> list[float]:
    """Infinity for none."""
    values = [max_relative_step] if max_relative_step is None else one_or_each(max_relative_step)
    return [
        math.inf if x is None else x if isinstance(x, (float, int)) else real(_STEP, f"max_relative_step[{i}]", x)
        for i, x in enumerate(values)
    ]


def capped_step_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    sums: Tensor,
    layers: Sequence[int],
    *,
    lr: float | Tensor | Sequence[float | Tensor],
    weight_decay: float | Sequence[float] = 0.0,
    kl_clip: float | None = None,
    max_relative_step: float | Sequence[float | None] | None = None,
    floor: float | Sequence[float] = 1e-3,
    found_inf: Tensor | None = None,
    steps: Sequence[Tensor] | None = None,
    rounding: Sequence[Rounding] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""One step of a list of parameters along given directions, in place, in one pass over memory.

    It is bounded twice: over all parameters by a trust region, which is in the change of the model that
    :math:`\langle d, m \rangle` measures where :math:`d = F^{-1} m`, and in each layer, weight and bias together, by
    the size of what it changes. With the sums of :func:`direction_sums`:

    .. math::

        \mathrm{scale} &= \min \left( 1,
            \sqrt{\frac{\mathrm{kl\_clip}}{\left| \sum_i \mathrm{lr}_i^2 \langle d_i, m_i \rangle \right|}} \right) \\
        \mathrm{factor}_l &= \min \left( 1, \frac{\mathrm{max\_relative\_step} \cdot
            \max \left( |w_l|, \mathrm{floor}_l \sqrt{n_l} \right)}
            {\mathrm{scale} \sqrt{\sum_{i \in l} \mathrm{lr}_i^2 |d_i|^2}} \right) \\
        w_i &\leftarrow w_i - \mathrm{lr}_i \left(
            \mathrm{scale} \cdot \mathrm{factor}_l\, d_i + \mathrm{weight\_decay}_i\, w_i \right)

    :math:`n_l` is the number of elements of layer l and :math:`|w_l|` the norm of all of them. The floor lets a layer
    move that begins at zero. Without ``kl_clip`` the scale is 1, without ``max_relative_step`` a factor is.

    A layer of which a sum is not finite keeps its parameters and is in no sum. If the sum over all layers passes the
    range of float64 the scale is 0. Where ``found_inf`` is not 0 nothing changes at all.

    Args:
        params: float32, float64, bfloat16 or float16, any shapes and strides without overlap, on one device. One that
            is in the list twice, or begins where another does, is refused.
        directions: d, of the shapes of params; float64 for float64 parameters, else float32.
        sums: float64 (len(params), 3), contiguous, as :func:`direction_sums` returns them: of all processes together
            where they share tensors among them.
        layers: for each parameter the number of its layer, from 0 on in the order of the parameters; those of a layer
            follow one another.
        lr: learning rate, finite and at least 0: a real number or a tensor of one element, or one for each parameter.
        weight_decay: decoupled, at least 0; one number, or one for each parameter.
        kl_clip: bound of ``|sum of lr^2 <d, m>|``, finite and above 0, or None.
        max_relative_step: bound of the norm of a layer's step (without the decay) by that of its parameters, above 0,
            or None; one, or one for each parameter, of which the smallest in a layer counts.
        floor: the least root mean square that a layer's parameters count as, at least 0; one, or one for each
            parameter, of which the smallest in a layer counts.
        found_inf: one element; the whole call does nothing where it is not 0.
        steps: with ``rounding``, the number of the step, one float32 element for each parameter; only read.
        rounding: for each parameter, by which random integers it is rounded where it is bfloat16: the upper halves of
            those of the step; None rounds to nearest.

    Returns:
        scale, float64 without dimensions; the factors, float64 (layers,), below 1 where a layer was capped and 0 where
        it was left alone; skipped, int64 (len(params),): how many elements of each parameter were left alone. All on
        the device of the parameters.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, length or range; the message names it,
            and nothing is changed.

    Source: the trust region is that of K-FAC with ``<d, m> = d^T F d`` (Wu et al., arXiv 1708.05144, section 3.2, after
    Ba et al., 2017); the cap takes the ratio of norms of LARS (You et al., arXiv 1708.03888) as a bound.
    """
    try:
        s = _Step(
            list(params), list(directions), sums, list(layers),
            lr=rates_of(_STEP, lr), weight_decay=numbers_of(_STEP, "weight_decay", weight_decay), kl_clip=kl_clip,
            max_relative_step=_caps(max_relative_step), floor=numbers_of(_STEP, "floor", floor), found_inf=found_inf,
            steps=None if steps is None else list(steps), rounding=numbers_of_roundings(_STEP, rounding, params),
        )  # fmt: skip
    except TypeError:
        given = {"params": params, "directions": directions, "layers": layers}
        check_lists(_STEP, given if steps is None else {**given, "steps": steps})
        raise
    scale, factors, skipped = _capped_step(s)
    return scale, factors, skipped
