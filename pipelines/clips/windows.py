"""Draw the clips that pre-training compares: two windows in parts (FIMA), or two clips (MoCo)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pipelines.clips.stream import Crop, Flags, Ints, draw_crop
from pipelines.draw import Draw
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, choice

AREA = (0.2, 1.0)  # range of the share of the frame that a crop covers, in all of these papers


def check_positive(**values: int) -> None:
    """ConfigError for the first value, by its name, that is under 1."""
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}: give at least 1")


@dataclass(frozen=True, kw_only=True)
class WindowRules:
    """Rules of FIMA's clips: two windows of a video, each whole and in parts.

    The clips of a video are window m whole, every `stride`-th of its frames, then its parts, of
    consecutive frames; then the same of window n. Each has a box and flip of its own. Source: Zhu
    et al., ACM Multimedia 2023, and its code (ZMHH-H/FIMA).

    Attributes:
        frames: Frames of a clip, T; a window is frames * stride consecutive ones.
        stride: Distance of the frames of the whole window.
        parts: Parts of a window, spread evenly over it: as many as the trunk gives feature frames.
        crop: Side of the crops in pixels.
        min_gap: Least distance of the windows' first frames, as far as the video has room; the code
            has none.
        clip_per_video: 2: two different windows, any as likely as another. 3, as in the code: any
            window, and the one after its end, or the video's last one.
        extra_frame: Each clip carries the frame before it in front, at its own stride, for the
            frame difference of that name; a clip then has T + 1 frames.
        area: Range of the share of the frame that a crop covers.
        flip: Mirror half of the crops; off where left and right mean something.
    """

    frames: int = 16
    stride: int = 2
    parts: int = 2
    crop: int = 224
    min_gap: int = 1
    clip_per_video: Literal[2, 3] = 2
    extra_frame: bool = False
    area: tuple[float, float] = AREA
    flip: bool = True
    flow_series: ClassVar[None] = None

    def __post_init__(self) -> None:
        """ConfigError for values that mean nothing."""
        check_positive(frames=self.frames, stride=self.stride, parts=self.parts, crop=self.crop, min_gap=self.min_gap)
        if self.clip_per_video not in (2, 3):
            raise ConfigError(f"clip_per_video={self.clip_per_video} is not known; choose 2 or 3")
        if self.stride == 1 and self.parts > 1:
            raise ConfigError(
                f"a window of stride 1 has no {self.parts} different parts, each as long as its clip; give clip_stride "
                "= 2 or more"
            )

    @property
    def window(self) -> int:
        """Frames of a window."""
        return self.frames * self.stride

    @property
    def _before(self) -> int:
        """Frames that must exist before a window."""
        return self.stride if self.extra_frame else 0

    def usable(self, shards: ShardSet, rows: Ints) -> Flags:
        """Tell which videos [n] have a whole window."""
        long_enough: Flags = shards.frames[rows] >= self.window + self._before
        return long_enough

    def draw(self, draw: Draw, shards: ShardSet, row: int) -> tuple[list[Crop], list[Crop]]:
        """Draw the 2 (1 + parts) clips of a video; no flow."""
        height, width = shards.series("rgb").sizes[row].tolist()
        windows = self.window_starts(draw, int(shards.frames[row]) - self.window - self._before + 1)
        clips = [clip for start in windows for clip in self.clips(start + self._before)]
        return [draw_crop(draw, clip, (height, width), area=self.area, flip=self.flip) for clip in clips], []

    def window_starts(self, draw: Draw, windows: int) -> tuple[int, int]:
        """Draw the numbers of two of that many windows; the only one twice."""
        if self.clip_per_video == 3:
            first = draw.randint(0, windows - 1)
            return first, min(first + self.window, windows - 1)
        gap = min(self.min_gap, windows - 1)
        if not gap:
            return 0, 0
        # Two different numbers of a smaller range become a pair at least `gap` apart: the larger
        # moves on by the rest of the gap. So every such pair is as likely as another, and none has
        # to be drawn again.
        choices = windows - gap + 1
        first, second = draw.randint(0, choices - 1), draw.randint(0, choices - 2)
        second += second >= first
        return (first, second + gap - 1) if first < second else (first + gap - 1, second)

    def clips(self, start: int) -> list[list[int]]:
        """Return the frames of the clips of the window that starts there: whole, then its parts."""
        room = self.window - self.frames
        of_parts = [start + part * room // max(self.parts - 1, 1) for part in range(self.parts)]
        if self.parts == 1:
            of_parts = [start + room // 2]
        extra = int(self.extra_frame)
        whole = [start + self.stride * step for step in range(-extra, self.frames)]
        return [whole, *([first + step for step in range(-extra, self.frames)] for first in of_parts)]


@dataclass(frozen=True, kw_only=True)
class PairRules:
    """Rules of momentum contrast: two clips of a video, each with a box and flip of its own.

    The defaults are those of the plain baselines of MSCL's code (megvii-research/MSCL,
    configs/recognition/moco), whose two clips are of the same frames.

    Attributes:
        frames: Frames of a clip, T.
        stride: Distance of these.
        crop: Side of the crops in pixels.
        starts: "same": both clips are of the same frames; "two": each has a start of its own.
        area: Range of the share of the frame that a crop covers.
        flip: Mirror half of the crops; off where left and right mean something.
    """

    frames: int = 8
    stride: int = 8
    crop: int = 112
    starts: Literal["same", "two"] = "same"
    area: tuple[float, float] = AREA
    flip: bool = True
    flow_series: ClassVar[None] = None

    def __post_init__(self) -> None:
        """ConfigError for values that mean nothing."""
        check_positive(frames=self.frames, stride=self.stride, crop=self.crop)
        choice("starts", self.starts, ("same", "two"))

    @property
    def span(self) -> int:
        """Frames from a clip's first to its last."""
        return (self.frames - 1) * self.stride + 1

    def usable(self, shards: ShardSet, rows: Ints) -> Flags:
        """Tell which videos [n] have a whole clip."""
        long_enough: Flags = shards.frames[rows] >= self.span
        return long_enough

    def draw(self, draw: Draw, shards: ShardSet, row: int) -> tuple[list[Crop], list[Crop]]:
        """Draw query and key of a video; no flow."""
        height, width = shards.series("rgb").sizes[row].tolist()
        last = int(shards.frames[row]) - self.span
        query = draw.randint(0, last)
        key = draw.randint(0, last) if self.starts == "two" else query
        clips = [[start + self.stride * step for step in range(self.frames)] for start in (query, key)]
        return [draw_crop(draw, clip, (height, width), area=self.area, flip=self.flip) for clip in clips], []
