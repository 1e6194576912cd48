"""Momentum contrast of one modality in MSCL: a queue whose columns fade, a momentum that rises."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fsar.pretraining.moco import (
    embed,
    enqueue,
    frozen_copy,
    momentum_update,
    normalised_queue,
    shuffled,
    unshuffle,
)
from fsar.run import ranks
from fsar.trunks import VideoTrunk

FADE = 0.99999  # factor of a column of the queue for each step since it was written


def rising_momentum(samples: Tensor, *, total: int, start: float) -> Tensor:
    """Return the momentum after a number of samples: half a cosine from `start` to 1 at `total`.

    Args:
        samples: Any shape; the result has the same shape and is float64, since 1 - momentum loses
            digits near 1.
        total: Samples of the whole run.
        start: Momentum at 0 samples.
    """
    progress = (samples.double() / total).clamp(max=1)
    return 1 - 0.5 * (1 - start) * ((math.pi * progress).cos() + 1)


@dataclass
class Pair:
    """Embeddings of the two views of a batch."""

    query: Tensor  # [B, dim], of length 1
    key: Tensor  # [B, dim], without a gradient
    levels: list[Tensor]  # of the query's clips [B, C, t', h, w], the finest first


class Learner(nn.Module):
    """An encoder, its slow copy, and the keys of past steps.

    Parameters are named as in megvii-research/MSCL.

    Args:
        encoder: The trunk of the query side.
        neck: Modules on top of the query's encoder.
        dim: Numbers in an embedding.
        queue: Keys kept as negatives.
        momentum: Of the key side at the start; it rises to 1 over `total` samples.
        total: Samples of the whole run.
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
        self.register_buffer("count", torch.zeros(queue, dtype=torch.int64))  # steps since each column was written
        # The clock: samples of all steps so far.  The published code does not save it, so a resumed
        # run starts anew.
        self.register_buffer("iters", torch.zeros((), dtype=torch.int64))

    def forward(self, query: Tensor, key: Tensor, *, follow: bool) -> Pair:
        """Embed two views [B, 3, t, H, W]; with `follow` the key side first moves on."""
        levels = self.encoder_q.levels(query)
        if follow:
            self.follow()
        return Pair(embed(self.mlp_q, levels[-1]), self._key(key), levels)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the parameters of the key side towards those of the query side; buffers stay."""
        momentum = rising_momentum(self.iters, total=self.total, start=self.momentum)
        momentum_update(self.encoder_k, self.encoder_q, momentum)
        momentum_update(self.mlp_k, self.mlp_q, momentum)

    @torch.no_grad()
    def negatives(self) -> Tensor:
        """Return a copy of the queue [dim, K], its older columns a little shorter."""
        return self.queue * FADE**self.count

    @torch.no_grad()
    def remember(self, keys: Tensor) -> None:
        """Write the keys [B, dim] of all processes over the oldest columns."""
        keys = ranks.gather(keys)
        self.count.add_(1)
        # The counts of the new columns are set as if they were a queue of one row; only the second
        # call moves the pointer.
        enqueue(self.count[None], self.queue_ptr.clone(), self.count.new_ones(len(keys), 1))
        enqueue(self.queue, self.queue_ptr, keys)

    @torch.no_grad()
    def tick(self, batch: int) -> None:
        """Count the samples of a training step, `batch` in each process."""
        if self.training:
            self.iters.add_(batch * ranks.count())

    @torch.no_grad()
    def _key(self, clips: Tensor) -> Tensor:
        """Embed keys [B, 3, t, H, W] -> [B, dim]; in training, processes exchange samples."""
        inputs, order = shuffled(clips) if self.training else (clips, None)
        maps: Tensor = self.encoder_k.clip_maps(inputs)  # type: ignore[operator]  # a copy of a VideoTrunk
        return unshuffle(embed(self.mlp_k, maps), order)
