"""MoLo: motion-augmented long-short contrastive learning.

Source: Wang et al., CVPR 2023, arXiv 2304.00946.

A global token looks at all frames of a video (long); the local tokens are the frames (short). The
motion branch (section 3.3) does the same with differences of feature maps of consecutive frames.
Where the paper and its published code (alibaba-mmai-research/MoLo) differ, this follows the code,
and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from fsar.episode import Episode
from fsar.matching import Metric, Reduction, check_smoothing, class_means, full_precision, set_cost, token_cosine
from fsar.methods.base import Embedding, FewShotMethod, Input, Output, base_class_loss, query_loss, weighted_sum
from fsar.methods.layers import PositionCode, TemporalTransformer
from fsar.methods.reconstruction import (
    CHANNELS,
    MotionDecoder,
    ReconsNorm,
    ReconsTarget,
    Reconstruction,
    inputs_of,
    steps_of,
    still_of,
    video_scale,
)
from fsar.trunks import Features, Trunk
from shards_spec.errors import ConfigError, choice

CONTRASTIVE = ("s2q", "q2s", "s2q_motion", "q2s_motion")
LEAST_MOTION_CHANNELS = 16
# The names of a model's `motion` (MotionEncoder) and `decoder` in published state dicts.
MOTION_NAMES = {
    "motion.reduce": "motion_reduce",
    "motion.conv": "motion_conv",
    "motion.up": "motion_up",
    "decoder.up1.conv": "up1.conv.double_conv.0",
    "decoder.up1.norm": "up1.conv.double_conv.1",
    "decoder.up2.conv": "up2.conv.double_conv.0",
    "decoder.up2.norm": "up2.conv.double_conv.1",
    "decoder.up3.conv": "up3.conv.double_conv.0",
    "decoder.up3.norm": "up3.conv.double_conv.1",
    "decoder.out": "outc.conv",
}


class MoLo(FewShotMethod):
    """Frame tokens and motion tokens, each with a learned global token, matched as sets or in time.

    loss = ce + classification_weight * class + recons_weight * recons
         + contrastive_weight * (s2q + q2s + s2q_motion + q2s_motion).
    The reference code divides all terms but recons by the 4 episodes that make a step. So
    `recons_weight` is 4 times its RECONS_COFF.

    Args:
        trunk, channels, frames: As of FewShotMethod.
        num_classes: Rows of the auxiliary classifier.
        position_scale: (A, B) of the position code.
        heads: Heads of attention.
        metric: "hausdorff" takes each token to its nearest. "otam" aligns the tokens in time (an
            ablation of the paper that its code does not have).
        reduction: "mean" is the Hausdorff metric of the paper, "sum" that of its code.
        smoothing: Lambda of "otam".
        single_direction: Match the query against the class only, not the class against the query.
        motion_weight: The paper's alpha.
        classification_weight: Weight of the auxiliary classifier's term.
        contrastive_weight: Weight of each of the four contrastive terms.
        recons_weight: Weight of the reconstruction. At 0 the decoder stays in the state dict, untrained.
        recons_target: What the decoder is to make of a step between two frames: their "difference" as
            published, the later one of the "frames" (an ablation of the paper), or the stored "flow".
        recons_norm: "video" divides the target by its root mean square over a video, so that the
            term is as large for slow and for dark videos as for others. "none" is as published.
        temperature: A constant in place of the learned scales of the contrastive logits.
        dropout: Use the dropout rates of the published code.
    """

    reads = frozenset[Input]({"maps"})
    REFERENCE_NAMES: ClassVar[Mapping[str, str]] = {
        f"{ours}.{inner}": f"{theirs}.layers.0.{official}"
        for ours, theirs in (
            ("transformer", "temporal_atte_before"),
            ("transformer_motion", "temporal_atte_before_motion"),
        )
        for inner, official in (
            ("norm", "0.norm"),
            ("qkv", "0.fn.to_qkv"),
            ("attended", "0.fn.to_out.0"),
            ("hidden", "1.net.0"),
            ("output", "1.net.3"),
        )
    } | {"classifier": "classification_layer", **MOTION_NAMES}

    def __init__(
        self,
        *,
        trunk: str | Trunk | None = "resnet50",
        channels: int | None = None,
        frames: int = 8,
        num_classes: int = 64,
        position_scale: tuple[float, float] = (10.0, 1.0),
        heads: int = 8,
        metric: Metric = "hausdorff",
        reduction: Reduction = "sum",
        smoothing: float = 0.1,
        single_direction: bool = False,
        motion_weight: float = 0.3,
        classification_weight: float = 0.8,
        contrastive_weight: float = 0.05,
        recons_weight: float = 0.4,
        recons_target: ReconsTarget = "difference",
        recons_norm: ReconsNorm = "none",
        temperature: float | None = None,
        dropout: bool = True,
    ) -> None:
        super().__init__(trunk, channels=channels, frames=frames, least=2)
        choice("metric", metric, ("hausdorff", "otam"))
        choice("reduction", reduction, ("sum", "mean"))
        choice("recons_target", recons_target, get_args(ReconsTarget))
        choice("recons_norm", recons_norm, get_args(ReconsNorm))
        check_smoothing(smoothing)
        self.metric: Metric = metric
        self.reduction: Reduction = reduction
        self.smoothing = smoothing
        self.single_direction = single_direction
        self.motion_weight = motion_weight
        self.recons_target: ReconsTarget = recons_target
        self.recons_norm: ReconsNorm = recons_norm
        self.weights = (
            {"ce": 1.0, "class": classification_weight}
            | dict.fromkeys(CONTRASTIVE, contrastive_weight)
            | {"recons": recons_weight}
        )
        if recons_weight:
            # what the target of the reconstruction is made of
            self.reads = frozenset({"maps", "motion" if recons_target == "flow" else "images"})
        width, rate = self.channels, 1.0 if dropout else 0.0
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.class_token_motion = nn.Parameter(torch.randn(1, 1, width))
        self.position = PositionCode(width, rows=frames + 1, scale=position_scale, dropout=0.1 * rate)
        layer = partial(TemporalTransformer, heads=heads, attention_dropout=0.2 * rate, hidden_dropout=0.05 * rate)
        self.transformer, self.transformer_motion = layer(width), layer(width)
        self.motion = MotionEncoder(width)
        memory_format = torch.contiguous_format if self.trunk is None else self.trunk.memory_format
        self.decoder = MotionDecoder(self.motion.channels, CHANNELS[recons_target], memory_format=memory_format)
        self.classifier = nn.Linear(width, num_classes)
        self.temperature = temperature
        if temperature is None:
            self.scale = nn.Parameter(torch.ones(1))
            self.scale_motion = nn.Parameter(torch.ones(1))

    def embed(self, features: Features) -> Embedding:
        """Embed V videos: local tokens [V, T, C] and motion [V, T-1, C]; only these are matched."""
        return local(self.encode(features)[0])

    def compare(self, support: Embedding, query: Embedding, mask: Tensor | None) -> Tensor:
        """Embeddings [way, shot, ...] and [Q, ...] -> logits [Q, way] (equation 8)."""
        return self.logits(support.map(lambda x: class_means(x, mask)), query)

    def forward(self, episode: Episode) -> Output:
        """Logits and losses of one episode; the decoder runs only in training with a weight."""
        support_features, query_features = self.read(episode)
        support, support_differences = self.encode(support_features)  # [S, ...]
        query, query_differences = self.encode(query_features)  # [Q, ...]
        prototypes = support.map(lambda x: class_means(episode.group(x), episode.support_mask))
        logits = self.logits(local(prototypes), local(query))
        contrastive = self.contrastive_logits(prototypes, query)
        class_logits = torch.cat([self.class_logits(support), self.class_logits(query)])  # [S + Q, N]
        losses = {"ce": query_loss(logits, episode), "class": base_class_loss(class_logits, episode)}
        losses |= {name: query_loss(values, episode) for name, values in contrastive.items()}
        if self.training and self.weights["recons"]:
            losses["recons"] = self.reconstruction_loss(episode, support_differences, query_differences)
        return Output(logits, losses, weighted_sum(losses, self.weights), {"class": class_logits, **contrastive})

    def encode(self, features: Features) -> tuple[Embedding, Tensor]:
        """Encode V videos: tokens [V, T+1, C], motion [V, T, C], and differences of maps.

        Token 0 of both is the global one. The decoder reads the differences [V, T-1, M, h, w].
        """
        if features.maps is None or features.maps.shape[1] < 2:
            raise ConfigError("MoLo needs maps [V, T, C, h, w] of at least 2 frames; pooled features are not enough")
        differences = self.motion.differences(features.maps)
        motion = self.motion.tokens(differences, self.pool)  # [V, T-1, C]
        tokens = self.transformer(self.position(prepend(self.class_token, features.pooled)))
        motion = self.transformer_motion(self.position(prepend(self.class_token_motion, motion)))
        return Embedding(tokens, motion), differences

    def logits(self, prototypes: Embedding, query: Embedding) -> Tensor:
        """Local tokens of prototypes [way, ...] and queries [Q, ...] -> logits [Q, way]."""
        (tokens, motion), (query_tokens, query_motion) = both(prototypes), both(query)
        distance = self._distance(query_tokens, tokens) + self.motion_weight * self._distance(query_motion, motion)
        return -distance

    def _distance(self, query: Tensor, prototypes: Tensor) -> Tensor:
        return set_cost(
            1 - token_cosine(query, prototypes),  # [Q, way, n, n]
            metric=self.metric,
            reduction=self.reduction,
            smoothing=self.smoothing,
            single_direction=self.single_direction,
        )

    def contrastive_logits(self, prototypes: Embedding, query: Embedding) -> dict[str, Tensor]:
        """Long-short contrast [Q, way]: local tokens of one side with the other's global token.

        The paper sums similarities of frames inside the ratio. Its code, followed here, sums
        cosines in the exponent, and takes the softmax over the prototypes of the episode. "q2s" is the
        query's frames with the prototype's global token, "s2q" the prototype's frames with the query's.
        """
        (tokens, motion), (query_tokens, query_motion) = both(prototypes), both(query)
        scales = (self.temperature,) * 2 if self.temperature is not None else (self.scale, self.scale_motion)
        return {
            "s2q": -scales[0] * summed_cosine_distance(query_tokens[:, :1], tokens[:, 1:]),
            "q2s": -scales[0] * summed_cosine_distance(query_tokens[:, 1:], tokens[:, :1]),
            "s2q_motion": -scales[1] * summed_cosine_distance(query_motion[:, :1], motion[:, 1:]),
            "q2s_motion": -scales[1] * summed_cosine_distance(query_motion[:, 1:], motion[:, :1]),
        }

    def class_logits(self, embedding: Embedding) -> Tensor:
        """Embedding of V videos -> auxiliary logits [V, num_classes]."""
        tokens, motion = both(embedding)
        logits: Tensor = self.classifier(tokens.mean(dim=1) + motion.mean(dim=1))
        return logits

    def reconstruction_loss(self, episode: Episode, support: Tensor, query: Tensor) -> Tensor:
        """Mean squared error of what the decoder makes of the steps between frames to its target.

        Args:
            episode: The episode, with images, or with flow where that is the target.
            support: Differences of maps [S, T-1, M, h, w].
            query: [Q, T-1, M, h, w].

        Raises:
            ConfigError: the episode lacks what the target is made of, or that is of another shape.
        """
        inputs = inputs_of(self.recons_target, episode)
        target = torch.cat([steps_of(self.recons_target, videos) for videos in inputs])  # [S + Q, T-1, c, H, W]
        decoded = self._decoded(torch.cat([support, query]), target)
        if self.recons_norm == "video":
            target = target / video_scale(target)
        return F.mse_loss(decoded, target)

    def reconstruct(self, features: Features, episode: Episode) -> Reconstruction | None:
        """Decode the steps between the frames of an episode's queries, of which these are the features.

        None where the decoder is not trained, or the episode lacks what the target is made of.
        """
        videos = episode.query_motion if self.recons_target == "flow" else episode.query
        if videos is None or features.maps is None or not self.weights["recons"]:
            return None
        target = steps_of(self.recons_target, videos)
        decoded = self._decoded(self.motion.differences(features.maps), target)
        if self.recons_norm == "video":
            decoded = decoded * video_scale(target)
        return Reconstruction(self.recons_target, target, decoded, still_of(self.recons_target, videos))

    def _decoded(self, differences: Tensor, target: Tensor) -> Tensor:
        """Decode differences of maps [V, T-1, M, h, w] in the shape of their target."""
        size = (target.shape[-2], target.shape[-1])
        decoded = full_precision(self.decoder(rearrange(differences, "v t m h w -> (v t) m h w"), size))
        decoded = rearrange(decoded, "(v t) c h w -> v t c h w", v=len(differences))
        if decoded.shape != target.shape:
            raise ConfigError(
                f"the target of the reconstruction ({self.recons_target}) is {list(target.shape)}, where the decoder "
                f"makes {list(decoded.shape)}; give each video as many of them as it has frames"
            )
        return decoded


class MotionEncoder(nn.Module):
    """Differences of consecutive frames' maps, and their tokens (section 3.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = max(channels // 8, LEAST_MOTION_CHANNELS)  # M
        self.reduce = nn.Conv3d(channels, self.channels, 3, padding=1)
        self.conv = nn.Conv2d(self.channels, self.channels, 3, padding=1)
        self.up = nn.Conv2d(self.channels, channels, 1)

    def differences(self, maps: Tensor) -> Tensor:
        """[V, T, C, h, w] -> [V, T-1, M, h, w]: later maps, convolved, less the earlier ones."""
        reduced = rearrange(self.reduce(rearrange(maps, "v t c h w -> v c t h w")), "v m t h w -> v t m h w")
        later = reduced[:, 1:]
        moved = self.conv(rearrange(later, "v t m h w -> (v t) m h w"))
        differences: Tensor = rearrange(moved, "(v t) m h w -> v t m h w", t=later.shape[1]) - reduced[:, :-1]
        return differences

    def tokens(self, differences: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """[V, T-1, M, h, w] -> [V, T-1, C]."""
        maps = F.relu(self.up(rearrange(differences, "v t m h w -> (v t) m h w")))  # [V (T-1), C, h, w]
        return rearrange(pool(maps), "(v t) c -> v t c", t=differences.shape[1])


def summed_cosine_distance(query: Tensor, prototypes: Tensor) -> Tensor:
    """[Q, n, C], [way, m, C] -> [Q, way]: sum of 1 - cosine over all pairs; n or m is 1."""
    return (1 - token_cosine(query, prototypes)).sum(dim=(2, 3))


def prepend(token: Tensor, tokens: Tensor) -> Tensor:
    """[1, 1, C] and [V, n, C] -> [V, n+1, C]."""
    return torch.cat([token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)


def local(embedding: Embedding) -> Embedding:
    """Leave the global tokens out."""
    return embedding.map(lambda tokens: tokens[:, 1:].contiguous())


def both(embedding: Embedding) -> tuple[Tensor, Tensor]:
    """Return tokens and motion tokens; ConfigError where another method made the embedding."""
    if embedding.motion is None:
        raise ConfigError("the embedding has no motion tokens; make it with the embed of a MoLo model")
    return embedding.tokens, embedding.motion
