"""HyRSM (Wang et al., CVPR 2022, arXiv 2204.13423) and HyRSM++ (arXiv 2301.03330): hybrid relation, set matching.

Where the papers and the published code (alibaba-mmai-research/HyRSMPlusPlus) differ, this follows the code, and
says so.  It computes the same in a cheaper order: what does not depend on the query is computed once a video.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from fsar.layers import PositionCode, TemporalTransformer
from fsar.matching import Reduction, bi_mean_hausdorff, class_means, full_precision
from fsar.methods.base import (
    Embedding,
    FewShotMethod,
    Output,
    base_class_loss,
    query_loss,
    weighted_sum,
)
from shards_spec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fsar.episode import Episode
    from fsar.trunks import Features, Trunk

SupportMerge = Literal["prototype", "video"]


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

    def forward(self, members: Tensor, queries: Tensor) -> Tensor:
        """[S, C], [Q, C] -> [Q, S+1, C], the query last; each token is projected once, not once a query."""
        tokens = torch.cat([members, queries])  # [S + Q, C]
        q, k, v = (
            rearrange(sequences(project(tokens), len(members)), "q n (head c) -> q head n c", head=self.heads)
            for project in (self.query, self.key, self.value)
        )
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        out = self.output_dropout(self.output(rearrange(attended, "q head n c -> q n (head c)")))
        return F.relu(self.norm(sequences(tokens, len(members)) + out))


def sequences(tokens: Tensor, members: int) -> Tensor:
    """[S + Q, C] -> [Q, S+1, C]: for each query the S members, then the query."""
    queries = tokens[members:, None]  # [Q, 1, C]
    return torch.cat([tokens[:members].expand(len(queries), -1, -1), queries], dim=1)


class HyRSM(FewShotMethod):
    """Frame features related within a video, then within the episode, matched by a bidirectional Hausdorff metric.

    loss = ce + classification_weight * class; the class term is over frames.
    `support_merge="prototype"` averages the shots of a class before they are related to the query; "video" relates
    every support video and averages the distances of a class (the code's class for one shot).  `reduction="mean"`
    is the metric of the paper, "sum" that of its code.  The default weight is the code's for Kinetics-100.
    """

    REFERENCE_NAMES: ClassVar[Mapping[str, str]] = {
        "transformer.norm": "temporal_atte_before.norm",
        "transformer.qkv": "temporal_atte_before.fn.to_qkv",
        "transformer.attended": "temporal_atte_before.fn.to_out.0",
        "relation.query": "temporal_atte.w_qs",
        "relation.key": "temporal_atte.w_ks",
        "relation.value": "temporal_atte.w_vs",
        "relation.output": "temporal_atte.fc",
        "relation.norm": "temporal_atte.layer_norm",
        "fusion": "layer2.0",
        "classifier": "classification_layer",
    }

    def __init__(
        self,
        *,
        trunk: str | Trunk | None = "resnet50",
        channels: int | None = None,
        frames: int = 8,
        num_classes: int = 64,
        position_scale: tuple[float, float] = (10.0, 1.0),
        heads: int = 8,
        support_merge: SupportMerge = "prototype",
        reduction: Reduction = "sum",
        classification_weight: float = 0.1,
        dropout: bool = True,
    ) -> None:
        super().__init__(trunk, channels=channels, frames=frames)
        if reduction not in ("sum", "mean"):
            raise ConfigError(f'reduction="{reduction}" is not known; choose "sum" or "mean"')
        if support_merge not in ("prototype", "video"):
            raise ConfigError(f'support_merge="{support_merge}" is not known; choose "prototype" or "video"')
        self.reduction: Reduction = reduction
        self.support_merge: SupportMerge = support_merge
        self.weights = {"ce": 1.0, "class": classification_weight}
        width, kept = self.channels, 1.0 if dropout else 0.0
        self.position = PositionCode(width, rows=frames, scale=position_scale, dropout=0.1 * kept)
        self.transformer = TemporalTransformer(width, heads=heads, attention_dropout=0.2 * kept, hidden_dropout=None)
        # The code drops attention weights too, which its own description does not say.
        self.relation = SetRelation(width, heads=heads, attention_dropout=0.1 * kept, output_dropout=0.05 * kept)
        self.fusion = nn.Conv1d(2 * width, width, 1)
        self.classifier = nn.Linear(width, num_classes)

    def embed(self, features: Features) -> Embedding:
        """Features of V videos -> tokens [V, T, C]: frames related within their video."""
        return Embedding(self.transformer(self.position(features.pooled)))

    def members(self, support: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens [way, shot, T, C] -> the members [S, T, C] of the support, without padding.

        S is way, or with `support_merge="video"` the number of real videos.
        """
        if self.support_merge == "prototype":
            return class_means(support, mask)
        flat = rearrange(support, "way shot t c -> (way shot) t c")
        return flat if mask is None else flat[real_places(mask, flat.device)]

    def fuse(self, members: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Members [S, T, C] and queries [Q, T, C] -> the members as each query sees them [Q, S, T, C], and [Q, T, C].

        The convolution over (frame, relation) is the sum of one over frames and one over relations.
        """
        relations = self.relation(members.mean(dim=1), query.mean(dim=1))  # [Q, S+1, C]
        of_frame, of_relation = self.fusion.weight.squeeze(2).chunk(2, dim=1)  # [C, C] each
        related = full_precision(F.linear(relations, of_relation, self.fusion.bias))[:, :, None]  # [Q, S+1, 1, C]
        members, query = (full_precision(F.linear(tokens, of_frame)) for tokens in (members, query))
        return members + related[:, :-1], query + related[:, -1]

    def logits(self, members: Tensor, query: Tensor, mask: Tensor | None, way: int) -> Tensor:
        """Fused members [Q, S, T, C] and queries [Q, T, C] -> logits [Q, way]."""
        distance = set_distance(query, members, reduction=self.reduction)  # [Q, S]
        if self.support_merge == "video":
            distance = class_means(group(distance.T, way, mask), mask).T  # [Q, way]
        return -distance

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Embeddings [way, shot, T, C] and [Q, T, C] -> logits [Q, way]."""
        members, queries = self.fuse(self.members(support.tokens, mask), query.tokens)
        return self.logits(members, queries, mask, len(support.tokens))

    def fused_losses(self, members: Tensor, query: Tensor) -> dict[str, Tensor]:  # noqa: ARG002  # HyRSM has none
        """Loss terms of fused members [Q, S, T, C] and queries [Q, T, C]."""
        return {}

    def forward(self, episode: Episode) -> Output:
        """Logits and losses of one episode."""
        support, query = (self.embed(features).tokens for features in self.read(episode))  # [S, T, C], [Q, T, C]
        mask = episode.support_mask
        members, queries = self.fuse(self.members(episode.group(support), mask), query)
        logits = self.logits(members, queries, mask, episode.way)
        class_logits = self.classifier(torch.cat([support, query]))  # [S + Q, T, N]
        of_frames = [base_class_loss(frame, episode) for frame in class_logits.unbind(dim=1)]
        losses = {"ce": query_loss(logits, episode), "class": torch.stack(of_frames).mean()}
        losses |= self.fused_losses(members, queries)
        return Output(logits, losses, weighted_sum(losses, self.weights), {"class": class_logits})


class HyRSMPlusPlus(HyRSM):
    """HyRSM with a term that keeps neighbouring frames of a video close and distant ones apart.

    loss = ce + classification_weight * class + temporal_weight * temporal.
    Frames are neighbours up to `window` steps; beyond, the margin grows with `temporal_balance` (twice the paper's
    squared sigma), and `outside_weight`, which the paper does not have, weighs what falls short of it.  The
    default values are the code's for Kinetics-100.
    """

    def __init__(
        self,
        *,
        trunk: str | Trunk | None = "resnet50",
        channels: int | None = None,
        frames: int = 8,
        num_classes: int = 64,
        position_scale: tuple[float, float] = (10.0, 1.0),
        heads: int = 8,
        support_merge: SupportMerge = "prototype",
        reduction: Reduction = "sum",
        window: int = 3,
        temporal_balance: float = 23.0,
        outside_weight: float = 10.0,
        classification_weight: float = 0.1,
        temporal_weight: float = 0.1,
        dropout: bool = True,
    ) -> None:
        super().__init__(
            trunk=trunk,
            channels=channels,
            frames=frames,
            num_classes=num_classes,
            position_scale=position_scale,
            heads=heads,
            support_merge=support_merge,
            reduction=reduction,
            classification_weight=classification_weight,
            dropout=dropout,
        )
        if window < 0 or temporal_balance <= 0:
            raise ConfigError(
                f"window={window} and temporal_balance={temporal_balance}; give a window of at least 0 steps "
                "and a balance above 0"
            )
        self.window = window
        self.temporal_balance = temporal_balance
        self.outside_weight = outside_weight
        self.weights["temporal"] = temporal_weight

    def fused_losses(self, members: Tensor, query: Tensor) -> dict[str, Tensor]:
        """Temporal coherence of fused members [Q, S, T, C] and of fused queries [Q, T, C], summed."""
        videos = rearrange(members, "q s t c -> (q s) t c")
        return {"temporal": self._incoherence(videos) + self._incoherence(query)}

    def _incoherence(self, videos: Tensor) -> Tensor:
        return temporal_incoherence(
            videos, window=self.window, balance=self.temporal_balance, outside_weight=self.outside_weight
        )


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """[V, n, C], [V, m, C] -> 1 - cosine [V, n, m], in float32 (or wider) also under autocast."""
    a, b = F.normalize(full_precision(a), dim=-1), F.normalize(full_precision(b), dim=-1)
    with torch.autocast(a.device.type, enabled=False):
        return 1 - a @ b.mT


def set_distance(query: Tensor, members: Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """[Q, n, C], [Q, S, m, C] -> [Q, S]: each frame to the nearest of the other set, in both directions."""
    distance = cosine_distance(rearrange(members, "q s m c -> q (s m) c"), query)
    return bi_mean_hausdorff(rearrange(distance, "q (s m) n -> q s m n", s=members.shape[1]), reduction=reduction)


def temporal_incoherence(videos: Tensor, *, window: int, balance: float, outside_weight: float) -> Tensor:
    """[V, T, C] -> mean cost of all pairs of frames of a video (HyRSM++, temporal coherence regularisation).

    A pair n <= window steps apart costs its distance / (n^2 + 1); others cost what their distance falls short of
    the margin 1 - exp(-(n - window)^2 / balance), times `outside_weight`.
    """
    distance = cosine_distance(videos, videos)  # [V, T, T]
    step = torch.arange(videos.shape[1], device=videos.device, dtype=distance.dtype)
    apart = (step[:, None] - step).abs()  # [T, T]
    margin = 1 - torch.exp(-(apart - window).square() / balance)
    outside = outside_weight * F.relu(margin - distance)
    return torch.where(apart <= window, distance / (apart.square() + 1), outside).mean()


def real_places(mask: Tensor, device: torch.device) -> Tensor:
    """[way, shot] on the host -> places [S] of real videos among way * shot."""
    return mask.flatten().nonzero().squeeze(1).to(device)


def group(rows: Tensor, way: int, mask: Tensor | None) -> Tensor:
    """[S, ...] of real videos, class by class -> [way, shot, ...] with zeros for padding."""
    if mask is not None:
        empty = rows.new_zeros((mask.numel(), *rows.shape[1:]))
        rows = empty.index_copy(0, real_places(mask, rows.device), rows)
    return rearrange(rows, "(way shot) ... -> way shot ...", way=way)
