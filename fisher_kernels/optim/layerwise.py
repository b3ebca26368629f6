"""What the optimizers that read a model's layers share: hooks, statistics, reports of what serves what."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Generic, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from fisher_kernels.curvature.caller import calling
from fisher_kernels.curvature.functions import Spec
from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.curvature.operations import MATRICES, Choice, Operations, flattened
from fisher_kernels.curvature.processes import Processes
from fisher_kernels.curvature.rounds import Round, Rounds, key_of
from fisher_kernels.curvature.rules import R, Rule, Sums
from fisher_kernels.curvature.sites import Layer, Site, find_layers
from fisher_kernels.curvature.statistics import Statistics, times_attached
from fisher_kernels.optim.base import Explanation, FisherOptimizer, are_same, require_memory
from fisher_kernels.optim.hyperparameters import require_bools, require_choice
from fisher_kernels.optim.inverse_sharing import ONE_OWNER, SHARINGS
from fisher_kernels.optim.layouts import data_meshes, group_of, is_known, partners
from fisher_kernels.optim.overlap import Overlap
from fisher_kernels.optim.pending import COUNTS, PENDING, keep, read
from fisher_kernels.optim.refresh import advance, check_schedule, inverts, is_due
from fisher_kernels.optim.renewal import Renewal
from fisher_kernels.optim.stages import require_group
from fisher_kernels.optim.unserved import UNSERVED, UNUSED, Unserved, has_gradient, has_own_gradient, shown
from fisher_kernels.optim.warn import warn, warn_once

FALLBACK_SHARE = 0.01
"""Share of the trained parameters above which fallbacks are worth a warning."""

FUNCTIONS = "functions"
"""Key of parameter groups: name of each parameter that functions are served on -> operation, bias, settings."""

# What each model has been warned of. Not kept by the optimizers: a notebook makes one after the other for a model.
_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


class LayerwiseOptimizer(FisherOptimizer, Generic[R]):
    """Base of the optimizers that read the layers of ``model``; subclasses say which rule serves a layer and step.

    Args:
        model: its supported modules are watched.
        params: parameter groups as every torch optimizer takes them; None takes all parameters of the model.
        defaults: hyperparameters of groups that do not set them.
        grad_scaler: the ``torch.amp.GradScaler`` whose scale is in the derivatives.
        process_group: over which statistics are added up; None takes the processes of the mesh of sharded parameters,
            or those of the DistributedDataParallel that averages the gradients.
        fallback: ``"warn"`` of parameters that no layer serves, or ``"error"``: refuse to train them.
        rules: class of a layer -> how it is served.
    """

    rule_kind: ClassVar[type[Rule]]
    """The base of the rules that it reads."""

    _unknown: Collection[str] = ()  # parameters that functions may be seen on in the first refresh
    _renewals: tuple[Renewal[Any], ...] = ()
    """What keeps something that may be made beside training."""

    _looked_at = -1  # so many optimizers had been attached to models when others were looked for

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None,
        defaults: dict[str, Any],
        grad_scaler: Any,
        process_group: dist.ProcessGroup | None,
        fallback: Literal["warn", "error"] = "warn",
        rules: Mapping[type, Choice] | None = None,
    ) -> None:
        self._check_whole({})  # its parameters are what is given for the model there
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}, expected a torch.nn.Module: {type(self).__name__} reads its "
                "layers; give parameter groups as params="
            )
        for name, parameter in model.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"parameter {name!r} is not initialised: run a forward pass of the lazy module first")
        if fallback not in ("warn", "error"):
            raise ValueError(f"fallback is {fallback!r}, expected 'warn' or 'error'")
        _check_kinds(grad_scaler, process_group)
        self._model = model
        self._fallback = fallback
        self._statistics: Statistics[R] | None = None
        self._unserved = Unserved()
        self._made: dict[str, tuple[Parameter, nn.Module]] = {}  # by name a parameter, and the function on it
        self._operations = Operations(rules, self.rule_kind)
        self._overlap = Overlap()
        super().__init__(model.parameters() if params is None else params, defaults)
        if self._groups.keys().isdisjoint(model.parameters()):
            raise ValueError(
                f"params has no parameter of model: none of these {len(self._groups)} is in the {type(model).__name__} "
                "whose layers are read, expected those of one model"
            )
        try:
            self._watch(grad_scaler, process_group)
            self._require_rules()
        except ValueError:
            if self._statistics is not None:
                self._statistics.close()
            raise
        applied = self._may_be_applied()
        self._unknown = {name for name, p in self._names() if p in applied}
        self._warn_of_fallbacks(row for row in self.explain() if row.name not in self._unknown)

    # What subclasses define.

    def _rule_for(self, module: nn.Module, owner: Parameter) -> R | None:
        """The rule that serves a module whose settings are those of ``owner``'s group."""
        raise NotImplementedError

    def _leaves_out(self, operation: nn.Module) -> bool:
        """Whether a use of a weight has no rule because another use of it has one, which is known."""
        return False

    def _fallback_detail(self, parameter: Parameter) -> str:
        """What happens to a parameter that no rule serves."""
        raise NotImplementedError

    def _rebuild(self) -> None:
        """Make anew what is derived from the watched layers and the state, which have changed."""
        raise NotImplementedError

    def _set_aside(self, params: Collection[Parameter]) -> None:
        """Let these parameters, whose layers were not used, take a fallback, and all others what their layers give."""
        raise NotImplementedError

    def _known_sites(self) -> Collection[int]:
        """Indices of the sites that have statistics."""
        raise NotImplementedError

    def _fold(self, taken: list[tuple[int, Sums]], grad_scale: Tensor | None) -> None:
        """Average new statistics in."""
        raise NotImplementedError

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Step the parameters that have a gradient."""
        raise NotImplementedError

    def _detail(self, role: str, layer: Layer[R]) -> str:
        """What a layer gives to the parameter in one of its roles."""
        raise NotImplementedError

    # Layers.

    @property
    def statistics(self) -> Statistics[R]:
        assert self._statistics is not None
        return self._statistics

    def _rule_if_served(self, module: nn.Module, operation: nn.Module, owner: Parameter) -> R | None:
        if self._unserved.is_misfit(module):
            return None
        own: R | None = self._operations.rule(module)
        return own or self._rule_for(operation, owner)

    def _find_layers(self) -> list[Layer[R]]:
        layers = find_layers(self._model, self._rule_if_served, self._groups, self._operations)
        return layers + list(self._function_layers())

    # Functions on parameters.

    def _functions(self) -> Iterator[tuple[str, nn.Module, dict[str, Parameter], Spec]]:
        """The functions that forwards were seen to apply to parameters, by the name of the parameter."""
        named: dict[str, Parameter] = dict(self._names()) if any(g.get(FUNCTIONS) for g in self.param_groups) else {}
        for group in self.param_groups:
            for name, (operation, bias_name, settings) in group.get(FUNCTIONS, {}).items():
                if (weight := named.get(name)) is None:
                    continue
                bias, spec = named.get(bias_name or ""), Spec(operation, settings)
                if name not in self._made or self._made[name][0] is not weight:
                    made = spec.on(weight if spec.name not in MATRICES else flattened(weight), bias)
                    self._made[name] = weight, made
                parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
                yield name, self._made[name][1], parameters, spec

    def _function_layers(self) -> Iterator[Layer[R]]:
        for name, made, parameters, spec in self._functions():
            if (rule := self._rule_for(made, parameters["weight"])) is not None:
                yield Layer(name, made, made, rule, parameters, spec=spec)

    def _named_layers(self) -> dict[str, nn.Module]:
        """What the parameter groups may speak of."""
        return {**dict(self._model.named_modules()), **{name: made for name, made, _, _ in self._functions()}}

    def _serve_functions(self) -> None:
        """Let functions that the last forwards applied to parameters be served from now on.

        The choice is part of the parameter groups, so that a state that is loaded goes on as it was saved.
        """
        names = {p: name for name, p in self._names()} if self.statistics.found else {}
        found: dict[str, Any] = {}
        for site in self.statistics.found:
            (layer,) = site.layers
            assert layer.spec is not None
            bias = layer.parameters.get("bias")
            found[names[site.owner]] = [layer.spec.name, None if bias is None else names[bias], layer.spec.settings]
        found = self.statistics.agree(found, any(map(is_due, self.param_groups)))
        if not found:
            return
        old = {(id(site.owner), site.rule.layout): site.owner for site in self.statistics.sites}
        params = dict(self._names())
        for name, (operation, bias, settings) in found.items():
            group = self._groups[params[name]]
            group[FUNCTIONS] = {**group.get(FUNCTIONS, {}), name: [operation, bias, settings]}
            self._forget(p for n in (name, bias) if (p := params.get(n)) is not None and p not in self._layers_of())
        self._watch(self.statistics.grad_scaler, self.statistics.processes.given)
        left = {(id(site.owner), site.rule.layout) for site in self.statistics.sites}
        if gone := [owner for key, owner in old.items() if key not in left]:
            self._forget(gone)
            self._rewatched()
            for index, site in enumerate(self.statistics.sites):
                if any(site.owner is owner for owner in gone):
                    site.clear()  # it has what some of its uses gave
                    self.statistics.late.add(index)

    def _forget(self, params: Iterable[Parameter]) -> None:
        """Drop the statistics of parameters whose rule is another one now."""
        self._join()
        params = set(params)
        self.statistics.rounds.drop({key for site in self.statistics.sites if (key := key_of(site))[0] in params})
        for p in params:
            state = self.state.get(p, {})
            for name in [name for name in state if name in self.statistics_state]:
                del state[name]

    def _watch(self, grad_scaler: Any, process_group: dist.ProcessGroup | None) -> None:
        old = self._statistics
        meshes = self._data_meshes()
        group = group_of(self._groups, meshes) if process_group is None else process_group
        self._statistics = Statistics(self._find_layers(), grad_scaler, group)
        if old is not None:
            self._statistics.adopt(old)
            if not old.open:
                self._statistics.close()
            old.close()
        self._note_partners(meshes)
        self._note_places()
        self._rewatched()

    def _data_meshes(self) -> dict[Parameter, Any]:
        """Those of the model, which need not be looked for where there is no DTensor."""
        return data_meshes(self._model) if any(map(is_distributed, self._groups)) else {}

    def _note_partners(self, meshes: Mapping[Parameter, Any]) -> None:
        processes = self.statistics.processes
        processes.partners, processes.partner_groups = partners(self._groups, meshes)

    def _rewatched(self) -> None:
        self._join()
        for site in self.statistics.sites:
            if self._is_delayed(site):
                require_known_lengths(site)
        self.statistics.watch_functions(self._model, self._rule_for, self._groups, self._leaves_out)
        for module in self._unserved.misfits():
            for p in module._parameters.values():
                if p is not None:
                    self.statistics.obstacles.setdefault(p, "a layer that has it and is not served")
        self._rebuild()
        self._set_aside(self._unserved.without_use(self.statistics.layers()))
        self._armed: tuple[Any, ...] | None = None
        self._missed: set[int] = set()  # sites that had a gradient while a compiled model was not asked for statistics
        self._arm()

    def _regrouped(self) -> None:
        if self._statistics is not None:
            self._watch(self._statistics.grad_scaler, self._statistics.processes.given)
            self._require_rules()

    def _note_places(self) -> None:
        """Note where the model has its modules and the parameters that are held, and what these are called."""
        self._named = {name: p for name, p in self._model.named_parameters(remove_duplicate=False) if p in self._groups}
        places: list[tuple[dict[str, Any], str, Any]] = []
        for module in self._model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # whose modules and parameters are no dictionaries
                places += [(module._modules, name, child) for name, child in module._modules.items()]
                places += [(module._parameters, n, p) for n, p in module._parameters.items() if p in self._groups]
        # Column by column: every step looks whether all is as it was.
        self._homes = [there for there, _, _ in places]
        self._keys = [name for _, name, _ in places]
        self._noted = [value for _, _, value in places]

    def _is_as_noted(self) -> bool:
        now = list(map(dict.get, self._homes, self._keys))
        if are_same(now, self._noted):
            return True
        gone: set[Parameter] = set()
        for found, value in zip(now, self._noted, strict=True):
            # What has no gradient may be there for a while, as in a functional call.
            if found is not value and (isinstance(value, nn.Module) or getattr(found, "grad", None) is not None):
                return False
            if found is None and value is not None:
                gone.add(value)
        # They may be there under other names, as pruning has it.
        return not gone or gone <= set(self._model.parameters())

    def _follow(self) -> None:
        """Hold what the model has now under the names of parameters that it has no more, with the state of these.

        ``load_state_dict(assign=True)``, ``to_empty()`` and a module in place of another bring new parameters.
        """
        self._join()
        self._keep_pending()
        self._drop_pending()
        now = dict(self._model.named_parameters(remove_duplicate=False))
        there = set(now.values())
        moved: dict[Parameter, Parameter] = {}
        lost = []
        for name, p in self._named.items():
            q = now.get(name)
            if q is p or p in there:
                continue
            if q is None or q.shape != p.shape or moved.get(p, q) is not q:
                lost.append(name)
            else:
                moved[p] = q
        taken = {p for p in self._groups if p not in moved}
        for group in self.param_groups:
            stay = [q for p in group["params"] if (q := moved.get(p, p)) is p or q not in taken]
            group["params"] = list(dict.fromkeys(stay))
            taken.update(stay)
            self._check_params(group)
        self._find_groups()
        for p, q in moved.items():
            if (state := self.state.pop(p, None)) is not None and not p.is_meta and q not in self.state:
                self.state[q] = {
                    name: value.to(q.device, self._dtype_of(q, name) if value.is_floating_point() else value.dtype)
                    for name, value in state.items()
                }
        self._regrouped()
        self._read_pending()
        if lost:
            self._warn_once(
                f"lost {shown(lost)}",
                f"the model has no such parameters any more, or others of another shape, and they are not trained: "
                f"{shown(lost)}. Make a new optimizer, or pass what took their place to add_param_group()",
            )

    def _check_params(self, group: dict[str, Any]) -> None:
        super()._check_params(group)
        divided = [(i, p) for i, p in enumerate(group["params"]) if is_distributed(p)]
        meshes = data_meshes(self._model) if divided else {}
        for i, p in divided:
            if not is_known(p) or (p in meshes and meshes[p] is None):
                name = next(name for name, q in self._names() if q is p)
                raise TypeError(
                    f"params[{i}] ({name}) is a DTensor with placements {p.placements}, expected one that fully_shard, "
                    f"parallelize_module or both have divided by rows, or a matrix by columns: {type(self).__name__} "
                    "does not take others"
                )

    def _check_group(self, group: dict[str, Any]) -> None:
        group.setdefault("iteration", 0)
        for name in (UNSERVED, FUNCTIONS):
            kept = group.setdefault(name, {})
            if isinstance(kept, str):  # as state_dict() has it
                group[name] = json.loads(kept)
        super()._check_group(group)
        require_bools(group, ("delayed",))
        if "refresh" in group:
            check_schedule(group)
        if "inverse_sharing" in group:
            require_choice(group, "inverse_sharing", SHARINGS)
            if group["inverse_sharing"] == ONE_OWNER and group["overlap"]:
                raise ValueError(
                    "inverse_sharing is 'one_owner' and overlap is True, expected one of them: what is made beside "
                    "training ends at another time in each process"
                )

    def _take_up_groups(self) -> None:
        before = self._groups
        super()._take_up_groups()
        if self._groups is not before:
            self._warn_of_fallbacks(self.explain())

    def close(self) -> None:
        """Remove the hooks from the model. The optimizer can go on stepping with the curvature it has."""
        self.statistics.close()
        self._join()
        self._keep_pending()
        self._overlap.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them the statistics of the backward passes that produced them.

        Settings of refreshes that have changed since the last step count from here on.
        """
        self.statistics.clear()
        if self._armed_for != self._schedules():
            self._take_up_groups()
            for group in self.param_groups:
                self._check_group(group)
            self._arm()
        super().zero_grad(set_to_none)

    # Step.

    def _refused(self) -> None:
        self.statistics.clear()  # a skipped step leaves nothing behind, and the refresh that was due is still due

    def _warn_once(self, what: str, message: str) -> None:
        """Once for each model and kind of optimizer."""
        if not self._has_told(what):
            _told.setdefault(self._model, set()).add(f"{type(self).__name__} {what}")
            warn(f"{type(self).__name__}: {message}")

    def _has_told(self, what: str) -> bool:
        return f"{type(self).__name__} {what}" in _told.get(self._model, ())

    def _look_for_other_readers(self) -> None:
        """Say once if other optimizers read the same layers; not at construction, when an old one is still around."""
        self._looked_at = times_attached()
        if self.statistics.open and not self._has_told("readers") and self.statistics.other_readers():
            gc.collect()  # what only cycles keep alive costs nothing after this
            if others := self.statistics.other_readers():
                self._warn_once(
                    "readers",
                    f"{len(others) + 1} living optimizers read layers of this model, and each makes every iteration "
                    "slower: close() those that are no longer used",
                )

    def _advance(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._surface_failures()
        if self._looked_at != times_attached():
            self._look_for_other_readers()
        if not self._is_as_noted():
            self._follow()
        self._look_for_processes()
        self._check_pipeline()
        self._serve_functions()
        self._prepare()
        looks = self.statistics.looks and len(self.statistics.processes.partners) > 1
        later = self._later()
        taken = self.statistics.take(self._loss_scale(grad_scale, found_inf), later, self._lacking(later))
        if taken and looks:
            self._compare_with_partners(taken)
        taken = self._leave_out_misfits(taken)
        if not taken and not self.statistics.late and not self.statistics.awaits:
            self._warn_if_silent()
        self._note_unused({index for index, _ in taken}, later)
        self._require_served()
        self._tell_of_parts()
        self._fold(taken, grad_scale)
        self._update(grad_scale, found_inf)
        for group in self.param_groups:
            advance(group, self._refreshes(group))
        self._arm()
        if self._unknown and (taken or not self.statistics.sites):
            if self._fallback == "warn":
                self._warn_of_fallbacks(row for row in self.explain() if row.name in self._unknown)
            self._unknown = set()

    def _look_for_processes(self) -> None:
        """Find out whose statistics are added to those of this process, before that happens."""
        processes = self.statistics.processes
        looks = bool(self.statistics.armed) or self.statistics.awake  # for functions, where no layer is known
        if looks:
            processes.look_in(self._model, self._groups)
        if looks and processes.count > 1 and processes.shared:
            raise ValueError(
                f"ranks {sorted(processes.shared)} of the process_group have parts of the same layers, and the same "
                "samples, as this process: expected those that have other samples, as each counts once"
            )
        if processes.count > 1 and processes.may_leave:
            raise RuntimeError(
                f"{type(self).__name__} adds up statistics over processes, and in a Join those that have come to the "
                "end of their data take no part in it: give all processes as many batches, or use SOFIM"
            )
        strangers = processes.strangers - self.statistics.pipeline.processes + 1
        if looks and strangers > 0:
            self._warn_once(
                "strangers",
                f"{strangers} other processes are there, and no DistributedDataParallel averages the "
                "gradients of this model: its statistics are those of this process alone. If gradients are averaged "
                "by other means, say over which processes: process_group=torch.distributed.group.WORLD, or another "
                "group. If every process trains a model of its own, give it a group of its own, or ignore this",
            )

    def _check_pipeline(self) -> None:
        """Refuse what is not that of the whole model where this one is a stage of a pipeline."""
        pipeline, kind = self.statistics.pipeline, type(self).__name__
        if pipeline.schedule is not None and pipeline.is_split:
            raise RuntimeError(
                f"{pipeline.schedule} makes the derivatives of inputs and of parameters in backward passes of their "
                f"own, of which {kind} has no statistics: expected a schedule that makes both in one, as Schedule1F1B "
                "and ScheduleInterleaved1F1B do"
            )
        if pipeline.schedule is None or pipeline.processes == 1:
            return
        if any(group.get("fisher") == "sampled" for group in self.param_groups):
            raise ValueError(
                "fisher is 'sampled', and this model is a stage of a pipeline: the backward of drawn labels ends where "
                "the last stage begins; expected 'empirical'"
            )
        if self._pipeline_group is None and any(group.get("kl_clip") is not None for group in self.param_groups):
            raise ValueError(
                "kl_clip bounds the step of all parameters, and this model is a stage of a pipeline over "
                f"{pipeline.processes} processes: expected pipeline_group=, the group of these, or kl_clip=None"
            )

    # Statistics that come one refresh later.

    def _make_entries(self) -> None:
        super()._make_entries()
        self._keep_pending()

    def _later(self) -> set[int]:
        """Sites whose statistics of this step the next refresh takes; the first ones of all are waited for."""
        if not any(group.get("delayed") for group in self.param_groups):
            return set()
        known, sites = self._known_sites(), self.statistics.sites
        refreshed = self.statistics.armed - self.statistics.waiting
        found = {i for i in refreshed if i in known and self._is_delayed(sites[i])}
        if any(sites[i].owner.is_cuda for i in found) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "delayed is True, and a CUDA graph is being captured, which would take the same statistics in every "
                "replay: capture steps between refreshes"
            )
        for i in found:
            require_known_lengths(sites[i])
            if any(i == index for index, _ in self.statistics.divisions):
                raise RuntimeError(
                    f"delayed is True for {sites[i].layers[0].name or 'model'}, whose blocks have been divided among "
                    "processes since this optimizer was made: expected delayed=True from the beginning"
                )
            for name in PENDING:  # of a state that was asked for
                self.state.get(sites[i].owner, {}).pop(name, None)
        return found

    def _is_delayed(self, site: Site[R]) -> bool:
        return bool(self._groups[site.owner].get("delayed"))

    def _lacking(self, later: Collection[int]) -> set[int]:
        """Those of them that were not used here, and have a gradient of their own, as far as this process sees."""
        sites = self.statistics.sites
        unused = {i for i in later if sites[i].sums is None and not sites[i].uses}
        if not unused:
            return set()
        used = {p for i in later if i not in unused for layer in sites[i].layers for p in layer.parameters.values()}
        return {i for i in unused if self._has_other_gradients(sites[i], used, has_own_gradient)}

    def _keep_pending(self) -> None:
        """Wait for what is on its way, and put it into the state."""
        keep(self.statistics.rounds.kept(), self.statistics.sites, self.state, self._groups)

    def _read_pending(self) -> None:
        """Go on with what the state has."""
        self.statistics.rounds = Rounds()
        self.statistics.rounds.add(Round.of(read(self.statistics.sites, self.state)))

    def _drop_pending(self) -> None:
        """Forget what the next refresh would take."""
        self.statistics.rounds.drop({key_of(site) for site in self.statistics.sites})
        self.statistics.rounds = Rounds()

    # Work beside training.

    def _share_out(self) -> None:
        """Let those that keep something say which processes make it together."""
        for renewal in self._renewals:
            renewal.processes = self.statistics.processes

    def _inverting(self) -> set[int]:
        """The groups, by identity, that this step makes inverses of."""
        return {id(group) for group in self.param_groups if inverts(group, self._refreshes(group))}

    def _keep_beside(self) -> Callable[[], None]:
        others, pending = super()._keep_beside(), self.statistics.keep_pending()

        def put_back() -> None:
            others()
            pending(self.statistics)  # which may be another engine

        return put_back

    def _join(self) -> None:
        """Wait for all work beside training, and keep what it made in the state."""
        for renewal in self._renewals:
            renewal.join()

    def _surface_failures(self) -> None:
        """Wait for what this step puts to use, and raise an error of that or other work, before anything is changed."""
        due = self._inverting() if self._renewals else set()
        for renewal in self._renewals:
            renewal.join(due)
        if self._overlap.failed:
            names = {p: name for name, p in self._names()}
            first, *others = [names.get(p, "a parameter that is gone") for p, _ in self._overlap.failed]
            others_too = f", and of {shown(others)}" if others else ""
            error = self._overlap.failed[0][1]
            self._overlap.failed = []
            raise RuntimeError(
                f"{type(self).__name__}: curvature of {first}{others_too} could not be made beside training "
                f"({type(error).__name__}: {error}). Nothing was changed in this step; if you go on it is tried again "
                "with the statistics that are there"
            ) from error

    def _loss_scale(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor | None:
        """The scale in the derivatives where no scaler was given: that of the one that calls this step, if any does.

        It passes the scale unless gradients were unscaled before.
        """
        if grad_scale is not None or found_inf is None or self.statistics.grad_scaler is not None:
            return grad_scale
        scaler = calling(torch.amp.GradScaler)
        if scaler is None:
            raise RuntimeError(
                f"gradients were unscaled before the step, and {type(self).__name__} does not know the scale that is "
                "still in its statistics: construct it with grad_scaler=, the scaler in use"
            )
        scale: Tensor | None = scaler._get_scale_async()  # since the last update(), so in all that is pending
        return scale

    def _arm(self) -> None:
        """Let the layers whose next step refreshes their statistics collect them, and those that have none yet."""
        known, sites = self._known_sites(), self.statistics.sites
        waiting: set[int] = set()
        if len(known) < len(sites):
            waiting = {i for i, site in enumerate(sites) if i not in known and site.is_trained()}
        due = [is_due(group) for group in self.param_groups]
        awake = bool(self._missed) or any(due)
        armed = (waiting, awake, *due)
        self._armed_for = self._schedules()
        self._refreshing = {id(group) for group, now in zip(self.param_groups, due, strict=True) if now}
        if armed != self._armed:
            self._armed = armed
            refreshed = {i for i, site in enumerate(sites) if is_due(self._groups[site.owner])}
            self.statistics.arm(refreshed, waiting - refreshed, awake)

    def _schedules(self) -> list[tuple[Any, ...]]:
        """The settings that say which groups refresh in a step."""
        return [
            tuple(group.get(name) for name in ("update_interval", "refresh", "ramp")) for group in self.param_groups
        ]

    def _refreshes(self, group: dict[str, Any]) -> bool:
        """Whether this step brings statistics of the layers of a group: their hooks were told so before the forward."""
        return id(group) in self._refreshing

    # Layers that are not served.

    def _leave_out_misfits(self, taken: list[tuple[int, Sums]]) -> list[tuple[int, Sums]]:
        """Let layers that were found out take a fallback from now on; returns what was taken of the others."""
        layers = [la for la in self.statistics.layers() if la.proof.reason or la.proof.deviation]
        for layer in layers:
            if layer.proof.deviation is not None:
                name = layer.name or "model"
                self._warn_once(
                    f"deviation {name}", f"rules= says how to serve {name}, which it is, though {layer.proof.deviation}"
                )
        decided = (layer for layer in layers if layer.proof not in self.statistics.undecided)
        proofs = [(layer, layer.proof) for layer in decided if not layer.proof.inner]
        found = [(layer, proof.reason) for layer, proof in proofs if proof.reason is not None]
        if not found:
            return taken
        keys = [(site.owner, site.rule.layout) for site in self.statistics.sites]
        for layer, reason in found:
            self._unserved.add(layer, self._groups[layer.owner], reason)
        self._drop_state_of_misfits()
        self._watch(self.statistics.grad_scaler, self.statistics.processes.given)
        self._prepare()
        if self._fallback == "warn":
            told = "; ".join(f"{layer.name or 'model'} ({reason})" for layer, reason in found)
            warn(
                f"{type(self).__name__}: {len(found)} {'layers' if len(found) > 1 else 'layer'} cannot be served by a "
                f"rule and take a fallback: {told}. print(optimizer.explain()) shows each"
            )
        places = {(site.owner, site.rule.layout): index for index, site in enumerate(self.statistics.sites)}
        return [(places[keys[index]], sums) for index, sums in taken if keys[index] in places]

    def _drop_state_of_misfits(self) -> None:
        """Forget the statistics of sites of which no layer is left."""
        still = {(layer.owner, layer.rule.layout) for layer in self._find_layers()}
        sites = self.statistics.sites
        self._forget(site.owner for site in sites if (site.owner, site.rule.layout) not in still)

    def _compare_with_partners(self, taken: list[tuple[int, Sums]]) -> None:
        """Say once which layers see something else in the processes that divide others with this one."""
        if found := self.statistics.differing(taken):
            names = shown([site.layers[0].name or "model" for site in found])
            self._warn_once(
                f"apart {names}",
                f"statistics of {names} differ among the processes that divide layers, and replicas of the model drift "
                "apart. A layer whose parameters are no DTensors has to see the same in each of them: all samples and "
                "features, with the same random numbers. SequenceParallel() serves what sees parts",
            )

    def _tell_of_parts(self) -> None:
        """Name once, or refuse, parameters that are served by what layers give and go into functions besides."""
        if not self.statistics.parts:
            return
        served = self._layers_of().keys() - self._unserved.without_use(self.statistics.layers())
        parts = [name for name, p in self._names() if p in served and p in self.statistics.parts]
        if not parts:
            return
        told = "functions without a rule apply parameters that layers serve too, and what they do is left out of the "
        told += f"statistics: {shown(parts)}"
        if self._fallback == "error":
            raise RuntimeError(f"{told}; fallback='error' refuses to train them so")
        self._warn_once(f"parts {shown(parts)}", f"{told}; print(optimizer.explain()) shows each")

    def _note_unused(self, taken: set[int], later: Collection[int]) -> None:
        """Let layers that have a gradient and gave no statistics take a fallback, until they are used.

        Where no layer gave statistics the cause is a common one, of which one warning is enough. A model that is
        compiled may not have been asked for any: the next step does.

        Args:
            taken: sites that gave statistics.
            later: sites whose statistics come later.
        """
        sites = self.statistics.sites
        expected = self.statistics.armed.difference(later, taken, self.statistics.late)
        self.statistics.late.clear()
        if not (expected or self.statistics.unused or self._missed or self._unserved):
            return  # all gave what they were asked for, as in most steps
        again = [layer for i in taken for layer in sites[i].layers if self._unserved.is_unused(layer.module)]
        for layer in again:
            self._unserved.remove(layer, self._groups[layer.owner])
        used = {p for i in taken for layer in sites[i].layers for p in layer.parameters.values()}
        lacking = {i for i in expected if sites[i].rule.needs_uses and self._has_other_gradients(sites[i], used)}
        lacking |= {i for i in self.statistics.unused - taken if sites[i].rule.needs_uses}
        unused = lacking if taken and self.statistics.awake else set()
        self._missed = (self._missed if self.statistics.awake else self._missed | lacking) - taken - unused
        noted = [layer for i in sorted(unused) for layer in sites[i].layers]
        for layer in noted:
            self._unserved.add(layer, self._groups[layer.owner], UNUSED)
        if noted or again:
            self._set_aside(self._unserved.without_use(self.statistics.layers()))
        if noted and self._fallback == "warn":
            names = shown([layer.name or "model" for layer in noted])
            self._warn_once(
                f"unused {names}",
                f"layers have a gradient, and a refresh saw no use of them: {names}. Is a weight applied by a function "
                "instead, was it reparametrised (pruned, for example), or is the input a nested or sparse tensor? They "
                "take a fallback until they are used; print(optimizer.explain()) shows each",
            )

    def _has_other_gradients(
        self, site: Site[R], used: Collection[Parameter], has: Callable[[Parameter], bool] = has_gradient
    ) -> bool:
        """Whether a site that is not known to be unused has gradients of parameters that are not used elsewhere."""
        layers = (layer for layer in site.layers if not self._unserved.is_unused(layer.module))
        return any(has(p) for layer in layers for p in layer.parameters.values() if p not in used)

    def _require_rules(self) -> None:
        """Refuse trained parameters without a rule, if so asked."""
        if self._fallback == "error":
            applied = self._may_be_applied()
            self._refuse(lambda p: p.requires_grad and p not in applied, ValueError)

    def _require_served(self) -> None:
        """Refuse to step a parameter without a rule, if so asked."""
        if self._fallback == "error":
            self._refuse(lambda p: p.grad is not None, RuntimeError)

    def _refuse(self, trains: Callable[[Parameter], bool], kind: type[Exception]) -> None:
        served = self._layers_of().keys() - self._unserved.without_use(self.statistics.layers())
        names = [name for name, p in self._names() if p not in served and trains(p)]
        if names:
            reasons = [f"; {name}: {reason}" for group in self.param_groups for name, reason in group[UNSERVED].items()]
            raise kind(
                f"{len(names)} trained parameters have no layer rule ({shown(names)}{''.join(reasons)}), and "
                "fallback='error' refuses to train them: leave them to another optimizer (params=), or take "
                "fallback='warn'"
            )

    def _warn_if_silent(self) -> None:
        """Say once that a refresh step had gradients and no statistics."""
        if not any(map(is_due, self.param_groups)) or self._has_told("silent"):
            return
        waiting = [site.owner for site in self.statistics.sites if is_due(self._groups[site.owner])]
        for p in waiting:
            require_memory("a gradient", p.grad)
        # Whether a gradient is all zeros is read on the CPU alone: elsewhere the step would wait for the device.
        if any(not p.grad.is_cpu or has_gradient(p) for p in waiting if p.grad is not None):
            self._warn_once("silent", self._silence())

    def _silence(self) -> str:
        """What is said of a refresh step that had gradients and saw no statistics."""
        return (
            "a refresh step has gradients but saw no statistics of any layer. Was this model, or another one of its "
            "class, compiled and run before the optimizer was constructed (torch.compile then goes on with what it "
            "compiled, without the hooks: call torch._dynamo.reset() after the constructor and compile again)? Were "
            "the gradients set by hand, are the inputs nested or sparse tensors, or was the optimizer closed? The step "
            "goes on with the statistics it has (curvature 1 if there are none)"
        )

    # State.

    def _reloaded(self) -> None:
        self._overlap.failed = []
        self.statistics.clear()
        self._drop_pending()
        misfits = self._unserved.misfits()
        self._unserved.read(self.param_groups, self._named_layers())
        known = {layer.name for layer in self.statistics.layers() if layer.spec is not None}
        same = misfits == self._unserved.misfits() and known == {
            name for group in self.param_groups for name in group.get(FUNCTIONS, {})
        }
        layers = self.statistics.layers()
        if same and all(self._rule_if_served(la.module, la.operation, la.owner) == la.rule for la in layers):
            self._rewatched()
        else:  # the settings that came along have other rules
            self._watch(self.statistics.grad_scaler, self.statistics.processes.given)
        self._read_pending()
        self._tell_of_lost_statistics()

    def _dtype_of(self, p: Parameter, name: str) -> torch.dtype:
        return torch.float64 if name.endswith(COUNTS) else super()._dtype_of(p, name)

    def _without_statistics(self) -> Iterator[Parameter]:
        """The parameters that keep statistics of layers, and have none where these layers have a moment."""
        kept = set(self.statistics_state)
        for site in self.statistics.sites:
            if site.rule.needs_uses and kept.isdisjoint(self.state.get(site.owner, {})):
                params = (p for layer in site.layers for p in layer.parameters.values())
                if any(self.moment in self.state.get(p, {}) for p in params):
                    yield site.owner

    def _tell_of_lost_statistics(self) -> None:
        """Name once what was loaded without the statistics of its layer."""
        names = {p: name for name, p in self._names()}
        if lost := shown([names[p] for p in self._without_statistics()]):
            self._warn_once(
                f"lost statistics {lost}",
                f"the state that was loaded has no statistics of {lost}, which begin anew. "
                "torch.distributed.checkpoint loads no more than what the optimizer has before: weights that functions "
                "apply are known after a step of training, and the state of frozen parameters is left out",
            )

    def _restored(self) -> None:
        self._unserved = Unserved()
        layers = [layer for layer in self.statistics.layers() if layer.spec is not None]
        self._made = {layer.name: (layer.parameters["weight"], layer.module) for layer in layers}
        self._unserved.read(self.param_groups, self._named_layers())
        self._overlap = Overlap()
        meshes = self._data_meshes()
        self.statistics.processes = Processes(group_of(self._groups, meshes))
        self._note_partners(meshes)
        self._note_places()
        self._rewatched()
        self._read_pending()

    def state_dict(self) -> dict[str, Any]:
        """The state, when what is being made, or is on its way, beside training is in it.

        What groups say of layers is text: torch.distributed.checkpoint loads no keys that are not there before.
        """
        self._join()
        self._keep_pending()
        state = super().state_dict()
        for group in state["param_groups"]:
            group.update({name: json.dumps(group[name]) for name in (UNSERVED, FUNCTIONS) if name in group})
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._join()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._join()
        self._keep_pending()
        kept = ("_model", "_statistics", "_fallback", "_operations")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    # Reports.

    def _names(self) -> Iterator[tuple[str, Parameter]]:
        names = {p: name for name, p in self._model.named_parameters()}
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                yield names.get(p, f"param_groups[{g}]['params'][{i}]"), p

    def _layers_of(self) -> dict[Parameter, list[tuple[str, Layer[R]]]]:
        """Parameter -> the layers that serve it, with its role in each."""
        served: dict[Parameter, list[tuple[str, Layer[R]]]] = {}
        for site in self.statistics.sites:
            for layer in site.layers:
                for role, p in layer.parameters.items():
                    served.setdefault(p, []).append((role, layer))
        return served

    def _served(self) -> Callable[[Parameter], tuple[str, str]]:
        served = self._layers_of()
        aside = self._unserved.without_use(self.statistics.layers())
        left_out = self._unserved.of(self._named_layers())
        there = set(self._model.parameters())

        def by_rule(p: Parameter) -> tuple[str, str]:
            uses = [] if p in aside else served.get(p, [])
            rule = " + ".join(dict.fromkeys(layer.rule.name for _, layer in uses)) or "fallback"
            details = [self._detail(role, layer) for role, layer in uses] or [self._fallback_detail(p)]
            details += [
                f"served by the functions inside {layer.name or 'the model'}, as {layer.proof.reason}"
                for _, layer in uses
                if layer.proof.reason is not None
            ]
            if p not in left_out and (reason := self.statistics.obstacles.get(p)) is not None:
                details.append(f"uses by functions are left out: {reason}" if uses else f"not served for {reason}")
            if p not in there:
                details.insert(0, "not in the model")
            return rule, "; ".join(details + left_out.get(p, []))

        return by_rule

    def _may_be_applied(self) -> set[Parameter]:
        """Parameters without a rule that functions may be seen on in the first refresh."""
        served = self._layers_of()
        found: set[Parameter] = set()
        for module in self._model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # what runs in it cannot be seen
            own = module.__class__.__module__.startswith("torch.nn") and not isinstance(module, nn.MultiheadAttention)
            for p in module._parameters.values():
                if p is not None and p not in served and (not own or isinstance(module, nn.Linear)):
                    # A vector that a user's module has is hardly applied by a function that has a rule.
                    found |= {p} if p.dim() > 1 or isinstance(module, nn.MultiheadAttention | nn.Linear) else set()
        return found

    def _warn_of_fallbacks(self, rows: Iterable[Explanation]) -> None:
        sizes = {name: p.numel() for name, p in self._names() if p.requires_grad}
        fallbacks = [row.name for row in rows if row.fallback and not row.frozen]
        share = sum(sizes[name] for name in fallbacks) / max(sum(sizes.values()), 1)
        if share > FALLBACK_SHARE:
            strangers = self._groups.keys() - set(self._model.parameters())
            where = f", of which {len(strangers)} are not in the model" if strangers else ""
            warn_once(
                f"{type(self).__name__}: {share:.0%} of the trained parameters have no layer rule and take a fallback "
                f"({shown(fallbacks)}){where}; print(optimizer.explain()) shows each"
            )


def require_known_lengths(site: Site[Any]) -> None:
    """Refuse to delay statistics of which processes must first agree how long they are."""
    if None in site.rule.sum_lengths(site.module):
        raise ValueError(
            f"delayed is True, and only the data tell how long the statistics of {site.layers[0].name or 'model'} are, "
            "which processes would have to wait for: expected another variant than 'release', or delayed=False"
        )


def _check_kinds(grad_scaler: Any, process_group: Any) -> None:
    """Refuse what is no scaler and no group; a scaler is known by what is asked of it."""
    asked = ("is_enabled", "_get_scale_async")
    if grad_scaler is not None and (
        isinstance(grad_scaler, type) or not all(callable(getattr(grad_scaler, name, None)) for name in asked)
    ):
        raise TypeError(f"grad_scaler is {grad_scaler!r}, expected a torch.amp.GradScaler or None")
    require_group("process_group", process_group)
