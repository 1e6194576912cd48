"""Prototypes of time-averaged features (Snell et al. 2017): blind to order, a control for others.

The metric "shift" keeps the order instead. The default is the TSN baseline of published code
(alibaba-mmai-research/MoLo).

On motion by itself that metric needs no training: `Motion` is the control that tells how much of a
result stored motion gives away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from fsar.episode import Episode
from fsar.matching import SHIFT_PRICE, class_means, cosine, full_precision, shift_cosine, token_cosine
from fsar.methods.base import Embedding, FewShotMethod, Output, SupportMerge, base_class_loss, query_loss, weighted_sum
from fsar.trunks import Features, Stream, Trunk
from shards_spec.errors import ConfigError, choice

FIRST_SCALE = {"cosine": 10.0, "euclidean": 1.0, "shift": 10.0}


class Prototype(FewShotMethod):
    """Logits are `temperature` times the similarity of a query to a class.

    loss = ce + classification_weight * class.

    Args:
        trunk, channels, frames: As of FewShotMethod.
        num_classes: Rows of the auxiliary classifier.
        metric: "cosine"; "euclidean": minus the squared distance to the mean of a class; or
            "shift": features in order, see `fsar.matching.shift_cosine`.
        support_merge: For cosine and shift: the mean of the similarities to each video of a class
            ("video", the code), or the similarity to their mean ("prototype").
        most_shift: Of "shift": steps that a video may be moved in time; None: a quarter of them.
        shift_price: Of "shift": what each step costs.
        temperature: A factor, or None (or 0) to learn it, from 1 for "euclidean" and from 10
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
        metric: Literal["cosine", "euclidean", "shift"] = "cosine",
        support_merge: SupportMerge = "video",
        most_shift: int | None = None,
        shift_price: float = SHIFT_PRICE,
        temperature: float | None = 1.0,
        classification_weight: float = 0.0,
    ) -> None:
        super().__init__(trunk, channels=channels, frames=frames)
        choice("metric", metric, tuple(FIRST_SCALE))
        choice("support_merge", support_merge, ("prototype", "video"))
        if (most_shift or 0) < 0 or shift_price < 0:
            raise ConfigError(f"most_shift={most_shift} and shift_price={shift_price}; give numbers from 0 on")
        self.metric = metric
        self.most_shift, self.shift_price = None if most_shift is None else int(most_shift), shift_price
        self.support_merge = "prototype" if metric == "euclidean" else support_merge
        self.weights = {"ce": 1.0, "class": classification_weight}
        self.temperature = temperature or None
        if self.temperature is None:
            self.scale = nn.Parameter(torch.tensor([FIRST_SCALE[metric]]))
        if classification_weight:
            self.classifier = nn.Linear(self.channels, num_classes)

    def embed(self, features: Features) -> Embedding:
        """Embed V videos: tokens [V, C], the mean over time; for "shift" all of them [V, T, C]."""
        return Embedding(features.pooled if self.metric == "shift" else features.pooled.mean(dim=1))

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Embeddings [way, shot, (T,) C] and [Q, (T,) C] -> logits [Q, way]."""
        scale = self.scale if self.temperature is None else self.temperature
        if self.support_merge == "prototype":
            return scale * self.similarity(query.tokens, class_means(support.tokens, mask))
        way = len(support.tokens)
        each = self.similarity(query.tokens, rearrange(support.tokens, "way shot ... -> (way shot) ..."))
        return scale * class_means(rearrange(each, "q (way shot) -> way shot q", way=way), mask).T

    def forward(self, episode: Episode) -> Output:
        """Logits and losses of one episode."""
        support, query = (self.embed(features) for features in self.read(episode))
        logits = self.match(support.map(episode.group), query, mask=episode.support_mask)
        losses, aux = {"ce": query_loss(logits, episode)}, {}
        if self.weights["class"]:
            tokens = torch.cat([support.tokens, query.tokens])
            aux["class"] = self.classifier(tokens.mean(dim=1) if self.metric == "shift" else tokens)  # [S + Q, N]
            losses["class"] = base_class_loss(aux["class"], episode)
        return Output(logits, losses, weighted_sum(losses, self.weights), aux)

    def similarity(self, query: Tensor, others: Tensor) -> Tensor:
        """[Q, C], [n, C] -> [Q, n]; the cosine to single videos has the code's 0.01 below.

        For "shift" [Q, T, C], [n, T, C] -> [Q, n].
        """
        if self.metric == "shift":
            return shift_cosine(query, others, most=self.most_shift, price=self.shift_price)
        if self.metric == "euclidean":
            return -squared_distance(query, others)
        if self.support_merge == "prototype":
            return cosine(query, others)
        return token_cosine(query[:, None], others[:, None]).flatten(1)


class Motion(Prototype):
    """Logits are `temperature` times the similarity of two videos' motion.

    With the trunk flow-grid there is nothing to learn but the temperature, which changes no answer.
    With tiny-flow it is a small network trained on motion.

    Args:
        trunk, channels, frames: As of FewShotMethod; the trunk reads motion, and `frames` are
            segments of a video.
        support_merge: The mean of the similarities to each video of a class ("video"), or the
            similarity to their mean ("prototype").
        most_shift: Steps that a video may be moved in time; None: a quarter of its segments.
        shift_price: What each step costs, in cosine.
        temperature: A factor, or None (or 0) to learn it, from 10.

    Raises:
        ConfigError: the trunk reads frames.
    """

    only_stream: ClassVar[Stream | None] = "motion"

    def __init__(
        self,
        *,
        trunk: str | Trunk | None = "flow-grid",
        channels: int | None = None,
        frames: int = 8,
        support_merge: SupportMerge = "video",
        most_shift: int | None = None,
        shift_price: float = 0.02,
        temperature: float | None = None,
    ) -> None:
        super().__init__(
            trunk=trunk,
            channels=channels,
            frames=frames,
            metric="shift",
            support_merge=support_merge,
            most_shift=most_shift,
            shift_price=shift_price,
            temperature=temperature,
        )
        if self.trunk is not None and self.stream != "motion":
            raise ConfigError(
                f"the method motion reads stored motion, and {type(self.trunk).__name__} reads frames: set streams = "
                "motion, with the trunk flow-grid or tiny-flow"
            )


def squared_distance(query: Tensor, prototypes: Tensor) -> Tensor:
    """[Q, C], [way, C] -> squared Euclidean distance [Q, way]."""
    difference = full_precision(query)[:, None] - full_precision(prototypes)[None]  # [Q, way, C]
    return difference.square().sum(dim=-1)
