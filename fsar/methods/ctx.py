"""CrossTransformer over time (after Doersch et al., NeurIPS 2020, arXiv 2007.11498).

The paper attends over places of one image; the published code (alibaba-mmai-research/MoLo), followed here, over
the frames of all support videos of a class, and compares by the cosine in place of the squared distance.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.matching import Alignment, attention, full_precision, squared_lengths, token_cosine
from fsar.methods.base import Embedding, FewShotMethod
from fsar.trunks import Features, Trunk
from shards_spec.errors import choice

FIRST_SCALE = 10.0
SMALLEST = 1e-24  # a squared length that is divided by
SHARED = {"key_head.weight": "query_head.weight"}  # one tensor, under two names in published state dicts


class CTX(FewShotMethod):
    """Frames of a query against the frames of a class that resemble them; logits are the mean over frames.

    metric="cosine" is that of the code, "euclidean" the paper's: minus the squared distance.  `temperature`
    multiplies the logits: a number, or None (or 0) to learn it from 10 on.  At 1, the code's, cosines are between
    -1 and 1 and the cross-entropy of 5 classes stays above 0.43.  `width` is that of keys and values.
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
        """Features of V videos -> tokens [V, T, 2 * width]: key (which is the query too) and value of each frame."""
        heads = (self.query_head, self.value_head)  # convolutions in published state dicts, products in truth
        return Embedding(torch.cat([F.linear(features.pooled, head.weight.squeeze(2)) for head in heads], dim=-1))

    def by_pairs(self, shot: int) -> bool:
        """A query and one video of a class are all that a logit depends on."""
        return shot == 1

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

    def alignment(
        self,
        query: Embedding,
        support: Embedding,
        *,
        class_text: Tensor | None = None,  # noqa: ARG002
    ) -> dict[str, Alignment]:
        """The shares of attention that each frame of a query gives to the frames of a class's videos."""
        keys, asked = (each.tokens.chunk(2, dim=-1)[0] for each in (support, query))
        shares = rearrange(attention(asked, keys), "q w n (s m) -> q (w s) n m", s=keys.shape[1])
        return {"frames": Alignment(token_cosine(asked, keys.flatten(0, 1)), shares, None)}

    def similarity(self, query: Tensor, values: Tensor, shares: Tensor) -> Tensor:
        """Values [Q, n, width], [way, m, width] and shares [Q, way, n, m] of the latter -> [Q, way, n].

        No prototype is formed: products and lengths of weighted sums are sums of products.
        """
        if self.metric == "euclidean":  # what is common to all frames cancels, and may be large beside the distance
            query, values = (each - values.detach().mean(dim=(0, 1)) for each in (query, values))
        between = (torch.einsum("q n d, w m d -> q w n m", query, values) * shares).sum(dim=-1)
        squares = query.square().sum(dim=-1)[:, None], squared_lengths(values, shares)  # [Q, 1, n], [Q, way, n]
        if self.metric == "cosine":
            own, theirs = (each.clamp(min=SMALLEST).sqrt() for each in squares)
            return between / (own * theirs)
        return 2 * between - squares[0] - squares[1]


def name_twice(_module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    """Adds the second name of the shared tensor; a copy, since files refuse tensors that share memory."""
    for twin, name in SHARED.items():
        state_dict[prefix + twin] = state_dict[prefix + name].clone()


def name_once(_module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_more: object) -> None:
    """Drops the second name again: in the published code the tensor under the first is copied last, and wins."""
    for twin in SHARED:
        state_dict.pop(prefix + twin, None)
