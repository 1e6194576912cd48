"""Score how much the motion of a video changes from field to field, for MSCL's sampling of clips.

Source: Ni et al., "Motion Sensitive Contrastive Learning for Self-supervised Video
Representation", ECCV 2022 (arXiv 2208.06105).

Code: megvii-research/MSCL, `tools/ssl/generate_mcl_samples.py`. The fields must be those of the
estimator, before they are stored: scores of rounded fields differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from shards_spec.errors import ConfigError, choice
from shards_spec.pictures import colour_wheel

Floats = NDArray[np.float32]
Weighting = Literal["motion_map", "attention_map", "rgb_map"]
Attention = Literal["none", "max", "sum"]

WINDOW = 28  # side of the windows over which motion boundaries are averaged, in pixels of the field
SCORE_VARIANT = "rgb_map/max"  # the weighting and attention of the scores that are stored
_SMALL = 1e-5  # the reference's, added to the largest radius


def frame_scores(fields: Iterable[Floats], *, weighting: Weighting = "rgb_map", attention: Attention = "max") -> Floats:
    """Score the N fields [h, w, 2] of a video; return [N] float32.

    Args:
        fields: The fields in order; one is held at a time.
        weighting: "rgb_map": mean over pixels of the distance between the colour-coded field and
            the next one, both weighted by `attention`; 0 for the last field. "motion_map" and
            "attention_map": mean of that map of the field.
        attention: Divisor of the attention map: its maximum or its sum. "none": colours are not
            weighted; it does not go with "attention_map".

    Raises:
        ConfigError: an option is not known, or a field is smaller than the window.
    """
    choice("weighting", weighting, ("motion_map", "attention_map", "rgb_map"))
    choice("attention", attention, ("none", "max", "sum"))
    if weighting == "rgb_map":
        changes = ChangeScores(attention=attention)
        for field in fields:
            changes.add(field)
        return np.array(changes.values(), np.float32)
    boundaries = (motion_boundaries(field) for field in fields)
    if weighting == "motion_map":
        return np.array([map_.mean() for map_ in boundaries], np.float32)
    if attention == "none":
        raise ConfigError('weighting="attention_map" needs attention "max" or "sum"')
    return np.array([attention_map(map_, scale=attention).mean() for map_ in boundaries], np.float32)


class ChangeScores:
    """Scores of fields that come one after the other: change to the next one, 0 for the last."""

    def __init__(self, *, attention: Attention = "max") -> None:
        self._attention: Attention = attention
        self._scores: list[float] = []
        self._before: Floats | None = None

    def add(self, field: Floats) -> None:
        """Take the next field [h, w, 2].

        Raises:
            ConfigError: it is smaller than the window.
        """
        colours = weighted_colours(field, attention=self._attention)
        if self._before is not None:
            self._scores.append(change(self._before, colours))
        self._before = colours

    def values(self) -> list[float]:
        """Return one score a field, when all are added."""
        return [] if self._before is None else [*self._scores, 0.0]


def change(before: Floats, after: Floats) -> float:
    """Return the mean over pixels of the Euclidean distance between two maps [h, w, 3]."""
    # Adding three planes [h, w] takes a fifth of the time of a sum along the last, short axis.
    red, green, blue = np.moveaxis(np.square(before - after), -1, 0)
    return float(np.sqrt(red + green + blue).mean())


def weighted_colours(field: Floats, *, attention: Attention = "max") -> Floats:
    """Return a field's colour code, 0 to 255, times its attention map: [h, w, 2] -> [h, w, 3]."""
    colours = colour_code(unit_field(field)).astype(np.float32)
    if attention == "none":
        return colours
    return attention_map(motion_boundaries(field), scale=attention)[..., None] * colours


def motion_boundaries(field: Floats) -> Floats:
    """Return the length of the spatial gradient of both components: [h, w, 2] -> [h, w].

    The gradient is that of the 3 x 3 Sobel filter, whose weights are not divided.
    """
    gradients = [
        cv2.Sobel(field[..., part], cv2.CV_32F, dx, 1 - dx, ksize=3, borderType=cv2.BORDER_REFLECT)
        for part in (0, 1)
        for dx in (1, 0)
    ]
    lengths: Floats = np.sqrt(np.square(gradients).sum(axis=0))
    return lengths


def attention_map(boundaries: Floats, *, scale: Literal["max", "sum"]) -> Floats:
    """Average over whole windows, resize to [h, w], divide by the maximum or sum: [h, w] -> [h, w].

    Departure from the reference: without any boundary the map is 0 everywhere, where the reference
    divides by zero.

    Raises:
        ConfigError: the field is smaller than one window.
    """
    height, width = boundaries.shape
    rows, columns = height // WINDOW, width // WINDOW
    if not rows or not columns:
        raise ConfigError(
            f"motion scores need flow fields of {WINDOW} x {WINDOW} and more, not {height} x {width}; "
            "compute the flow at a larger size"
        )
    whole = boundaries[: rows * WINDOW, : columns * WINDOW].reshape(rows, WINDOW, columns, WINDOW)
    windows = whole.transpose(1, 3, 0, 2).reshape(-1, rows, columns)
    # Pixels of a window come first, [WINDOW^2, rows, columns]: NumPy then adds one pixel after the
    # other in float32, as the reference does. Along the last axis it adds in pairs and rounds
    # otherwise, and differences of weighted maps show that.
    means = windows.sum(axis=0, dtype=np.float32) / np.float32(len(windows))
    resized: Floats = cv2.resize(means, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32, copy=False)
    total = resized.max() if scale == "max" else resized.sum()
    return resized / total if total else resized


def unit_field(field: Floats) -> Floats:
    """Divide a field [h, w, 2] by its largest radius, so that no vector is longer than 1."""
    radius = np.sqrt(np.square(field[..., 0]) + np.square(field[..., 1]))  # [h, w]
    return field / np.float32(radius.max() + _SMALL)


def colour_code(field: Floats) -> NDArray[np.uint8]:
    """Code direction as a hue of the colour wheel and radius as its strength: [..., 2] -> [..., 3].

    No motion is white. Vectors longer than 1 are darkened.
    """
    wheel = colour_wheel() / np.float32(255)  # [55, 3]
    u, v = field[..., 0], field[..., 1]
    radius = np.sqrt(np.square(u) + np.square(v))[..., None]
    # In float64: NumPy's arctan2 in float32 differs between CPUs.
    angle = np.arctan2(-v, -u, dtype=np.float64).astype(np.float32)
    place = (angle / np.float32(np.pi) + 1) / 2 * (len(wheel) - 1)
    low = np.floor(place).astype(np.int64)
    share = (place - low)[..., None].astype(np.float32)
    hue = (1 - share) * wheel.take(low, axis=0) + share * wheel.take(low + 1, axis=0, mode="wrap")  # [..., 3]
    colour = 1 - radius * (1 - hue)
    if radius.size and radius.max() > 1:
        colour = np.where(radius <= 1, colour, hue * np.float32(0.75))
    levels: NDArray[np.uint8] = np.floor(255 * colour).astype(np.uint8)
    return levels
