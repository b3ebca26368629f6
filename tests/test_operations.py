"""Layers that compute an operation of torch under another name, and rules that a user names."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisher_kernels import MBF, SOFIM, AdaFisher, AdaFisherW
from fisher_kernels.curvature.block_rules import BlockRule, Blocks, Sharing
from fisher_kernels.curvature.diagonal_rules import DiagonalRule, Means, Placement
from fisher_kernels.curvature.operations import NAMES
from fisher_kernels.curvature.rules import Sums


class RootMeanSquare(nn.Module):
    """As many language models write it; the name of its number and the scale's origin differ from one to another."""

    def __init__(self, width: int, offset: float = 0.0, shift: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width) + 1 - offset)
        self.offset, self.variance_epsilon = offset, 1e-3
        if shift:
            self.beta = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        h = h * (self.offset + self.gamma)
        return h + self.beta if hasattr(self, "beta") else h


class Centred(nn.Module):
    def __init__(self, width: int, shift: bool) -> None:
        super().__init__()
        self.scale, self.norm_eps = nn.Parameter(torch.randn(width)), 1e-3
        self.bias = nn.Parameter(torch.randn(width)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + self.norm_eps).sqrt()
        return h * self.scale if self.bias is None else h * self.scale + self.bias


class LayerScale(nn.Module):
    """No norm, and nothing says that it may be one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TanhNorm(nn.Module):
    """No norm, though its name says so."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * self.gamma


NORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "root mean square": (lambda: RootMeanSquare(5), lambda: nn.RMSNorm(5, 1e-3)),
    "with an offset": (lambda: RootMeanSquare(5, 1.0), lambda: nn.RMSNorm(5, 1e-3)),
    "with a shift": (lambda: RootMeanSquare(5, shift=True), lambda: Shifted(5, 1e-3)),
    "centred": (lambda: Centred(5, False), lambda: nn.LayerNorm(5, 1e-3, bias=False)),
    "centred with a shift": (lambda: Centred(5, True), lambda: nn.LayerNorm(5, 1e-3)),
}


class Shifted(nn.RMSNorm):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> list[str]:
    """Returns what was warned of."""
    x = torch.randn(6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            out = model(x)
            (out * torch.linspace(-1, 2, out.shape[-1], dtype=out.dtype)).square().mean().backward()
            optimizer.step()
    return [str(w.message) for w in said]


def moves(norm: nn.Module, values: Sequence[Tensor], make: Callable[[nn.Module], Any]) -> tuple[list[Tensor], Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p, value in zip(norm.parameters(), values, strict=True):
            p.copy_(value)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = make(model)
    assert not train(model, optimizer)
    return [p.detach() - s for p, s in zip(model.parameters(), start, strict=True)], optimizer


@pytest.mark.parametrize("kind", [AdaFisher, MBF])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_under_another_name(name: str, kind: Any) -> None:
    make, plain = NORMS[name]
    torch.manual_seed(2)
    norm = make()
    values = [p.detach().clone() for p in norm.parameters()]
    got, optimizer = moves(norm, values, lambda model: kind(model, lr=1e-2))
    assert not any(row.fallback for row in optimizer.explain())
    if name == "with an offset":
        values[0] = values[0] + 1
    wanted, _ = moves(plain(), values, lambda model: kind(model, lr=1e-2))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", [AdaFisher, MBF])
def test_what_is_no_norm_takes_the_fallback(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 5), LayerScale(5), TanhNorm(5), nn.PReLU(), nn.Linear(5, 2)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = kind(model)
    said = train(model, optimizer)
    assert ["2 (its output is off by" in text for text in said].count(True) == 1
    rows = {row.name: row.fallback for row in optimizer.explain()}
    assert [rows[name] for name in ("1.gamma", "2.gamma", "3.weight", "4.weight")] == [True, True, True, False]


class Own(nn.Module):
    """A Linear that nobody could know for one."""

    def __init__(self, inputs: int, outputs: int, factor: float = 1.0) -> None:
        super().__init__()
        self.matrix, self.b = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.zeros(outputs))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oi,...i->...o", self.matrix * self.factor, x) + self.b


def as_linear(layer: Own) -> nn.Linear:
    made = nn.Linear(1, 1)
    made.in_features, made.out_features = layer.matrix.shape[1], layer.matrix.shape[0]
    made.weight, made.bias = layer.matrix, layer.b
    return made


@pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW, MBF])
@pytest.mark.parametrize("choice", ["linear", as_linear])
def test_a_user_says_what_a_layer_computes(kind: Any, choice: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Own(4, 3), nn.Linear(3, 2)).double()
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    optimizer, other = kind(model, rules={Own: choice}), kind(plain)
    assert not train(model, optimizer)
    train(plain, other)
    assert not any(row.fallback for row in optimizer.explain())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [AdaFisher, MBF])
def test_what_the_user_says_overrides_the_proof_with_one_warning(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Own(4, 3, factor=2.0), nn.Linear(3, 2)).double()
    optimizer = kind(model, rules={Own: "linear"})
    said = train(model, optimizer)
    assert len(said) == 1
    assert "rules= says how to serve 1" in said[0]
    assert "off by" in said[0]
    assert not any(row.fallback for row in optimizer.explain())


@pytest.mark.filterwarnings("ignore:MBF. 9% of")
def test_errors_of_rules_name_what_is_wrong() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Own(4, 3))
    with pytest.raises(ValueError, match=r"rules.Own. is 'matrix', expected one of 'linear', 'transposed_linear'"):
        AdaFisher(model, rules={Own: "matrix"})
    for name in NAMES:
        if 2 in NAMES[name][1]:
            MBF(model, rules={Own: name}).close()
        else:
            with pytest.raises(ValueError, match=r"matrix \(3, 4\), b \(3,\), expected a weight of"):
                MBF(model, rules={Own: name})
    with pytest.raises(TypeError, match="key 'Own'"):
        AdaFisher(model, rules={"Own": "linear"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="is 3, expected a name"):
        AdaFisher(model, rules={Own: 3})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"returned an? int"):
        AdaFisher(model, rules={Own: lambda layer: 3})
    with pytest.raises(TypeError, match=r"returned a Scalar, expected .* BlockRule"):
        MBF(model, rules={Own: lambda layer: Scalar()})
    with pytest.raises(TypeError, match="rules"):
        SOFIM(model.parameters(), rules={Own: "linear"})  # type: ignore[call-arg]


class Scalar(DiagonalRule):
    """A rule of a user's own: the weight has one number for all its entries."""

    name = "scalar"
    powers = (2,)

    def capture(self, module: Any, x: Tensor) -> tuple[list[Tensor], list[int]]:
        return [], []

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        return Sums([grad.square().sum().reshape(1)], [grad.numel()])

    def sum_lengths(self, module: Any) -> list[int | None]:
        return [1]

    def shapes(self, module: Any) -> dict[str, int]:
        return {"output_factor": 1}

    def means(self, module: Any, sums: Sums) -> Means:
        return {"output_factor": (sums.vectors[0], sums.counts[0])}

    def place(self, module: Any, factors: Any) -> Placement:
        return {"weight": (factors["output_factor"], None), "bias": (factors["output_factor"], None)}


class ScalarBlocks(BlockRule):
    name = "scalar"

    def __init__(self, weight: Tensor) -> None:
        super().__init__(Sharing("shared", "expand", "mean"), (Blocks(("weight",), weight.numel(), 1),))

    def per_sample(self, module: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
        return [(x * grad).flatten(1, -2).sum(1).unsqueeze(1)]


class LayerGain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_rule_of_ones_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), LayerGain(5)).double()
    optimizer: Any = AdaFisher(model, rules={LayerGain: lambda layer: Scalar()}, variant="relative")
    assert not train(model, optimizer)
    assert optimizer.explain()[2].rule == "scalar"
    assert float(optimizer.state[model[1].weight]["output_factor"]) > 0
    optimizer.close()
    optimizer = MBF(model, rules={LayerGain: lambda layer: ScalarBlocks(layer.weight)}, beta2=0.0)
    assert not train(model, optimizer, 1)
    assert optimizer.explain()[2].rule == "scalar"
    # Against the gradients of single samples.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), LayerGain(5)).double()
    optimizer = MBF(model, rules={LayerGain: lambda layer: ScalarBlocks(layer.weight)}, beta2=0.0)
    x, blocks = torch.randn(6, 3, 4, dtype=torch.float64), []
    for sample in x:
        (grad,) = torch.autograd.grad(model(sample).square().mean(), model[1].weight)
        blocks.append(grad.square())
    model(x).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model[1].weight]["fisher_blocks"].flatten(), torch.stack(blocks).mean(0))


def test_a_compiled_norm_under_another_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), RootMeanSquare(5, 1.0), nn.Linear(5, 3)).double()
    optimizer = MBF(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert not train(compiled, optimizer)
    assert not any(row.fallback for row in optimizer.explain())
