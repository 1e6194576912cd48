"""The wheel of colours that stand for directions of motion, for whoever shows or codes optical flow.

Source: Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011 (the Middlebury code).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# Place on the wheel of 55 hues, and its colour: to the right red, downwards yellow, to the left cyan, upwards violet.
HUES = (0, 15, 21, 25, 36, 49, 55)
COLOURS = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255), (255, 0, 0))


def colour_wheel() -> NDArray[np.uint8]:
    """[55, 3] RGB: from each corner to the next one channel rises or falls in equal steps, the steps rounded down."""
    corners = zip(pairwise(HUES), pairwise(np.array(COLOURS)), strict=True)
    parts = [
        colour + np.sign(following - colour) * (255 * np.arange(end - place) // (end - place))[:, None]
        for (place, end), (colour, following) in corners
    ]
    return np.concatenate(parts).astype(np.uint8)
