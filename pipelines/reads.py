"""Say which pixels a plan reads: windows of stored frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards_spec.pictures import series_kind

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reads:
    """Windows of stored frames, all of one size, as a struct of arrays.

    Attributes:
        modality: Name of the series that is read.
        rows: int64 [R] catalogue rows.
        frames: int64 [R] positions among the kept frames of a video.
        tops: int64 [R] first row of each window, in pixels of the stored frame.
        lefts: int64 [R] its first column.
        size: Height and width of all windows.
    """

    modality: str
    rows: Ints
    frames: Ints
    tops: Ints
    lefts: Ints
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def channels(self) -> int:
        """Channels of its pixels: 1 of flow, whose pictures are grey, else 3."""
        return 1 if series_kind(self.modality)[0] == "flow" else 3


class ReadList:
    """Collects the windows of one size, clip by clip."""

    def __init__(self) -> None:
        # Flat lists of numbers: NumPy takes several times as long to make an array of tuples. A
        # clip is four of them: row, top, left and how many frames it has.
        self._clips: list[int] = []
        self._frames: list[int] = []

    def add(self, row: int, frames: list[int], top: int, left: int) -> tuple[int, ...]:
        """Add the frames of one clip, each once.

        Return the places [T] that its frames have among the reads.
        """
        first, count = len(self._frames), len(frames)
        if len(set(frames)) == count:
            self._clips += (row, top, left, count)
            self._frames += frames
            return tuple(range(first, first + count))
        unique = list(dict.fromkeys(frames))
        self._clips += (row, top, left, len(unique))
        self._frames += unique
        return tuple([first + unique.index(frame) for frame in frames])

    def add_clips(self, rows: Ints, frames: Ints, top: int, left: int) -> list[tuple[int, ...]]:
        """Add the frames [n, T] of n clips, all at one corner and distinct in each.

        Return the places [T] of each.
        """
        first, count = len(self._frames), frames.shape[1]
        for row in rows.tolist():
            self._clips += (row, top, left, count)
        self._frames += frames.ravel().tolist()
        return [tuple(range(place, place + count)) for place in range(first, len(self._frames), count)]

    def reads(self, modality: str, size: tuple[int, int]) -> Reads:
        """Return the list as arrays."""
        clips = np.array(self._clips, dtype=np.int64).reshape(-1, 4).T  # [4, clips]
        rows, tops, lefts = clips[:3].repeat(clips[3], axis=1)  # [3, R]
        return Reads(modality, rows, np.array(self._frames, dtype=np.int64), tops, lefts, size)


class ReadLists:
    """One list for each window size, numbered in the order of their first clips."""

    def __init__(self) -> None:
        self._lists: dict[tuple[int, int], tuple[int, ReadList]] = {}

    def of_size(self, size: tuple[int, int]) -> tuple[int, ReadList]:
        """Return the number of the list of windows of a height and width, and the list."""
        return self._lists.get(size) or self._lists.setdefault(size, (len(self._lists), ReadList()))

    def reads(self, modality: str) -> tuple[Reads, ...]:
        """Return all lists as arrays."""
        return tuple(reads.reads(modality, size) for size, (_, reads) in self._lists.items())
