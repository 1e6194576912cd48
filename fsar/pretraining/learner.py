"""One modality's momentum contrast in MSCL: query and key encoders, a queue whose columns fade, a momentum clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.matching import full_precision
from fsar.pretraining.moco import (
    enqueue,
    frozen_copy,
    momentum_update,
    normalised_queue,
    shuffled,
    unshuffle,
)
from fsar.run import ranks
from fsar.trunks import VideoTrunk
from fsar.trunks.base import volume_mean

FADE = 0.99999  # of a column's weight with each step that it stays in the queue


def rising_momentum(seen: Tensor, *, total: int, start: float) -> Tensor:
    """Momentum after `seen` samples, float64 of the same shape: from `start` along half a cosine to 1 at `total`."""
    progress = (seen.double() / total).clamp(max=1)
    return 1 - 0.5 * (1 - start) * ((math.pi * progress).cos() + 1)


@dataclass
class Pair:
    """What a learner makes of the two views of a batch."""

    query: Tensor  # [B, dim], of length 1
    key: Tensor  # [B, dim], without a gradient
    levels: list[Tensor]  # of the query's clips [B, C, t', h, w], the finest first


class Learner(nn.Module):
    """An encoder, its slow copy, and the keys of the past; parameters are named as in megvii-research/MSCL.

    `momentum` is that at the start, `total` the samples of the whole run, over which it rises to 1.
    """

    queue: Tensor
    queue_ptr: Tensor
    count: Tensor
    iters: Tensor

    def __init__(
        self, encoder: VideoTrunk, *, neck: nn.Module | None = None, dim: int, queue: int, momentum: float, total: int
    ) -> None:
        super().__init__()
        width = encoder.channels
        self.encoder_q = encoder
        self.neck_q = neck  # the code also keeps one on the key side, which nothing reads
        self.mlp_q = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
        self.encoder_k, self.mlp_k = frozen_copy(self.encoder_q), frozen_copy(self.mlp_q)
        self.momentum, self.total = momentum, total
        self.register_buffer("queue", normalised_queue(dim, queue))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("count", torch.zeros(queue, dtype=torch.int64))  # steps that each column has been there
        self.register_buffer(
            "iters", torch.zeros((), dtype=torch.int64)
        )  # samples seen: the clock, which the code loses

    def forward(self, query: Tensor, key: Tensor, *, follow: bool) -> Pair:
        """Two views [B, 3, t, H, W] -> their embeddings; with `follow` the key encoder first moves to the query's."""
        levels = self.encoder_q.levels(query)
        if follow:
            self.follow()
        return Pair(embed(self.mlp_q, levels[-1]), self._key(key), levels)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the parameters of the key side to those of the query side; buffers keep statistics of their own."""
        momentum = rising_momentum(self.iters, total=self.total, start=self.momentum)
        momentum_update(self.encoder_k, self.encoder_q, momentum)
        momentum_update(self.mlp_k, self.mlp_q, momentum)

    @torch.no_grad()
    def negatives(self) -> Tensor:
        """The queue [dim, K] as it is now, older columns a little shorter; a copy."""
        return self.queue * FADE**self.count

    @torch.no_grad()
    def remember(self, keys: Tensor) -> None:
        """Write the keys [B, dim] of all processes over the oldest columns."""
        keys = ranks.gather(keys)
        self.count.add_(1)
        enqueue(self.count[None], self.queue_ptr.clone(), self.count.new_ones(len(keys), 1))
        enqueue(self.queue, self.queue_ptr, keys)

    @torch.no_grad()
    def tick(self, batch: int) -> None:
        """Count the samples of a training step, `batch` in each process."""
        if self.training:
            self.iters.add_(batch * ranks.count())

    @torch.no_grad()
    def _key(self, clips: Tensor) -> Tensor:
        """[B, 3, t, H, W] -> [B, dim]; in training other samples than the query's share its BatchNorm."""
        inputs, order = shuffled(clips) if self.training else (clips, None)
        maps: Tensor = self.encoder_k.clip_maps(inputs)  # type: ignore[operator]  # a copy of a VideoTrunk
        return unshuffle(embed(self.mlp_k, maps), order)


def embed(projection: nn.Module, maps: Tensor) -> Tensor:
    """Last maps [B, C, t, h, w] of an encoder -> vectors [B, dim] of length 1, in float32."""
    return F.normalize(full_precision(projection(volume_mean(maps))), dim=1)
