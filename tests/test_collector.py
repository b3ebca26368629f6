"""What optimizers of others read layers with: ``fisher_kernels.statistics``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fisher_kernels.statistics as interface
from fisher_kernels import ops
from fisher_kernels.statistics import Collector, Rule, Sums
from tests.checkout import ROOT
from tests.threads import in_threads

REFERENCE = (ROOT / "docs" / "api" / "statistics.rst").read_text()


class Grams(Rule):
    """The rule of docs/guides/own-optimizer.md."""

    name = "grams"
    powers = (0, 2)

    def capture(self, module: Any, x: Tensor) -> tuple[list[Tensor], list[int]]:
        return [x], []

    def contribute(self, module: Any, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> Sums:
        sides = [v.reshape(-1, v.shape[-1]) for v in (*captured, grad)]
        grams = [v.new_empty(v.shape[1], v.shape[1], dtype=ops.ACCUMULATOR[v.dtype]) for v in sides]
        for gram, rows in zip(grams, sides, strict=True):
            ops.weighted_gram_(gram, rows)
        return Sums([gram.flatten() for gram in grams], [len(rows) for rows in sides])

    def sum_lengths(self, module: Any) -> list[int | None]:
        return [module.in_features**2, module.out_features**2]


def of_linear(layer: Any) -> Rule | None:
    return Grams() if isinstance(layer, nn.Linear) else None


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2)).double()


def backward(model: nn.Module, x: Tensor, scale: float = 1.0) -> None:
    (model(x).square().mean() * scale).backward()


def naive(model: Any, batches: Sequence[Tensor]) -> dict[Tensor, list[Tensor]]:
    """The sums of both sides of each Linear, from activations whose gradients autograd keeps."""
    found = {}
    for i in (0, 3):
        read, made = [], []
        for x in batches:
            inside = model[:i](x).detach()
            outside = model[i](inside).detach().requires_grad_()
            (grad,) = torch.autograd.grad(model[i + 1 :](outside).square().mean(), outside)
            read.append(inside)
            made.append(grad)
        found[model[i].weight] = [v.T @ v for v in (torch.cat(read), torch.cat(made))]
    return found


def assert_sums(found: dict[Any, Sums], expected: dict[Tensor, list[Tensor]], rows: int) -> None:
    assert found.keys() == expected.keys()
    for weight, sums in found.items():
        assert sums.counts == [rows, rows]
        for vector, matrix in zip(sums.vectors, expected[weight], strict=True):
            torch.testing.assert_close(vector.view_as(matrix), matrix, rtol=1e-12, atol=1e-14)


def test_sums_are_of_the_backward_passes_that_accumulate_gradients() -> None:
    model = network()
    collector = Collector(model, of_linear)
    assert [*map(id, collector.weights)] == [id(model[0].weight), id(model[3].weight)]
    batches = [torch.randn(5, 4).double(), torch.randn(6, 4).double()]
    for x in batches:
        backward(model, x)
        torch.autograd.grad(model(x).sum(), model[0].weight)
    assert_sums(collector.take(), naive(model, batches), 11)
    assert collector.take() == {}

    backward(model, batches[0])
    model.zero_grad()
    backward(model, batches[1])
    assert_sums(collector.take(), naive(model, batches[1:]), 6)

    backward(model, batches[0])
    collector.clear()
    assert collector.take() == {}
    collector.collect(False)
    backward(model, batches[0])
    assert collector.take() == {}
    collector.collect()
    backward(model, batches[0])
    assert_sums(collector.take(), naive(model, batches[:1]), 5)
    collector.close()
    backward(model, batches[0])
    assert collector.take() == {}
    assert collector.unserved() == {}


def test_the_scale_of_the_loss_is_divided_out() -> None:
    model, x = network(), torch.randn(5, 4).double()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    collector = Collector(model, of_linear, grad_scaler=scaler)
    scaler.scale(model(x).square().mean()).backward()
    assert_sums(collector.take(), naive(model, [x]), 5)


@pytest.mark.usefixtures("one_thread")
def test_processes_have_the_sums_of_the_joint_batch() -> None:
    """Of unlike parts, each with the mean of its own rows as its loss; what one of them drops counts nowhere."""
    x = torch.randn(9, 4).double()
    models = [network(), network()]  # made one after another, as all draw from one generator

    def work(rank: int) -> tuple[dict[Any, Sums], dict[Any, Sums]]:
        collector = Collector(models[rank], of_linear, process_group=dist.group.WORLD)
        part = x[3 * rank : 3 + 6 * rank]
        backward(models[rank], part, scale=2 * len(part) / len(x))  # the mean over processes is that of all rows
        taken = collector.take()
        backward(models[rank], part)
        collector.clear()
        return taken, collector.take()

    for model, (taken, again) in zip(models, in_threads(work, 2), strict=True):
        assert_sums(taken, naive(model, [x]), 9)
        assert again == {}


class Masked(nn.Module):
    """Part of the gradient of its weight comes from a function that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.other(self.linear(x) + x @ (self.linear.weight * 2).T)
        return out


class Doubled(nn.Linear):
    """Not what its class documents, and by no function that has a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.einsum("oi,ni->no", self.weight, x)


class Raises(Grams):
    def contribute(self, *_: Any) -> Sums:
        raise RuntimeError("no sums today")


def test_layers_that_are_left_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FISHER_KERNELS_RAISE", raising=False)
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"masked": Masked(), "doubled": Doubled(4, 2), "raises": nn.Linear(4, 5)})
    collector = Collector(model["masked"], of_linear)
    backward(model["masked"], torch.randn(5, 4))
    with pytest.warns(UserWarning, match=r"leave out linear \(functions apply it"):
        taken = collector.take()
    assert [*map(id, taken)] == [id(model["masked"].other.weight)] == [*map(id, collector.weights)]
    assert [*collector.unserved()] == ["linear"]

    both = nn.Sequential(model["doubled"], nn.Linear(2, 4), model["raises"])
    collector = Collector(both, lambda layer: Raises() if layer is model["raises"] else of_linear(layer))
    backward(both, torch.randn(5, 4))
    with pytest.warns(UserWarning, match=r"leave out 0 \(.*; 2 \(.*no sums today"):
        assert [*map(id, collector.take())] == [id(both[1].weight)]
    backward(both, torch.randn(5, 4))
    collector.take()  # which says it once


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(TypeError, match="rule_for returned a str, expected a Rule or None"):
        Collector(network(), lambda layer: "linear")  # type: ignore[arg-type,return-value]
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"different layouts serve layers that share a weight"):
        Collector(model, lambda layer: Raises() if layer is model[1] else Grams())
    model[0].weight.requires_grad_(False)
    assert Collector(model, of_linear).weights == []


# What is public.


def test_the_interface_is_what_the_reference_lists() -> None:
    """All of it and nothing else, so that neither grows nor shrinks unseen."""
    entries = dict(
        re.findall(r"^\.\. autoclass:: fisher_kernels\.statistics\.(\w+)\n((?:\n|   .*\n)*)", REFERENCE, re.M)
    )
    assert {*entries} == {*interface.__all__} == {"Collector", "Rule", "Sums"}
    for name, members in entries.items():
        thing = getattr(interface, name)
        assert thing.__doc__
        listed = re.findall(r"auto(?:method|property|attribute):: (\w+)", members)
        assert all(hasattr(thing, member) or member in thing.__annotations__ for member in listed)
        if name == "Collector":
            assert {*listed} == {member for member in vars(thing) if not member.startswith("_")}
    assert {*Grams.__dict__} - {"__module__", "__doc__"} == {*re.findall(r":: (\w+)$", entries["Rule"], re.M)}
