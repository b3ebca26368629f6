"""The layers that the transformers among the tasks are made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention from four Linear layers, each with its own factors, unlike ``nn.MultiheadAttention``.

    Args:
        width: of a position, a multiple of heads.
        causal: whether a position sees none that come after it.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self._heads, self._causal = heads, causal
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions; x and the result are [N, T, width]."""

        def heads(projection: nn.Module) -> Tensor:
            split: Tensor = projection(x).unflatten(-1, (self._heads, -1))  # [N, T, heads, width / heads]
            return split.transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            heads(self.query), heads(self.key), heads(self.value), is_causal=self._causal
        )
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return result


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm and with a residual connection."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """One layer of the transformer; x and the result are [N, T, width]."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x
