"""Layers that do not compute what their class documents are found in their first forward, and right ones are not."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fisher_kernels import EKFAC, KFAC, MBF, AdaFisher, EKFACAdam
from fisher_kernels.curvature import proof
from fisher_kernels.curvature.proof import MisfitError, Proof, compare
from tests.layer_cases import LAYERS

every_reader = pytest.mark.parametrize(
    "optimizer", [AdaFisher, MBF, KFAC, pytest.param(EKFAC, marks=pytest.mark.slow), EKFACAdam]
)


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


class PaddedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class ShiftedConv(nn.Conv2d):
    """Pads on one side what its class pads on both: shapes do not tell."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 0, 2, 0)), self.weight, self.bias)


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class ScaledEmbedding(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 8


class PositionEmbedding(nn.Embedding):
    """Its input is a mask, of which it makes the positions itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.cumsum(1) - 1)


class OneRowOff(nn.Linear):
    """Right but for one row of many, which a norm over all of them would miss."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return torch.cat((out[:-1], out[-1:] * 1.01))


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class HalvedNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight * 0.5, self.bias, self.eps)


class RepeatedEmbedding(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return (self.weight + self.weight.mean(0))[x]


WRONG: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "channel norm": (lambda: ChannelNorm(6), lambda: torch.randn(4, 6, 8, 8)),
    "channel norm, as wide": (lambda: ChannelNorm(6), lambda: torch.randn(4, 6, 6, 6)),
    "padded": (lambda: PaddedConv(3, 4, 2), lambda: torch.randn(2, 3, 5, 5)),
    "shifted": (lambda: ShiftedConv(3, 4, 3, padding=1), lambda: torch.randn(2, 3, 5, 5)),
    "activated": (lambda: ActivatedNorm(3), lambda: torch.randn(4, 3, 5, 5)),
    "scaled": (lambda: ScaledEmbedding(9, 4), lambda: torch.randint(9, (3, 5))),
    "positions": (lambda: PositionEmbedding(9, 4), lambda: torch.ones(3, 5, dtype=torch.int64)),
    "one row": (lambda: OneRowOff(6, 4), lambda: torch.randn(5000, 6)),
    "halved": (lambda: HalvedNorm(5), lambda: torch.randn(4, 5, 5, 5)),
    "repeated": (lambda: RepeatedEmbedding(9, 4), lambda: torch.randint(9, (3, 5))),
    "standardised": (lambda: StandardisedConv(3, 4, 3, padding=1), lambda: torch.randn(2, 3, 5, 5)),
}


def looked_at(module: nn.Module, *inputs: Any) -> Proof:
    found = Proof()
    found.holds(module, inputs[0], module(*inputs), 1)
    return found


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_its_class_is_found(name: str) -> None:
    torch.manual_seed(0)
    make, x = WRONG[name]
    assert looked_at(make(), x()).reason is not None


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_its_class_is_proven(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    module = make()
    if len(list(module.children())):
        pytest.skip("calls a layer with other arguments; the test of the whole optimizer has it")
    for p in module.parameters():
        nn.init.normal_(p)
    dtype = next(module.parameters()).dtype
    found = looked_at(module, torch.randn(shape, dtype=dtype))
    assert found.reason is None
    assert found.proven or "-vector" in name


@every_reader
@pytest.mark.parametrize("name", ["halved", "standardised"])
def test_a_misfit_takes_the_fallback_with_the_reason(optimizer: Any, name: str) -> None:
    torch.manual_seed(0)
    make, x = WRONG[name]
    x0 = x()
    model = nn.Sequential(nn.Conv2d(x0.shape[1], x0.shape[1], 1), make(), nn.Flatten(), nn.LazyLinear(3))
    model(x0)
    steps = optimizer(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            steps.zero_grad()
            model(x0).square().mean().backward()
            steps.step()
    assert len(said) == 1
    assert "1 (" in str(said[0].message)
    rows = {row.name: row for row in steps.explain()}
    assert rows["1.weight"].fallback
    assert "not served for 1: its " in rows["1.weight"].detail
    assert not rows["0.weight"].fallback
    assert all(p.isfinite().all() for p in model.parameters())
    # A state that is loaded goes on to the bit, before the layer is seen again.
    other = copy.deepcopy(model)
    resumed = optimizer(other)
    resumed.load_state_dict(steps.state_dict())
    assert {row.name: row.rule for row in resumed.explain()} == {row.name: row.rule for row in steps.explain()}
    for net, o in ((model, steps), (other, resumed)):
        o.zero_grad()
        net(x0).square().mean().backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@every_reader
def test_a_layer_that_changes_later_is_found_and_drops_its_state(optimizer: Any) -> None:
    class Gated(nn.Linear):
        gate = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.gate, self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(Gated(4, 4), nn.Tanh(), nn.Linear(4, 2))
    steps, x = optimizer(model), torch.randn(8, 4)
    rules = []
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for t in range(5):
            if t == 2:
                model[0].gate = 2.0  # type: ignore[assignment]
            steps.zero_grad()
            model(x).square().mean().backward()
            steps.step()
            rules.append(steps.explain()[0].rule)
    assert rules == ["linear", "linear", "linear", "fallback", "fallback"]  # refreshes 1, 2, 4
    assert steps.state[model[0].weight].get("input_factor") is None
    assert all(p.isfinite().all() for p in model.parameters())


@every_reader
def test_error_refuses_to_start_and_to_go_on(optimizer: Any) -> None:
    with pytest.raises(ValueError, match="fallback is 'never'"):
        optimizer(nn.Linear(2, 2), fallback="never")
    with pytest.raises(ValueError, match=r"no layer rule \(weight"):
        optimizer(nn.Bilinear(2, 2, 2), fallback="error")
    model = nn.Sequential(StandardisedConv(2, 2, 2), nn.Flatten(), nn.Linear(8, 2))
    steps = optimizer(model, fallback="error")
    before = [p.clone() for p in model.parameters()]
    for _ in range(2):
        steps.zero_grad()
        model(torch.randn(3, 2, 3, 3)).square().mean().backward()
        with pytest.raises(RuntimeError, match=r"0\.weight"):
            steps.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_zeros_and_constants_prove_nothing() -> None:
    class Activated(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x)) * 3

    module = Activated(4, 4)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    x, found = torch.randn(6, 4), Proof()
    assert found.holds(module, x, module(x), 1)
    assert not found.proven
    nn.init.normal_(module.weight)
    assert not found.holds(module, x, module(x), 1)


def test_it_is_due_again_in_another_state() -> None:
    module, found = nn.Linear(4, 4), Proof()
    x = torch.randn(6, 4)
    assert found.holds(module, x, module(x), 1)
    wrong = module(x) * 2
    assert found.holds(module, x, wrong, 1), "not due in the same refresh"
    with pytest.raises(MisfitError):
        compare(module, x[:, :3], wrong)
    assert not copy_of(found).holds(module.eval(), x, wrong, 1)
    module.train()
    assert not copy_of(found).holds(module, x[None], wrong[None], 1)
    assert not copy_of(found).holds(module, x.double(), wrong.double(), 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not copy_of(found).holds(module, x, wrong, 1)
    assert not copy_of(found).holds(module, x, wrong, 2)
    assert copy_of(found).holds(module, x, module(x), 2)


def copy_of(known: Proof) -> Proof:
    new = Proof()
    new.proven = dict(known.proven)
    return new


def test_it_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), spectral_norm(nn.Conv2d(3, 3, 1)))
    renormed = nn.Embedding(5, 3, max_norm=0.1)
    x = torch.randn(4, 3, 5, 5)
    out = model[0](x)
    normal = model[1](out)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    for module, args, made in ((model[0], x, out), (model[1], out, normal)):
        assert compare(module, args.detach(), made) is not None
    tokens = torch.arange(5)
    made = renormed(tokens)
    weight = renormed.weight.detach().clone()
    assert compare(renormed, tokens, made) is not None
    assert torch.equal(weight, renormed.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_the_sample_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    linear = F.linear
    monkeypatch.setattr(proof, "SAMPLE_BYTES", 4096)
    monkeypatch.setattr(proof.F, "linear", lambda x, *args, **kw: rows.append(len(x)) or linear(x, *args, **kw))
    module, x = nn.Linear(8, 8), torch.randn(1000, 8)
    out = linear(x, module.weight, module.bias)
    assert compare(module, x, out) is not None
    assert 1 <= rows[0] <= 4096 // (3 * 8 * 4)


@every_reader
@pytest.mark.parametrize("kind", ["selective", "reentrant", "not reentrant"])
def test_checkpointing_keeps_its_gradients(optimizer: Any, kind: str) -> None:
    gradients = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        if watched:
            steps = optimizer(model)
        x = torch.randn(6, 4, requires_grad=True)
        options: dict[str, Any] = {"use_reentrant": kind == "reentrant"}
        if kind == "selective":
            options["context_fn"] = lambda: create_selective_checkpoint_contexts(
                lambda ctx, op, *args, **kwargs: (
                    CheckpointPolicy.MUST_SAVE if "addmm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE
                )
            )
        checkpoint(model, x, **options).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        if watched:
            assert all(layer.proof.proven for layer in steps.statistics.layers())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.fixture
def alone() -> Iterator[DeviceMesh]:
    """A mesh of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_tensors_are_compared_as_a_whole(alone: DeviceMesh) -> None:
    layer = nn.Linear(4, 6)
    for name, p in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(distribute_tensor(p.detach(), alone, [Shard(0)])))
    x = distribute_tensor(torch.randn(5, 4), alone, [Replicate()])
    out = layer(x)
    verdict = compare(layer, x, out)
    assert verdict is not None
    assert verdict.agrees()
    verdict = compare(layer, x, out * 2)
    assert verdict is not None
    assert verdict.agrees() is False
    with pytest.raises(MisfitError, match=r"its output has shape \(5, 7\), expected \(5, 6\)"):
        compare(layer, x, distribute_tensor(torch.randn(5, 7), alone, [Replicate()]))


def test_a_users_hook_on_the_output_does_not_make_a_misfit() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    steps = AdaFisher(model)
    model(torch.randn(5, 4)).sum().backward()
    steps.step()
    assert not steps.explain()[0].fallback


@every_reader
def test_a_layer_whose_weight_a_function_applies_is_named(optimizer: Any) -> None:
    class ByFunction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.applied = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("oi,...i->...o", self.applied.weight, self.called(x)) + self.applied.bias

    model = ByFunction()
    steps, x = optimizer(model), torch.randn(5, 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            steps.zero_grad()
            model(x).square().mean().backward()
            steps.step()
    assert len(said) == 1
    assert "no use of them: applied." in str(said[0].message)
    noted = "no statistics in the last refresh"
    assert [noted in row.detail for row in steps.explain()] == [False, False, True, True]
    assert [row.fallback for row in steps.explain()] == [False, False, True, True]
    model.applied(x).square().mean().backward()
    model.called(x).square().mean().backward()
    steps.step()
    assert not any(noted in row.detail or row.fallback for row in steps.explain())


@every_reader
@pytest.mark.parametrize("role", ["weight", "bias"])
def test_a_parameter_of_which_another_is_computed_later_is_named(optimizer: Any, role: str) -> None:
    """It is the same object under another name; the layer is served again when the mask has gone."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    steps, x = optimizer(model), torch.randn(5, 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prune.random_unstructured(model[0], role, 0.5)
        for _ in range(2):
            steps.zero_grad()
            model(x).square().mean().backward()
            steps.step()
    assert len(said) == 1
    assert "no use of them: 0. Is a weight" in str(said[0].message)
    assert [row.fallback for row in steps.explain()] == [True, True, False, False]
    prune.remove(model[0], role)
    steps.zero_grad()
    model(x).square().mean().backward()
    steps.step()
    assert not any(row.fallback for row in steps.explain())


def test_a_bias_whose_weight_is_computed_is_served_by_torchs_own_forward_alone() -> None:
    class Activated(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x).relu()

    class Scaled(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return 2 * super()._conv_forward(x, weight, bias)

    layers = [nn.Conv2d(3, 3, 1), Activated(3, 3, 1), Scaled(3, 3, 1)]
    model = nn.Sequential(*map(weight_norm, layers))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        steps = AdaFisher(model)
        model(torch.randn(2, 3, 4, 4)).square().mean().backward()
        steps.step()
    assert any("its weight is computed, and its forward() is not that of nn.Conv2d" in str(w.message) for w in said)
    assert [row.fallback for row in steps.explain() if row.name.endswith("bias")] == [False, True, True]


@every_reader
def test_layers_of_a_compiled_model_are_compared_too(optimizer: Any) -> None:
    torch._dynamo.reset()  # what it has compiled for other optimizers
    model = nn.Sequential(nn.Linear(4, 4), OneRowOff(4, 4), nn.Linear(4, 2))
    steps = optimizer(model)
    compiled = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            steps.zero_grad()
            compiled(torch.randn(5, 4)).square().mean().backward()
            steps.step()
    assert any("take a fallback: 1 (its output is off" in str(w.message) for w in said)
    assert [row.fallback for row in steps.explain()] == [False, False, True, True, False, False]
    known = "factor_weight" if optimizer is AdaFisher else "fisher_updates"
    assert float(steps.state[model[2].weight][known]) > 0


def test_layers_that_cannot_take_their_input_do_not_end_a_compilation() -> None:
    class Tokens(nn.Embedding):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.long())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.padded, self.tokens, self.head = ShiftedConv(3, 4, 3), Tokens(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.padded(x).mean((2, 3)) + self.tokens(ids))
            return out

    model = Net()
    steps = AdaFisher(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(2, 3, 2, 2), torch.ones(2)).square().mean().backward()  # smaller than the kernel
    with pytest.warns(UserWarning, match=r"no use of them: padded, tokens\."):
        steps.step()
    assert {row.name for row in steps.explain() if not row.fallback} == {"head.weight", "head.bias"}


@every_reader
def test_an_unused_layer_takes_the_fallback_as_named_and_resumes(optimizer: Any) -> None:
    """Its curvature is that of the others for AdaFisher, else its own squared gradient, and never 1."""

    class Either(nn.Module):
        by_function = True

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            applied = torch.einsum("oi,...i->...o", self.last.weight, h) + self.last.bias
            return applied if self.by_function else self.last(h)

    def train(model: nn.Module, steps: Any, times: int) -> None:
        for t in range(times):
            steps.zero_grad()
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(t))
            model(x).square().mean().mul(1e-3).backward()
            steps.step()

    torch.manual_seed(0)
    model = Either()
    interval = {"update_interval": 3, **({} if optimizer is AdaFisher else {"refresh": "constant"})}
    steps = optimizer(model, **interval)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, steps, 2)
    served, unused = (steps.metrics()[name] for name in ("first.weight", "last.weight"))
    state = steps.state[model.last.weight]
    if optimizer is AdaFisher:
        assert unused["smallest_step"] == unused["largest_step"] != 1e-3
        assert served["smallest_step"] < unused["largest_step"] < served["largest_step"]
    elif optimizer is EKFACAdam:  # in the basis of the numbers themselves
        assert torch.equal(state["row_basis"][0], torch.eye(2))
        assert float(state["moment_updates"]) == 2
    else:
        assert model.last.weight.shape.numel() == state["unused_fisher_blocks"].numel()
        if optimizer is MBF:
            assert unused["smallest_step"] < unused["largest_step"]
    # A state that is loaded goes on to the bit, also before the next refresh.
    other = copy.deepcopy(model)
    resumed = optimizer(other, **interval)
    resumed.load_state_dict(steps.state_dict())
    train(model, steps, 2)
    train(other, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert any(row.fallback for row in resumed.explain())
    # Used again, it has blocks or factors of its own at once.
    for net, o in ((model, steps), (other, resumed)):
        net.by_function = False
        train(net, o, 3)
        assert not any(row.fallback for row in o.explain())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@every_reader
def test_an_unused_layer_is_refused_if_so_asked(optimizer: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    steps = optimizer(model, fallback="error")
    F.linear(model[0](torch.randn(5, 4)), model[1].weight).sum().backward()
    with pytest.raises(RuntimeError, match=r"\(1\.weight; 1: no statistics"):
        steps.step()


@every_reader
def test_an_error_of_a_layers_statistics_ends_no_backward(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    steps, x = optimizer(model), torch.randn(5, 4)
    rule = next(layer.rule for layer in steps.statistics.layers() if layer.module is model[2])

    def fail(*args: Any) -> Any:
        raise ArithmeticError("so be it")

    for name in ("capture", "contribute"):
        monkeypatch.setattr(type(rule), name, fail)
        layers = list(steps.statistics.layers())
        with monkeypatch.context() as debugging:
            debugging.setenv("FISHER_KERNELS_RAISE", "1")
            with pytest.raises(ArithmeticError, match="so be it"):
                model(x).sum().backward()
        model(x).sum().backward()
        assert all(layer.proof.reason == "its statistics raise ArithmeticError: so be it" for layer in layers)
        with pytest.warns(UserWarning, match=r"take a fallback: 0 \(its statistics raise ArithmeticError"):
            steps.step()
        assert all(row.fallback for row in steps.explain())
        monkeypatch.undo()
        steps = optimizer(model)

    def exhaust(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(type(rule), "contribute", exhaust)
    with pytest.raises(MemoryError):
        model(x).sum().backward()
