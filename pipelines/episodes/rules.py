"""The rules that episodes are drawn by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.sampling import FrameRule, frame_rule
from shards_spec.errors import ConfigError, suggest

if TYPE_CHECKING:
    import torch

_CHOICES = {"groups": ("disjoint", "any"), "small_classes": ("refuse", "drop")}


@dataclass(frozen=True, kw_only=True)
class EpisodeRules:
    """How episodes are drawn: `queries` is per class, sizes are in pixels.

    Stored frames that are not resize x resize_width (0: a square) already are resized to exactly that first, aspect not
    kept. With the frame rule "segment_clips" there are `frames` clips a video, each of `clip_frames` frames, every
    `clip_stride`-th of the video. A class with too few videos for an episode is refused, or left out with
    small_classes="drop".
    An episode also takes `unlabelled_per_class` unlabelled videos of each of its classes, and
    `distractors_per_class` (0: as many) of each of `distractor_classes` others. `labelled_fraction` < 1 keeps a
    part of each class for them; at 1 all videos serve both, but none twice in an episode.
    Raises ConfigError when a value is impossible.
    """

    way: int = 5
    shot: int = 1
    queries: int = 1
    frames: int = 8
    frame_rule: str = "segment"
    clip_frames: int = 0
    clip_stride: int = 1
    random_frames: bool = False
    resize: int = 256
    resize_width: int = 0
    crop: int = 224
    random_crop: bool = False
    query_flip: bool = False
    query_jitter: bool = False
    groups: str = "disjoint"
    small_classes: str = "refuse"
    unlabelled_per_class: int = 0
    distractor_classes: int = 0
    distractors_per_class: int = 0
    labelled_fraction: float = 1.0

    def __post_init__(self) -> None:
        self.chooser()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ConfigError(f'there is no value "{value}" of {name}: {suggest(value, choices)}')
        for name in ("way", "shot", "queries", "frames", "resize", "crop"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.crop > (short := min(self.resized)):
            raise ConfigError(f"crop {self.crop} is larger than resize {short}: give a crop of at most {short}")
        self._check_unlabelled()

    def _check_unlabelled(self) -> None:
        for name in ("unlabelled_per_class", "distractor_classes", "distractors_per_class"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least 0")
        if self.distractor_classes and not self.distractors:
            raise ConfigError(
                f"distractor_classes is {self.distractor_classes} and no video is taken of them: "
                "give distractors_per_class or unlabelled_per_class"
            )
        if not 0 < self.labelled_fraction <= 1:
            raise ConfigError(f"labelled_fraction is {self.labelled_fraction}: give a share above 0, at most 1")

    def chooser(self) -> FrameRule:
        """What chooses a video's frames."""
        return frame_rule(self.frame_rule, clip=self.clip_frames, stride=self.clip_stride)

    def parted(self, frames: torch.Tensor) -> torch.Tensor:
        """Chosen frames [V, T, ...] as they are, or as clips [V, S, clip, ...] where the frame rule chooses clips."""
        shape = (len(frames), self.frames, self.clip_frames, *frames.shape[2:])
        return frames.reshape(shape) if self.clip_frames else frames

    @property
    def least_frames(self) -> int:
        """Frames of a video below which some are repeated."""
        return (self.clip_frames - 1) * self.clip_stride + 1 if self.clip_frames else self.frames

    @property
    def resized(self) -> tuple[int, int]:
        """Height and width before the crop."""
        return self.resize, self.resize_width or self.resize

    @property
    def random_views(self) -> bool:
        """Whether a video looks different from episode to episode."""
        return self.random_frames or self.random_crop or self.query_flip or self.query_jitter

    @property
    def videos_per_class(self) -> int:
        """Videos that an episode takes of each of its classes."""
        return self.shot + self.queries

    @property
    def distractors(self) -> int:
        """Videos of each distractor class."""
        return self.distractors_per_class or self.unlabelled_per_class

    @property
    def unlabelled(self) -> int:
        """Unlabelled videos of an episode."""
        return self.way * self.unlabelled_per_class + self.distractor_classes * self.distractors

    @property
    def unlabelled_of_a_class(self) -> int:
        """Unlabelled videos that every class must be able to give, also as a distractor."""
        return max(self.unlabelled_per_class, self.distractors if self.distractor_classes else 0)
