"""Pictures inside a page: frames as they are stored or as a model reads them, and their motion."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from torch import Tensor

from shards_spec import ShardSet
from shards_spec.peek.peek import flow_colours
from shards_spec.pictures import decode_picture

Picture = NDArray[np.uint8]

SIDE = 96  # pixels of the longest side, twice what a page shows, for screens of many pixels
QUALITY = 78  # of JPEG
FULL = 99.0  # percentile that has the full colour, of motion in an example and of a video
# A video whose percentile FULL is below DARK is brightened so that it is BRIGHT, within a limit.
DARK, BRIGHT, MOST_BRIGHTENING = 100.0, 200.0, 8.0


def jpeg_uri(picture: Picture, *, side: int = SIDE) -> str:
    """Write a picture [h, w, 3] into an address, as JPEG with sides of at most `side` pixels."""
    factor = side / max(picture.shape[:2])
    if factor < 1:
        size = [max(1, round(factor * length)) for length in picture.shape[1::-1]]
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=QUALITY, colorsubsampling="420")
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def png_uri(path: Path) -> str:
    """Write a PNG file into an address."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def brightening(pictures: Sequence[Picture]) -> float:
    """Choose the factor that makes dark pictures of one video visible; 1 unless they are dark."""
    bright = max(float(np.percentile(np.stack(pictures), FULL)), 1.0)
    return 1.0 if bright >= DARK else min(BRIGHT / bright, MOST_BRIGHTENING)


def visible(picture: Picture) -> Picture:
    """Brighten a picture that is dark."""
    return brightened([picture], brightening([picture]))[0]


def brightened(pictures: Sequence[Picture], factor: float) -> list[Picture]:
    """Multiply every colour."""
    return [(factor * picture.astype(np.float32)).clip(0, 255).astype(np.uint8) for picture in pictures]


def pictures_of(clip: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> list[Picture]:
    """Turn normalised frames into pictures [h, w, 3].

    Args:
        clip: [T, 3, h, w]; or [S, clip, 3, h, w], S clips with one picture of each.
        mean: Of the normalisation.
        std: Of the normalisation.
    """
    frames = middle_frames(clip).float().cpu().permute(0, 2, 3, 1).numpy()  # [T, h, w, 3]
    colours = 255 * (frames * np.asarray(std, np.float32) + np.asarray(mean, np.float32))
    return list(colours.round().clip(0, 255).astype(np.uint8))


def middle_frames(clip: Tensor) -> Tensor:
    """Take the middle frame of each of S clips.

    Args:
        clip: [S, clip, 3, h, w]; frames [T, 3, h, w] stay as they are.
    """
    return clip if clip.ndim == 4 else clip[:, clip.shape[1] // 2]


def full_motion(motion: Sequence[Tensor]) -> float:
    """Find the motion that has the full colour, of steps [n, c, h, w]: 1 where there are none.

    It is a length of displacements (c = 2), or a change of a colour (c = 3).  It is a percentile,
    since one pixel that changes more would bleach all others.
    """
    sizes = [(steps.norm(dim=1) if steps.shape[1] == 2 else steps.abs()).float().cpu().numpy() for steps in motion]
    values = np.concatenate([size.ravel() for size in sizes])
    return max(float(np.percentile(values, FULL)), 1e-6) if values.size else 1.0


def step_pictures(steps: Tensor, full: float) -> list[Picture]:
    """Turn displacements [n, 2, h, w] or changes of colours [n, 3, h, w] into pictures."""
    return flow_pictures(steps, full) if steps.shape[1] == 2 else motion_pictures(steps, full)


def motion_pictures(change: Tensor, full: float) -> list[Picture]:
    """Turn changes [n, 3, h, w] of normalised colours into pictures.

    Black is -full, grey is no change, white is full.
    """
    grey = 127.5 * (1 + change.float().cpu().permute(0, 2, 3, 1).numpy() / full)
    return list(grey.round().clip(0, 255).astype(np.uint8))


def flow_pictures(flow: Tensor, full: float) -> list[Picture]:
    """Turn displacements [n, 2, h, w], right and down, into pictures: hue is direction.

    White is no motion, and a displacement of length `full` has the full colour.
    """
    return [flow_colours(field, full) for field in flow.float().cpu().permute(0, 2, 3, 1).numpy()]


def middle_frame(shards: ShardSet, row: int) -> Picture:
    """Read the stored frame [h, w, 3] in the middle of a video.

    Raises:
        ShardError: it is damaged.
    """
    series = shards.series("rgb")
    (data,) = series.read(row, [len(series.kept(row)) // 2])
    height, width = series.sizes[row].tolist()
    return decode_picture(data, "rgb", row, raw=(height, width) if series.codec == "raw" else None)
