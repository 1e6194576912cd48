"""Plan how videos are seen: frames, flip, crop and jitter of each clip, and its motion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.draw import Draw, Jitter, draw_jitter
from pipelines.episodes.motion import Cut, MotionFields, MotionView
from pipelines.episodes.rules import EpisodeRules
from pipelines.reads import ReadList, ReadLists, Reads
from pipelines.sampling import RULES_WITH_FPS, centre_frames, segment
from shards_spec import ShardSet

Ints = npt.NDArray[np.int64]


class View(NamedTuple):
    """One clip: frames `indices` [T] of the plan's reads number `reads`, flip, crop and jitter.

    `box` is the crop's (top, left) after flip and resize; None where the window that is read is the
    crop already.
    """

    reads: int
    indices: tuple[int, ...]
    flip: bool
    box: tuple[int, int] | None
    jitter: Jitter | None


@dataclass(frozen=True)
class Clips:
    """Pixels that are read, and the clips made of them.

    Attributes:
        reads: Windows of frames.
        views: V clips of frames; none where only motion is read.
        motion_reads: Stored fields.
        motion: The motion of V clips; none where only frames are read.
    """

    reads: tuple[Reads, ...]
    views: tuple[View, ...]
    motion_reads: tuple[Reads, ...]
    motion: tuple[MotionView, ...]


@dataclass
class ClipList:
    """Collects clips video after video."""

    series: str  # of motion
    frames: ReadLists = field(default_factory=ReadLists)
    fields: ReadLists = field(default_factory=ReadLists)
    views: list[View] = field(default_factory=list)
    motion: list[MotionView] = field(default_factory=list)

    def clips(self) -> Clips:
        """Return all that was collected."""
        reads, motion_reads = self.frames.reads("rgb"), self.fields.reads(self.series)
        return Clips(reads, tuple(self.views), motion_reads, tuple(self.motion))


class _Shown(NamedTuple):
    """What is drawn of one clip: frames, flip, (top, left) of the crop after it, jitter, reversal."""

    frames: list[int]
    flip: bool
    corner: tuple[int, int]
    jitter: Jitter | None
    reverse: bool


class ClipPlanner:
    """Plans the clips of videos by the rules of episodes.

    Args:
        shards: The opened shard set.
        rules: Rules by which clips are drawn.
        rows: [n] the videos that may come, which decide whether all are planned alike.

    Attributes:
        short_videos: Number of videos of fewer frames than are chosen; some of their frames are
            repeated.
        still_videos: Number of videos without a field of the motion series; they do not move.

    Raises:
        ShardError: the shards lack the motion series.
    """

    def __init__(self, shards: ShardSet, rules: EpisodeRules, rows: Ints) -> None:
        self.rules = rules
        self._sizes = shards.series("rgb").sizes  # [V, 2]
        self._frames = shards.frames  # [V]
        self._fps = shards.fps if rules.frame_rule in RULES_WITH_FPS else None  # [V]
        self._rule = rules.chooser()
        self._fields: MotionFields | None = None
        if rules.reads_motion:
            self._fields = MotionFields(shards, rules.motion_series, segments=rules.frames, fields=rules.fields)
        self.short_videos = int((self._frames[rows] < rules.least_frames).sum())
        self.still_videos = int((self._fields.members(rows) == 0).sum()) if self._fields else 0
        # Most evaluations draw nothing about frames and crops: all clips are then planned at once,
        # in NumPy.
        whole = bool((self._sizes[rows] == rules.resized).all())
        self._fixed = self._rule is segment and not rules.random_views and whole and not self.short_videos

    def add(
        self, clips: ClipList, rows: Ints, draw: Draw, motion_draw: Draw, *, query: bool, flip: bool = False
    ) -> None:
        """Draw a clip of each video and add it to `clips`.

        Fields have draws of their own: frames and crops are the same with and without motion.

        Args:
            clips: Where they are added.
            rows: [n] catalogue rows.
            draw: Draws frames, flips, crops and colours.
            motion_draw: Draws fields.
            query: The videos are queries, which rules may flip, jitter or reverse.
            flip: Mirror all of them.
        """
        if not len(rows):
            return
        if self._fixed:
            shown: Sequence[_Shown] = ()
            if self.rules.reads_frames:
                clips.views += self._fixed_views(rows, clips.frames)
        else:
            shown = self._draw(draw, rows, query=query, flip=flip)
            if self.rules.reads_frames:
                clips.views += self._views(rows, shown, clips.frames)
        if self._fields is not None:
            cuts = [self._cut(one) for one in shown] or [self._centre()] * len(rows)
            draws = motion_draw if self.rules.random_frames else None
            clips.motion += self._fields.views(rows, cuts, clips.fields, draw=draws)

    def _draw(self, draw: Draw, rows: Ints, *, query: bool, flip: bool) -> list[_Shown]:
        """Draw what each clip shows: frames, flip, crop x, crop y, jitter, reversal, in this order."""
        rules, rule, shown = self.rules, self._rule, []
        steps, random_frames = rules.frames, rules.random_frames
        down, right = self._room()
        centre = (down // 2, right // 2)
        rates = [0.0] * len(rows) if self._fps is None else self._fps[rows].tolist()
        for length, fps in zip(self._frames[rows].tolist(), rates, strict=True):
            frames = rule(draw, length, steps=steps, random_frames=random_frames, fps=fps)
            mirrored = flip or (query and rules.query_flip and draw.random() < 0.5)
            corner = crop_corner(draw, down, right) if rules.random_crop else centre
            jitter = draw_jitter(draw) if query and rules.query_jitter else None
            reverse = query and rules.query_reversal and draw.random() < 0.5
            shown.append(_Shown(frames[::-1] if reverse else frames, mirrored, corner, jitter, reverse))
        return shown

    def _room(self) -> tuple[int, int]:
        """Return the room of a crop below it and to its right, in pixels."""
        height, width = self.rules.resized
        return height - self.rules.crop, width - self.rules.crop

    def _views(self, rows: Ints, shown: Sequence[_Shown], reads: ReadLists) -> list[View]:
        """Plan the frames of each clip, and add its windows to `reads`."""
        views, whole, side, size = [], self.rules.resized, self.rules.crop, None
        number, windows = 0, ReadList()
        for row, stored, (frames, flip, (top, left), jitter, _) in zip(
            rows.tolist(), self._sizes[rows].tolist(), shown, strict=True
        ):
            height, width = stored
            exact = (height, width) == whole
            if size != (read := (side, side) if exact else (height, width)):  # mostly that of the clip before
                number, windows = reads.of_size(size := read)
            if exact:
                # the crop box lies on the flipped frame, the window on the stored one
                start = width - side - left if flip else left
                views.append(View(number, windows.add(row, frames, top, start), flip, None, jitter))
            else:
                views.append(View(number, windows.add(row, frames, 0, 0), flip, (top, left), jitter))
        return views

    def _fixed_views(self, rows: Ints, reads: ReadLists) -> list[View]:
        """Do as `_views`, for all clips at once: nothing is drawn, no video is short or resized."""
        number, windows = reads.of_size((self.rules.crop, self.rules.crop))
        frames = centre_frames(self._frames[rows], self.rules.frames)
        top, left = (room // 2 for room in self._room())
        places = windows.add_clips(rows, frames, top, left)
        return [View(number, indices, False, None, None) for indices in places]

    def _cut(self, shown: _Shown) -> Cut:
        """Say which part of the stored frame a clip shows, before the flip."""
        (height, width), crop = self.rules.resized, self.rules.crop
        top, left = shown.corner
        left = width - crop - left if shown.flip else left
        return Cut((top / height, left / width, crop / height, crop / width), shown.flip, shown.reverse)

    def _centre(self) -> Cut:
        top, left = (room // 2 for room in self._room())
        return self._cut(_Shown([], False, (top, left), None, False))


def crop_corner(draw: Draw, down: int, right: int) -> tuple[int, int]:
    """Draw top and left of a crop that has this room below it and to its right.

    The left one is drawn first.
    """
    left = int(draw.uniform(0, right))
    return int(draw.uniform(0, down)), left
