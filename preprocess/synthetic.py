"""Synthetic videos whose class is their motion alone: a textured sprite that moves over a textured background."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

from preprocess.synthetic_motion import CLASSES, Poses

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Image = NDArray[np.float32]

MARGIN = 24  # pixels of background around the frame that a drift can bring into view
PATCH = 64  # side of the sprite's own image
# Ranges of what is drawn anew for every video; lengths in sides of the frame.
SPRITE_SIDE = (0.34, 0.46)
AMPLITUDE = (0.17, 0.23)
ANCHOR = 0.14  # the anchor is this far from the middle of the frame at most, in x and in y
TILT = 0.2  # radians
DRIFT = 0.12  # way of a drifting background
CONTRAST = (0.1, 0.4)  # of the background: 1 would be as strong as the sprite's own texture


def palette(rng: np.random.Generator, *, away_from: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Two random colours [2, 3] in [0, 255]; of four draws the one farthest from a colour, when one is given."""
    draws = rng.uniform(0, 255, (4, 2, 3))
    if away_from is None:
        return draws[0]
    distance = np.linalg.norm(draws - away_from, axis=2).min(axis=1)  # [4]
    return np.asarray(draws[distance.argmax()])


def texture(rng: np.random.Generator, size: int, cells: int, *, colours: NDArray[np.float64]) -> Image:
    """Smooth noise between two colours, float32 [size, size, 3] in [0, 255]; `cells` is its coarseness."""
    grid = rng.random((cells, cells), dtype=np.float32)
    mix = cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC).clip(0, 1)[..., None]
    return np.asarray(colours[0] * mix + colours[1] * (1 - mix), dtype=np.float32)


def outline(rng: np.random.Generator) -> Image:
    """Soft-edged opacity of a random blob, ellipse or polygon, float32 [PATCH, PATCH, 1] in [0, 1]."""
    count = int(rng.integers(3, 13))
    angles = (np.arange(count) + rng.uniform(-0.25, 0.25, count)) * 2 * math.pi / count
    radii = rng.uniform(0.55, 1.0, count) * 0.46 * PATCH
    aspect = rng.uniform(0.7, 1.0)
    points = np.stack([np.cos(angles) * radii, np.sin(angles) * radii * aspect], axis=1) + PATCH / 2
    mask = np.zeros((PATCH, PATCH), np.float32)
    cv2.fillPoly(mask, [points.round().astype(np.int32)], 1.0)
    return cv2.GaussianBlur(mask, (5, 5), 0)[..., None]


def sprite(rng: np.random.Generator, *, colours: NDArray[np.float64]) -> Image:
    """A random textured shape: colours already multiplied by the opacity, float32 [PATCH, PATCH, 3 + 1]."""
    alpha = outline(rng)
    pattern = texture(rng, PATCH, int(rng.integers(2, 7)), colours=colours)
    return np.concatenate([pattern * alpha, alpha], axis=2)


def placements(poses: Poses, rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Affine maps [T, 2, 3] from sprite to frame: random anchor, amplitude, tilt, size and angle; then the class's poses."""
    amplitude = rng.uniform(*AMPLITUDE) * size
    anchor = size / 2 + rng.uniform(-ANCHOR, ANCHOR, 2) * size
    tilt = rng.uniform(-TILT, TILT)
    x = anchor[0] + amplitude * (math.cos(tilt) * poses.x - math.sin(tilt) * poses.y)  # [T]
    y = anchor[1] + amplitude * (math.sin(tilt) * poses.x + math.cos(tilt) * poses.y)
    scale = rng.uniform(*SPRITE_SIDE) * size / PATCH * 2.0**poses.zoom
    angle = rng.uniform(0, 2 * math.pi) + poses.angle
    a, b = scale * np.cos(angle), scale * np.sin(angle)
    half = PATCH / 2
    rows = [[a, -b, x - a * half + b * half], [b, a, y - b * half - a * half]]
    return np.moveaxis(np.asarray(rows), 2, 0)


def backgrounds(rng: np.random.Generator, frames: int, size: int, *, colours: NDArray[np.float64]) -> Image:
    """A random texture that rests or drifts with constant velocity, float32 [T, size, size, 3]."""
    canvas = texture(rng, size + 2 * MARGIN, int(rng.integers(4, 14)), colours=colours)
    angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0, DRIFT) * size / 2 * (rng.random() < 0.6)
    direction = np.asarray([math.cos(angle), math.sin(angle)])
    centre = canvas.shape[0] / 2
    steps = np.linspace(-1, 1, frames)[:, None] * direction * distance + centre  # [T, 2]
    views = [cv2.getRectSubPix(canvas, (size, size), (float(x), float(y))) for x, y in steps]
    return np.stack(views)


def progress(rng: np.random.Generator, frames: int) -> NDArray[np.float64]:
    """How much of the path is done in each frame [T]: a random rest before, a random rest after."""
    first, last = rng.uniform(0.0, 0.1), rng.uniform(0.9, 1.0)
    return ((np.linspace(0, 1, frames) - first) / (last - first)).clip(0, 1)


def render_video(name: str, number: int, *, seed: int, frames: int = 24, size: int = 80) -> NDArray[np.uint8]:
    """Frames of one video, uint8 [T, size, size, 3]: a pure function of seed, class and number."""
    entropy = [seed, number, *name.encode()]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    poses = CLASSES[name].path(progress(rng, frames), rng)
    maps = placements(poses, rng, size)
    colours = palette(rng)
    colours = colours.mean(axis=0) + rng.uniform(*CONTRAST) * (colours - colours.mean(axis=0))
    shape = sprite(rng, colours=palette(rng, away_from=colours.mean(axis=0)))
    video = backgrounds(rng, frames, size, colours=colours)
    for t in range(frames):
        layer = cv2.warpAffine(shape, maps[t], (size, size), flags=cv2.INTER_LINEAR) * poses.opacity[t]
        video[t] = video[t] * (1 - layer[..., 3:]) + layer[..., :3]
    return np.rint(video).clip(0, 255).astype(np.uint8)
