"""Weights that functions of torch apply are served as those of layers that are called."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

from fisher_kernels import EKFAC, KFAC, MBF, AdaFisher, EKFACAdam
from tests.layer_cases import Conv1D
from tests.processes import in_two_processes, needs_processes


@contextmanager
def silent() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said


# Each pair computes the same: the first by functions, the second by layers that are called.


class Attention(nn.Module):
    def __init__(self, called: bool) -> None:
        super().__init__()
        self.called = called
        self.norm, self.qkv, self.proj = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        qkv = self.qkv(h) if self.called else F.linear(h, self.qkv.weight, self.qkv.bias)
        return self.proj(F.scaled_dot_product_attention(*qkv.chunk(3, -1)))


class WithoutBias(nn.Module):
    """A bias that is put together from two parameters is none that the weight knows of."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.called = called
        self.qkv, self.q_bias, self.v_bias = nn.Linear(6, 9, bias=False), *(nn.Parameter(torch.ones(3)) for _ in "qv")

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return self.qkv(x) + bias if self.called else F.linear(x, self.qkv.weight, bias)


class SameConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 1, 2)), self.weight, self.bias, self.stride)


class PadsOutside(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 1, 2)))


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Around(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ScaledEmbedding(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1)) * 8


class Scales(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x.flip(1)) * 8


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class ActivatedConv(nn.Conv2d):
    """What is written into the output later is no doing of the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mul_(2).tanh_()


class Fivefold(torch.autograd.Function):
    """The identity, but for its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 5 * grad


class Louder(nn.Linear):
    """No number of its output tells it from its class."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Fivefold.apply(super().forward(x))
        return out


class Amplified(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Fivefold.apply(self.layer(x))
        return out


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).tanh()


class HandMade(nn.Module):
    """What nn.MultiheadAttention does, by layers."""

    def __init__(self, width: int, heads: int, rows_apart: bool = False) -> None:
        super().__init__()
        self.heads, self.rows_apart = heads, rows_apart
        self.inputs, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        samples, width = len(q), q.shape[-1]
        if q is k:
            parts = self.inputs(q).chunk(3, -1)
        else:  # one use of the layer, most of the output of which nobody reads
            both = self.inputs(torch.cat((q, k), 1))
            parts = both[:, : q.shape[1], :width], *both[:, q.shape[1] :, width:].chunk(2, -1)
        heads = [t.reshape(samples, -1, self.heads, width // self.heads).transpose(1, 2) for t in parts]
        made = F.scaled_dot_product_attention(*heads).transpose(1, 2)
        return self.out(made.reshape(samples, -1, width))


class SelfAttention(nn.Module):
    def __init__(self, by_hand: bool, across: bool = False) -> None:
        super().__init__()
        self.across = across
        self.attention: Any = HandMade(6, 2) if by_hand else nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        other = x[:, 2:].tanh() if self.across else x
        if isinstance(self.attention, HandMade):
            return self.attention(x, other)
        return self.attention(x, other, other, need_weights=False)[0]


class Tied(nn.Module):
    def __init__(self, called: bool) -> None:
        super().__init__()
        self.called = called
        self.embed, self.middle = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False) if called else None
        if self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.middle(self.embed(tokens)).tanh()
        return F.linear(h, self.embed.weight) if self.head is None else self.head(h)


class Raw(nn.Module):
    """A parameter of its own, and the function that applies it."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(shape) / 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.kernel)


class Several(nn.Module):
    """A layer that is called, and used by function."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.called = called
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh()
        h = self.layer(h) if self.called else F.linear(h, self.layer.weight, self.layer.bias)
        return self.last(h.relu())


class Experts(nn.Module):
    """Stacked experts, one after another; each row goes to two of three."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        self.gate = nn.Parameter(torch.randn(3, 4))
        self.up = nn.Parameter(torch.randn(3, 5, 4)) if apart else nn.Linear(4, 15, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        scores, chosen = F.linear(x, self.gate).topk(2, -1)
        out = x.new_zeros(len(x), 5)
        for expert in torch.arange(3):
            rows, place = torch.where(chosen == expert)
            if isinstance(self.up, nn.Linear):
                made = self.up(x[rows])[:, 5 * expert : 5 * expert + 5]
            else:
                made = F.linear(x[rows], self.up[expert])
            out = out.index_add(0, rows, made * scores[rows, place, None].softmax(0))
        return out


class ByInput(nn.Module):
    """Stacked matrices of inputs times outputs, each of its own inputs."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 4, 3)) if apart else nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.stack.dim() == 3:
            return x @ self.stack[0] + (2 * x) @ self.stack[1]
        zero = torch.zeros_like(x)  # two uses of one matrix, half of the input of which is zero
        return torch.cat((x, zero), -1) @ self.stack + torch.cat((zero, 2 * x), -1) @ self.stack


class Mixture(nn.Module):
    """Stacked experts whose rows are sorted, as grouped products take them; the last rows meet none."""

    def __init__(self, apart: bool, by_input: bool = False) -> None:
        super().__init__()
        shape = (4, 16, 8) if by_input else (4, 8, 16)
        self.stack = nn.Parameter(torch.randn(shape) / 4 if apart else torch.randn(4 * shape[1], shape[2]) / 4)
        self.apart, self.by_input = apart, by_input

    def forward(self, x: Tensor) -> Tensor:
        rows, ends = x.flatten(0, 1), torch.tensor([3, 3, 10, 14], dtype=torch.int32)
        if self.apart:
            stack = self.stack if self.by_input else self.stack.mT
            return F.grouped_mm(rows, stack, offs=ends)[:14]
        expert = torch.tensor([0] * 3 + [2] * 7 + [3] * 4)
        if self.by_input:
            apart = rows.new_zeros(14, 4, 16)
            apart[torch.arange(14), expert] = rows[:14]
            return product(apart.flatten(1), self.stack)
        return F.linear(rows[:14], self.stack).view(14, 4, 8)[torch.arange(14), expert]


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


class Batched(nn.Module):
    """Stacked matrices with rows of their own."""

    def __init__(self, apart: bool, by_input: bool) -> None:
        super().__init__()
        shape = (3, 6, 4) if by_input else (3, 4, 6)
        self.stack = nn.Parameter(torch.randn(shape) if apart else torch.randn(3 * shape[1], shape[2]))
        self.apart, self.by_input = apart, by_input

    def forward(self, x: Tensor) -> Tensor:
        x = x[:3]
        if self.apart:
            return torch.bmm(x, self.stack if self.by_input else self.stack.mT)
        if self.by_input:
            return product(torch.block_diag(*x), self.stack).view(3, -1, 4)
        made = F.linear(x.flatten(0, 1), self.stack).view(3, 3, 3, 4)
        return made[torch.arange(3), :, torch.arange(3)]


class Pair(NamedTuple):
    by_function: Callable[[], nn.Module]
    by_layers: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    served: bool = True  # by others than AdaFisher as well


def images() -> Tensor:
    return torch.randn(5, 4, 6, 6)


def rows() -> Tensor:
    return torch.randn(5, 3, 6)


def few() -> Tensor:
    return torch.randn(5, 3, 4)


PAIRS = {
    "linear": Pair(lambda: Attention(False), lambda: Attention(True), rows),
    "bias put together": Pair(lambda: WithoutBias(False), lambda: WithoutBias(True), rows),
    "padding": Pair(lambda: SameConv(4, 3, 3, stride=2), lambda: PadsOutside(4, 3, 3, stride=2), images),
    "permuted norm": Pair(lambda: ChannelNorm(4), lambda: Around(nn.LayerNorm(4)), images),
    "scaled embedding": Pair(
        lambda: ScaledEmbedding(9, 4, padding_idx=1),
        lambda: Scales(9, 4, padding_idx=1),
        lambda: torch.randint(9, (5, 3)),
    ),
    "activated norm": Pair(lambda: ActivatedNorm(4), lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), images),
    "written to": Pair(lambda: ActivatedConv(4, 3, 2), lambda: nn.Sequential(nn.Conv2d(4, 3, 2), Doubled()), images),
    "attention": Pair(lambda: SelfAttention(False), lambda: SelfAttention(True), rows),
    "attention across": Pair(
        lambda: SelfAttention(False, True), lambda: SelfAttention(True, True), lambda: torch.randn(5, 4, 6)
    ),
    "another derivative": Pair(
        lambda: nn.Sequential(Louder(4, 4), nn.Linear(4, 2)),
        lambda: nn.Sequential(Amplified(nn.Linear(4, 4)), nn.Linear(4, 2)),
        few,
    ),
    "tied": Pair(lambda: Tied(False), lambda: Tied(True), lambda: torch.randint(7, (5, 3))),
    "parameter": Pair(lambda: Raw((3, 4), F.linear), lambda: nn.Linear(4, 3, bias=False), few),
    "product": Pair(lambda: Raw((4, 3), torch.matmul), lambda: Product(3, 4), few),
    "product with the transpose": Pair(lambda: Raw((3, 4), by_transpose), lambda: nn.Linear(4, 3, bias=False), few),
    "weight on the left": Pair(
        lambda: Raw((3, 4), lambda x, w: (w @ x.mT).mT), lambda: nn.Linear(4, 3, bias=False), few
    ),
    "weight on the left, transposed": Pair(
        lambda: Raw((4, 3), lambda x, w: (w.t() @ x.mT).mT), lambda: Product(3, 4), few
    ),
    "kernel": Pair(
        lambda: Raw((6, 2, 3, 2), lambda x, w: F.conv2d(x, w, None, (2, 1), padding="valid", groups=2)),
        lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), groups=2, bias=False),
        images,
    ),
    "kernel, transposed": Pair(
        lambda: Raw((4, 2, 3), lambda x, w: F.conv_transpose1d(x, w, stride=2, output_padding=1)),
        lambda: nn.ConvTranspose1d(4, 2, 3, 2, output_padding=1, bias=False),
        lambda: torch.randn(5, 4, 6),
    ),
    "scale": Pair(lambda: Raw((4,), lambda x, w: F.rms_norm(x, (4,), w, 1e-5)), lambda: nn.RMSNorm(4, 1e-5), few),
    "twice": Pair(lambda: Several(False), lambda: Several(True), few),
    "experts": Pair(lambda: Experts(True), lambda: Experts(False), few),
    "grouped": Pair(lambda: Mixture(True), lambda: Mixture(False), lambda: torch.randn(5, 3, 16)),
    "grouped by input": Pair(
        lambda: Mixture(True, True), lambda: Mixture(False, True), lambda: torch.randn(5, 3, 16), served=False
    ),
    "batched": Pair(lambda: Batched(True, False), lambda: Batched(False, False), rows),
    "batched by input": Pair(lambda: Batched(True, True), lambda: Batched(False, True), rows, served=False),
    "stack by input": Pair(lambda: ByInput(True), lambda: ByInput(False), few, served=False),
}


class Product(Conv1D):
    """Without a bias; known by its name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__(nf, nx)
        self.bias = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


Product.__name__ = "Conv1D"


def by_transpose(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.mT


FREE: dict[str, Any] = {
    "lr": 1e-2,
    "kl_clip": None,
    "max_relative_step": None,
    "damping": 0.1,
    "beta2": 0.0,
    "inverse_interval": 1,
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdaFisher": lambda model: AdaFisher(model, lr=1e-2),
    "MBF": lambda model: MBF(model, **FREE),
    "MBF reduce": lambda model: MBF(model, **FREE, sequence="reduce"),
    "MBF per output": lambda model: MBF(model, **FREE, linear_blocks="per_output"),
    "KFAC": lambda model: KFAC(model, **FREE, update_interval=1),
    "KFAC reduce": lambda model: KFAC(model, **FREE, update_interval=1, sequence="reduce"),
    "EKFAC": lambda model: EKFAC(model, **FREE, update_interval=1),
    "EKFACAdam": lambda model: EKFACAdam(model, lr=1e-2, damping=0.1, update_interval=1, inverse_interval=1),
}

RARE = ("MBF reduce", "MBF per output", "KFAC reduce", "EKFAC")

every_reader = pytest.mark.parametrize(
    "optimizer", [AdaFisher, MBF, KFAC, pytest.param(EKFAC, marks=pytest.mark.slow), EKFACAdam]
)


def twins(pair: Pair) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, plain, x = pair.by_function().double(), pair.by_layers().double(), pair.x()
    with torch.no_grad():
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            p.add_(torch.randn_like(p) / 4)
            q.copy_(p.reshape(q.shape))
    return model, plain, x.double() if x.is_floating_point() else x


def train(model: nn.Module, optimizer: Any, x: Tensor, steps: int = 3) -> None:
    for t in range(steps):
        optimizer.zero_grad()
        out = model(x if not x.is_floating_point() else x * (1 + t / 4))
        (out * torch.linspace(-1, 2, out.shape[-1], dtype=out.dtype)).square().mean().backward()
        optimizer.step()


def fallbacks(optimizer: Any) -> list[str]:
    return [row.name for row in optimizer.explain() if row.fallback]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in RARE else k for k in OPTIMIZERS])
@pytest.mark.parametrize("name", PAIRS)
def test_a_function_is_served_as_a_layer(name: str, kind: str) -> None:
    pair = PAIRS[name]
    part = name in ("experts", "attention across", "grouped", "batched")
    declined = kind != "AdaFisher" and not pair.served
    declined = declined or (part and kind in ("MBF reduce", "MBF per output", "KFAC reduce"))
    declined = declined or (name == "attention" and kind in ("MBF reduce", "KFAC reduce"))
    model, plain, x = twins(pair)
    exact = not name.startswith("grouped")  # which torch does in float32 at most
    if not exact:
        model, plain, x = model.float(), plain.float(), x.float()
    start = [p.detach().clone() for p in model.parameters()]
    with silent() as said:
        ours, theirs = OPTIMIZERS[kind](model), OPTIMIZERS[kind](plain)
        # Whose rule changes when the function is seen, so that the first refresh has no statistics.
        if name in ("tied", "another derivative"):
            for net, o in ((model, ours), (plain, theirs)):
                o.param_groups[0]["lr"] = 0.0
                train(net, o, x, 1)
                o.param_groups[0]["lr"] = 1e-2
        # Of equal eigenvalues any basis is one, and the moments in it, and so the steps, depend on which it is. With a
        # new rule moments begin anew.
        if kind == "EKFAC" or (name == "tied" and kind == "EKFACAdam"):
            for o in (ours, theirs):
                o.param_groups[0]["lr"] = 0.0
        train(model, ours, x)
        if declined:
            assert any("fallback" in str(w.message) for w in said)
            assert any("in a way that has no rule" in row.detail for row in ours.explain() if row.fallback)
            return
        if name not in ("bias put together", "scale"):  # vectors without a rule are warned of before
            assert not said, [str(w.message) for w in said]
        train(plain, theirs, x)
    assert fallbacks(ours) == fallbacks(theirs) == (["q_bias", "v_bias"] if name == "bias put together" else [])
    if ours.param_groups[0]["lr"] == 0:
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            for side in ("row_factor", "column_factor"):
                a, b = ours.state[p].get(side), theirs.state[q].get(side)
                torch.testing.assert_close(a, b, rtol=1e-8 if exact else 1e-3, atol=1e-12 if exact else 1e-6)
        return
    for p, q, s in zip(model.parameters(), plain.parameters(), start, strict=True):
        moved = (q.detach().reshape(s.shape) - s).abs().max()
        assert moved > 0
        assert float((p.detach().reshape(-1) - q.detach().reshape(-1)).abs().max() / moved) < (1e-8 if exact else 1e-3)


def test_the_sums_of_an_expert_are_those_of_its_rows() -> None:
    torch.manual_seed(0)
    model = Experts(True).double()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with silent():
        steps = AdaFisher(model, variant="relative")
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def look(x: Tensor, weight: Tensor) -> Tensor:
            out = linear(x, weight)
            if weight is not model.gate:
                out.register_hook(lambda grad: seen.update({len(seen): (x, grad)}))
            return out

        linear, F.linear = F.linear, look  # type: ignore[assignment]
        try:
            model(x).square().mean().backward()
        finally:
            F.linear = linear
        steps.step()
    assert len(seen) == 3
    order = sorted(seen.values(), key=lambda pair: -len(pair[0]))
    rows_used = sum(len(x) for x, _ in order)
    assert rows_used == 30
    state = steps.state[model.up]
    factor = state["input_factor"] / state["factor_weight"]
    torch.testing.assert_close(factor, sum(x.square().sum(0) for x, _ in order) / rows_used)
    outputs = (state["output_factor"] / state["factor_weight"]).view(3, 5)
    found = {tuple(row.tolist()) for row in outputs}
    wanted = {tuple((grad.square().sum(0) / rows_used).tolist()) for _, grad in order}
    assert all(min(torch.tensor(f).sub(torch.tensor(w)).abs().max() for w in wanted) < 1e-12 for f in found)


class RootMeanSquare(nn.Module):
    """An RMSNorm in elementary operations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class Masked(nn.Module):
    """Part of the gradient of the weight comes from a function without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return F.linear(h, self.weight) + h @ (self.weight * 0.5)


@every_reader
def test_a_weight_that_other_functions_see_too_is_named(optimizer: Any) -> None:
    model = Masked()
    with silent() as said:
        steps = optimizer(model)
        train(model, steps, torch.randn(5, 4))
    assert any("weight" in str(w.message) for w in said)
    row = next(row for row in steps.explain() if row.name == "weight")
    assert row.fallback
    assert "mul has no rule" in row.detail


class TiedByEinsum(nn.Module):
    """Layers that compute by functions without a rule, which is theirs, and a weight that goes into one besides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.middle = nn.Embedding(7, 4), RootMeanSquare(4), Conv1D(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.middle(self.norm(self.embed(tokens)))
        return torch.einsum("btd,vd->btv", h, self.embed.weight)


@every_reader
def test_a_weight_of_a_layer_that_other_functions_see_too_is_named(optimizer: Any) -> None:
    model = TiedByEinsum()
    with silent() as said:
        steps = optimizer(model)
        train(model, steps, torch.randint(7, (5, 3)))
    assert len(said) == 1
    assert "left out of the statistics: embed.weight;" in str(said[0].message)
    assert [row.name for row in steps.explain() if "left out" in row.detail] == ["embed.weight"]
    assert not fallbacks(steps)
    steps.close()
    with pytest.raises(RuntimeError, match=r"left out of the statistics: embed\.weight; fallback='error' refuses"):
        train(model, optimizer(model, fallback="error"), torch.randint(7, (5, 3)))


class Interrupted(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(4, 4), error

    def forward(self, x: Tensor, stop: bool = False) -> Tensor:
        out = F.linear(x, self.layer.weight)
        if stop:
            raise self.error
        return out


@every_reader
def test_error_waits_for_the_first_refresh_to_refuse_what_functions_may_serve(optimizer: Any) -> None:
    model, x = SelfAttention(False), torch.randn(5, 3, 6)
    train(model, optimizer(model, fallback="error"), x)
    wrong = Masked()
    steps = optimizer(wrong, fallback="error")
    with pytest.raises(RuntimeError, match="weight"):
        train(wrong, steps, torch.randn(5, 4))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_ends_early_leaves_no_mode(error: type[BaseException]) -> None:
    model = Interrupted(error)
    steps, x = AdaFisher(model), torch.randn(3, 4)
    with pytest.raises(error):
        model(x, stop=True)
    steps.zero_grad()
    assert _get_current_function_mode() is None
    train(model, steps, x)
    assert float(steps.state[model.layer.weight]["factor_weight"]) > 0


@every_reader
def test_a_state_with_functions_is_resumed_to_the_bit(optimizer: Any) -> None:
    with silent():
        model, _, x = twins(PAIRS["attention"])
        interval = {"update_interval": 2, **({} if optimizer is AdaFisher else {"refresh": "constant"})}
        steps = optimizer(model, **interval)
        train(model, steps, x, 1)
        other = copy.deepcopy(model)
        resumed = optimizer(other, **interval)
        stored = io.BytesIO()
        torch.save(steps.state_dict(), stored)
        stored.seek(0)
        resumed.load_state_dict(torch.load(stored, weights_only=True))
        assert [r.rule for r in resumed.explain()] == [r.rule for r in steps.explain()]
        copied, optimizer_of_it = copy.deepcopy((model, steps))
        for net, o in ((model, steps), (other, resumed), (copied, optimizer_of_it)):
            train(net, o, x, 4)
    for another in (other, copied):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), another.parameters(), strict=True))


class Checkpointed(nn.Module):
    def __init__(self, kind: str | None) -> None:
        super().__init__()
        self.kind, self.block, self.first = kind, SelfAttention(False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.kind is None:
            return self.block(h)
        return checkpoint(self.block, h, use_reentrant=self.kind == "reentrant")  # type: ignore[no-any-return]


@every_reader
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_checkpointing(optimizer: Any, kind: str) -> None:
    with silent() as said:
        moved = []
        for how in (None, kind):
            torch.manual_seed(0)
            model = Checkpointed(how).double()
            steps = optimizer(model)
            train(model, steps, torch.randn(5, 3, 6, dtype=torch.float64))
            moved.append([p.detach().clone() for p in model.parameters()])
    if kind == "not reentrant":
        assert not said
        assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))
    else:
        assert said
        detail = next(row.detail for row in steps.explain() if row.name.endswith("in_proj_weight"))
        assert "linear without gradients has no rule" in detail


def test_accumulation_adds_up_and_evaluation_counts_for_nothing() -> None:
    with silent():
        moved = []
        for parts in (1, 2):
            torch.manual_seed(0)
            model = SelfAttention(False).double()
            steps, x = AdaFisher(model), torch.randn(4, 3, 6, dtype=torch.float64)
            for part in x.chunk(parts):
                (model(part).square().mean() / parts).backward()
                model(part)
                with torch.no_grad():
                    model(part)
                torch.autograd.grad(model(part).sum(), model.attention.in_proj_weight)
            steps.step()
            moved.append(steps.state[model.attention.in_proj_weight])
    torch.testing.assert_close(moved[0]["input_factor"], moved[1]["input_factor"], rtol=1e-12, atol=0)
    torch.testing.assert_close(moved[0]["output_factor"], moved[1]["output_factor"], rtol=1e-12, atol=0)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.last = nn.Linear(4, 6), nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = F.embedding(torch.arange(x.shape[1])[None], self.table.weight)
        return self.last(self.first(x) + places)


def test_a_row_that_is_broadcast_counts_for_each_that_it_serves() -> None:
    states = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = Positions().double()
        steps, x = AdaFisher(model), torch.randn(4, 3, 4, dtype=torch.float64)
        for part in x.chunk(parts):
            (model(part).square().mean() / parts).backward()
        steps.step()
        states.append(steps.state[model.table.weight])
    for name in ("input_factor", "output_factor"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-9, atol=0)


def test_under_autocast() -> None:
    with silent():
        torch.manual_seed(0)
        model = SelfAttention(False)
        steps, x = AdaFisher(model), torch.randn(4, 3, 6)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        steps.step()
    assert not fallbacks(steps)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_compiled_model_names_its_functions() -> None:
    model = nn.Sequential(nn.Linear(6, 6), SelfAttention(False))
    with silent() as said:
        steps = AdaFisher(model)
        train(torch.compile(model, backend="aot_eager"), steps, torch.randn(5, 3, 6))
    assert any("in_proj_weight" in str(w.message) for w in said)
    assert set(fallbacks(steps)) >= {"1.attention.in_proj_weight", "1.attention.in_proj_bias"}
    assert float(steps.state[model[0].weight]["factor_weight"]) > 0


def test_copies_of_a_model_watch_nothing() -> None:
    with silent():
        model = SelfAttention(False)
        steps = AdaFisher(model)
        other = copy.deepcopy(model)
        other(torch.randn(2, 3, 6)).sum().backward()
        assert not other._forward_pre_hooks
        assert not other._forward_hooks_always_called
        steps.close()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@torch.compile(backend="aot_eager", fullgraph=True)
def double(x: Tensor) -> Tensor:
    return F.gelu(x * 2)


class CompiledInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(double(self.first(x)), self.second.weight)


def test_what_a_forward_compiles_compiles_under_the_mode() -> None:
    model = CompiledInside()
    with silent() as said:
        steps = AdaFisher(model)
        train(model, steps, torch.randn(5, 4))
    assert not said
    assert float(steps.state[model.second.weight]["factor_weight"]) > 0


def attention_and_data() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return SelfAttention(False).double(), torch.randn(4, 3, 6, dtype=torch.float64)


def train_a_part(model: nn.Module, parallel: nn.Module, x: Tensor) -> list[list[float]]:
    with silent():
        steps = AdaFisher(model, update_interval=2)
        for _ in range(4):
            steps.zero_grad()
            parallel(x).square().mean().backward()
            steps.step()
    assert not fallbacks(steps)
    return [p.detach().flatten().tolist() for p in model.parameters()]


def _of_rank(rank: int) -> list[list[float]]:
    model, x = attention_and_data()
    return train_a_part(model, nn.parallel.DistributedDataParallel(model), x.chunk(2)[rank])


@pytest.mark.slow
@needs_processes
def test_processes_agree_on_functions(tmp_path: Path) -> None:
    model, x = attention_and_data()
    expected = train_a_part(model, model, x)
    first, second = in_two_processes(_of_rank, tmp_path)
    assert first == second
    for ours, theirs in zip(first, expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-6, atol=1e-9)


class CallsItself(nn.Module):
    """Once more without gradients, before its own function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        if again:
            with torch.no_grad():
                x = x + self(x, again=False)
        return F.linear(x, self.layer.weight) if again else x


def test_a_model_that_calls_itself_is_one_forward() -> None:
    model = CallsItself()
    with silent() as said:
        steps = AdaFisher(model)
        train(model, steps, torch.randn(5, 4))
    assert not said
    assert float(steps.state[model.layer.weight]["factor_weight"]) > 0


def test_the_forwards_of_several_optimizers_end() -> None:
    """Each looks for functions; the first that began to is the first to end."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with silent():
        several = [AdaFisher(model), MBF(model), AdaFisher(model)]
        for _ in range(2):
            model(torch.randn(5, 4)).sum().backward()
            assert _get_current_function_mode() is None
            for optimizer in several:
                optimizer.step()


@every_reader
def test_a_layer_that_is_named_in_rules_counts_once(optimizer: Any) -> None:
    """What it does with the derivative is overridden, and the function inside it is not read besides."""
    model, plain = (nn.Sequential(kind(4, 4), nn.Linear(4, 2)) for kind in (Louder, nn.Linear))
    plain.load_state_dict(model.state_dict())
    with silent():
        ours, theirs = optimizer(model, rules={Louder: "linear"}), optimizer(plain)
        for net, steps in ((model, ours), (plain, theirs)):
            torch.manual_seed(1)
            train(net, steps, torch.randn(5, 4), 1)
    name = {AdaFisher: "output_factor", MBF: "fisher_blocks"}.get(optimizer, "row_factor")
    assert torch.equal(ours.state[model[0].weight][name], theirs.state[plain[0].weight][name])


class MergedAdapter(nn.Module):
    """A product of two parameters is added to a weight: neither of them meets samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 2)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(x, self.weight + self.b @ self.a))


@every_reader
def test_products_of_two_parameters_are_named(optimizer: Any) -> None:
    model = MergedAdapter()
    with silent() as said:
        steps = optimizer(model)
        train(model, steps, torch.randn(5, 4))
    assert len(said) == 1
    assert fallbacks(steps) == ["weight", "a", "b"]
    assert all("of two parameters" in row.detail for row in steps.explain() if row.name in "ab")


class BiasApart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(x, self.layer.weight) + self.layer.bias)


class ScaledBias(BiasApart):
    """The derivative of the bias is not that of what the weight makes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(x, self.layer.weight) + 10 * self.layer.bias)


class LateBias(BiasApart):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(x, self.layer.weight).tanh() + self.layer.bias)


@pytest.mark.parametrize("kind", [ScaledBias, LateBias])
@every_reader
def test_a_bias_is_not_served_by_a_function_that_it_is_not_added_to(optimizer: Any, kind: Any) -> None:
    model = kind()
    with silent() as said:
        steps = optimizer(model)
        train(model, steps, torch.randn(5, 4))
    assert len(said) == 1
    assert "no use of them: layer" in str(said[0].message)
    assert fallbacks(steps) == ["layer.weight", "layer.bias"]


class Score(nn.Module):
    """A vector that scores rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.score = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (x @ self.score).softmax(0).unsqueeze(1)


@every_reader
def test_a_vector_that_is_multiplied_by_is_named_and_resumes(optimizer: Any) -> None:
    model, x = Score(), torch.randn(5, 4)
    with silent() as said:
        steps = optimizer(model)
        train(model, steps, x)
        other = copy.deepcopy(model)
        resumed = optimizer(other)
        resumed.load_state_dict(steps.state_dict())
        for net, o in ((model, steps), (other, resumed)):
            train(net, o, x)
    assert len(said) == 1
    assert "fallback (score)" in str(said[0].message)
    assert any("matmul" in row.detail for row in steps.explain() if row.name == "score")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@every_reader
def test_a_bias_that_another_function_adds(optimizer: Any) -> None:
    """AdaFisher gives it the factor of the output, whoever adds it; blocks of both would have nothing of it."""
    model = BiasApart()
    with silent() as said:
        steps = optimizer(model)
        train(model, steps, torch.randn(5, 4))
    if optimizer is AdaFisher:
        assert not said
        assert not fallbacks(steps)
    else:
        assert "layer" in str(said[0].message)
        assert fallbacks(steps) == ["layer.weight", "layer.bias"]


class OwnLinear(nn.Module):
    """A class of the user's whose weight a function applies, as routers of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@every_reader
def test_the_home_of_a_weight_is_no_use_of_it(optimizer: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), OwnLinear())
    steps = optimizer(model)
    train(model, steps, torch.randn(5, 4))
    (row,) = [row for row in steps.explain() if row.name == "1.weight"]
    assert row.rule == "linear"
    assert "by function" in row.detail
    assert "OwnLinear" not in row.detail
