"""Draw the clips of pictures and of optical flow that MSCL compares, picked by a motion filter.

Frames count in positions: the places of a video's flow fields in their order. Source: Ni et al.,
ECCV 2022 (arXiv 2208.06105), and its code (megvii-research/MSCL). The rule "released" does as that
code does, "fixed" as it means to do.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.clips.stream import Box, Crop, Flags, Ints, draw_crop
from pipelines.clips.windows import AREA, check_positive
from pipelines.draw import Draw
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, ShardError, choice
from shards_spec.schema import adding_command
from shards_spec.series import Series

Floats = npt.NDArray[np.float32]
Rule = Literal["fixed", "released"]

RULES = ("fixed", "released")
SCORE_COLUMN = "motion_score"  # the column of the index that holds the motion-differential score of each field
_TRIES = 11  # draws of the first clip in the released code


def clip_scores(scores: npt.ArrayLike, *, stride: int, length: int) -> npt.NDArray[np.float64]:
    """Return the score [N] of the clip at each position: the mean of its `length` fields.

    Fields beyond the end count as 0, so clips that leave the video score low.
    """
    each = np.asarray(scores, np.float64)
    padded = np.concatenate([each, np.zeros((length - 1) * stride)])
    shifted = [padded[j * stride : j * stride + len(each)] for j in range(length)]
    total: npt.NDArray[np.float64] = np.sum(shifted, axis=0)
    return total / length


def chosen_offsets(scores: npt.ArrayLike, *, stride: int, length: int, rule: Rule = "fixed") -> npt.NDArray[np.int64]:
    """Return the positions [M], ascending, whose clips score more than the median clip.

    The scores [N] are those of the single fields.

    "fixed" looks only at clips within the video, so `stride` must be that of the clips drawn later;
    "released" looks at all N starts. M is at most half of the starts looked at, and 0 where all are
    alike.
    """
    choice("rule", rule, RULES)
    clips = clip_scores(scores, stride=stride, length=length)
    if rule == "fixed":
        clips = clips[: starts(len(clips), stride=stride, length=length)]
    return np.flatnonzero(clips > np.median(clips)) if len(clips) else np.zeros(0, np.int64)


def starts(positions: int, *, stride: int, length: int) -> int:
    """Count the starts whose clip lies within the video; 1 where it is too short, a looped clip."""
    return max(positions - stride * length + 1, 1)


def draw_clips(
    draw: Draw, chosen: Sequence[int], positions: int, *, stride: int, length: int, rule: Rule = "fixed"
) -> tuple[int, int]:
    """Draw the starts of two clips, the second up to a clip's span before or after the first.

    "fixed": the first is uniform among `chosen`, the second the chosen one nearest to its target;
    where none is chosen, they are any start and the target itself. "released": up to 11 starts are
    drawn until a chosen one comes, then the first chosen is taken, or 0 where none is; the second
    is as `released_second` says. `chosen` is ascending.
    """
    choice("rule", rule, RULES)
    last = starts(positions, stride=stride, length=length) - 1
    span = stride * length
    if rule == "released":
        first = _released_first(draw, chosen, last)
        return first, released_second(chosen, first + draw.randint(-span, span))
    if not len(chosen):
        first = draw.randint(0, last)
        return first, min(max(first + draw.randint(-span, span), 0), last)
    first = int(chosen[draw.randint(0, len(chosen) - 1)])
    return first, nearest(chosen, first + draw.randint(-span, span))


def draw_clip(draw: Draw, chosen: Sequence[int], positions: int, *, stride: int, length: int) -> int:
    """Draw the start of a single clip, as validation takes it.

    It is uniform among `chosen`, or any start where none is chosen.
    """
    if len(chosen):
        return int(chosen[draw.randint(0, len(chosen) - 1)])
    return draw.randint(0, starts(positions, stride=stride, length=length) - 1)


def clip_positions(start: int, positions: int, *, stride: int, length: int) -> list[int]:
    """Return the positions [length] of a clip.

    One that is longer than the video goes on at its beginning.
    """
    return [(start + stride * step) % positions for step in range(length)]


def nearest(chosen: Sequence[int], target: int) -> int:
    """Return the member of `chosen` nearest to the target, the earlier of two as near.

    `chosen` is ascending and not empty.
    """
    place = bisect_left(chosen, target)
    around = chosen[max(place - 1, 0) : place + 1]
    return int(min(around, key=lambda start: abs(start - target)))


def released_second(chosen: Sequence[int], target: int) -> int:
    """Return the second start of the released code, which compares each with the last one taken.

    A target of 0 or less gives 0, chosen or not. Another mostly gives the next chosen one after it,
    not the nearest.
    """
    second = 0
    for start in chosen:
        if abs(start - target) < abs(start - second):
            second = int(start)
    return second


def _released_first(draw: Draw, chosen: Sequence[int], last: int) -> int:
    members = set(chosen)
    for _ in range(_TRIES):
        first = draw.randint(0, last)
        if first in members:
            return first
    return int(chosen[0]) if len(chosen) else 0


def flow_box(
    box: tuple[int, int, int, int], frame: tuple[int, int], field: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return a box of a `frame` of (height, width) in flow fields of the size `field`.

    A box is (top, left, height, width).

    Each edge is scaled along its own axis and rounded half to even; the vectors within stay in
    pixels of the stored field. Source: MSCL's code (megvii-research/MSCL).
    """
    top, left, height, width = box
    down, across = field[0] / frame[0], field[1] / frame[1]
    first_row, first_column = round(top * down), round(left * across)
    end_row, end_column = round((top + height) * down), round((left + width) * across)
    return first_row, first_column, end_row - first_row, end_column - first_column


@dataclass(frozen=True, kw_only=True)
class FlowPairRules:
    """Rules of MSCL's clips: two of a video that move enough, with the flow at the same positions.

    Positions are a video's flow fields in their order, each with the frame that it starts from.
    Query and key have a box and flip of their own each; their flow is cut by the same boxes.

    Attributes:
        frames: Frames of a clip, T.
        stride: Distance of these, in positions.
        crop: Side of the crops in pixels, of pictures and of flow.
        flow_series: Name of the series of flow fields; the published code has pairs 8 frames apart,
            from every second frame.
        motion_filter: Take only clips that score more than the video's median clip.
        filter_stride: Stride of the clips that are scored, in positions; 0: that of `stride`, as it
            should be. The published samples have 4.
        motion_rule: "fixed" or "released", see `pipelines.clips.flow`.
        short: Videos shorter than a clip: "loop", go on at their beginning, as in the published
            code; or "skip".
        flow_fields: "all" T of a clip, or the "even" ones, which are all that MSCL's flow encoder
            looks at.
        flow_crops: "own": each clip's flow in its own box. "both": the flow of query and key in the
            query's box, then of both in the key's, which the released order of flow clips reads.
        area: Range of the share of the frame that a crop covers.
        flip: Mirror half of the crops; off where left and right mean something.
    """

    frames: int = 8
    stride: int = 8
    crop: int = 112
    flow_series: str = "flow8g2"
    motion_filter: bool = True
    filter_stride: int = 0
    motion_rule: Rule = "fixed"
    short: Literal["loop", "skip"] = "loop"
    flow_fields: Literal["all", "even"] = "all"
    flow_crops: Literal["own", "both"] = "own"
    area: tuple[float, float] = AREA
    flip: bool = True

    def __post_init__(self) -> None:
        """ConfigError for values that mean nothing."""
        check_positive(frames=self.frames, stride=self.stride, crop=self.crop, filter_stride=self._filter_stride)
        for name, known in (
            ("motion_rule", RULES),
            ("short", ("loop", "skip")),
            ("flow_fields", ("all", "even")),
            ("flow_crops", ("own", "both")),
        ):
            choice(name, getattr(self, name), known)
        if not re.fullmatch(r"flow\d+(g\d+)?", self.flow_series):
            raise ConfigError(f'flow_series="{self.flow_series}" names no flow; give one such as flow8g2 or flow1')

    @property
    def _filter_stride(self) -> int:
        return self.filter_stride or self.stride

    def usable(self, shards: ShardSet, rows: Ints) -> Flags:
        """Tell which videos [n] have flow, and a whole clip of it where short ones are skipped.

        Raises:
            ShardError: the shards hold no such flow or, with the filter, no scores of it.
        """
        check_motion(shards, self.flow_series, scores=self.motion_filter)
        first = shards.series(self.flow_series).columns["first"]
        positions = first[rows + 1] - first[rows]  # [n]
        least = self.stride * self.frames if self.short == "skip" else 1
        long_enough: Flags = positions >= least
        return long_enough

    def draw(self, draw: Draw, shards: ShardSet, row: int) -> tuple[list[Crop], list[Crop]]:
        """Draw query and key of a video as pictures, and their flow."""
        series = shards.series(self.flow_series)
        grid = series.kept(row)  # [N] the frame of each position
        size: tuple[int, int] = tuple(shards.series("rgb").sizes[row].tolist())
        clips = [
            clip_positions(start, len(grid), stride=self.stride, length=self.frames)
            for start in self.clip_starts(draw, series, row)
        ]
        views = [draw_crop(draw, grid[clip].tolist(), size, area=self.area, flip=self.flip) for clip in clips]
        stacked, width = series.sizes[row].tolist()  # u above v
        flow: list[Crop] = []
        for own, view in enumerate(views):
            box = Box(*flow_box(view.box, size, (stacked // 2, width)))
            wanted = clips if self.flow_crops == "both" else [clips[own]]
            flow += [Crop(clip[:: 2 if self.flow_fields == "even" else 1], box, view.flip) for clip in wanted]
        return views, flow

    def clip_starts(self, draw: Draw, series: Series, row: int) -> tuple[int, int]:
        """Draw the positions at which query and key start."""
        positions = len(series.kept(row))
        chosen: list[int] = []
        if self.motion_filter:
            offsets = chosen_offsets(
                series.scores(row), stride=self._filter_stride, length=self.frames, rule=self.motion_rule
            )
            chosen = offsets.tolist()
            if self.motion_rule == "fixed":  # scores of another stride know nothing of this clip's end
                last = starts(positions, stride=self.stride, length=self.frames)
                chosen = [offset for offset in chosen if offset < last]
        rule: Rule = self.motion_rule if self.motion_filter else "fixed"
        return draw_clips(draw, chosen, positions, stride=self.stride, length=self.frames, rule=rule)


def check_motion(shards: ShardSet, series: str, *, scores: bool) -> None:
    """Check that the shards hold this series of flow and, if asked, its scores.

    Raises:
        ShardError: they do not; the command that makes them is named.
    """
    if series not in shards.series_names:
        raise ShardError(f'{shards.path} holds no flow "{series}"; add it with {adding_command(series, shards.path)}')
    if scores and SCORE_COLUMN not in shards.columns(series):
        raise ShardError(
            f'{shards.path} holds no motion scores of its flow "{series}"; use motion_filter = false, or '
            f"add them with {adding_command('flow8g2', shards.path)}"
        )
