"""Plan the motion of clips: which stored fields are read, and what displacement each stands for.

A video of m fields is cut into T segments with edges i * m / T, which are real numbers.  The map of
a segment is its displacement: the mean of its fields times its length.  So it does not depend on
the rate at which a video was stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.draw import Draw
from pipelines.reads import ReadLists
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, ShardError
from shards_spec.pictures import FLOW_CODES, series_kind
from shards_spec.schema import adding_command

Ints = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]

STREAMS = ("frames", "motion", "both")  # what is read of a video
CAMERAS = ("median", "none")
CHANNELS = {"flow": 2, "diff": 3}  # of a field: u and v, or the change of each colour
DIFFERENCE_STEP = 2.0  # grey levels that a code of a stored difference stands for


class Cut(NamedTuple):
    """The part of a stored frame that a clip shows.

    Attributes:
        box: Top, left, height and width, as shares of the frame; before the flip.
        flip: The clip is mirrored.
        reverse: The clip runs backwards.
    """

    box: tuple[float, float, float, float]
    flip: bool = False
    reverse: bool = False


class MotionView(NamedTuple):
    """The motion of one clip, made of fields that a plan reads.

    Attributes:
        reads: Number of the plan's motion reads.
        indices: [n] places of the fields among these.
        weights: [T, n]; codes less 128, times these, summed over n, are the displacement of each
            segment in pixels of the stored field (of a difference: in grey levels).
        cut: What the clip shows.
    """

    reads: int
    indices: tuple[int, ...]
    weights: Weights
    cut: Cut


@lru_cache(maxsize=4096)
def spread_fields(members: int, segments: int, fields: int) -> tuple[Ints, Weights]:
    """Choose fields in the middle of equal parts of each segment, or all fields.

    Args:
        members: Fields of the video.
        segments: Number of segments, T.
        fields: Fields of each segment; 0: all, each weighted by its overlap with the segment.

    Returns:
        Positions [n], ascending, and weights [T, n], which sum to the length of each segment.
    """
    if not fields:
        return _all_fields(members, segments)
    return _weighted(members, segments, np.full((segments, fields), 0.5))


def draw_fields(draw: Draw, members: int, segments: int, fields: int) -> tuple[Ints, Weights]:
    """Draw a field in each of equal parts of each segment; otherwise do as `spread_fields`."""
    if not fields:
        return spread_fields(members, segments, fields)
    shifts = [draw.random() for _ in range(segments * fields)]
    return _weighted(members, segments, np.array(shifts).reshape(segments, fields))


def _weighted(members: int, segments: int, shifts: npt.NDArray[np.float64]) -> tuple[Ints, Weights]:
    """Choose fields at shifts [T, k] within their parts, each in [0, 1)."""
    fields = shifts.shape[1]
    if not members:
        return np.zeros(0, np.int64), np.zeros((segments, 0), np.float32)
    length = members / segments
    starts = np.arange(segments)[:, None] * length + (np.arange(fields) + shifts) * (length / fields)  # [T, k]
    chosen = np.minimum(np.floor(starts).astype(np.int64), members - 1)
    positions, places = np.unique(chosen, return_inverse=True)
    weights = np.zeros((segments, len(positions)), np.float32)
    np.add.at(weights, (np.repeat(np.arange(segments), fields), places.ravel()), length / fields)
    return positions, weights


def _all_fields(members: int, segments: int) -> tuple[Ints, Weights]:
    edges = np.arange(segments + 1) * (members / segments)
    first = np.arange(members)
    overlap = np.minimum(first + 1, edges[1:, None]) - np.maximum(first, edges[:-1, None])  # [T, m]
    return first, np.maximum(overlap, 0).astype(np.float32)


class MotionFields:
    """Plans the motion of a shard set's videos, from one of its series of fields.

    Args:
        shards: The opened shard set.
        name: Name of the series, such as flow1.
        segments: Segments of a video, T.
        fields: Fields read of each segment; 0: all of the video's.

    Raises:
        ConfigError: this is no name of a motion series.
        ShardError: the shards lack it; the command that adds it is named.
    """

    def __init__(self, shards: ShardSet, name: str, *, segments: int, fields: int) -> None:
        check_series_name(name)
        if name not in shards.series_names:
            raise ShardError(
                f'{shards.path} holds no series "{name}", which motion is read from; add it with '
                f"{adding_command(name, shards.path)}, or read frames alone (streams = frames)"
            )
        self.name, self.segments, self.fields = name, segments, fields
        self._series = shards.series(name)
        self._first = self._series.columns["first"]
        kind, displacement = series_kind(name)
        grid = re.search(r"g(\d+)$", name)
        # A field is the motion of `displacement` frames, and the next one begins a grid later.
        self._unit = (int(grid[1]) if grid else 1) / displacement
        self._unit *= 1 / FLOW_CODES if kind == "flow" else DIFFERENCE_STEP
        self._scaled = kind == "flow"

    def members(self, rows: Ints) -> Ints:
        """Count the fields [n] of videos."""
        counts: Ints = (self._first[rows + 1] - self._first[rows]).astype(np.int64)
        return counts

    def views(
        self, rows: Ints, cuts: Iterable[Cut], lists: ReadLists, *, draw: Draw | None = None
    ) -> tuple[MotionView, ...]:
        """Plan the motion of each video and add its fields to `lists`; `draw` draws them."""
        counts, sizes = self.members(rows).tolist(), self._series.sizes[rows].tolist()
        videos = zip(rows.tolist(), counts, sizes, cuts, strict=True)
        return tuple([self._view(row, count, (size[0], size[1]), cut, lists, draw) for row, count, size, cut in videos])

    def _view(
        self, row: int, members: int, size: tuple[int, int], cut: Cut, lists: ReadLists, draw: Draw | None
    ) -> MotionView:
        chosen = (members, self.segments, self.fields)
        positions, weights = spread_fields(*chosen) if draw is None else draw_fields(draw, *chosen)
        number, reads = lists.of_size(size)
        factors = self._unit * self._series.scale(row)[positions] if self._scaled else np.float32(self._unit)
        weights = weights * factors
        if cut.reverse:
            weights = -weights[::-1]
        return MotionView(number, reads.add(row, positions.tolist(), 0, 0), weights.astype(np.float32), cut)


def check_series_name(name: str) -> None:
    """Refuse a name that is none of a motion series: ConfigError."""
    if not re.fullmatch(r"(diff|flow)[1-9]\d*(g[1-9]\d*)?", name):
        raise ConfigError(f'motion_series = "{name}" names no motion; give one such as flow1, flow8g2 or diff1')


def motion_channels(name: str) -> int:
    """Count the channels of a motion series: 2 of flow, u and v, or 3 of colour differences."""
    check_series_name(name)
    return CHANNELS[series_kind(name)[0]]
