"""Prototypes of time-averaged features (Snell et al. 2017): blind to order, a control for others.

The default is the TSN baseline of published code (alibaba-mmai-research/MoLo).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from fsar.episode import Episode
from fsar.matching import class_means, cosine, full_precision, token_cosine
from fsar.methods.base import Embedding, FewShotMethod, Output, SupportMerge, base_class_loss, query_loss, weighted_sum
from fsar.trunks import Features, Trunk
from shards_spec.errors import choice

FIRST_SCALE = {"cosine": 10.0, "euclidean": 1.0}


class Prototype(FewShotMethod):
    """Logits are `temperature` times the similarity of a query to a class.

    loss = ce + classification_weight * class.

    Args:
        trunk, channels, frames: As of FewShotMethod.
        num_classes: Rows of the auxiliary classifier.
        metric: "cosine", or "euclidean": minus the squared distance to the mean of a class.
        support_merge: For the cosine: the mean of the cosines to each video of a class ("video",
            the code), or the cosine to their mean ("prototype").
        temperature: A factor, or None (or 0) to learn it, from 10 for the cosine and from 1
            otherwise. At 1 cosines stay between -1 and 1 and cannot be fitted.
        classification_weight: Weight of the auxiliary classifier's term; at 0 there is no
            classifier.
    """

    REFERENCE_NAMES: ClassVar[Mapping[str, str]] = {"classifier": "classification_layer"}

    def __init__(
        self,
        *,
        trunk: str | Trunk | None = "resnet50",
        channels: int | None = None,
        frames: int = 8,
        num_classes: int = 64,
        metric: Literal["cosine", "euclidean"] = "cosine",
        support_merge: SupportMerge = "video",
        temperature: float | None = 1.0,
        classification_weight: float = 0.0,
    ) -> None:
        super().__init__(trunk, channels=channels, frames=frames)
        choice("metric", metric, tuple(FIRST_SCALE))
        choice("support_merge", support_merge, ("prototype", "video"))
        self.metric = metric
        self.support_merge = "prototype" if metric == "euclidean" else support_merge
        self.weights = {"ce": 1.0, "class": classification_weight}
        self.temperature = temperature or None
        if self.temperature is None:
            self.scale = nn.Parameter(torch.tensor([FIRST_SCALE[metric]]))
        if classification_weight:
            self.classifier = nn.Linear(self.channels, num_classes)

    def embed(self, features: Features) -> Embedding:
        """Embed V videos: tokens [V, C], the mean over time."""
        return Embedding(features.pooled.mean(dim=1))

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Embeddings [way, shot, C] and [Q, C] -> logits [Q, way]."""
        scale = self.scale if self.temperature is None else self.temperature
        if self.support_merge == "prototype":
            return scale * self.similarity(query.tokens, class_means(support.tokens, mask))
        way = len(support.tokens)
        each = self.similarity(query.tokens, rearrange(support.tokens, "way shot c -> (way shot) c"))
        return scale * class_means(rearrange(each, "q (way shot) -> way shot q", way=way), mask).T

    def forward(self, episode: Episode) -> Output:
        """Logits and losses of one episode."""
        support, query = (self.embed(features) for features in self.read(episode))
        logits = self.match(support.map(episode.group), query, mask=episode.support_mask)
        losses, aux = {"ce": query_loss(logits, episode)}, {}
        if self.weights["class"]:
            aux["class"] = self.classifier(torch.cat([support.tokens, query.tokens]))  # [S + Q, N]
            losses["class"] = base_class_loss(aux["class"], episode)
        return Output(logits, losses, weighted_sum(losses, self.weights), aux)

    def similarity(self, query: Tensor, others: Tensor) -> Tensor:
        """[Q, C], [n, C] -> [Q, n]; the cosine to single videos has the code's 0.01 below."""
        if self.metric == "euclidean":
            return -squared_distance(query, others)
        if self.support_merge == "prototype":
            return cosine(query, others)
        return token_cosine(query[:, None], others[:, None]).flatten(1)


def squared_distance(query: Tensor, prototypes: Tensor) -> Tensor:
    """[Q, C], [way, C] -> squared Euclidean distance [Q, way]."""
    difference = full_precision(query)[:, None] - full_precision(prototypes)[None]  # [Q, way, C]
    return difference.square().sum(dim=-1)
