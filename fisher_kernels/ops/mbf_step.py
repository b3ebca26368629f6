"""The mini-block Fisher update of a whole list of parameters in one call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version

from fisher_kernels._library import CPU, Native
from fisher_kernels.ops._arguments import lacks_memory, without_autocast
from fisher_kernels.ops._blocks import unpack
from fisher_kernels.ops._define import ACCUMULATOR, check_coefficient, check_floating, define, device_of
from fisher_kernels.ops._step import (
    as_moment,
    check_distinct,
    check_lengths,
    check_like,
    check_lists,
    check_moment,
    check_one_element,
    check_one_or_each,
    check_rate,
    check_written,
    floors_of_layers,
    found_on_device,
    numbers_of,
    rates_of,
)

_OP = "mbf_step_"
ALONG = ("momentum", "gradient")


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


def _is_same(x: object, y: object) -> bool:
    """Whether two settings are one; of tensors without memory nothing is known."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return x == y
    if x is y or isinstance(x, FakeTensor) or isinstance(y, FakeTensor):
        return True
    return x.item() == y.item() if x.is_cpu and y.is_cpu else x.data_ptr() == y.data_ptr()


class _Step(NamedTuple):
    """The arguments of a call, in the order of the schema."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momentum_buffers: Sequence[Tensor]
    inverses: Sequence[Tensor | None]
    lr: Sequence[Tensor]
    momentum: float
    weight_decay: Sequence[float]
    decoupled: bool
    maximize: bool
    kl_clip: float | None = None
    kl_along: str = "momentum"
    max_relative_step: float | None = None
    floor: Sequence[float] = (1e-3,)
    layers: Sequence[int] | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def rate(self, i: int) -> Tensor:
        """The learning rate of parameter i."""
        return self.lr[i if len(self.lr) > 1 else 0]

    def decay(self, i: int) -> float:
        """The weight decay of parameter i."""
        return self.weight_decay[i if len(self.weight_decay) > 1 else 0]

    def coupled_decay(self, i: int) -> float:
        """The decay that enters the gradient of parameter i."""
        return 0.0 if self.decoupled else self.decay(i)

    @property
    def waits(self) -> bool:
        """Whether the step must wait for sums over all parameters, or over a layer."""
        return self.kl_clip is not None or self.max_relative_step is not None

    def layer(self, i: int) -> int:
        """The layer of parameter i, which has an inverse; without a list each is one, with its bias."""
        return i if self.layers is None else self.layers[i]

    def floors(self) -> list[float]:
        """The floor of the layer of each parameter."""
        return floors_of_layers(self.floor, range(len(self.params)) if self.layers is None else self.layers)

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

    def check_each(self) -> None:
        """There is one of a setting for all parameters, or one for each."""
        for name in ("lr", "weight_decay", "floor"):
            check_one_or_each(_OP, name, getattr(self, name), self.params)
        count = len(self.params)
        if self.layers is not None and len(self.layers) != count:
            raise ValueError(f"{_OP}: layers has {len(self.layers)} entries, expected {count}, the length of params")

    def check_numbers(self) -> None:
        self.check_each()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"{_OP}: momentum is {self.momentum}, expected 0 <= momentum < 1")
        for name in ("kl_clip", "max_relative_step"):
            bound = getattr(self, name)
            if bound is not None and not 0 < bound < math.inf:
                raise ValueError(f"{_OP}: {name} is {bound}, expected a finite number above 0, or None")
        if self.kl_along not in ALONG:
            raise ValueError(f"{_OP}: kl_along is {self.kl_along!r}, expected one of {', '.join(map(repr, ALONG))}")
        for name in ("weight_decay", "floor"):
            for i, value in enumerate(getattr(self, name)):
                check_coefficient(_OP, f"{name}[{i}]", value)
        scalars = {f"lr[{i}]": rate for i, rate in enumerate(self.lr)}
        for name, scalar in (*scalars.items(), ("grad_scale", self.grad_scale), ("found_inf", self.found_inf)):
            check_one_element(_OP, name, scalar, device_of(self.params))
        for i, inverse in enumerate(self.inverses):
            if i and inverse is None:
                self.check_joined(i)

    def check_joined(self, i: int) -> None:
        """A bias takes its step with the parameter before it."""
        beside: dict[str, Sequence[object] | None] = {
            "lr": self.lr, "weight_decay": self.weight_decay, "floor": self.floor, "layers": self.layers,
        }  # fmt: skip
        for name, values in beside.items():
            if values is not None and i < len(values) and not _is_same(values[i], values[i - 1]):
                raise ValueError(
                    f"{_OP}: {name}[{i}] is not {name}[{i - 1}], expected the same, as params[{i}] is stepped together "
                    f"with params[{i - 1}]"
                )

    def check_rates(self) -> None:
        """The values of learning rates; what is the same tensor as the one before is not read again."""
        for i, rate in enumerate(self.lr):
            if i == 0 or rate is not self.lr[i - 1]:
                check_rate(_OP, rate, f"lr[{i}]")

    def check_parameter(self, i: int) -> None:
        params, inverses = self.params, self.inverses
        p, inverse = params[i], inverses[i]
        check_floating(_OP, f"params[{i}]", p.dtype)
        wide = ACCUMULATOR[p.dtype]
        check_like(_OP, f"grads[{i}]", self.grads[i], p.dtype, i, p)
        check_moment(_OP, f"momentum_buffers[{i}]", self.momentum_buffers[i], i, p)
        check_written(_OP, f"params[{i}]", p)
        check_written(_OP, f"momentum_buffers[{i}]", self.momentum_buffers[i])
        if inverse is None:
            if i == 0 or inverses[i - 1] is None:
                raise ValueError(f"{_OP}: inverses[{i}] is None, expected the inverse of params[{i - 1}] before it")
            before = params[i - 1]
            for name, tensors in (("params", params), ("momentum_buffers", self.momentum_buffers)):
                found, wanted = tensors[i].dtype, tensors[i - 1].dtype
                if found != wanted:
                    raise TypeError(
                        f"{_OP}: {name}[{i}] has dtype {found}, expected {wanted}, the dtype of {name}[{i - 1}]"
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
        parts = [g for g, _ in self._entering(entry)]
        return torch.cat(parts, 1) if entry.biased else parts[0].contiguous()

    def _entering(self, entry: _Entry) -> Iterator[tuple[Tensor, Tensor]]:
        """What enters the momentum of a parameter, and of its bias, and the momentum, each as (rows, columns)."""
        rows, columns, _ = entry.layout
        decay = self.coupled_decay(entry.position)
        for i, width in ((entry.position, columns - entry.biased), (entry.position + 1, 1))[: 1 + entry.biased]:
            wide = ACCUMULATOR[self.params[i].dtype]
            g = self.grads[i].to(wide)
            if self.grad_scale is not None:
                g = g / self.grad_scale.to(wide).reshape(())  # on the CPU it may stay there: it enters as a number
            if self.maximize:
                g = -g
            g = g + decay * self.params[i].to(wide) if decay else g
            yield g.reshape(rows, width), self.momentum_buffers[i].to(wide).reshape(rows, width)

    @without_autocast
    def multiply_shared(self, i: int, out: Tensor | None = None) -> Tensor:
        """P m as (blocks, rows, size) where all rows share an inverse: products of matrices, which are for BLAS."""
        entry = self.entry(i)
        new = self._new_momentum(entry)
        assert entry.inverse is not None
        return torch.bmm(new.transpose(0, 1), entry.inverse[0].to(new.dtype), out=out)  # P is symmetric

    def _new_momentum(self, entry: _Entry) -> Tensor:
        """The momentum after this step as (rows, blocks, size), the last block filled up with zeros.

        It is written where it is multiplied: memory is read and written once, where ``join`` and sums of what it
        returns would pass over it ten times.
        """
        rows, columns, size = entry.layout
        p, blocks, start = self.params[entry.position], entry.layout.blocks, 0
        padded = torch.empty((rows, blocks * size), dtype=ACCUMULATOR[p.dtype], device=p.device)
        padded[:, columns:] = 0
        for g, m in self._entering(entry):
            torch.add(g, m, alpha=self.momentum, out=padded[:, start : start + g.shape[1]])
            start += g.shape[1]
        return padded.view(rows, blocks, size)


Results = tuple[Tensor, Tensor, Tensor]


def _results(s: _Step) -> Results:
    """The number of skipped blocks of each parameter, the scale, and what each layer is shortened by, to be filled."""
    count, device = len(s.params), device_of(s.params)
    return (
        torch.empty(count, dtype=torch.int64, device=device),
        torch.empty((), dtype=torch.float64, device=device),
        torch.empty(count, dtype=torch.float64, device=device),
    )


def _nothing(s: _Step) -> Results:
    """The same of a step that does nothing."""
    skipped, scale, caps = _results(s)
    return skipped.zero_(), scale.fill_(1), caps.fill_(1)


def _fake(s: _Step) -> Results:
    s.check()
    return _results(s)


def _blocks(inverse: Tensor, layout: _Layout) -> Tensor:
    """An inverse as (rows or 1, blocks or 1, n, n)."""
    if inverse.dim() == 4:
        return inverse
    return (inverse if inverse.dim() == 3 else unpack(inverse, layout.size)).unsqueeze(1)


class _Moved(NamedTuple):
    """What the first pass finds of an inverse's parameters, in float64."""

    entry: _Entry
    kept: Tensor
    d: Tensor
    change: float  # lr^2 <d, m> or <d, g>
    square: float  # lr^2 |d|^2
    weight: float  # |W|^2


def _reference(s: _Step) -> Results:
    entries = s.check()
    s.check_rates()
    skipped, scale, caps = _nothing(s)
    if s.found_inf is not None and bool(s.found_inf):
        return skipped, scale, caps
    moved = []
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
        along = (new if s.kl_along == "momentum" else g).double()
        w, rate = entry.join(s.params, torch.float64), float(s.rate(entry.position))
        moved.append(
            _Moved(
                entry,
                kept,
                d,
                rate**2 * float(torch.where(kept, d.double() * along, 0).sum()),
                rate**2 * float(torch.where(kept, d.double(), 0).square().sum()),
                float(torch.where(w.isfinite(), w, 0).square().sum()),
            )
        )
        stored = as_moment(torch.where(kept, new, old), s.momentum_buffers[entry.position].dtype)
        entry.store(stored, s.momentum_buffers)
    size = abs(sum(m.change for m in moved))
    if s.kl_clip is not None and size > s.kl_clip:
        scale.fill_(math.sqrt(s.kl_clip / size))
    shortened = _caps(s, moved, float(scale))
    for (entry, kept, d, *_), cap in zip(moved, shortened, strict=True):
        i, rate = entry.position, float(s.rate(entry.position))
        caps[i : i + 1 + entry.biased] = cap
        w = entry.join(s.params, d.dtype)
        # In float64, and rounded once.
        step = torch.tensor(rate * float(scale) * cap, dtype=d.dtype, device=d.device) * d
        if s.decay(i) and s.decoupled:
            step = step + torch.tensor(rate * s.decay(i), dtype=d.dtype, device=d.device) * w
        entry.store(torch.where(kept, w - step, w).to(s.params[i].dtype), s.params)
    return skipped, scale, caps


def _caps(s: _Step, moved: Sequence[_Moved], scale: float) -> list[float]:
    """What the step of each inverse's parameters is shortened by, so that their layer keeps to its bound."""
    if s.max_relative_step is None:
        return [1.0] * len(moved)
    layers: dict[int, list[_Moved]] = {}
    floors = s.floors()
    for m in moved:
        layers.setdefault(s.layer(m.entry.position), []).append(m)
    caps = {}
    for layer, of in layers.items():
        numel = sum(m.entry.layout.rows * m.entry.layout.columns for m in of)
        length = scale * math.sqrt(sum(m.square for m in of))  # not finite if the sum overflows
        size = max(math.sqrt(sum(m.weight for m in of)), floors[of[0].entry.position] * math.sqrt(numel))
        bound = s.max_relative_step * size
        caps[layer] = 1.0 if length <= bound else bound / length if math.isfinite(length) else 0.0
    return [caps[s.layer(m.entry.position)] for m in moved]


LARGEST_SHARED = 256
"""The CPU's kernel multiplies with shared inverses of up to this size; larger products are for BLAS."""


def _directions(s: _Step, largest: int) -> list[Tensor | None]:
    """Those of parameters under shared inverses larger than that, which the kernels do not form."""
    directions: list[Tensor | None] = [None] * len(s.params)
    fours = [(i, inverse) for i, inverse in enumerate(s.inverses) if inverse is not None and inverse.dim() == 4]
    shared = [i for i, inverse in fours if inverse.shape[-1] > largest]
    if shared:
        s.check_lengths()
        s.check_each()
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


def _native(on: Native, s: _Step) -> Results:
    directions = _directions(s, LARGEST_SHARED if on is CPU else 0)
    # The kernel multiplies in float32 or float64, and widens bfloat16 to the former.
    inverses = [
        x.double() if x is not None and x.dtype == torch.bfloat16 and p.dtype == torch.float64 else x
        for x, p in zip(s.inverses, s.params, strict=False)
    ] + list(s.inverses[len(s.params) :])
    results = _results(s)
    place = on.place(device_of(s.params))
    on.kernels.mbf_step_(*s[:3], inverses, directions, *s[4:], *results, place)
    increment_version(s.params)  # for backward passes that kept them; momentum is in no graph
    return results


def _triton(s: _Step) -> Results:
    from fisher_kernels.triton_kernels import mbf_step

    s.check_lengths()
    s.check_numbers()
    s.check_rates()
    nothing, found_inf = found_on_device(s.found_inf, device_of(s.params))
    if nothing or not s.params:
        s.check()
        return _nothing(s)
    results: Results = mbf_step.step(s._replace(found_inf=found_inf))
    increment_version(s.params)
    return results


_step = define(
    "mbf_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor?[] inverses, *, Tensor[] lr, "
    "float momentum, float[] weight_decay, bool decoupled, bool maximize, float? kl_clip=None, "
    "str kl_along='momentum', float? max_relative_step=None, float[] floor=[0.001], int[]? layers=None, "
    "Tensor? grad_scale=None, Tensor? found_inf=None) -> (Tensor, Tensor, Tensor)",
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
    lr: float | Tensor | Sequence[float | Tensor],
    momentum: float,
    weight_decay: float | Sequence[float],
    decoupled: bool,
    maximize: bool,
    kl_clip: float | None = None,
    kl_along: str = "momentum",
    max_relative_step: float | None = None,
    floor: float | Sequence[float] = 1e-3,
    layers: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""One step of mini-block Fisher (MBF) with heavy-ball momentum of a list of parameters, in place.

    With P the symmetric blocks of the inverses and λ the weight decay:

    .. math::

        g &= \pm\,\mathrm{grad} / \mathrm{grad\_scale} \quad (+\, \lambda w \text{ unless decoupled}) \\
        m &\leftarrow \mathrm{momentum} \cdot m + g \\
        d &= P m \quad \text{block by block} \\
        \mathrm{scale} &= \min \left( 1,
            \sqrt{\frac{\mathrm{kl\_clip}}{\left| \sum \mathrm{lr}^2 \langle d, m \rangle \right|}} \right) \\
        \mathrm{cap} &= \min \left( 1, \frac{\mathrm{max\_relative\_step} \cdot
            \max(|W|, \mathrm{floor} \sqrt{n})}{\mathrm{scale}\, |\mathrm{lr}\, d|} \right)
            \quad \text{of each layer} \\
        w &\leftarrow w - \mathrm{lr}\, (\mathrm{scale} \cdot \mathrm{cap} \cdot d
            \quad (+\, \lambda w \text{ if decoupled}))

    The gradient is negated to maximise. The sum is over all parameters, of <d, g> with ``kl_along="gradient"``; without
    ``kl_clip`` the scale is 1. If P is the inverse of the Fisher matrix, ``lr^2 <d, m>`` is twice the change of the
    model in KL divergence, to second order. The cap is one number for each layer: ``|W|`` and ``|lr d|`` are norms over
    the n elements of all its parameters, weight and bias together, and without ``max_relative_step`` it is 1. The floor
    lets what is zero or very small move. Sums are in float64.

    The dimensions of an inverse tell how it lies on its parameter, taken in row-major order:

    - (B, n, n) with B * n elements: block b acts on elements b * n to b * n + n - 1.
    - (B, n (n + 1) / 2): the same, of each block the lower triangle, row after row.
    - (1, S, n, n): shared by all rows. With the parameter as (shape[0], columns), a vector having one column, block s
      acts on columns s * n to s * n + n - 1 of every row. The last block may reach past the end: columns that are not
      there count as zeros.
    - None: this parameter, a bias, is one more column after those of the parameter before it, whose inverse acts on
      the rows [W | b]: (rows, columns, columns), the same packed, or shared.

    A block whose direction d has a NaN or an infinity, as it has where a gradient in the block is not finite, keeps its
    parameters and momentum and does not enter the sums over d. Under a shared inverse that is one block of one row. A
    weight that is not finite is left out of ``|W|``. If ``|lr d|^2`` overflows, which takes directions of more than
    1e150 in float64, the cap is 0. Where ``found_inf`` is not 0 nothing changes at all (MBF, arXiv 2202.04124,
    Algorithm 1).

    Args:
        params: float32, float64, bfloat16 or float16, any shapes and strides without overlap. One that is in the list
            twice, or begins where another does, is refused, as it is of the momentum.
        grads: of the shapes and dtypes of params.
        momentum_buffers: m, of the shapes of params; float64 for float64 parameters, else float32 or bfloat16, a bias
            having that of the parameter before it. One in bfloat16 is rounded to nearest as it is written; d and the
            sums are made of m before that.
        inverses: for each parameter as above; contiguous, symmetric (one triangle may be all that is read), in float64
            for float64 parameters, else float32, or stored in bfloat16.
        lr: learning rate, finite and at least 0: a real number or a tensor of one element, or one for each parameter,
            a bias having that of the parameter before it.
        momentum: 0 <= momentum < 1.
        weight_decay: at least 0; one number, or one for each parameter.
        decoupled: decay the weights rather than add the decay to the gradient.
        maximize: ascend rather than descend.
        kl_clip: bound of ``|sum of lr^2 <d, m>|``, finite and above 0, or None.
        kl_along: ``"momentum"`` or ``"gradient"``: what d is multiplied by in that sum.
        max_relative_step: bound of the step of a layer relative to its weights, finite and above 0, or None.
        floor: root mean square of a layer's weights below which they count as so large in that bound, at least 0; one
            number, or one for each parameter, of which the smallest in a layer counts.
        layers: number of the layer of each parameter; None takes each inverse's parameters as one.
        grad_scale: one element by which gradients are divided, or None.
        found_inf: one element; the whole call does nothing where it is not 0.

    Returns:
        skipped, int64 (len(params),): how many blocks of each parameter were skipped, those of a bias counted with the
        parameter before it; scale, float64 without dimensions; and the cap of the layer of each parameter, float64
        (len(params),). All on the device of the parameters.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device, length or range; the message names it,
            and nothing is changed.
    """
    try:
        s = _Step(
            list(params), list(grads), list(momentum_buffers), list(inverses),
            lr=rates_of(_OP, lr), momentum=momentum, weight_decay=numbers_of(_OP, "weight_decay", weight_decay),
            decoupled=decoupled, maximize=maximize, kl_clip=kl_clip, kl_along=kl_along,
            max_relative_step=max_relative_step, floor=numbers_of(_OP, "floor", floor),
            layers=None if layers is None else list(layers), grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
    except TypeError:
        given = dict(zip(_Step._fields, (params, grads, momentum_buffers, inverses), strict=False))
        check_lists(_OP, given if layers is None else {**given, "layers": layers})
        raise
    skipped, scale, caps = _step(s)
    return skipped, scale, caps
