"""The contract of a few-shot method: features -> embedding -> logits and losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.episode import Episode
from fsar.matching import Alignment, full_precision
from fsar.trunks import Features, Trunk, create_trunk
from fsar.trunks.base import mean_pool
from shards_spec.errors import ConfigError


@dataclass(frozen=True)
class Embedding:
    """What matching needs to know of videos; it depends on each video alone.

    The leading shape is [V], [way, shot] or [Q], whichever set of videos it holds.
    """

    tokens: Tensor  # [..., n, C], or [..., C] for methods with one vector a video
    motion: Tensor | None = None  # [..., m, C]

    def map(self, function: Callable[[Tensor], Tensor]) -> Embedding:
        """The embedding with a function applied to each of its tensors (indexing, moving, reshaping)."""
        return Embedding(function(self.tokens), None if self.motion is None else function(self.motion))


@dataclass
class Output:
    """What a method says about an episode."""

    logits: Tensor  # [Q, way] float32
    losses: dict[str, Tensor]  # every term by its name, unweighted scalars
    loss: Tensor  # their weighted sum
    aux: dict[str, Tensor] = field(default_factory=dict)  # further logits by name, for inspection


class FewShotMethod(nn.Module):
    """A trunk and what stands on it; a method defines `embed` and `compare`, and `forward` for losses of its own.

    `trunk` is a name, a Trunk, or None where episodes carry features; `channels` is needed with None only.
    `frames` is how many features a video has, one a frame or one a clip, and `least` how many the method needs.
    ConfigError when these do not fit.
    """

    # Our name prefix -> official name (without "head.") in published state dicts.
    REFERENCE_NAMES: ClassVar[Mapping[str, str]] = {}
    reads_class_text: ClassVar[bool] = False  # whether episodes of a run need the text vectors of their classes
    reads_maps: ClassVar[bool] = False  # whether `embed` needs maps of single frames, not pooled features alone
    reads_unlabelled: ClassVar[bool] = False  # whether `match` and `forward` take unlabelled videos
    batches_on_cpu: ClassVar[bool] = True  # whether matching many episodes together is faster there than one by one

    def __init__(self, trunk: str | Trunk | None, *, channels: int | None, frames: int, least: int = 1) -> None:
        super().__init__()
        name = type(self).__name__
        if frames < least:
            raise ConfigError(f"{name} needs at least {least} frames or clips of a video, not {frames}; set frames")
        self.trunk: Trunk | None = create_trunk(trunk) if isinstance(trunk, str) else trunk
        if self.reads_maps and self.trunk is not None and not self.trunk.has_maps:
            trunk_name = type(self.trunk).__name__
            raise ConfigError(f"{name} needs maps of each frame, and {trunk_name} has none; choose a ResNet")
        known = channels if self.trunk is None else self.trunk.channels
        if known is None:
            raise ConfigError("trunk=None needs the option channels: the width of the features that episodes carry")
        if channels not in (None, known):
            raise ConfigError(f"channels={channels} does not fit the trunk, which has {known}; leave channels out")
        self.channels = known
        self.frames = frames

    def set_base_text(self, text: Tensor) -> None:
        """Take the text vectors [N, C] of the base classes; here nothing of them is kept.

        ConfigError for a method that reads no class texts.
        """
        if not self.reads_class_text:
            raise ConfigError(f"{type(self).__name__} reads no class texts, but was given some {list(text.shape)}")

    @property
    def reads_images(self) -> bool:
        """Whether the losses of `forward` need images beside features."""
        return False

    def embed(self, features: Features) -> Embedding:
        """Features of V videos -> their embedding."""
        raise NotImplementedError

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """[way, shot, ...] and [Q, ...] -> logits [Q, way]."""
        raise NotImplementedError

    def by_pairs(self, shot: int) -> bool:  # noqa: ARG002  # some methods depend on it
        """Whether a logit is the mean, over a class's videos, of those that `match` gives were each a class alone.

        Evaluation then matches each pair of videos once, and looks up the rest.
        """
        return False

    def alignment(
        self,
        query: Embedding,  # noqa: ARG002  # of methods that align anything
        support: Embedding,  # noqa: ARG002
        *,
        class_text: Tensor | None = None,  # noqa: ARG002
    ) -> dict[str, Alignment]:
        """Queries [Q, ...] and support [way, shot, ...] -> what of them is matched, by name ("frames", "motion").

        Empty for a method that does not match steps of videos.
        """
        return {}

    def reconstruct(self, features: Features, size: tuple[int, int]) -> Tensor | None:  # noqa: ARG002
        """Features of V videos -> the frame differences [V, T-1, 3, *size] that a decoder makes of them.

        None for a method without one.
        """
        return None

    def match(
        self,
        support: Embedding,
        query: Embedding,
        *,
        mask: Tensor | None = None,
        class_text: Tensor | None = None,
        unlabelled: Embedding | None = None,
    ) -> Tensor:
        """Embeddings [way, shot, ...] and [Q, ...] -> logits [Q, way]; `mask` [way, shot] is False at padding.

        ConfigError when class texts or unlabelled videos are given to a method that does not read them.
        """
        if class_text is not None or unlabelled is not None:
            raise ConfigError(f"{type(self).__name__} reads neither class texts nor unlabelled videos; leave them out")
        return self.compare(support, query, mask)

    def forward(self, episode: Episode) -> Output:
        """Logits of an episode and their cross-entropy: the loss of a method that has no other."""
        support, query = (self.embed(features) for features in self.read(episode))
        unlabelled = self.read_unlabelled(episode) if self.reads_unlabelled else None
        logits = self.match(
            support.map(episode.group),
            query,
            mask=episode.support_mask,
            class_text=episode.class_text if self.reads_class_text else None,
            unlabelled=None if unlabelled is None else self.embed(unlabelled),
        )
        loss = query_loss(logits, episode)
        return Output(logits, {"ce": loss}, loss)

    def pool(self, maps: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C] in the trunk's way; the mean over places without a trunk."""
        return mean_pool(maps) if self.trunk is None else self.trunk.pool(maps)

    def read(self, episode: Episode) -> tuple[Features, Features]:
        """Features of the real support videos [S, ...] and of the queries [Q, ...].

        Support and query go through the trunk in two calls, as in the reference code: in training each has
        BatchNorm statistics of its own.  Padding of unequal shots is removed before.
        """
        features = episode.support_features
        if features is not None and episode.query_features is not None:
            return self._given(episode.ungroup(features)), self._given(episode.query_features)
        if self.trunk is None or episode.support is None or episode.query is None:
            raise ConfigError("trunk=None needs episodes that carry features; give them, or choose a trunk")
        return self.trunk(episode.ungroup(episode.support)), self.trunk(episode.query)

    def read_unlabelled(self, episode: Episode) -> Features | None:
        """Features of the unlabelled videos [U, ...], None where there are none.

        They go through the trunk in a third call: in training they have BatchNorm statistics of their own.
        """
        if episode.unlabelled_features is not None:
            return self._given(episode.unlabelled_features)
        if episode.unlabelled is None:
            return None
        if self.trunk is None:
            raise ConfigError("trunk=None needs unlabelled videos as features; give them, or choose a trunk")
        features: Features = self.trunk(episode.unlabelled)
        return features

    def _given(self, features: Tensor) -> Features:
        """[V, T, C, h, w] or [V, T, C] -> Features."""
        if features.ndim not in (3, 5) or features.shape[2] != self.channels:
            raise ConfigError(
                f"features of one set of videos are {list(features.shape)}; they must be [V, T, {self.channels}] "
                f"or maps [V, T, {self.channels}, h, w]"
            )
        if features.ndim == 3:
            return Features(None, features)
        pooled = self.pool(rearrange(features, "v t c h w -> (v t) c h w"))
        return Features(features, rearrange(pooled, "(v t) c -> v t c", t=features.shape[1]))


def query_loss(logits: Tensor, episode: Episode) -> Tensor:
    """Cross-entropy of [Q, way] logits with the queries' classes, mean over queries."""
    return F.cross_entropy(full_precision(logits), episode.query_labels)


def base_class_loss(logits: Tensor, episode: Episode) -> Tensor:
    """Cross-entropy of the auxiliary classifier's [S + Q, N] logits, mean over videos of base classes.

    Videos of novel classes (base id -1) do not count; with no others the term is 0.  ConfigError for a base id
    beyond the classifier's rows.
    """
    if episode.base_ids.device.type == "cpu" and int(episode.base_ids.max()) >= logits.shape[1]:
        raise ConfigError(
            f"base_ids reach {int(episode.base_ids.max())} but num_classes={logits.shape[1]}; "
            "set num_classes to the number of training classes"
        )
    labels = torch.cat([episode.support_labels(), episode.query_labels])  # [S + Q]
    targets = episode.base_ids[labels]
    total = F.cross_entropy(full_precision(logits), targets, ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum().clamp(min=1)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of the terms with their weights; a term of weight 0 is left out, so that it gives no gradient."""
    terms = [losses[name] * weight for name, weight in weights.items() if weight and name in losses]
    return torch.stack(terms).sum()
