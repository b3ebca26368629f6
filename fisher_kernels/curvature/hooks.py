"""Collects the raw sums of layers during forward and backward, and hands them to the optimizer's step.

A forward hook captures what it needs of a layer's input and puts a hook on the layer's output tensor; that one turns
the derivative of the output into raw sums. They count only if the same backward also accumulates the gradient of the
layer's parameters: evaluation passes, ``autograd.grad`` and recomputation under activation checkpointing then count as
they should, not at all or once. Pending sums live and die with ``p.grad``: they are dropped when a backward begins with
``p.grad`` None, by ``zero_grad`` and when the optimizer takes them in ``step()``.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _current_graph_task_id, _will_engine_execute_node
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.graph import get_gradient_edge
from torch.compiler import is_compiling
from torch.nn import Parameter

from fisher_kernels.curvature.rules import R, Rule, Sums, Use
from fisher_kernels.curvature.tap import register, tap
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.ops._arguments import without_autocast


@dataclass(eq=False)
class Layer(Generic[R]):
    """One supported module and those of its parameters that the optimizer holds."""

    name: str
    module: nn.Module
    rule: R
    parameters: dict[str, Parameter]  # role ("weight", "bias") -> parameter

    @property
    def owner(self) -> Parameter:
        """The parameter that keeps the layer's factors in its state and its settings in its group."""
        return next(iter(self.parameters.values()))

    def capture(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[list[Tensor], list[int]] | None:
        """What the forward keeps for its backward; None where that backward cannot count."""
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        trained = False
        for role, p in self.parameters.items():
            if module._parameters.get(role) is not p:  # swapped, as functional_call does
                return None
            trained = trained or p.requires_grad
        if not trained:
            return None
        x = args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            return None
        return self.rule.capture(module, x.detach() if x.requires_grad else x)


@dataclass(eq=False)
class Site(Generic[R]):
    """Adds up the sums of all uses of one weight in one orientation, by one module or by several that share it."""

    owner: Parameter
    rule: R
    layers: list[Layer[R]] = field(default_factory=list)
    sums: Sums | None = None
    uses: list[Use[R]] = field(default_factory=list)  # of the last backward, where they contribute together
    kept: list[tuple[Layer[R], list[int]]] = field(default_factory=list)  # for each: its layer, writes to its tensors
    task: int = -1

    @cached_property
    def module(self) -> nn.Module:
        """The module whose settings are used for the site: one with a bias if there is any."""
        return max(self.layers, key=lambda layer: getattr(layer.module, "bias", None) is not None).module

    def settle(self) -> Sums | None:
        """The pending sums, with what the uses of the last backward make together."""
        if self.uses:
            for use, (layer, versions) in zip(self.uses, self.kept, strict=True):
                if _versions(use.captured) != versions:
                    self.clear()
                    raise _overwritten(layer, "the step")
            sums = self.rule.contribute_together(self.uses)
            self.uses, self.kept = [], []
            self.sums = sums if self.sums is None else self.sums + sums
        return self.sums

    def clear(self) -> None:
        self.sums, self.uses, self.kept, self.task = None, [], [], -1


def find_layers(
    model: nn.Module, rule_for: Callable[[nn.Module, Parameter], R | None], held: Collection[Parameter]
) -> list[Layer[R]]:
    """The modules of a model that a rule serves, with the parameters that the optimizer holds.

    Raises:
        ValueError: an Embedding with ``sparse=True`` is among them: its gradient has no dense counterpart to step with.
    """
    layers = []
    skipped = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        parameters = {
            role: p for role in ("weight", "bias") if (p := module._parameters.get(role)) is not None and p in held
        }
        if not parameters or id(module) in skipped:
            continue
        rule = rule_for(module, next(iter(parameters.values())))
        if rule is None:
            continue
        if getattr(module, "sparse", False):
            which = f"module {name!r}" if name else "the model"
            raise ValueError(
                f"{which} is an Embedding with sparse=True, whose gradient is sparse; construct it with sparse=False, "
                "or leave its weight to torch.optim.SparseAdam (params=)"
            )
        layers.append(Layer(name, module, rule, parameters))
    return layers


_numbers = itertools.count()
_attached = 0
_readers: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Statistics[Any]]] = weakref.WeakKeyDictionary()


def times_attached() -> int:
    """How often anything was attached to the layers of a model."""
    return _attached


class Statistics(Generic[R]):
    """The hooks of one optimizer on the layers of one model, and the sums they have collected.

    Args:
        layers: the modules to watch.
        grad_scaler: its scale is divided out of every derivative as the backward delivers it.
        process_group: over which :meth:`take` adds sums; None takes the default group where there is one.
    """

    def __init__(
        self, layers: Iterable[Layer[R]], grad_scaler: Any = None, process_group: dist.ProcessGroup | None = None
    ) -> None:
        self.grad_scaler = grad_scaler
        self.process_group = process_group
        self.sites: list[Site[R]] = []
        by_key: dict[tuple[Any, ...], Site[R]] = {}
        for layer in layers:
            key = (id(layer.owner), layer.rule.layout)
            if key not in by_key:
                by_key[key] = Site(layer.owner, layer.rule)
                self.sites.append(by_key[key])
            by_key[key].layers.append(layer)
        self._attach()

    def _attach(self) -> None:
        number = next(_numbers)
        register(number, self)
        self._hooks: dict[int, list[_ForwardHook]] = {}
        self._nodes: dict[Parameter, Any] = {}
        handles = []
        for index, site in enumerate(self.sites):
            for use, layer in enumerate(site.layers):
                hook = _ForwardHook(layer, (number, index, use), weakref.ref(self))
                handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
                self._hooks.setdefault(index, []).append(hook)
                _readers.setdefault(layer.module, weakref.WeakSet()).add(self)
        self._detach = weakref.finalize(self, _remove, handles)
        global _attached
        _attached += 1

    @property
    def open(self) -> bool:
        """Whether the hooks are still on the layers."""
        return self._detach.alive

    def other_readers(self) -> list[Statistics[Any]]:
        """Others whose hooks are on some of the same layers."""
        layers = (layer.module for site in self.sites for layer in site.layers)
        found = {id(reader): reader for layer in layers for reader in _readers.get(layer, ())}
        return [reader for reader in found.values() if reader is not self and reader.open]

    def close(self) -> None:
        """Remove the hooks; what is pending is dropped."""
        self._detach()
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "sites": self.sites,
            "grad_scaler": self.grad_scaler,
            "armed": self._armed(),
            "open": self.open,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy watches the copied modules, with hooks of its own: those that came along with the modules are inert.
        self.sites, self.grad_scaler, self.process_group = state["sites"], state["grad_scaler"], None
        self._attach()
        for index, armed in enumerate(state["armed"]):
            self.arm(index, armed)
        if not state["open"]:
            self.close()

    def _armed(self) -> list[bool]:
        return [any(hook.armed for hook in self._hooks[index]) for index in range(len(self.sites))]

    def arm(self, index: int, armed: bool) -> None:
        """Whether the layers of a site collect from now on; outside that their hooks do nothing."""
        for hook in self._hooks[index]:
            if hook.armed != armed:
                hook.armed = armed

    def clear(self) -> None:
        """Drop what is pending."""
        for site in self.sites:
            site.clear()

    def adopt(self, other: Statistics[R]) -> None:
        """Take over what another engine holds pending for the same weights."""
        pending = {(site.owner, site.rule.layout): site for site in other.sites}
        for site in self.sites:
            if (old := pending.get((site.owner, site.rule.layout))) is not None:
                site.sums, site.uses, site.kept, site.task = old.sums, old.uses, old.kept, old.task

    def take(self, grad_scale: Tensor | None = None) -> list[tuple[int, Sums]]:
        """The pending sums of every site that has any, as (index, sums), over all processes; nothing stays pending.

        Args:
            grad_scale: the loss scale that is still in the derivatives, where no ``grad_scaler`` was given.
        """
        taken = {index: sums for index, site in enumerate(self.sites) if (sums := site.settle()) is not None}
        if grad_scale is not None and self.grad_scaler is None:
            for index, sums in taken.items():
                _rescale(sums, self.sites[index].rule, grad_scale)
        self.clear()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            taken = self._reduce(taken)
        return list(taken.items())

    def _reduce(self, taken: dict[int, Sums]) -> dict[int, Sums]:
        """Add the sums of all processes in one flat all-reduce.

        Every process lists every armed site, one that saw nothing as zeros, so that all agree on the layout. Data
        parallel training averages gradients: a derivative of the global mean loss is the local one over the number of
        processes.
        """
        armed = [index for index, on in enumerate(self._armed()) if on]
        if not armed:
            return {}
        world = dist.get_world_size(self.process_group)
        lengths = self._sum_lengths(armed, taken)
        flat = []
        for index in armed:
            site = self.sites[index]
            if index in taken:
                vectors, counts = taken[index].padded(lengths[index]), taken[index].counts
                flat += [v.double() / world**power for v, power in zip(vectors, site.rule.powers, strict=True)]
                flat.append(torch.tensor(counts, dtype=torch.float64, device=vectors[0].device))
            else:
                flat.append(torch.zeros(sum(lengths[index]) + len(lengths[index]), dtype=torch.float64, device="cpu"))
        device = self.sites[armed[0]].owner.device
        total = torch.cat([part.to(device) for part in flat])
        dist.all_reduce(total, group=self.process_group)
        parts = iter(total.split([n for index in armed for n in (*lengths[index], len(lengths[index]))]))
        reduced = {}
        for index in armed:
            owner = self.sites[index].owner
            wide = torch.promote_types(owner.dtype, torch.float32)
            vectors = [next(parts).to(owner.device, wide) for _ in lengths[index]]
            counts = next(parts).tolist()
            if any(counts):
                reduced[index] = Sums(vectors, counts)
        return reduced

    def _sum_lengths(self, armed: Sequence[int], taken: dict[int, Sums]) -> dict[int, list[int]]:
        """Lengths of the raw sums of each site, also of those that this process did not use."""
        lengths = {index: self.sites[index].rule.sum_lengths(self.sites[index].module) for index in armed}
        unknown = [index for index in armed if None in lengths[index]]
        if unknown:  # a length that only the data tell: whoever has seen them says
            seen = [taken[i].vectors[lengths[i].index(None)].numel() if i in taken else 0 for i in unknown]
            longest = torch.tensor(seen, dtype=torch.int64, device=self.sites[armed[0]].owner.device)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.process_group)
            for index, length in zip(unknown, longest.tolist(), strict=True):
                lengths[index] = [length if n is None else n for n in lengths[index]]
        return {index: [n for n in ns if n is not None] for index, ns in lengths.items()}

    @without_autocast  # on where the backward pass runs within it
    def commit(self, index: int, use: int, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> None:
        """Add the sums of one backward of one layer, if that backward also accumulates its gradients."""
        site = self.sites[index]
        layer = site.layers[use]
        for p in layer.parameters.values():
            if p.requires_grad and self._accumulates(p):
                break
        else:
            return
        task = _current_graph_task_id()
        if site.task != task:
            anchor = site.owner if site.owner.requires_grad else p
            if anchor.grad is None:
                site.clear()
            site.settle()
            site.task = task
        grad = grad.detach() if grad.requires_grad else grad
        scale = None
        if self.grad_scaler is not None and self.grad_scaler.is_enabled():
            scale = self.grad_scaler._get_scale_async()  # on the device, where get_scale() would wait for it
        if layer.rule.together:
            grad = grad if scale is None else grad.to(ACCUMULATOR[grad.dtype]) / scale.to(grad.device)
            site.uses.append(Use(layer.module, layer.rule, captured, sizes, grad))
            site.kept.append((layer, _versions(captured)))
            return
        sums = layer.rule.contribute(layer.module, captured, sizes, grad)
        if scale is not None:  # None before the first scale()
            _rescale(sums, layer.rule, scale)
        site.sums = sums if site.sums is None else site.sums + sums

    def _accumulates(self, parameter: Parameter) -> bool:
        """Whether the backward that is running will add to ``parameter.grad``."""
        node = self._nodes.get(parameter)
        if node is not None and _executes(node):
            return True
        # Not known yet, or replaced because the parameter was moved. Not kept on a GPU, where it remembers a stream.
        current = get_gradient_edge(parameter).node
        if current is node:
            return False
        if parameter.is_cpu:
            self._nodes[parameter] = current
        return _executes(current)


def _executes(node: Any) -> bool:
    """Whether the backward that is running will execute a node that accumulates a gradient."""
    try:
        return _will_engine_execute_node(node)
    except RuntimeError:
        return False  # autograd.grad with respect to the parameter itself: it returns gradients, it accumulates none


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor has been written to. A rule that keeps an input needs it unchanged until it is read."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _overwritten(layer: Layer[Any], until: str) -> RuntimeError:
    # Autograd tells in most cases, but it keeps a copy of its own under autocast and of an input that is padded.
    return RuntimeError(
        f"the input of module {layer.name!r} was modified in place before {until}, where its statistics need it as it "
        "was: modify a copy"
    )


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _rescale(sums: Sums, rule: Rule, scale: Tensor) -> None:
    """Divide the scale of the loss out of raw sums."""
    for vector, power in zip(sums.vectors, rule.powers, strict=True):
        if power:
            # Twice by the scale, not once by its square, which may overflow.
            for _ in range(power):
                vector.div_(scale.to(vector.device))


class _ForwardHook:
    """The forward hook of one layer. Copies and pickles of it, which come with copies of the model, do nothing.

    It refers to the engine weakly, because the model must not keep the optimizer's statistics alive.
    """

    def __init__(
        self,
        layer: Layer[Any] | None = None,
        address: tuple[int, int, int] = (-1, -1, -1),
        engine: Callable[[], Statistics[Any] | None] = lambda: None,
    ) -> None:
        self.layer = layer
        self.address = address
        self.engine = engine
        self.armed = False
        self.token = torch.zeros(1, dtype=torch.float32, device="cpu")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_ForwardHook, ())

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.armed or self.layer is None:
            return None
        compiling = is_compiling()
        # The flag itself: to the compiler of torch 2.11 is_exporting() is always true.
        if compiling and torch.compiler._is_exporting_flag:
            return None
        if not compiling and peek_interpreter_stack() is not None:
            return None
        kept = self.layer.capture(module, args, kwargs, output)
        if kept is None:
            return None
        # What is as large as an input is kept as autograd keeps its own: checkpointing then recomputes it.
        if compiling or (self.layer.rule.keeps_input and _top_saved_tensors_default_hooks(True) is not None):
            captured, sizes = kept
            return tap(output, captured, self.token, [*self.address, *sizes])
        output.register_hook(_OutputHook(self.engine, self.address, *kept))
        return None


class _OutputHook:
    """The hook on one output of one layer. The autograd graph keeps it alive, so it refers to the engine weakly."""

    def __init__(
        self,
        engine: Callable[[], Statistics[Any] | None],
        address: tuple[int, int, int],
        captured: list[Tensor],
        sizes: list[int],
    ) -> None:
        self.engine, self.address, self.captured, self.sizes = engine, address, captured, sizes
        self.versions = _versions(captured)

    def __call__(self, grad: Tensor) -> None:
        engine = self.engine()
        if engine is not None:
            _, index, use = self.address
            if _versions(self.captured) != self.versions:
                raise _overwritten(engine.sites[index].layers[use], "its backward")
            engine.commit(index, use, self.captured, self.sizes, grad)
