"""HyRSM: hybrid relation guided set matching (Wang et al., CVPR 2022, arXiv 2204.13423).

Where the paper and the published code (alibaba-mmai-research/HyRSMPlusPlus) differ, this follows the code, and
says so.  It computes the same in a cheaper order: what does not depend on the query is computed once a video.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.episode import Episode
from fsar.matching import Alignment, Reduction, class_means, cosine_distance, full_precision, matched, set_distance
from fsar.methods.base import (
    Embedding,
    FewShotMethod,
    Output,
    base_class_loss,
    query_loss,
    weighted_sum,
)
from fsar.methods.layers import PositionCode, SetRelation, TemporalTransformer
from fsar.trunks import Features, Trunk
from shards_spec.errors import choice

SupportMerge = Literal["prototype", "video"]


class HyRSM(FewShotMethod):
    """Frame features related within a video, then within the episode, matched by a bidirectional Hausdorff metric.

    loss = ce + classification_weight * class; the class term is over frames.
    `support_merge="prototype"` averages the shots of a class before they are related to the query; "video" relates
    every support video and averages the distances of a class (the code's class for one shot).  `reduction="mean"`
    is the metric of the paper, "sum" that of its code.  The default weight is the code's for Kinetics-100.
    """

    batches_on_cpu: ClassVar[bool] = False  # one episode fills the cores, and batched attention has no fused kernel
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

    def frames_of(self, features: Features) -> Tensor:
        """Features of V videos -> tokens [V, T, C]: frames related within their video."""
        tokens: Tensor = self.transformer(self.position(features.pooled))
        return tokens

    def embed(self, features: Features) -> Embedding:
        """Features of V videos -> tokens [V, T + 3 + heads, C], as `project` makes them."""
        return Embedding(self.project(self.frames_of(features)))

    def project(self, frames: Tensor) -> Tensor:
        """Tokens [V, T, C] -> [V, T + 3 + heads, C]: frames as the fusion maps them, then what their mean relates with.

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
        """Projected members [S, n, C] and queries [Q, n, C] -> members as each query sees them [Q, S, T, C], [Q, T, C].

        The convolution over (frame, relation) is the sum of one over frames and one over relations.
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

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Embeddings [way, shot, n, C] and [Q, n, C] -> logits [Q, way]."""
        members, queries = self.fuse(self.members(support.tokens, mask), query.tokens)
        return self.logits(members, queries, mask, len(support.tokens))

    def alignment(
        self,
        query: Embedding,
        support: Embedding,
        *,
        class_text: Tensor | None = None,  # noqa: ARG002
    ) -> dict[str, Alignment]:
        """What the metric matches of queries and members, each pair related within the whole episode."""
        members, queries = self.fuse(self.members(support.tokens, None), query.tokens)
        return {"frames": matched(cosine_distance(queries[:, None], members))}

    def fused_losses(self, members: Tensor, query: Tensor) -> dict[str, Tensor]:  # noqa: ARG002  # HyRSM has none
        """Loss terms of fused members [Q, S, T, C] and queries [Q, T, C]."""
        return {}

    def support_set(self, episode: Episode, support: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Projected [S, n, C] of the support -> [way, shot, n, C], its mask, and what is to be inspected of it."""
        return episode.group(support), episode.support_mask, {}

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


def real_places(mask: Tensor, device: torch.device) -> Tensor:
    """[way, shot] on the host -> places [S] of real videos among way * shot."""
    return mask.flatten().nonzero().squeeze(1).to(device)


def group(rows: Tensor, way: int, mask: Tensor | None) -> Tensor:
    """[S, ...] of real videos, class by class -> [way, shot, ...] with zeros for padding."""
    if mask is not None:
        empty = rows.new_zeros((mask.numel(), *rows.shape[1:]))
        rows = empty.index_copy(0, real_places(mask, rows.device), rows)
    return rearrange(rows, "(way shot) ... -> way shot ...", way=way)
