"""MBF, the mini-block Fisher method: momentum times the inverses of many small Fisher blocks.

Source: MBF, arXiv 2202.04124 (AISTATS 2023), Algorithm 1.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT

from fisher_kernels.curvature.block_rules import WIDEST, BlockRule, BlockRules, Blocks, LinearBlocks, Sharing
from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.curvature.operations import Choice, flattened
from fisher_kernels.curvature.rules import Sums
from fisher_kernels.curvature.scattered import flag, flagged
from fisher_kernels.curvature.sites import Layer
from fisher_kernels.ops import ACCUMULATOR, mbf_step_
from fisher_kernels.ops._blocks import unpack
from fisher_kernels.optim.base import Counters, count, require_memory, totals
from fisher_kernels.optim.block_shards import Settings, step_shards
from fisher_kernels.optim.fisher_blocks import ASIDE, BLOCK_STATE, STORAGES, FisherBlocks, New, Part, Unit
from fisher_kernels.optim.floors import FLOOR, fan_ins
from fisher_kernels.optim.hyperparameters import require_bools, require_choice, require_counts, require_numbers
from fisher_kernels.optim.inverse_sharing import EVERY_RANK
from fisher_kernels.optim.measure import Measured
from fisher_kernels.optim.pending import PENDING
from fisher_kernels.optim.random_rounding import RandomRounding
from fisher_kernels.optim.refresh import RAMP, is_due
from fisher_kernels.optim.renewal import NEXT
from fisher_kernels.optim.row_shards import row_shards
from fisher_kernels.optim.sampled import SampledLabels
from fisher_kernels.optim.shares import like_parameter, local, over_processes, whole
from fisher_kernels.optim.stages import require_group, take_part
from fisher_kernels.optim.unserved import shown
from fisher_kernels.optim.warn import warn_once

TOGETHER = ("momentum", "decoupled", "maximize", "kl_clip", "kl_along", "max_relative_step")
"""Settings that are the same for all that one call steps. Groups that share them have one trust region."""

MUCH = 1 << 30
"""Bytes of the blocks of one layer above which they are worth a warning."""


def _whole(blocks: Blocks, params: Sequence[Parameter]) -> None:
    """No parameter has blocks that are divided among processes."""


class MBF(Measured, SampledLabels[BlockRule], RandomRounding):
    r"""MBF: heavy-ball momentum preconditioned by a block-diagonal empirical Fisher matrix of many small blocks.

    With :math:`g_n` the gradient of sample n in one small group of weights, and λ the weight decay:

    .. math::

        G &= \operatorname{mean}_n\, g_n g_n^T && \text{every } \mathrm{update\_interval} \text{ steps} \\
        G_{\mathrm{ema}} &\leftarrow \beta_2 G_{\mathrm{ema}} + (1 - \beta_2)\, G
            && \text{initialised by the first } G \\
        P &\leftarrow (G_{\mathrm{ema}} + \mathrm{damping}\, I)^{-1}
            && \text{every } \mathrm{inverse\_interval} \text{ steps} \\
        g &= \nabla_w L \quad (+\, \lambda w \text{ unless decoupled}) \\
        m &\leftarrow \mathrm{momentum} \cdot m + g \\
        d &= P m && \text{block by block} \\
        \mathrm{scale} &= \min \left( 1,
            \sqrt{\frac{\mathrm{kl\_clip}}{\left| \sum \mathrm{lr}^2 \langle d, m \rangle \right|}} \right)
            && \text{one number for all groups} \\
        \mathrm{cap} &= \min \left( 1, \frac{\mathrm{max\_relative\_step} \cdot
            \max(|W|, \mathrm{floor} \sqrt{n / f})}{\mathrm{scale}\, |\mathrm{lr}\, d|} \right)
            && \text{one number for each layer, of } n \text{ weights and fan-in } f \\
        w &\leftarrow w - \mathrm{lr}\, (\mathrm{scale} \cdot \mathrm{cap} \cdot d
            \quad (+\, \lambda w \text{ if decoupled}))

    ==================== ============================================================================================
    layer                blocks
    ==================== ============================================================================================
    Conv, ConvTranspose  one n x n block for each output and input channel, n the kernel's size; the bias 1 x 1
    Linear               rows [w, b] share k x k blocks on their columns, k being ``linear_blocks``
    normalisations       one 2 x 2 block of scale and shift for each channel
    Embedding            1 x 1
    anything else        1 x 1 from N times the squared gradient of the batch of N samples; ``explain()`` names these
    ==================== ============================================================================================

    State of a weight: ``momentum_buffer``, ``fisher_blocks`` (count, n, n), ``inverse_blocks`` (the same, or stored
    smaller) and ``fisher_updates``; with ``stochastic_rounding`` also ``step`` and ``ordinal``. Before there are
    statistics the inverse is the identity. A block that is not positive definite with its damping keeps the inverse it
    has, is counted in :meth:`metrics` and warned of once. Where ``fully_shard`` divides parameters, blocks that belong
    to rows, all but the shared ones of Linear layers, are in the process that has the rows.

    Args:
        model: its layers are read through hooks; ``close()`` removes them. Inputs of layers are kept until the backward
            has passed.
        lr: learning rate, a number or a tensor of one element.
        momentum: 0 <= momentum < 1.
        damping: added to the diagonal of every block, in the units of squared per-sample gradients.
        kl_clip: bound of ``|sum lr^2 <d, m>|`` of a step, over all parameter groups that have the same ``kl_clip``,
            ``kl_along``, ``max_relative_step``, ``momentum``, ``decoupled`` and ``maximize``; None for no bound.
            Without it the first steps are nearly SGD at lr / damping / (1 - momentum).
        kl_along: ``"momentum"``: ``<d, m>``, the change of the model along d; ``"gradient"``: ``<d, g>`` in its place,
            which can vanish while d is large.
        max_relative_step: bound of the step of each layer, weight and bias together, relative to the norm of its
            weights, after the trust region and before the decay; None for no bound. Steps longer than the weights
            themselves along inverses that ``refresh="constant"`` has let grow old are warned of once (on the CPU; a GPU
            would be waited for).
        floor: a layer's weights count there as at least ``floor / sqrt(fan_in)`` each, so that weights that are zero at
            first move too; torch draws weights of 0.58 / sqrt(fan_in). The fan-in is the number of inputs of one
            output, of vectors and embeddings 1.
        beta2: decay of the blocks, 0 <= beta2 < 1.
        update_interval: statistics are taken every so many steps; in between the hooks do nothing.
        inverse_interval: blocks that have changed are inverted every so many steps.
        refresh: ``"ramp"``: both intervals grow from 1 to these over the first steps; ``"constant"``: they are what
            they are from the beginning.
        ramp: over how many steps they grow: after a refresh in step t the next one comes ``1 + floor((interval - 1)
            min(1, t / ramp))`` steps later, and inverses are made in steps that bring statistics.
        overlap: make inverses beside training, on a thread of their own, and on a GPU on a stream of their own too: the
            step that would make them uses those of the step that would have before. The first are waited for.
        inverse_sharing: where several processes train the model, ``"every_rank"`` makes all inverses, or each is made
            by ``"one_owner"`` and sent to the others; not together with overlap.
        delayed: take the statistics of each refresh in the next one; they are added up over processes beside training,
            so that none waits for another. The first of a layer are waited for. Not together with capturable.
        fisher: ``"empirical"``: blocks of the labels of the data; ``"sampled"``: of labels drawn from the model's own
            output, in :meth:`sample`.
        linear_blocks: blocks of so many columns of a Linear, shared by its outputs; ``"shared"``, one block of all of
            them, or, if there are more than 8192, blocks of 1024, with a warning; ``"per_output"``, one for each
            output, (O, I + 1, I + 1) numbers.
        sequence: what a sample is to a Linear on inputs of three dimensions or more, and to layers that are used
            several times: ``"expand"`` takes every row and every use as one; ``"reduce"`` adds up a sample's gradient
            over them first, which is exact, keeps inputs and derivatives until the step, and costs O(O I^2) a sample.
        loss_reduction: ``"mean"`` or ``"sum"``: how the loss makes one number of the samples'.
        weight_decay: at least 0.
        decoupled: decay the weights rather than add the decay to the gradient.
        mask_zeros: a weight that is 0 and whose gradient is 0 stays 0. Without it the other weights of its block move
            it, also where a pruning mask has set its gradient to 0.
        maximize: ascend.
        moment_dtype: ``torch.bfloat16`` keeps the momentum in 16 bits: 2 bytes a parameter in place of 4. A step reads
            it, advances it in float32, makes d of that and rounds it. Float64 parameters take none but None, which is
            float32 elsewhere.
        stochastic_rounding: round parameters and momentum in bfloat16 up or down at random, as in :class:`AdaFisher`,
            rather than to nearest: the same for all groups that have something in bfloat16. A step makes images in
            float32 of these and of gradients beside them: up to 12 bytes a parameter while it is taken.
        seed: of the random integers, 0 to 2^64 - 1.
        params: parameter groups, each with any of these hyperparameters; None takes all parameters of the model. The
            settings of a layer's blocks are those of its weight's group. A bias whose weight is in another group has
            blocks of its own. Those of a convolution's bias take damping, beta2 and inverse_interval from its group.
        grad_scaler: the ``torch.amp.GradScaler`` in use, so that blocks are in the units of unscaled gradients also
            after a manual ``unscale_``.
        inverse_storage: ``"full"``; ``"packed"``, one triangle of each block that is not shared; ``"bfloat16"``.
        capturable: on a GPU, keep new statistics at fixed addresses, so that a CUDA graph can capture a step that takes
            them; it costs a copy of them and their memory. Other steps can be captured without it.
        process_group: over which statistics are added up, one all-reduce a refresh, and one reduce-scatter of blocks
            that are divided; None takes the processes of the mesh of sharded parameters, or those of the
            DistributedDataParallel that averages the gradients.
        pipeline_group: the processes that have the stages of a pipeline, one each, over which ``kl_clip`` bounds the
            step of all; None where this one has all parameters.
        fallback: ``"warn"`` of parameters that no layer rule serves, or ``"error"``: refuse to start, or to go on,
            training them.
        rules: class of a layer -> the name of the operation it computes, ``"rms_norm"`` for example, or a function that
            takes the layer and returns a layer of torch that computes the same, or a rule. It overrides the proof.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.

    Source: MBF, arXiv 2202.04124, Algorithm 1; ``"expand"`` and ``"reduce"``: arXiv 2311.00636. The trust region is
    that of Kronecker-factored methods, arXiv 1705.09319 and others.
    """

    rule_kind = BlockRule
    moment = "momentum_buffer"
    statistics_state = (*BLOCK_STATE, *PENDING)
    later: ClassVar[Mapping[str, Any]] = {
        **RandomRounding.later,
        "capturable": False,
        "mask_zeros": False,
        "refresh": "constant",
        "ramp": RAMP,
        "fisher": "empirical",
        "kl_along": "gradient",
        "max_relative_step": None,
        "floor": FLOOR,
        "overlap": False,
        "delayed": False,
        "inverse_sharing": EVERY_RANK,
    }

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.9,
        damping: float = 1e-3,
        kl_clip: float | None = 1e-3,
        kl_along: Literal["momentum", "gradient"] = "momentum",
        max_relative_step: float | None = 0.1,
        floor: float = FLOOR,
        beta2: float = 0.9,
        update_interval: int = 10,
        inverse_interval: int = 20,
        refresh: Literal["ramp", "constant"] = "ramp",
        ramp: float = RAMP,
        overlap: bool = False,
        delayed: bool = False,
        inverse_sharing: Literal["every_rank", "one_owner"] = EVERY_RANK,
        fisher: Literal["empirical", "sampled"] = "empirical",
        linear_blocks: Literal["shared", "per_output"] | int = 64,
        sequence: Literal["expand", "reduce"] = "expand",
        loss_reduction: Literal["mean", "sum"] = "mean",
        weight_decay: float = 0.0,
        decoupled: bool = True,
        mask_zeros: bool = False,
        maximize: bool = False,
        moment_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        params: ParamsT | None = None,
        grad_scaler: Any = None,
        inverse_storage: Literal["full", "packed", "bfloat16"] = "full",
        capturable: bool = False,
        process_group: dist.ProcessGroup | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
        fallback: Literal["warn", "error"] = "warn",
        rules: Mapping[type, Choice] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "kl_clip": kl_clip,
            "kl_along": kl_along,
            "max_relative_step": max_relative_step,
            "floor": floor,
            "beta2": beta2,
            "update_interval": update_interval,
            "inverse_interval": inverse_interval,
            "refresh": refresh,
            "ramp": ramp,
            "overlap": overlap,
            "delayed": delayed,
            "inverse_sharing": inverse_sharing,
            "fisher": fisher,
            "linear_blocks": linear_blocks,
            "sequence": sequence,
            "loss_reduction": loss_reduction,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "mask_zeros": mask_zeros,
            "maximize": maximize,
            "moment_dtype": moment_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "inverse_storage": inverse_storage,
            "capturable": capturable,
        }
        self._scales: dict[int, Tensor] = {}
        self._capped: Counters = {}
        self._bounded: dict[tuple[int, ...], int] = {}
        require_group("pipeline_group", pipeline_group)
        self._pipeline_group = pipeline_group
        super().__init__(model, params, defaults, grad_scaler, process_group, fallback, rules)
        self._warn_of_wide()

    def _warn_of_wide(self) -> None:
        """Say which Linear layers are cut because they are wide, and which have blocks that take much memory."""
        for site in self.statistics.sites:
            if not isinstance(site.rule, LinearBlocks):
                continue
            (blocks,), name = site.rule.blocks, f"{site.layers[0].name or 'model'}.weight"
            wide = ACCUMULATOR[site.owner.dtype].itemsize
            if self._groups[site.owner]["linear_blocks"] == "shared" and blocks.columns > WIDEST:
                warn_once(
                    f"MBF: {name} has {blocks.columns:,} columns. One block for all of them would take "
                    f"{wide * blocks.columns**2:,} bytes, several times over, so it is cut into {blocks.count:,} of "
                    f"{blocks.size:,} columns. linear_blocks= takes another number of columns"
                )
            elif blocks.numel * wide > MUCH:
                warn_once(
                    f"MBF: the blocks of {name} take {blocks.numel * wide:,} bytes, several times over; a number of "
                    "columns as linear_blocks= makes them smaller"
                )

    # Groups.

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        require_numbers(group, ("momentum", "beta2", "damping", "weight_decay", "floor"))
        bounds = [name for name in ("kl_clip", "max_relative_step") if group[name] is not None]
        require_numbers(group, bounds, "a number or None")
        require_counts(group, ("update_interval", "inverse_interval"))
        require_bools(group, ("decoupled", "mask_zeros", "capturable", "overlap"))
        for name in ("overlap", "delayed"):
            if group[name] and group["capturable"]:
                raise ValueError(
                    f"{name} is True and so is capturable, expected one of them: a CUDA graph holds nothing of what "
                    "runs beside it"
                )
        for name in ("momentum", "beta2"):
            if not 0 <= group[name] < 1:
                raise ValueError(f"{name} is {group[name]}, expected 0 <= {name} < 1")
        for name in ("damping", "weight_decay", "floor"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} is {group[name]}, expected a finite number of at least 0")
        for name in bounds:
            if not 0 < group[name] < math.inf:
                raise ValueError(f"{name} is {group[name]}, expected a finite number above 0, or None")
        require_choice(group, "kl_along", ("momentum", "gradient"))
        blocks = group["linear_blocks"]
        if isinstance(blocks, numbers.Integral):
            if isinstance(blocks, bool) or blocks < 1:
                raise ValueError(f"linear_blocks is {blocks!r}, expected 'shared', 'per_output' or a positive integer")
            group["linear_blocks"] = int(blocks)
        else:
            require_choice(group, "linear_blocks", ("shared", "per_output"), "or a positive integer")
        require_choice(group, "sequence", ("expand", "reduce"))
        require_choice(group, "loss_reduction", ("mean", "sum"))
        require_choice(group, "inverse_storage", STORAGES)

    # Layers.

    def _watch(self, grad_scaler: Any, process_group: dist.ProcessGroup | None) -> None:
        self._rules = self._new_rules()
        super()._watch(grad_scaler, process_group)

    def _new_rules(self) -> BlockRules:
        self._rules = BlockRules(self._model, self._operations)
        self._rules.add_uses([made for _, made, _, _ in self._functions()])
        return self._rules

    def _rule_for(self, module: nn.Module, owner: Parameter) -> BlockRule | None:
        group = self._groups[owner]
        return self._rules(module, Sharing(group["linear_blocks"], group["sequence"], self._reduction(group)))

    def _layers_of(self) -> dict[Parameter, list[tuple[str, Layer[BlockRule]]]]:
        fallbacks = {part.owner for part in self._blocks.unruled}
        return {p: uses for p, uses in super()._layers_of().items() if p not in fallbacks}

    def _detail(self, role: str, layer: Layer[BlockRule]) -> str:
        where = layer.place(role)
        for blocks in layer.rule.blocks:
            if role in blocks.roles:
                return f"{where}: {_joint(role, blocks)}{blocks}{self._blocks.share_of(layer.parameters[role])}"
        return where

    def _fallback_detail(self, parameter: Parameter) -> str:
        return f"1 x 1 blocks from the squared gradient of the batch{self._blocks.share_of(parameter)}"

    def _rebuild(self) -> None:
        self._rules = self._new_rules()  # which know parameters by identity: a copy has others
        self._numbers = {p: number for number, p in enumerate(self._groups)}
        self._plans: dict[tuple[int, ...], _Plan] = {}
        divide = partial(row_shards, meshes=self._data_meshes(), ranks=self.statistics.processes.ranks)
        # Sums that come one refresh later come whole.
        delayed = any(group.get("delayed") for group in self.param_groups)
        self._blocks = FisherBlocks(
            self.statistics.sites, self.state, self._groups, self._overlap, divide=_whole if delayed else divide
        )
        self.statistics.divisions = self._blocks.divisions()
        self._renewals = (self._blocks,)
        self._share_out()
        self._fan_ins = fan_ins(self.statistics.sites, self._groups)

    def _set_aside(self, params: Collection[Parameter]) -> None:
        self._blocks.set_aside(params)
        self._blocks.couple()

    def _known_sites(self) -> Collection[int]:
        return self._blocks.known_sites

    def _without_statistics(self) -> Iterator[Parameter]:
        yield from super()._without_statistics()
        yield from self._blocks.aside_without_state()

    def _dtype_of(self, p: Parameter, name: str) -> torch.dtype:
        name = name.removeprefix(NEXT).removeprefix(ASIDE)
        if name == "inverse_blocks" and self._groups[p]["inverse_storage"] == "bfloat16":
            return torch.bfloat16
        return torch.float32 if name == "fisher_updates" else super()._dtype_of(p, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_scales": self._scales, "_capped": self._capped, "_bounded": self._bounded}

    # Step.

    def _prepare(self) -> None:
        self._prepare_rounding()
        fresh = False
        for _, p in self._with_gradients():
            if self.moment not in self.state[p]:
                fresh = True
                self.state[p][self.moment] = torch.zeros_like(p, dtype=self._dtype_of(p, self.moment))
        if fresh:
            # Blocks too, so that a checkpoint made from a fresh optimizer has every entry to load into.
            for part in self._blocks.parts:
                if any(p.grad is not None for p in part.params):
                    self._blocks.averages(part)
        self._blocks.couple()

    def _fold(self, taken: list[tuple[int, Sums]], grad_scale: Tensor | None) -> None:
        new = list(self._blocks.new_blocks(self.statistics.sites, taken))
        if taken or not self.statistics.sites:
            new += self._from_gradients([sums for _, sums in taken], grad_scale)
        if new:
            self._blocks.fold(new)
        self._invert()

    def _from_gradients(self, sums: list[Sums], grad_scale: Tensor | None) -> Iterator[New]:
        """Squared gradients of parameters without a rule, times N for a mean over N samples, as blocks are scaled."""
        samples = max([1, *(n for s in sums for n in s.counts)])
        found: list[New] = []
        for part in self._blocks.fallbacks():
            group, gradient = self._groups[part.owner], part.owner.grad
            due = is_due(group) or not self._blocks.is_averaged(part)
            if gradient is not None and due and gradient.numel():
                own = whole(gradient) if part.shards is None else like_parameter(part.owner, gradient)
                wide = own.to(ACCUMULATOR[gradient.dtype])
                if grad_scale is not None:
                    wide = wide / grad_scale.to(wide.device, wide.dtype)
                mean = group["loss_reduction"] == "mean"
                found.append((part, wide.square().flatten(), 1 / samples if mean else samples, samples))
        yield from _agreed(found)

    def _invert(self, everything: bool = False) -> None:
        due = set(map(id, self.param_groups)) if everything else self._inverting()
        if kept := self._blocks.renew(due, wait=everything):
            names = {p: name for name, p in self._names()}
            self._warn_once(
                "bad",
                f"blocks of {', '.join(names[part.owner] for part in kept[:3])} are not positive definite with damping "
                f"{self._groups[kept[0].owner]['damping']}: they keep the inverse they had. metrics() counts them; a "
                "larger damping= avoids it",
            )

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._count_steps(found_inf)
        together: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for group in self.param_groups:
            if group["params"]:
                settings = tuple(group[name] for name in TOGETHER)
                together.setdefault((group["params"][0].device, *settings), []).append(group)
        regions = [groups for groups in together.values() if groups[0]["kl_clip"] is not None]
        if self._pipeline_group is not None and len(regions) > 1:
            raise ValueError(
                f"pipeline_group is given, and {', '.join(TOGETHER)} make {len(regions)} trust regions of the groups: "
                "expected one, that of all stages"
            )
        for groups in together.values():
            self._step_groups(groups, grad_scale, found_inf)

    def _step_groups(self, groups: list[dict[str, Any]], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Step groups that have one trust region, in one call."""
        key = tuple(map(id, groups))
        plan = self._plans.get(key)
        if plan is None or plan.version != self._blocks.version or not plan.holds():
            plan = self._plans[key] = self._plan(groups)
        if not plan.params:
            if groups[0]["kl_clip"] is not None:
                take_part(self._pipeline_group, 1, groups[0]["params"][0].device)
            return
        params: list[Tensor] = list(plan.params)
        gradients: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        moments = [self.state[p][self.moment] for p in plan.params]
        zeros = [
            (local(p), local(p).eq(0) & like_parameter(p, g).eq(0))
            for p, g, group in zip(params, gradients, plan.of_group, strict=True)
            if groups[group]["mask_zeros"]
        ]
        settings: dict[str, Any] = {
            **{name: [groups[i][name] for i in plan.of_group] for name in ("lr", "weight_decay")},
            **{name: groups[0][name] for name in TOGETHER},
            "floor": [groups[i]["floor"] / root for i, root in zip(plan.of_group, plan.roots, strict=True)],
            "layers": plan.layers,
            "grad_scale": grad_scale,
            "found_inf": found_inf,
        }
        roundings = self._rounding(plan.params)
        if plan.is_divided or self._pipeline_group is not None:
            shared = Settings(**settings, roundings=roundings, pipeline_group=self._pipeline_group)
            skipped, scale, caps = step_shards(params, moments, plan.inverses, plan.view, plan.by_rows, shared)
        else:
            for name in ("lr", "weight_decay"):
                settings[name] = _one_if_the_same(settings[name])
            stored = images = [*params, *moments]
            if roundings.rounding is not None:  # by places in whole parameters, which the kernels know by their blocks
                images, gradients = [_wide(x) for x in stored], [_wide(g) for g in gradients]
                params, moments = images[: len(params)], images[len(params) :]
            for i in plan.transposed | plan.stacks:
                params[i], moments[i] = plan.view(i, params[i]), plan.view(i, moments[i])
                gradients[i] = plan.view(i, gradients[i].contiguous() if i in plan.stacks else gradients[i])
            skipped, scale, caps = mbf_step_(params, gradients, moments, plan.inverses, **settings)
            for i, (image, kept) in enumerate(zip(images, stored, strict=True)):
                if image is not kept:
                    at, is_moment = i % len(params), i >= len(params)
                    kept.copy_(roundings.narrow(at, image, kept.dtype, low=is_moment))
        for weight, mask in zeros:
            weight.masked_fill_(mask, 0)
        for group in groups:
            self._scales[id(group)] = scale
        count(self._skipped, plan.numbers, skipped)
        if groups[0]["max_relative_step"] is not None:
            if caps.is_cpu:
                self._warn_of_far(groups, plan, caps)
            count(self._capped, plan.numbers, caps.lt(1).to(torch.int64))
            self._bounded[plan.numbers] = self._bounded.get(plan.numbers, 0) + 1

    def _warn_of_far(self, groups: list[dict[str, Any]], plan: _Plan, caps: Tensor) -> None:
        """Say which layers were to step further than they are large, along inverses of before at constant intervals."""
        bound = groups[0]["max_relative_step"]
        if not (caps < bound).any():
            return
        fresh = self._inverting()
        stale = {i for i, g in enumerate(groups) if g["refresh"] == "constant" and id(g) not in fresh}
        places = zip(plan.params, plan.of_group, caps.tolist(), strict=True)
        # Of weights that begin at zero every step is far.
        far = [p for p, i, cap in places if cap < bound and i in stale and _norm(p) > self._least(p)]
        if far:
            names, group = {p: name for name, p in self._names()}, self._groups[far[0]]
            self._warn_once(
                "far",
                f"steps of {shown([names[p] for p in far])} were longer than the weights themselves, and were cut to "
                f"{bound} of them: their curvature is out of date. refresh='ramp' or less than "
                f"inverse_interval={group['inverse_interval']} keeps it fresh, kl_along='momentum' and a smaller "
                "kl_clip or lr make steps shorter",
            )

    def _least(self, p: Parameter) -> float:
        """The norm that a parameter counts as at least."""
        return float(self._groups[p]["floor"]) * math.sqrt(p.numel() / self._fan_ins[p])

    def _plan(self, groups: list[dict[str, Any]]) -> _Plan:
        plan = _Plan(self._blocks.version)
        plan.waiting = [p for group in groups for p in group["params"] if p.grad is None]
        places = {id(group): i for i, group in enumerate(groups)}
        for part in self._blocks.parts:
            for unit in self._blocks.units(part, lambda p: p.grad is not None):
                if (place := places.get(id(self._groups[unit.params[0]]))) is not None:
                    plan.add(unit, self._numbers, place, self._fan_ins[unit.params[0]])
        return plan

    # State.

    def state_dict(self) -> dict[str, Any]:
        """The state, with blocks as one process has them: (count, n, n), each process its share of those divided."""
        state = super().state_dict()
        numbers = (number for group in state["param_groups"] for number in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        number_of = dict(zip(params, numbers, strict=True))
        for p, entries in self._blocks.saved():
            if entries:
                kept = state["state"]
                kept[number_of[p]] = {**kept[number_of[p]], **entries}
        return state

    # Blocks of a whole data set.

    def warm_start(self, batches: Iterable[Any], loss_fn: Callable[[Any], Tensor], *, progress: bool = True) -> None:
        """Initialise the blocks from many batches, as the paper does from the whole data set.

        The mean of the blocks of all samples takes the place of what is there, and is inverted. Parameters, momentum,
        gradients and the model's buffers stay as they are. In data-parallel training every process calls it, with as
        many batches.

        Args:
            batches: what ``loss_fn`` takes, one after another, a DataLoader for one.
            loss_fn: batch -> loss, with the reduction that ``loss_reduction`` says; it runs the model, and under
                ``fisher="sampled"`` it calls :meth:`sample` with the output.
            progress: show a progress bar.

        Raises:
            ValueError: there was no batch, or none that gave finite statistics of any layer.
        """
        parameters = list(self._groups)
        grad_scaler, self.statistics.grad_scaler = self.statistics.grad_scaler, None  # nothing is scaled here
        gradients = [p.grad for p in parameters]
        buffers = {buffer: buffer.clone() for buffer in self._model.buffers()}
        self.statistics.clear()
        self._drop_pending()
        sums: dict[int, tuple[Tensor, float]] = {}
        try:
            self.statistics.arm(range(len(self.statistics.sites)))
            for batch in _with_progress(batches) if progress else batches:
                for p in parameters:
                    p.grad = None
                with torch.enable_grad():
                    loss = loss_fn(batch)
                    if not isinstance(loss, Tensor):
                        raise TypeError(f"loss_fn returned {loss!r}, expected a loss: a tensor of one element")
                    loss.backward()
                self._add_batch(sums)
        finally:
            self.statistics.grad_scaler = grad_scaler
            self.statistics.clear()
            self._armed = None
            self._arm()
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers.items():
                    buffer.copy_(value)
        if not sums:
            drawn = ", and does loss_fn call sample(output)" if self.statistics.sampled else ""
            raise ValueError(
                f"batches gave no finite statistics of any layer: were there any, and is the loss finite{drawn}?"
            )
        with torch.no_grad():
            for number, (total, samples) in sums.items():
                part = self._blocks.parts[number]
                average, _, updates = self._blocks.averages(part)
                if average.numel():  # else none is here
                    average.copy_((total / samples).view_as(average))
                updates.zero_()
                self._blocks.mark(part)
            self._invert(everything=True)

    @torch.no_grad()
    def _add_batch(self, sums: dict[int, tuple[Tensor, float]]) -> None:
        """Add the blocks of one batch, each as often as it has samples."""
        taken = self.statistics.take()
        new = [*self._blocks.new_blocks(self.statistics.sites, taken)]
        new += self._from_gradients([s for _, s in taken], None)
        for part, vector, divisor, samples in new:
            if bool(vector.isfinite().all()):
                total, seen = sums.get(part.number, (0.0, 0.0))
                sums[part.number] = (total + vector * (samples / divisor), seen + samples)

    # Reports.

    def _keep_beside(self) -> Callable[[], None]:
        others, counters = super()._keep_beside(), copy.deepcopy((self._capped, self._bounded))
        scales = [self._scales.get(id(group)) for group in self.param_groups]
        bad, refused = self._blocks.bad, self._blocks.refused

        def put_back() -> None:
            others()
            self._capped, self._bounded = counters
            # By place: groups are other ones where a state was loaded, and the blocks as well.
            pairs = zip(self.param_groups, scales, strict=True)
            self._scales = {id(group): scale for group, scale in pairs if scale is not None}
            self._blocks.bad, self._blocks.refused = bad, refused

        return put_back

    @torch.no_grad()
    def metrics(self) -> dict[str, dict[str, float]]:
        """Figures of the last step for each parameter that has taken one. Reading them waits for the device.

        A weight and a bias that are stepped side by side have the figures of their blocks in common.

        - ``damping_share``: mean of damping times an eigenvalue of the inverse; near 1 the method has become plain
          momentum SGD.
        - ``smallest_step``, ``largest_step``: lr times the extreme eigenvalues of the inverses.
        - ``trust_scale``: what kl_clip scaled the last step of its group by.
        - ``capped_share``: of the steps so far, the share in which max_relative_step shortened that of its layer. While
          a step is capped, or scaled by less than 1, a larger lr does not make it longer.
        - ``cosine_with_sgd``: between the preconditioned momentum and the gradient (NaN without a gradient).
        - ``skipped_blocks``: how many blocks were left alone because they were not finite, so far.
        - ``bad_blocks``: how many blocks kept an older inverse, being not positive definite with their damping, so far.
        - ``refused_statistics``: how often the statistics of its blocks were not finite and left out, so far.
        """
        divided = [part for part in self._blocks.parts if part.shards is not None]
        refused = totals(self._blocks.refused)
        bad = _of_all(totals(self._blocks.bad), {part.number: part.owner for part in divided})
        skipped = _of_all(totals(self._skipped), {self._numbers[p]: p for part in divided for p in part.params})
        capped = totals(self._capped)
        bounded = totals(
            {
                key: torch.full((len(key),), steps, dtype=torch.int64, device="cpu")
                for key, steps in self._bounded.items()
            }
        )
        names = {p: name for name, p in self._names()}
        report: dict[str, dict[str, float]] = {}
        for part in self._blocks.parts:
            group = self._groups[part.owner]
            for here in self._blocks.units(part, lambda p: self.moment in self.state.get(p, {})):
                unit = here.whole()
                group = self._groups[unit.params[0]]
                eigenvalues = _eigenvalues(unit, part.blocks)
                lr = float(group["lr"])
                scale = self._scales.get(id(group))
                figures = {
                    "damping_share": group["damping"] * float(eigenvalues.mean()),
                    "smallest_step": lr * float(eigenvalues.min()) if eigenvalues.numel() else math.nan,
                    "largest_step": lr * float(eigenvalues.max()) if eigenvalues.numel() else math.nan,
                    "trust_scale": 1.0 if scale is None else float(scale),
                    "capped_share": _share(self._numbers[unit.params[0]], capped, bounded),
                    "cosine_with_sgd": self._cosine(unit),
                    "skipped_blocks": skipped.get(self._numbers[unit.params[0]], 0),
                    "bad_blocks": bad.get(part.number, 0),
                    "refused_statistics": refused.get(part.number, 0),
                }
                report.update({names[p]: dict(figures) for p in unit.params})
        return {name: report[name] for name, _ in self._names() if name in report}

    def _cosine(self, unit: Unit) -> float:
        """Between the direction of a unit and its gradient."""
        if any(p.grad is None for p in unit.params):
            return math.nan
        for p in unit.params:
            require_memory("a gradient", p.grad)
        moments = [whole(self.state[p][self.moment]).to(ACCUMULATOR[p.dtype]) for p in unit.params]
        if unit.transposed:
            moments[0] = moments[0].t()
        if unit.is_stack:
            moments[0] = flattened(moments[0])
        # A step without momentum whose gradient is the momentum leaves the negative of the direction.
        moved, buffers = ([torch.zeros_like(m) for m in moments] for _ in range(2))
        inverses = [unit.inverse, *[None] * (len(moments) - 1)]
        settings: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "decoupled": True}
        mbf_step_(moved, moments, buffers, inverses, **settings, maximize=not self._groups[unit.params[0]]["maximize"])
        if unit.transposed:
            moved[0] = moved[0].t()
        direction = torch.cat([x.flatten() for x in moved])
        gradient = torch.cat([whole(p.grad).flatten() for p in unit.params if p.grad is not None]).to(direction)
        # Norms below eps count as eps: its default of 1e-8 is no small gradient.
        tiny = torch.finfo(direction.dtype).tiny
        return float(torch.cosine_similarity(direction, gradient, dim=0, eps=tiny))


@dataclass
class _Plan:
    """What the step of some groups takes, while the same parameters have gradients and the blocks lie where they do."""

    version: int
    numbers: tuple[int, ...] = ()
    params: list[Parameter] = field(default_factory=list)
    inverses: list[Tensor | None] = field(default_factory=list)
    transposed: set[int] = field(default_factory=set)
    stacks: set[int] = field(default_factory=set)
    of_group: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    roots: list[float] = field(default_factory=list)  # of the fan-ins
    waiting: list[Parameter] = field(default_factory=list)
    is_divided: bool = False  # whether other processes have rows of some
    by_rows: set[int] = field(default_factory=set)  # whose inverses are those of the rows that are here

    def add(self, unit: Unit, numbers: dict[Parameter, int], group: int, fan_in: int) -> None:
        if unit.transposed:
            self.transposed.add(len(self.params))
        if unit.is_stack:
            self.stacks.add(len(self.params))
        if unit.is_divided:
            self.by_rows.update(range(len(self.params), len(self.params) + len(unit.params)))
        self.params += unit.params
        self.is_divided = self.is_divided or any(map(is_distributed, unit.params))
        self.inverses += [unit.inverse, *[None] * (len(unit.params) - 1)]
        self.numbers += tuple(numbers[p] for p in unit.params)
        self.of_group += [group] * len(unit.params)
        self.layers += [unit.layer] * len(unit.params)
        self.roots += [math.sqrt(fan_in)] * len(unit.params)

    def view(self, i: int, x: Tensor) -> Tensor:
        """A tensor of the shape of a parameter as blocks lie in it."""
        if i in self.transposed:  # a weight that lies the other way round
            return x.t()
        return flattened(x) if i in self.stacks else x

    def holds(self) -> bool:
        return all(p.grad is not None for p in self.params) and all(p.grad is None for p in self.waiting)


def _agreed(new: Sequence[New]) -> Iterator[New]:
    """The same, where blocks are divided with NaN in place of what any process has something beside that is not finite.

    So all refuse the same, as of sums that are scattered.
    """
    divided = {part: vector for part, vector, _, _ in new if part.shards is not None}
    flags: dict[Part, Tensor] = {}
    if divided:
        here = torch.cat([flag(vector).double() for vector in divided.values()])
        flags = dict(zip(divided, over_processes([part.owner for part in divided], here), strict=True))
    for part, vector, divisor, samples in new:
        if part in flags:
            vector = flagged(vector if vector.numel() else vector.new_zeros(1), flags[part])
        yield part, vector, divisor, samples


def _wide(x: Tensor) -> Tensor:
    """What is in bfloat16 in float32; it may be written to where it is not."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _norm(p: Tensor) -> float:
    """The norm of a parameter, of all its parts."""
    return math.sqrt(over_processes([p], local(p).double().square().sum().reshape(1)))


def _one_if_the_same(of_each: list[Any]) -> Any:
    """A setting of each parameter, as one where they have it in common."""
    first = of_each[0]
    same = all(value is first or (isinstance(value, float | int) and value == first) for value in of_each)
    return first if same else of_each


def _of_all(counts: Mapping[int, int], owners: Mapping[int, Parameter]) -> dict[int, int]:
    """Counts of what each process has its own rows of, over all of them."""
    here = torch.tensor([counts.get(number, 0) for number in owners], dtype=torch.float64, device="cpu")
    total = over_processes(list(owners.values()), here).tolist()
    return {**counts, **{number: round(n) for number, n in zip(owners, total, strict=True)}}


def _share(number: int, part: Mapping[int, int], whole: Mapping[int, int]) -> float:
    return part.get(number, 0) / max(whole.get(number, 0), 1)


def _eigenvalues(unit: Unit, blocks: Blocks) -> Tensor:
    """Of the inverses that act on a parameter; what only pads a row has none."""
    inverse = unit.inverse.to(ACCUMULATOR.get(unit.inverse.dtype, torch.float32))
    if inverse.dim() == 2:
        inverse = unpack(inverse, blocks.size)
    if inverse.dim() == 3:
        return inverse.flatten() if inverse.shape[1] == 1 else torch.linalg.eigvalsh(inverse).flatten()
    columns = sum(p.numel() for p in unit.params) // blocks.rows
    found = []
    for block in inverse[0]:
        there = min(columns, len(block))
        found.append(torch.linalg.eigvalsh(block[:there, :there]))
        columns -= there
    return torch.cat(found)


def _joint(role: str, blocks: Blocks) -> str:
    """What a parameter is in joint blocks."""
    if len(blocks.roles) == 1:
        return ""
    return "beside its bias, " if role == "weight" else "beside its weight, "


def _with_progress(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches behind a progress bar, or followed by one line where rich is not installed."""
    try:
        from rich.progress import track
    except ModuleNotFoundError:
        number = 0
        for batch in batches:
            number += 1
            yield batch
        print(f"Fisher blocks: {number} batches")
    else:
        yield from track(batches, description="Fisher blocks")
