"""Choose frames of a video and videos of a class, and check what shards hold for it.

The choices are pure functions of a `Draw`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.draw import Draw
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, ShardError, suggest

Ints = npt.NDArray[np.int64]

_SHORTEST_WINDOW = 64  # source frames; the reference's Kinetics window can run backwards below it
_KINETICS_RATE = 35.0  # DATA.SAMPLING_RATE of the reference's Kinetics recipe, in source frames
_KINETICS_FPS = 12.0  # its TARGET_FPS
LOOKED_AT = 100  # videos: a plan that leaves frames out leaves them out of every video


class FrameRule(Protocol):
    """Chooses `steps` frames, in order, among a video's `num_frames` >= 1."""

    def __call__(self, draw: Draw, num_frames: int, *, steps: int, random_frames: bool, fps: float = 0.0) -> list[int]:
        """Return frame numbers [steps], each in [0, num_frames)."""


def _repeated(num_frames: int, steps: int) -> list[int]:
    """All frames of a short video in order, each repeated about equally often."""
    return [step * num_frames // steps for step in range(steps)]


def _centres(num_frames: int, steps: int) -> list[int]:
    if num_frames < steps:
        return _repeated(num_frames, steps)
    length = num_frames // steps
    return list(range(length // 2, steps * length, length))


def centre_frames(lengths: npt.NDArray[np.integer[Any]], steps: int) -> Ints:
    """Return the centres [V, steps] of the segments: `segment` chooses them where it draws nothing.

    Args:
        lengths: [V] numbers of frames, each at least `steps`.
        steps: Segments of a video.
    """
    segments = lengths[:, None] // steps  # [V, 1]
    return segments // 2 + segments * np.arange(steps)


def segment(draw: Draw, num_frames: int, *, steps: int, random_frames: bool, fps: float = 0.0) -> list[int]:
    """Choose one frame in each of `steps` equal segments: a random one, or the centre.

    Segments hold num_frames // steps frames, so the last num_frames % steps are never used, as in
    the reference code (alibaba-mmai-research/MoLo). There are two departures. The reference has no
    centre rule: it tests on random frames. It fails on a video of fewer frames than steps, whose
    frames are repeated here in order.
    """
    del fps
    length = num_frames // steps
    if not random_frames or length < 1:
        return _centres(num_frames, steps)
    return [draw.randint(first, first + length - 1) for first in range(0, steps * length, length)]


def kinetics(draw: Draw, num_frames: int, *, steps: int, random_frames: bool, fps: float = 0.0) -> list[int]:
    """Choose frames evenly spread over one window, as the reference code does for Kinetics.

    The window starts at a random frame, or in the middle of what remains. Departure: the reference
    takes 35 frames off the window's end. On videos under 64 frames, or with a window of at most 35,
    its frame numbers run backwards; there the centres of the segments are taken, as in `segment`.
    """
    window = _kinetics_window(num_frames, steps, fps)
    if num_frames < _SHORTEST_WINDOW or window <= _KINETICS_RATE:
        return _centres(num_frames, steps)
    last_start = max(num_frames - window + 1, 0.0)
    start = draw.uniform(0.0, last_start) if random_frames else last_start / 2
    return _truncated_linspace(start, start + window - _KINETICS_RATE, steps, last=num_frames - 1)


def kinetics_whole(draw: Draw, num_frames: int, *, steps: int, random_frames: bool, fps: float = 0.0) -> list[int]:
    """Choose frames evenly spread over the whole of the same window, its last frame included.

    This is `kinetics` without its fault: nothing is taken off the window's end, so no video is too
    short.
    """
    if num_frames < steps:
        return _repeated(num_frames, steps)
    window = max(_kinetics_window(num_frames, steps, fps), float(steps))
    start = draw.uniform(0.0, num_frames - window) if random_frames else (num_frames - window) / 2
    return _truncated_linspace(start, start + window - 1, steps, last=num_frames - 1)


def _kinetics_window(num_frames: int, steps: int, fps: float) -> float:
    window = steps * _KINETICS_RATE * fps / _KINETICS_FPS
    return float(steps * (num_frames // steps)) if window > num_frames else window


def _truncated_linspace(start: float, end: float, steps: int, *, last: int) -> list[int]:
    # float32 and from both ends, as torch.linspace computes it: truncation would show any
    # difference
    low, high = np.float32(start), np.float32(end)
    stride = (high - low) / np.float32(max(steps - 1, 1))
    half = max(steps // 2, 1)
    points = [low + stride * np.float32(i) for i in range(half)]
    points += [high - stride * np.float32(steps - 1 - i) for i in range(half, steps)]
    return [int(min(max(float(point), 0.0), float(last))) for point in points]


def still(draw: Draw, num_frames: int, *, steps: int, random_frames: bool, fps: float = 0.0) -> list[int]:
    """Repeat the centre frame: the control that shows what a method knows without any motion."""
    del draw, random_frames, fps
    return [num_frames // 2] * steps


def segment_clips(
    draw: Draw,
    num_frames: int,
    *,
    steps: int,
    random_frames: bool,
    fps: float = 0.0,
    clip: int = 1,
    stride: int = 1,
) -> list[int]:
    """Choose a short clip in each of `steps` segments: frames [steps * clip], clip after clip.

    A clip is `clip` frames at a distance of `stride`. Its place in its segment is drawn, or is the
    middle. A clip that is longer than its segment covers it whole, as far as the video reaches.
    Past the end of a video shorter than a clip, the last frame is repeated: a loop would show a
    motion that never was.
    """
    del fps
    span = (clip - 1) * stride + 1
    chosen = []
    for step in range(steps):
        first, after = step * num_frames // steps, (step + 1) * num_frames // steps
        low, high = sorted((first, max(after, first + 1) - span))
        start = draw.randint(low, high) if random_frames else (low + high) // 2
        start = max(min(start, num_frames - span), 0)
        chosen += [min(start + place * stride, num_frames - 1) for place in range(clip)]
    return chosen


FRAME_RULES: Mapping[str, FrameRule] = {
    "segment": segment,
    "segment_clips": segment_clips,
    "kinetics": kinetics,
    "kinetics-whole": kinetics_whole,
    "still": still,
}
RULES_WITH_FPS = frozenset({"kinetics", "kinetics-whole"})  # they read the frame rate of every video
RULES_OF_CLIPS = frozenset({"segment_clips"})  # they want every frame of the source stored: a stride counts them


def frame_rule(name: str, *, clip: int = 0, stride: int = 1) -> FrameRule:
    """Return the frame rule of that name.

    Args:
        name: A key of `FRAME_RULES`.
        clip: Frames of a clip, for a rule of clips; 0 for any other.
        stride: Distance of a clip's frames.

    Raises:
        ConfigError: there is no such rule (the nearest name is told), or rule and clip do not go
            together.
    """
    if name not in FRAME_RULES:
        raise ConfigError(f'there is no frame rule "{name}": {suggest(name, FRAME_RULES)}')
    if name not in RULES_OF_CLIPS:
        if clip:
            raise ConfigError(f'frame rule "{name}" takes no clips of {clip} frames: use frame rule "segment_clips"')
        return FRAME_RULES[name]
    if clip < 1 or stride < 1:
        raise ConfigError(
            f'frame rule "{name}" with clip_frames {clip} and clip_stride {stride}: give at least 1 of both'
        )
    return partial(segment_clips, clip=clip, stride=stride)


def distinct(draw: Draw, population: int) -> Iterator[int]:
    """Yield all of range(population) in a random order.

    The cost is that of the numbers taken, not of all.
    """
    # A Fisher-Yates shuffle of an array that is never made: `moved` holds the places that differ
    # from the identity. Place i is final once it is yielded, so only the number that moved to j is
    # kept.
    moved: dict[int, int] = {}
    last, randint, at = population - 1, draw.randint, moved.get
    for i in range(population):
        j = randint(i, last)
        yield at(j, j)
        moved[j] = at(i, i)


def group_keys(videos: int, groups: npt.NDArray[np.int32] | None) -> Ints:
    """Return a number [n] for each video, equal within a group.

    Args:
        videos: n.
        groups: [n] as in the index, -1 where a video's group is unknown; None: all are unknown.
    """
    single = -1 - np.arange(videos, dtype=np.int64)  # [n] negative, so unlike any number of a group
    return single if groups is None else np.where(groups < 0, single, groups)


@dataclass(frozen=True)
class ClassPool:
    """The videos of one class, and the groups that support and queries may not share.

    A video without a known group is a group of its own.

    Attributes:
        label: Number of the class.
        rows: [n] catalogue rows, ascending.
        groups: [n] in [0, G).
        sizes: [G] videos of each group.
        biggest: The largest of these.
        spare: [m] rows that serve as unlabelled videos: the same rows, or those that are not
            labelled.
        spare_groups: [m] their groups.
    """

    label: int
    rows: Ints
    groups: Ints
    sizes: Ints
    biggest: int
    spare: Ints
    spare_groups: Ints

    @classmethod
    def build(
        cls,
        label: int,
        rows: Ints,
        groups: npt.NDArray[np.int32] | None,
        labelled: npt.NDArray[np.bool_] | None = None,
    ) -> ClassPool:
        """Make the pool of a class.

        Args:
            label: Number of the class.
            rows: [n] catalogue rows, ascending.
            groups: [n] as in the index (-1: unknown); None: no video has a group.
            labelled: [n] rows that serve as support and queries, the others being spare; None: all
                serve both.
        """
        names, numbers = np.unique(group_keys(len(rows), groups), return_inverse=True)
        sizes = np.bincount(numbers, minlength=len(names))
        pool = cls(label, rows, numbers, sizes, int(sizes.max(initial=0)), rows, numbers)
        return pool if labelled is None else pool.with_labelled(labelled)

    def with_labelled(self, labelled: npt.NDArray[np.bool_]) -> ClassPool:
        """Return the pool whose `labelled` [n] videos are support and queries, others spare."""
        groups, spare = self.groups[labelled], ~labelled
        sizes = np.bincount(groups, minlength=len(self.sizes))
        biggest = int(sizes.max(initial=0))
        return ClassPool(self.label, self.rows[labelled], groups, sizes, biggest, self.rows[spare], self.groups[spare])

    def can_serve(self, shot: int, queries: int, unlabelled: int = 0) -> bool:
        """Tell whether `shot` support, `queries` query and `unlabelled` videos can be drawn.

        Support and queries are of different groups. The unlabelled videos must be left whichever
        groups are taken: the choice does not look at them.
        """
        if not self._completes({}, 0, shot, queries):
            return False
        taken = np.bincount(self.spare_groups, minlength=len(self.sizes))[self.sizes > 0]
        worst = int(np.sort(taken)[::-1][: shot + queries].sum())
        return len(self.spare) - worst >= unlabelled

    def choose_unlabelled(self, draw: Draw, taken: Collection[int], count: int) -> list[int]:
        """Draw `count` spare rows of groups that hold none of the rows `taken`."""
        rows = np.fromiter(taken, np.int64, len(taken))
        # where a row would stand among ours, before and after its equals: the same place if it is
        # of another class
        low, high = (np.searchsorted(self.rows, rows, side) for side in ("left", "right"))
        free = np.ones(len(self.sizes), dtype=np.bool_)  # [G]
        free[self.groups[low[low < high]]] = False
        left = self.spare[free[self.spare_groups]]
        return [int(left[place]) for place in islice(distinct(draw, len(left)), count)]

    def choose(self, draw: Draw, shot: int, queries: int) -> tuple[list[int], list[int]]:
        """Draw rows of support [shot] and queries [queries], where the class `can_serve` them.

        Both are drawn without replacement; no group is on both sides. A support video is passed
        over only if its group would leave too few videos to the queries, so no class is drawn in
        vain.
        """
        support, held = self._support(draw, shot, queries)
        query: list[int] = []
        for place in distinct(draw, len(self.rows)):
            if self.groups.item(place) not in held:
                query.append(self.rows.item(place))
            if len(query) == queries:
                break
        return support, query

    def _support(self, draw: Draw, shot: int, queries: int) -> tuple[list[int], dict[int, int]]:
        """Draw the rows of the support videos.

        Return them, and the groups they hold with their sizes.
        """
        support: list[int] = []
        held: dict[int, int] = {}
        videos = 0
        roomy = shot * self.biggest + queries <= len(self.rows)  # whichever groups are held, the others suffice
        for place in distinct(draw, len(self.rows)):
            group = self.groups.item(place)
            if group not in held:
                held[group] = size = self.sizes.item(group)
                if not (roomy or self._completes(held, videos + size, shot, queries)):
                    del held[group]
                    continue  # and never again: a wider choice cannot make room for this group
                videos += size
            support.append(self.rows.item(place))
            if len(support) == shot:
                break
        return support, held

    def _completes(self, held: dict[int, int], videos: int, shot: int, queries: int) -> bool:
        """Tell whether support can hold these groups, perhaps with others, and leave the queries.

        Together the groups held have `videos` videos. The answer is exact: some further groups must
        have from `missing` to `room` videos together.
        """
        room = len(self.rows) - queries - videos  # videos that further support groups may hold
        missing = max(shot - videos, 0)
        if room < missing:
            return False
        slack = len(self.rows) - shot - queries
        if missing == 0 or slack >= self.biggest - 1:  # groups added one at a time cannot step over the range
            return True
        # Bit k says that some of the further groups have k videos together. A group of `size`
        # videos adds itself to every sum reached before it: one shift and one "or" for all of them.
        # The range asked for is a mask of bits.
        reachable = 1
        for group, size in enumerate(self.sizes.tolist()):
            if group not in held:
                reachable |= reachable << size
        return (reachable >> missing) & ((1 << (room - missing + 1)) - 1) != 0


def check_frame_rule(shards: ShardSet, rows: Ints, *, rule: str, split: str) -> None:
    """Check that videos `rows` [n] of a split have what the frame rule reads.

    Raises:
        ShardError: some of them do not.
    """
    if rule in RULES_WITH_FPS:
        _check_fps(shards, rows, rule, split)
    if rule in RULES_OF_CLIPS:
        check_every_frame(shards, rows, what=f'frame rule "{rule}"')


def _check_fps(shards: ShardSet, rows: Ints, rule: str, split: str) -> None:
    unknown = rows[~(shards.fps[rows] > 0)]
    if len(unknown):
        raise ShardError(
            f'frame rule "{rule}" needs the frame rate of every video, and {len(unknown)} videos of split "{split}" in '
            f'{shards.path} have none (the first: "{shards.name(int(unknown[0]))}"): use frame rule "segment"'
        )


def check_every_frame(shards: ShardSet, rows: Ints, *, what: str) -> None:
    """Check, on some of the videos `rows` [n], that every frame is stored.

    Raises:
        ShardError: a frame is not; `what` says in the message who asks for it.
    """
    for row in rows[:: max(len(rows) // LOOKED_AT, 1)].tolist():
        kept = shards.series("rgb").kept(row)
        if len(kept) and kept[-1] != len(kept) - 1:
            raise ShardError(
                f"{what} needs every frame of a video, and {shards.path} holds {len(kept)} of at least "
                f'{kept[-1] + 1} of "{shards.name(row)}": make shards of all frames with fsar-preprocess'
            )
