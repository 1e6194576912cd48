"""Momentum contrast (He et al. 2020, arXiv 1911.05722): its parts as functions, and MoCo."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.matching import full_precision
from fsar.pretraining.base import Output, PretrainingMethod
from fsar.run import ranks
from fsar.trunks import create_trunk
from fsar.trunks.base import VideoTrunk, volume_mean
from shards_spec.errors import ConfigError


def normalised_queue(dim: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw random columns [dim, length] of norm 1, with which a queue starts."""
    return F.normalize(torch.randn(dim, length, generator=generator), dim=0)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Write keys [N, dim] over the oldest columns of a queue [dim, length]; move its pointer on.

    Writing goes on at column 0 after the last one.  Of more keys than the queue holds, the last
    ones stay.

    Args:
        queue: Changed in place.
        pointer: The next column to write, [] or [1], changed in place.
        keys: The new columns.
    """
    # The pointer is a tensor on the device: places are computed there, and the host never waits for
    # its value.
    length, count = queue.shape[1], len(keys)
    kept = min(count, length)
    places = (pointer + torch.arange(count - kept, count, device=queue.device)) % length  # [kept]
    queue.index_copy_(1, places, keys[count - kept :].detach().T.to(queue.dtype))
    pointer.add_(count).remainder_(length)


@torch.no_grad()
def momentum_update(key_module: nn.Module, query_module: nn.Module, momentum: float | Tensor) -> None:
    """Set the parameters k <- m k + (1 - m) q of two modules of the same kind; buffers stay.

    A momentum that is a tensor stays on its device.  It should be float64, since 1 - m loses digits
    near 1.

    Raises:
        ConfigError: the modules have different numbers of parameters.
    """
    keys: list[Tensor] = list(key_module.parameters())
    queries: list[Tensor] = list(query_module.parameters())
    if len(keys) != len(queries):
        raise ConfigError(f"momentum_update: {len(keys)} parameters and {len(queries)}; give a module and its copy")
    if not isinstance(momentum, torch.Tensor):
        torch._foreach_lerp_(keys, queries, 1 - momentum)
        return
    steps = torch._foreach_sub(queries, keys)  # a lerp by one tensor is not fused
    torch._foreach_mul_(steps, (1 - momentum).reshape(()).to(keys[0]))
    torch._foreach_add_(keys, steps)


@torch.no_grad()
def shuffled(inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Exchange samples [N, ...] with the other processes; return the order too, for `unshuffle`.

    The BatchNorm batch of a key must not be that of its query (section 3.3 there).  One process has
    nobody to exchange samples with: the inputs are returned as they are, and the order is None.
    """
    if ranks.count() == 1:
        return inputs, None
    everything = ranks.gather(inputs)
    order = ranks.like_first(torch.randperm(len(everything), device=inputs.device))
    return everything[own(order, len(inputs))], order


@torch.no_grad()
def unshuffle(keys: Tensor, order: Tensor | None) -> Tensor:
    """Return the keys [N, ...] of this process's own samples from those of shuffled ones."""
    if order is None:
        return keys
    return ranks.gather(keys)[own(order.argsort(), len(keys))]


def own(order: Tensor, samples: int) -> Tensor:
    """Return this process's part [samples] of an order of all samples."""
    first = ranks.rank() * samples
    return order[first : first + samples]


def contrast(query: Tensor, key: Tensor, queue: Tensor, temperature: float | Tensor) -> Tensor:
    """Compare queries [N, dim] with their keys [N, dim] and a queue [dim, K].

    Returns logits [N, 1 + K] in float32, the positive in column 0.
    """
    query, key, queue = full_precision(query), full_precision(key), full_precision(queue)
    with torch.autocast(query.device.type, enabled=False):
        positive = (query * key).sum(dim=1, keepdim=True)  # [N, 1]
        return torch.cat([positive, query @ queue], dim=1) / temperature


def first_is_right(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and top-1 share of logits [N, 1 + K] whose positive is in column 0."""
    logits = full_precision(logits)
    targets = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits, targets), (logits.detach().argmax(dim=1) == 0).float().mean()


def frozen_copy(module: nn.Module) -> nn.Module:
    """Copy a module without gradients: the momentum side before its first update."""
    return copy.deepcopy(module).requires_grad_(requires_grad=False)


@dataclass
class Views:
    """Two views of each video."""

    query: Tensor  # [B, 3, t, H, W] normalised frames
    key: Tensor  # [B, 3, t, H, W]


class MoCo(PretrainingMethod):
    """Momentum contrast of two views of a video: the baseline of motion methods.

    Defaults are those of the plain baselines in MSCL's code (megvii-research/MSCL,
    configs/recognition/moco).

    Args:
        trunk: A video trunk or its name.
        dim: Numbers in an embedding.
        queue: Keys kept as negatives.
        momentum: Of the key encoder.
        temperature: Divides the cosines.
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        trunk: str | VideoTrunk = "r3d18",
        *,
        dim: int = 128,
        queue: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        encoder = create_trunk(trunk) if isinstance(trunk, str) else trunk
        if not isinstance(encoder, VideoTrunk):
            raise ConfigError(f"MoCo reads clips, {type(encoder).__name__} frames; choose a video trunk such as r3d18")
        width = encoder.channels
        self.encoder_q = encoder
        self.mlp_q = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
        self.encoder_k, self.mlp_k = frozen_copy(self.encoder_q), frozen_copy(self.mlp_q)
        self.momentum, self.temperature = momentum, temperature
        self.register_buffer("queue", normalised_queue(dim, queue))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    @property
    def encoder(self) -> VideoTrunk:
        """The trunk of the query side."""
        return self.encoder_q

    def forward(self, batch: Views) -> Output:
        """Compute the loss `moco` of a batch; in training mode key encoder and queue move on."""
        query = embed(self.mlp_q, self.encoder_q.clip_maps(batch.query))
        key = self._keys(batch.key)
        loss, right = first_is_right(contrast(query, key, self.queue.clone(), self.temperature))
        if self.training:  # after the contrast, which read a copy: a key is no negative of its own query
            enqueue(self.queue, self.queue_ptr, ranks.gather(key))
        return Output(loss, {"moco": loss}, {"moco": right})

    @torch.no_grad()
    def _keys(self, clips: Tensor) -> Tensor:
        """Embed keys [B, 3, t, H, W] -> [B, dim]; in training the momentum update comes first."""
        if self.training:
            momentum_update(self.encoder_k, self.encoder_q, self.momentum)
            momentum_update(self.mlp_k, self.mlp_q, self.momentum)
        inputs, order = shuffled(clips) if self.training else (clips, None)
        assert isinstance(self.encoder_k, VideoTrunk)
        return unshuffle(embed(self.mlp_k, self.encoder_k.clip_maps(inputs)), order)


def embed(projection: nn.Module, maps: Tensor) -> Tensor:
    """Project the last maps [B, C, t, h, w] of an encoder to unit vectors [B, dim], in float32."""
    return F.normalize(full_precision(projection(volume_mean(maps))), dim=1)
