"""A few-shot method of one's own, whole: each query frame is matched with the nearest support frame of a class.

cd docs
fsar-train --shards ../demo/shards --method nearest_frames:NearestFrames --recipe demo --run /tmp/nearest
"""

from __future__ import annotations

from torch import Tensor

from fsar.matching import cosine
from fsar.methods import Embedding, FewShotMethod
from fsar.trunks import Features, Trunk


class NearestFrames(FewShotMethod):
    """Logits: scale times the mean over query frames of the largest cosine to a support frame of the class."""

    def __init__(self, *, trunk: str | Trunk | None = "resnet50", frames: int = 8, scale: float = 10.0) -> None:
        super().__init__(trunk, channels=None, frames=frames)
        self.scale = scale

    def embed(self, features: Features) -> Embedding:
        """Features of V videos -> tokens [V, T, C]."""
        return Embedding(features.pooled)

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """[way, shot, T, C] and [Q, T, C] -> logits [Q, way]."""
        videos = support.tokens.flatten(0, 1)  # [S, T, C]
        similar = cosine(query.tokens.flatten(0, 1), videos.flatten(0, 1))  # [Q T, S T]
        frames, (way, shot) = query.tokens.shape[1], support.tokens.shape[:2]
        similar = similar.unflatten(1, (way, shot, -1)).amax(dim=3)  # [Q T, way, shot]
        if mask is not None:  # padding of unequal shots is no frame of anybody
            similar = similar.masked_fill(~mask.to(similar.device), -1.0)
        return self.scale * similar.amax(dim=2).unflatten(0, (-1, frames)).mean(dim=1)  # [Q, way]
