"""HyRSM++: HyRSM whose frames keep their order in time (Wang et al., arXiv 2301.03330).

To HyRSM it adds the temporal coherence regularisation, and unlabelled videos that join the support.
Where the paper and the published code (alibaba-mmai-research/HyRSMPlusPlus) differ, this follows
the code, and says so.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from fsar.episode import Episode
from fsar.matching import Reduction, cosine_distance
from fsar.methods.base import Embedding, Input, SupportMerge
from fsar.methods.hyrsm import HyRSM
from fsar.trunks import Trunk
from shards_spec.errors import ConfigError


class HyRSMPlusPlus(HyRSM):
    """HyRSM with a term that keeps neighbouring frames of a video close and distant ones apart.

    loss = ce + classification_weight * class + temporal_weight * temporal.
    Unlabelled videos of an episode join the support of the class that they probably belong to.
    The default values are the code's for Kinetics-100. Options that are not listed are HyRSM's.

    Args:
        window: Frames are neighbours up to so many steps.
        temporal_balance: The margin beyond the window grows with it (twice the paper's squared
            sigma).
        outside_weight: Weight of a distance that falls short of the margin; the paper has none.
        temporal_weight: Weight of the temporal term.
        semi_temperature: Probabilities are a softmax of -distance / semi_temperature (not
            published).
        semi_threshold: The least probability of an accepted video (not published).
    """

    reads = frozenset[Input]({"unlabelled"})

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
        semi_temperature: float = 1.0,
        semi_threshold: float = 0.8,
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
        if semi_temperature <= 0 or not 0 <= semi_threshold <= 1:
            raise ConfigError(
                f"semi_temperature={semi_temperature} and semi_threshold={semi_threshold}; give a temperature above 0 "
                "and a threshold between 0 and 1"
            )
        self.semi_temperature = semi_temperature
        self.semi_threshold = semi_threshold
        self.window = window
        self.temporal_balance = temporal_balance
        self.outside_weight = outside_weight
        self.weights["temporal"] = temporal_weight

    def match(
        self,
        support: Embedding,
        query: Embedding,
        *,
        mask: Tensor | None = None,
        class_text: Tensor | None = None,
        unlabelled: Embedding | None = None,
    ) -> Tensor:
        """Embeddings [way, shot, n, C], [Q, n, C] and optional [U, n, C] -> logits [Q, way]."""
        if unlabelled is not None:
            tokens, mask, _ = self.enlarge(support.tokens, mask, unlabelled.tokens)
            support = Embedding(tokens)
        return super().match(support, query, mask=mask, class_text=class_text)

    def support_set(self, episode: Episode, support: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Group projected [S, n, C], and add unlabelled videos.

        Returns:
            [way, shot (+ U), n, C], its mask, and the probabilities of pseudo labels.
        """
        grouped, mask, aux = super().support_set(episode, support)
        unlabelled = self.read_unlabelled(episode)
        if unlabelled is None:
            return grouped, mask, aux
        grouped, mask, probability = self.enlarge(grouped, mask, self.embed(unlabelled).tokens)
        return grouped, mask, {"pseudo": probability}

    def enlarge(self, support: Tensor, mask: Tensor | None, unlabelled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add unlabelled videos to the support.

        Every class gets a place for every video, and the mask opens only the place in the accepted
        class: no shape depends on what is accepted. The labels are made without gradient, in the
        mode that the model is in; the tokens keep theirs. The published code drops the video at
        place 0 where it is the only one accepted; here it counts.

        Args:
            support: [way, shot, n, C].
            mask: [way, shot], False at padding.
            unlabelled: [U, n, C].

        Returns:
            [way, shot + U, n, C], its mask, and the probabilities [U, way].
        """
        way = len(support)
        # Not under no_grad: autocast keeps the weights that it casts there, without gradient, for
        # the next pass.
        logits = self.compare(Embedding(support.detach()), Embedding(unlabelled.detach()), mask).detach()
        probability = (logits / self.semi_temperature).softmax(dim=1)  # [U, way]
        best, label = probability.max(dim=1)
        accepted = (label == torch.arange(way, device=label.device)[:, None]) & (best >= self.semi_threshold)
        if mask is None:
            mask = torch.ones(support.shape[:2], dtype=torch.bool, device=label.device)
        places = torch.cat([support, unlabelled.expand(way, -1, -1, -1)], dim=1)
        return places, torch.cat([mask.to(label.device), accepted], dim=1), probability  # accepted: [way, U]

    def fused_losses(self, members: Tensor, query: Tensor) -> dict[str, Tensor]:
        """Temporal coherence of fused members [Q, S, T, C] and queries [Q, T, C], added."""
        videos = rearrange(members, "q s t c -> (q s) t c")
        return {"temporal": self._incoherence(videos) + self._incoherence(query)}

    def _incoherence(self, videos: Tensor) -> Tensor:
        return temporal_incoherence(
            videos, window=self.window, balance=self.temporal_balance, outside_weight=self.outside_weight
        )


def temporal_incoherence(videos: Tensor, *, window: int, balance: float, outside_weight: float) -> Tensor:
    """Temporal coherence regularisation: the mean cost of all pairs of frames of videos [V, T, C].

    A pair n <= window steps apart costs its distance / (n^2 + 1). Any other pair costs what its
    distance falls short of the margin 1 - exp(-(n - window)^2 / balance), times `outside_weight`.
    """
    distance = cosine_distance(videos, videos)  # [V, T, T]
    step = torch.arange(videos.shape[1], device=videos.device, dtype=distance.dtype)
    apart = (step[:, None] - step).abs()  # [T, T]
    margin = 1 - torch.exp(-(apart - window).square() / balance)
    outside = outside_weight * F.relu(margin - distance)
    return torch.where(apart <= window, distance / (apart.square() + 1), outside).mean()
