"""MBF in float64, straight from its formulas, with every per-sample gradient and every block formed.

A second opinion for the tests: it shares no code with the package. The gradient of each sample comes from
``torch.func``: ``vmap(grad)`` of ``<s_n, layer(x_n)>``, s_n being the derivative of the loss by the output of sample n,
so no formula of any layer is written down. Batch normalisation in training, whose samples depend on each other, is the
exception: there the sample's part of the gradient of ``scale * x_hat + shift`` is. Each step checks that the gradients
of all samples add up to what autograd found.

Source: MBF, arXiv 2202.04124, Algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "momentum": 0.9,
    "damping": 1e-3,
    "kl_clip": 1e-3,
    "kl_along": "momentum",
    "max_relative_step": 0.1,
    "floor": 0.3,
    "beta2": 0.9,
    "update_interval": 10,
    "inverse_interval": 20,
    "refresh": "ramp",
    "ramp": 80,
    "overlap": False,
    "linear_blocks": 64,
    "sequence": "expand",
    "loss_reduction": "mean",
    "weight_decay": 0.0,
    "decoupled": True,
    "maximize": False,
}

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CHANNEL_NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
UNBATCHED = {
    2: (nn.Conv1d, nn.ConvTranspose1d, nn.InstanceNorm1d),
    3: (nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d),
    4: (nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d),
}
"""Number of dimensions -> layers that take an input of so many for one sample."""


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's Linear of a transposed weight."""
    return type(module).__name__ == "Conv1D"


def is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_transposed_conv(module: nn.Module) -> bool:
    return isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or is_transposed_conv(module)


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, (*CHANNEL_NORMS, nn.LayerNorm, nn.RMSNorm))


def fan_in(model: nn.Module, parameter: Tensor) -> int:
    """What torch draws the weight of the layer of a parameter relative to."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or not any(p is parameter for p in module._parameters.values()):
            continue
        if is_matrix(module) or is_conv(module):
            return nn.init._calculate_fan_in_and_fan_out(weight.T if is_conv1d(module) else weight)[0]
        if is_norm(module) or isinstance(module, nn.Embedding):
            return 1
    return parameter.numel() // len(parameter) if parameter.dim() > 1 else 1


# The gradients of single samples.


@dataclass
class Use:
    """One call of a module in one backward."""

    module: Any
    x: Tensor
    arguments: dict[str, Any]
    out: Tensor
    backward: int = -1

    @property
    def s(self) -> Tensor:
        assert self.out.grad is not None
        return self.out.grad


def single(module: nn.Module, x: Tensor) -> bool:
    """Whether an input has no batch dimension."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return x.dim() == len(module.normalized_shape)
    if is_matrix(module):
        return x.dim() == 1
    if isinstance(module, nn.Embedding):
        return x.dim() == 0
    return any(x.dim() == dims and isinstance(module, kinds) for dims, kinds in UNBATCHED.items())


def normalised_by_batch(module: Any, x: Tensor) -> Tensor:
    dims = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) / (variance + module.eps).sqrt()


def sample_gradients(use: Use, rows: bool) -> dict[str, Tensor]:
    """Role -> (samples, *shape of the parameter): the gradient of each sample, or of each row of a Linear."""
    module, x, s = use.module, use.x, use.s
    if single(module, x):
        x, s = x.unsqueeze(0), s.unsqueeze(0)
    if rows:
        leading = s.dim() - 1
        x, s = x.flatten(0, leading - 1), s.flatten(0, leading - 1)
    parameters = {
        role: p.detach() for role in ("weight", "bias") if (p := module._parameters.get(role, None)) is not None
    }
    if isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None):
        positions = list(range(2, x.dim()))
        of_scale, of_shift = s * normalised_by_batch(module, x), s
        if positions:
            of_scale, of_shift = of_scale.sum(positions), of_shift.sum(positions)
        return {"weight": of_scale, "bias": of_shift}

    def loss(parameters: dict[str, Tensor], x: Tensor, s: Tensor) -> Tensor:
        out = functional_call(module, parameters, (x.unsqueeze(0),), use.arguments)
        return (out.squeeze(0) * s).sum()

    found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, s)
    return found


# Blocks.


def outer_products(v: Tensor) -> Tensor:
    """The mean over the first dimension of v v^T, for each of the second."""
    return (v.unsqueeze(-1) * v.unsqueeze(-2)).mean(0)


@dataclass
class Family:
    """All modules that have one weight, and the blocks that they give to it and its biases.

    ``own`` are the parameters whose gradients, side by side, are what the blocks are of: a bias beside its weight, or
    one tensor alone.
    """

    owner: Tensor
    modules: list[Any] = field(default_factory=list)

    @property
    def primary(self) -> Any:
        """Of a tied weight, the module whose orientation counts."""
        linear = [m for m in self.modules if isinstance(m, nn.Linear)]
        return next(iter(linear + [m for m in self.modules if is_conv1d(m)] + self.modules))

    def speaks_with(self, module: Any) -> bool:
        """Whether a module sees the weight as the primary one does; only then its bias has blocks."""
        if is_matrix(self.primary):
            return is_matrix(module) and is_conv1d(module) == is_conv1d(self.primary)
        return not (is_conv(module) and len({is_transposed_conv(m) for m in self.modules}) > 1)

    def biases(self) -> list[Tensor]:
        found = {}
        for m in self.modules:
            p = m._parameters.get("bias")
            if p is not None and self.speaks_with(m):
                found[id(p)] = p
        return list(found.values())

    def has_bias(self) -> bool:
        return bool(self.biases())


@dataclass
class Block:
    """Blocks that are averaged together: of [weight, bias] (``joint``) or of one role alone."""

    owner: Tensor
    family: Family | None
    role: str  # "joint", "weight", "bias" or "fallback"
    group: dict[str, Any]
    average: Tensor | None = None
    inverted: Tensor | None = None  # the average of which the inverse is in use
    coming: Tensor | None = None  # that of which it is used from the next turn on
    changed: bool = False


def matrix(tensor: Tensor, primary: Any) -> Tensor:
    """A weight, or gradients of it with samples in front, as (..., outputs, inputs)."""
    return tensor.mT if is_conv1d(primary) else tensor


def is_time(group: dict[str, Any], interval: str) -> bool:
    """Whether statistics are taken in this step, or inverses made: every so many steps, or as the ramp has it."""
    now, most = group["iteration"], group[interval]
    if group["refresh"] == "constant":
        return now % most == 0
    if interval == "inverse_interval" and not is_time(group, "update_interval"):
        return False
    if not (past := group["done"][interval]):
        return True
    if past[-1] >= group["ramp"]:
        return now >= past[-1] + most
    return now >= past[-1] + 1 + (most - 1) * past[-1] // group["ramp"]


def is_due(group: dict[str, Any], block: Block) -> bool:
    """Whether a block is refreshed: when its group is, and without an average whenever it can be."""
    return is_time(group, "update_interval") or block.average is None


class NaiveMBF:
    """The optimizer; ``params`` and the hyperparameters as for the package's. Call ``backward_done`` after each."""

    def __init__(self, model: nn.Module, *, params: Sequence[dict[str, Any]] | None = None, **given: Any) -> None:
        self.groups: list[dict[str, Any]] = []
        for group in params or [{"params": model.parameters()}]:
            self.groups.append({**DEFAULTS, **given, **group, "params": list(group["params"]), "iteration": 0})
            self.groups[-1]["done"] = {"update_interval": [], "inverse_interval": []}  # in which steps
        self.group_of = {id(p): group for group in self.groups for p in group["params"]}
        self.fans = {id(p): fan_in(model, p) for group in self.groups for p in group["params"]}
        self.moments: dict[int, Tensor] = {}
        self.uses: list[Use] = []
        self.backwards = 0
        self.listening = True
        self.families: dict[int, Family] = {}
        heads = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        for module in model.modules():
            known = is_matrix(module) or is_conv(module) or is_norm(module) or isinstance(module, nn.Embedding)
            weight = module._parameters.get("weight")
            if known and weight is not None and id(module) not in heads:
                self._watch(module, weight)
        self.blocks = list(self._blocks())

    def _watch(self, module: nn.Module, weight: Tensor) -> None:
        held = [p for role in ("weight", "bias") if id(p := module._parameters.get(role)) in self.group_of]
        if not held:
            return
        self.families.setdefault(id(weight), Family(held[0])).modules.append(module)  # type: ignore[arg-type]

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            if self.listening and out.requires_grad:
                out.retain_grad()
                arguments = {name: value for name, value in kwargs.items() if name != "input"}
                self.uses.append(Use(module, (args[0] if args else kwargs["input"]).detach(), arguments, out))

        module.register_forward_hook(keep, with_kwargs=True)

    def _blocks(self) -> Iterator[Block]:
        served = set()
        for family in self.families.values():
            weight, biases = family.primary.weight, family.biases()
            held = [p for p in (weight, *biases) if id(p) in self.group_of]
            served.update(map(id, held))
            if is_conv(family.primary):
                if id(weight) in self.group_of:
                    yield Block(weight, family, "weight", self.group_of[id(weight)])
                if mine := [b for b in biases if id(b) in self.group_of]:
                    yield Block(mine[0], family, "bias", self.group_of[id(mine[0])])
            elif held:
                yield Block(held[0], family, "joint" if biases else "weight", self.group_of[id(held[0])])
        for group in self.groups:
            for p in group["params"]:
                if id(p) not in served:
                    yield Block(p, None, "fallback", group)

    # Statistics.

    def zero_grad(self) -> None:
        self.uses.clear()
        for group in self.groups:
            for p in group["params"]:
                p.grad = None

    def backward_done(self) -> None:
        """Uses of one backward belong to the same samples."""
        for use in self.uses:
            if use.backward < 0 and use.out.grad is not None:
                use.backward = self.backwards
        self.backwards += 1

    def samples(self, family: Family) -> list[dict[str, Tensor]]:
        """The gradients of all samples, use by use or, to ``"reduce"``, sample by sample."""
        reduce = self.group_of[id(family.owner)]["sequence"] == "reduce"
        found: dict[tuple[int, ...], dict[str, Tensor]] = {}
        for number, use in enumerate(self.uses):
            if use.backward < 0 or use.out.grad is None or use.s.numel() == 0 or use.module not in family.modules:
                continue
            rows = not reduce and is_matrix(family.primary)
            gradients = sample_gradients(use, rows)
            n = len(gradients["weight"])
            bias = gradients.pop("bias", None)
            bias = bias if family.speaks_with(use.module) else None
            if family.has_bias():
                shape = family.biases()[0].shape
                gradients["bias"] = gradients["weight"].new_zeros(n, *shape) if bias is None else bias
            key = (use.backward, n) if reduce else (number,)
            old = found.get(key)
            found[key] = gradients if old is None else {r: old[r] + gradients[r] for r in old}
        return list(found.values())

    def new_blocks(self, block: Block, samples: Sequence[dict[str, Tensor]]) -> Tensor:
        """G of one batch."""
        assert block.family is not None
        primary, settings = block.family.primary, self.group_of[id(block.family.owner)]
        gradients = {role: torch.cat([s[role] for s in samples]) for role in samples[0]}
        n = len(gradients["weight"])
        if settings["loss_reduction"] == "mean":  # each derivative holds 1/n
            gradients = {role: n * value for role, value in gradients.items()}
        if block.role == "bias":
            return outer_products(gradients["bias"].reshape(n, -1, 1))
        weight = gradients["weight"]
        if is_matrix(primary):
            rows = matrix(weight, primary)
            if block.role == "joint":
                rows = torch.cat([rows, gradients["bias"].unsqueeze(-1)], -1)
            if settings["linear_blocks"] == "per_output":
                return outer_products(rows)
            chunks = self.chunks(rows, settings)  # (n, outputs, blocks, size): outputs are so many more samples
            return outer_products(chunks.flatten(0, 1))
        if is_conv(primary):
            return outer_products(weight.flatten(3).flatten(1, 2))
        if is_norm(primary):
            roles = ("weight", "bias") if block.role == "joint" else ("weight",)
            return outer_products(torch.stack([gradients[role].flatten(1) for role in roles], -1))
        return outer_products(weight.reshape(n, -1, 1))

    def chunks(self, rows: Tensor, settings: dict[str, Any]) -> Tensor:
        """Rows (..., columns) in blocks of columns (..., blocks, size), the last one filled with zeros."""
        size = settings["linear_blocks"]
        size = rows.shape[-1] if size == "shared" else min(size, rows.shape[-1])
        return F.pad(rows, (0, -rows.shape[-1] % size)).unflatten(-1, (-1, size))

    def refresh(self) -> None:
        counts, ready = [1], []
        for block in self.blocks:
            if block.family is not None:
                group = self.group_of[id(block.family.owner)]
                if is_due(group, block) and (found := self.samples(block.family)):
                    counts.append(sum(len(s["weight"]) for s in found))
                    ready.append((block, self.new_blocks(block, found)))
        for block in self.blocks:
            group = block.group
            due = is_due(group, block) and (ready or not self.families)
            if block.family is None and due and (g := block.owner.grad) is not None:
                n = max(counts)
                squares = n * g.square() if group["loss_reduction"] == "mean" else g.square() / n
                ready.append((block, squares.reshape(-1, 1, 1)))
        for block, new in ready:
            beta2 = block.group["beta2"]
            block.average = new if block.average is None else beta2 * block.average + (1 - beta2) * new
            block.changed = True

    def invert(self) -> None:
        """Keep the averages that are inverted now: the inverse of a block is formed where it is used."""
        for block in self.blocks:
            due = is_time(block.group, "inverse_interval")
            if due and block.coming is not None:
                block.inverted, block.coming = block.coming, None
            if block.changed and (due or block.inverted is None):
                block.changed = False
                if block.group["overlap"] and block.inverted is not None:
                    block.coming = block.average
                else:
                    block.inverted = block.average

    # Step.

    def directions(self, block: Block, moments: dict[int, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters with a gradient, and Ginv m for each."""
        damping, G = block.group["damping"], block.inverted

        def solve(blocks: Tensor | None, m: Tensor) -> Tensor:
            """The inverse applied to (..., blocks, size)."""
            if blocks is None:
                return m
            inverse = torch.linalg.inv(blocks + damping * torch.eye(blocks.shape[-1], dtype=m.dtype))
            return torch.einsum("bij,...bj->...bi", inverse, m)

        if block.family is None or block.role == "bias":
            for p in [block.owner] if block.family is None else block.family.biases():
                if id(p) in moments:
                    yield p, solve(G, moments[id(p)].reshape(-1, 1)).reshape(p.shape)
            return
        primary, biases = block.family.primary, block.family.biases()
        weight, live = primary.weight, [b for b in biases if id(b) in moments]
        if block.role == "joint":
            first = next((b for b in biases if id(b) in self.group_of), None)
            coupled = (
                first is not None
                and {id(weight), id(first)} <= moments.keys()
                and self.group_of[id(weight)] is self.group_of[id(first)]
            )
            alone = [b for b in live if not (coupled and b is first)]
        else:
            coupled, alone = False, []
        columns = weight.shape[0 if is_conv1d(primary) else -1] if is_matrix(primary) else 1
        shared = is_matrix(primary) and self.group_of[id(block.family.owner)]["linear_blocks"] != "per_output"
        if G is not None and block.role == "joint" and not coupled:
            G = without_cross_terms(G, columns, shared)
        for b in alone:
            # Beside a weight that is stepped with another bias there is no inverse to wait for.
            current = block.average if coupled else G
            corner = 1 - damping if current is None else self._bias_block(current, columns, shared)
            yield b, moments[id(b)] / (corner + damping)
        if id(weight) not in moments:
            return
        m = moments[id(weight)]
        if is_matrix(primary):
            rows = matrix(m, primary)
        elif is_norm(primary):
            rows = m.reshape(-1, 1)
        elif is_conv(primary):
            rows = m.flatten(2).flatten(0, 1)
        else:
            rows = m.reshape(-1, 1)
        if block.role == "joint":
            beside = moments[id(first)].reshape(-1) if coupled else rows.new_zeros(len(rows))
            rows = torch.cat([rows, beside.unsqueeze(-1)], -1)
        if shared:
            width = rows.shape[-1]
            d = solve(G, self.chunks(rows, self.group_of[id(block.family.owner)])).flatten(-2)[..., :width]
        else:
            d = solve(G, rows)
        if block.role == "joint":
            if coupled:
                assert first is not None
                yield first, d[..., -1].reshape(first.shape)
            d = d[..., :-1]
        yield weight, matrix(d, primary).reshape(weight.shape) if is_matrix(primary) else d.reshape(weight.shape)

    def _bias_block(self, G: Tensor, column: int, shared: bool) -> Tensor:
        if not shared:
            return G[:, -1, -1]
        return G[column // G.shape[-1], column % G.shape[-1], column % G.shape[-1]]

    @torch.no_grad()
    def step(self) -> None:
        self.listening = False
        if all(use.backward < 0 for use in self.uses):
            self.backward_done()
        self.check_samples()
        self.refresh()
        self.listening = True
        self.uses.clear()
        self.invert()
        gradients, moments = {}, {}
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None:
                    g = -p.grad if group["maximize"] else p.grad
                    g = g if group["decoupled"] else g + group["weight_decay"] * p
                    gradients[id(p)] = g
                    old = self.moments.get(id(p), torch.zeros_like(p))
                    self.moments[id(p)] = moments[id(p)] = group["momentum"] * old + g
        # A layer's number is that of what gives its blocks; what no layer serves is one by itself.
        found = {
            id(p): (p, d, id(block.family or block))
            for block in self.blocks
            for p, d in self.directions(block, moments)
        }
        assert found.keys() == gradients.keys()
        for region in self.regions():
            settings = region[0]
            mine = [one for one in found.values() if any(self.group_of[id(one[0])] is group for group in region)]
            along = moments if settings["kl_along"] == "momentum" else gradients
            total = sum(self.group_of[id(p)]["lr"] ** 2 * float((d * along[id(p)]).sum()) for p, d, _ in mine)
            scale, clip = 1.0, settings["kl_clip"]
            if clip is not None and abs(total) > clip:
                scale = (clip / abs(total)) ** 0.5
            caps = {layer: self.cap([one for one in mine if one[2] == layer], scale) for layer in {x[2] for x in mine}}
            for group in region:
                group["scale"] = scale
            for p, d, layer in mine:
                group = self.group_of[id(p)]
                decay = group["weight_decay"] * p if group["decoupled"] else 0.0
                p -= group["lr"] * (scale * caps[layer] * d + decay)
        for group in self.groups:
            for interval in [name for name in group["done"] if is_time(group, name)]:
                group["done"][interval].append(group["iteration"])
            group["iteration"] += 1

    def regions(self) -> list[list[dict[str, Any]]]:
        """Groups that have one trust region."""
        names = ("momentum", "decoupled", "maximize", "kl_clip", "kl_along", "max_relative_step")
        found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for group in self.groups:
            found.setdefault(tuple(group[name] for name in names), []).append(group)
        return list(found.values())

    def cap(self, layer: Sequence[tuple[Tensor, Tensor, int]], scale: float) -> float:
        """What makes the step of a layer as long as it may be, relative to its weights."""
        settings = self.group_of[id(layer[0][0])]
        if settings["max_relative_step"] is None:
            return 1.0
        weights = torch.cat([p.flatten() for p, _, _ in layer])
        steps = torch.cat([scale * self.group_of[id(p)]["lr"] * d.flatten() for p, d, _ in layer])
        least = [self.group_of[id(p)]["floor"] / self.fans[id(p)] ** 0.5 for p, _, _ in layer]
        size = max(float(weights.norm()), min(least) * len(weights) ** 0.5)
        return min(1.0, settings["max_relative_step"] * size / max(float(steps.norm()), 1e-300))

    def check_samples(self) -> None:
        """The gradients of all samples must add up to what autograd found."""
        for family in self.families.values():
            found = self.samples(family)
            weight = family.primary.weight
            if not found or weight.grad is None or id(weight) not in self.group_of:
                continue
            total = torch.stack([s["weight"].sum(0) for s in found]).sum(0)
            torch.testing.assert_close(total, weight.grad, rtol=1e-9, atol=1e-9 * float(weight.grad.abs().max()))


def without_cross_terms(G: Tensor, column: int, shared: bool) -> Tensor:
    """Blocks of [W, b] as if weight and bias had nothing to do with each other."""
    size = G.shape[-1]
    blocks, at = (slice(column // size, column // size + 1), column % size) if shared else (slice(None), size - 1)
    mask = torch.ones(size, size, dtype=G.dtype)
    mask[at, :] = mask[:, at] = 0
    mask[at, at] = 1
    G = copy.deepcopy(G)
    G[blocks] = G[blocks] * mask
    return G
