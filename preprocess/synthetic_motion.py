"""The kinds of motion of the synthetic data set: where a sprite is, how it is turned, sized and seen, over time.

A class is a path and nothing else: appearance is drawn elsewhere and knows nothing of the class. Positions are relative
to an anchor that is random in every video, and many classes visit the same poses and differ only in their order, so that
neither one frame nor the set of a clip's frames tells the class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Progress = NDArray[np.float64]
    Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Poses:
    """Pose of the sprite in each of T frames, relative to the video's own anchor, angle and size.

    x (right) and y (down) in units of the video's amplitude, angle in radians clockwise, zoom in octaves, opacity in
    [0, 1]; all float64 [T].
    """

    x: Progress
    y: Progress
    angle: Progress
    zoom: Progress
    opacity: Progress


@dataclass(frozen=True)
class MotionClass:
    """One class: its kind (a kind belongs to one split), its path, and the class that is the same path backwards."""

    kind: str
    path: Callable[[Progress, np.random.Generator], Poses]
    reverse: str | None = None

    @property
    def split(self) -> str:
        """The split of the class's kind: train, val or test."""
        return SPLIT_OF_KIND[self.kind]


def poses(
    progress: Progress,
    *,
    x: Progress | None = None,
    y: Progress | None = None,
    angle: Progress | None = None,
    zoom: Progress | None = None,
    opacity: Progress | None = None,
) -> Poses:
    """Poses that stay at rest (and wholly visible) in everything that is not given."""
    rest = np.zeros_like(progress)
    return Poses(
        x=rest if x is None else x,
        y=rest if y is None else y,
        angle=rest if angle is None else angle,
        zoom=rest if zoom is None else zoom,
        opacity=np.ones_like(progress) if opacity is None else opacity,
    )


def along(points: Points) -> Callable[[Progress, np.random.Generator], Poses]:
    """Path along straight lines through the points at constant speed."""
    corners = np.asarray(points, dtype=np.float64)  # [P, 2]
    lengths = np.hypot(*np.diff(corners, axis=0).T)  # [P - 1]
    times = np.concatenate([[0.0], np.cumsum(lengths) / lengths.sum()])  # [P]

    def path(progress: Progress, _rng: np.random.Generator) -> Poses:
        x, y = (np.interp(progress, times, corners[:, axis]) for axis in (0, 1))
        return poses(progress, x=x, y=y)

    return path


def straight(dx: float, dy: float) -> Callable[[Progress, np.random.Generator], Poses]:
    """Path across the anchor in one direction, from -1 to +1."""
    return along(((-dx, -dy), (dx, dy)))


def out_and_back(dx: float, dy: float) -> Callable[[Progress, np.random.Generator], Poses]:
    """Path in one direction and back to its start."""
    start, end = (-0.8 * dx, -0.8 * dy), (0.8 * dx, 0.8 * dy)
    return along((start, end, start))


def tour(*arms: tuple[float, float]) -> Callable[[Progress, np.random.Generator], Poses]:
    """Path from the anchor out to each arm's end and back, one arm after the other."""
    stops = [(0.0, 0.0)]
    for arm in arms:
        stops += [arm, (0.0, 0.0)]
    return along(tuple(stops))


def sway(dx: float, dy: float) -> Callable[[Progress, np.random.Generator], Poses]:
    """Oscillation along a direction, two to three periods from a random phase."""

    def path(progress: Progress, rng: np.random.Generator) -> Poses:
        wave = np.sin(2 * math.pi * (rng.uniform(2, 3) * progress + rng.random()))
        return poses(progress, x=dx * wave, y=dy * wave)

    return path


def orbit(turns: float) -> Callable[[Progress, np.random.Generator], Poses]:
    """Circle about the anchor from a random phase; positive turns run clockwise on the screen."""

    def path(progress: Progress, rng: np.random.Generator) -> Poses:
        angle = 2 * math.pi * (turns * (progress - 0.5) + rng.random())
        return poses(progress, x=np.cos(angle), y=np.sin(angle))

    return path


def spin(turns: float) -> Callable[[Progress, np.random.Generator], Poses]:
    """Rotation in place; positive turns run clockwise on the screen."""

    def path(progress: Progress, _rng: np.random.Generator) -> Poses:
        return poses(progress, angle=2 * math.pi * turns * (progress - 0.5))

    return path


def zoom(*octaves: float) -> Callable[[Progress, np.random.Generator], Poses]:
    """Growth and shrinking through the given sizes, equally long each."""
    times = np.linspace(0.0, 1.0, len(octaves))

    def path(progress: Progress, _rng: np.random.Generator) -> Poses:
        return poses(progress, zoom=np.interp(progress, times, octaves))

    return path


def fade(*opacities: float) -> Callable[[Progress, np.random.Generator], Poses]:
    """Path at rest that goes through the given opacities, equally long each."""
    times = np.linspace(0.0, 1.0, len(opacities))

    def path(progress: Progress, _rng: np.random.Generator) -> Poses:
        return poses(progress, opacity=np.interp(progress, times, opacities))

    return path


RIGHT, LEFT, UP, DOWN = (1.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0)
_D = 0.75

SPLIT_OF_KIND = {
    "straight": "train",
    "diagonal": "train",
    "corner": "train",
    "out and back": "train",
    "sway": "train",
    "spin": "train",
    "fade": "train",
    "zoom": "val",
    "loop": "val",
    "tour": "test",
    "orbit": "test",
}
CLASSES: dict[str, MotionClass] = {
    "right": MotionClass("straight", straight(*RIGHT), "left"),
    "left": MotionClass("straight", straight(*LEFT), "right"),
    "up": MotionClass("straight", straight(*UP), "down"),
    "down": MotionClass("straight", straight(*DOWN), "up"),
    "up_right": MotionClass("diagonal", straight(_D, -_D), "down_left"),
    "down_left": MotionClass("diagonal", straight(-_D, _D), "up_right"),
    "up_left": MotionClass("diagonal", straight(-_D, -_D), "down_right"),
    "down_right": MotionClass("diagonal", straight(_D, _D), "up_left"),
    "right_then_up": MotionClass("corner", along(((-_D, _D), (_D, _D), (_D, -_D))), "down_then_left"),
    "down_then_left": MotionClass("corner", along(((_D, -_D), (_D, _D), (-_D, _D))), "right_then_up"),
    "up_then_right": MotionClass("corner", along(((-_D, _D), (-_D, -_D), (_D, -_D))), "left_then_down"),
    "left_then_down": MotionClass("corner", along(((_D, -_D), (-_D, -_D), (-_D, _D))), "up_then_right"),
    "out_right": MotionClass("out and back", out_and_back(*RIGHT)),
    "out_left": MotionClass("out and back", out_and_back(*LEFT)),
    "out_up": MotionClass("out and back", out_and_back(*UP)),
    "out_down": MotionClass("out and back", out_and_back(*DOWN)),
    "sway": MotionClass("sway", sway(*RIGHT)),
    "bob": MotionClass("sway", sway(*DOWN)),
    "spin_cw": MotionClass("spin", spin(1.0), "spin_ccw"),
    "spin_ccw": MotionClass("spin", spin(-1.0), "spin_cw"),
    "appear": MotionClass("fade", fade(0.0, 1.0), "vanish"),
    "vanish": MotionClass("fade", fade(1.0, 0.0), "appear"),
    "grow": MotionClass("zoom", zoom(-0.6, 0.6), "shrink"),
    "shrink": MotionClass("zoom", zoom(0.6, -0.6), "grow"),
    "grow_shrink": MotionClass("zoom", zoom(-0.6, 0.6, -0.6)),
    "shrink_grow": MotionClass("zoom", zoom(0.6, -0.6, 0.6)),
    "loop_cw": MotionClass("loop", along(((-_D, _D), (-_D, -_D), (_D, -_D), (_D, _D), (-_D, _D))), "loop_ccw"),
    "loop_ccw": MotionClass("loop", along(((-_D, _D), (_D, _D), (_D, -_D), (-_D, -_D), (-_D, _D))), "loop_cw"),
    "tour_rul": MotionClass("tour", tour(RIGHT, UP, LEFT), "tour_lur"),
    "tour_lur": MotionClass("tour", tour(LEFT, UP, RIGHT), "tour_rul"),
    "tour_rlu": MotionClass("tour", tour(RIGHT, LEFT, UP), "tour_ulr"),
    "tour_ulr": MotionClass("tour", tour(UP, LEFT, RIGHT), "tour_rlu"),
    "tour_url": MotionClass("tour", tour(UP, RIGHT, LEFT), "tour_lru"),
    "tour_lru": MotionClass("tour", tour(LEFT, RIGHT, UP), "tour_url"),
    "orbit_cw": MotionClass("orbit", orbit(1.1), "orbit_ccw"),
    "orbit_ccw": MotionClass("orbit", orbit(-1.1), "orbit_cw"),
}
