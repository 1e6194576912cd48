"""Layers that several methods share: the position code of tokens, and attention within a video."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from shards_spec.errors import ConfigError


class PositionCode(nn.Module):
    """Tokens times sqrt(C / A), plus B times the position table; `scale` is (A, B).

    The table has `rows` rows, and grows when a video has more tokens.
    """

    table: Tensor

    def __init__(self, channels: int, *, rows: int, scale: tuple[float, float], dropout: float) -> None:
        super().__init__()
        self.token_scale = math.sqrt(channels / scale[0])
        self.table_scale = scale[1]
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("table", position_table(rows, channels), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[V, n, C] -> [V, n, C]."""
        steps, channels = tokens.shape[1:]
        if steps > len(self.table):
            self.table = position_table(steps, channels).to(self.table)
        out: Tensor = self.dropout(tokens * self.token_scale + self.table_scale * self.table[:steps])
        return out


def position_table(rows: int, channels: int) -> Tensor:
    """Compute the table [rows, C]: sin(p / 10000^(2i/C)) at even i, the cosine at odd i.

    The exponent runs over channel numbers, not over pairs of them, so this is not the usual table.
    The reference code (alibaba-mmai-research/MoLo, HyRSM) does it so, and trained weights depend on
    it.
    """
    channel = torch.arange(channels, dtype=torch.float64)
    position = torch.arange(rows, dtype=torch.float64)[:, None]
    angle = position / 10000 ** (2 * channel / channels)  # [rows, channels]
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


class TemporalTransformer(nn.Module):
    """One layer of self-attention over the tokens of a video and a feed-forward part, then ReLU.

    As in the reference code (alibaba-mmai-research/MoLo), a LayerNorm stands before the attention
    and none before the feed-forward part. `hidden_dropout=None` leaves that part out, as HyRSM
    does.

    Raises:
        ConfigError: `heads` does not divide `channels`.
    """

    def __init__(self, channels: int, *, heads: int, attention_dropout: float, hidden_dropout: float | None) -> None:
        super().__init__()
        if channels % heads:
            raise ConfigError(f"heads={heads} does not divide {channels} channels; choose a number that does")
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.attended = nn.Linear(channels, channels)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.feeds_forward = hidden_dropout is not None
        if hidden_dropout is not None:
            self.hidden = nn.Linear(channels, channels)
            self.output = nn.Linear(channels, channels)
            self.hidden_dropout = nn.Dropout(hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[V, n, C] -> [V, n, C], no entry negative."""
        x = x + self.attention(x)
        if self.feeds_forward:
            hidden = self.hidden_dropout(F.gelu(self.hidden(x)))
            x = x + self.hidden_dropout(self.output(hidden))
        return F.relu(x)

    def attention(self, x: Tensor) -> Tensor:
        """[V, n, C] -> [V, n, C]."""
        q, k, v = rearrange(self.qkv(self.norm(x)), "v n (qkv head c) -> qkv v head n c", qkv=3, head=self.heads)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "v head n c -> v n (head c)")
        out: Tensor = self.attention_dropout(self.attended(attended))
        return out
