"""Decode what the members of a series show: pictures, and motion in the colours of a wheel.

The wheel: Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011
(the Middlebury code).
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from shards_spec.errors import ShardError

MOST_PIXELS = 1 << 26  # of a stored picture: 16384x4096
FLOW_ZERO, FLOW_CODES = 128, 127  # code of no motion, and its distance to that of `scale`
# Corners of the wheel of 55 hues, and their colours.
# Red points to the right, yellow down, cyan to the left, violet up.
HUES = (0, 15, 21, 25, 36, 49, 55)
COLOURS = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255), (255, 0, 0))


def segment_centres(total: int, segments: int) -> NDArray[np.int64]:
    """Return the centres of `segments` equal parts of 0..total-1.

    Where `total` is smaller, every position is a centre.
    """
    segments = min(total, segments)
    return (2 * np.arange(segments) + 1) * total // (2 * segments)


def series_kind(series: str) -> tuple[str, int]:
    """Return `diff`, `flow` or `frames`, and the displacement in source frames (0 for frames)."""
    match = re.match(r"(diff|flow)(\d+)", series)
    return (match[1], int(match[2])) if match else ("frames", 0)


def decode_picture(data: bytes, series: str, row: int, *, raw: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Decode a stored picture.

    Args:
        data: The member of the shard.
        series: Name of its series.
        row: Its catalogue row, for messages.
        raw: Height and width of a picture that is no JPEG.

    Returns:
        [h, w, 3] RGB, or [2h, w] of a flow field: u above v.

    Raises:
        ShardError: it is damaged.
    """
    if raw:
        if len(data) != raw[0] * raw[1] * 3:
            raise ShardError(f"a picture of video {row} in {series} is no raw {raw[0]}x{raw[1]}")
        return np.frombuffer(data, np.uint8).reshape(*raw, 3)
    grey = series_kind(series)[0] == "flow"
    try:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        if height * width > MOST_PIXELS:
            raise ValueError(f"{width}x{height} pixels")  # noqa: TRY301 -- as what the decoder raises
        picture: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, colorspace="GRAY" if grey else "RGB", fastdct=False, fastupsample=False
        )
    except ValueError as error:
        raise ShardError(
            f"a picture of video {row} in {series} is damaged ({error}); run fsar-shards verify"
        ) from error
    return picture[..., 0] if grey else picture


def flow_field(picture: NDArray[np.uint8], scale: float) -> NDArray[np.float64]:
    """Return the flow that a decoded picture stands for.

    Args:
        picture: [2h, w] codes, u above v.
        scale: Pixels of the stored field that `FLOW_CODES` stands for.

    Returns:
        [h, w, 2] u to the right and v downwards, in pixels of the stored field.
    """
    codes = np.stack(np.split(picture.astype(np.float64), 2), axis=-1)  # [h, w, 2]
    field: NDArray[np.float64] = (codes - FLOW_ZERO) * (scale / FLOW_CODES)
    return field


def colour_wheel() -> NDArray[np.uint8]:
    """Return [55, 3] RGB of the wheel.

    From each corner to the next one channel rises or falls in equal steps, each rounded down.
    """
    corners = zip(pairwise(HUES), pairwise(np.array(COLOURS)), strict=True)
    parts = [
        colour + np.sign(following - colour) * (255 * np.arange(end - place) // (end - place))[:, None]
        for (place, end), (colour, following) in corners
    ]
    return np.concatenate(parts).astype(np.uint8)
