"""Layers that several methods share: the position table, attention within a video and within an episode."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from shards_spec.errors import ConfigError

HIDDEN = 2048  # width of the feed-forward part of CLIP-FSAR, whatever the width of the tokens


def position_table(rows: int, channels: int) -> Tensor:
    """Table [rows, channels]: sin(p / 10000^(2i/C)) at even i, cos(p / 10000^(2i/C)) at odd i.

    The exponent runs over channel numbers, not over pairs of them, so this is not the usual table; the
    reference code (alibaba-mmai-research/MoLo, HyRSM) does it so, and trained weights depend on it.
    """
    channel = torch.arange(channels, dtype=torch.float64)
    position = torch.arange(rows, dtype=torch.float64)[:, None]
    angle = position / 10000 ** (2 * channel / channels)  # [rows, channels]
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


class PositionCode(nn.Module):
    """Scales tokens by sqrt(C / A) and adds B times the position table, which grows with what it is asked for."""

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


class TemporalTransformer(nn.Module):
    """One layer of self-attention over the tokens of a video and a feed-forward part, then ReLU.

    As in the reference code (alibaba-mmai-research/MoLo) there is a LayerNorm before the attention only, and
    none before the feed-forward part.  `hidden_dropout=None` leaves that part out, as HyRSM does.
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

    def attention(self, x: Tensor) -> Tensor:
        """[V, n, C] -> [V, n, C]."""
        q, k, v = rearrange(self.qkv(self.norm(x)), "v n (qkv head c) -> qkv v head n c", qkv=3, head=self.heads)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "v head n c -> v n (head c)")
        out: Tensor = self.attention_dropout(self.attended(attended))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """[V, n, C] -> [V, n, C], no entry negative."""
        x = x + self.attention(x)
        if self.feeds_forward:
            hidden = self.hidden_dropout(F.gelu(self.hidden(x)))
            x = x + self.hidden_dropout(self.output(hidden))
        return F.relu(x)


class TemporalContext(nn.Module):
    """CLIP-FSAR's layers of attention over the tokens of a video and a feed-forward part, blind to the tokens' order.

    Modules are named as in the published state dict (alibaba-mmai-research/MoLo), so that any depth of it loads.
    """

    def __init__(self, channels: int, *, heads: int, depth: int, dropout: bool) -> None:
        super().__init__()
        if channels % heads or depth < 1:
            raise ConfigError(f"heads={heads} must divide {channels} channels and depth={depth} be at least 1")
        self.layers = nn.ModuleList(
            nn.Sequential(Attention(channels, heads, dropout=0.2 * dropout), FeedForward(channels, 0.05 * dropout))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[V, n, C] -> [V, n, C]."""
        for layer in self.layers:
            x = layer(x)
        return x


class Attention(nn.Module):
    """x + Dropout(W attention(LayerNorm x))."""

    def __init__(self, channels: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        projections = {name: nn.Linear(channels, channels, bias=False) for name in ("to_q", "to_k", "to_v")}
        to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(dropout))
        self.fn = nn.ModuleDict({**projections, "to_out": to_out})

    def forward(self, x: Tensor) -> Tensor:
        """[V, n, C] -> [V, n, C]."""
        normed = self.norm(x)
        q, k, v = (
            rearrange(self.fn[name](normed), "v n (head c) -> v head n c", head=self.heads)
            for name in ("to_q", "to_k", "to_v")
        )
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "v head n c -> v n (head c)")
        out: Tensor = x + self.fn["to_out"](attended)
        return out


class FeedForward(nn.Module):
    """x + MLP(x), with no norm before it."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(channels, HIDDEN),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(HIDDEN, channels),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[V, n, C] -> [V, n, C]."""
        out: Tensor = x + self.net(x)
        return out


class SetRelation(nn.Module):
    """Self-attention over the members of the support and one query, LayerNorm after it, then ReLU.

    Each query has a sequence of its own, so queries never see each other (paper, section 3.2: inter-relation).
    """

    def __init__(self, channels: int, *, heads: int, attention_dropout: float, output_dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.output = nn.Linear(channels, channels)
        self.output_dropout = nn.Dropout(output_dropout)
        self.norm = nn.LayerNorm(channels)
        for projection in (self.query, self.key, self.value):
            nn.init.normal_(projection.weight, std=math.sqrt(2 / (channels + channels // heads)))
        nn.init.xavier_normal_(self.output.weight)

    @property
    def parts(self) -> int:
        """Vectors that `project` makes of a token."""
        return 3 + self.heads

    def project(self, tokens: Tensor) -> Tensor:
        """[V, C] -> [V, 3 + heads, C]: the token, its query, its key, and what each head adds of it to the output.

        What is attended to is mapped before it is summed, once a video and not once for each sequence that it is in.
        """
        values = rearrange(self.value(tokens), "v (head c) -> head v c", head=self.heads)
        maps = rearrange(self.output.weight, "out (head c) -> head c out", head=self.heads)
        of_heads = rearrange(values @ maps.to(values.dtype), "head v out -> v head out")
        own = torch.stack([tokens, *(project(tokens) for project in (self.query, self.key))], dim=1)
        return torch.cat([own.to(of_heads.dtype), of_heads], dim=1)

    def forward(self, members: Tensor, queries: Tensor) -> Tensor:
        """Projected [S, 3 + heads, C] and [Q, 3 + heads, C] -> [Q, S+1, C], the query last."""
        tokens, q, k = (sequences(members[:, i], queries[:, i]) for i in range(3))  # [Q, S+1, C]
        q, k = (rearrange(each, "q n (head c) -> q head n c", head=self.heads) for each in (q, k))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)  # [Q, head, S+1, S+1]
        weights = F.dropout(weights, self.attention_dropout, training=self.training).to(members.dtype)
        of_members = rearrange(weights[..., :-1], "q head n s -> q n (s head)") @ members[:, 3:].flatten(0, 1)
        of_query = rearrange(weights[..., -1], "q head n -> q n head") @ queries[:, 3:]
        out = self.output_dropout(of_members + of_query + self.output.bias)
        return F.relu(self.norm(tokens + out))


def sequences(members: Tensor, queries: Tensor) -> Tensor:
    """[S, C], [Q, C] -> [Q, S+1, C]: for each query the S members, then the query."""
    return torch.cat([members.expand(len(queries), -1, -1), queries[:, None]], dim=1)
