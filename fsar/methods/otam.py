"""OTAM: few-shot video classification via temporal alignment.

Source: Cao et al., CVPR 2020, arXiv 1906.11415.

Where the paper and the published re-implementation (alibaba-mmai-research/MoLo) differ, this
follows the latter.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from fsar.matching import check_smoothing, class_means, otam, otam_both, token_cosine
from fsar.methods.base import Embedding, FewShotMethod, SupportMerge
from fsar.trunks import Features, Trunk
from shards_spec.errors import choice


class OTAM(FewShotMethod):
    """Frames in order: logits are minus the cost of aligning a query with the videos of a class.

    There is nothing to learn after the trunk. The loss is the cross-entropy of the logits.

    Args:
        trunk, channels, frames: As of FewShotMethod.
        smoothing: The paper's lambda.
        single_direction: Leave out the support aligned over the query, which the code adds.
        support_merge: Align each video and average the costs ("video", the code), or align the
            class means of the frames ("prototype").
    """

    def __init__(
        self,
        *,
        trunk: str | Trunk | None = "resnet50",
        channels: int | None = None,
        frames: int = 8,
        smoothing: float = 0.1,
        single_direction: bool = False,
        support_merge: SupportMerge = "video",
    ) -> None:
        super().__init__(trunk, channels=channels, frames=frames)
        check_smoothing(smoothing)
        choice("support_merge", support_merge, ("prototype", "video"))
        self.smoothing = smoothing
        self.single_direction = single_direction
        self.align = otam if single_direction else otam_both
        self.support_merge = support_merge

    def embed(self, features: Features) -> Embedding:
        """Embed V videos: tokens [V, T, C], the frames as they are."""
        return Embedding(features.pooled)

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Embeddings [way, shot, T, C] and [Q, T, C] -> logits [Q, way]."""
        videos = support.tokens
        if self.support_merge == "prototype":
            videos, mask = class_means(videos, mask)[:, None], None  # [way, 1, T, C]
        costs = self.align(self.distances(query, videos), self.smoothing)  # [Q, way * shot]
        return -class_means(rearrange(costs, "q (way shot) -> way shot q", way=len(videos)), mask).T

    def distances(self, query: Embedding, videos: Tensor) -> Tensor:
        """Queries [Q, T, C] and videos [way, shot, T, C] -> distances [Q, way * shot, T, T]."""
        return 1 - token_cosine(query.tokens, rearrange(videos, "way shot t c -> (way shot) t c"))
