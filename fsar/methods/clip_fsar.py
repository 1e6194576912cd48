"""CLIP-FSAR: CLIP-guided prototype modulating for few-shot action recognition.

Source: Wang et al., IJCV 2023, arXiv 2303.02982.

1. Video-text contrast: a video's mean frame against the texts of all base classes (the class term).
2. Prototype modulation: attention over the support's frames and the text vector of their class.
3. Matching: OTAM's alignment of query frames with prototypes.

Where paper and published code (alibaba-mmai-research/MoLo) differ, this follows the code.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.episode import Episode
from fsar.matching import check_smoothing, class_means, cosine, full_precision, otam, otam_both, token_cosine
from fsar.methods.base import (
    Embedding,
    FewShotMethod,
    Input,
    Output,
    SupportMerge,
    base_class_loss,
    query_loss,
    weighted_sum,
)
from fsar.trunks import Features, Trunk
from shards_spec.errors import ConfigError, choice

Inference = Literal["visual", "text", "combined"]
HIDDEN = 2048  # width of the feed-forward part, whatever the width of the tokens


class CLIPFSAR(FewShotMethod):
    """Frames in order, the support's modulated by its class's text; logits are minus OTAM's cost.

    loss = ce + classification_weight * class.
    The class term compares a video's mean frame with the texts of all base classes
    (`set_base_text`). Without class texts both the support's text token and the class term are left
    out: the visual part remains, which the code does not offer.

    Args:
        trunk, channels, frames: As of FewShotMethod.
        heads, depth: Heads and layers of attention.
        support_merge: Average the shots of a class before the temporal transformer ("prototype",
            the code's MERGE_BEFORE, set for 5 shots) or after it ("video").
        smoothing: OTAM's lambda.
        single_direction: Leave out the support aligned over the query.
        classification_weight: Weight of the class term; by default the code's for Kinetics-100 and
            UCF101.
        dropout: Drop out where the code does.
        inference: Logits in evaluation: "visual"; "text" (probabilities from texts only, the code's
            EVAL_TEXT); "combined" (p_text^text_weight p_visual^(1 - text_weight), the code's
            COMBINE).
        text_weight: The weight of the text in "combined".
    """

    reads = frozenset[Input]({"class_text"})
    base_text: Tensor | None

    def __init__(
        self,
        *,
        trunk: str | Trunk | None = "clip-rn50",
        channels: int | None = None,
        frames: int = 8,
        heads: int = 8,
        depth: int = 1,
        support_merge: SupportMerge = "video",
        smoothing: float = 0.5,
        single_direction: bool = False,
        classification_weight: float = 1.5,
        dropout: bool = True,
        inference: Inference = "visual",
        text_weight: float = 0.9,
    ) -> None:
        super().__init__(trunk, channels=channels, frames=frames)
        choice("support_merge", support_merge, ("prototype", "video"))
        choice("inference", inference, ("visual", "text", "combined"))
        check_smoothing(smoothing)
        if not 0 <= text_weight <= 1:
            raise ConfigError(f"text_weight={text_weight} is no share; give a number from 0 to 1")
        self.support_merge, self.inference, self.text_weight = support_merge, inference, text_weight
        self.smoothing = smoothing
        self.single_direction = single_direction
        self.align = otam if single_direction else otam_both
        self.weights = {"ce": 1.0, "class": classification_weight}
        self.scale = nn.Parameter(torch.ones(1))
        self.context2 = TemporalContext(self.channels, heads=heads, depth=depth, dropout=dropout)
        self.register_buffer("base_text", None, persistent=False)

    def embed(self, features: Features) -> Embedding:
        """Embed V videos: tokens [V, 2 * T, C], the frames as they are, then in their context.

        A query is matched by the second half. The support takes the first half, since its context
        depends on the text of its class.
        """
        return Embedding(torch.cat([features.pooled, self.context2(features.pooled)], dim=1))

    def match(
        self,
        support: Embedding,
        query: Embedding,
        *,
        mask: Tensor | None = None,
        class_text: Tensor | None = None,
        unlabelled: Embedding | None = None,
    ) -> Tensor:
        """Embeddings [way, shot, 2 * T, C], [Q, 2 * T, C] and texts [way, C] -> logits [Q, way].

        Raises:
            ConfigError: `inference` reads texts and there are none, or there are unlabelled videos.
        """
        if unlabelled is not None:
            raise ConfigError("CLIPFSAR reads no unlabelled videos; leave them out")
        (frames, _), (bare, in_context) = (each.tokens.chunk(2, dim=-2) for each in (support, query))
        return self.logits(frames, mask, class_text, bare, in_context)

    def forward(self, episode: Episode) -> Output:
        """Logits and losses of one episode."""
        support, query = (features.pooled for features in self.read(episode))  # [S, T, C], [Q, T, C]
        in_context = self.context2(query)
        logits = self.logits(episode.group(support), episode.support_mask, episode.class_text, query, in_context)
        losses, aux = {"ce": query_loss(logits, episode)}, {}
        if self.training and self.base_text is not None:
            videos = torch.cat([support, query]).mean(dim=1, keepdim=True)  # [S + Q, 1, C]
            likeness = token_cosine(videos, self.base_text[:, None])[..., 0, 0]  # [S + Q, N]
            aux["class"] = full_precision(self.scale) * likeness
            losses["class"] = base_class_loss(aux["class"], episode)
        return Output(logits, losses, weighted_sum(losses, self.weights), aux)

    def set_base_text(self, text: Tensor) -> None:
        """Take the text vectors [N, C] of the base classes, in the order of `Episode.base_ids`."""
        self.base_text = self.checked_text(text).to(self.scale)

    def logits(
        self, support: Tensor, mask: Tensor | None, class_text: Tensor | None, query: Tensor, in_context: Tensor
    ) -> Tensor:
        """Frames [way, shot, T, C], queries [Q, T, C] bare and in context -> logits [Q, way]."""
        text = None if class_text is None else self.checked_text(class_text)
        inference = "visual" if self.training else self.inference
        if inference == "visual":
            return -self.costs(self.modulate(support, mask, text), in_context)
        if text is None:
            raise ConfigError(f'inference="{inference}" reads class texts, but the episode has none; give class_text')
        by_text = (full_precision(self.scale) * cosine(query.mean(dim=1), text)).softmax(dim=1)  # [Q, way]
        if inference == "text":
            return by_text
        costs = self.costs(self.modulate(support, mask, text), in_context)
        by_frames = (-costs / query.shape[1]).softmax(dim=1)
        return by_text**self.text_weight * by_frames ** (1 - self.text_weight)

    def modulate(self, support: Tensor, mask: Tensor | None, text: Tensor | None) -> Tensor:
        """Frames [way, shot, T, C], texts [way, C] -> prototypes [way, T, C], modulated."""
        if self.support_merge == "prototype":
            support, mask = class_means(support, mask)[:, None], None  # [way, 1, T, C]
        way, shot, steps, _ = support.shape
        tokens = rearrange(support, "way shot t c -> (way shot) t c")
        if text is not None:
            of_class = repeat(text.to(tokens), "way c -> (way shot) 1 c", shot=shot)
            tokens = torch.cat([tokens, of_class], dim=1)  # the text is the last token
        related = self.context2(tokens)[:, :steps]
        return class_means(rearrange(related, "(way shot) t c -> way shot t c", way=way), mask)

    def costs(self, prototypes: Tensor, query: Tensor) -> Tensor:
        """Prototypes [way, T, C] and queries in context [Q, T, C] -> alignment costs [Q, way]."""
        return self.align(1 - token_cosine(query, prototypes), self.smoothing)

    def checked_text(self, text: Tensor) -> Tensor:
        """Return text vectors [n, C]; ConfigError where their width is not that of the frames."""
        if text.ndim != 2 or text.shape[1] != self.channels:
            raise ConfigError(
                f"text vectors are {list(text.shape)} but the trunk's frames have {self.channels} channels; "
                "write them with the text tower of the same CLIP model"
            )
        return text


class TemporalContext(nn.Module):
    """Layers of attention over a video's tokens and a feed-forward part, blind to their order.

    Modules are named as in the published state dict (alibaba-mmai-research/MoLo), so that any depth
    loads.

    Raises:
        ConfigError: `heads` does not divide `channels`, or `depth` is below 1.
    """

    def __init__(self, channels: int, *, heads: int, depth: int, dropout: bool) -> None:
        super().__init__()
        if channels % heads or depth < 1:
            raise ConfigError(f"heads={heads} must divide {channels} channels and depth={depth} be at least 1")
        self.layers = nn.ModuleList(
            nn.Sequential(Attention(channels, heads, dropout=0.2 * dropout), FeedForward(channels, 0.05 * dropout))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[V, n, C] -> [V, n, C]."""
        for layer in self.layers:
            x = layer(x)
        return x


class Attention(nn.Module):
    """x + Dropout(W attention(LayerNorm x))."""

    def __init__(self, channels: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        projections = {name: nn.Linear(channels, channels, bias=False) for name in ("to_q", "to_k", "to_v")}
        to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(dropout))
        self.fn = nn.ModuleDict({**projections, "to_out": to_out})

    def forward(self, x: Tensor) -> Tensor:
        """[V, n, C] -> [V, n, C]."""
        normed = self.norm(x)
        q, k, v = (
            rearrange(self.fn[name](normed), "v n (head c) -> v head n c", head=self.heads)
            for name in ("to_q", "to_k", "to_v")
        )
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "v head n c -> v n (head c)")
        out: Tensor = x + self.fn["to_out"](attended)
        return out


class FeedForward(nn.Module):
    """x + MLP(x), with no norm before it."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(channels, HIDDEN),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(HIDDEN, channels),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[V, n, C] -> [V, n, C]."""
        out: Tensor = x + self.net(x)
        return out
