"""Colour jitter and grey scale as MSCL's code has them, of many clips at once on their device.

The formulas are those of kornia before 0.6, which that code (megvii-research/MSCL) was written for: brightness is
added, contrast multiplies, saturation is that of HSV.  Blur and normalisation, which follow, are no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pipelines.augment import clips as augment
from shards_spec.errors import ConfigError, choice

Sync = Literal["clip", "frame"]


def add_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Add factor - 1 to [..., 3, H, W], kept in [0, 1]."""
    return (images + (factor - 1)).clamp(0, 1)


def hsv_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply the saturation of [..., 3, H, W] by the factor, up to 1; hue and value (HSV) are kept."""
    value, low = images.amax(-3, keepdim=True), images.amin(-3, keepdim=True)
    most = value / (value - low).clamp(min=torch.finfo(images.dtype).tiny)  # the factor that gives saturation 1
    return value - (value - images) * torch.minimum(factor.expand_as(most), most)


_OPERATIONS = (add_brightness, augment.brightness, hsv_saturation, augment.hue)  # the second is contrast there


@dataclass(frozen=True)
class JitterDraws:
    """What is random about one call, for N clips of T frames."""

    factors: torch.Tensor  # [4, N, T] of brightness, contrast, saturation, hue; 1, 1, 1 and 0 for clips without jitter
    order: tuple[int, ...]  # places of the four operations, the first applied first, for all clips
    grey: torch.Tensor  # bool [N]

    def part(self, first: int, count: int) -> JitterDraws:
        """The draws of `count` of the clips."""
        some = slice(first, first + count)
        return JitterDraws(self.factors[:, some], self.order, self.grey[some])


@dataclass(frozen=True)
class ClipJitter:
    """Rules of the augmentation; whether a clip is jittered or grey is decided once for all of its frames.

    Attributes:
        jitter: Probability of jitter.
        grey: Probability of grey scale, which comes after it.
        strength: Brightness, contrast and saturation factors are uniform in [1 - strength, 1 + strength].
        hue: The hue turns by a uniform share of a turn in [-hue, hue].
        sync: Factors of a "clip", or of each "frame" as in MSCL's published configuration.
    """

    jitter: float = 0.8
    grey: float = 0.2
    strength: float = 0.4
    hue: float = 0.1
    sync: Sync = "clip"

    def __post_init__(self) -> None:
        """ConfigError for values that mean nothing."""
        choice("sync", self.sync, ("clip", "frame"))
        for name in ("jitter", "grey", "strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} of the jitter must be from 0 to 1")

    def draw(self, clips: int, frames: int, *, generator: torch.Generator) -> JitterDraws:
        """Draw for so many clips of so many frames, on the generator's device."""
        device = generator.device
        chance = torch.rand(2, clips, generator=generator, device=device)
        factors = frames if self.sync == "frame" else 1
        spread = 2 * torch.rand(4, clips, factors, generator=generator, device=device) - 1
        order = torch.randperm(4, generator=generator, device=device)
        half = torch.tensor([self.strength] * 3 + [self.hue], device=device)[:, None, None]
        neutral = torch.tensor([1.0, 1.0, 1.0, 0.0], device=device)[:, None, None]
        jittered = (chance[0] < self.jitter)[:, None]
        drawn = (neutral + half * spread * jittered).expand(-1, -1, frames)
        return JitterDraws(drawn, tuple(order.tolist()), chance[1] < self.grey)

    def apply(self, clips: torch.Tensor, draws: JitterDraws) -> torch.Tensor:
        """Clips [N, T, 3, H, W] in [0, 1] -> the same shape, as drawn."""
        factors = draws.factors.to(clips)[..., None, None, None]  # [4, N, T, 1, 1, 1]
        for place in draws.order:
            clips = _OPERATIONS[place](clips, factors[place])
        grey = draws.grey.to(clips.device)[:, None, None, None, None]
        return torch.where(grey, augment.greyscale(clips), clips)
