"""TRX: temporal-relational cross-transformers (Perrett et al., CVPR 2021, arXiv 2101.06184).

A query is represented by the tuples of its frames, in time order. For each tuple the tuples of a
class, weighted by attention, give a prototype of its own; the distance to it is the tuple's answer.

The published code (tobyperrett/trx) forms every tuple. Here none is formed: a linear map of a tuple
is a sum of maps of its frames, one for each place in the tuple. So each frame is projected once a
place, and not once for each of the 84 tuples that 8 frames have. Products of tuples are sums of
products of frames.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.matching import full_precision, squared_lengths
from fsar.methods.base import Embedding, FewShotMethod
from fsar.trunks import Features, Trunk
from shards_spec.errors import ConfigError

POSITION_WEIGHT = 0.1


class TRX(FewShotMethod):
    """Tuples of a query's frames against those of a class; logits are the mean over tuple sizes.

    The loss is the cross-entropy of the logits. The squared distance grows with the scale of the
    features.

    Args:
        trunk, channels, frames: As of FewShotMethod.
        tuple_sizes: Frames of a tuple, for each kind of tuple.
        width: The width of keys and values.
        dropout: Drop out where the code does.
    """

    def __init__(
        self,
        *,
        trunk: str | Trunk | None = "resnet50",
        channels: int | None = None,
        frames: int = 8,
        tuple_sizes: tuple[float, ...] = (2, 3),
        width: int = 1152,
        dropout: bool = True,
    ) -> None:
        sizes = [int(size) for size in tuple_sizes]
        if not sizes or min(sizes) < 1 or sizes != list(tuple_sizes):
            raise ConfigError(f"tuple_sizes={tuple_sizes} are no sizes of tuples; give whole numbers from 1 on")
        super().__init__(trunk, channels=channels, frames=frames, least=max(sizes))
        self.transformers = nn.ModuleList(
            TupleAttention(self.channels, size=size, frames=frames, width=width, dropout=0.1 if dropout else 0.0)
            for size in sizes
        )

    def embed(self, features: Features) -> Embedding:
        """Embed V videos: tokens [V, n, width], the frames' projections for each tuple size."""
        return Embedding(torch.cat([part.project(features.pooled) for part in self.parts], dim=1))

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Embeddings [way, shot, n, width] and [Q, n, width] -> logits [Q, way]."""
        own, other = (torch.split(each.tokens, self.rows(each.tokens.shape[-2]), dim=-2) for each in (support, query))
        logits = [part(*projected, mask) for part, *projected in zip(self.parts, own, other, strict=True)]
        return torch.stack(logits).mean(dim=0)

    @property
    def parts(self) -> list[TupleAttention]:
        """The module of each tuple size."""
        return cast("list[TupleAttention]", list(self.transformers))

    def rows(self, count: int) -> list[int]:
        """Count the tokens of each tuple size in an embedding of `count` tokens."""
        sizes = [part.size for part in self.parts]
        steps = (count // 2 + sum(size * (size - 1) for size in sizes)) // sum(sizes)
        return [2 * size * (steps - size + 1) for size in sizes]


class TupleAttention(nn.Module):
    """Attention of a query's tuples of `size` frames, in time order, over those of a class.

    A row of the incidence table [n, r] is a tuple, a column is a frame at a place: the table turns
    numbers of frames at places into numbers of tuples.
    """

    positions: Tensor
    tuples: Tensor

    def __init__(self, channels: int, *, size: int, frames: int, width: int, dropout: float) -> None:
        super().__init__()
        self.size, self.width, self.frames = size, width, frames
        self.k_linear = nn.Linear(size * channels, width)
        self.v_linear = nn.Linear(size * channels, width)
        self.norm_k = nn.LayerNorm(width)
        # Published state dicts have it and nothing reads it; without a gradient no optimiser
        # changes it.
        self.norm_v = nn.LayerNorm(width).requires_grad_(requires_grad=False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("positions", POSITION_WEIGHT * sine_table(frames, channels), persistent=False)
        self.register_buffer("tuples", incidence(frames, size).float(), persistent=False)

    def forward(self, support: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
        """Projected frames [way, shot, 2 * r, width] and [Q, 2 * p, width] -> logits [Q, way].

        Each tuple of a query attends to the tuples of a class. The logit is minus the squared
        distance of its value to its prototype, mean over the query's tuples.
        """
        keys, values = full_precision(support).chunk(2, dim=-2)  # [way, shot, r, width]
        query_keys, query_values = full_precision(query).chunk(2, dim=-2)  # [Q, p, width]
        own, theirs = (self.incidence(each.shape[-2]).to(keys) for each in (keys, query_keys))  # [m, r], [n, p]
        with torch.autocast(keys.device.type, enabled=False):
            scores = self.scores(query_keys, keys, theirs, own)  # [Q, way, n, shot, m]
            if mask is not None:
                padding = mask.to(scores.device).logical_not()
                scores = scores.masked_fill(rearrange(padding, "w s -> 1 w 1 s 1"), -torch.inf)
                values = values.masked_fill(rearrange(padding, "w s -> w s 1 1"), 0)
            weights = scores.flatten(-2).softmax(dim=-1).view_as(scores)
            shares = (weights @ own).flatten(-2)  # [Q, way, n, shot * r]
            return -self.distances(query_values, values, theirs, shares).mean(dim=-1)

    def project(self, frames: Tensor) -> Tensor:
        """Project frames [V, T, C] to [V, 2 * r, width]: parts of keys for each place, then values.

        r = size * (T - size + 1), place by place: the first frame can have only the first place,
        and so on. The parts of keys are centred: the LayerNorm of a tuple subtracts the mean of
        their sum, which is the sum of their means.
        """
        steps, channels = frames.shape[1:]
        if steps < self.size:
            raise ConfigError(f"TRX cannot make tuples of {self.size} of {steps} frames; give more, or set tuple_sizes")
        if steps > len(self.positions):
            self.positions = POSITION_WEIGHT * sine_table(steps, channels).to(self.positions)
        coded = self.dropout(frames + self.positions[:steps])
        parts = []
        for linear in (self.k_linear, self.v_linear):
            for place, weight in enumerate(torch.split(linear.weight, channels, dim=1)):
                able = coded[:, place : steps - (self.size - 1 - place)]  # room for the tuple's other frames
                part = full_precision(F.linear(able, weight, None if place else linear.bias))
                parts.append(part - part.mean(dim=-1, keepdim=True) if linear is self.k_linear else part)
        return torch.cat(parts, dim=1)

    def incidence(self, rows: int) -> Tensor:
        """Return the table [n, rows] of T frames' tuples; for the usual T it is on the device."""
        steps = rows // self.size + self.size - 1
        return self.tuples if steps == self.frames else incidence(steps, self.size)

    def scores(self, query: Tensor, keys: Tensor, theirs: Tensor, own: Tensor) -> Tensor:
        """Score tuples of queries against tuples of the support: [Q, way, n, shot, m].

        A score is the product of two LayerNorms of keys. Terms that are the same for all tuples of
        the support are left out, since the softmax over these tuples does not change by them.

        Args:
            query: Centred keys of frames [Q, p, width].
            keys: Centred keys of frames [way, shot, r, width].
            theirs: Incidence of the query's tuples [n, p].
            own: Incidence of the support's tuples [m, r].
        """
        spread, query_spread = (self.spread(each, part) for each, part in ((keys, own), (query, theirs)))
        gain, shift = self.norm_k.weight, self.norm_k.bias
        products = torch.einsum("q p d, w s r d -> q p w s r", query, keys * gain.square())
        products = torch.einsum("n p, q p w s r, m r -> q n w s m", theirs, products, own)
        shifted = (keys @ (gain * shift)) @ own.T  # [way, shot, m]
        scores = (products / query_spread[..., None, None, None] + shifted) / (spread * math.sqrt(self.width))
        return rearrange(scores, "q n w s m -> q w n s m")

    def spread(self, centred: Tensor, tuples: Tensor) -> Tensor:
        """Centred keys [..., r, width] and incidence [m, r] -> LayerNorm's divisors [..., m]."""
        return (squared_lengths(centred, tuples) / self.width + self.norm_k.eps).clamp(min=self.norm_k.eps).sqrt()

    def distances(self, query: Tensor, values: Tensor, theirs: Tensor, shares: Tensor) -> Tensor:
        """Squared distance [Q, way, n] of a query's tuples to their prototypes.

        Args:
            query: Values of frames [Q, p, width].
            values: [way, shot, r, width].
            theirs: Incidence of the query's tuples [n, p].
            shares: [Q, way, n, shot * r].
        """
        centre = reduce(values.detach(), "w s (place t) d -> place 1 d", "mean", place=self.size)
        # The mean of all frames at a place cancels in the difference. It may be far larger than the
        # distance, which would lose its last digits to it.
        query, values = (
            rearrange(rearrange(each, "... (place t) d -> ... place t d", place=self.size) - centre, pattern)
            for each, pattern in ((query, "q place t d -> q (place t) d"), (values, "w s place t d -> w (s place t) d"))
        )
        products = theirs @ torch.einsum("q p d, w r d -> q w p r", query, values)  # [Q, way, n, shot * r]
        between = (products * shares).sum(dim=-1)
        return squared_lengths(query, theirs)[:, None] - 2 * between + squared_lengths(values, shares)


def incidence(steps: int, size: int) -> Tensor:
    """Make the table [n, size * (T - size + 1)]: 1 where an ordered tuple has a frame at a place.

    Tuples are in lexicographic order, as in the published code.
    """
    tuples = torch.tensor(list(combinations(range(steps), size)), dtype=torch.int64).reshape(-1, size)
    able = steps - size + 1  # frames that can have a place; the first has the number of the place
    return F.one_hot(tuples - torch.arange(size), able).flatten(1) if able > 0 else tuples.new_zeros(0, 0)


def sine_table(rows: int, channels: int) -> Tensor:
    """Compute the table [rows, C]: sine and cosine of p / 10000^(2i/C) at columns 2i and 2i + 1."""
    position = torch.arange(rows, dtype=torch.float64)[:, None]
    pair = torch.arange(channels, dtype=torch.float64).div(2, rounding_mode="floor")
    angle = position / 10000 ** (2 * pair / channels)  # [rows, channels]
    return torch.where(torch.arange(channels) % 2 == 0, angle.sin(), angle.cos()).float()
