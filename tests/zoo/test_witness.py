"""The witness sees what layers do, and is not content with statistics or gradients that are a little off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels import KFAC, MBF, AdaFisher
from tests.zoo.witness import Call, Witness, check_blocks, check_factors, check_kronecker, explained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of layers that take a fallback


class Conv1D(nn.Module):
    """A Linear with a transposed weight, by the function that Hugging Face's takes."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).unflatten(0, x.shape[:-1])
        return out


class Attention(nn.Module):
    """nn.MultiheadAttention of one sequence to another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x, x[:, :3], x[:, :3], need_weights=False)[0]
        return out


class Experts(nn.Module):
    """Two matrices in one parameter, each on a part of the rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x[:, :2], self.stack[0]), F.linear(x[:, 2:], self.stack[1])], 1)


class RootMeanSquare(nn.Module):
    """An RMSNorm in elementary operations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class Network(nn.Module):
    """Layers of many kinds, called by modules and by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4, padding_idx=0)
        self.norm = RootMeanSquare(4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(4)
        self.matrix = Conv1D(6, 4)
        self.layer_norm = nn.LayerNorm(6)
        self.by_hand = nn.Linear(6, 5, bias=False)
        self.output = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.words(tokens))
        x = torch.relu_(self.batch_norm(self.conv(x.mT))).mT
        x = torch.tanh(self.layer_norm(self.matrix(x)) @ self.by_hand.weight.T)
        out: Tensor = self.output(x)
        return out


def step(make: Callable[[nn.Module], Any], penalty: float = 0.0) -> tuple[Any, list[Call], dict[Any, str]]:
    """An optimizer after one step, and what the witness saw of it."""
    torch.manual_seed(0)
    model = Network().double()
    optimizer = make(model)
    with Witness(model) as witness:
        out = model(torch.randint(0, 9, (5, 6)))
        loss = F.cross_entropy(out.flatten(0, 1), torch.randint(0, 3, (30,)))
        (loss + penalty * model.output.weight.square().sum()).backward()
    witness.close()
    optimizer.step()
    return optimizer, witness.seen(), {p: name for name, p in model.named_parameters()}


def adafisher(model: nn.Module) -> AdaFisher:
    return AdaFisher(model, lr=0.0)


def mbf(model: nn.Module) -> MBF:
    return MBF(model, lr=0.0, linear_blocks=4)


def kfac(model: nn.Module) -> KFAC:
    return KFAC(model, lr=0.0, others="curvature")


@pytest.mark.parametrize("layer", [Attention, Experts])
def test_parts_of_a_parameter_explain_its_gradient(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = layer(4).double()
    with Witness(model) as witness:
        model(torch.randn(2, 5, 4).double()).square().sum().backward()
    witness.close()
    found = explained(witness.seen())
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[p], p.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_every_call_is_seen_and_explains_the_gradients() -> None:
    optimizer, calls, names = step(adafisher)
    seen = {type(call.plain).__name__ for call in calls}
    assert seen == {"Embedding", "RMSNorm", "Conv1d", "BatchNorm1d", "Conv1D", "LayerNorm", "Linear"}
    assert len(calls) == 8
    assert check_factors(optimizer, calls, names) >= 6
    optimizer, calls, names = step(mbf)
    assert check_blocks(optimizer, calls, names, linear_blocks=4) >= 6
    optimizer, calls, names = step(kfac)
    assert check_kronecker(optimizer, calls, names) >= 6
    optimizer, calls, names = step(lambda model: KFAC(model, lr=0.0))  # whose norms and embeddings are Adam's
    assert check_kronecker(optimizer, calls, names) == 4


@pytest.mark.parametrize("name", ["words.weight", "conv.weight", "batch_norm.weight", "matrix.weight", "output.weight"])
def test_statistics_that_are_off_are_found(name: str) -> None:
    for entry in ("input_factor", "output_factor"):
        optimizer, calls, names = step(adafisher)
        state = next(optimizer.state[p] for p, own in names.items() if own == name)
        if entry in state:
            state[entry][..., 1] *= 1.001
            with pytest.raises(AssertionError, match=f"{entry} of {name} is off by"):
                check_factors(optimizer, calls, names)
    optimizer, calls, names = step(mbf)
    next(optimizer.state[p] for p, own in names.items() if own == name)["fisher_blocks"].mul_(1.001)
    with pytest.raises(AssertionError, match=f"blocks of {name} is off by"):
        check_blocks(optimizer, calls, names, linear_blocks=4)
    for entry in ("row_factor", "column_factor", "fisher_blocks"):
        optimizer, calls, names = step(kfac)
        state = next(optimizer.state[p] for p, own in names.items() if own == name)
        if entry in state:
            value = state[entry]
            value[(..., 1, 1) if value.shape[-1] > 1 else ...] *= 1.001
            with pytest.raises(AssertionError, match=f"of {name} is off by|terms by"):
                check_kronecker(optimizer, calls, names)


def test_a_use_that_was_not_seen_is_found() -> None:
    optimizer, calls, names = step(adafisher, penalty=0.01)
    with pytest.raises(AssertionError, match=r"gradient of output\.weight is off by"):
        check_factors(optimizer, calls, names)
    optimizer, calls, names = step(mbf, penalty=0.01)
    with pytest.raises(AssertionError, match=r"gradient of output\.weight is off by"):
        check_blocks(optimizer, calls, names, linear_blocks=4)
    optimizer, calls, names = step(adafisher)
    without = [call for call in calls if not isinstance(call.plain, nn.Embedding)]
    with pytest.raises(AssertionError, match="no function of the model took it"):
        check_factors(optimizer, without, names)
    optimizer, calls, names = step(mbf)
    without = [call for call in calls if not isinstance(call.plain, nn.Embedding)]
    with pytest.raises(AssertionError, match="no function of the model took it"):
        check_blocks(optimizer, without, names, linear_blocks=4)
