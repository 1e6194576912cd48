"""Which clips of pictures and of optical flow MSCL compares (Ni et al., ECCV 2022, arXiv 2208.06105)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.clips.boxes import Box
from pipelines.clips.flow_box import flow_box
from pipelines.clips.motion_filter import RULES, Rule, chosen_offsets, clip_positions, draw_clips, starts
from pipelines.clips.stream import Crop, Flags, Ints
from pipelines.clips.windows import AREA, check_positive, draw_crop
from pipelines.draw import Draw
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, ShardError, choice
from shards_spec.motion import adding_command
from shards_spec.series import Series

Floats = npt.NDArray[np.float32]

SCORES = "motion_score"  # the column of the index that holds the motion-differential score of each field


@dataclass(frozen=True, kw_only=True)
class FlowPairViews:
    """Two clips of a video that move enough, of pictures and of the flow fields at the same positions.

    Positions are a video's flow fields in their order, each with the frame that it starts from.  Views of a video:
    query and key, each with a box and flip of its own; its flow is cut by the same boxes.

    Attributes:
        frames: Of a clip, T.
        stride: Between them, in positions.
        crop: Side of the crops in pixels, of pictures and of flow.
        flow_series: Name of the series of flow fields; the published code has pairs 8 frames apart, from every second
            frame.
        motion_filter: Only clips that score more than the video's median clip.
        filter_stride: Of the clips that are scored, in positions; 0: that of `stride`, as it should be. The published
            samples have 4.
        motion_rule: "fixed" or "released", see `pipelines.clips.motion_filter`.
        short: Of videos shorter than a clip: "loop", go on at their beginning, as in the published code; "skip".
        flow_fields: "all" T of a clip, or the "even" ones alone, which are all that MSCL's flow encoder looks at.
        flow_crops: "own", each clip's flow in its own view's box; "both", the flow of query and key in the query's
            box, then of both in the key's: what the released order of flow clips needs.
        area: Share of the frame that a crop covers.
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
        """[n] which videos have flow, and a whole clip of it where short ones are skipped.

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
        """Query and key of a video as pictures, and their flow."""
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
        """Positions at which query and key start."""
        positions = len(series.kept(row))
        chosen: list[int] = []
        if self.motion_filter:
            offsets = chosen_offsets(
                motion_scores(series, row), stride=self._filter_stride, length=self.frames, rule=self.motion_rule
            )
            chosen = offsets.tolist()
            if self.motion_rule == "fixed":  # scores of another stride know nothing of this clip's end
                last = starts(positions, stride=self.stride, length=self.frames)
                chosen = [offset for offset in chosen if offset < last]
        rule: Rule = self.motion_rule if self.motion_filter else "fixed"
        return draw_clips(draw, chosen, positions, stride=self.stride, length=self.frames, rule=rule)


def motion_scores(series: Series, row: int) -> Floats:
    """[N] scores of a video's fields."""
    first = series.columns["first"]
    scores: Floats = series.columns[SCORES][first[row] : first[row + 1]]
    return scores


def check_motion(shards: ShardSet, series: str, *, scores: bool) -> None:
    """ShardError, with the command that makes it, unless the shards hold this series of flow and its scores."""
    if series not in shards.series_names:
        raise ShardError(f'{shards.path} holds no flow "{series}"; add it with {adding_command(series, shards.path)}')
    if scores and SCORES not in shards.columns(series):
        raise ShardError(
            f'{shards.path} holds no motion scores of its flow "{series}"; use motion_filter = false, or '
            f"add them with {adding_command('flow8g2', shards.path)}"
        )
