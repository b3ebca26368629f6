"""What a model really does with its parameters, seen from outside: the functions that it calls on them.

The optimizers read modules. This looks below them, at every call of a function of torch that takes a parameter, and
rewrites the model as a list of plain torch modules, each with the input that it had and the derivative of its output.
The list is right if it explains the gradients: on those inputs and derivatives the plain modules must have, added up,
the gradients that the model's backward pass left. Statistics made from it by the implementations that form everything
(``tests/naive_adafisher.py``, ``tests/naive_mbf.py``, ``tests/naive_kfac.py``) are then what those of the
optimizers must be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fisher_kernels.curvature.factor_rules import (
    ConvFactors,
    ConvTransposeFactors,
    EmbeddingTerms,
    FactorRule,
    LinearFactors,
    NormTerms,
    TermRule,
)
from fisher_kernels.optim import MBF, AdaFisher
from fisher_kernels.optim.kronecker import KroneckerOptimizer
from tests import naive_adafisher, naive_kfac, naive_mbf
from tests.layer_cases import Conv1D

ROUNDING = 1e-9
"""Of sums in float64, in another order."""
SINGLE = 1e-5
"""Of norms that work in float32 whatever they are given."""


class Output:
    """Stands for the output of a call: the derivative of the loss by it, once it is known."""

    def __init__(self, tensor: Tensor) -> None:
        self.grad: Tensor | None = None
        # Not retain_grad(), which follows a tensor through what is later written to it.
        tensor.register_hook(self._keep)

    def _keep(self, grad: Tensor) -> None:
        self.grad = grad.detach() if self.grad is None else self.grad + grad.detach()


@dataclass
class Call:
    """One use of parameters, as a module of torch that computes the same.

    Attributes:
        plain: the module.
        x: its input.
        out: what the model's function made.
        parameters: of the model, by role. The module has the same, but for a stack of matrices: its weight is one
            matrix then, with the rows of all.
        turn: what makes the derivative by the module's output of that by ``out``.
    """

    plain: Any
    x: Tensor
    out: Output
    parameters: dict[str, Parameter]
    turn: Callable[[Tensor], Tensor] = lambda grad: grad

    @property
    def grad(self) -> Tensor:
        """The derivative of the loss by the module's output."""
        assert self.out.grad is not None
        return self.turn(self.out.grad)

    @property
    def is_transposed(self) -> bool:
        """Whether the weight's rows run over inputs."""
        return naive_adafisher.kind_of(self.plain) in naive_adafisher.ROWS_ARE_INPUTS

    def gradients(self) -> dict[Parameter, Tensor]:
        """What this use adds to the gradients of its parameters."""
        roles = [role for role, p in self.parameters.items() if p.requires_grad]
        with torch.enable_grad():
            wanted = [self.plain._parameters[role] for role in roles]
            found = torch.autograd.grad(self.plain(self.x), wanted, self.grad, allow_unused=True)
        pairs = zip([self.parameters[role] for role in roles], found, strict=True)
        return {p: g.reshape(p.shape) for p, g in pairs if g is not None}


def _holding(module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """The module with these parameters. What was computed from others is fixed here."""
    for role, p in (("weight", weight), ("bias", bias)):
        computed = p is not None and not isinstance(p, Parameter)
        module.register_parameter(role, Parameter(p.detach(), False) if computed else p)  # type: ignore[union-attr, arg-type]
    return module


def _linear(x: Tensor, weight: Any, bias: Any = None) -> tuple[Any, Tensor]:
    return _holding(nn.Linear(weight.shape[1], weight.shape[0], device="meta"), weight, bias), x


def _transposed_linear(bias: Tensor | None, x: Tensor, weight: Tensor) -> tuple[Any, Tensor]:
    return _holding(Conv1D(weight.shape[1], weight.shape[0]), weight, bias), x


def _embedding(
    x: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **more: Any
) -> tuple[Any, Tensor]:
    plain = nn.Embedding(*weight.shape, padding_idx=padding_idx, device="meta")
    return _holding(plain, weight, None), x


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Any, Tensor]:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.dim() - 3]
    channels = weight.shape[1] * groups, weight.shape[0]
    plain = kind(
        *channels, tuple(weight.shape[2:]), _flat(stride), _flat(padding), _flat(dilation), groups, device="meta"
    )
    return _holding(plain, weight, bias), x


def _transposed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Any, Tensor]:
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[weight.dim() - 3]
    channels = weight.shape[0], weight.shape[1] * groups
    plain = kind(
        *channels,
        tuple(weight.shape[2:]),
        stride=_flat(stride),
        padding=_flat(padding),
        output_padding=_flat(output_padding),
        groups=groups,
        dilation=_flat(dilation),
        device="meta",
    )
    return _holding(plain, weight, bias), x


def _flat(value: Any) -> Any:
    """A size for each dimension, or one for all, as constructors take it."""
    return value if isinstance(value, (int, str)) else value[0] if len(value) == 1 else tuple(value)


def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> tuple[Any, Tensor]:
    return _holding(nn.LayerNorm(tuple(shape), eps, device="meta"), weight, bias), x


def _rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> tuple[Any, Tensor]:
    return _holding(nn.RMSNorm(tuple(shape), eps, device="meta"), weight, None), x


def _group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> tuple[Any, Tensor]:
    return _holding(nn.GroupNorm(groups, x.shape[1], eps, device="meta"), weight, bias), x


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, Tensor]:
    kind: Any = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(x.dim(), nn.BatchNorm1d)
    plain = kind(x.shape[1], eps, track_running_stats=False, device="meta").train(training)
    if not training:
        assert mean is not None
        assert variance is not None
        plain.running_mean, plain.running_var = mean.clone(), variance.clone()
    return _holding(plain, weight, bias), x


FUNCTIONS: dict[Any, Callable[..., tuple[Any, Tensor]]] = {
    F.linear: _linear,
    torch.addmm: _transposed_linear,
    F.embedding: _embedding,
    torch.embedding: _embedding,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.conv_transpose1d: _transposed_conv,
    F.conv_transpose2d: _transposed_conv,
    F.conv_transpose3d: _transposed_conv,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
}
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
SUMS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)


class Derivative(NamedTuple):
    """Stands for an output of which only the derivative by it is known."""

    grad: Tensor


class Witness(TorchFunctionMode):
    """Notes what is done with parameters while it is on; the backward pass completes the notes.

    Norms written in elementary operations are noted as modules: those with a vector ``weight`` and no function of the
    list inside. They are rewritten as torch's RMSNorm, or LayerNorm if they have a bias; the gradients tell whether
    that is what they are.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._stacks: dict[Parameter, Parameter] = {}
        self._picked: dict[int, tuple[Tensor, Call]] = {}  # what embeddings made, by its identity
        self._tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        self._open: list[tuple[nn.Module, int]] = []
        self._handles = []
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 1:
                self._handles.append(module.register_forward_pre_hook(self._enter))
                self._handles.append(module.register_forward_hook(self._leave))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._open.append((module, len(self.calls)))

    def _leave(self, module: Any, args: Any, out: Any) -> None:
        opened, noted = self._open.pop()
        assert opened is module
        if len(self.calls) > noted or not isinstance(out, Tensor) or not out.requires_grad:
            return
        eps = next((v for name in ("eps", "variance_epsilon", "epsilon") if (v := getattr(module, name, None))), 1e-5)
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        norm: Any = nn.RMSNorm if bias is None else nn.LayerNorm
        self._add(_holding(norm(len(weight), eps, device="meta"), weight, bias), args[0], out)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # made of others, where it does not ask for modes
            with self, mock.patch.object(F, "has_torch_function", return_value=False):
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if torch.is_grad_enabled() and isinstance(out, Tensor) and out.requires_grad:
            self._note(func, out, args, {"x" if name == "input" else name: value for name, value in kwargs.items()})
        return out

    def _note(self, func: Any, out: Tensor, args: Any, kwargs: Any) -> None:
        if func is F.linear and _part(args[1]) is not None:
            self._part(out, *args)
        elif func in PRODUCTS:
            left, right = args
            if right.dim() > 1 and (weight := _matrix(right.mT)) is not None:
                self._add(*_linear(left, weight), out)
            elif (weight := _matrix(right)) is not None:
                self._add(*_transposed_linear(None, left, weight), out)
            elif right.dim() > 1 and (weight := _matrix(left)) is not None:
                self._add(*_linear(right.mT, weight), out, lambda grad: grad.mT)
        elif func is Tensor.__getitem__ and {args[0]} & self._tables and not isinstance(args[1], tuple):
            self._add(*_embedding(torch.arange(len(args[0]))[args[1]], args[0]), out)
        elif func in SUMS:
            for term in args[:2]:
                self._broadcast(term, out)
        elif func in FUNCTIONS:
            self._add(*FUNCTIONS[func](*args, **kwargs), out)
            if func is F.embedding and self.calls:
                self._picked[id(out)] = out, self.calls[-1]

    def _broadcast(self, term: Any, total: Tensor) -> None:
        """An embedding that is added to every sample of a batch is one use for each, of the same token."""
        kept, call = self._picked.pop(id(term), (None, None))
        if call is not None and kept is term and total.shape != term.shape:
            call.x = call.x.expand(total.shape[:-1])
            call.out = Output(total)

    def _part(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Some rows of a matrix, or of a stack of matrices, are all rows, of which the others have no effect."""
        stack, first = _part(weight)  # type: ignore[misc]
        if stack not in self._stacks:
            flat = Parameter(stack.detach().reshape(-1, stack.shape[-1]))
            self._stacks[stack] = stack if stack.dim() == 2 else flat
        whole = self._stacks[stack]
        around = first, len(whole) - first - len(weight)
        parameters = {"weight": stack}
        if bias is not None and isinstance(bias._base, Parameter):
            parameters["bias"] = bias = bias._base
        self._add(*_linear(x, whole, bias), out, lambda grad: F.pad(grad, around), parameters)

    def _add(
        self,
        plain: Any,
        x: Tensor,
        out: Tensor,
        turn: Callable[[Tensor], Tensor] = lambda grad: grad,
        parameters: dict[str, Parameter] | None = None,
    ) -> None:
        if parameters is None:
            parameters = {role: p for role, p in plain._parameters.items() if p is not None}
        if any(p.requires_grad for p in parameters.values()):
            # A copy: what is written to the input later is not what was read.
            self.calls.append(Call(plain, x.detach().clone(), Output(out), parameters, turn))

    def seen(self) -> list[Call]:
        """The calls that the backward pass came to."""
        return [call for call in self.calls if call.out.grad is not None]


def _part(weight: Tensor) -> tuple[Parameter, int] | None:
    """The matrix, or the stack of matrices, in which a matrix lies as rows, and the first of them."""
    stack = weight._base
    if not isinstance(stack, Parameter) or stack.dim() < 2 or weight.stride() != (stack.shape[-1], 1):
        return None
    return stack, weight.storage_offset() // stack.shape[-1]


def _matrix(weight: Tensor) -> Parameter | None:
    """The parameter that a matrix is, or is a view of as a whole."""
    p = weight if isinstance(weight, Parameter) else weight._base
    same = isinstance(p, Parameter) and p.dim() == 2 and p.shape == weight.shape and p.stride() == weight.stride()
    return p if same else None  # type: ignore[return-value]


# Gradients.


def explained(calls: Iterable[Call]) -> dict[Parameter, Tensor]:
    """The gradients that the calls account for."""
    total: dict[Parameter, Tensor] = {}
    for call in calls:
        for p, g in call.gradients().items():
            total[p] = total[p] + g if p in total else g
    return total


def require_close(what: str, actual: Tensor, expected: Tensor, tolerance: float, floor: float = 0.0) -> None:
    """Compare in units of the largest entry, or of ``floor`` where all are smaller: there they are rounding alone."""
    assert actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert bool(expected.isfinite().all()), what
    if expected.numel():
        scale = max(float(expected.abs().max()), floor)
        error = float((actual - expected).abs().max())
        assert error <= tolerance * scale, f"{what} is off by {error / max(scale, 1e-300):.1e} of its largest entry"


def tolerance_of(calls: Sequence[Call]) -> float:
    """What rounding explains of sums over these calls."""
    return SINGLE if any(isinstance(call.plain, nn.RMSNorm | nn.LayerNorm) for call in calls) else ROUNDING


class Account:
    """The gradients that the calls explain, compared with those that the model's backward pass left."""

    def __init__(self, calls: Sequence[Call], names: dict[Parameter, str]) -> None:
        self.explained = explained(calls)
        self.names = names
        # A gradient that is zero but for rounding, as of a shift in front of a norm, is small beside others.
        self.floor = 1e-4 * max(float(p.grad.abs().max()) for p in names if p.grad is not None and p.numel())

    def require(self, parameters: Iterable[Parameter], tolerance: float) -> None:
        for p in parameters:
            if p.grad is not None:
                name = self.names[p]
                assert p in self.explained, f"{name} has a gradient that no call explains"
                require_close(f"gradient of {name}", self.explained[p], p.grad, tolerance, self.floor)


# Statistics.


def _add_biases(optimizer: AdaFisher | MBF | KroneckerOptimizer, calls: Sequence[Call]) -> None:
    """Give a call the bias that its layer is served with and that no call takes: something else adds it.

    Then the gradients tell whether that is so, as the bias must have the sum of the call's derivatives.
    """
    taken = {p for call in calls for p in call.parameters.values()}
    for layer in optimizer.statistics.layers():
        weight, bias = layer.parameters.get("weight"), layer.parameters.get("bias")
        if weight is not None and bias is not None and bias not in taken:
            for call in calls:
                if call.parameters.get("weight") is weight:
                    call.parameters["bias"] = bias
                    call.plain.register_parameter("bias", bias)


FACTORS = {"input_factor": "H", "output_factor": "S", "bias_factor": "B"}
"""Names of the optimizer's factors -> of the naive implementation's."""


def check_factors(optimizer: AdaFisher, calls: Sequence[Call], names: dict[Parameter, str]) -> int:
    """Compare the factors of every site that has any with those of the calls; returns how many there are.

    The optimizer has taken one step, so that its averages are those of one batch times their weight.
    """
    _add_biases(optimizer, calls)
    account, compared = Account(calls, names), 0
    for index, site in enumerate(optimizer.statistics.sites):
        averages = dict(optimizer._factors.averages(index))
        weight = float(averages.pop("factor_weight"))
        if weight == 0:
            continue
        owners = {layer.owner for layer in site.layers}
        mine = [
            call
            for call in calls
            if owners & {*call.parameters.values()} and call.is_transposed == site.rule.rows_are_inputs
        ]
        name, tolerance = names[site.owner], tolerance_of(mine)
        assert mine, f"{name} has statistics, but no function of the model took it"
        account.require({p for layer in site.layers for p in layer.parameters.values()}, tolerance)
        plain = max(mine, key=lambda call: "bias" in call.parameters).plain
        total: naive_adafisher.Sums = {}
        floor = 0.0
        for call in mine:
            for key, (new, count) in naive_adafisher.sums_of(call.plain, call.x, call.grad, "paper").items():
                old, old_count = total.get(key, (torch.zeros_like(new), 0.0))
                total[key] = old + new, old_count + count
            if naive_adafisher.kind_of(call.plain) == "norm":  # a sum of both signs
                floor += float(call.grad.abs().sum()) / call.plain.weight.numel()
        expected = naive_adafisher.factors_of(plain, total, "paper")
        for key, average in averages.items():
            what = f"{key} of {name}"
            require_close(what, average / weight, expected[FACTORS[key]], tolerance, floor**2 / total["S"][1])
        compared += 1
    return compared


def check_blocks(optimizer: MBF, calls: Sequence[Call], names: dict[Parameter, str], **settings: Any) -> int:
    """Compare all averaged blocks after one step with those of the calls; returns how many there are."""
    _add_biases(optimizer, calls)
    account = Account(calls, names)
    served = {p for site in optimizer.statistics.sites for layer in site.layers for p in layer.parameters.values()}
    waiting = {p for p in served if float(optimizer.state.get(p, {}).get("fisher_updates", 0)) > 0}
    count = len(waiting)
    mine = [call for call in calls if served & {*call.parameters.values()}]
    # The naive implementation knows the parameters of the plain modules, of which a stack of matrices is another.
    models = {call.plain._parameters[role]: p for call in mine for role, p in call.parameters.items()}
    held = [own for own, p in models.items() if p.requires_grad]
    naive = naive_mbf.NaiveMBF(nn.ModuleList(call.plain for call in mine), params=[{"params": held}], **settings)
    naive.listening = False
    naive.uses = [naive_mbf.Use(call.plain, call.x, {}, Derivative(call.grad), 0) for call in mine]  # type: ignore[arg-type]
    for block in naive.blocks:
        owner = models[block.owner]  # type: ignore[index]
        if block.family is None or owner not in waiting:
            continue
        near = [call for call in mine if {owner} & {*call.parameters.values()}]
        tolerance = tolerance_of(near)
        account.require({p for call in near for p in call.parameters.values()}, tolerance)
        expected = naive.new_blocks(block, naive.samples(block.family))
        ours = optimizer.state[owner]["fisher_blocks"]
        require_close(f"blocks of {names[owner]}", ours, expected.reshape(ours.shape), tolerance)
        waiting.remove(owner)
    assert not waiting, f"there are blocks of {names[waiting.pop()]}, but no function of the model took it"
    return count


def _is_read_by(rule: TermRule, plain: Any) -> bool:
    """Whether the statistics of a rule are of a call: those of a weight's other uses have no part in its factors."""
    if isinstance(rule, LinearFactors):
        return naive_mbf.is_matrix(plain) and naive_mbf.is_conv1d(plain) == rule.transposed
    if isinstance(rule, ConvTransposeFactors):
        return naive_mbf.is_transposed_conv(plain)
    if isinstance(rule, ConvFactors):
        return naive_mbf.is_conv(plain) and not naive_mbf.is_transposed_conv(plain)
    if isinstance(rule, NormTerms):
        return naive_mbf.is_norm(plain)
    return isinstance(rule, EmbeddingTerms) and isinstance(plain, nn.Embedding)


def check_kronecker(optimizer: KroneckerOptimizer, calls: Sequence[Call], names: dict[Parameter, str]) -> int:
    """Compare all factors, and the blocks of what has none, after one step with those of the calls.

    How many terms the loss has is not seen from the calls. It follows from each factor, and must be the same whole
    number for all.

    Returns:
        How many layers were compared.
    """
    _add_biases(optimizer, calls)
    account, compared, terms = Account(calls, names), 0, 0
    sites = sorted(optimizer.statistics.sites, key=lambda site: not isinstance(site.rule, FactorRule))
    for site in sites:
        rule, owner, name = site.rule, site.owner, names[site.owner]
        state = optimizer.state.get(owner, {})
        if not float(state.get("fisher_updates", 0)):
            continue
        owners = {layer.owner for layer in site.layers}
        mine = [call for call in calls if owners & {*call.parameters.values()} and _is_read_by(rule, call.plain)]
        assert mine, f"{name} has statistics, but no function of the model took it"
        tolerance = tolerance_of(mine)
        whole = not any(rule is not other.rule and other.owner is owner for other in sites)
        if whole and all(call in mine for call in calls if owners & {*call.parameters.values()}):
            account.require({p for layer in site.layers for p in layer.parameters.values()}, tolerance)
        uses = [naive_mbf.Use(call.plain, call.x, {}, Derivative(call.grad), 0) for call in mine]  # type: ignore[arg-type]
        if isinstance(rule, FactorRule):
            expected, count = _sums_of_sides(rule, uses)
            ours = [state[f"{side}_factor"] for side in ("row", "column")]
            read = int(rule.rows_make)
            found = _trace(expected[read]) / _trace(ours[read])
            terms = terms or round(found)
            assert abs(found - terms) < 1e-4 * terms, f"the loss has {found} terms by {name}, and {terms} by others"
            scales = (terms**2 / count, 1 / terms)
            for side, factor in enumerate(ours):
                scale = scales[0] if side != read else scales[1]
                require_close(f"factor {side} of {name}", factor, scale * expected[side], tolerance)
        elif "fisher_blocks" in state:
            squares = _squares(rule, uses)
            ours_too = state["fisher_blocks"].reshape(squares.shape)
            terms = terms or round(float(ours_too.sum() / squares.sum()))
            require_close(f"blocks of {name}", ours_too, terms * squares, tolerance, account.floor**2)
        compared += 1
    return compared


def _trace(factor: Tensor) -> float:
    return float((factor if factor.dim() == 2 else factor.diagonal(dim1=1, dim2=2)).sum())


def _sums_of_sides(rule: FactorRule, uses: Sequence[naive_mbf.Use]) -> tuple[list[Tensor], int]:
    """For rows and columns the sum of the outer products of what they meet, or its diagonal; and of how many."""
    sides = [naive_kfac.sides_of(use, "expand") for use in uses]
    found: list[Tensor] = []
    for side in (0, 1):
        of_groups = []
        for g in range(rule.shape[0]):
            rows = [use[g][side].flatten(0, 1) for use in sides]
            rows = [F.pad(r, (0, rule.shape[1 + side] - r.shape[1])) for r in rows]  # cuts off what is no parameter
            of_groups.append(naive_kfac.gram(rows))
        total = torch.stack(of_groups)
        found.append(total if rule.is_whole(side) else total.diagonal(dim1=1, dim2=2))
    return found, sum(use[0][0].shape[0] * use[0][0].shape[1] for use in sides)


def _squares(rule: TermRule, uses: Sequence[naive_mbf.Use]) -> Tensor:
    """The sum of the outer products of the gradients of samples, channel by channel."""
    (blocks,) = rule.blocks
    total = torch.zeros(blocks.count, blocks.size, blocks.size, dtype=torch.float64)
    for use in uses:
        gradients = naive_mbf.sample_gradients(use, False)
        parts = [gradients[role].flatten(1) for role in blocks.roles if role in gradients]
        v = F.pad(torch.stack(parts, -1), (0, blocks.size - len(parts))).double()
        total += torch.einsum("nci,ncj->cij", v, v)
    return total
