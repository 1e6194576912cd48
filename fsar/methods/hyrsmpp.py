"""HyRSM++: HyRSM whose frames keep their order in time (Wang et al., arXiv 2301.03330).

Where the paper and the published code (alibaba-mmai-research/HyRSMPlusPlus) differ, this follows the code, and says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch.nn import functional as F

from fsar.matching import Reduction, cosine_distance
from fsar.methods.hyrsm import HyRSM, SupportMerge
from shards_spec.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from fsar.trunks import Trunk


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
