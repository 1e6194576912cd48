"""The rules by which episodes are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.episodes.motion import CAMERAS, STREAMS, check_series_name, motion_channels
from pipelines.sampling import FrameRule, frame_rule
from shards_spec.errors import ConfigError, suggest

if TYPE_CHECKING:
    import torch

_CHOICES = {
    "groups": ("disjoint", "any"),
    "small_classes": ("refuse", "drop"),
    "streams": STREAMS,
    "camera": CAMERAS,
}


@dataclass(frozen=True, kw_only=True)
class EpisodeRules:
    """Rules by which episodes are drawn; sizes are in pixels.

    Attributes:
        way: Classes of an episode.
        shot: Support videos of each class.
        queries: Query videos of each class.
        frames: Frames of a video; with the frame rule "segment_clips", clips.
        frame_rule: Name of the rule that chooses them, a key of `pipelines.sampling.FRAME_RULES`.
        clip_frames: Frames of each of these clips; 0 with any other rule.
        clip_stride: Distance of a clip's frames.
        random_frames: Draw frames; otherwise the rule's centre is taken.
        resize: Height to which stored frames of another size are resized first; their aspect is not
            kept.
        resize_width: Width of that; 0: a square.
        crop: Side of the square that is cropped after that.
        random_crop: Draw its place; otherwise it is the centre.
        query_flip: Mirror half of the query videos.
        query_jitter: Change the colours of query videos.
        query_reversal: Run half of the query videos backwards; off where that makes another class.
        streams: What is read of a video: its "frames", its stored "motion", or "both".
        motion_series: Series of stored fields that motion is read from.
        fields: Fields of each of the segments of a video; 0: all of the video's.
        camera: "median": each field's median motion is taken for the camera's, and subtracted; or
            "none".
        groups: "disjoint": support and queries of a class share no group of videos; or "any".
        small_classes: A class with too few videos for an episode: "refuse" it, or "drop" it from
            the split.
        unlabelled_per_class: Unlabelled videos of each class of the episode.
        distractor_classes: Other classes that unlabelled videos are taken from.
        distractors_per_class: Unlabelled videos of each of these; 0: as many as of the episode's
            classes.
        labelled_fraction: Part of each class that serves as support and queries; the others are
            unlabelled ones. At 1 all videos serve both, but none twice in an episode.

    Raises:
        ConfigError: a value is impossible.
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
    query_reversal: bool = False
    streams: str = "frames"
    motion_series: str = "flow1"
    fields: int = 4
    camera: str = "median"
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
        check_series_name(self.motion_series)
        if self.fields < 0:
            raise ConfigError(f"fields is {self.fields}: give at least 1 a segment, or 0 for all")
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
        """Return the function that chooses a video's frames."""
        return frame_rule(self.frame_rule, clip=self.clip_frames, stride=self.clip_stride)

    def parted(self, frames: torch.Tensor) -> torch.Tensor:
        """Return frames [V, T, ...] as they are, or [V, S, clip, ...] for a rule of clips."""
        shape = (len(frames), self.frames, self.clip_frames, *frames.shape[2:])
        return frames.reshape(shape) if self.clip_frames else frames

    @property
    def least_frames(self) -> int:
        """Frames that a video must have for none to be repeated."""
        return (self.clip_frames - 1) * self.clip_stride + 1 if self.clip_frames else self.frames

    @property
    def resized(self) -> tuple[int, int]:
        """Height and width before the crop."""
        return self.resize, self.resize_width or self.resize

    @property
    def random_views(self) -> bool:
        """Tell whether a video looks different from episode to episode."""
        return self.random_frames or self.random_crop or self.query_flip or self.query_jitter or self.query_reversal

    @property
    def reads_frames(self) -> bool:
        """Tell whether frames are read."""
        return self.streams != "motion"

    @property
    def reads_motion(self) -> bool:
        """Tell whether stored motion is read."""
        return self.streams != "frames"

    @property
    def motion_channels(self) -> int:
        """Channels of the motion: 2 of flow, 3 of differences."""
        return motion_channels(self.motion_series)

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
