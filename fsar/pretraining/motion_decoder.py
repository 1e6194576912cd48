"""The motion decoder of FIMA: tokens of one clip attend to those of another, to predict motion."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sine_table(rows: int, channels: int) -> Tensor:
    """Compute the table [rows, channels]: sin(p / 10000^(c/C)) at even channels c, then its cosine.

    Source: Vaswani et al., "Attention is all you need", section 3.5.
    """
    position = torch.arange(rows, dtype=torch.float64)[:, None]
    even = torch.arange(0, channels, 2, dtype=torch.float64)
    angle = position / 10000 ** (even / channels)  # [rows, channels / 2]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


class PositionTable(nn.Module):
    """The sine table as a buffer on the model's device; it grows on demand, and is never saved."""

    table: Tensor

    def __init__(self, channels: int, *, rows: int = 100) -> None:
        super().__init__()
        self.register_buffer("table", sine_table(rows, channels), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Add the codes of their places to tokens [..., P, C]."""
        places, channels = tokens.shape[-2:]
        if places > len(self.table):
            self.table = sine_table(places, channels).to(self.table)
        return tokens + self.table[:places]


class ProjectionHead(nn.Module):
    """Mean over time, then two 1x1 convolutions with a ReLU between them, no norm.

    `net` is the reference's name.
    """

    def __init__(self, channels: int, *, hidden: int = 1024, dim: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, t, h, w] -> [B, D, h, w]."""
        out: Tensor = self.net(maps.mean(dim=2))
        return out


class MotionDecoderLayer(nn.Module):
    """x + Attention(LN x, memory), then x + FF(LN x).

    There is no attention among the queries, and no norm of the memory.
    Modules are named as in published state dicts (ZMHH-H/FIMA), which have no norm1.
    """

    def __init__(self, channels: int, *, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(channels, heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """[N, n, C], [N, m, C] -> [N, n, C]."""
        attended, _ = self.multihead_attn(self.norm2(x), memory, memory, need_weights=False)
        x = x + self.dropout(attended)
        hidden = self.dropout(F.relu(self.linear1(self.norm3(x))))
        out: Tensor = x + self.dropout(self.linear2(hidden))
        return out


class MotionDecoder(nn.Module):
    """Layers of cross-attention: each output depends only on its own query and the memory."""

    def __init__(
        self, channels: int = 512, *, heads: int = 4, hidden: int = 512, depth: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MotionDecoderLayer(channels, heads=heads, hidden=hidden, dropout=dropout) for _ in range(depth)
        )

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """[N, n, C], [N, m, C] -> [N, n, C]."""
        for layer in self.layers:
            queries = layer(queries, memory)
        return queries
