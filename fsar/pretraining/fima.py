"""FIMA: contrast of whole clips, of motion at each place, and of motion in each part of a clip.

Source: Zhu et al., "Fine-Grained Spatiotemporal Motion Alignment for Contrastive Video
Representation Learning", ACM Multimedia 2023, and its code (ZMHH-H/FIMA).  No shape depends on
values, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from fsar.matching import full_precision
from fsar.methods.base import weighted_sum
from fsar.pretraining.base import Output, PretrainingMethod
from fsar.pretraining.moco import (
    contrast,
    enqueue,
    first_is_right,
    frozen_copy,
    momentum_update,
    normalised_queue,
    shuffled,
    unshuffle,
)
from fsar.pretraining.motion_decoder import MotionDecoder, PositionTable, ProjectionHead
from fsar.pretraining.motion_views import MotionViews, Wrap, check_wrap, motion_views
from fsar.run.ranks import gather
from fsar.trunks import create_trunk
from fsar.trunks.base import VideoTrunk, volume_mean
from shards_spec.errors import ConfigError

ENTRIES = 2**24  # similarities that are held at a time: 64 MB


def _centres(coordinates: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return centres [B, P, 2] and diagonals [B] of a grid's cells in crops, corners [B, 4]."""
    rows, columns = grid
    x1, y1, x2, y2 = full_precision(coordinates).unbind(1)
    width, height = (x2 - x1) / columns, (y2 - y1) / rows  # a flipped crop has a negative width
    along = torch.arange(columns, device=x1.device) + 0.5
    down = torch.arange(rows, device=x1.device) + 0.5
    x = (x1[:, None] + along * width[:, None])[:, None, :].expand(-1, rows, -1)
    y = (y1[:, None] + down * height[:, None])[:, :, None].expand(-1, -1, columns)
    return rearrange([x, y], "xy b r c -> b (r c) xy"), torch.hypot(width, height)


def cell_distances(query: Tensor, key: Tensor, grid: tuple[int, int]) -> Tensor:
    """Measure the distance of each query cell's centre to each key cell's in crops, corners [B, 4].

    Returns [B, P, P], in units of the longer of the two cells' diagonals.
    """
    (query_centres, query_diagonal), (key_centres, key_diagonal) = _centres(query, grid), _centres(key, grid)
    apart = query_centres[:, :, None] - key_centres[:, None]  # [B, P, P, 2]
    distances: Tensor = apart.norm(dim=-1) / torch.maximum(query_diagonal, key_diagonal)[:, None, None]
    return distances


def correspondence(query: Tensor, key: Tensor, grid: tuple[int, int], *, ratio: float = 0.7) -> Tensor:
    """Find cells of two crops, corners [B, 4], that show the same place: bool [B, P, P]."""
    return cell_distances(query, key, grid) < ratio


def foreground_mask(rgb: Tensor, difference: Tensor) -> Tensor:
    """Find the strong places of maps [B, C, t, h, w] of a clip and its difference: bool [B, h, w].

    Strength is the sum of both means over channels and time.  It is strong above the median over
    places; of an even number the lower median.
    """
    strength = full_precision(rgb).mean(dim=(1, 2)) + full_precision(difference).mean(dim=(1, 2))  # [B, h, w]
    return strength > strength.flatten(1).median(dim=1).values[:, None, None]


class _LogSumExp(Function):
    """log sum_j exp(q_i k_j / T), computed for some rows at a time.

    The gradient by q_i is the mean of the keys under the softmax, over T.  So forward keeps one
    mean key for each query [N, D], and backward needs no similarities [N, M].
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, temperature: float, rows: int) -> Tensor:  # noqa: ANN401
        sums = queries.new_empty(len(queries))
        means = torch.empty_like(queries) if ctx.needs_input_grad[0] else None
        for start in range(0, len(queries), rows):
            some = slice(start, start + rows)
            scores = (queries[some] / temperature) @ keys.T  # [rows, M]
            torch.logsumexp(scores, dim=1, out=sums[some])
            if means is not None:
                torch.mm(scores.sub_(sums[some, None]).exp_(), keys, out=means[some])
        if means is not None:
            ctx.save_for_backward(means.div_(temperature))
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (means,) = ctx.saved_tensors
        return grads[0][:, None] * means, None, None, None


def log_sum_exp(queries: Tensor, keys: Tensor, *, temperature: float, entries: int = ENTRIES) -> Tensor:
    """Compute log sum_j exp(q_i . k_j / temperature) of queries [N, D] and keys [M, D].

    Returns [N] in float32 or wider.
    At most `entries` of the N x M similarities are held at a time, forward or backward.  Keys get
    no gradient.
    """
    queries, keys = full_precision(queries), full_precision(keys.detach())
    rows = max(1, entries // len(keys))
    with torch.autocast(queries.device.type, enabled=False):
        sums: Tensor = _LogSumExp.apply(queries, keys, temperature, rows)  # type: ignore[no-untyped-call]
    return sums


def dense_loss(
    queries: Tensor, keys: Tensor, positive: Tensor, *, all_keys: Tensor, temperature: float = 0.1
) -> Tensor:
    """Compute -log(sum over positive keys / sum over all keys) of exp(q . k / temperature): [].

    The mean is over the places of a video that have a positive key, then over the videos that have
    such a place. Without any such video the loss is 0.

    Args:
        queries: Unit vectors [B, P, D] of one feature frame.
        keys: Unit vectors [B, P, D] of the same feature frame.
        positive: Bool [B, P, P]: the keys of its own video that show a query's place.
        all_keys: Vectors [M, D] that a query is contrasted with, the positive keys among them.
        temperature: Divides the cosines.
    """
    queries, keys = full_precision(queries), full_precision(keys.detach())
    below = log_sum_exp(queries.flatten(0, 1), all_keys, temperature=temperature).view(queries.shape[:2])  # [B, P]
    counts = positive.any(dim=2)  # [B, P]
    with torch.autocast(queries.device.type, enabled=False):
        similar = torch.einsum("b i d, b j d -> b i j", queries / temperature, keys)
    # A row without a positive key takes all keys, so that its log stays finite; its weight below is
    # 0.  To leave such rows out would make a shape depend on values.
    above = similar.masked_fill((positive | ~counts[:, :, None]).logical_not(), -torch.inf).logsumexp(dim=2)
    losses = torch.where(counts, below - above, 0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)  # [B]
    return losses.sum() / counts.any(dim=1).sum().clamp(min=1)


Enqueue = Literal["interleaved", "after_step"]


@dataclass(frozen=True)
class Keys:
    """The key side of one window; vectors have norm 1."""

    whole: Tensor  # [B, D] of RGB
    dense: Tensor  # [B, t, P, D] of the frame difference, t feature frames of P places
    parts: list[Tensor]  # t of [B, D]: frame differences of the window's parts
    mask: Tensor  # bool [B, h, w]: the foreground


class FIMA(PretrainingMethod):
    """Fine-grained motion alignment (Zhu et al., ACM Multimedia 2023; code: ZMHH-H/FIMA).

    A video has two windows, m and n.  The motion of each is predicted at the places of the other: a
    decoder attends from the RGB tokens of one to those of the other.  The prediction must match the
    frame difference of the predicted window.  Modules and buffers have the reference's names.

    Args:
        trunk: A video trunk or its name.
        queue: Keys kept of whole clips, and as many of parts: 2240 for UCF101, 65536 for
            Kinetics-400.
        dense_queue: Keys kept of places: 0 for UCF101, 31360 for Kinetics-400.
        momentum: Of the key encoder.
        temperature: Divides the cosines of clips and parts.
        dense_temperature: Divides the cosines of places.
        pos_ratio: Largest distance of matching places, as a share of a cell's diagonal.
        dense_weight: Weight of the dense loss; 0 leaves the term out.
        local_weight: Weight of the loss of parts; 0 leaves the term out.
        dropout: Of the decoder.
        diff_wrap: The frame before the first one, see `frame_difference`.
        enqueue: "interleaved": the keys of n are negatives of n's own queries, as in the reference
            code. "after_step" makes the instance loss symmetric.

    Raises:
        ConfigError: the trunk reads no clips, or an option has an unknown value.
    """

    queue: Tensor
    queue_ptr: Tensor
    motion_queue: Tensor
    motion_queue_ptr: Tensor
    queue_dense: Tensor
    queue_dense_ptr: Tensor

    def __init__(
        self,
        trunk: str | VideoTrunk = "i3d",
        *,
        queue: int = 2240,
        dense_queue: int = 0,
        momentum: float = 0.999,
        temperature: float = 0.1,
        dense_temperature: float = 0.1,
        pos_ratio: float = 0.7,
        dense_weight: float = 1.0,
        local_weight: float = 1.0,
        dropout: float = 0.1,
        diff_wrap: Wrap = "cyclic",
        enqueue: Enqueue = "interleaved",
    ) -> None:
        super().__init__()
        encoder = create_trunk(trunk) if isinstance(trunk, str) else trunk
        if not isinstance(encoder, VideoTrunk):
            raise ConfigError(f"FIMA reads clips, {type(encoder).__name__} frames; choose a video trunk such as i3d")
        if enqueue not in ("interleaved", "after_step"):
            raise ConfigError(f'enqueue="{enqueue}" is not known; choose "interleaved" or "after_step"')
        check_wrap(diff_wrap)
        dim, width = 128, 512
        self.encoder_q, self.projector_dense = encoder, ProjectionHead(encoder.channels, dim=dim)
        self.encoder_k, self.projector_dense_k = frozen_copy(self.encoder_q), frozen_copy(self.projector_dense)
        self.embedding1 = nn.Conv2d(encoder.channels, width, 1)
        self.embedding2 = nn.Conv2d(width, encoder.channels, 1)
        self.positions = PositionTable(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_decoder = MotionDecoder(width, dropout=dropout)
        lengths = {"queue": queue, "motion_queue": queue} | ({"queue_dense": dense_queue} if dense_queue else {})
        for name, length in lengths.items():
            self.register_buffer(name, normalised_queue(dim, length))
            self.register_buffer(f"{name}_ptr", torch.zeros(1, dtype=torch.int64))
        self.momentum, self.temperature, self.dense_temperature = momentum, temperature, dense_temperature
        self.pos_ratio = pos_ratio
        self.weights = {"instance": 1.0, "dense": dense_weight, "local": local_weight}
        self.diff_wrap: Wrap = diff_wrap
        self.enqueue: Enqueue = enqueue

    @property
    def encoder(self) -> VideoTrunk:
        """The trunk of the query side."""
        return self.encoder_q

    def views(self, clips: Tensor, coordinates: Tensor, *, augment: Callable[[Tensor], Tensor]) -> MotionViews:
        """Make a batch from clips [B, 6, T, 3, S, S], coordinates [B, 2, 4]; see `motion_views`."""
        return motion_views(clips, coordinates, augment=augment, wrap=self.diff_wrap)

    def forward(self, batch: MotionViews) -> Output:
        """Compute the losses of a batch; in training mode key encoder and queues move on."""
        if self.training:
            momentum_update(self.encoder_k, self.encoder_q, self.momentum)
            momentum_update(self.projector_dense_k, self.projector_dense, self.momentum)
        m_keys, n_keys = (self.keys(*window) for window in zip(batch.rgb, batch.differences, strict=True))
        (m_query, m_tokens), (n_query, n_tokens) = (self.query(rgb) for rgb in batch.rgb)
        predicted = self.predictions(m_tokens, n_tokens)
        first, second = self.instance_logits(m_query, n_query, m_keys, n_keys)
        at_n = self.dense_losses(predicted[0], m_keys, n_keys, coordinates=batch.coordinates)
        at_m = self.dense_losses(predicted[1], n_keys, m_keys, coordinates=batch.coordinates[::-1])
        parts_m = self.part_logits(predicted[0], m_keys, n_keys)
        parts_n = self.part_logits(predicted[1], n_keys, m_keys)
        losses = {
            "instance": (first_is_right(first)[0] + first_is_right(second)[0]) / 2,
            "dense": torch.stack(at_n + at_m).mean(),
            "local": torch.stack([first_is_right(logits)[0] for logits in parts_n + parts_m]).mean(),
        }
        accuracy = {  # of the means that the reference logs
            "instance": first_is_right((first + second) / 2)[1],
            "local": first_is_right((parts_n[0] + parts_m[0]) / 2)[1],
        }
        if self.training:
            self._write(m_keys, n_keys)
        return Output(weighted_sum(losses, self.weights), losses, accuracy)

    @torch.no_grad()
    def keys(self, rgb: Tensor, differences: tuple[Tensor, ...]) -> Keys:
        """Compute the keys of a window from clips [B, 3, T, S, S].

        Args:
            rgb: The window.
            differences: Frame differences of its whole span, then of its parts.

        Raises:
            ConfigError: the trunk gives another number of feature frames than there are parts.
        """
        rgb_map, whole_map, *part_maps = (self._key_map(clips) for clips in (rgb, *differences))
        frames = whole_map.shape[2]
        if frames != len(part_maps):
            raise ConfigError(
                f"FIMA pairs feature frames with parts of a window, but the trunk gives {frames} of clips of "
                f"{rgb.shape[2]} frames and there are {len(part_maps)} parts; give as many parts, or longer clips"
            )
        dense = _vectors(self.projector_dense_k, rearrange(whole_map, "b c t h w -> b c 1 (t h w) 1"))
        pooled = [_vectors(self.projector_dense_k, _pooled(each))[:, 0] for each in (rgb_map, *part_maps)]
        mask = foreground_mask(rgb_map, whole_map)
        return Keys(pooled[0], rearrange(dense, "b (t p) d -> b t p d", t=frames), pooled[1:], mask)

    def _key_map(self, clips: Tensor) -> Tensor:
        """Map clips [B, 3, T, S, S] -> [B, C, t, h, w]; in training, processes exchange samples."""
        inputs, order = shuffled(clips) if self.training else (clips, None)
        assert isinstance(self.encoder_k, VideoTrunk)
        return unshuffle(self.encoder_k.clip_maps(inputs), order)

    def query(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """Compute unit vectors [B, D] and tokens [B, t, P, 512] of clips [B, 3, T, S, S]."""
        maps = self.encoder_q.clip_maps(rgb)
        tokens = self.embedding1(rearrange(maps, "b c t h w -> b c t (h w)"))
        return _vectors(self.projector_dense, _pooled(maps))[:, 0], rearrange(tokens, "b d t p -> b t p d")

    def predictions(self, m_tokens: Tensor, n_tokens: Tensor) -> Tensor:
        """Predict motion from tokens [B, t, P, 512] of m and n: unit vectors [2, B, t, 1 + P, D].

        They are the motion of m at the places of n, then that of n at the places of m.  The first
        of each 1 + P is of the whole feature frame.
        """
        m_tokens, n_tokens = self.positions(m_tokens), self.positions(n_tokens)
        memory = rearrange([m_tokens, n_tokens], "s b t p d -> (s b t) p d")
        places = rearrange([n_tokens, m_tokens], "s b t p d -> (s b t) p d")
        queries = torch.cat([self.cls_token.to(places.dtype).expand(len(places), -1, -1), places], dim=1)
        decoded = rearrange(self.transformer_decoder(queries, memory), "n p d -> n d p 1")
        vectors = _vectors(self.projector_dense, self.embedding2(decoded)[:, :, None])  # [2 B t, 1 + P, D]
        batch, frames = m_tokens.shape[:2]
        return rearrange(vectors, "(s b t) p d -> s b t p d", b=batch, t=frames)

    def instance_logits(self, m_query: Tensor, n_query: Tensor, m_keys: Keys, n_keys: Keys) -> tuple[Tensor, Tensor]:
        """Compute logits [B, 1 + K] of queries [B, D] of both; the other's key is in column 0."""
        queue = self.queue.clone()
        first = contrast(m_query, n_keys.whole, queue, self.temperature)
        if self.enqueue == "interleaved":
            queue = queue.clone()
            enqueue(queue, self.queue_ptr.clone(), gather(n_keys.whole) if self.training else n_keys.whole)
        return first, contrast(n_query, m_keys.whole, queue, self.temperature)

    def dense_losses(
        self, predicted: Tensor, keys: Keys, other: Keys, *, coordinates: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """Compute the dense loss of each feature frame.

        Negatives are the keys of this process, and the queue.

        Args:
            predicted: [B, t, 1 + P, D] of a window at the places of the other.
            keys: Keys of the window.
            other: Keys of the other window.
            coordinates: [B, 4] corners of the crops of the window and of the other.
        """
        grid = keys.mask.shape[1], keys.mask.shape[2]
        positive = correspondence(coordinates[1], coordinates[0], grid, ratio=self.pos_ratio)
        positive = positive & other.mask.flatten(1)[:, :, None] & keys.mask.flatten(1)[:, None]
        everything = keys.dense.flatten(0, 2)  # [B t P, D]
        if "queue_dense" in self._buffers:
            everything = torch.cat([everything, self.queue_dense.T])
        return [
            dense_loss(queries, same, positive, all_keys=everything, temperature=self.dense_temperature)
            for queries, same in zip(predicted[:, :, 1:].unbind(1), keys.dense.unbind(1), strict=True)
        ]

    def part_logits(self, predicted: Tensor, keys: Keys, other: Keys) -> list[Tensor]:
        """Compute logits [B, 1 + B (2 t - 1) + K] of each part of a window.

        `predicted` is [B, t, 1 + P, D] of the window.
        Column 0 is the part itself.  Then come the other parts of the window and the parts of the
        other window, all of this process, and the queue.
        """
        queue, logits = self.motion_queue.clone(), []
        for place, queries in enumerate(predicted[:, :, 0].unbind(1)):
            rest = keys.parts[:place] + keys.parts[place + 1 :] + other.parts
            negatives = torch.cat([torch.cat(rest).T, queue], dim=1)
            logits.append(contrast(queries, keys.parts[place], negatives, self.temperature))
        return logits

    def _write(self, m_keys: Keys, n_keys: Keys) -> None:
        """Write the keys of all processes into the queues, in the reference's order."""
        for keys in (n_keys, m_keys):
            enqueue(self.queue, self.queue_ptr, gather(keys.whole))
            if "queue_dense" in self._buffers:
                for frame in keys.dense.unbind(1):
                    enqueue(self.queue_dense, self.queue_dense_ptr, gather(frame.flatten(0, 1)))
        enqueue(self.motion_queue, self.motion_queue_ptr, gather(torch.cat(n_keys.parts + m_keys.parts)))


def _pooled(maps: Tensor) -> Tensor:
    """Average maps [B, C, t, h, w] over time and places -> [B, C, 1, 1, 1]."""
    return rearrange(volume_mean(maps), "b c -> b c 1 1 1")


def _vectors(head: nn.Module, maps: Tensor) -> Tensor:
    """Project maps [B, C, 1, h, w] to unit vectors [B, h w, D], in float32."""
    return F.normalize(full_precision(rearrange(head(maps), "b d h w -> b (h w) d")), dim=-1)
