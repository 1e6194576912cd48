"""Prototypes of time-averaged features (Snell et al. 2017): blind to order, hence the control of other methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from fsar.matching import class_means, cosine, squared_distance
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

FIRST_SCALE = {"cosine": 10.0, "euclidean": 1.0}


class Prototype(FewShotMethod):
    """Logits: scale times cosine, or minus scale times the mean squared difference, to the mean of a class.

    The squared Euclidean distance is divided by the number of channels, so that one scale serves any trunk.
    `temperature` fixes the scale, which is learned otherwise.  loss = ce + classification_weight * class.
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
        temperature: float | None = None,
        classification_weight: float = 0.0,
    ) -> None:
        super().__init__(trunk, channels=channels, frames=frames)
        if metric not in FIRST_SCALE:
            raise ConfigError(f'metric="{metric}" is not known; choose "cosine" or "euclidean"')
        self.metric = metric
        self.weights = {"ce": 1.0, "class": classification_weight}
        self.temperature = temperature
        if temperature is None:
            self.scale = nn.Parameter(torch.tensor([FIRST_SCALE[metric]]))
        if classification_weight:
            self.classifier = nn.Linear(self.channels, num_classes)

    def embed(self, features: Features) -> Embedding:
        """Features of V videos -> tokens [V, C]: the mean over time."""
        return Embedding(features.pooled.mean(dim=1))

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Embeddings [way, shot, C] and [Q, C] -> logits [Q, way]."""
        prototypes = class_means(support.tokens, mask)  # [way, C]
        scale = self.scale if self.temperature is None else self.temperature
        if self.metric == "cosine":
            return scale * cosine(query.tokens, prototypes)
        return -scale * squared_distance(query.tokens, prototypes) / self.channels

    def forward(self, episode: Episode) -> Output:
        """Logits and losses of one episode."""
        support, query = (self.embed(features) for features in self.read(episode))
        logits = self.match(support.map(episode.group), query, mask=episode.support_mask)
        losses, aux = {"ce": query_loss(logits, episode)}, {}
        if self.weights["class"]:
            aux["class"] = self.classifier(torch.cat([support.tokens, query.tokens]))  # [S + Q, N]
            losses["class"] = base_class_loss(aux["class"], episode)
        return Output(logits, losses, weighted_sum(losses, self.weights), aux)
