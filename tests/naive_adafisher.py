"""AdaFisher in float64, straight from its formulas, with everything formed that the package never forms.

A second opinion for the tests: it shares no code with the package. Patches are unfolded, tokens become one-hot rows,
the Fisher block of every layer is a Kronecker product in memory. Every use of a weight is written as rows
``a_r = W h_r``, and each step checks those rows against autograd: the sum over rows of ``s_r h_r^T`` must be the
gradient. So what is squared and averaged is what the layer really reads and writes.

Sources: AdaFisher, arXiv 2405.16397, Eq. 3, Eq. 4, Algorithm 1; factors of convolutions, arXiv 1602.01407.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DEFAULTS: dict[str, dict[str, float]] = {
    "paper": {"lr": 3e-3, "damping": 1e-3, "update_interval": 1},
    "release": {"lr": 1e-3, "damping": 1e-3, "update_interval": 100},
    "relative": {"lr": 1.0, "damping": 0.1, "update_interval": 1},
}


def minmax(x: Tensor, eps: float) -> Tensor:
    spread = float(x.max() - x.min())
    if spread <= 1e-5 * float(x.max()):
        return torch.ones_like(x)
    return (x - x.min()) / (spread + eps)


def kron_diagonals(rows: Tensor, columns: Tensor) -> Tensor:
    """diag(rows) (x) diag(columns), as the block over (row, column) that its diagonal is."""
    return torch.kron(rows, columns).reshape(len(rows), len(columns))


# What each layer type does, as rows.


@dataclass
class Rows:
    """One use of a weight: the gradient is the sum over r of s_r h_r^T, group by group."""

    inputs: Tensor  # h [R, G, I]
    outputs: Tensor  # s [R, G, O]


def kind_of(module: nn.Module) -> str | None:
    kinds: dict[str, tuple[type, ...]] = {
        "linear": (nn.Linear,),
        "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        "transposed conv": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        "norm": (
            nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm,
            nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RMSNorm,
        ),
        "embedding": (nn.Embedding,),
    }  # fmt: skip
    if type(module).__name__ == "Conv1D":
        return "transposed linear"
    return next((kind for kind, types in kinds.items() if isinstance(module, types)), None)


ROWS_ARE_INPUTS = ("transposed linear", "transposed conv", "embedding")


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], windows: Sequence[int]
) -> Tensor:
    """What every window of a padded input (N, C, *S) reads: [N, *windows, C, *kernel]."""
    for d, (k, s, step, count) in enumerate(zip(kernel, stride, dilation, windows, strict=True)):
        x = x.unfold(2 + d, step * (k - 1) + 1, s).narrow(2 + d, 0, count)[..., ::step]
    return x.movedim(1, 1 + len(kernel))


def pad(x: Tensor, amounts: Sequence[tuple[int, int]], mode: str) -> Tensor:
    flat = [amount for pair in reversed(amounts) for amount in pair]
    return F.pad(x, flat, mode="constant" if mode == "zeros" else mode)


def conv_rows(module: Any, x: Tensor, grad: Tensor) -> Rows:
    spatial = len(module.kernel_size)
    if x.dim() == spatial + 1:
        x, grad = x.unsqueeze(0), grad.unsqueeze(0)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        amounts = [(total // 2, total - total // 2) for total in totals]
    elif module.padding == "valid":
        amounts = [(0, 0)] * spatial
    else:
        amounts = [(amount, amount) for amount in module.padding]
    x = pad(x, amounts, module.padding_mode)
    unfolded = patches(x, module.kernel_size, module.stride, module.dilation, grad.shape[2:])
    rows = len(x) * math.prod(grad.shape[2:])
    return Rows(unfolded.reshape(rows, module.groups, -1), grad.movedim(1, -1).reshape(rows, module.groups, -1))


def transposed_conv_rows(module: Any, x: Tensor, grad: Tensor) -> Rows:
    spatial = len(module.kernel_size)
    if x.dim() == spatial + 1:
        x, grad = x.unsqueeze(0), grad.unsqueeze(0)
    positions = x.shape[2:]
    # Input position l writes to l * stride + k * dilation - padding wherever the output has such a place.
    reach = [
        n * s + k * d for n, s, k, d in zip(positions, module.stride, module.kernel_size, module.dilation, strict=True)
    ]
    grad = pad(grad, list(zip(module.padding, reach, strict=True)), "zeros")
    unfolded = patches(grad, module.kernel_size, module.stride, module.dilation, positions)
    rows = len(x) * math.prod(positions)
    return Rows(x.movedim(1, -1).reshape(rows, module.groups, -1), unfolded.reshape(rows, module.groups, -1))


def rows_of(module: Any, x: Tensor, grad: Tensor) -> Rows:
    kind = kind_of(module)
    if kind == "conv":
        return conv_rows(module, x, grad)
    if kind == "transposed conv":
        return transposed_conv_rows(module, x, grad)
    if kind == "embedding":
        x = x.flatten()
        h, s = F.one_hot(x, module.num_embeddings).to(grad), grad.reshape(-1, grad.shape[-1])
        if module.padding_idx is not None:
            h, s = h[x != module.padding_idx], s[x != module.padding_idx]
    else:
        h, s = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return Rows(h.unsqueeze(1), s.unsqueeze(1))


def gradient(module: Any, rows: Rows) -> Tensor:
    product = torch.einsum("rgo,rgi->goi", rows.outputs, rows.inputs)
    if kind_of(module) in ROWS_ARE_INPUTS:
        product = product.transpose(1, 2)
    shape: tuple[int, ...] = module.weight.shape
    return product.reshape(shape)


# One layer's factors.

Sums = dict[str, tuple[Tensor, float]]
"""Name -> (sum, number of terms)."""


def batched(module: nn.Module, x: Tensor) -> Tensor:
    """The input or output of a norm, with a batch dimension where an InstanceNorm did without."""
    unbatched = ((nn.InstanceNorm1d, 2), (nn.InstanceNorm2d, 3), (nn.InstanceNorm3d, 4))
    return x.unsqueeze(0) if any(isinstance(module, cls) and x.dim() == dim for cls, dim in unbatched) else x


def norm_sums(module: Any, x: Tensor, grad: Tensor, variant: str) -> Sums:
    x, grad = batched(module, x), batched(module, grad)
    last = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    samples = 1 if last and x.dim() == len(module.normalized_shape) else len(x)
    channels = grad if last else grad.movedim(1, -1)
    sums = {"S": (channels.reshape(-1, module.weight.numel()).sum(0), float(samples))}
    if variant == "release":
        # Its channels are dimension 1, whatever the layer normalises; a lone vector is a batch of one.
        x = x.unsqueeze(0) if x.dim() == 1 else x
        positions = math.prod(x.shape[2:])
        sums["u"] = (x.movedim(1, -1).reshape(-1, x.shape[1]).sum(0) / positions**2, float(samples))
    return sums


def sums_of(module: Any, x: Tensor, grad: Tensor, variant: str) -> Sums:
    if kind_of(module) == "norm":
        return norm_sums(module, x, grad, variant)
    rows = rows_of(module, x, grad)
    count = float(len(rows.inputs))
    sums = {
        "H": (rows.inputs.square().sum(0).flatten(), count),
        "S": (rows.outputs.square().sum(0).flatten(), count),
    }
    if kind_of(module) == "transposed conv" and module.bias is not None:
        channels = grad.movedim(grad.dim() - 1 - len(module.kernel_size), -1).reshape(-1, module.out_channels)
        sums["B"] = (channels.square().sum(0), float(len(channels)))
    return sums


def factors_of(module: Any, sums: Sums, variant: str) -> dict[str, Tensor]:
    if kind_of(module) == "norm":
        total, samples = sums["S"]
        factors = {"S": total.square() / samples}
        if "u" in sums:
            u = sums["u"][0]
            factors["H"] = torch.stack([u.square().sum(), u.new_tensor(float(len(u)))]) / samples**2
        return factors
    factors = {name: total / count for name, (total, count) in sums.items()}
    if kind_of(module) in ("linear", "transposed linear", "conv") and module.bias is not None:
        factors["H"] = torch.cat([factors["H"], factors["H"].new_ones(1)])
    if variant == "release" and kind_of(module) == "conv":
        factors["H"] = factors["H"] / (module.in_channels // module.groups * math.prod(module.kernel_size))
    return factors


def products(module: Any, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """S H for every entry of weight and bias, from one Kronecker product for each group of channels."""
    kind, out = kind_of(module), factors["S"]
    inputs = factors.get("H", out.new_ones(2))  # the paper has 1 for the scale and the shift of a norm
    groups = module.groups if kind in ("conv", "transposed conv") else 1
    if kind == "norm":
        both = kron_diagonals(out, inputs)
        found = {"weight": both[:, 0], "bias": both[:, 1]}
    elif kind in ("transposed conv", "embedding"):
        pairs = zip(inputs.chunk(groups), out.chunk(groups), strict=True)
        found = {"weight": torch.cat([kron_diagonals(h, s) for h, s in pairs])}
        if "B" in factors:
            found["bias"] = kron_diagonals(factors["B"], out.new_ones(1))
    else:
        columns = len(inputs) - (module.bias is not None)
        weights, one = inputs[:columns], inputs[columns:]
        pairs = zip(out.chunk(groups), weights.chunk(groups), strict=True)
        block = torch.cat([kron_diagonals(s, torch.cat([h, one])) for s, h in pairs])
        weight = block[:, : columns // groups]
        found = {"weight": weight.T if kind == "transposed linear" else weight, "bias": block[:, columns // groups :]}
    parameters = {role: getattr(module, role, None) for role in found}
    return {role: found[role].reshape(p.shape) for role, p in parameters.items() if p is not None}


@dataclass
class Site:
    """All uses of one weight in one orientation."""

    owner: Tensor
    kind: str
    modules: list[nn.Module] = field(default_factory=list)
    averages: dict[str, Tensor] = field(default_factory=dict)
    refreshes: int = 0

    @property
    def module(self) -> Any:
        """Of several that share the weight, one with a bias if there is any."""
        return max(self.modules, key=lambda m: getattr(m, "bias", None) is not None)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        for module, role in itertools.product(self.modules, ("weight", "bias")):
            p = module._parameters.get(role)
            if p is not None:
                yield role, p


Use = tuple[Site, nn.Module, Tensor, Tensor]
"""Where it counts, the module, its input and the derivative of its output."""


class NaiveAdaFisher:
    """The optimizer; ``params`` and the hyperparameters as for the package's."""

    def __init__(
        self,
        model: nn.Module,
        *,
        params: Sequence[dict[str, Any]] | None = None,
        decoupled: bool = False,
        **given: Any,
    ) -> None:
        self.decoupled = decoupled
        self.groups: list[dict[str, Any]] = []
        common = {"beta": 0.9, "gamma": 0.8, "eps": 1e-6, "weight_decay": 0.0, "maximize": False}
        for group in params or [{"params": model.parameters()}]:
            own = {**given, **group, "params": list(group["params"])}
            variant = own.setdefault("variant", "paper")
            defaults = {**common, **DEFAULTS[variant], "fallback_curvature": None, "iteration": 0}
            self.groups.append({**defaults, **own})
        self.group_of = {id(p): group for group in self.groups for p in group["params"]}
        self.steps: dict[int, int] = {}
        self.moments: dict[int, Tensor] = {}
        self.sites: dict[tuple[int, bool], Site] = {}
        self.uses: list[tuple[Site, nn.Module, Tensor, Tensor]] = []
        heads = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        for module in model.modules():
            if id(module) not in heads:
                self._watch(module)

    def _watch(self, module: nn.Module) -> None:
        held = [p for role in ("weight", "bias") if (p := module._parameters.get(role)) is not None]
        owner = next((p for p in held if id(p) in self.group_of), None)
        kind = kind_of(module)
        if owner is None or kind is None:
            return
        site = self.sites.setdefault((id(owner), kind in ROWS_ARE_INPUTS), Site(owner, kind))
        site.modules.append(module)

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            if out.requires_grad:
                out.retain_grad()
                self.uses.append((site, module, (args[0] if args else kwargs["input"]).detach(), out))

        module.register_forward_hook(keep, with_kwargs=True)

    def zero_grad(self) -> None:
        self.uses.clear()
        for group in self.groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        # Without the backwards that did not happen, and batches without rows, which have no mean.
        uses = [(site, m, x, out.grad) for site, m, x, out in self.uses if out.grad is not None and x.numel()]
        self.uses.clear()
        check_rows([use for use in uses if id(use[1]._parameters.get("weight")) in self.group_of])
        for site in self.sites.values():
            self._refresh(site, [use for use in uses if use[0] is site])
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
            group["iteration"] += 1

    def _refresh(self, site: Site, uses: Sequence[Use]) -> None:
        group = self.group_of[id(site.owner)]
        # Without statistics it waits for no refresh.
        if (group["iteration"] % group["update_interval"] and site.refreshes) or not uses:
            return
        total: Sums = {}
        for _, module, x, grad in uses:
            for name, (new, count) in sums_of(module, x, grad, group["variant"]).items():
                old, old_count = total.get(name, (new[:0], 0.0))
                # The release sums a LayerNorm's input by position: of sequences of several lengths, up to the longest.
                size = max(len(old), len(new))
                total[name] = F.pad(old, (0, size - len(old))) + F.pad(new, (0, size - len(new))), old_count + count
        site.refreshes += 1
        for name, new in factors_of(site.module, total, group["variant"]).items():
            if group["variant"] == "release":
                average = site.averages.get(name, torch.ones_like(new))
                site.averages[name] = group["gamma"] / 10 * average + group["gamma"] / 100 * minmax(new, group["eps"])
            else:
                average = site.averages.get(name, torch.zeros_like(new))
                site.averages[name] = group["gamma"] * average + (1 - group["gamma"]) * new

    def averages(self, site: Site) -> dict[str, Tensor]:
        """H and S averaged over time, without the bias towards the start where the variant removes it."""
        group = self.group_of[id(site.owner)]
        correction = 1.0 if group["variant"] == "release" else 1 - group["gamma"] ** site.refreshes
        return {name: average / correction for name, average in site.averages.items()}

    def normalised(self, site: Site) -> dict[str, Tensor]:
        """S' and H': what the step multiplies."""
        group, factors = self.group_of[id(site.owner)], self.averages(site)
        if group["variant"] == "paper":
            return {name: minmax(x, group["eps"]) for name, x in factors.items()}
        if group["variant"] == "relative":
            entries = [product.flatten() for product in products(site.module, factors).values()]
            mean = torch.cat(entries).mean()
            if mean == 0:
                return {name: torch.ones_like(x) for name, x in factors.items()}
            return {name: x if name == "H" else x / mean for name, x in factors.items()}
        return factors

    def _tied(self, sites: Sequence[Site]) -> Tensor:
        """S H of a weight that its uses see in different orientations."""
        group = self.group_of[id(sites[0].owner)]
        rows, columns, weights = [], [], []
        for site in sites:
            factors = self.averages(site)
            h, s = factors["H"][: site.module.weight.numel() // len(factors["S"])], factors["S"]
            r, c = (h, s) if site.kind in ROWS_ARE_INPUTS else (s, h)
            weight = r.mean() * c.mean()
            weights.append(weight)
            rows.append(weight * r / r.mean())
            columns.append(weight * c / c.mean())
        row, column = torch.stack(rows).sum(0) / sum(weights), torch.stack(columns).sum(0)
        if group["variant"] == "paper":
            row, column = minmax(row, group["eps"]), minmax(column, group["eps"])
        product = kron_diagonals(row, column)
        return product / product.mean() if group["variant"] == "relative" else product

    def curvature(self, p: Tensor) -> Tensor:
        """F of one parameter, damping included."""
        group = self.group_of[id(p)]
        serving = [(role, site) for site in self.sites.values() for role, q in site.parameters() if q is p]
        known = [(role, site) for role, site in serving if site.refreshes]
        if not serving:
            return torch.full_like(p, self._fallback(group))
        if not known:
            return torch.ones_like(p)
        role, site = known[0]
        if len({at.kind for _, at in serving}) > 1:
            return self._tied([at for _, at in known]).reshape(p.shape) + float(group["damping"])
        return products(site.module, self.normalised(site))[role] + float(group["damping"])

    def _fallback(self, group: dict[str, Any]) -> float:
        if group["fallback_curvature"] is not None:
            return float(group["fallback_curvature"])
        means = []
        for site in self.sites.values():
            if site.refreshes and self.group_of[id(site.owner)] is group:
                factors = self.normalised(site)
                means.append(float(factors["S"].mean()) * (float(factors["H"].mean()) if "H" in factors else 1.0))
        if group["variant"] == "release" or not means:
            return 1.0
        return statistics.median(means) + float(group["damping"])

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        t = self.steps[id(p)] = self.steps.get(id(p), 0) + 1
        g = -p.grad if group["maximize"] else p.grad
        if not self.decoupled:
            g = g + group["weight_decay"] * p
        m = group["beta"] * self.moments.get(id(p), torch.zeros_like(p)) + (1 - group["beta"]) * g
        self.moments[id(p)] = m
        step = m / (1 - group["beta"] ** t) / self.curvature(p)
        if self.decoupled:
            step = step + group["weight_decay"] * p
        p -= group["lr"] * step


def check_rows(uses: Sequence[Use]) -> None:
    """The rows of all uses of a weight must add up to the gradient that autograd found."""
    sums: dict[nn.Parameter, Tensor] = {}
    for site, module, x, grad in uses:
        weight = module._parameters.get("weight")
        if site.kind != "norm" and weight is not None and weight.requires_grad:
            sums[weight] = sums.get(weight, torch.zeros_like(weight)) + gradient(module, rows_of(module, x, grad))
    for weight, total in sums.items():
        assert weight.grad is not None
        torch.testing.assert_close(total, weight.grad, rtol=1e-9, atol=1e-9 * float(weight.grad.abs().max()))
