"""CrossTransformer over time (after Doersch et al., NeurIPS 2020, arXiv 2007.11498).

The paper attends over places of images. The published code (alibaba-mmai-research/MoLo), followed
here, attends over the frames of all support videos of a class: each frame of a query asks for the
frames that resemble it. It compares by the cosine in place of the squared distance.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.matching import full_precision, squared_lengths
from fsar.methods.base import Embedding, FewShotMethod
from fsar.trunks import Features, Trunk
from shards_spec.errors import choice

FIRST_SCALE = 10.0
SMALLEST = 1e-24  # the least squared length to divide by
SHARED = {"key_head.weight": "query_head.weight"}  # one tensor, under two names in published state dicts


class CTX(FewShotMethod):
    """Query frames against the class's frames that resemble them; logits are the mean over frames.

    The loss is the cross-entropy of the logits.

    Args:
        trunk, channels, frames: As of FewShotMethod.
        width: The width of keys and values.
        metric: "cosine" (the code), or "euclidean": minus the squared distance (the paper).
        temperature: A factor of the logits, or None (or 0) to learn it from 10 on. At 1, the
            code's, cosines are between -1 and 1, and the cross-entropy of 5 classes stays above
            0.43.
    """

    def __init__(
        self,
        *,
        trunk: str | Trunk | None = "resnet50",
        channels: int | None = None,
        frames: int = 8,
        width: int = 1024,
        metric: Literal["cosine", "euclidean"] = "cosine",
        temperature: float | None = 1.0,
    ) -> None:
        super().__init__(trunk, channels=channels, frames=frames)
        choice("metric", metric, ("cosine", "euclidean"))
        self.metric = metric
        self.temperature = temperature or None
        if self.temperature is None:
            self.scale = nn.Parameter(torch.tensor([FIRST_SCALE]))
        self.query_head = nn.Conv1d(self.channels, width, 1, bias=False)  # makes the keys too
        self.value_head = nn.Conv1d(self.channels, width, 1, bias=False)
        self.register_state_dict_post_hook(name_twice)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.register_load_state_dict_pre_hook(name_once)  # type: ignore[no-untyped-call]

    def embed(self, features: Features) -> Embedding:
        """Embed V videos: tokens [V, T, 2 * width], key (the query too) and value of each frame."""
        heads = (self.query_head, self.value_head)  # published as convolutions of size 1: plain products
        return Embedding(torch.cat([F.linear(features.pooled, head.weight.squeeze(2)) for head in heads], dim=-1))

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Embeddings [way, shot, T, 2 * width] and [Q, T, 2 * width] -> logits [Q, way]."""
        keys, values = full_precision(support.tokens).chunk(2, dim=-1)  # [way, shot, T, width]
        query_keys, query_values = full_precision(query.tokens).chunk(2, dim=-1)  # [Q, T, width]
        shares = attention(query_keys, keys, mask)  # [Q, way, T, shot * T]
        if mask is not None:
            values = values.masked_fill(rearrange(mask.to(values.device).logical_not(), "w s -> w s 1 1"), 0)
        scale = self.scale if self.temperature is None else self.temperature
        with torch.autocast(values.device.type, enabled=False):
            return scale * self.similarity(query_values, values.flatten(1, 2), shares).mean(dim=-1)

    def similarity(self, query: Tensor, values: Tensor, shares: Tensor) -> Tensor:
        """Compare each query frame with its own prototype: the class's values times its shares.

        The prototype is never formed: its product with the query and its length are sums of
        products of values.

        Args:
            query: Values [Q, n, width].
            values: [way, m, width].
            shares: [Q, way, n, m] of the class's values.

        Returns:
            Similarities [Q, way, n].
        """
        if self.metric == "euclidean":
            # Shares sum to 1, so the mean of all frames cancels in the difference. It may be far
            # larger than the distance, which would lose its last digits to it.
            query, values = (each - values.detach().mean(dim=(0, 1)) for each in (query, values))
        between = (torch.einsum("q n d, w m d -> q w n m", query, values) * shares).sum(dim=-1)
        squares = query.square().sum(dim=-1)[:, None], squared_lengths(values, shares)  # [Q, 1, n], [Q, way, n]
        if self.metric == "cosine":
            own, theirs = (each.clamp(min=SMALLEST).sqrt() for each in squares)
            return between / (own * theirs)
        return 2 * between - squares[0] - squares[1]


def attention(query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend from queries to all tokens of all videos of each class, with one softmax a class.

    Args:
        query: [Q, n, C].
        keys: [way, shot, m, C].
        mask: [way, shot], False at padding.

    Returns:
        Shares [Q, way, n, shot * m].
    """
    query, keys = full_precision(query), full_precision(keys)
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum("q n c, w s m c -> q w n s m", query, keys) / math.sqrt(query.shape[-1])
    if mask is not None:
        padding = rearrange(mask.to(scores.device).logical_not(), "w s -> 1 w 1 s 1")
        scores = scores.masked_fill(padding, -torch.inf)
    return scores.flatten(-2).softmax(dim=-1)


def name_twice(_module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    """Add the second name of the shared tensor; a copy, since files refuse shared memory."""
    for twin, name in SHARED.items():
        state_dict[prefix + twin] = state_dict[prefix + name].clone()


def name_once(_module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_more: object) -> None:
    """Drop the second name: the published code copies the tensor under the first one last."""
    for twin in SHARED:
        state_dict.pop(prefix + twin, None)
