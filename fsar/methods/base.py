"""The contract of a few-shot method: embed videos, compare them with classes, state losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.episode import Episode
from fsar.matching import full_precision
from fsar.trunks import Features, Stream, Trunk, create_trunk
from fsar.trunks.base import mean_pool
from shards_spec.errors import ConfigError, choice

# Inputs that only some methods read: maps of single frames, images in addition to features, stored
# motion of the same clips, the text vectors of classes, unlabelled videos.
Input = Literal["maps", "images", "motion", "class_text", "unlabelled"]
SupportMerge = Literal["prototype", "video"]  # average the shots of a class, or match each of them


# What methods of one's own stated before -> what they state now.
FORMER = {f"reads_{each}": f'reads = {{"{each}"}}' for each in get_args(Input)}
FORMER |= {
    "by_pairs": "@by_pairs.register of fsar.evaluation.logits",
    "alignment": "@align.register of fsar.report.alignment",
}


@dataclass(frozen=True)
class Embedding:
    """The tensors of some videos that matching compares, each a function of its own video only.

    The leading shape is [V], [way, shot] or [Q], whichever set of videos it holds.
    """

    tokens: Tensor  # [..., n, C], or [..., C] for methods with one vector a video
    motion: Tensor | None = None  # [..., m, C]

    def map(self, function: Callable[[Tensor], Tensor]) -> Embedding:
        """Apply a function to each tensor, such as indexing, moving or reshaping."""
        return Embedding(function(self.tokens), None if self.motion is None else function(self.motion))


@dataclass
class Output:
    """The answers of a method to an episode, and its losses."""

    logits: Tensor  # [Q, way] float32
    losses: dict[str, Tensor]  # every term by its name, unweighted scalars
    loss: Tensor  # their weighted sum
    aux: dict[str, Tensor] = field(default_factory=dict)  # further logits by name, for inspection


class FewShotMethod(nn.Module):
    """A trunk and a way of matching.

    A method defines `embed` and `compare`. It defines `forward` too where it has losses of its own,
    and `match` in place of `compare` where it reads class texts or unlabelled videos.

    Args:
        trunk: A name, a Trunk, or None where episodes carry features.
        channels: The width of features; required for trunk=None.
        frames: The features of a video, one a frame or one a clip.
        least: The fewest of them that the method works with.

    Attributes:
        reads: Inputs that it reads beyond pooled features.
        stream: What its trunk reads: "frames" or "motion"; episodes carry both or one of them.
        only_stream: The only stream that it can read; None: either.
        REFERENCE_NAMES: Our name prefix -> official name (without "head.") in published state
            dicts.

    Raises:
        ConfigError: these do not fit together, or `reads` names an unknown input.
    """

    reads: AbstractSet[Input] = frozenset()
    only_stream: ClassVar[Stream | None] = None
    REFERENCE_NAMES: ClassVar[Mapping[str, str]] = {}

    def __init__(self, trunk: str | Trunk | None, *, channels: int | None, frames: int, least: int = 1) -> None:
        super().__init__()
        name = type(self).__name__
        for each in self.reads:
            choice("reads", each, get_args(Input))
        for old, new in FORMER.items():
            if old in vars(type(self)):  # it would be passed over without a word
                raise ConfigError(f"{name}.{old} is no longer read: use {new}")
        if frames < least:
            raise ConfigError(f"{name} needs at least {least} frames or clips of a video, not {frames}; set frames")
        self.trunk: Trunk | None = create_trunk(trunk) if isinstance(trunk, str) else trunk
        self.stream: Stream = "frames" if self.trunk is None else self.trunk.stream
        if "maps" in self.reads and self.trunk is not None and not self.trunk.has_maps:
            trunk_name = type(self.trunk).__name__
            other = "a ResNet" if self.stream == "frames" else "tiny-flow"
            raise ConfigError(f"{name} needs maps of each frame, and {trunk_name} has none; choose {other}")
        if "maps" in self.reads and self.trunk is not None:
            self.trunk.give_maps()
        known = channels if self.trunk is None else self.trunk.channels
        if known is None:
            raise ConfigError("trunk=None needs the option channels: the width of the features that episodes carry")
        if channels not in (None, known):
            raise ConfigError(f"channels={channels} does not fit the trunk, which has {known}; leave channels out")
        self.channels = known
        self.frames = frames

    def embed(self, features: Features) -> Embedding:
        """Embed V videos, each independently of the others."""
        raise NotImplementedError

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Compare queries [Q, ...] with classes [way, shot, ...]: logits [Q, way].

        `mask` [way, shot] is False at the padding of unequal shots, or None.
        """
        raise NotImplementedError

    def match(
        self,
        support: Embedding,
        query: Embedding,
        *,
        mask: Tensor | None = None,
        class_text: Tensor | None = None,
        unlabelled: Embedding | None = None,
    ) -> Tensor:
        """Compare queries with classes, with the help of what else the method reads.

        Args:
            support: [way, shot, ...].
            query: [Q, ...].
            mask: [way, shot], False at padding.
            class_text: [way, w] text vectors of the classes.
            unlabelled: [U, ...] further videos of unknown classes.

        Returns:
            Logits [Q, way].

        Raises:
            ConfigError: the method does not read class texts or unlabelled videos, but gets some.
        """
        if class_text is not None or unlabelled is not None:
            raise ConfigError(f"{type(self).__name__} reads neither class texts nor unlabelled videos; leave them out")
        return self.compare(support, query, mask)

    def forward(self, episode: Episode) -> Output:
        """Answer an episode, with the cross-entropy of its queries as the only loss."""
        support, query = (self.embed(features) for features in self.read(episode))
        unlabelled = self.read_unlabelled(episode) if "unlabelled" in self.reads else None
        logits = self.match(
            support.map(episode.group),
            query,
            mask=episode.support_mask,
            class_text=episode.class_text if "class_text" in self.reads else None,
            unlabelled=None if unlabelled is None else self.embed(unlabelled),
        )
        loss = query_loss(logits, episode)
        return Output(logits, {"ce": loss}, loss)

    def read(self, episode: Episode) -> tuple[Features, Features]:
        """Read the features of an episode's support videos [S, ...] and queries [Q, ...].

        Support and query go through the trunk in two calls, as in the reference code: in training
        each has BatchNorm statistics of its own. Padding of unequal shots is removed before.
        """
        features = episode.support_features
        if features is not None and episode.query_features is not None:
            return self._stored(episode.ungroup(features)), self._stored(episode.query_features)
        if self.trunk is None:
            raise ConfigError("trunk=None needs episodes that carry features; give them, or choose a trunk")
        support, query = self._inputs(episode)
        return self.trunk(episode.ungroup(support)), self.trunk(query)

    def _inputs(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """Return the support [way, shot, ...] and queries [Q, ...] that the trunk reads."""
        motion = self.stream == "motion"
        support = episode.support_motion if motion else episode.support
        query = episode.query_motion if motion else episode.query
        if support is None or query is None:
            raise ConfigError(
                f"the trunk {type(self.trunk).__name__} reads {self.stream}, which the episode has not: set streams"
            )
        return support, query

    def read_unlabelled(self, episode: Episode) -> Features | None:
        """Read the features of the unlabelled videos [U, ...]; None where the episode has none.

        They go through the trunk in a third call, with BatchNorm statistics of their own in
        training.
        """
        if episode.unlabelled_features is not None:
            return self._stored(episode.unlabelled_features)
        unlabelled = episode.unlabelled_motion if self.stream == "motion" else episode.unlabelled
        if unlabelled is None:
            return None
        if self.trunk is None:
            raise ConfigError("trunk=None needs unlabelled videos as features; give them, or choose a trunk")
        features: Features = self.trunk(unlabelled)
        return features

    def set_base_text(self, text: Tensor) -> None:
        """Take the text vectors [N, C] of the base classes; a method that uses them keeps them.

        Raises:
            ConfigError: the method reads no class texts.
        """
        if "class_text" not in self.reads:
            raise ConfigError(f"{type(self).__name__} reads no class texts, but was given some {list(text.shape)}")

    def pool(self, maps: Tensor) -> Tensor:
        """Pool maps [N, C, h, w] to [N, C] as the trunk does, or by the mean without a trunk."""
        return mean_pool(maps) if self.trunk is None else self.trunk.pool(maps)

    def _stored(self, features: Tensor) -> Features:
        """Take features that an episode carries: maps [V, T, C, h, w], or pooled [V, T, C]."""
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
    """Cross-entropy of the auxiliary classifier, mean over videos of base classes.

    Videos of novel classes (base id -1) do not count; with no others the term is 0.

    Args:
        logits: [S + Q, N], the support first.
        episode: The episode, with the base id of each of its classes.

    Raises:
        ConfigError: a base id is beyond the classifier's rows.
    """
    # On a GPU this test would wait for the device, and it cannot be part of a CUDA graph.
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
    """Add the terms with their weights; a term of weight 0 is left out and gives no gradient."""
    terms = [losses[name] * weight for name, weight in weights.items() if weight and name in losses]
    return torch.stack(terms).sum()
