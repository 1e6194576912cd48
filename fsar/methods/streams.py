"""Two streams: the same method on frames and on motion, each with its own trunk and losses.

Training adds the two losses. Only answers are mixed: each stream's logits are divided by their
spread, and `weight` is the share of motion (two-stream networks, Simonyan and Zisserman, NeurIPS
2014, average the two).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from fsar.episode import Episode
from fsar.matching import full_precision
from fsar.methods.base import FewShotMethod, Input, Output
from fsar.trunks import Stream, Trunk

LEAST_SPREAD = 1e-6


@dataclass(frozen=True)
class Fusion:
    """How the logits of two streams become one answer.

    Attributes:
        weight: Share of motion, from 0 to 1.
        frames: Mean standard deviation of the frames' logits over the classes of an episode; None:
            each query's own.
        motion: The same of the motion's logits.
    """

    weight: float = 0.5
    frames: float | None = None
    motion: float | None = None

    def logits(self, frames: Tensor, motion: Tensor, weight: Tensor | float | None = None) -> Tensor:
        """Mix logits [..., Q, way]; `weight` [..., 1, 1] in place of the fusion's own."""
        share = self.weight if weight is None else weight
        return (1 - share) * standardised(frames, self.frames) + share * standardised(motion, self.motion)


def standardised(logits: Tensor, spread: float | None) -> Tensor:
    """Divide logits [..., way] by a spread, or by each query's own standard deviation."""
    logits = full_precision(logits)
    if spread is None:
        return logits / logits.std(dim=-1, keepdim=True, correction=0).clamp(min=LEAST_SPREAD)
    return logits / max(spread, LEAST_SPREAD)


class TwoStreams(nn.Module):
    """A method on frames beside the same method on motion.

    Args:
        frames: The model that reads frames.
        motion: The model that reads motion; it reads no texts of classes.
        rule: The share of motion in the answers, or how it is chosen: "train" or "support".

    Attributes:
        fusion: How the logits are mixed; chosen after training.
    """

    def __init__(self, frames: FewShotMethod, motion: FewShotMethod, *, rule: float | str = "train") -> None:
        super().__init__()
        self.frames, self.motion, self.rule = frames, motion, rule
        self.fusion = Fusion()

    def set_rule(self, rule: float | str) -> None:
        """Change how the share of motion is chosen; a number is the share at once."""
        self.rule = rule
        if isinstance(rule, float):
            self.fusion = replace(self.fusion, weight=rule)

    @property
    def trunk(self) -> Trunk | None:
        """The trunk that reads frames."""
        return self.frames.trunk

    @property
    def reads(self) -> frozenset[Input]:
        """Inputs that either stream reads beyond pooled features."""
        return frozenset({*self.frames.reads, *self.motion.reads})

    def set_base_text(self, text: Tensor) -> None:
        """Hand the text vectors [N, C] of the base classes to the frames' method."""
        self.frames.set_base_text(text)

    def forward(self, episode: Episode) -> Output:
        """Logits of both streams mixed, and the losses of each under its name; `loss` is their sum."""
        frames, motion = self.frames(episode), self.motion(motion_only(episode))
        parts: dict[Stream, Output] = {"frames": frames, "motion": motion}
        losses = {f"{name}_{term}": loss for name, part in parts.items() for term, loss in part.losses.items()}
        aux = {f"{name}_logits": part.logits for name, part in parts.items()}
        return Output(self.fusion.logits(frames.logits, motion.logits), losses, frames.loss + motion.loss, aux)


Model = FewShotMethod | TwoStreams


def motion_only(episode: Episode) -> Episode:
    """Leave out of an episode what belongs to its frames: features of their trunk, and texts."""
    return replace(episode, class_text=None, support_features=None, query_features=None, unlabelled_features=None)


def streams_of(model: Model) -> dict[Stream, FewShotMethod]:
    """Return the method of each stream that a model reads."""
    return {"frames": model.frames, "motion": model.motion} if isinstance(model, TwoStreams) else {model.stream: model}
