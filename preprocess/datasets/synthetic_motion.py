"""Define the motion of the synthetic data set: place, angle and size of a sprite over time.

A class is a path and nothing else: appearance is drawn in `synthetic`, which does not know it.
Positions are relative to an anchor that is random in every video. Many classes visit the same
poses in another order. So neither one frame nor the set of a clip's frames tells the class.

A path is a function of `progress` [T]: the part of it that is done in each frame, 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]  # [T]: one value a frame


@dataclass(frozen=True)
class Poses:
    """Pose of the sprite in each of T frames, relative to the video's own anchor, angle and size.

    Attributes:
        x: To the right, in units of the video's amplitude.
        y: Downwards, in the same units.
        angle: Clockwise, in radians.
        zoom: In octaves: 1 is twice the size.
    """

    x: Curve
    y: Curve
    angle: Curve
    zoom: Curve


@dataclass(frozen=True)
class MotionClass:
    """One class of motion.

    Attributes:
        kind: Its kind; all classes of a kind are in one split.
        path: Function of progress [T] and a random generator.
        reverse: The class whose path is the same backwards, if any.
    """

    kind: str
    path: Callable[[Curve, np.random.Generator], Poses]
    reverse: str | None = None

    @property
    def split(self) -> str:
        """The split of the class's kind: train, val or test."""
        return SPLIT_OF_KIND[self.kind]


def poses(
    progress: Curve,
    *,
    x: Curve | None = None,
    y: Curve | None = None,
    angle: Curve | None = None,
    zoom: Curve | None = None,
) -> Poses:
    """Return poses that rest in each component that is None."""
    rest = np.zeros_like(progress)
    return Poses(*(rest if curve is None else curve for curve in (x, y, angle, zoom)))


def along(*points: tuple[float, float]) -> Callable[[Curve, np.random.Generator], Poses]:
    """Return a path along straight lines through the points at constant speed."""
    corners = np.asarray(points, dtype=np.float64)  # [P, 2]
    lengths = np.hypot(*np.diff(corners, axis=0).T)  # [P - 1]
    times = np.concatenate([[0.0], np.cumsum(lengths) / lengths.sum()])  # [P]

    def path(progress: Curve, _rng: np.random.Generator) -> Poses:
        x, y = (np.interp(progress, times, corners[:, axis]) for axis in (0, 1))
        return poses(progress, x=x, y=y)

    return path


def straight(dx: float, dy: float) -> Callable[[Curve, np.random.Generator], Poses]:
    """Return a path across the anchor in one direction, from -1 to +1."""
    return along((-dx, -dy), (dx, dy))


def out_and_back(dx: float, dy: float) -> Callable[[Curve, np.random.Generator], Poses]:
    """Return a path in one direction and back to its start."""
    start, end = (-0.8 * dx, -0.8 * dy), (0.8 * dx, 0.8 * dy)
    return along(start, end, start)


def tour(*arms: tuple[float, float]) -> Callable[[Curve, np.random.Generator], Poses]:
    """Return a path from the anchor to each arm's end and back; it rests at each end."""
    stops = np.asarray([(0.0, 0.0)] + [stop for arm in arms for stop in (arm, arm, (0.0, 0.0))])  # [3 arms + 1, 2]
    times = np.concatenate([[0.0], (np.arange(len(arms))[:, None] + [0.3, 0.7, 1.0]).ravel() / len(arms)])

    def path(progress: Curve, _rng: np.random.Generator) -> Poses:
        x, y = (np.interp(progress, times, stops[:, axis]) for axis in (0, 1))
        return poses(progress, x=x, y=y)

    return path


def circle(turns: float, start: tuple[float, float]) -> Callable[[Curve, np.random.Generator], Poses]:
    """Return a path around the anchor, from near one side of it and back.

    Positive turns run clockwise on the screen.
    """
    first = math.atan2(start[1], start[0])

    def path(progress: Curve, rng: np.random.Generator) -> Poses:
        angle = first + rng.uniform(-0.3, 0.3) + 2 * math.pi * turns * progress
        return poses(progress, x=np.cos(angle), y=np.sin(angle))

    return path


def wavy(dx: float, dy: float) -> Callable[[Curve, np.random.Generator], Poses]:
    """Return a wavy line from -1 to +1 in one direction: two waves of random phase."""

    def path(progress: Curve, rng: np.random.Generator) -> Poses:
        way = (dx + dy) * (2 * progress - 1)  # one of dx, dy is 0, the other +1 or -1
        wave = 0.4 * np.sin(2 * math.pi * (way + rng.random()))
        return poses(progress, x=way, y=wave) if dx else poses(progress, x=wave, y=way)

    return path


def spin(turns: float) -> Callable[[Curve, np.random.Generator], Poses]:
    """Return a rotation in place; positive turns run clockwise on the screen."""

    def path(progress: Curve, _rng: np.random.Generator) -> Poses:
        return poses(progress, angle=2 * math.pi * turns * (progress - 0.5))

    return path


def zoom(*octaves: float) -> Callable[[Curve, np.random.Generator], Poses]:
    """Return a path through sizes, each step of the same length in time."""
    times = np.linspace(0.0, 1.0, len(octaves))

    def path(progress: Curve, _rng: np.random.Generator) -> Poses:
        return poses(progress, zoom=np.interp(progress, times, octaves))

    return path


RIGHT, LEFT, UP, DOWN = (1.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0)
_D = 0.75
_TOP_LEFT, _TOP_RIGHT, _BOTTOM_LEFT, _BOTTOM_RIGHT = (-_D, -_D), (_D, -_D), (-_D, _D), (_D, _D)

SPLIT_OF_KIND = {
    "straight": "train",
    "diagonal": "train",
    "corner": "train",
    "out and back": "train",
    "tour": "train",
    "zoom": "val",
    "spin": "val",
    "square": "val",
    "circle": "test",
    "wavy": "test",
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
    "right_then_up": MotionClass("corner", along(_BOTTOM_LEFT, _BOTTOM_RIGHT, _TOP_RIGHT), "down_then_left"),
    "down_then_left": MotionClass("corner", along(_TOP_RIGHT, _BOTTOM_RIGHT, _BOTTOM_LEFT), "right_then_up"),
    "up_then_right": MotionClass("corner", along(_BOTTOM_LEFT, _TOP_LEFT, _TOP_RIGHT), "left_then_down"),
    "left_then_down": MotionClass("corner", along(_TOP_RIGHT, _TOP_LEFT, _BOTTOM_LEFT), "up_then_right"),
    "right_then_down": MotionClass("corner", along(_TOP_LEFT, _TOP_RIGHT, _BOTTOM_RIGHT), "up_then_left"),
    "up_then_left": MotionClass("corner", along(_BOTTOM_RIGHT, _TOP_RIGHT, _TOP_LEFT), "right_then_down"),
    "down_then_right": MotionClass("corner", along(_TOP_LEFT, _BOTTOM_LEFT, _BOTTOM_RIGHT), "left_then_up"),
    "left_then_up": MotionClass("corner", along(_BOTTOM_RIGHT, _BOTTOM_LEFT, _TOP_LEFT), "down_then_right"),
    "out_right": MotionClass("out and back", out_and_back(*RIGHT), "out_right"),
    "out_left": MotionClass("out and back", out_and_back(*LEFT), "out_left"),
    "out_up": MotionClass("out and back", out_and_back(*UP), "out_up"),
    "out_down": MotionClass("out and back", out_and_back(*DOWN), "out_down"),
    "tour_right_up_left": MotionClass("tour", tour(RIGHT, UP, LEFT), "tour_left_up_right"),
    "tour_left_up_right": MotionClass("tour", tour(LEFT, UP, RIGHT), "tour_right_up_left"),
    "tour_right_left_up": MotionClass("tour", tour(RIGHT, LEFT, UP), "tour_up_left_right"),
    "tour_up_left_right": MotionClass("tour", tour(UP, LEFT, RIGHT), "tour_right_left_up"),
    "tour_up_right_left": MotionClass("tour", tour(UP, RIGHT, LEFT), "tour_left_right_up"),
    "tour_left_right_up": MotionClass("tour", tour(LEFT, RIGHT, UP), "tour_up_right_left"),
    "grow": MotionClass("zoom", zoom(-0.6, 0.6), "shrink"),
    "shrink": MotionClass("zoom", zoom(0.6, -0.6), "grow"),
    "spin_cw": MotionClass("spin", spin(1.0), "spin_ccw"),
    "spin_ccw": MotionClass("spin", spin(-1.0), "spin_cw"),
    "square_cw": MotionClass(
        "square", along(_BOTTOM_LEFT, _TOP_LEFT, _TOP_RIGHT, _BOTTOM_RIGHT, _BOTTOM_LEFT), "square_ccw"
    ),
    "square_ccw": MotionClass(
        "square", along(_BOTTOM_LEFT, _BOTTOM_RIGHT, _TOP_RIGHT, _TOP_LEFT, _BOTTOM_LEFT), "square_cw"
    ),
    "circle_cw_from_top": MotionClass("circle", circle(1.0, UP), "circle_ccw_from_top"),
    "circle_ccw_from_top": MotionClass("circle", circle(-1.0, UP), "circle_cw_from_top"),
    "circle_cw_from_bottom": MotionClass("circle", circle(1.0, DOWN), "circle_ccw_from_bottom"),
    "circle_ccw_from_bottom": MotionClass("circle", circle(-1.0, DOWN), "circle_cw_from_bottom"),
    "wavy_right": MotionClass("wavy", wavy(*RIGHT), "wavy_left"),
    "wavy_left": MotionClass("wavy", wavy(*LEFT), "wavy_right"),
    "wavy_up": MotionClass("wavy", wavy(*UP), "wavy_down"),
    "wavy_down": MotionClass("wavy", wavy(*DOWN), "wavy_up"),
}
