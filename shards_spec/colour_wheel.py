"""The wheel of colours that stand for directions of motion: one table for whoever shows or codes optical flow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CORNERS = ((1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1))  # red, yellow, green, cyan, blue, magenta
_STEPS = (15, 6, 4, 11, 13, 6)  # entries from each corner to the next, by how well the eye tells them apart


def colour_wheel() -> NDArray[np.uint8]:
    """[55, 3] RGB: from each corner of the colour hexagon one channel rises or falls in equal steps to the next.

    Source: Baker et al., "A database and evaluation methodology for optical flow", IJCV 2011 (its `colorcode`).
    """
    corners = np.array(_CORNERS)
    parts = [
        255 * start + (end - start) * (255 * np.arange(steps) // steps)[:, None]  # [steps, 3]
        for start, end, steps in zip(corners, np.roll(corners, -1, axis=0), _STEPS, strict=True)
    ]
    return np.concatenate(parts).astype(np.uint8)
