"""Clips of labelled videos for probes of features: uniform ones for a test, a random one a video for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.clips.stream import Box, random_resized_box
from pipelines.draw import Draw, PhiloxDraw
from pipelines.reads import Reads
from pipelines.sampling import segment
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, choice

Sampling = Literal["windows", "segments"]
Ints = NDArray[np.int64]

CENTRE = 0.875  # of a stored frame's shorter side: 224 of 256
LEAST_AREA = 0.2  # of a frame that a training clip covers
SAMPLING = ("windows", "segments")
_TRAINING = 1 << 62  # the bit in a draw's number that sets these apart from other draws


@dataclass(frozen=True)
class ClipRules:
    """How a clip is cut out of a video.

    Attributes:
        frames: Of a clip.
        stride: Distance of its frames; a clip's window is frames * stride consecutive frames.
        size: Side of the square that it is resized to.
        clips: Uniform clips of a test video.
        sampling: "windows"; or "segments", a frame of each of as many equal parts of the video, which knows no stride.
        centre: Of a test clip: its square's side, as a share of a stored frame's shorter side.
        area: Of a training clip: the least share of the frame that its box covers.
        flip: Training clips are mirrored by chance.
        jitter: Their colours are changed.
    """

    frames: int = 16
    stride: int = 2
    size: int = 112
    clips: int = 10
    sampling: Sampling = "windows"
    centre: float = CENTRE
    area: float = LEAST_AREA
    flip: bool = True
    jitter: bool = True

    def __post_init__(self) -> None:
        """ConfigError for values that mean nothing."""
        choice("sampling", self.sampling, SAMPLING)
        for name in ("frames", "stride", "size", "clips"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value} of a clip must be 1 or more")
        for name in ("centre", "area"):
            if not 0 < (share := getattr(self, name)) <= 1:
                raise ConfigError(f"{name}={share} of a clip must be a share, above 0 and at most 1")

    @property
    def window(self) -> int:
        """Consecutive frames that a video must have for a clip of its own."""
        return 1 if self.sampling == "segments" else self.frames * self.stride

    def uniform(self, count: int) -> list[list[int]]:
        """Frames of the test clips of a video of `count`; of one clip of segments, their middles."""
        if self.sampling == "segments":
            places = (np.arange(self.clips)[:, None] + 0.5) / self.clips + np.arange(self.frames)  # [clips, frames]
            middles: list[list[int]] = (places * count / self.frames).astype(np.int64).tolist()
            return middles
        starts = np.linspace(0, max(count - self.window, 0), self.clips).astype(np.int64)
        return [self.frames_at(start, count) for start in starts.tolist()]

    def random(self, draw: Draw, count: int) -> list[int]:
        """Frames of a training clip of a video of `count`."""
        if self.sampling == "segments":
            return segment(draw, count, steps=self.frames, random_frames=True)
        return self.frames_at(draw.randint(0, max(count - self.window, 0)), count)

    def frames_at(self, start: int, count: int) -> list[int]:
        """Frames of the clip at `start` of a video of `count`; a shorter video stands still at its last frame."""
        return [min(start + self.stride * n, count - 1) for n in range(self.frames)]


@dataclass(frozen=True)
class ProbePlan:
    """Clips to read.

    Attributes:
        rows: Their videos, one for each entry of `reads`.
        reads: The windows of pixels, each once, of every video.
        places: [clips, T] frames of each clip among its reads, for every video.
        flips: Whether each video's clips are mirrored.
    """

    rows: tuple[int, ...]
    reads: tuple[Reads, ...]
    places: tuple[Ints, ...]
    flips: tuple[bool, ...]


class UniformClips:
    """The test view n of a list of videos: its clips at uniform starts, from the centre square.

    By default the starts are floor(linspace(0, windows - 1, clips)), the square is 0.875 of the shorter side: FIMA's
    code (ZMHH-H/FIMA).
    """

    def __init__(self, shards: ShardSet, rows: Sequence[int], rules: ClipRules) -> None:
        self.shards, self.rows, self.rules = shards, tuple(rows), rules
        self.sizes = shards.series("rgb").sizes

    def __len__(self) -> int:
        return len(self.rows)

    def plan(self, n: int) -> ProbePlan:
        """The clips of video n of the list."""
        row, rules = self.rows[n], self.rules
        clips = rules.uniform(int(self.shards.frames[row]))
        reads, places = read_clips(row, clips, centre_box(self.sizes[row].tolist(), rules.centre))
        return ProbePlan((row,), (reads,), (places,), (False,))


class RandomClips:
    """Training batch n of a list of videos: a random clip of each, randomly cropped and mirrored.

    An epoch is a seeded permutation of the videos whose incomplete last batch is left out; batch n is a pure
    function of (seed, n).  ConfigError where there is no video.
    """

    def __init__(self, shards: ShardSet, rows: Sequence[int], rules: ClipRules, *, batch: int, seed: int) -> None:
        if not len(rows):
            raise ConfigError("there is no video to train on")
        self.shards, self.rows, self.rules, self.seed = shards, np.array(rows, dtype=np.int64), rules, seed
        self.batch = min(batch, len(rows))
        self.steps = len(rows) // self.batch  # of an epoch
        self.sizes = shards.series("rgb").sizes
        self._order: tuple[int, Ints] = (-1, self.rows)

    def plan(self, n: int) -> ProbePlan:
        """The clips of batch n, counted over all epochs."""
        rows = self.batch_rows(n)
        parts = [self._clip(row, PhiloxDraw(self.seed, _TRAINING | (n * self.batch + i))) for i, row in enumerate(rows)]
        reads, places, flips = zip(*parts, strict=True)
        return ProbePlan(tuple(rows), reads, places, flips)

    def batch_rows(self, n: int) -> list[int]:
        """The videos of batch n."""
        epoch, step = divmod(n, self.steps)
        rows: list[int] = self._epoch(epoch)[step * self.batch : (step + 1) * self.batch].tolist()
        return rows

    def _clip(self, row: int, draw: PhiloxDraw) -> tuple[Reads, Ints, bool]:
        rules = self.rules
        frames = rules.random(draw, int(self.shards.frames[row]))
        height, width = self.sizes[row].tolist()
        box = random_resized_box(draw, (height, width), area=(rules.area, 1.0))
        reads, places = read_clips(row, [frames], box)
        return reads, places, rules.flip and draw.random() < 0.5

    def _epoch(self, epoch: int) -> Ints:
        """[V] rows in the order of an epoch; of two threads each may make it, and both make the same."""
        kept, order = self._order
        if kept != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
            self._order = epoch, order
        return order


def centre_box(size: Sequence[int], share: float = CENTRE) -> Box:
    """The centre square of a frame of (height, width), whose side is a share of the shorter one."""
    side = max(1, int(share * min(size)))
    return Box((size[0] - side) // 2, (size[1] - side) // 2, side, side)


def read_clips(row: int, clips: Sequence[Sequence[int]], box: Box) -> tuple[Reads, Ints]:
    """What to read of a video for some clips, each pixel once, and the places [clips, T] of their frames in it."""
    frames, places = np.unique(np.array(clips, dtype=np.int64), return_inverse=True)
    tops, lefts = (np.full(len(frames), corner, dtype=np.int64) for corner in (box.top, box.left))
    reads = Reads("rgb", np.full(len(frames), row, dtype=np.int64), frames, tops, lefts, (box.height, box.width))
    return reads, places.reshape(len(clips), -1)
