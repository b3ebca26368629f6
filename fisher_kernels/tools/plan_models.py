"""Published architectures, as large as they are: what a plan needs to know of a model are its shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels.tools import user_model
from fisher_kernels.tools.user_model import UserModel


class _DecoderBlock(nn.Module):
    """Its rotation of positions, which has no parameters and sends nothing, is left out."""

    def __init__(self, width: int, kv_width: int, hidden: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.attention_norm, self.norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, kv_width, bias=False)
        self.v, self.out = nn.Linear(width, kv_width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (layer(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


class Decoder(nn.Module):
    """A language model of one stack of blocks."""

    def __init__(self, tokens: int, blocks: int, width: int, kv_width: int, hidden: int, head: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(_DecoderBlock(width, kv_width, hidden, head) for _ in range(blocks))
        self.norm, self.out = nn.RMSNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.out(self.norm(x))
        return out


class _VisionBlock(nn.Module):
    def __init__(self, width: int, hidden: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, 3, self.head)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(*heads.unbind(-2))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


class VisionTransformer(nn.Module):
    """Without positions and class token, whose numbers are few."""

    def __init__(self, blocks: int, width: int, hidden: int, head: int, patch: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(_VisionBlock(width, hidden, head) for _ in range(blocks))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.out(self.norm(x).mean(1))
        return out


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    layers = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)
    return nn.Sequential(*layers)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.first, self.second = _convolution(inputs, width, 1), _convolution(width, width, 3, stride)
        self.third = _convolution(width, outputs, 1)
        self.across = _convolution(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))) + self.across(x))


class ResNet50(nn.Module):
    """53 convolutions, each with BatchNorm, and a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _convolution(3, 64, 7, 2)
        self.blocks, inputs = nn.ModuleList(), 64
        for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for block in range(blocks):
                self.blocks.append(_Bottleneck(inputs, width, 2 if block == 0 and width > 64 else 1))
                inputs = 4 * width
        self.out = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.first(x)), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.out(x.mean((2, 3)))
        return out


def cross_entropy(output: Tensor) -> Tensor:
    """Of some labels or other."""
    rows = output.flatten(0, -2).float()
    return F.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.int64))


def by_heads(columns: Iterable[str], rows: Iterable[str], ends: Iterable[str]) -> Mapping[str, Any]:
    """How tensor parallel training divides a transformer here: each process has some of the heads and hidden features.

    Args:
        columns, rows: layers of the blocks that are divided by what they make, and by what they take.
        ends: others that are divided by what they make, which all processes then get.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    plan: dict[str, Any] = {f"blocks.*.{name}": ColwiseParallel() for name in columns}
    plan |= {f"blocks.*.{name}": RowwiseParallel() for name in rows}
    plan |= {name: ColwiseParallel(output_layouts=Replicate()) for name in ends}
    return plan


def llama_8b(batch: int, seq_len: int) -> UserModel:
    """A decoder of 32 blocks of width 4096, as Llama 3 8B has them: 8.03e9 parameters."""
    tokens = torch.zeros(batch, seq_len, dtype=torch.int64)
    divided = by_heads(("q", "k", "v", "gate", "up"), ("out", "down"), ("embed", "out"))
    return UserModel(Decoder(128256, 32, 4096, 1024, 14336, 128), tokens, cross_entropy, divided)


def vit_l(batch: int) -> UserModel:
    """A vision transformer of 24 blocks of width 1024, as ViT-L/16 has them: 3.04e8 parameters."""
    model = VisionTransformer(24, 1024, 4096, 64, 16, 1000)
    divided = by_heads(("qkv", "up"), ("out", "down"), ("out",))
    return UserModel(model, torch.zeros(batch, 3, 224, 224), cross_entropy, divided)


def resnet50(batch: int) -> UserModel:
    """ResNet-50: 2.56e7 parameters."""
    return UserModel(ResNet50(), torch.zeros(batch, 3, 224, 224), cross_entropy, None)


class Published(NamedTuple):
    """A model of this list.

    Attributes:
        make: batch size, and length of the sequences if it has some -> the model with what a step takes.
        batch: samples of each process, if nobody says.
        seq_len: tokens in each; None for what has no sequences.
        heads: among how many processes its layers can be divided, or a divisor of that many.
    """

    make: Callable[..., UserModel]
    batch: int
    seq_len: int | None
    heads: int | None


MODELS: Mapping[str, Published] = {
    "llama-8b": Published(llama_8b, 1, 4096, 8),
    "vit-l": Published(vit_l, 32, None, 16),
    "resnet50": Published(resnet50, 32, None, None),
}


def find(target: str, batch: int | None = None, seq_len: int | None = None, tensor: int | None = None) -> UserModel:
    """A model of ``MODELS``, or what a user's function makes; parameters are where the caller's modes put them.

    Args:
        batch, seq_len: samples of each process, and tokens in each; of a user's model the example inputs say so.
        tensor: among how many processes its layers are to be divided, if they are.

    Raises:
        ValueError: there is no such model or function, or it has no such sizes.
    """
    if target not in MODELS:
        if ":" not in target:
            raise ValueError(f"is {target!r}, expected {', '.join(MODELS)} or PACKAGE.MODULE:FUNCTION")
        if batch is not None or seq_len is not None:
            raise ValueError("is a function whose example inputs say how large a batch is: no --batch and no --seq-len")
        found = user_model.load(target)
        if found.inputs is None:
            raise ValueError(f"{target} returned a model alone, expected (model, example inputs): a plan makes a step")
        if tensor is not None and found.plan is None:
            raise ValueError(
                f"{target} does not say how its layers are divided, expected (model, example inputs, loss, plan), the "
                "last as parallelize_module takes it, or --parallel hsdp"
            )
        return found
    model = MODELS[target]
    if seq_len is not None and model.seq_len is None:
        raise ValueError(f"{target} has no sequences, expected no --seq-len")
    if tensor is not None and (model.heads is None or model.heads % tensor):
        if model.heads is None:
            raise ValueError(f"{target} has no plan for tensor parallel training, expected --parallel hsdp")
        raise ValueError(f"{target} cannot be divided by {tensor}, expected a divisor of {model.heads}, its heads")
    sizes = [batch or model.batch] + ([] if model.seq_len is None else [seq_len or model.seq_len])
    return model.make(*sizes)
