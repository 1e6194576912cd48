"""HyRSM: hybrid relation guided set matching (Wang et al., CVPR 2022, arXiv 2204.13423).

1. Intra-relation: attention over the frames of a video.
2. Inter-relation: attention over the mean frames of the support videos and one query (section 3.2).
3. Fusion: a convolution over each frame and its video's relation.
4. Matching: the bidirectional mean Hausdorff metric over frames.

Where the paper and the published code (alibaba-mmai-research/HyRSMPlusPlus) differ, this follows
the code, and says so. It computes the same in a cheaper order: once a video where the query does
not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.episode import Episode
from fsar.matching import Reduction, class_means, full_precision, set_distance
from fsar.methods.base import Embedding, FewShotMethod, Output, SupportMerge, base_class_loss, query_loss, weighted_sum
from fsar.methods.layers import PositionCode, TemporalTransformer
from fsar.trunks import Features, Trunk
from shards_spec.errors import choice


class HyRSM(FewShotMethod):
    """Frames related within a video, then within the episode, matched by the Hausdorff metric.

    loss = ce + classification_weight * class; the class term is over frames.

    Args:
        trunk, channels, frames: As of FewShotMethod.
        num_classes: Rows of the auxiliary classifier.
        position_scale: (A, B) of the position code.
        heads: Heads of both attentions.
        support_merge: "prototype" averages the shots of a class before they are related to the
            query. "video" relates every support video, and averages the distances of a class (the
            code's class for one shot).
        reduction: "mean" is the metric of the paper, "sum" that of its code.
        classification_weight: Weight of the auxiliary classifier's term; by default the code's for
            Kinetics-100.
        dropout: Drop out where the code does.
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
        choice("reduction", reduction, ("sum", "mean"))
        choice("support_merge", support_merge, ("prototype", "video"))
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
        """Embed V videos: tokens [V, T + 3 + heads, C], as `project` makes them."""
        return Embedding(self.project(self.frames_of(features)))

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Embeddings [way, shot, n, C] and [Q, n, C] -> logits [Q, way]."""
        members, queries = self.fuse(self.members(support.tokens, mask), query.tokens)
        return self.logits(members, queries, mask, len(support.tokens))

    def forward(self, episode: Episode) -> Output:
        """Logits and losses of one episode."""
        support, query = (self.frames_of(features) for features in self.read(episode))  # [S, T, C], [Q, T, C]
        grouped, mask, aux = self.support_set(episode, self.project(support))
        members, queries = self.fuse(self.members(grouped, mask), self.project(query))
        logits = self.logits(members, queries, mask, episode.way)
        class_logits = self.classifier(torch.cat([support, query]))  # [S + Q, T, N]
        of_frames = [base_class_loss(frame, episode) for frame in class_logits.unbind(dim=1)]
        losses = {"ce": query_loss(logits, episode), "class": torch.stack(of_frames).mean()}
        losses |= self.fused_losses(members, queries)
        return Output(logits, losses, weighted_sum(losses, self.weights), {"class": class_logits} | aux)

    def frames_of(self, features: Features) -> Tensor:
        """Features of V videos -> tokens [V, T, C]: frames related within their video."""
        tokens: Tensor = self.transformer(self.position(features.pooled))
        return tokens

    def project(self, frames: Tensor) -> Tensor:
        """Tokens [V, T, C] -> [V, T + 3 + heads, C]: fused frames, then the parts of their mean.

        All of it is linear in the tokens, so that the mean of a class is the mean of these.
        """
        of_frame, _ = self.fusion.weight.squeeze(2).chunk(2, dim=1)  # [C, C]
        return torch.cat([F.linear(frames, of_frame), self.relation.project(frames.mean(dim=1))], dim=1)

    def members(self, support: Tensor, mask: Tensor | None) -> Tensor:
        """Projected [way, shot, n, C] -> the members [S, n, C] of the support, without padding.

        S is way, or with `support_merge="video"` the number of real videos.
        """
        if self.support_merge == "prototype":
            return class_means(support, mask)
        flat = rearrange(support, "way shot n c -> (way shot) n c")
        return flat if mask is None else flat[real_places(mask, flat.device)]

    def fuse(self, members: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Add to the frames of members and queries what relates them (inter-relation and fusion).

        The convolution over (frame, relation) is the sum of one over frames and one over relations.

        Args:
            members: [S, n, C], projected.
            query: [Q, n, C], projected.

        Returns:
            Members as each query sees them [Q, S, T, C], and queries [Q, T, C].
        """
        apart = self.relation.parts
        relations = self.relation(members[:, -apart:], query[:, -apart:])  # [Q, S+1, C]
        _, of_relation = self.fusion.weight.squeeze(2).chunk(2, dim=1)  # [C, C]
        related = full_precision(F.linear(relations, of_relation, self.fusion.bias))[:, :, None]  # [Q, S+1, 1, C]
        members, query = (full_precision(each[:, :-apart]) for each in (members, query))
        return members + related[:, :-1], query + related[:, -1]

    def logits(self, members: Tensor, query: Tensor, mask: Tensor | None, way: int) -> Tensor:
        """Fused members [Q, S, T, C] and queries [Q, T, C] -> logits [Q, way]."""
        distance = set_distance(query, members, reduction=self.reduction)  # [Q, S]
        if self.support_merge == "video":
            distance = class_means(group(distance.T, way, mask), mask).T  # [Q, way]
        return -distance

    def support_set(self, episode: Episode, support: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Group projected [S, n, C] to [way, shot, n, C]; add its mask and `aux`."""
        return episode.group(support), episode.support_mask, {}

    def fused_losses(self, members: Tensor, query: Tensor) -> dict[str, Tensor]:  # noqa: ARG002  # HyRSM has none
        """Loss terms of fused members [Q, S, T, C] and queries [Q, T, C]."""
        return {}


class SetRelation(nn.Module):
    """Self-attention over the members of the support and one query, LayerNorm after it, then ReLU.

    Each query has a sequence of its own, so queries never see each other (section 3.2:
    inter-relation).
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
        """[V, C] -> [V, 3 + heads, C]: the token, its query, its key, its part of each head.

        A value is mapped to the output before it is summed: once a video, and not once for each
        sequence that the video is in.
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


def real_places(mask: Tensor, device: torch.device) -> Tensor:
    """[way, shot] on the host -> places [S] of real videos among way * shot."""
    return mask.flatten().nonzero().squeeze(1).to(device)


def group(rows: Tensor, way: int, mask: Tensor | None) -> Tensor:
    """[S, ...] of real videos, class by class -> [way, shot, ...] with zeros for padding."""
    if mask is not None:
        empty = rows.new_zeros((mask.numel(), *rows.shape[1:]))
        rows = empty.index_copy(0, real_places(mask, rows.device), rows)
    return rearrange(rows, "(way shot) ... -> way shot ...", way=way)
