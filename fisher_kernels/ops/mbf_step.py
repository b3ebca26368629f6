"""The mini-block Fisher update of a whole list of parameters in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fisher_kernels._library import Native
from fisher_kernels.ops._arguments import lacks_memory, without_autocast
from fisher_kernels.ops._blocks import unpack
from fisher_kernels.ops._define import ACCUMULATOR, check_coefficient, check_floating, define, device_of
from fisher_kernels.ops._step import (
    check_distinct,
    check_lengths,
    check_like,
    check_lists,
    check_one_element,
    check_rate,
    check_written,
    found_on_device,
    rate_of,
)

_OP = "mbf_step_"


class _Layout(NamedTuple):
    """A parameter with its bias seen as (rows, columns); each row consists of blocks of ``size`` and a remainder."""

    rows: int
    columns: int
    size: int

    @property
    def blocks(self) -> int:
        """In each row."""
        return -(-self.columns // self.size) if self.size else 1


def _layout(i: int, param: Tensor, inverse: Tensor, bias: Tensor | None) -> _Layout:
    """Which elements of parameter i, and of the bias that follows it, inverse i acts on."""
    numel, shape = param.numel(), tuple(inverse.shape)
    rows = (param.shape[0] if param.dim() else 1) if bias is None else bias.numel()
    columns = numel // rows if rows else math.prod(param.shape[1:])
    fits = rows * columns == numel
    columns += 0 if bias is None else 1  # no bool, which a symbolic size does not add
    total = rows * columns
    if len(shape) == 4:
        one, blocks, n, m = shape
        if fits and one == 1 and n == m and (blocks - 1) * n < columns <= blocks * n:
            return _Layout(rows, columns, n)
    elif len(shape) in (2, 3):
        count, length = shape[0], shape[-1]
        n = length if len(shape) == 3 else math.isqrt(2 * length)
        square = (shape[1] if len(shape) == 3 else n * (n + 1) // 2) == length
        if fits and square and count * n == total and (bias is None or total == 0 or n == columns):
            return _Layout(count, n, n)
    beside = "" if bias is None else f" and the bias params[{i + 1}] of shape {tuple(bias.shape)}"
    raise ValueError(
        f"{_OP}: inverses[{i}] has shape {shape}, expected (B, n, n) or (B, n (n + 1) / 2) with B * n = {total}"
        f"{'' if bias is None else f' and n = {columns}'}, or (1, S, n, n) with (S - 1) * n < {columns} <= S * n, for "
        f"params[{i}] of shape {tuple(param.shape)}{beside}"
    )


class _Entry(NamedTuple):
    """A parameter that has an inverse, maybe with the bias that follows it."""

    position: int  # in the lists
    inverse: Tensor
    layout: _Layout
    biased: bool

    def join(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The elements of the parameter and its bias as (rows, columns)."""
        rows, columns, _ = self.layout
        body = tensors[self.position].to(dtype).reshape(rows, columns - self.biased).contiguous()
        return torch.cat([body, tensors[self.position + 1].to(dtype).reshape(rows, 1)], 1) if self.biased else body

    def store(self, values: Tensor, tensors: Sequence[Tensor]) -> None:
        """Undoes ``join``."""
        body = tensors[self.position]
        body.copy_(values[:, : self.layout.columns - self.biased].reshape(body.shape))
        if self.biased:
            bias = tensors[self.position + 1]
            bias.copy_(values[:, -1:].reshape(bias.shape))

    def in_blocks(self, rows: Tensor) -> Tensor:
        """(rows, columns) as (rows, blocks, size), the last block filled up with zeros."""
        count, columns, size = self.layout
        blocks = self.layout.blocks
        return torch.nn.functional.pad(rows, (0, blocks * size - columns)).reshape(count, blocks, size)

    def in_rows(self, blocks: Tensor) -> Tensor:
        """Undoes ``in_blocks``."""
        return blocks.flatten(1)[:, : self.layout.columns]


class _Step(NamedTuple):
    """The arguments of a call, in the order of the schema."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momentum_buffers: Sequence[Tensor]
    inverses: Sequence[Tensor | None]
    lr: Tensor
    momentum: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    kl_clip: float | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def coupled_decay(self) -> float:
        """The decay that enters the gradient."""
        return 0.0 if self.decoupled else self.weight_decay

    def check(self) -> list[_Entry]:
        """All but the value of the learning rate; returns the parameters that have an inverse."""
        self.check_lengths()
        self.check_numbers()
        for i in range(len(self.params)):
            self.check_parameter(i)
        check_distinct(_OP, "params", self.params)
        check_distinct(_OP, "momentum_buffers", self.momentum_buffers)
        return [self.entry(i) for i, inverse in enumerate(self.inverses) if inverse is not None]

    def check_lengths(self) -> None:
        lists = {"grads": self.grads, "momentum_buffers": self.momentum_buffers, "inverses": self.inverses}
        check_lengths(_OP, self.params, lists)

    def check_numbers(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"{_OP}: momentum is {self.momentum}, expected 0 <= momentum < 1")
        check_coefficient(_OP, "weight_decay", self.weight_decay)
        if self.kl_clip is not None and not 0 < self.kl_clip < math.inf:
            raise ValueError(f"{_OP}: kl_clip is {self.kl_clip}, expected a finite number above 0, or None")
        for name, scalar in (("lr", self.lr), ("grad_scale", self.grad_scale), ("found_inf", self.found_inf)):
            check_one_element(_OP, name, scalar, device_of(self.params))

    def check_parameter(self, i: int) -> None:
        params, inverses = self.params, self.inverses
        p, inverse = params[i], inverses[i]
        check_floating(_OP, f"params[{i}]", p.dtype)
        wide = ACCUMULATOR[p.dtype]
        check_like(_OP, f"grads[{i}]", self.grads[i], p.dtype, i, p)
        check_like(_OP, f"momentum_buffers[{i}]", self.momentum_buffers[i], wide, i, p)
        check_written(_OP, f"params[{i}]", p)
        check_written(_OP, f"momentum_buffers[{i}]", self.momentum_buffers[i])
        if inverse is None:
            if i == 0 or inverses[i - 1] is None:
                raise ValueError(f"{_OP}: inverses[{i}] is None, expected the inverse of params[{i - 1}] before it")
            before = params[i - 1]
            if p.dtype != before.dtype:
                raise TypeError(
                    f"{_OP}: params[{i}] has dtype {p.dtype}, expected {before.dtype}, the dtype of params[{i - 1}]"
                )
            if p.device != before.device:
                raise ValueError(
                    f"{_OP}: params[{i}] is on {p.device}, expected {before.device}, the device of params[{i - 1}]"
                )
            return
        if inverse.dtype not in (wide, torch.bfloat16):
            raise TypeError(
                f"{_OP}: inverses[{i}] has dtype {inverse.dtype}, expected {wide} or bfloat16 beside params[{i}] of "
                f"dtype {p.dtype}"
            )
        if inverse.device != p.device:
            raise ValueError(
                f"{_OP}: inverses[{i}] is on {inverse.device}, expected {p.device}, the device of params[{i}]"
            )
        if not inverse.is_contiguous():
            raise ValueError(
                f"{_OP}: inverses[{i}] is not contiguous: shape {tuple(inverse.shape)}, strides {inverse.stride()}"
            )

    def is_biased(self, i: int) -> bool:
        """Whether the bias of parameter i follows it."""
        return i + 1 < len(self.params) and self.inverses[i + 1] is None

    def entry(self, i: int) -> _Entry:
        """Parameter i, which has an inverse."""
        inverse, biased = self.inverses[i], self.is_biased(i)
        assert inverse is not None
        return _Entry(i, inverse, _layout(i, self.params[i], inverse, self.params[i + 1] if biased else None), biased)

    def gradient(self, entry: _Entry) -> Tensor:
        """The gradient that enters the momentum, as (rows, columns)."""
        wide = ACCUMULATOR[self.params[entry.position].dtype]
        g = entry.join(self.grads, wide)
        if self.grad_scale is not None:
            g = g / self.grad_scale.to(wide).reshape(())  # on the CPU it may stay there: it enters as a number
        if self.maximize:
            g = -g
        return g + self.coupled_decay * entry.join(self.params, wide) if self.coupled_decay else g

    @without_autocast
    def multiply_shared(self, i: int, out: Tensor | None = None) -> Tensor:
        """P m as (blocks, rows, size) where all rows share an inverse: products of matrices, which are for BLAS."""
        entry = self.entry(i)
        g = self.gradient(entry)
        new = self.momentum * entry.join(self.momentum_buffers, g.dtype) + g
        return torch.bmm(entry.in_blocks(new).transpose(0, 1), entry.inverse[0].to(g.dtype), out=out)  # P is symmetric


def _results(s: _Step) -> tuple[Tensor, Tensor]:
    """The number of skipped blocks of each parameter, and the scale, to be filled."""
    device = device_of(s.params)
    return (
        torch.empty(len(s.params), dtype=torch.int64, device=device),
        torch.empty((), dtype=torch.float64, device=device),
    )


def _nothing(s: _Step) -> tuple[Tensor, Tensor]:
    """The same of a step that does nothing."""
    skipped, scale = _results(s)
    return skipped.zero_(), scale.fill_(1)


def _fake(s: _Step) -> tuple[Tensor, Tensor]:
    s.check()
    return _results(s)


def _blocks(inverse: Tensor, layout: _Layout) -> Tensor:
    """An inverse as (rows or 1, blocks or 1, n, n)."""
    if inverse.dim() == 4:
        return inverse
    return (inverse if inverse.dim() == 3 else unpack(inverse, layout.size)).unsqueeze(1)


def _reference(s: _Step) -> tuple[Tensor, Tensor]:
    entries = s.check()
    check_rate(_OP, s.lr)
    skipped, scale = _nothing(s)
    if s.found_inf is not None and bool(s.found_inf):
        return skipped, scale
    total = torch.zeros_like(scale)
    directions = []
    for entry in entries:
        g = s.gradient(entry)
        old = entry.join(s.momentum_buffers, g.dtype)
        new = s.momentum * old + g
        inverse = _blocks(entry.inverse, entry.layout).to(g.dtype)
        d = torch.einsum("rsij,rsj->rsi", inverse, entry.in_blocks(new))
        d = entry.in_blocks(entry.in_rows(d))  # zeros again where there are no columns
        finite = d.isfinite().all(-1, keepdim=True)
        skipped[entry.position] = finite.numel() - finite.sum()
        kept = entry.in_rows(finite.expand(d.shape))
        d = entry.in_rows(d)
        total += torch.where(kept, d.double() * g.double(), 0).sum()
        entry.store(torch.where(kept, new, old), s.momentum_buffers)
        directions.append((kept, d))
    rate = s.lr.to(scale.device, torch.float64).reshape(())
    if s.kl_clip is not None:
        size = rate * rate * total.abs()
        scale = torch.where(size > s.kl_clip, (s.kl_clip / size).sqrt(), scale)
    for entry, (kept, d) in zip(entries, directions, strict=True):
        w = entry.join(s.params, d.dtype)
        step = (rate * scale).to(d.dtype) * d
        if s.weight_decay and s.decoupled:
            step = step + (rate * s.weight_decay).to(d.dtype) * w
        entry.store(torch.where(kept, w - step, w).to(s.params[entry.position].dtype), s.params)
    return skipped, scale


def _directions(s: _Step) -> list[Tensor | None]:
    """Those of parameters under shared inverses, which the kernels do not form."""
    directions: list[Tensor | None] = [None] * len(s.params)
    shared = [i for i, inverse in enumerate(s.inverses) if inverse is not None and inverse.dim() == 4]
    if shared:
        s.check_lengths()
        check_one_element(_OP, "grad_scale", s.grad_scale, device_of(s.params))
    for i in shared:
        for k in range(i, i + 1 + s.is_biased(i)):
            s.check_parameter(k)
            for name, tensors in zip(s._fields[:4], s[:4], strict=True):
                x = tensors[k]
                if x is not None and lacks_memory(x):
                    raise ValueError(f"{_OP}: {name}[{k}] has no memory to read, expected some for its shape")
        directions[i] = s.multiply_shared(i).contiguous()
    return directions


def _native(on: Native, s: _Step) -> tuple[Tensor, Tensor]:
    directions = _directions(s)
    # The kernel multiplies in float32 or float64, and widens bfloat16 to the former.
    inverses = [
        x.double() if x is not None and x.dtype == torch.bfloat16 and p.dtype == torch.float64 else x
        for x, p in zip(s.inverses, s.params, strict=False)
    ] + list(s.inverses[len(s.params) :])
    skipped, scale = _results(s)
    place = on.place(device_of(s.params))
    on.kernels.mbf_step_(*s[:3], inverses, directions, *s[4:], skipped, scale, place)
    increment_version(s.params)  # for backward passes that kept them; momentum is in no graph
    return skipped, scale


def _triton(s: _Step) -> tuple[Tensor, Tensor]:
    from fisher_kernels.triton_kernels import mbf_step

    s.check_numbers()
    check_rate(_OP, s.lr)
    nothing, found_inf = found_on_device(s.found_inf, device_of(s.params))
    if nothing or not s.params:
        s.check()
        return _nothing(s)
    results = mbf_step.step(s._replace(found_inf=found_inf))
    increment_version(s.params)
    return results


_step = define(
    "mbf_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor?[] inverses, *, Tensor lr, "
    "float momentum, float weight_decay, bool decoupled, bool maximize, float? kl_clip=None, Tensor? grad_scale=None, "
    "Tensor? found_inf=None) -> (Tensor, Tensor)",
    arguments=_Step,
    fake=_fake,
    reference=_reference,
    native=_native,
    triton=_triton,
)


def mbf_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    inverses: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    kl_clip: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of mini-block Fisher (MBF) with heavy-ball momentum of a list of parameters, in place.

    With P the symmetric blocks of the inverses and λ the weight decay:

    .. math::

        g &= \pm\,\mathrm{grad} / \mathrm{grad\_scale} \quad (+\, \lambda w \text{ unless decoupled}) \\
        m &\leftarrow \mathrm{momentum} \cdot m + g \\
        d &= P m \quad \text{block by block} \\
        \mathrm{scale} &= \min \left( 1,
            \sqrt{\frac{\mathrm{kl\_clip}}{\mathrm{lr}^2 \left| \sum \langle d, g \rangle \right|}} \right) \\
        w &\leftarrow w - \mathrm{lr}\, (\mathrm{scale} \cdot d \quad (+\, \lambda w \text{ if decoupled}))

    The gradient is negated to maximise; the sum is over all parameters, and without ``kl_clip`` the scale is 1.

    The dimensions of an inverse tell how it lies on its parameter, taken in row-major order:

    - (B, n, n) with B * n elements: block b acts on elements b * n to b * n + n - 1.
    - (B, n (n + 1) / 2): the same, of each block the lower triangle, row after row.
    - (1, S, n, n): shared by all rows. With the parameter as (shape[0], columns), a vector having one column, block s
      acts on columns s * n to s * n + n - 1 of every row. The last block may reach past the end: columns that are not
      there count as zeros.
    - None: this parameter, a bias, is one more column after those of the parameter before it, whose inverse acts on
      the rows [W | b]: (rows, columns, columns), the same packed, or shared.

    A block whose direction d has a NaN or an infinity, as it has where a gradient in the block is not finite, keeps its
    parameters and momentum and does not enter the sum of <d, g>. Under a shared inverse that is one block of one row.
    Where ``found_inf`` is not 0 nothing changes at all (MBF, arXiv 2202.04124, Algorithm 1).

    Args:
        params: float32, float64, bfloat16 or float16, any shapes and strides without overlap. One that is in the list
            twice, or begins where another does, is refused, as it is of the momentum.
        grads: of the shapes and dtypes of params.
        momentum_buffers: m, of the shapes of params; float64 for float64 parameters, else float32.
        inverses: for each parameter as above; contiguous, symmetric (one triangle may be all that is read), in the
            dtype of the momentum, or stored in bfloat16.
        lr: learning rate, finite and at least 0: a real number or a tensor of one element.
        momentum: 0 <= momentum < 1.
        weight_decay: at least 0.
        decoupled: decay the weights rather than add the decay to the gradient.
        maximize: ascend rather than descend.
        kl_clip: bound of ``lr^2 |sum of <d, g>|``, finite and above 0, or None.
        grad_scale: one element by which gradients are divided, or None.
        found_inf: one element; the whole call does nothing where it is not 0.

    Returns:
        skipped, int64 (len(params),): how many blocks of each parameter were skipped, those of a bias counted with the
        parameter before it; and scale, float64 without dimensions. Both on the device of the parameters.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, length or range; the message names it,
            and nothing is changed.
    """
    try:
        s = _Step(
            list(params), list(grads), list(momentum_buffers), list(inverses),
            lr=rate_of(_OP, lr), momentum=momentum, weight_decay=weight_decay, decoupled=decoupled, maximize=maximize,
            kl_clip=kl_clip, grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
    except TypeError:
        check_lists(_OP, dict(zip(_Step._fields, (params, grads, momentum_buffers, inverses), strict=False)))
        raise
    skipped, scale = _step(s)
    return skipped, scale
