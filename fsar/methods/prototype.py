"""Prototypes of time-averaged features (Snell et al. 2017): blind to order, hence the control of other methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from fsar.episode import Episode
from fsar.matching import class_means, cosine, squared_distance, token_cosine
from fsar.methods.base import (
    Embedding,
    FewShotMethod,
    Output,
    base_class_loss,
    query_loss,
    weighted_sum,
)
from fsar.trunks import Features, Trunk
from shards_spec.errors import choice

FIRST_SCALE = {"cosine": 10.0, "euclidean": 1.0}


class Prototype(FewShotMethod):
    """Logits: `temperature` times the similarity to a class.  loss = ce + classification_weight * class.

    By default the TSN baseline of published code (alibaba-mmai-research/MoLo), without anything to learn: the
    mean of the cosines to each video of a class; between -1 and 1, they cannot be fitted with temperature=1.
    support_merge="prototype" takes the cosine to the mean of a class; metric="euclidean" minus the squared
    distance to it, whatever support_merge is.  With temperature=None, or 0, it is learned, from 10 (cosine) or 1.
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
        support_merge: Literal["prototype", "video"] = "video",
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
        """Features of V videos -> tokens [V, C]: the mean over time."""
        return Embedding(features.pooled.mean(dim=1))

    def by_pairs(self, shot: int) -> bool:
        """A query is compared with each video of a class, or with the only one."""
        return shot == 1 or self.support_merge == "video"

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Embeddings [way, shot, C] and [Q, C] -> logits [Q, way]."""
        scale = self.scale if self.temperature is None else self.temperature
        if self.support_merge == "prototype":
            return scale * self.similarity(query.tokens, class_means(support.tokens, mask))
        way = len(support.tokens)
        each = self.similarity(query.tokens, rearrange(support.tokens, "way shot c -> (way shot) c"))
        return scale * class_means(rearrange(each, "q (way shot) -> way shot q", way=way), mask).T

    def similarity(self, query: Tensor, others: Tensor) -> Tensor:
        """[Q, C], [n, C] -> [Q, n]; the cosine to single videos is the published code's, with 0.01 below."""
        if self.metric == "euclidean":
            return -squared_distance(query, others)
        if self.support_merge == "prototype":
            return cosine(query, others)
        return token_cosine(query[:, None], others[:, None]).flatten(1)

    def forward(self, episode: Episode) -> Output:
        """Logits and losses of one episode."""
        support, query = (self.embed(features) for features in self.read(episode))
        logits = self.match(support.map(episode.group), query, mask=episode.support_mask)
        losses, aux = {"ce": query_loss(logits, episode)}, {}
        if self.weights["class"]:
            aux["class"] = self.classifier(torch.cat([support.tokens, query.tokens]))  # [S + Q, N]
            losses["class"] = base_class_loss(aux["class"], episode)
        return Output(logits, losses, weighted_sum(losses, self.weights), aux)
