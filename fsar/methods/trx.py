"""TRX: temporal-relational cross-transformers (Perrett et al., CVPR 2021, arXiv 2101.06184).

A map of a tuple of frames is the sum of maps of its frames, one for each place in the tuple; so each frame is
projected once a place, and not once for each of the 84 tuples that 8 frames have.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, cast

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from fsar.matching import attend, full_precision
from fsar.methods.base import Embedding, FewShotMethod
from shards_spec.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from fsar.trunks import Features, Trunk

POSITION_WEIGHT = 0.1


def sine_table(rows: int, channels: int) -> Tensor:
    """Table [rows, channels]: the sine and cosine of p / 10000^(2i/channels) at columns 2i and 2i + 1."""
    position = torch.arange(rows, dtype=torch.float64)[:, None]
    pair = torch.arange(channels, dtype=torch.float64).div(2, rounding_mode="floor")
    angle = position / 10000 ** (2 * pair / channels)  # [rows, channels]
    return torch.where(torch.arange(channels) % 2 == 0, angle.sin(), angle.cos()).float()


class TupleAttention(nn.Module):
    """Attention of a query's tuples of `size` frames, in time order, over those of a class."""

    tuples: Tensor
    positions: Tensor

    def __init__(self, channels: int, *, size: int, frames: int, width: int, dropout: float) -> None:
        super().__init__()
        self.size, self.width, self.frames = size, width, frames
        self.k_linear = nn.Linear(size * channels, width)
        self.v_linear = nn.Linear(size * channels, width)
        self.norm_k = nn.LayerNorm(width)
        # In published state dicts, read by nothing: without a gradient no optimiser sees it.
        self.norm_v = nn.LayerNorm(width).requires_grad_(requires_grad=False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("positions", POSITION_WEIGHT * sine_table(frames, channels), persistent=False)
        self.register_buffer("tuples", frame_tuples(frames, size), persistent=False)

    @property
    def projected(self) -> int:
        """Numbers that `project` makes of a frame."""
        return 2 * self.size * self.width

    def project(self, frames: Tensor) -> Tensor:
        """[V, T, C] -> [V, T, 2 * size * width]: what a frame adds to keys and values at each place in a tuple."""
        steps, channels = frames.shape[1:]
        if steps < self.size:
            raise ConfigError(f"TRX cannot make tuples of {self.size} of {steps} frames; give more, or set tuple_sizes")
        if steps > len(self.positions):
            self.positions = POSITION_WEIGHT * sine_table(steps, channels).to(self.positions)
        coded = self.dropout(frames + self.positions[:steps])
        parts = [
            F.linear(coded, rearrange(linear.weight, "w (place c) -> (place w) c", place=self.size))
            for linear in (self.k_linear, self.v_linear)
        ]
        return torch.cat(parts, dim=-1)

    def tuples_of(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """[..., T, 2 * size * width] -> keys and values [..., n, width] of the n tuples, in float32 or wider."""
        places = self._tuples(projected.shape[-2])  # [size, n]
        maps = rearrange(full_precision(projected), "... t (map place w) -> map place ... t w", map=2, place=self.size)
        summed = maps[:, 0].index_select(-2, places[0])  # [map, ..., n, width]
        for place in range(1, self.size):
            summed = summed + maps[:, place].index_select(-2, places[place])
        keys, values = summed[0] + self.k_linear.bias, summed[1] + self.v_linear.bias
        with torch.autocast(keys.device.type, enabled=False):
            return self.norm_k(keys), values

    def _tuples(self, steps: int) -> Tensor:
        if steps != self.frames:
            self.frames, self.tuples = steps, frame_tuples(steps, self.size).to(self.tuples)
        return self.tuples

    def forward(self, support: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
        """Projected frames [way, shot, T, P] and [Q, T, P] -> logits [Q, way].

        A query is compared with the class as its own tuples see it: minus the squared distance of the values,
        mean over tuples.
        """
        keys, values = self.tuples_of(support)  # [way, shot, m, width]
        query_keys, query_values = self.tuples_of(query)  # [Q, n, width]
        prototypes = attend(query_keys, keys, values, mask)  # [Q, way, n, width]
        return -(query_values[:, None] - prototypes).square().sum(dim=-1).mean(dim=-1)


def frame_tuples(frames: int, size: int) -> Tensor:
    """[size, n]: the frames of the n ordered tuples, in lexicographic order."""
    return torch.tensor(list(combinations(range(frames), size)), dtype=torch.int64).reshape(-1, size).T.contiguous()


class TRX(FewShotMethod):
    """Tuples of a query's frames against those of all videos of a class; logits are the mean over tuple sizes.

    `width` is that of keys and values.  The squared distance grows with the scale of the features.
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
        super().__init__(trunk, channels=channels, frames=frames)
        sizes = [int(size) for size in tuple_sizes]
        if not sizes or min(sizes) < 1 or sizes != list(tuple_sizes):
            raise ConfigError(f"tuple_sizes={tuple_sizes} are no sizes of tuples; give whole numbers from 1 on")
        self.transformers = nn.ModuleList(
            TupleAttention(self.channels, size=size, frames=frames, width=width, dropout=0.1 if dropout else 0.0)
            for size in sizes
        )

    @property
    def parts(self) -> list[TupleAttention]:
        """The module of each tuple size."""
        return cast("list[TupleAttention]", list(self.transformers))

    def embed(self, features: Features) -> Embedding:
        """Features of V videos -> tokens [V, T, P]: the projections of each frame for all sizes, side by side."""
        return Embedding(torch.cat([part.project(features.pooled) for part in self.parts], dim=-1))

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Embeddings [way, shot, T, P] and [Q, T, P] -> logits [Q, way]."""
        widths = [part.projected for part in self.parts]
        own, other = (torch.split(embedding.tokens, widths, dim=-1) for embedding in (support, query))
        logits = [part(*projected, mask) for part, *projected in zip(self.parts, own, other, strict=True)]
        return torch.stack(logits).mean(dim=0)
