"""Collects the raw sums of layers during forward and backward, and hands them to the optimizer's step.

Hooks hand over the derivative of each layer's output (``curvature/hooks.py``). The sums that its rule makes of it count
only if the same backward also accumulates the gradient of the layer's parameters: evaluation passes, ``autograd.grad``
and recomputation under activation checkpointing then count as they should, not at all or once. Pending sums live and
die with ``p.grad``: they are dropped when a backward begins with ``p.grad`` None, by ``zero_grad`` and when the
optimizer takes them in ``step()``.

A layer is read only as long as it computes what its class documents (``curvature/proof.py``).
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _current_graph_task_id, _will_engine_execute_node
from torch.autograd import Variable
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import get_gradient_edge
from torch.compiler import is_compiling
from torch.nn import Parameter

from fisher_kernels.curvature.broadcast import Broadcast, may_be_broadcast
from fisher_kernels.curvature.functions import Call, Watch, Watches
from fisher_kernels.curvature.gathered import all_of, is_distributed
from fisher_kernels.curvature.hooks import ForwardHook, ModelHook, OutputHook, ShowHook, StackHook, drop_copies, remove
from fisher_kernels.curvature.operations import MATRICES
from fisher_kernels.curvature.pipeline import Pipeline
from fisher_kernels.curvature.processes import Processes
from fisher_kernels.curvature.proof import Proof, settle
from fisher_kernels.curvature.reduction import Reduction, Share, Verdict, heard_of, said_of
from fisher_kernels.curvature.rounds import Round, Rounds, key_of
from fisher_kernels.curvature.rules import R, Sums, Use
from fisher_kernels.curvature.scattered import Division, flag, flagged, scatter
from fisher_kernels.curvature.sites import Kept, Layer, Site, rescale, versions_of
from fisher_kernels.curvature.tap import register
from fisher_kernels.ops import ACCUMULATOR
from fisher_kernels.ops._arguments import without_autocast

APART = 1e-3
"""By how much, relative to their mean, sums may differ among processes that should have the same: by rounding."""

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
        process_group: over which :meth:`take` adds sums; None takes that of the DistributedDataParallel which averages
            the gradients, once a forward has been within it.

    Attributes:
        processes: over which sums are added up.
        pipeline: of which the model is a stage, as forwards show.
        refresh: number of the refresh that is being collected, from 1.
        armed: indices of the sites that collect.
        waiting: of those among them that have no statistics yet, outside a refresh.
        awake: whether layers of a compiled model send anything.
        sampled: whether only the derivatives that :meth:`sampling` covers count.
        late: indices of sites that may have been added after the forward whose statistics are taken next.
        found: sites of functions on parameters that no site was known for; their one layer has the ``spec``.
        obstacles: parameter -> why functions on it give no statistics.
        parts: those of them that a layer serves all the same.
        divisions: site and position of a raw sum -> how its rows are divided; :meth:`take` returns the own ones.
        rounds: statistics that later refreshes take.
        undecided: proofs of layers of which not all processes know yet what the last step has found.
        unused: indices of sites that are known since the last step to lack statistics of a refresh before.
        awaits: whether the last step has statistics that come later, and had none from before.
    """

    def __init__(
        self, layers: Iterable[Layer[R]], grad_scaler: Any = None, process_group: dist.ProcessGroup | None = None
    ) -> None:
        self.grad_scaler = grad_scaler
        self.processes = Processes(process_group)
        self.pipeline = Pipeline()
        self.sampled = False
        self.refresh = 1
        self.found: list[Site[R]] = []
        self.obstacles: dict[Parameter, str] = {}
        self.parts: set[Parameter] = set()
        self.rounds: Rounds[R] = Rounds()
        self.sites: list[Site[R]] = []
        by_key: dict[tuple[Any, ...], Site[R]] = {}
        for layer in layers:
            key = (id(layer.owner), layer.rule.layout)
            if key not in by_key:
                by_key[key] = Site(layer.owner, layer.rule)
                self.sites.append(by_key[key])
            by_key[key].layers.append(layer)
            by_key[key].by_function |= layer.spec is not None
        self._attach()

    def _attach(self) -> None:
        number = next(_numbers)
        register(number, self)
        self._lock = threading.RLock()  # backward passes may run in several threads
        self._running: weakref.WeakValueDictionary[int, _Running] = weakref.WeakValueDictionary()
        self._hooks: dict[int, list[ForwardHook]] = {}
        self._nodes: dict[Parameter, Any] = {}
        self._gathered: dict[Parameter, Any] = {}  # what forwards had in the place of DTensors
        self.armed: frozenset[int] = frozenset()
        self.waiting: frozenset[int] = frozenset()
        self.awake = False
        self.late: set[int] = set()
        self._homes: list[tuple[dict[str, Any], str, Any]] = []  # where modules have DTensors
        self._broadcasts: list[Broadcast] = []
        self.divisions: Mapping[tuple[int, int], Division] = {}
        self._sampling = False
        self.undecided: Collection[Proof] = ()
        self.unused: set[int] = set()
        self.awaits = False
        handles = []
        self._watches: Watches | None = None
        self._shows = False
        for index, site in enumerate(self.sites):
            for use, layer in enumerate(site.layers):
                if layer.spec is not None:
                    continue
                drop_copies(layer.module)
                hook = ForwardHook(layer, (number, index, use), weakref.ref(self))
                # First of all hooks: those of others may change the output, which is no doing of the layer.
                handles.append(layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
                self._hooks.setdefault(index, []).append(hook)
                _readers.setdefault(layer.module, weakref.WeakSet()).add(self)
        self._handles = handles
        self._detach = weakref.finalize(self, remove, handles)
        global _attached
        _attached += 1

    def watch_functions(
        self,
        model: nn.Module,
        rule_for: Callable[[nn.Module, Parameter], R | None],
        held: Collection[Parameter],
        leaves_out: Callable[[nn.Module], bool] = lambda operation: False,
    ) -> None:
        """Take statistics of functions that forwards of a model apply to parameters as well.

        Args:
            rule_for: (operation, parameter) -> rule.
            held: the parameters of the optimizer.
            leaves_out: whether an operation without a rule is one of several uses of its weight, of which another has.
        """
        self._model, self._rule_for, self._held = weakref.ref(model), rule_for, held
        self._leaves_out = leaves_out
        modules = (module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule))
        places = ((module._parameters, name, p) for module in modules for name, p in module._parameters.items())
        self._homes = [(there, name, p) for there, name, p in places if is_distributed(p) and p in held]
        # A scripted model runs as a whole, and takes no hook of this kind.
        if self._watches is None and self.open and not isinstance(model, torch.jit.ScriptModule):
            self._watches = Watches(_Weakly(self))
            # With its hooks goes what would end a watch, if that is in the middle of a forward.
            weakref.finalize(self, self._watches.abandon).atexit = False
            drop_copies(model)
            hook = ModelHook(self._watches)
            self._handles.append(model.register_forward_pre_hook(hook))
            self._handles.append(model.register_forward_hook(ModelHook(self._watches, ends=True), always_call=True))

    def show_outputs(self, shows: Iterable[tuple[nn.Module, Callable[[Any], None]]]) -> None:
        """Hand what modules make in forwards to functions, as long as the hooks are there."""
        if self.open and not self._shows:
            self._shows = True
            for module, show in shows:
                drop_copies(module)
                # Before a hook makes a part of what a layer of tensor parallel training has made.
                first = getattr(module, "_distribute_module_applied", False)
                self._handles.append(module.register_forward_hook(ShowHook(show), prepend=first))

    @property
    def looks(self) -> bool:
        """Whether this refresh looks for functions on parameters that none was seen on before."""
        return self.refresh & (self.refresh - 1) == 0

    def _wanted(self) -> set[Parameter]:
        """The parameters whose functions are to be seen in a forward that begins."""
        self.processes.note(self._held)
        self.pipeline.note()
        if self.pipeline.is_trial:
            return set()
        collecting = [self.sites[index] for index in self.armed]
        if not self.looks or not self.awake:
            collecting = [site for site in collecting if site.needs_functions]
        wanted = {p for site in collecting for layer in site.layers for p in layer.parameters.values()}
        if self.looks and self.awake:
            known = {p for layer in self.layers() for p in layer.parameters.values()}
            wanted |= {p for p in self._held if p not in known and p.requires_grad}
        wanted -= self.obstacles.keys()
        model = self._model() if wanted else None
        return set() if model is None or any(map(_is_compiled, model.modules())) else wanted

    def _receive(self, watch: Watch) -> None:
        """Take the calls of functions of a forward that has passed."""
        for call in watch.calls:
            if not call.unchanged():
                watch.others.setdefault(call.weight, "a change of its input in place")
        for call in watch.calls:
            weight = call.weight
            if weight not in watch.others:
                try:
                    self._take_call(call, watch.others)
                except Exception as error:
                    proof = Proof()
                    proof.fail(error)
                    self.obstacles[weight] = proof.reason or ""
            elif weight not in self.obstacles:
                self.obstacles[weight] = f"functions apply it, of which {watch.others[weight]} has no rule"
        served = {p for layer in self.layers() for p in layer.parameters.values()}
        for p, name in watch.others.items():
            if p not in served:
                self.obstacles.setdefault(p, f"functions apply it, of which {name} has no rule")
        for p, name, node in watch.strays:
            if p in served and p in watch.claimed:
                node.register_prehook(_Stray(weakref.ref(self), p, name))
        for layer in self.layers():
            if any(p in self.obstacles for p in layer.parameters.values()):
                layer.proof.inner = False

    def held_as(self, present: Tensor) -> Parameter | None:
        """The DTensor in the place of which a module has a whole parameter now."""
        for parameters, name, p in self._homes:
            if parameters.get(name) is present:
                self._gathered[p] = present
                return p
        return None

    def _take_call(self, call: Call, others: Collection[Parameter]) -> None:
        weight = call.weight
        if is_distributed(weight) and weight.dim() > 2 and call.spec.name in MATRICES:
            self.obstacles.setdefault(weight, "a stack of matrices that is divided among processes")
            return
        if is_distributed(call.present) and not call.is_whole:
            self.obstacles.setdefault(weight, "a part of a weight that is divided among processes")
            return
        whole = call.whole
        rule = self._rule_for(whole, weight)
        if rule is None and self._leaves_out(whole):
            return
        if rule is None or not (call.is_whole or rule.takes_parts) or (rule.of_samples and not call.by_sample):
            self.obstacles.setdefault(weight, f"functions apply it in a way that has no rule ({call.spec.name})")
            return
        site = next((s for s in (*self.sites, *self.found) if s.owner is weight and s.rule.layout == rule.layout), None)
        is_new = site is None
        if site is None:
            bias = {} if call.bias is None else {"bias": call.bias}
            layer = Layer("", whole, whole, rule, {"weight": weight, **bias}, spec=call.spec)
            site = Site(weight, rule, [layer])
        biases = [p for layer in site.layers if (p := layer.parameters.get("bias")) is not None and p in others]
        if call.bias is None and any(rule.sees_bias or p not in call.added for p in biases):
            self.obstacles.setdefault(weight, "another function takes its bias")
            return
        name, parameters = site.layers[0].name, site.layers[0].parameters
        hooks = []
        for operation, start, x in call.pieces():
            use = Layer(name, whole, operation, rule, parameters, start=start)
            hooks.append(OutputHook(weakref.ref(self), site, use, *rule.capture(operation, all_of(x))))
            hooks[-1].broadcast = call.broadcast if rule.reads_tokens else None
            if rule.keeps_input:
                call.node.register_hook(hooks[-1].release)
        if is_new:  # not before, as what has raised cannot be served
            self.found.append(site)
        site.by_function = True
        for layer in site.layers:
            layer.proof.inner = True
        call.hook.use = hooks[0] if call.split is None else StackHook(hooks, call)

    def note_part(self, p: Parameter, name: str) -> None:
        """Note that a function without a rule is part of the gradient of a parameter that a layer serves."""
        if self.accumulates(p):
            self.obstacles.setdefault(p, f"functions apply it, of which {name} has no rule")
            self.parts.add(p)

    def agree(self, found: dict[str, Any], due: bool) -> dict[str, Any]:
        """What any process has found; all ask in the refreshes that look, and wait for one until then.

        Args:
            due: whether this step refreshes any statistics, which is the same everywhere.
        """
        if self.processes.count <= 1:
            return found
        if not (self.looks and due):
            return {}
        everywhere: list[Any] = [None] * self.processes.count
        dist.all_gather_object(everywhere, found, group=self.processes.group)
        return dict(sorted({name: spec for one in everywhere for name, spec in one.items()}.items()))

    def claim(self, layer: Layer[R], inputs: Iterable[Any], output: Tensor) -> bool:
        """Leave to a layer what functions did in its forward, unless it does more than they did; whether it is."""
        watch = None if self._watches is None else self._watches.current()
        weights, overridden = layer.parameters.values(), layer.proof.overridden
        claimed = False if watch is None else watch.claim(weights, inputs, output, overridden)
        if claimed is None:
            layer.proof.object("something else comes between its own operation and its output")
        layer.proof.inner = layer.proof.inner or claimed is not False
        return layer.proof.reason is None

    @property
    def open(self) -> bool:
        """Whether the hooks are still on the layers."""
        return self._detach.alive

    def other_readers(self) -> list[Statistics[Any]]:
        """Others whose hooks are on some of the same layers."""
        found = {id(reader): reader for layer in self.layers() for reader in _readers.get(layer.module, ())}
        return [reader for reader in found.values() if reader is not self and reader.open]

    def close(self) -> None:
        """Remove the hooks; what is pending is dropped."""
        self._detach()
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "sites": self.sites,
            "grad_scaler": self.grad_scaler,
            "armed": (self.armed - self.waiting, self.waiting, self.awake),
            "open": self.open,
            "refresh": self.refresh,
            "obstacles": self.obstacles,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy watches the copied modules, with hooks of its own: those that came along with the modules are inert.
        self.sites, self.grad_scaler, self.processes = state["sites"], state["grad_scaler"], Processes()
        self.pipeline, self.sampled = Pipeline(), False
        self.refresh, self.obstacles, self.found = state.get("refresh", 1), state.get("obstacles", {}), []
        self.parts, self.rounds = set(), Rounds()
        self._attach()
        self.arm(*state["armed"])
        if not state["open"]:
            self.close()

    def arm(self, due: Iterable[int], waiting: Iterable[int] = (), awake: bool = True) -> None:
        """Let the layers of some sites collect from now on, and the hooks of all others do nothing.

        Args:
            due: indices of the sites whose statistics are to be refreshed.
            waiting: of those that have none yet, and may not be used.
            awake: whether layers of a compiled model send anything; what those send that do not collect is not added.
                All look at this one flag, so that there are two graphs, not one for every combination of layers.
        """
        self.waiting, self.awake = frozenset(waiting), awake
        self.armed = self.waiting.union(due)
        for index, hooks in self._hooks.items():
            armed = index in self.armed
            for hook in hooks:
                if hook.armed != armed:
                    hook.armed = armed
                if hook.awake != awake:
                    hook.awake = awake

    def clear(self) -> None:
        """Drop what is pending."""
        if self._watches is not None and not is_compiling():
            self._watches.abandon()
        with self._lock:
            self._broadcasts = []
            for site in (*self.sites, *self.found):
                if not site.is_empty:
                    site.clear()

    def layers(self) -> Iterator[Layer[R]]:
        """The layers of all sites."""
        return itertools.chain.from_iterable(site.layers for site in self.sites)

    def adopt(self, other: Statistics[R]) -> None:
        """Take over what another engine holds pending for the same weights, and what it knows of their layers."""
        self.refresh, self.pipeline = other.refresh, other.pipeline
        if self.processes.given is other.processes.given:
            self.processes = other.processes
        proofs = {layer.module: layer.proof for layer in other.layers()}
        taken_for = {layer.module: (layer.operation, layer.candidates) for layer in other.layers()}
        for layer in self.layers():
            layer.proof = proofs.get(layer.module, layer.proof)
            layer.operation, layer.candidates = taken_for.get(layer.module, (layer.operation, layer.candidates))
        self.obstacles, self.parts, self.rounds = other.obstacles, other.parts, other.rounds
        pending = {(site.owner, site.rule.layout): site for site in (*other.sites, *other.found)}
        self.late = set(range(len(self.sites)))
        for index, site in enumerate(self.sites):
            if (old := pending.get((site.owner, site.rule.layout))) is not None:
                self.late.discard(index)
                site.sums, site.uses, site.tasks, site.by_function = old.sums, old.uses, old.tasks, old.by_function

    def keep_pending(self) -> Callable[[Statistics[R]], None]:
        """Keep what is pending, and which refresh it is of.

        Returns:
            What puts it back into an engine of the same layers.
        """
        refresh, found, obstacles, parts = self.refresh, list(self.found), dict(self.obstacles), set(self.parts)
        with self._lock:
            pending = {key_of(site): site.pending() for site in self.sites if not site.is_empty}
            of_found = [site.pending() for site in found]

        def put_back(engine: Statistics[R]) -> None:
            engine.refresh, engine.found, engine.obstacles, engine.parts = refresh, found, obstacles, parts
            for site, kept in zip(found, of_found, strict=True):
                site.put_back(kept)
            for site in engine.sites:
                if (mine := pending.get(key_of(site))) is not None:
                    site.put_back(mine)

        return put_back

    def take(
        self, grad_scale: Tensor | None = None, later: Collection[int] | None = None, lacking: Collection[int] = ()
    ) -> list[tuple[int, Sums]]:
        """The pending sums of every site that has any, as (index, sums), over all processes; nothing stays pending.

        Those of a layer that turns out not to compute what its class documents, in whatever process, are left out.

        Args:
            grad_scale: the loss scale that is still in the derivatives, where no ``grad_scaler`` was given.
            later: sites whose sums the refresh after this one takes. Of sites that collect, this one then takes what
                the one before has left. None takes all sums there are now, and nothing else.
            lacking: sites among them that were not used here, and have a gradient.

        Raises:
            RuntimeError: sums of a refresh before did not arrive.
        """
        # What those bring that were found out before comes from the functions in them.
        proofs = self._proofs()
        before = {proof for proof in proofs if proof.reason}
        settle(proofs)
        with self._lock:
            pending = ((index, site) for index, site in enumerate(self.sites) if not site.is_empty)
            taken = {index: sums for index, site in pending if (sums := self._settled(site)) is not None}
            self.clear()
        for index, sums in taken.items():
            self.sites[index].rule.complete(sums, self.sites[index].module)
        if grad_scale is not None and self.grad_scaler is None:
            for index, sums in taken.items():
                rescale(sums, self.sites[index].rule, grad_scale)
        self.undecided, self.unused, self.awaits = (), set(), False
        spoilt = {proof for proof in proofs if proof.reason and not (proof.inner and proof in before)}
        arrived: dict[int, Sums] = {}
        if later is not None and (later or self.rounds):
            arrived = self._exchange(taken, sorted(later), spoilt, lacking)
            taken = {index: sums for index, sums in taken.items() if index not in later}
        if self.processes.count > 1:
            taken, spoilt = self._reduce(taken, later or (), spoilt)
        kept = taken
        if spoilt:
            kept = {i: s for i, s in taken.items() if spoilt.isdisjoint(la.proof for la in self.sites[i].layers)}
        self.refresh += bool(taken or arrived)
        # Where a setting has just changed there are both: what is newer is taken.
        return list({**arrived, **kept}.items())

    def _exchange(
        self, taken: dict[int, Sums], later: Sequence[int], spoilt: Collection[Proof], lacking: Collection[int]
    ) -> dict[int, Sums]:
        """Send the sums of some sites on their way, and take those that were sent in the refresh before.

        What processes find of layers is on its way with them, as all must do the same with a layer in the same step.
        """
        new: Round[R] | None = None
        if later:
            sites = [self.sites[index] for index in later]
            lengths = [[n or 0 for n in site.rule.sum_lengths(site.module)] for site in sites]
            shares = [Share(site, ns, taken.get(i)) for i, site, ns in zip(later, sites, lengths, strict=True)]
            averaged = 1 if self.sampled else self.processes.count
            lacks = [index in lacking for index in later]
            new = Round(shares, self._proofs(), spoilt, lacks, self.processes, averaged)
        places = {key_of(site): index for index, site in enumerate(self.sites)}
        due = {key for key, index in places.items() if index in self.armed and index not in self.waiting}
        arrival = self.rounds.arrive(due, places.keys())
        if new is not None:
            self.rounds.add(new)
        self._judge(arrival.verdicts)
        self.undecided = set(self._proofs()) - {verdict.proof for verdict in arrival.verdicts if verdict.misfit}
        if self.processes.count == 1 and self.armed.difference(later) - self._idle(taken):
            self.undecided = ()  # as in several, where what is added up at once says it of all
        self.unused = {places[key] for key in arrival.unused}
        self.awaits = bool(later) and not arrival.before
        return {places[key]: sums for key, sums in arrival.sums.items()}

    def _judge(self, verdicts: Iterable[Verdict]) -> None:
        """Take over what processes have found of layers together."""
        for verdict in verdicts:
            proof = verdict.proof
            if verdict.misfit:
                proof.inner, proof.failed = verdict.inner, verdict.failed
                proof.reason = proof.reason or "another process found that its output is not what its class computes"

    def differing(self, taken: Iterable[tuple[int, Sums]]) -> list[Site[R]]:
        """Sites of which the processes that divide layers with this one have other sums, though all should be equal."""
        figures = torch.zeros(len(self.sites), dtype=torch.float64, device=self.sites[0].owner.device)
        for index, sums in taken:
            figures[index] = torch.stack([v.double().abs().sum() for v in sums.vectors]).sum()
        mean = self.processes.over_partners(figures)
        off = (figures - mean).abs() > APART * mean
        return [site for site, is_off in zip(self.sites, off.tolist(), strict=True) if is_off]

    def _settled(self, site: Site[R]) -> Sums | None:
        """What is pending of a site; its layers fall back if that raises."""
        try:
            return site.settle()
        except Exception as error:
            for layer in site.layers:
                layer.proof.fail(error)
            return None

    def _reduce(
        self, taken: dict[int, Sums], later: Collection[int], spoilt: set[Proof]
    ) -> tuple[dict[int, Sums], set[Proof]]:
        """Add the sums of all processes in one flat all-reduce, but for sites whose sums come later.

        Returned besides are the layers whose sums are wrong in any process.

        Every process lists the same sites, one that saw nothing without a use, so that all agree on the layout, and
        which layers it found not to be what their class documents, so that all agree on which are served.
        """
        armed = sorted(self.armed.difference(later) - self._idle(taken))
        if not armed:
            return {}, spoilt
        # Drawn labels are those of a sum over the terms of all processes, which nothing averages.
        averaged = 1 if self.sampled else self.processes.count
        lengths = self._sum_lengths(armed, taken)
        own = self._scatter(armed, taken, lengths, averaged)
        shares = [Share(self.sites[index], lengths[index], taken.get(index)) for index in armed]
        proofs = self._proofs()
        found, flags = Reduction(shares, said_of(proofs, spoilt), self.processes, averaged).add_up()
        verdicts = heard_of(proofs, flags)
        self._judge(verdicts)
        self.undecided = ()
        sums = {index: sums for index, sums in zip(armed, found, strict=True) if any(sums.counts)}
        for (index, position), rows in own.items():
            if index in sums:
                vectors = list(sums[index].vectors)
                vectors[position] = flagged(rows, vectors[position])
                sums[index] = Sums(vectors, sums[index].counts)
        return sums, {verdict.proof for verdict in verdicts if verdict.spoilt}

    def _proofs(self) -> list[Proof]:
        return [layer.proof for layer in self.layers()]

    def _scatter(
        self, armed: Sequence[int], taken: dict[int, Sums], lengths: dict[int, list[int]], world: int
    ) -> dict[tuple[int, int], Tensor]:
        """The own rows of the sums that are divided; a flag takes the place of each, whether these are finite."""
        found = {key: division for key, division in self.divisions.items() if key[0] in armed}
        mine = {}
        for index, position in found:
            site = self.sites[index]
            if index not in taken:
                taken[index] = Sums(site.rule.without_use(lengths[index]), [0] * len(lengths[index]))
            wide = torch.promote_types(site.owner.dtype, torch.float32)
            vector = taken[index].vectors[position].to(site.owner.device, wide)
            mine[index, position] = vector / world ** site.rule.powers[position]
        own = scatter(mine, found)
        for (index, position), rows in own.items():
            vectors = list(taken[index].vectors)
            vectors[position] = flag(rows)
            taken[index] = Sums(vectors, taken[index].counts)
            lengths[index][position] = 1
        return own

    def _idle(self, taken: Collection[int]) -> set[int]:
        """The waiting sites that no process used, as most steps find: one number of each is sent for that."""
        waiting = sorted(self.waiting)
        if not waiting:
            return set()
        used = [i in taken or any(layer.proof.reason for layer in self.sites[i].layers) for i in waiting]
        if self.processes.count > 1:
            flags = torch.tensor(used, dtype=torch.int32, device=self.sites[waiting[0]].owner.device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.processes.group)
            used = flags.tolist()
        return {index for index, flag in zip(waiting, used, strict=True) if not flag}

    def _sum_lengths(self, armed: Sequence[int], taken: dict[int, Sums]) -> dict[int, list[int]]:
        """Lengths of the raw sums of each site, also of those that this process did not use."""
        lengths = {index: self.sites[index].rule.sum_lengths(self.sites[index].module) for index in armed}
        unknown = [index for index in armed if None in lengths[index]]
        if unknown:  # a length that only the data tell: whoever has seen them says
            seen = [taken[i].vectors[lengths[i].index(None)].numel() if i in taken else 0 for i in unknown]
            longest = torch.tensor(seen, dtype=torch.int64, device=self.sites[armed[0]].owner.device)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.processes.group)
            for index, length in zip(unknown, longest.tolist(), strict=True):
                lengths[index] = [length if n is None else n for n in lengths[index]]
        return {index: [n for n in ns if n is not None] for index, ns in lengths.items()}

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Let the derivatives of backward passes within count, though they accumulate no gradients."""
        self._sampling = True
        # The backward of a compiled model writes to its tokens, which have no content. The loss goes through it again.
        tokens = tuple(hook.token for hooks in self._hooks.values() for hook in hooks)
        try:
            with _unsafe_preserve_version_counter(tokens):
                yield
        finally:
            self._sampling = False

    def look(self, index: int, use: int, x: Tensor, output: Tensor) -> bool:
        """Whether nothing speaks against a layer, which is compared with what its class computes if that is due."""
        layer = self.sites[index].layers[use]
        self.processes.note(self._held)
        self.pipeline.note()
        if self.pipeline.is_trial:
            return False
        try:
            return layer.holds(x, output, self.refresh)
        except Exception as error:
            layer.proof.fail(error)
            return False

    def note_gathered(self, layer: Layer[R], module: nn.Module) -> None:
        """Remember the whole parameters that a layer has in its forward: the backward accumulates their gradients."""
        for role, p in layer.parameters.items():
            if is_distributed(p) and (found := module._parameters.get(layer.places.get(role, role))) is not p:
                self._gathered[p] = found

    def present(self, p: Any) -> Any:
        """What the forward had in the place of a parameter, which is in its graph."""
        return self._gathered.get(p, p) if self._gathered else p

    def expect_rows(self, x: Tensor, output: Tensor) -> Broadcast:
        """Look from now on for what broadcasts the output of a layer."""
        found = Broadcast(all_of(x), output)
        self._broadcasts.append(found)
        return found

    def look_behind(self, x: Any) -> None:
        """Look for it behind the input of a layer."""
        if self._broadcasts and isinstance(x, Tensor) and x.grad_fn is not None:
            self._broadcasts = [waiting for waiting in self._broadcasts if not waiting.find(x)]

    def commit(self, index: int, use: int, captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor) -> None:
        """Add the sums of one backward of one layer, if that backward also accumulates its gradients.

        A layer whose statistics raise falls back: they never end a backward.
        """
        site = self.sites[index]
        self.add(site, site.layers[use], captured, sizes, grad)

    def add(
        self, site: Site[R], layer: Layer[R], captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor
    ) -> None:
        """The same for one use of the weight of a site."""
        if layer.proof.reason is None:
            try:
                self._commit(site, layer, captured, sizes, grad)
            except Exception as error:
                self.fail(site, layer, error)

    def fail(self, site: Site[R], layer: Layer[R], error: Exception) -> None:
        """Let a layer, or functions on its weight, fall back."""
        layer.proof.fail(error)
        if layer.start is not None:
            self.obstacles[site.owner] = layer.proof.reason or ""
            for other in site.layers:
                other.proof.inner = False

    @without_autocast  # on where the backward pass runs within it
    def _commit(
        self, site: Site[R], layer: Layer[R], captured: Sequence[Tensor], sizes: Sequence[int], grad: Tensor
    ) -> None:
        if self.sampled and not self._sampling:
            return
        for p in layer.parameters.values():
            if p.requires_grad and (self._sampling or self.accumulates(p)):
                break
        else:
            return
        task = _current_graph_task_id()
        with self._lock:
            if task not in site.tasks:
                anchor = site.owner if site.owner.requires_grad else p
                # A backward in another thread, or around this one, may have contributed and not accumulated yet.
                if site.begins_anew(anchor, anchor in self._gathered) and not any(map(self._runs, site.tasks)):
                    if site.tasks:
                        site.rule.forget(max(site.tasks))
                    site.clear()
                site.settle(self._runs)
                site.tasks = {*filter(self._runs, site.tasks), task}
                self._begin(task)
        grad = grad.detach() if grad.requires_grad else grad
        scale = self._scale(grad)
        if layer.rule.together:
            grad = grad if scale is None else grad.to(ACCUMULATOR[grad.dtype]) / scale.to(grad.device)
            kept = Kept(Use(layer.operation, layer.rule, captured, sizes, grad), layer, versions_of(captured))
            with self._lock:
                site.uses.setdefault(task, []).append(kept)
            return
        if layer.start is None:
            sums = layer.rule.contribute(layer.operation, captured, sizes, grad)
        else:
            sums = layer.rule.contribute_part(layer.operation, captured, sizes, grad, layer.start, site.module)
        if scale is not None:  # None before the first scale()
            rescale(sums, layer.rule, scale)
        with self._lock:
            site.add(sums)

    def _scale(self, grad: Tensor) -> Tensor | None:
        """What is divided out of a derivative: the scale of the loss, and what the gradient is yet to be divided by."""
        if self._sampling:
            return None
        scale: Tensor | None = None
        if self.grad_scaler is not None and self.grad_scaler.is_enabled():
            scale = self.grad_scaler._get_scale_async()  # on the device, where get_scale() would wait for it
        if self.pipeline.divisor == 1:
            return scale
        micro_batches = torch.full((), self.pipeline.divisor, dtype=ACCUMULATOR[grad.dtype], device=grad.device)
        return micro_batches if scale is None else scale * micro_batches

    def _begin(self, task: int) -> None:
        """Know a backward for as long as it runs: it alone keeps its mark alive, also where it ends in an error."""
        if task not in self._running:
            mark = self._running[task] = _Running()
            Variable._execution_engine.queue_callback(mark)

    def _runs(self, task: int) -> bool:
        mark = self._running.get(task)
        return mark is not None and not mark.ended

    def accumulates(self, parameter: Parameter) -> bool:
        """Whether the backward that is running will add to ``parameter.grad``."""
        parameter = self.present(parameter)
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


class _Stray:
    """The hook on the node of a function without a rule, to which a parameter of a layer went besides."""

    def __init__(self, engine: Callable[[], Statistics[Any] | None], p: Parameter, name: str) -> None:
        self._engine, self._parameter, self._name = engine, p, name

    def __call__(self, _: Any) -> None:
        if (engine := self._engine()) is not None:
            engine.note_part(self._parameter, self._name)


class _Weakly:
    """An engine that looks for functions, for hooks on the model, which must not keep it alive."""

    def __init__(self, engine: Statistics[Any]) -> None:
        self._engine = weakref.ref(engine)

    def wanted(self) -> Collection[Parameter]:
        engine = self._engine()
        return () if engine is None else engine._wanted()

    def held_as(self, present: Tensor) -> Parameter | None:
        engine = self._engine()
        return None if engine is None else engine.held_as(present)

    def expect(self, x: Tensor, output: Tensor) -> Broadcast | None:
        engine = self._engine()
        return None if engine is None or not may_be_broadcast(x) else engine.expect_rows(x, output)

    def receive(self, watch: Watch) -> None:
        if (engine := self._engine()) is not None:
            engine._receive(watch)


def _executes(node: Any) -> bool:
    """Whether the backward that is running will execute a node that accumulates a gradient."""
    try:
        return _will_engine_execute_node(node)
    except RuntimeError:
        return False  # autograd.grad with respect to the parameter itself: it returns gradients, it accumulates none


class _Running:
    """The mark of a backward that is running: a callback of its end, which is not called where that is an error.

    Whoever goes through all objects may keep it longer than the backward does.
    """

    ended = False

    def __call__(self) -> None:
        self.ended = True


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled, so that a mode around it would make another graph."""
    # By its name, as the compiler is not imported unless it is used.
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
