"""A shard set in memory, with the interface of the real one: noisy JPEG frames of a few classes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg

from pipelines.episodes.rules import EpisodeRules
from shards_spec.errors import ShardError
from shards_spec.schema import Dataset, Split


def encode_frame(seed: int, height: int, width: int) -> bytes:
    """A smooth picture with a little noise, so that it looks like a frame to a JPEG coder."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3)).astype(np.float32)
    y, x = np.linspace(0, 2.999, height), np.linspace(0, 3.999, width)
    top, left = y.astype(int), x.astype(int)
    dy, dx = (y - top)[:, None, None], (x - left)[None, :, None]
    rows = coarse[top] * (1 - dy) + coarse[top + 1] * dy
    smooth = rows[:, left] * (1 - dx) + rows[:, left + 1] * dx
    pixels = (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90, colorsubsampling="420")


class FakeSeries:
    codec = "jpeg"

    def __init__(self, frames: np.ndarray, sizes: np.ndarray) -> None:
        self.sizes = sizes.astype(np.int32)
        self.frames = frames
        self.reads: list[tuple[int, int]] = []
        self.damaged: set[int] = set()
        self._cache: dict[tuple[int, int], bytes] = {}
        self._lock = threading.Lock()

    def kept(self, row: int) -> np.ndarray:
        return np.arange(self.frames[row], dtype=np.int32)

    def fetch(self, rows: np.ndarray) -> None:
        """Nothing: all is at hand."""

    def read(self, row: int, positions: Iterable[int]) -> list[bytes]:
        with self._lock:
            return [self._read(row, int(position)) for position in positions]

    def _read(self, row: int, position: int) -> bytes:
        if not 0 <= position < self.frames[row]:
            raise ShardError(f"video {row} has {self.frames[row]} members, not {position}")
        self.reads.append((row, position))
        if row in self.damaged:
            return b"not a picture"
        if (row, position) not in self._cache:
            height, width = self.sizes[row].tolist()
            self._cache[row, position] = encode_frame(1000 * row + position, height, width)
        return self._cache[row, position]


class FakeShards:
    """Rows in class order. Split "all" holds every class, "train" and "test" the two halves."""

    path = Path("fake")

    def __init__(
        self,
        videos: int | list[int] = 8,
        *,
        classes: int = 6,
        size: tuple[int, int] = (64, 64),
        groups: list[int] | None = None,
        frames: np.ndarray | None = None,
        fps: float = 25.0,
    ) -> None:
        counts = [videos] * classes if isinstance(videos, int) else videos
        names = tuple(f"class{i}" for i in range(len(counts)))
        half = len(names) // 2
        self.dataset = Dataset(
            "fake",
            names,
            {
                "all": Split(names, None),
                "train": Split(names[:half], None),
                "test": Split(names[half:], None),
            },
        )
        self.labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
        self.num_videos = len(self.labels)
        self.groups = np.array([-1] * self.num_videos if groups is None else groups, dtype=np.int32)
        default = 12 + np.arange(self.num_videos) % 19
        self.frames = (default if frames is None else frames).astype(np.int32)
        self.fps = np.full(self.num_videos, fps, dtype=np.float32)
        self.rgb = FakeSeries(self.frames, np.tile(np.array(size), (self.num_videos, 1)))

    def name(self, row: int) -> str:
        return f"videos/{row}.avi"

    def names(self, rows: np.ndarray) -> Iterator[str]:
        return (self.name(row) for row in rows.tolist())

    def series(self, name: str) -> FakeSeries:
        assert name == "rgb"
        return self.rgb

    def split_rows(self, split: str) -> np.ndarray:
        if split not in self.dataset.splits:
            raise ShardError(f'fake has no split "{split}"')
        wanted = [self.dataset.classes.index(name) for name in self.dataset.splits[split].classes]
        return np.flatnonzero(np.isin(self.labels, wanted) & (self.frames > 0))


TRAIN = EpisodeRules(
    way=3,
    shot=2,
    queries=3,
    resize=64,
    crop=48,
    random_frames=True,
    random_crop=True,
    query_flip=True,
    query_jitter=True,
)
