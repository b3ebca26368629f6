"""The statistics engine in the situations that training loops bring: each test fails without the care it names."""

import copy
import functools
import gc
import math
import os
import shutil
import subprocess
import sys
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

from fisher_kernels import KFAC, MBF, AdaFisher
from tests.processes import in_two_processes, needs_processes

SAMPLES, FEATURES, CLASSES = 16, 6, 4


def mlp(seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 8, **kwargs), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, CLASSES, **kwargs))


def batch(seed=1, samples=SAMPLES, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, FEATURES, generator=generator, dtype=dtype)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def loss_of(model, data):
    x, y = data
    return F.cross_entropy(model(x), y)


def snapshot(optimizer):
    """Copies of all parameters and of all their state, in the order of the groups."""
    tensors = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            tensors.append(p.detach().clone())
            state = optimizer.state.get(p, {})
            tensors += [state[name].clone() for name in sorted(state)]
    return tensors


def every(make, interval):
    """Refreshes every so many steps from the first one on."""
    return {"update_interval": interval, **({} if make is AdaFisher else {"refresh": "constant"})}


@pytest.fixture(params=[AdaFisher, MBF, KFAC])
def make(request):
    """An optimizer that reads layers; all of them stand on the same engine."""
    return request.param


def factors(optimizer, parameter):
    """What an optimizer averages of its statistics."""
    state = optimizer.state[parameter]
    return {name: value.clone() for name, value in state.items() if "factor" in name or "fisher" in name}


def updates(optimizer, parameter):
    """More than 0 once there are statistics."""
    state = optimizer.state[parameter]
    return float(state["factor_weight"] if isinstance(optimizer, AdaFisher) else state["fisher_updates"])


def counted(optimizer, parameter):
    """How many steps, or averages of statistics, the state of a parameter has counted."""
    state = optimizer.state[parameter]
    return float(state["step"] if isinstance(optimizer, AdaFisher) else state["fisher_updates"])


def assert_same(actual, expected, rtol=0.0):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()) if b.numel() else 0.0)


def train(model, optimizer, steps=3, run=loss_of):
    for t in range(steps):
        optimizer.zero_grad()
        run(model, batch(t)).backward()
        optimizer.step()
    return snapshot(optimizer)


class TestGraph:
    """What happens to a layer's output, and which backward counts."""

    def test_in_place_operations_after_a_layer(self, make):
        class Net(nn.Module):
            def __init__(self, in_place):
                super().__init__()
                torch.manual_seed(0)
                self.first, self.second = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
                self.in_place = in_place

            def forward(self, x):
                h = self.first(x)
                if self.in_place:
                    h += 1
                    F.relu(h, inplace=True)
                else:
                    h = F.relu(h + 1)
                out = self.second(h)
                if self.in_place:
                    out *= 2
                    return out
                return out * 2

        results = []
        for in_place in (False, True):
            model = Net(in_place)
            results.append(train(model, make(model)))
        assert_same(results[1], results[0])

    @pytest.mark.usefixtures("in_float64")
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_gives_the_same_statistics(self, make, reentrant):
        class Net(nn.Module):
            def __init__(self, checkpointed):
                super().__init__()
                torch.manual_seed(0)
                self.stem = nn.Linear(FEATURES, 8)
                self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
                self.head = nn.Linear(8, CLASSES)
                self.checkpointed = checkpointed

            def forward(self, x):
                h = self.stem(x)
                for _ in range(2):  # the block is used twice
                    h = checkpoint(self.block, h, use_reentrant=reentrant) if self.checkpointed else self.block(h)
                return self.head(h)

        results = []
        for checkpointed in (False, True):
            model = Net(checkpointed)
            results.append(train(model, make(model)))
        # Recomputation adds the two uses of the block in another order.
        assert_same(results[1], results[0], rtol=1e-9)

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_extra_forwards_count_for_nothing(self, make, mode):
        def run(model, data):
            model.train(mode == "train")
            model(batch(99)[0] * 100)  # a graph that no backward runs through
            model.train()
            return loss_of(model, data)

        plain, extra = mlp(), mlp()
        assert_same(train(extra, make(extra), run=run), train(plain, make(plain)))

    @pytest.mark.usefixtures("in_float64")
    def test_two_backward_passes_in_a_step_add_up(self, make):
        model = nn.Linear(FEATURES, CLASSES)
        optimizer = make(model)
        inputs, derivatives = [], []
        for t in range(2):
            x, y = batch(t)
            out = model(x)
            out.register_hook(derivatives.append)
            inputs.append(x)
            F.cross_entropy(out, y).backward()
        optimizer.step()
        state = optimizer.state[model.weight]
        h, s = torch.cat(inputs), torch.cat(derivatives)
        if make is MBF:
            h, squares = F.pad(h, (0, 1), value=1.0), s.square().sum(1)
            block = len(h) / CLASSES * torch.einsum("r,ri,rj->ij", squares, h, h)
            # Some of the products cancel.
            bound = 1e-9 * float(block.abs().max())
            torch.testing.assert_close(state["fisher_blocks"][0], block, rtol=0, atol=bound)
            return
        if make is KFAC:
            h = F.pad(h, (0, 1), value=1.0)
            bound = 1e-9 * float(state["row_factor"].abs().max())
            torch.testing.assert_close(state["row_factor"][0], len(h) * s.T @ s, rtol=0, atol=bound)
            torch.testing.assert_close(state["column_factor"][0], h.T @ h / len(h), rtol=0, atol=1e-9)
            return
        corrected = state["input_factor"] / state["factor_weight"], state["output_factor"] / state["factor_weight"]
        torch.testing.assert_close(corrected[0][:-1], h.square().mean(0), rtol=1e-9, atol=0)
        torch.testing.assert_close(corrected[1], s.square().mean(0), rtol=1e-9, atol=0)

    @pytest.mark.usefixtures("in_float64")
    def test_a_graph_kept_for_several_backward_passes(self, make):
        """Three times the same backward has the same means as one; sums must not be added into what a graph holds."""
        results = []
        for passes in (1, 3):
            torch.manual_seed(0)
            model = nn.Linear(FEATURES, FEATURES)
            optimizer = make(model)
            loss = model(model(batch()[0])).square().mean()  # two uses in one graph
            for _ in range(passes):
                loss.backward(retain_graph=True)
            optimizer.step()
            state = optimizer.state[model.weight]
            if make is AdaFisher:
                results.append(list(factors(optimizer, model.weight).values()))
            elif make is KFAC:
                results.append([state["row_factor"] / passes**2, state["column_factor"]])
            else:  # the gradient of each of the samples, of which there are three times as many, is three times as long
                results.append([state["fisher_blocks"] / passes**2])
        assert_same(results[1], results[0], rtol=1e-9)

    @pytest.mark.parametrize("with_respect_to", ["inputs", "parameters"])
    def test_autograd_grad_counts_for_nothing(self, make, with_respect_to):
        def run(model, data):
            x = data[0].clone().requires_grad_()
            wanted = [x] if with_respect_to == "inputs" else list(model.parameters())
            grads = torch.autograd.grad(1000 * loss_of(model, (x, data[1])), wanted, create_graph=True)
            assert all(g.requires_grad for g in grads)
            return loss_of(model, data)

        plain, extra = mlp(), mlp()
        assert_same(train(extra, make(extra), run=run), train(plain, make(plain)))

    def test_gradient_penalty_trains(self, make):
        model = mlp()
        optimizer = make(model)
        x, y = batch()
        x.requires_grad_()
        loss = loss_of(model, (x, y))
        (penalty,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + penalty.square().sum()).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        assert updates(optimizer, model[0].weight) > 0

    def test_backward_to_other_leaves_counts_for_nothing(self, make):
        model = mlp()
        optimizer = make(model)
        x, y = batch()
        x.requires_grad_()
        loss_of(model, (x, y)).backward(inputs=[x])
        assert all(site.sums is None for site in optimizer.statistics.sites)
        loss_of(model, (x, y)).backward(inputs=[model[0].weight])
        assert [site.sums is not None for site in optimizer.statistics.sites] == [True, False, False]

    def test_torch_func_transforms_leave_no_trace(self, make):
        def run(model, data):
            parameters = {k: v.detach() for k, v in model.named_parameters()}

            def single(parameters, x, y):
                out = torch.func.functional_call(model, parameters, (x.unsqueeze(0),))
                return F.cross_entropy(out, y.unsqueeze(0))

            per_sample = torch.func.vmap(torch.func.grad(single), in_dims=(None, 0, 0))(parameters, *data)
            assert per_sample["0.weight"].shape[0] == SAMPLES
            torch.func.jacrev(lambda x: model(x))(data[0][:2])
            return loss_of(model, data)

        plain, extra = mlp(), mlp()
        assert_same(train(extra, make(extra), run=run), train(plain, make(plain)))

    def test_functional_call_with_other_parameters_leaves_no_trace(self, make):
        def run(model, data):
            others = {k: (v * 2).detach().requires_grad_() for k, v in model.named_parameters()}
            F.cross_entropy(torch.func.functional_call(model, others, (data[0],)), data[1]).backward()
            return loss_of(model, data)

        plain, extra = mlp(), mlp()
        assert_same(train(extra, make(extra), run=run), train(plain, make(plain)))

    def test_pending_sums_die_with_the_gradients(self, make):
        """Whoever clears them: the next backward finds none."""
        model, other = mlp(), mlp()
        optimizer, plain = make(model), make(other)
        loss_of(model, batch(7)).backward()
        model.zero_grad()  # not the optimizer's
        for net, opt in ((model, optimizer), (other, plain)):
            loss_of(net, batch()).backward()
            opt.step()
        assert_same(snapshot(optimizer), snapshot(plain))

    def test_gradients_that_are_returned_do_not_count_beside_those_that_accumulate(self, make):
        model, other = mlp(), mlp()
        optimizer, plain = make(model), make(other)
        for net in (model, other):
            loss_of(net, batch()).backward()
        torch.autograd.grad(1000 * loss_of(model, batch(7)), list(model.parameters()))
        optimizer.step(), plain.step()
        assert_same(snapshot(optimizer), snapshot(plain))


class TestSeveralBackwardPasses:
    @pytest.mark.usefixtures("in_float64")
    @pytest.mark.parametrize("sequence", ["expand", "reduce"])
    def test_threads_lose_no_rows(self, make, sequence):
        """The second backward begins and ends between a contribution of the first and its gradient."""
        settings = {} if make is AdaFisher else {"sequence": sequence}
        results = []
        for threads in (False, True):
            model = mlp()
            optimizer = make(model, **settings)
            losses = [loss_of(model, batch(t)) for t in range(2)]
            if not threads:
                for loss in losses:
                    loss.backward()
            else:
                waiting, go = threading.Event(), threading.Event()
                first = threading.Thread(target=losses[0].backward)

                def pause(grad, first=first, waiting=waiting, go=go):
                    if threading.current_thread() is first:
                        waiting.set()
                        assert go.wait(60)

                model[3].weight.register_hook(pause)  # runs before the gradient is accumulated
                first.start()
                assert waiting.wait(60)
                losses[1].backward()
                go.set()
                first.join(60)
            optimizer.step()
            results.append(snapshot(optimizer))
        assert_same(results[1], results[0], rtol=1e-9)

    def test_a_backward_that_fails_is_over(self, make):
        """What it contributed ends with the gradient, not with a backward that is waited for in vain."""
        plain, model = mlp(), mlp()
        reference, optimizer = make(plain), make(model)

        def fail(grad):
            raise ArithmeticError

        handle = model[0].weight.register_hook(fail)
        with pytest.raises(ArithmeticError):
            loss_of(model, batch(7)).backward()
        handle.remove()
        for p in model.parameters():
            p.grad = None
        for net, opt in ((plain, reference), (model, optimizer)):
            loss_of(net, batch()).backward()
            opt.step()
        assert_same(snapshot(optimizer), snapshot(reference))


class TestLayersThatComeAndGo:
    def test_a_layer_unused_in_some_steps_keeps_its_factors(self, make):
        model = nn.ModuleList([nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)])
        optimizer = make(model)
        for t, used in enumerate(([0, 1], [0], [0, 1])):
            optimizer.zero_grad()
            before = factors(optimizer, model[1].weight)
            sum(loss_of(model[i], batch(t)) for i in used).backward()
            optimizer.step()
            if used == [0]:
                assert_same(list(factors(optimizer, model[1].weight).values()), list(before.values()))
                assert counted(optimizer, model[1].weight) == 1
        assert counted(optimizer, model[1].weight) == 2

    def test_frozen_backbone_with_a_new_head(self, make):
        model = mlp()
        for p in model[:3].parameters():
            p.requires_grad_(False)
        optimizer = make(model)
        before = [p.clone() for p in model[:3].parameters()]
        train(model, optimizer)
        assert_same([p.detach() for p in model[:3].parameters()], before)
        assert model[0].weight not in optimizer.state
        assert updates(optimizer, model[3].weight) > 0

    def test_requires_grad_toggled_in_mid_training(self, make):
        model = mlp()
        optimizer = make(model)
        for t, trained in enumerate((True, False, True)):
            model[0].requires_grad_(trained)
            optimizer.zero_grad()
            weight, state = model[0].weight.detach().clone(), factors(optimizer, model[0].weight)
            loss_of(model, batch(t)).backward()
            optimizer.step()
            same = torch.equal(weight, model[0].weight)
            assert same is not trained
            if not trained:
                assert_same(list(factors(optimizer, model[0].weight).values()), list(state.values()))

    @pytest.mark.parametrize("held", ["all", "bias only"])
    def test_a_frozen_weight_with_a_trained_bias(self, make, held):
        free, model = mlp(), mlp()
        model[3].weight.requires_grad_(False)
        params = None if held == "all" else [model[3].bias]
        settings = {} if make is AdaFisher else {"kl_clip": None, "max_relative_step": None}
        reference, optimizer = make(free, **settings), make(model, params=params, **settings)
        for net, opt in ((free, reference), (model, optimizer)):
            loss_of(net, batch()).backward()
            opt.step()
        if make is AdaFisher:
            torch.testing.assert_close(model[3].bias, free[3].bias, rtol=0, atol=0)
        elif make is KFAC:  # the last entry of A, and G
            state = reference.state[free[3].weight]
            G, A = state["row_factor"][0].double(), state["column_factor"][0].diagonal().double()
            pi, root = math.sqrt(A.mean() / G.diagonal().mean()), math.sqrt(1e-3)
            damped = (G + root / pi * torch.eye(CLASSES)) * (A[-1] + root * pi)
            moved = 0.1 * torch.linalg.solve(damped, model[3].bias.grad.double())
            # A float32 inverse: its rounding, 6e-8, times the condition number of what is inverted, below 1e3.
            found = (mlp()[3].bias - model[3].bias).double()
            torch.testing.assert_close(found, moved, rtol=0, atol=1e-4 * float(moved.abs().max()))
        else:  # the bias has the last entry of the block to itself
            curvature = reference.state[free[3].weight]["fisher_blocks"][0, -1, -1] + 1e-3
            expected = mlp()[3].bias - 1e-3 * model[3].bias.grad / curvature
            torch.testing.assert_close(model[3].bias, expected, rtol=1e-6, atol=0)
        assert torch.equal(model[3].weight, mlp()[3].weight)

    @pytest.mark.parametrize("held", ["all", "bias only"])
    def test_a_frozen_weight_with_a_trained_bias_goes_on_from_a_checkpoint(self, make, held):
        model = mlp()
        model[3].weight.requires_grad_(False)
        optimizer = make(model, params=None if held == "all" else [model[3].bias])
        train(model, optimizer, steps=2)
        twin = copy.deepcopy(model)
        resumed = make(twin, params=None if held == "all" else [twin[3].bias])
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for net, opt in ((model, optimizer), (twin, resumed)):
            train(net, opt, steps=2)
        assert_same(snapshot(resumed), snapshot(optimizer))


class TestBadNumbers:
    @pytest.mark.parametrize("set_to_none", [True, False])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_skipped_step_leaves_nothing_behind(self, make, bad, set_to_none):
        plain, model = mlp(), mlp()
        reference, optimizer = make(plain), make(model)
        for net, opt in ((plain, reference), (model, optimizer)):
            train(net, opt, steps=2)
            opt.zero_grad()
        (loss_of(model, batch(50)) * bad).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        for net, opt in ((plain, reference), (model, optimizer)):
            loss_of(net, batch(60)).backward()
            opt.step()
        assert_same(snapshot(optimizer), snapshot(reference))

    def test_a_bad_step_that_is_not_skipped_changes_nothing_but_the_count(self, make):
        model = mlp()
        optimizer = make(model)
        train(model, optimizer, steps=2)
        before = snapshot(optimizer)
        optimizer.zero_grad()
        (loss_of(model, batch(50)) * float("nan")).backward()
        optimizer.step()
        steps = [s for s, b in zip(snapshot(optimizer), before, strict=True) if not torch.equal(s, b)]
        assert all(s.dim() == 0 and float(s) == 3 for s in steps), "only the step counts may move"
        metrics = optimizer.metrics()["0.weight"]
        if make is not MBF:
            assert metrics["skipped_elements"] == model[0].weight.numel()
        else:
            assert metrics["skipped_blocks"] == model[0].out_features
        assert metrics["refused_statistics"] == 1

    @pytest.mark.parametrize("unscaled", [False, True])
    def test_grad_scaler(self, make, unscaled):
        """The scaler as an argument; without it the step is told the scale, unless gradients were unscaled before."""
        plain, model = mlp(), mlp()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
        reference, optimizer = make(plain), make(model, grad_scaler=scaler)
        for t in range(4):
            data = batch(t)
            optimizer.zero_grad(), reference.zero_grad()
            overflow = t == 1
            scaler.scale(loss_of(model, data) * (float("inf") if overflow else 1.0)).backward()
            if unscaled:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            if not overflow:
                loss_of(plain, data).backward()
                if unscaled:
                    nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                reference.step()
        # The scale is a power of two, so that scaling is exact.
        assert_same(snapshot(optimizer), snapshot(reference), rtol=1e-7)

    def test_a_scaler_that_the_optimizer_was_not_told_of(self, make):
        """Gradients are unscaled to be clipped: only the caller of the step still knows the scale."""
        results = []
        for told in (True, False):
            model = mlp()
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
            optimizer = make(model, grad_scaler=scaler if told else None)
            for t in range(4):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, batch(t))).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            results.append(snapshot(optimizer))
        assert_same(results[1], results[0], rtol=1e-7)
        optimizer.found_inf = torch.zeros(())  # without a scaler that calls
        with pytest.raises(RuntimeError, match="grad_scaler="):
            optimizer.step()

    def test_a_refresh_that_a_scaler_skips_is_still_due(self, make):
        model = mlp()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = make(model, **every(make, 100), grad_scaler=scaler)
        for overflow in (True, False):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch()) * (float("inf") if overflow else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert updates(optimizer, model[0].weight) > 0

    def test_a_step_that_a_scaler_skips_leaves_nothing_behind(self, make):
        """Neither where the gradients are then set to zero in place, so that the next backward adds to them."""
        plain, model = mlp(), mlp()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        reference, optimizer = make(plain), make(model, grad_scaler=scaler)
        for overflow in (True, False):
            scaler.scale(loss_of(model, batch()) * (float("inf") if overflow else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            if overflow:
                for p in model.parameters():
                    p.grad.zero_()
        loss_of(plain, batch()).backward()
        reference.step()
        assert_same(snapshot(optimizer), snapshot(reference), rtol=1e-7)

    def test_clipping_leaves_the_statistics_alone(self, make):
        plain, model = mlp(), mlp()
        for net in (plain, model):
            optimizer = make(net)
            loss_of(net, batch()).backward()
            if net is model:
                nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            optimizer.step()
            net.factors = factors(optimizer, net[0].weight)
        assert_same(list(model.factors.values()), list(plain.factors.values()))

    @pytest.mark.parametrize("called", [True, False])
    def test_a_hook_on_an_output_changes_the_derivative_that_is_read(self, make, called):
        """As the backward pass goes on with it: the gradient of the weight is that of the clipped one."""

        class Clip(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                return grad.clamp(-1e-3, 1e-3)

        class Net(nn.Module):
            def __init__(self, hooked):
                super().__init__()
                torch.manual_seed(0)
                self.hooked = hooked
                self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

            def forward(self, x):
                h = self.first(x) if called else F.linear(x, self.first.weight, self.first.bias)
                if self.hooked:
                    h.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
                return self.last((h if self.hooked else Clip.apply(h)).tanh())

        hooked, plain = Net(True), Net(False)
        optimizer, reference = make(hooked), make(plain)
        train(hooked, optimizer), train(plain, reference)
        assert float(reference.state[plain.first.weight]["step" if make is AdaFisher else "fisher_updates"]) == 3
        assert_same(snapshot(optimizer), snapshot(reference), rtol=1e-6)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, make, dtype):
        def run(model, data):
            with torch.autocast("cpu", dtype=dtype):
                return loss_of(model, data)

        plain, model = mlp(), mlp()
        reference, optimizer = make(plain), make(model)
        train(plain, reference, steps=1), train(model, optimizer, steps=1, run=run)
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert optimizer.state[q][optimizer.moment].dtype == torch.float32
            for name, factor in factors(optimizer, q).items():
                assert factor.dtype == torch.float32
                # Squares of activations and derivatives that went through 8 bits: a few units of 2 * 2^-8.
                scale = float(reference.state[p][name].abs().max())
                torch.testing.assert_close(factor, reference.state[p][name], rtol=0, atol=0.05 * scale)

    def test_model_that_was_elsewhere_between_two_steps_goes_on(self, make):
        """Moving a parameter gives it another node in the graph; a remembered one would never run again."""
        model, moved = mlp(bias=False), mlp(bias=False)  # the node of a bias would speak for the layer
        optimizer, other = make(model), make(moved)
        train(model, optimizer, 2)
        train(moved, other, 2)
        moved.double().float()
        assert_same(train(moved, other, 2), train(model, optimizer, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.usefixtures("in_float64")
    @pytest.mark.parametrize("interval", [1, 3])
    def test_fullgraph_model_equals_eager(self, make, interval):
        eager, compiled = mlp(), mlp()
        reference, optimizer = (make(net, **every(make, interval)) for net in (eager, compiled))
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        model = torch.compile(compiled, fullgraph=True, backend=backend)
        expected = train(eager, reference, steps=5)
        assert_same(train(model, optimizer, steps=5), expected, rtol=1e-9)
        assert len(graphs) == (1 if interval == 1 else 2), "one graph with statistics, one without, no others"

    @pytest.mark.usefixtures("in_float64")
    @pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler")
    def test_inductor_with_convolution_and_norm(self, make):
        def build():
            torch.manual_seed(0)
            convolution = nn.Conv2d(1, 4, 3, padding=1, stride=2, bias=False)
            return nn.Sequential(
                convolution, nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, CLASSES)
            )

        x, y = torch.randn(SAMPLES, 1, 4, 4), torch.randint(CLASSES, (SAMPLES,))
        results = []
        for compiled in (False, True):
            model = build()
            optimizer = make(model)
            forward = torch.compile(model, fullgraph=True) if compiled else model
            for _ in range(2):
                optimizer.zero_grad()
                F.cross_entropy(forward(x), y).backward()
                optimizer.step()
            results.append(snapshot(optimizer))
        # Inductor fuses and reorders arithmetic.
        assert_same(results[1], results[0], rtol=1e-9)

    def test_intervals_of_groups_make_two_graphs(self, make):
        """One with statistics and one without, whichever layers are due."""
        torch.manual_seed(0)
        layers = [nn.Linear(FEATURES, FEATURES) for _ in range(4)]
        model = nn.Sequential(*layers)
        groups = [{"params": m.parameters(), **every(make, k)} for m, k in zip(layers, (2, 3, 5, 7), strict=True)]
        optimizer = make(model, params=groups)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        twin, other = copy.deepcopy((model, optimizer))
        for t in range(31):
            for net, steps in ((compiled, optimizer), (twin, other)):
                steps.zero_grad()
                net(batch(t)[0]).square().mean().backward()
                steps.step()
        assert counter.frame_count == 2
        assert_same(snapshot(optimizer), snapshot(other), rtol=1e-4)

    @pytest.mark.parametrize("compiles", [False, True])
    def test_heads_that_take_turns_are_all_served(self, make, compiles):
        """Every refresh meets the same head: those without statistics collect them whenever they are used."""

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.body = nn.Linear(FEATURES, 8)
                self.heads = nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(3))

            def forward(self, x, task):
                return self.heads[task](self.body(x))

        model = Net()
        optimizer = make(model, **every(make, 3))
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        for t in range(12 if compiles else 3):
            x, y = batch(t)
            optimizer.zero_grad()
            F.cross_entropy(run(x, t % 3), y).backward()
            optimizer.step()
        assert all(updates(optimizer, head.weight) > 0 for head in model.heads)
        assert not any(row.fallback for row in optimizer.explain())

    def test_model_compiled_before_the_optimizer_warns(self, make):
        model = mlp()
        compiled = torch.compile(model, backend="eager")
        loss_of(compiled, batch()).backward()
        optimizer = make(model)
        model.zero_grad()
        loss_of(compiled, batch()).backward()
        if all(site.sums is None for site in optimizer.statistics.sites):
            with pytest.warns(UserWarning, match="saw no statistics"):
                optimizer.step()
        else:  # this torch notices hooks that come late: then there is nothing to warn of
            optimizer.step()

    def test_a_model_whose_class_was_compiled_before_warns_and_a_reset_helps(self, make):
        def backward_of(model):
            loss_of(torch.compile(model, backend="eager"), batch()).backward()

        class Twin(nn.Sequential):
            """Of a class that nothing else compiles."""

        backward_of(Twin(*mlp()))
        model = Twin(*mlp())
        optimizer = make(model)
        backward_of(model)
        if all(site.sums is None for site in optimizer.statistics.sites):
            with pytest.warns(UserWarning, match=r"another one of its class, compiled.* torch\._dynamo\.reset\(\)"):
                optimizer.step()
        torch._dynamo.reset()
        optimizer.zero_grad()
        backward_of(model)
        assert all(site.sums is not None for site in optimizer.statistics.sites)

    def test_export_ignores_the_hooks(self, make):
        model = mlp()
        optimizer = make(model)
        exported = torch.export.export(model, (batch()[0],))
        assert "fisher_kernels" not in str(exported.graph)
        assert optimizer is not None

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:`torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("trace", [lambda model: torch.jit.trace(model, batch()[0]), torch.fx.symbolic_trace])
    def test_tracing_in_the_middle_of_training_leaves_nothing_behind(self, make, trace):
        plain, model = mlp(), mlp()
        expected = train(plain, make(plain), steps=3)
        optimizer = make(model)
        traced = trace(model)
        x = batch()[0]
        assert torch.equal(traced(x), model(x))
        assert_same(train(model, optimizer, steps=3), expected)
        assert "fisher_kernels" not in str(traced.graph)


def test_gradients_set_by_hand_warn_once(make):
    model = mlp()
    optimizer = make(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="saw no statistics"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_zero_gradients_without_statistics_use_curvature_one(make):
    """What checkpoint tools do to make the state of a fresh optimizer."""
    model = mlp()
    settings = {} if make is AdaFisher else {"kl_clip": None, "max_relative_step": None}
    optimizer = make(model, lr=0.5, **settings, **({"others": "curvature"} if make is KFAC else {}))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert_same([p.detach() for p in model.parameters()], before)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="saw no statistics"):
        optimizer.step()
    moment = 0.1 / (1 - 0.9**2) if make is AdaFisher else 1.0  # the first moment was zero
    assert_same([p.detach() for p in model.parameters()], [b - 0.5 * moment for b in before], rtol=1e-6)


class TestCopies:
    def test_copies_of_copies_collect_no_hooks(self, make):
        model = mlp()
        for _ in range(3):
            optimizer = make(model)
            train(model, optimizer, steps=1)
            model = copy.deepcopy(model)
        model(batch()[0])
        assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in model.modules())

    def test_a_pickled_model_loads_without_this_package(self, tmp_path):
        model = nn.Sequential(nn.Linear(2, 2))
        optimizer = AdaFisher(model)
        torch.save(model, tmp_path / "model.pt")
        code = (
            "import sys, torch; sys.modules['fisher_kernels'] = None\n"
            f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
            "model(torch.ones(1, 2)).sum().backward()"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        other = AdaFisher(loaded)
        assert len(loaded[0]._forward_hooks) == 1, "what came along is dropped"
        loaded(torch.ones(1, 2)).sum().backward()
        other.step()
        assert updates(other, loaded[0].weight) > 0
        assert optimizer.statistics.open

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:`torch.jit:DeprecationWarning")
    def test_scripting(self, make):
        model = mlp()
        optimizer = make(model)
        with pytest.raises(AttributeError, match=r"close\(\) the optimizer first"):
            torch.jit.script(model)
        optimizer.close()
        scripted = torch.jit.script(model)
        with pytest.warns(UserWarning, match="no layer rule"):
            optimizer = make(scripted)
        train(scripted, optimizer, steps=1)
        assert all(row.fallback for row in optimizer.explain())

    def test_deepcopy_of_the_model_is_inert(self, make):
        model = mlp()
        optimizer = make(model)
        twin = copy.deepcopy(model)
        loss_of(twin, batch()).backward()
        assert all(site.sums is None for site in optimizer.statistics.sites)

    def test_averaged_model_is_inert_and_averages(self, make):
        plain, model = mlp(), mlp()
        average = AveragedModel(model)

        def run(net, data):
            average.update_parameters(net)
            average(data[0]).sum()
            return loss_of(net, data)

        optimizer = make(model)
        average = AveragedModel(model)  # now with hooks to copy
        assert_same(train(model, optimizer, run=run), train(plain, make(plain)))

    def test_collection_of_the_optimizer_removes_its_hooks(self, make):
        model = mlp()
        optimizer = make(model)
        assert any(m._forward_hooks for m in model.modules())
        loss = loss_of(model, batch())  # a graph with hooks of its own is alive
        del optimizer
        gc.collect()
        assert not any(m._forward_hooks for m in model.modules())
        loss.backward()

    def test_close_removes_the_hooks_and_the_optimizer_steps_on(self, make):
        model = mlp()
        optimizer = make(model)
        train(model, optimizer)
        state = factors(optimizer, model[0].weight)
        optimizer.close()
        assert not any(m._forward_hooks for m in model.modules())
        with pytest.warns(UserWarning, match="optimizer closed"):
            train(model, optimizer, steps=1)
        assert_same(list(factors(optimizer, model[0].weight).values()), list(state.values()))


def test_hooks_do_nothing_between_refreshes(make, monkeypatch):
    model = mlp()
    optimizer = make(model, **every(make, 3))
    captured = []
    for site in optimizer.statistics.sites:
        original = type(site.rule).capture
        monkeypatch.setattr(
            type(site.rule), "capture", lambda *a, f=original: captured.append(1) or f(*a), raising=True
        )
    counts = []
    for t in range(6):
        captured.clear()
        optimizer.zero_grad()
        loss_of(model, batch(t)).backward()
        optimizer.step()
        counts.append(len(captured))
    assert [c > 0 for c in counts] == [True, False, False, True, False, False]


def _train_a_part(rank, variant):
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(args[0].numel()) or original(*args, **kwargs)
    model = mlp()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = AdaFisher(model, variant=variant, update_interval=2)
    per_step = []
    for t in range(4):
        x, y = batch(t)
        part = slice(rank * SAMPLES // 2, (rank + 1) * SAMPLES // 2)
        optimizer.zero_grad()
        calls.clear()
        loss_of(ddp, (x[part], y[part])).backward()
        optimizer.step()
        per_step.append(len(calls))
    return [t.tolist() for t in snapshot(optimizer)], per_step


@needs_processes
@pytest.mark.parametrize("variant", ["paper", pytest.param("release", marks=pytest.mark.slow)])
def test_data_parallel_equals_one_process(tmp_path, variant):
    model = mlp()
    expected = train(model, optimizer := AdaFisher(model, variant=variant, update_interval=2), steps=4)
    assert optimizer is not None
    work = functools.partial(_train_a_part, variant=variant)
    (first, calls), (second, _) = in_two_processes(work, tmp_path)
    assert first == second, "every rank holds the same bits"
    # A LayerNorm's dimension 1 is known to the data alone, so the release variant asks for its length first.
    assert calls == ([1, 0, 1, 0] if variant == "paper" else [2, 0, 2, 0])
    # DDP averages gradients of halves: sums of 16 terms in another order, divided by F down to the damping.
    assert_same([torch.tensor(t) for t in first], expected, rtol=2e-5)


@pytest.mark.parametrize("kind", [AdaFisher, KFAC])
def test_an_optimizer_may_be_collected_in_the_middle_of_a_forward(kind: Any) -> None:
    """With its hooks, between others of the same layer, and where it looks for functions."""

    def collect(*_: Any) -> None:
        gc.collect()

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    old, ours = kind(model), kind(model)
    old.itself = old  # collected in a cycle alone
    gone = weakref.ref(old)
    gc.disable()
    try:
        del old
        model[0].register_forward_hook(collect, prepend=True)
        model(torch.randn(5, 3)).square().sum().backward()
        assert gone() is None
    finally:
        gc.enable()
    assert _get_current_function_mode() is None
    ours.step()
    assert len(model[0]._forward_hooks) == len(model[1]._forward_hooks) + 1 == 1 + (2 if kind is KFAC else 1)
