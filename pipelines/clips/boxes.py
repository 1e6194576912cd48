"""Crop boxes: drawn on the host, handed to whatever cuts the pixels, and told to the model as coordinates."""

from __future__ import annotations

import math
from typing import NamedTuple

from pipelines.draw import Draw
from shards_spec.errors import ConfigError

_TRIES = 10


class Box(NamedTuple):
    """A window of whole pixels in a frame."""

    top: int
    left: int
    height: int
    width: int


def random_resized_box(
    draw: Draw,
    frame: tuple[int, int],
    *,
    area: tuple[float, float] = (0.2, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw a box in a `frame` of (height, width) whose area and aspect ratio (width / height) lie in these ranges.

    The share of the area is uniform, the aspect ratio log-uniform, the corner uniform; after ten boxes that do not
    fit it is the largest central one of an allowed ratio.  Draws: area, log ratio, and of the box that fits its row
    and its column, in the order of torchvision's RandomResizedCrop.  ConfigError for ranges that are none.
    """
    for name, (low, high) in (("area", area), ("aspect", aspect)):
        if not 0 < low <= high:
            raise ConfigError(f"{name}=({low}, {high}) must be two positive numbers, the lower one first")
    height, width = frame
    logs = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(_TRIES):
        pixels = height * width * draw.uniform(*area)
        ratio = math.exp(draw.uniform(*logs))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(draw.randint(0, height - h), draw.randint(0, width - w), h, w)
    return _central_box(height, width, aspect)


def _central_box(height: int, width: int, aspect: tuple[float, float]) -> Box:
    ratio = min(max(width / height, aspect[0]), aspect[1])
    h = min(height, max(1, round(width / ratio)))
    w = min(width, max(1, round(height * ratio)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop_coordinates(box: Box, frame: tuple[int, int], *, flip: bool) -> tuple[float, float, float, float]:
    """Corners (x1, y1, x2, y2) of a box in a `frame` of (height, width), as shares of it.

    Pixel centres count, so 0 and 1 are the first and the last pixel; x1 > x2 marks a flipped crop.
    Source: FIMA's code (ZMHH-H/FIMA), which pairs places of two crops by them.
    """
    down, across = max(frame[0] - 1, 1), max(frame[1] - 1, 1)
    x1, x2 = box.left / across, (box.left + box.width - 1) / across
    y1, y2 = box.top / down, (box.top + box.height - 1) / down
    return (x2, y1, x1, y2) if flip else (x1, y1, x2, y2)
