"""What is made of the planes of a frame: RGB, and smaller pictures."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocess.decode import Planes


def to_rgb(planes: Planes) -> NDArray[np.uint8]:
    """[h, w, 3] of full-range BT.601 planes; chroma is scaled up as libjpeg does (3/4 the nearer, 1/4 the farther)."""
    height, width = planes.y.shape
    chroma = [
        cv2.resize(plane, (2 * plane.shape[1], 2 * plane.shape[0]), interpolation=cv2.INTER_LINEAR_EXACT)
        for plane in (planes.v, planes.u)
    ]
    ycrcb = cv2.merge([planes.y, *(plane[:height, :width] for plane in chroma)])
    rgb: NDArray[np.uint8] = cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2RGB).astype(np.uint8, copy=False)
    return rgb


def shrink(image: NDArray[np.uint8], short_side: int) -> NDArray[np.uint8]:
    """Scale an image down by area averaging until its short side is `short_side`; smaller ones stay."""
    height, width = image.shape
    factor = short_side / min(height, width)
    if factor >= 1:
        return image
    size = (round(width * factor), round(height * factor))
    result: NDArray[np.uint8] = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return result
