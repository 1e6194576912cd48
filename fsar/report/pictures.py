"""Small pictures inside a page: frames as they are stored or as a model sees them, and motion in grey and colour."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from torch import Tensor

from shards_spec import ShardSet
from shards_spec.pictures import decode_picture

Picture = NDArray[np.uint8]

SIDE, QUALITY = 96, 78  # longest side in pixels; twice what a page shows of a frame, for screens of many pixels
FULL = 99.0  # percentile of the motion in a figure that has the full colour, and of a frame's colours
DARK, BRIGHT, MOST_BRIGHTENING = 100.0, 200.0, 8.0  # of frames of which nothing could be seen


def data_uri(picture: Picture, *, side: int = SIDE) -> str:
    """A picture [h, w, 3] as JPEG in an address, scaled down until no side is longer than `side` pixels."""
    factor = side / max(picture.shape[:2])
    if factor < 1:
        size = [max(1, round(factor * length)) for length in picture.shape[1::-1]]
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=QUALITY, colorsubsampling="420")
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def image(address: str, alt: str) -> str:
    """The element of a picture."""
    return f'<img src="{address}" alt="{escape(alt)}">'


def brightening(pictures: Sequence[Picture]) -> float:
    """By how much dark pictures of one video are to be multiplied to be seen; 1 for others."""
    bright = max(float(np.percentile(np.stack(pictures), FULL)), 1.0)
    return 1.0 if bright >= DARK else min(BRIGHT / bright, MOST_BRIGHTENING)


def seeable(picture: Picture) -> Picture:
    """The picture, brighter where it is dark."""
    return brightened([picture], brightening([picture]))[0]


def brightened(pictures: Sequence[Picture], factor: float) -> list[Picture]:
    """The same pictures, every colour multiplied."""
    return [(factor * picture.astype(np.float32)).clip(0, 255).astype(np.uint8) for picture in pictures]


def pictures_of(clip: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> list[Picture]:
    """Normalised frames [T, 3, h, w] as pictures; of clips [S, clip, 3, h, w] the frame in the middle of each."""
    frames = middle_frames(clip).float().cpu().permute(0, 2, 3, 1).numpy()  # [T, h, w, 3]
    colours = 255 * (frames * np.asarray(std, np.float32) + np.asarray(mean, np.float32))
    return list(colours.round().clip(0, 255).astype(np.uint8))


def middle_frames(clip: Tensor) -> Tensor:
    """[T, 3, h, w] as it is; of [S, clip, 3, h, w] the frame in the middle of each clip."""
    return clip if clip.ndim == 4 else clip[:, clip.shape[1] // 2]


def full_motion(changes: Sequence[Tensor]) -> float:
    """The change that has the full colour beside others: few pixels of all that are given change more."""
    sizes = np.concatenate([change.float().abs().cpu().numpy().ravel() for change in changes])
    return max(float(np.percentile(sizes, FULL)), 1e-6)


def motion_pictures(change: Tensor, full: float) -> list[Picture]:
    """Changes [n, 3, h, w] of normalised colours as pictures: grey is none, black and white are -full and full."""
    grey = 127.5 * (1 + change.float().cpu().permute(0, 2, 3, 1).numpy() / full)
    return list(grey.round().clip(0, 255).astype(np.uint8))


def middle_frame(shards: ShardSet, row: int) -> Picture:
    """The stored frame [h, w, 3] in the middle of a video.

    Raises:
        ShardError: it is damaged.
    """
    series = shards.series("rgb")
    (data,) = series.read(row, [len(series.kept(row)) // 2])
    height, width = series.sizes[row].tolist()
    return decode_picture(data, "rgb", row, raw=(height, width) if series.codec == "raw" else None)
