"""Draw clips of labelled videos for probes: uniform ones for a test, a random one for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from pipelines.clips.stream import Box, ClipStream, Crop, Flags, Ints, draw_crop
from pipelines.draw import Draw
from pipelines.sampling import segment
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, choice

Sampling = Literal["windows", "segments"]

CENTRE = 0.875  # of a stored frame's shorter side: 224 of 256
LEAST_AREA = 0.2  # of a frame that a training clip covers
SAMPLING = ("windows", "segments")
_TRAINING = 1 << 62  # the bit in a draw's number that sets these apart from other draws


@dataclass(frozen=True)
class ProbeRules:
    """Rules by which clips are cut out of a labelled video.

    Attributes:
        frames: Frames of a clip.
        stride: Distance of its frames; a clip's window is frames * stride consecutive frames.
        size: Side of the square that it is resized to.
        clips: Uniform clips of a test video.
        sampling: "windows"; or "segments", a frame of each of as many equal parts of the video,
            which knows no stride.
        centre: Side of a test clip's square, as a share of a stored frame's shorter side.
        area: Least share of the frame that a training clip's box covers.
        flip: Half of the training clips are mirrored.
        jitter: The colours of training clips are changed.
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
        """Return the frames of the test clips of a video of `count`.

        A single clip of segments has their middles.
        """
        if self.sampling == "segments":
            places = (np.arange(self.clips)[:, None] + 0.5) / self.clips + np.arange(self.frames)  # [clips, frames]
            middles: list[list[int]] = (places * count / self.frames).astype(np.int64).tolist()
            return middles
        starts = np.linspace(0, max(count - self.window, 0), self.clips).astype(np.int64)
        return [self.frames_at(start, count) for start in starts.tolist()]

    def random(self, draw: Draw, count: int) -> list[int]:
        """Draw the frames of a training clip of a video of `count`."""
        if self.sampling == "segments":
            return segment(draw, count, steps=self.frames, random_frames=True)
        return self.frames_at(draw.randint(0, max(count - self.window, 0)), count)

    def frames_at(self, start: int, count: int) -> list[int]:
        """Return the frames of the clip at `start` of a video of `count`.

        A shorter one stands still at its end.
        """
        return [min(start + self.stride * n, count - 1) for n in range(self.frames)]


def uniform_clips(shards: ShardSet, rows: Sequence[int], rules: ProbeRules) -> ClipStream:
    """Make the stream whose step n is video n: clips at uniform starts, from the centre square.

    By default the starts are floor(linspace(0, windows - 1, clips)), and the square is 0.875 of the
    shorter side. Source: FIMA's code (ZMHH-H/FIMA).
    """
    numbers = np.array(rows, dtype=np.int64)
    return ClipStream(shards, numbers, ProbeClips(rules, training=False), batch=1, seed=0, order=in_turn, whole=False)


def random_clips(shards: ShardSet, rows: Sequence[int], rules: ProbeRules, *, batch: int, seed: int) -> ClipStream:
    """Make the stream of training batches: a random clip of each video, cropped and mirrored.

    Raises:
        ConfigError: there is no video.
    """
    if not len(rows):
        raise ConfigError("there is no video to train on")
    return ClipStream(
        shards,
        np.array(rows, dtype=np.int64),
        ProbeClips(rules, training=True),
        batch=min(batch, len(rows)),
        seed=seed,
        order=permuted,
        draws=_TRAINING,
        whole=False,
    )


def in_turn(seed: int, epoch: int, videos: int) -> Ints:
    """Return the order [videos] in which they stand."""
    del seed, epoch
    return np.arange(videos)


def permuted(seed: int, epoch: int, videos: int) -> Ints:
    """Return a random order [videos] of NumPy's own generator.

    It is not that of `shuffled`, so that classifiers are trained in the order that they always
    were.
    """
    return np.random.default_rng((seed, epoch)).permutation(videos)


@dataclass(frozen=True)
class ProbeClips:
    """The rule of test clips or, where `training`, of training clips, for videos of any length."""

    rules: ProbeRules
    training: bool
    flow_series: ClassVar[None] = None

    @property
    def crop(self) -> int:
        """Side of the crops in pixels."""
        return self.rules.size

    def usable(self, shards: ShardSet, rows: Ints) -> Flags:
        """Tell which videos [n] have clips: all."""
        del shards
        return np.ones(len(rows), np.bool_)

    def draw(self, draw: Draw, shards: ShardSet, row: int) -> tuple[list[Crop], list[Crop]]:
        """Draw the training clip of a video, or return its test clips; neither has flow."""
        rules, count = self.rules, int(shards.frames[row])
        height, width = shards.series("rgb").sizes[row].tolist()
        if self.training:
            frames = rules.random(draw, count)
            return [draw_crop(draw, frames, (height, width), area=(rules.area, 1.0), flip=rules.flip)], []
        box = centre_box((height, width), rules.centre)
        return [Crop(frames, box, flip=False) for frames in rules.uniform(count)], []


def centre_box(size: Sequence[int], share: float = CENTRE) -> Box:
    """Return the centre square of a frame of (height, width), a share of its shorter side."""
    side = max(1, int(share * min(size)))
    return Box((size[0] - side) // 2, (size[1] - side) // 2, side, side)
