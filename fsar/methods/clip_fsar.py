"""CLIP-FSAR: CLIP-guided prototype modulating for few-shot action recognition (Wang et al., IJCV 2023, 2303.02982).

Where the paper and the published code (alibaba-mmai-research/MoLo) differ, this follows the code.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from fsar.episode import Episode
from fsar.matching import (
    Alignment,
    check_smoothing,
    class_means,
    cosine,
    full_precision,
    matched,
    otam,
    otam_both,
    token_cosine,
)
from fsar.methods.base import Embedding, FewShotMethod, Output, base_class_loss, query_loss, weighted_sum
from fsar.methods.layers import TemporalContext
from fsar.trunks import Features, Trunk
from shards_spec.errors import ConfigError, choice

SupportMerge = Literal["prototype", "video"]
Inference = Literal["visual", "text", "combined"]


class CLIPFSAR(FewShotMethod):
    """Frames in order, the support's modulated by the text vector of its class; logits are minus the cost of aligning.

    loss = ce + classification_weight * class; the class term compares a video's mean frame with the texts of all
    base classes (`set_base_text`).  Without class texts the support's text token is left out and so is the class
    term: what remains is the visual part, which the code does not offer.  `support_merge` says whether the shots of
    a class are averaged before the temporal transformer ("prototype", the code's MERGE_BEFORE, set for 5 shots) or
    after it ("video").  In evaluation `inference` may be "text" (probabilities from texts alone, the code's
    EVAL_TEXT) or "combined" (p_text^text_weight p_visual^(1 - text_weight), COMBINE): logits then are these numbers.
    The default classification weight is the code's for Kinetics-100 and UCF101.
    """

    reads_class_text: ClassVar[bool] = True
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

    def set_base_text(self, text: Tensor) -> None:
        """Take the text vectors [N, C] of the base classes, in the order of `Episode.base_ids`."""
        self.base_text = self.checked_text(text).to(self.scale)

    def checked_text(self, text: Tensor) -> Tensor:
        """The same text vectors [n, C]; ConfigError where their width is not that of the frames."""
        if text.ndim != 2 or text.shape[1] != self.channels:
            raise ConfigError(
                f"text vectors are {list(text.shape)} but the trunk's frames have {self.channels} channels; "
                "write them with the text tower of the same CLIP model"
            )
        return text

    def embed(self, features: Features) -> Embedding:
        """Features of V videos -> tokens [V, 2 * T, C]: the frames as they are, then as queries, in their context.

        What the support's become depends on the text of its class.
        """
        return Embedding(torch.cat([features.pooled, self.context2(features.pooled)], dim=1))

    def by_pairs(self, shot: int) -> bool:
        """A query, one video and the text of its class, unless probabilities over the classes are asked for."""
        return shot == 1 and self.inference == "visual"

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

        ConfigError when `inference` needs the texts and there are none, or when unlabelled videos are given.
        """
        if unlabelled is not None:
            raise ConfigError("CLIPFSAR reads no unlabelled videos; leave them out")
        (frames, _), (bare, in_context) = (each.tokens.chunk(2, dim=-2) for each in (support, query))
        return self.logits(frames, mask, class_text, bare, in_context)

    def logits(
        self, support: Tensor, mask: Tensor | None, class_text: Tensor | None, query: Tensor, in_context: Tensor
    ) -> Tensor:
        """Frames [way, shot, T, C], texts [way, C], queries [Q, T, C] bare and in their context -> logits [Q, way]."""
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
        by_sight = (-costs / query.shape[1]).softmax(dim=1)
        return by_text**self.text_weight * by_sight ** (1 - self.text_weight)

    def modulate(self, support: Tensor, mask: Tensor | None, text: Tensor | None) -> Tensor:
        """Frames [way, shot, T, C] and texts [way, C] -> prototypes [way, T, C] that have seen their class's text."""
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
        """Prototypes [way, T, C] and query frames in their context [Q, T, C] -> alignment costs [Q, way]."""
        return self.align(1 - token_cosine(query, prototypes), self.smoothing)

    def alignment(
        self, query: Embedding, support: Embedding, *, class_text: Tensor | None = None
    ) -> dict[str, Alignment]:
        """The paths through frames of queries and of prototypes; none where texts alone decide."""
        if self.inference == "text":
            return {}
        (frames, _), (_, in_context) = (each.tokens.chunk(2, dim=-2) for each in (support, query))
        prototypes = self.modulate(frames, None, None if class_text is None else self.checked_text(class_text))
        how: dict[str, Any] = {"single_direction": self.single_direction, "smoothing": self.smoothing}
        return {"frames": matched(1 - token_cosine(in_context, prototypes), metric="otam", **how)}

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
