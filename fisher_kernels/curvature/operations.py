"""Operations of torch as layers: what rules and the proof read of a layer that is not of torch's own class.

An operation is an instance of a class of torch with the parameters and the settings of what it stands for. It is never
called and draws no random numbers. There are three sources: a class that the user names in ``rules=``, a layer that
computes a norm of torch under another name (``candidates``), and a function of torch that is applied to a parameter
(``curvature/functions.py``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fisher_kernels.curvature.proof import class_of_torch
from fisher_kernels.curvature.rules import Product, Rule

BIASES = ("bias", "beta", "b", "shift", "offset")
"""What layers call the parameter that they add."""


def _operation(cls: type[nn.Module], weight: Tensor, bias: Tensor | None, **settings: Any) -> Any:
    made: Any = cls.__new__(cls)
    nn.Module.__init__(made)
    made.__dict__.update(settings)
    made._parameters.update(weight=weight, bias=bias)
    return made


def linear(weight: Tensor, bias: Tensor | None = None) -> Any:
    """``x @ weight.T + bias``."""
    return _operation(nn.Linear, weight, bias, in_features=weight.shape[1], out_features=weight.shape[0])


def product(weight: Tensor, bias: Tensor | None = None) -> Any:
    """``x @ weight + bias``."""
    return _operation(Product, weight, bias)


def _each(value: Any, spatial: int) -> tuple[Any, ...]:
    return (value,) * spatial if isinstance(value, int) else tuple(value) * (spatial if len(value) == 1 else 1)


def convolution(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Any:
    """A convolution with a weight (outputs, inputs / groups, kernel...)."""
    spatial = weight.dim() - 2
    kernel, dilation = tuple(weight.shape[2:]), _each(dilation, spatial)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        around = [(total // 2, total - total // 2) for total in totals]
    else:
        padding = (0,) * spatial if padding == "valid" else _each(padding, spatial)
        around = [(n, n) for n in padding]
    return _operation(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1],
        weight,
        bias,
        in_channels=weight.shape[1] * groups,
        out_channels=weight.shape[0],
        kernel_size=kernel,
        stride=_each(stride, spatial),
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        transposed=False,
        _reversed_padding_repeated_twice=[n for pair in reversed(around) for n in pair],
    )


def transposed_convolution(
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """A transposed convolution with a weight (inputs, outputs / groups, kernel...)."""
    spatial = weight.dim() - 2
    return _operation(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1],
        weight,
        bias,
        in_channels=weight.shape[0],
        out_channels=weight.shape[1] * groups,
        kernel_size=tuple(weight.shape[2:]),
        stride=_each(stride, spatial),
        padding=_each(padding, spatial),
        output_padding=_each(output_padding, spatial),
        dilation=_each(dilation, spatial),
        groups=groups,
        padding_mode="zeros",
        transposed=True,
    )


def embedding(weight: Tensor, padding_idx: int | None = None) -> Any:
    """The rows of the weight that tokens name."""
    kinds, width = weight.shape
    if padding_idx is not None and padding_idx < 0:
        padding_idx += kinds
    return _operation(
        nn.Embedding, weight, None, num_embeddings=kinds, embedding_dim=width, padding_idx=padding_idx, sparse=False
    )


def layer_norm(weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, offset: float = 0.0) -> Any:
    """A LayerNorm over the dimensions that its weight has; the scale is ``offset + weight``."""
    shape = tuple(weight.shape)
    return _operation(nn.LayerNorm, weight, bias, normalized_shape=shape, eps=eps, weight_offset=offset)


def rms_norm(weight: Tensor, bias: Tensor | None = None, eps: float | None = None, offset: float = 0.0) -> Any:
    """The same for an RMSNorm; a bias is added."""
    shape = tuple(weight.shape)
    return _operation(nn.RMSNorm, weight, bias, normalized_shape=shape, eps=eps, weight_offset=offset)


def group_norm(weight: Tensor, bias: Tensor | None = None, num_groups: int = 1, eps: float = 1e-5) -> Any:
    """A GroupNorm."""
    return _operation(nn.GroupNorm, weight, bias, num_groups=num_groups, num_channels=len(weight), eps=eps)


def batch_norm(
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
) -> Any:
    """A BatchNorm, with statistics of its own where it is training or has none that run."""
    made = _operation(nn.BatchNorm1d, weight, bias, num_features=len(weight), eps=eps, training=training)
    made._buffers.update(running_mean=running_mean, running_var=running_var)
    return made


def instance_norm(
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    spatial: int = 2,
) -> Any:
    """An InstanceNorm over so many spatial dimensions."""
    made = _operation(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[spatial - 1],
        weight,
        bias,
        num_features=len(weight),
        eps=eps,
        training=training,
        track_running_stats=running_mean is not None,
    )
    made._buffers.update(running_mean=running_mean, running_var=running_var)
    return made


# The operation of a user's layer.

NAMES: Mapping[str, tuple[Callable[..., Any], Sequence[int], Sequence[str]]] = {
    "linear": (linear, (2,), ()),
    "transposed_linear": (product, (2,), ()),
    "conv": (convolution, (3, 4, 5), ("stride", "padding", "dilation", "groups", "padding_mode")),
    "conv_transpose": (
        transposed_convolution,
        (3, 4, 5),
        ("stride", "padding", "output_padding", "groups", "dilation"),
    ),
    "embedding": (embedding, (2,), ("padding_idx",)),
    "layer_norm": (layer_norm, (1, 2, 3, 4), ("eps",)),
    "rms_norm": (rms_norm, (1, 2, 3, 4), ("eps",)),
    "group_norm": (group_norm, (1,), ("num_groups", "eps")),
    "batch_norm": (batch_norm, (1,), ("eps", "running_mean", "running_var")),
}
"""Name in ``rules=`` -> what makes the operation, dimensions of its weight, and the attributes that it reads."""

MATRICES = ("linear", "transposed_linear")
"""Operations whose weight is a matrix, or a stack of matrices as one."""

Choice = str | Callable[[Any], Any]
"""What ``rules=`` says of a class: the name of an operation, or a function of a layer that returns one, or a rule."""


def roles(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that a layer itself has, by what they are: ``"weight"`` and ``"bias"``."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    bias = next((name for name in BIASES if name in own), None)
    weight = "weight" if "weight" in own else next((name for name in own if name != bias), None)
    named = {"weight": weight, "bias": bias}
    return {role: own[name] for role, name in named.items() if name is not None}


def epsilon(module: nn.Module) -> float | None:
    """What a layer adds before it divides, under whatever name it has it."""
    named = (v for name, v in vars(module).items() if "eps" in name.lower() and type(v) is float)
    return next(named, None)


def by_name(module: nn.Module, name: str) -> Any:
    """The operation of a layer of which the user says what it computes.

    Raises:
        ValueError: the layer has no parameter that could be the operation's weight.
    """
    make, dims, attributes = NAMES[name]
    found = roles(module)
    if "weight" not in found or found["weight"].dim() not in dims:
        shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in module._parameters.items() if p is not None)
        raise ValueError(
            f"rules={{{type(module).__name__}: {name!r}}}: the layer has the parameters {shapes or 'none'}, expected a "
            f"weight of {' or '.join(map(str, dims))} dimensions"
        )
    if name == "embedding":
        found.pop("bias", None)
    settings = {key: getattr(module, key) for key in attributes if getattr(module, key, None) is not None}
    if "eps" in attributes and "eps" not in settings and (eps := epsilon(module)) is not None:
        settings["eps"] = eps
    return make(**found, **settings)


class Operations:
    """Which operation each layer of a model is taken for.

    Args:
        rules: class of a layer -> what its instances compute, or how they are served; it overrides the proof.
        kind: of the rules that the optimizer reads.

    Raises:
        TypeError: a key is no class, or a value is neither a name nor callable.
        ValueError: there is no operation of that name.
    """

    def __init__(self, rules: Mapping[type, Choice] | None, kind: type[Rule]) -> None:
        self.rules = dict(rules or {})
        self.kind = kind
        for cls, choice in self.rules.items():
            if not isinstance(cls, type):
                raise TypeError(f"rules has the key {cls!r}, expected a class of layers")
            if isinstance(choice, str):
                if choice not in NAMES:
                    raise ValueError(f"rules[{cls.__name__}] is {choice!r}, expected one of {_listed(NAMES)}")
            elif not callable(choice):
                raise TypeError(
                    f"rules[{cls.__name__}] is {choice!r}, expected a name ({_listed(NAMES)}) or a function of a layer"
                )

    def choice(self, module: nn.Module) -> Choice | None:
        """What the user says of a layer; the class that is nearest to its own decides."""
        return next((self.rules[cls] for cls in type(module).__mro__ if cls in self.rules), None)

    def of(self, module: nn.Module) -> list[Any]:
        """What a layer may be taken for: what the user names, or norms that it may be, or itself."""
        named = self._named(module)
        if isinstance(named, nn.Module):
            return [named]
        return (candidates(module) if named is None else []) or [module]

    def rule(self, module: nn.Module) -> Any:
        """The rule that the user gives for a layer, or None."""
        choice = self.choice(module)
        named = None if choice is None or isinstance(choice, str) else self._named(module)
        return None if isinstance(named, nn.Module) else named

    def _named(self, module: nn.Module) -> Any:
        """The operation, or the rule, that the user names for a layer; None if none is named.

        Raises:
            TypeError: a function of ``rules=`` returned something else.
        """
        choice = self.choice(module)
        if choice is None or isinstance(choice, str):
            return None if choice is None else by_name(module, choice)
        made = choice(module)
        if not isinstance(made, self.kind) and (not isinstance(made, nn.Module) or class_of_torch(made) is None):
            raise TypeError(
                f"rules[{type(module).__name__}] returned a {type(made).__name__}, expected a layer of torch that "
                f"computes the same from the same parameters, or a {self.kind.__name__}"
            )
        return made


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


# Norms of torch under another name.


def candidates(module: nn.Module) -> list[Any]:
    """The norms that a layer may be, of a class that is not torch's; which one it is only a forward tells.

    They are RMSNorm and LayerNorm over the last dimension, with the scale ``weight`` or ``1 + weight``.
    """
    own = [p for p in module._parameters.values() if p is not None]
    found = roles(module)
    vectors = len(own) == len(found) and all(p.dim() == 1 and p.shape == own[0].shape for p in own)
    if class_of_torch(module) is not None or not own or not vectors or next(module.children(), None) is not None:
        return []
    if type(module).__module__.startswith("torch.") or "weight" not in found:
        return []
    eps = epsilon(module)
    if eps is None and "norm" not in type(module).__name__.lower():
        return []
    rms = functools.partial(rms_norm, eps=1e-6 if eps is None else eps)
    centred = functools.partial(layer_norm, eps=1e-5 if eps is None else eps)
    kinds = (centred, rms) if "bias" in found else (rms, centred)
    return [kind(**found, offset=offset) for kind in kinds for offset in (0.0, 1.0)]


def part_of(whole: Tensor, part: Tensor) -> tuple[int, bool] | None:
    """Where a matrix lies in a parameter that is seen as (rows, columns): its first row, and whether it is transposed.

    The rows of a stack of matrices (experts, A, B) are those of all of them, one after another. None where the matrix
    is no run of whole rows.
    """
    if part is whole:
        return (0, False) if whole.dim() == 2 else None
    columns = whole.shape[-1]
    start, rest = divmod(int(part.storage_offset()) - int(whole.storage_offset()), max(1, columns))
    if part.dim() != 2 or whole.dim() not in (2, 3) or not whole.is_contiguous() or rest or part.dtype != whole.dtype:
        return None
    for transposed, (rows, width) in enumerate((part.shape, part.shape[::-1])):
        strides = part.stride() if not transposed else part.stride()[::-1]
        if width == columns and strides == (columns, 1) and 0 <= start <= whole.numel() // columns - rows:
            return start, bool(transposed)
    return None


def stack_of(whole: Tensor, part: Tensor) -> bool | None:
    """Whether a stack of matrices is a parameter with each of its matrices transposed; None if it is something else."""
    if whole.dim() != 3 or not whole.is_contiguous() or part.storage_offset() != whole.storage_offset():
        return None
    for transposed, view in enumerate((whole, whole.mT)):
        if part.shape == view.shape and part.stride() == view.stride():
            return bool(transposed)
    return None


def flattened(weight: Tensor) -> Tensor:
    """A parameter as a matrix: the rows of a stack of matrices lie one after another."""
    return weight if weight.dim() == 2 else weight.detach().view(math.prod(weight.shape[:-1]), weight.shape[-1])
