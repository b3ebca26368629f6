"""K-FAC, EKFAC and Adam in their basis in float64, straight from the formulas, with every Fisher block formed.

A second opinion for the tests: it shares no code with the package. What a position of a convolution reads comes from a
convolution whose weight is the identity, what a position of a transposed one makes from the derivative of one, so no
geometry is written down. The Fisher block of a matrix is the Kronecker product itself, and directions come from solving
with it. Blocks of other layers are made of the gradients of samples, as in ``tests/naive_mbf.py``.

A basis cannot be told from another that spans the same eigenspaces, so it is taken from the optimizer that is tested,
after a check that it is one of eigenvectors of the factors that are formed here.

Sources: Martens and Grosse, arXiv 1503.05671; Grosse and Martens, arXiv 1602.01407; George et al., arXiv 1806.03884.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.naive_mbf import (
    Use,
    fan_in,
    is_conv,
    is_conv1d,
    is_matrix,
    is_norm,
    is_transposed_conv,
    sample_gradients,
    single,
)

DEFAULTS: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "beta1": 0.9,
    "damping": 1e-3,
    "kl_clip": 1e-3,
    "max_relative_step": 0.02,
    "floor": 0.3,
    "beta2": 0.95,
    "update_interval": 1,
    "inverse_interval": 1,
    "overlap": False,
    "max_factor_size": 4096,
    "sequence": "expand",
    "loss_reduction": "mean",
    "others": "adam",
    "others_lr": 0.1,
    "weight_decay": 0.0,
    "decoupled": True,
    "maximize": False,
}
EPS = 1e-8

Sides = tuple[Tensor, Tensor]
"""What rows and columns of one matrix meet, each (samples, positions, n)."""


def identity_like(module: Any, count: int, channels: int) -> Tensor:
    """A weight that hands on every channel and offset of a window by itself."""
    return torch.eye(count, dtype=torch.float64).reshape(count, channels, *module.kernel_size)


def sides_of(use: Use, sequence: str) -> list[Sides]:
    """For each matrix (group) of a layer; columns with a 1 for the bias where it is one of them."""
    module, x, s = use.module, use.x, use.s
    if is_matrix(module):
        if sequence == "reduce" and x.dim() > 2:
            x = x.flatten(1, -2).mean(1)
            s = s.flatten(1, -2).sum(1)
        x, s = x.reshape(-1, 1, x.shape[-1]), s.reshape(-1, 1, s.shape[-1])
        return [(s, with_one(x) if module.bias is not None else x)]
    if single(module, x):
        x, s = x.unsqueeze(0), s.unsqueeze(0)
    spatial = len(module.kernel_size)
    inputs, outputs = x.shape[1] // module.groups, s.shape[1] // module.groups
    found = []
    for g in range(module.groups):
        h, d = x[:, g * inputs : (g + 1) * inputs], s[:, g * outputs : (g + 1) * outputs]
        common = {"stride": module.stride, "dilation": module.dilation}
        if is_transposed_conv(module):
            count = outputs * math.prod(module.kernel_size)
            weight = identity_like(module, count, outputs)
            probe = torch.zeros(len(x), count, *x.shape[2:], dtype=x.dtype, requires_grad=True)
            function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
            extent = [
                (n - 1) * st - 2 * p + dl * (k - 1) + 1
                for n, st, p, dl, k in zip(
                    x.shape[2:], module.stride, module.padding, module.dilation, module.kernel_size, strict=True
                )
            ]
            extra = [have - need for have, need in zip(d.shape[2:], extent, strict=True)]
            made = function(probe, weight, padding=module.padding, output_padding=extra, **common)
            (windows,) = torch.autograd.grad(made, probe, d)
            found.append((positions(h), positions(windows)))
        else:
            count = inputs * math.prod(module.kernel_size)
            padding = module.padding
            if module.padding_mode != "zeros":
                h, padding = F.pad(h, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
            function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
            windows = positions(function(h, identity_like(module, count, inputs), padding=padding, **common))
            found.append((positions(d), with_one(windows) if module.bias is not None else windows))
    return found


def positions(x: Tensor) -> Tensor:
    """(samples, channels, sizes...) as (samples, positions, channels)."""
    return x.flatten(2).transpose(1, 2)


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def terms_of(use: Use, output: Tensor | None) -> int:
    """Rows of the model's output that have a derivative, and of the last layer's where these are the same numbers."""
    module, s = use.module, use.s
    if output is not None and output.grad is not None and output.numel() != s.numel():
        d = output.grad
        if d.dim() > 2:
            last = is_matrix(module) or isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.Embedding))
            d = (d if last else d.movedim(1, -1)).flatten(0, -2)
        return int((d.reshape(len(d), -1) != 0).any(1).sum())
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        rows = s.reshape(-1, math.prod(module.normalized_shape))
    elif is_matrix(module) or isinstance(module, nn.Embedding):
        rows = s.reshape(-1, s.shape[-1])
    else:
        s = s.unsqueeze(0) if single(module, use.x) else s
        rows = s.transpose(0, 1).flatten(1).T
    return int((rows != 0).any(1).sum())


def as_matrices(weight: Tensor, module: Any) -> list[Tensor]:
    """A weight of a layer with factors as one matrix for each group."""
    if is_conv1d(module):
        return [weight.T]
    if is_matrix(module):
        return [weight]
    return list(weight.flatten(1).chunk(module.groups))


def from_matrices(matrices: Sequence[Tensor], module: Any) -> Tensor:
    whole = matrices[0].T if is_conv1d(module) else torch.cat(list(matrices))
    return whole.reshape(module.weight.shape)


@dataclass
class Block:
    """What one layer, or one parameter, is stepped with.

    ``kind`` is "factors" of a weight and maybe its bias, "block" of each channel, "single" numbers, or "fallback".
    """

    kind: str
    params: dict[str, Tensor]
    modules: list[Any]
    group: dict[str, Any]
    averages: list[list[Tensor]] = field(default_factory=list)  # for each matrix its two factors; or one of blocks
    inverted: list[list[Tensor]] = field(default_factory=list)
    coming: list[list[Tensor]] = field(default_factory=list)  # what is inverted from the next turn on
    bases: list[list[Tensor]] = field(default_factory=list)
    moments: list[Tensor] = field(default_factory=list)
    updates: int = 0
    moment_updates: int = 0
    changed: bool = False

    @property
    def owner(self) -> Tensor:
        return next(iter(self.params.values()))


class NaiveKFAC:
    """The optimizer; ``params`` and the hyperparameters as for the package's. Call ``backward_done`` after each.

    Args:
        method: ``"kfac"``, ``"ekfac"`` or ``"adam"``.
        bases: owner's place among the parameters -> (row basis, column basis) of the optimizer that is tested.
    """

    def __init__(
        self, model: nn.Module, method: str = "kfac", *, params: Sequence[dict[str, Any]] | None = None, **given: Any
    ) -> None:
        self.method = method
        self.groups: list[dict[str, Any]] = []
        for group in params or [{"params": model.parameters()}]:
            self.groups.append({**DEFAULTS, **given, **group, "params": list(group["params"]), "iteration": 0})
        self.group_of = {id(p): group for group in self.groups for p in group["params"]}
        self.fans = {id(p): fan_in(model, p) for group in self.groups for p in group["params"]}
        self.first: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}
        self.squares: dict[int, Tensor] = {}
        self.uses: list[Use] = []
        self.terms = 0
        self.listening = True
        self.scale = 1.0
        self.caps: list[float] = []
        self.blocks = list(self._blocks(model))
        beside = [b for b in self.blocks if self.method != "adam" and self.by_adam(b)]
        self.free = {id(p) for block in beside for p in block.params.values()}  # no bound counts their steps
        self.output: Tensor | None = None
        model.register_forward_hook(self._keep_output)

    def _keep_output(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.listening and isinstance(output, Tensor) and output.requires_grad:
            output.retain_grad()
            self.output = output

    def _blocks(self, model: nn.Module) -> Iterator[Block]:
        served: set[int] = set()
        by_weight: dict[int, list[Any]] = {}
        for module in model.modules():
            known = is_matrix(module) or is_conv(module) or is_norm(module) or isinstance(module, nn.Embedding)
            weight = module._parameters.get("weight")
            if known and weight is not None:
                by_weight.setdefault(id(weight), []).append(module)
                module.register_forward_hook(self._keep, with_kwargs=True)
        for modules in by_weight.values():
            primary = modules[0]
            params = {"weight": primary.weight}
            for n, module in enumerate(modules):
                if module.bias is not None if hasattr(module, "bias") else False:
                    params[f"bias{n or ''}"] = module.bias
            params = {role: p for role, p in params.items() if id(p) in self.group_of}
            if not params:
                continue
            served.update(map(id, params.values()))
            group = self.group_of[id(next(iter(params.values())))]
            if is_transposed_conv(primary):
                if "weight" in params:
                    yield Block("factors", {"weight": primary.weight}, modules, group)
                if "bias" in params:
                    yield Block("single", {"bias": primary.bias}, modules, self.group_of[id(primary.bias)])
            elif is_matrix(primary) or is_conv(primary):
                yield Block("factors", params, modules, group)
            elif is_norm(primary):
                yield Block("block", params, modules, group)
            else:
                yield Block("single", params, modules, group)
        for group in self.groups:
            for p in group["params"]:
                if id(p) not in served:
                    yield Block("fallback", {"weight": p}, [], group)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        if self.listening and out.requires_grad:
            out.retain_grad()
            arguments = {name: value for name, value in kwargs.items() if name != "input"}
            self.uses.append(Use(module, (args[0] if args else kwargs["input"]).detach(), arguments, out))

    # Statistics.

    def zero_grad(self) -> None:
        self.uses.clear()
        self.terms = 0
        for group in self.groups:
            for p in group["params"]:
                p.grad = None

    def backward_done(self) -> None:
        """The last layer that was used says how many terms this backward had."""
        new = [use for use in self.uses if use.backward < 0 and use.out.grad is not None]
        for use in new:
            use.backward = 0
        if new:
            self.terms += terms_of(new[-1], self.output)

    def by_adam(self, block: Block) -> bool:
        """Whether Adam steps it, element by element."""
        if self.method == "adam" or block.kind == "factors":
            return block.kind != "factors"
        beside = bool(block.modules) and is_transposed_conv(block.modules[0])  # the bias of one
        return bool(block.group["others"] == "adam") and not beside

    def _mean(self, block: Block) -> bool:
        return bool(block.group["loss_reduction"] == "mean")

    def _new(self, block: Block) -> list[list[Tensor]]:
        uses = [use for use in self.uses if use.out.grad is not None and use.module in block.modules and use.s.numel()]
        units = self.terms if self._mean(block) else 1 / self.terms
        if block.kind == "fallback":
            g = block.owner.grad
            return [] if g is None else [[units * g.square()]]
        if not uses:
            return []
        if block.kind in ("block", "single"):
            samples = [sample_gradients(use, False) for use in uses]
            roles = list(block.params)
            if block.kind == "single":
                return [[units * sum(s[roles[0]].square().sum(0) for s in samples)]]
            parts = [torch.stack([s[role].flatten(1) for role in roles], -1) for s in samples]
            return [[units * sum(torch.einsum("nci,ncj->cij", v, v) for v in parts)]]
        wide = [sides_of(use, block.group["sequence"]) for use in uses]
        biased = any(use.module.bias is not None for use in uses) and not is_transposed_conv(block.modules[0])
        factors = []
        for g in range(len(wide[0])):
            rows = [use[g][0].flatten(0, 1) for use in wide]
            columns = [pad_bias(use[g][1].flatten(0, 1), biased, u) for use, u in zip(wide, uses, strict=True)]
            count = sum(len(r) for r in rows)
            made, read = (columns, rows) if is_transposed_conv(block.modules[0]) else (rows, columns)
            scale = self.terms**2 / count if self._mean(block) else 1 / count
            G, A = scale * gram(made), gram(read) / self.terms
            pair = [A, G] if is_transposed_conv(block.modules[0]) else [G, A]
            limit = block.group["max_factor_size"]
            factors.append([f.diagonal().diag_embed() if len(f) > limit else f for f in pair])
        return factors

    def _new_moments(self, block: Block) -> list[Tensor]:
        """Squares of the gradients of samples in the basis."""
        uses = [use for use in self.uses if use.out.grad is not None and use.module in block.modules and use.s.numel()]
        units = self.terms if self._mean(block) else 1 / self.terms
        biased = any(use.module.bias is not None for use in uses) and not is_transposed_conv(block.modules[0])
        found = []
        for g, (left, right) in enumerate(block.bases):
            total = torch.zeros(len(left), len(right), dtype=torch.float64)
            for use in uses:
                rows, columns = sides_of(use, block.group["sequence"])[g]
                columns = pad_bias(columns, biased, use)
                for r, c in zip(rows, columns, strict=True):
                    total += (left.T @ (r.T @ c) @ right).square()
            found.append(units * total)
        return found

    def refresh(self) -> None:
        due = [b for b in self.blocks if b.group["iteration"] % b.group["update_interval"] == 0 or not b.updates]
        any_layer = any(use.out.grad is not None for use in self.uses)
        layers = [b for b in self.blocks if b.kind != "fallback"]
        for block in due:
            if self.by_adam(block) or not (any_layer or not layers):
                continue
            new = self._new(block)
            if not new:
                continue
            block.updates += 1
            decay = min(1 - 1 / block.updates, block.group["beta2"])
            old = block.averages or new
            block.averages = [
                [decay * a + (1 - decay) * b for a, b in zip(x, y, strict=True)] for x, y in zip(old, new, strict=True)
            ]
            block.changed = True
            if self.method == "ekfac" and block.bases:
                block.moment_updates += 1
                decay = min(1 - 1 / block.moment_updates, block.group["beta2"])
                block.moments = [
                    decay * a + (1 - decay) * b for a, b in zip(block.moments, self._new_moments(block), strict=True)
                ]

    def coupled(self, block: Block) -> bool:
        live = [p for p in block.params.values() if p.grad is not None]
        return len(live) == len(block.params) == 2 and len({id(self.group_of[id(p)]) for p in live}) == 1

    def has_bias_column(self, block: Block) -> bool:
        first = block.modules[0]
        return not is_transposed_conv(first) and any(m.bias is not None for m in block.modules)

    def factors_apart(self, block: Block) -> list[list[Tensor]]:
        """The averages, without what weight and bias have in common where they are stepped apart."""
        if self.coupled(block) or not self.has_bias_column(block):
            return block.averages
        found = []
        for rows, columns in block.averages:
            columns = columns.clone()
            corner = columns[-1, -1].clone()
            columns[-1, :] = columns[:, -1] = 0
            columns[-1, -1] = corner
            found.append([rows, columns])
        return found

    def invert(self, bases: dict[int, tuple[Tensor, Tensor]]) -> None:
        for n, block in enumerate(self.blocks):
            due = block.group["iteration"] % block.group["inverse_interval"] == 0
            if due and block.coming:
                block.inverted, block.coming = block.coming, []
                self.make(block, bases.get(n), first=False)
            if not block.changed or not (due or not block.inverted):
                continue
            block.changed = False
            now = self.factors_apart(block) if block.kind == "factors" else block.averages
            if block.group["overlap"] and block.inverted:
                block.coming = now
            else:
                first, block.inverted = not block.inverted, now
                self.make(block, bases.get(n), first)

    def make(self, block: Block, basis: tuple[Tensor, Tensor] | None, first: bool) -> None:
        """What is made of the factors that are inverted now."""
        if block.kind == "factors" and self.method != "kfac":
            assert basis is not None
            self.turn(block, basis, first)

    def turn(self, block: Block, basis: tuple[Tensor, Tensor], first: bool) -> None:
        """Take over a basis after a check that it is one, and move second moments to it."""
        new = [[matrix(b[g]) for b in basis] for g in range(len(block.inverted))]
        apart = self.has_bias_column(block) and not self.coupled(block)
        for vectors, factors in zip(new, block.inverted, strict=True):
            for side, (Q, f) in enumerate(zip(vectors, factors, strict=True)):
                turned = Q.T @ (scaled(f[:-1, :-1], 1.0) if side and apart else scaled(f)) @ Q
                torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q), dtype=Q.dtype), rtol=0, atol=1e-12)
                torch.testing.assert_close(turned, turned.diagonal().diag_embed(), rtol=0, atol=1e-10)
        if self.method == "ekfac" and first:
            block.moment_updates = 1
            block.moments = [
                torch.outer((G.T @ f @ G).diagonal().clamp(min=0), (A.T @ a @ A).diagonal().clamp(min=0))
                for (G, A), (f, a) in zip(new, block.inverted, strict=True)
            ]
        elif block.moments:
            old = block.bases or [[torch.eye(n, dtype=torch.float64) for n in m.shape] for m in block.moments]
            block.moments = [
                (G.T @ oldG).square() @ V @ (A.T @ oldA).square().T
                for (G, A), (oldG, oldA), V in zip(new, old, block.moments, strict=True)
            ]
        block.bases = new

    # Step.

    def to_matrices(self, block: Block, values: dict[int, Tensor]) -> list[Tensor]:
        primary = block.modules[0]
        weight = values.get(id(primary.weight), torch.zeros_like(primary.weight))
        matrices = as_matrices(weight, primary)
        if not self.has_bias_column(block):
            return matrices
        biases = [p for role, p in block.params.items() if role.startswith("bias")]
        bias = values.get(id(biases[0])) if biases else None
        bias = torch.zeros(sum(len(m) for m in matrices), dtype=weight.dtype) if bias is None else bias
        parts = bias.chunk(len(matrices))
        return [torch.cat([m, b[:, None]], 1) for m, b in zip(matrices, parts, strict=True)]

    def from_matrices(self, block: Block, matrices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        primary, biased = block.modules[0], self.has_bias_column(block)
        body = [m[:, :-1] for m in matrices] if biased else matrices
        if "weight" in block.params:
            yield block.params["weight"], from_matrices(body, primary)
        for role, p in block.params.items():
            if role.startswith("bias"):
                yield p, torch.cat([m[:, -1] for m in matrices])

    def solve(self, block: Block, values: dict[int, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """F^-1 of the values of a block's parameters."""
        damping = block.group["damping"]
        if block.kind != "factors":
            roles = {role: p for role, p in block.params.items() if id(p) in values}
            if not block.inverted:
                yield from ((p, values[id(p)]) for p in roles.values())
            elif block.kind in ("single", "fallback"):
                for p in roles.values():
                    yield p, values[id(p)] / (block.inverted[0][0].reshape(p.shape) + damping)
            else:
                blocks = block.inverted[0][0]
                if not self.coupled(block) and len(block.params) == 2:
                    blocks = torch.diag_embed(blocks.diagonal(dim1=1, dim2=2))
                some = next(iter(roles.values()))
                zero = torch.zeros_like(values[id(some)])
                v = torch.stack([values.get(id(p), zero).flatten() for p in block.params.values()], -1)
                eye = torch.eye(v.shape[-1], dtype=v.dtype)
                d = torch.linalg.solve(blocks + damping * eye, v.unsqueeze(-1)).squeeze(-1)
                for i, p in enumerate(block.params.values()):
                    if id(p) in values:
                        yield p, d[:, i].reshape(p.shape)
            return
        matrices = self.to_matrices(block, values)
        if self.method == "kfac":
            directions = matrices
            if block.inverted:
                directions = [dense_solve(G, A, damping, m) for (G, A), m in zip(block.inverted, matrices, strict=True)]
        elif not block.bases and self.method == "ekfac":
            directions = matrices
        else:
            directions = self._in_basis(block, matrices)
        yield from ((p, d) for p, d in self.from_matrices(block, directions) if id(p) in values)

    def _in_basis(self, block: Block, matrices: list[Tensor]) -> list[Tensor]:
        damping, beta2 = block.group["damping"], block.group["beta2"]
        bases = block.bases or [[torch.eye(n, dtype=torch.float64) for n in m.shape] for m in matrices]
        if self.method == "ekfac":
            scales = [V + damping for V in block.moments]
        else:
            filled = [V / (1 - beta2**block.moment_updates) for V in block.moments]
            mean = sum(float(V.sum()) for V in filled) / sum(V.numel() for V in filled)
            scales = [(V + damping * mean + 1e-16).sqrt() for V in filled]
        return [G @ ((G.T @ m @ A) / scale) @ A.T for (G, A), m, scale in zip(bases, matrices, scales, strict=True)]

    def observe(self, block: Block, gradients: dict[int, Tensor]) -> None:
        """Second moments of Adam."""
        if block.kind != "factors":
            return
        matrices = self.to_matrices(block, gradients)
        bases = block.bases or [[torch.eye(n, dtype=torch.float64) for n in m.shape] for m in matrices]
        old = block.moments or [torch.zeros_like(m) for m in matrices]
        beta2 = block.group["beta2"]
        block.moments = [
            beta2 * V + (1 - beta2) * (G.T @ m @ A).square() for V, (G, A), m in zip(old, bases, matrices, strict=True)
        ]
        block.moment_updates += 1

    def layers(self, moving: dict[int, Tensor]) -> Iterator[list[Tensor]]:
        """What the cap takes together."""
        for block in self.blocks:
            members = [p for p in block.params.values() if id(p) in moving]
            if self.by_adam(block) or (block.kind == "block" and not self.coupled(block)):
                yield from ([p] for p in members)
            elif members:
                yield members

    @torch.no_grad()
    def step(self, bases: dict[int, tuple[Tensor, Tensor]] | None = None) -> None:
        self.listening = False
        self.backward_done()
        with torch.enable_grad():
            self.check_sides()
            self.refresh()
        self.invert(bases or {})
        self.listening = True
        self.uses.clear()
        self.terms = 0
        gradients: dict[int, Tensor] = {}
        vectors: dict[int, Tensor] = {}
        for group in self.groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                g = g if group["decoupled"] else g + group["weight_decay"] * p
                gradients[id(p)] = g
                old = self.first.get(id(p), torch.zeros_like(p))
                self.counts[id(p)] = self.counts.get(id(p), 0) + 1
                if self.method == "adam":
                    self.first[id(p)] = group["beta1"] * old + (1 - group["beta1"]) * g
                    vectors[id(p)] = self.first[id(p)] / (1 - group["beta1"] ** self.counts[id(p)])
                else:
                    self.first[id(p)] = vectors[id(p)] = group["momentum"] * old + g
        directions = self.directions(gradients, vectors)
        assert directions.keys() == gradients.keys()
        self.scale = self.trust(directions, vectors)
        self.caps = []
        for layer in self.layers(gradients):
            free = id(layer[0]) in self.free
            scale = 1.0 if free else self.scale * self.cap(layer, directions)
            for p in layer:
                group = self.group_of[id(p)]
                decay = group["weight_decay"] * p if group["decoupled"] else 0.0
                rate = group["others_lr"] * group["lr"] if free else group["lr"]
                p -= rate * (scale * directions[id(p)] + decay)
        for group in self.groups:
            group["iteration"] += 1

    def directions(self, gradients: dict[int, Tensor], vectors: dict[int, Tensor]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for block in self.blocks:
            mine = {id(p): gradients[id(p)] for p in block.params.values() if id(p) in gradients}
            if not mine:
                continue
            if self.by_adam(block):
                for key, g in mine.items():
                    group, n = self.group_of[key], self.counts[key]
                    old = self.squares.get(key, torch.zeros_like(g))
                    self.squares[key] = group["beta2"] * old + (1 - group["beta2"]) * g.square()
                    filled = self.squares[key] / (1 - group["beta2"] ** n)
                    if self.method == "adam":
                        found[key] = vectors[key] / (filled + group["damping"] * filled.mean() + 1e-16).sqrt()
                    else:  # the momentum is a sum, of which an average is 1 - momentum
                        mean = (1 - group["momentum"]) * vectors[key] / (1 - group["momentum"] ** n)
                        found[key] = mean / (filled.sqrt() + EPS)
                continue
            if self.method == "adam":
                self.observe(block, mine)
            found.update({id(p): d for p, d in self.solve(block, {key: vectors[key] for key in mine})})
        return found

    def trust(self, directions: dict[int, Tensor], vectors: dict[int, Tensor]) -> float:
        total = 0.0
        for key, d in directions.items():
            if self.method != "adam" and key not in self.free and self.group_of[key]["kl_clip"] is not None:
                total += self.group_of[key]["lr"] ** 2 * float((d * vectors[key]).sum())
        clip = self.groups[0]["kl_clip"]
        if self.method == "adam" or clip is None or abs(total) <= clip:
            return 1.0
        return float((clip / abs(total)) ** 0.5)

    def cap(self, layer: list[Tensor], directions: dict[int, Tensor]) -> float:
        group = self.group_of[id(layer[0])]
        limit = group["max_relative_step"]
        if limit is None:
            return 1.0
        size = math.sqrt(sum(float(p.square().sum()) for p in layer))
        least = min(self.group_of[id(p)]["floor"] / math.sqrt(self.fans[id(p)]) for p in layer)
        size = max(size, least * math.sqrt(sum(p.numel() for p in layer)))
        lengths = [self.group_of[id(p)]["lr"] ** 2 * float(directions[id(p)].square().sum()) for p in layer]
        step = self.scale * math.sqrt(sum(lengths))
        self.caps.append(min(1.0, limit * size / step) if step else 1.0)
        return self.caps[-1]

    def check_sides(self) -> None:
        """What rows and columns meet must give the gradient that autograd found."""
        for block in self.blocks:
            uses = [u for u in self.uses if u.out.grad is not None and u.module in block.modules and u.s.numel()]
            weight = block.params.get("weight")
            if block.kind != "factors" or weight is None or weight.grad is None or not uses:
                continue
            total = torch.zeros_like(weight)
            for use in uses:
                pairs = [
                    (r, c[..., :-1] if use.module.bias is not None and not is_transposed_conv(use.module) else c)
                    for r, c in sides_of(use, "expand")
                ]
                total += from_matrices([torch.einsum("ntr,ntc->rc", r, c) for r, c in pairs], use.module)
            torch.testing.assert_close(total, weight.grad, rtol=1e-9, atol=1e-9 * float(weight.grad.abs().max()))


def scaled(factor: Tensor, corner: float | None = None) -> Tensor:
    """A factor of mean eigenvalue 1; with a corner of its own."""
    size = float(factor.diagonal().mean()) if len(factor) else 0.0
    body = factor / (size or 1.0)
    return body if corner is None else torch.block_diag(body, torch.tensor([[corner]], dtype=factor.dtype))


def gram(parts: Sequence[Tensor]) -> Tensor:
    rows = torch.cat(list(parts))
    return rows.T @ rows


def matrix(basis: Tensor) -> Tensor:
    """A basis; that of a diagonal factor is the identity."""
    return torch.eye(len(basis), dtype=basis.dtype) if basis.dim() == 1 else basis


def pad_bias(columns: Tensor, biased: bool, use: Use) -> Tensor:
    """Columns with a zero for a bias that this use does not have."""
    return F.pad(columns, (0, 1)) if biased and use.module.bias is None else columns


def dense_solve(G: Tensor, A: Tensor, damping: float, m: Tensor) -> Tensor:
    """The whole Fisher block of a matrix, with its share of the damping on each factor, applied to m."""
    g, a = float(G.diagonal().mean()), float(A.diagonal().mean())
    pi = math.sqrt(a / g) if a > 0 and g > 0 else 1.0
    G = G + math.sqrt(damping) / pi * torch.eye(len(G), dtype=G.dtype)
    A = A + math.sqrt(damping) * pi * torch.eye(len(A), dtype=A.dtype)
    return torch.linalg.solve(torch.kron(G, A), m.reshape(-1)).reshape(m.shape)
