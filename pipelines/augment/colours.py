"""Colour jitter of one frame on a CPU: the operations of `augment.py`, with OpenCV, in memory that is given.

A frame of 224 x 224 takes a fifth of torch's time: one call an operation, and all of it in the cache.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from pipelines.draw import Jitter

Values = npt.NDArray[np.float32]

LUMINANCE = np.array([0.299, 0.587, 0.114])
TURN = 360.0  # OpenCV's hue is in degrees


def jitter_frame(frame: Values, spare: Values, jitter: Jitter) -> None:
    """Jitter a frame [h, w, 3] of colours in [0, 1] where it lies; spare: memory of the same shape."""
    if jitter.grey:
        saturation(frame, spare, 0.0)
    factors = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    for place in jitter.order:
        OPERATIONS[place](frame, spare, factors[place])


def brightness(frame: Values, spare: Values, factor: float) -> None:
    """Blend [h, w, 3] with black: factor 0 is black, 1 changes nothing."""
    np.multiply(frame, np.float32(factor), out=spare)
    cv2.threshold(spare, 1.0, 0.0, cv2.THRESH_TRUNC, frame)


def contrast(frame: Values, spare: Values, factor: float) -> None:
    """Blend [h, w, 3] with its mean luminance: factor 0 is that grey."""
    mean = LUMINANCE @ cv2.mean(frame)[:3]
    _mix(frame, spare, factor * np.eye(3), np.full((3, 1), (1 - factor) * mean))


def saturation(frame: Values, spare: Values, factor: float) -> None:
    """Blend [h, w, 3] with its luminance: factor 0 is the grey frame."""
    _mix(frame, spare, factor * np.eye(3) + (1 - factor) * LUMINANCE, np.zeros((3, 1)))


def _mix(frame: Values, spare: Values, matrix: npt.NDArray[np.float64], shift: npt.NDArray[np.float64]) -> None:
    """Replace every colour by matrix [3, 3] times it plus shift [3, 1], kept in [0, 1]."""
    cv2.transform(frame, np.hstack([matrix, shift]).astype(np.float32), spare)
    np.clip(spare, np.float32(0), np.float32(1), out=frame)


def hue(frame: Values, spare: Values, shift: float) -> None:
    """Turn the hue of [h, w, 3] by `shift` turns, saturation and value (HSV) kept."""
    cv2.cvtColor(frame, cv2.COLOR_RGB2HSV, spare)
    spare[..., 0] += np.float32(
        TURN * (shift % 1)
    )  # from 0 to two turns: OpenCV takes off whole ones, of positive hues
    cv2.cvtColor(spare, cv2.COLOR_HSV2RGB, frame)


OPERATIONS = (brightness, contrast, saturation, hue)
