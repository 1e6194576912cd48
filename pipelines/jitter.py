"""The colour jitter of one clip of an episode, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.draw import Draw

# Of the reference code: factors in 1 +- strength, hue shift in +- strength (of a full turn), share of grey clips
BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY = 0.5, 0.5, 0.5, 0.25, 0.3


@dataclass(frozen=True)
class Jitter:
    """Colour jitter of one clip: three factors, a hue shift in turns, their order, grey first or not.

    order holds the places of (brightness, contrast, saturation, hue), first applied first.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[int, ...]
    grey: bool


def draw_jitter(draw: Draw) -> Jitter:
    """Factors of a clip."""
    brightness = draw.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)
    contrast = draw.uniform(1 - CONTRAST, 1 + CONTRAST)
    saturation = draw.uniform(1 - SATURATION, 1 + SATURATION)
    hue = draw.uniform(-HUE, HUE)
    order = [0, 1, 2, 3]
    draw.shuffle(order)
    return Jitter(brightness, contrast, saturation, hue, tuple(order), draw.random() < GREY)
