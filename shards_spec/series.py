"""One modality of a shard set: the pictures of any video, by its catalogue row."""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shards_spec.errors import ShardError
from shards_spec.files import OPEN_FILES, Recent
from shards_spec.index.checks import check_shards
from shards_spec.index.columns import Columns, crc_starts, payload_starts
from shards_spec.index.layout import shard_path
from shards_spec.remote.shards import RemoteSet
from shards_spec.schema import BLOCK, adding_command, padded, picture_name, sample_key

Mapped = tuple[mmap.mmap, dict[int, NDArray[np.uint8]]]


class PictureCrcs:
    """The CRC-32 of the pictures of a series, from its index columns."""

    def __init__(self, columns: Columns) -> None:
        self._start = crc_starts(columns)  # [V]
        self._crc32, self._frame, self._first = columns["crc32"], columns["frame"], columns["first"]
        self._codec = columns.codec

    def check(self, row: int, position: int, data: bytes | memoryview, *, where: str) -> None:
        """Refuse a picture that is not as it was written; `where` is its shard.

        Raises:
            ShardError: naming shard and member.
        """
        if zlib.crc32(data) != self._crc32[self._start[row] + position]:
            name = picture_name(int(self._frame[self._first[row] + position]), self._codec)
            raise ShardError(
                f"{where}: {sample_key(row)}.{name}: content damaged; fsar-shards verify finds all damage: "
                "copy the shard again"
            )


class Series:
    """One modality of a shard set: `rgb`, `diff1`, `flow1`, `flow8g2`, ...

    Args:
        folder: The shard set, as messages name it.
        name: Name of the series.
        columns: Its columns of the index.
        remote: The files of a set at a URL.
        check: Refuse each picture whose CRC-32 is not that of the index.
    """

    def __init__(
        self, folder: Path, name: str, columns: Columns, *, remote: RemoteSet | None = None, check: bool = False
    ) -> None:
        self.name, self._folder, self.columns = name, folder, columns
        self._shard, self._offset = columns["shard"], columns["offset"]
        self._first, self._size = columns["first"], columns["size"]
        self.codec = columns.codec
        self._crcs = PictureCrcs(columns) if check else None
        self._files: Recent[int, BinaryIO] = Recent(OPEN_FILES)
        self._maps: Recent[int, Mapped] = Recent(OPEN_FILES)
        self._videos = remote.videos(name, columns) if remote else None
        if self._videos is None:
            numbers, sizes = columns["shard_number"], columns["shard_bytes"]
            check_shards(folder, name, numbers=numbers, sizes=sizes, shard=self._shard)

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """[V, 2] height and width of the stored frames of each video."""
        return self.columns["stored_size"]

    @cached_property
    def sha256(self) -> str:
        """Hash over the hashes of its shards."""
        return hashlib.sha256(self.columns["shard_sha256"].tobytes()).hexdigest()

    def kept(self, row: int) -> NDArray[np.int32]:
        """Return [n] source frame numbers of the stored members of a video, ascending."""
        frames: NDArray[np.int32] = self.columns["frame"][self._first[row] : self._first[row + 1]]
        return frames

    def scale(self, row: int) -> NDArray[np.float32]:
        """Return [n] pixels of the stored field that code 127 stands for (flow series only).

        Raises:
            ShardError: this series has no scale.
        """
        if "scale" not in self.columns:
            raise ShardError(f"{self._folder}: {self.name} has no scale: it is no flow series")
        return self._of_members("scale", row)

    def scores(self, row: int) -> NDArray[np.float32]:
        """Return [n] motion-differential scores of a video; NaN where a field is too small.

        Raises:
            ShardError: this series has no scores.
        """
        if "motion_score" not in self.columns:
            raise ShardError(
                f"{self._folder}: {self.name} has no motion scores; add a series that has them with "
                + adding_command("flow8g2", self._folder)
            )
        return self._of_members("motion_score", row)

    def _of_members(self, column: str, row: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.columns[column][self._first[row] : self._first[row + 1]]
        return values

    def read(self, row: int, positions: Iterable[int]) -> list[bytes]:
        """Read the encoded pictures of a video at `positions` of `kept(row)`; safe in threads.

        Raises:
            ShardError: no such member, a shard that was cut, or (with `check`) changed bytes.
        """
        first, last = int(self._first[row]), int(self._first[row + 1])
        sizes = self._size[first:last].astype(np.int64)
        starts = self._begin(row) + payload_starts(sizes)
        file = self._open(row)
        payloads = []
        for position in positions:
            if not 0 <= position < last - first:
                raise ShardError(f"{self._folder}: video {row} has {last - first} {self.name} members, not {position}")
            data = os.pread(file.fileno(), int(sizes[position]), int(starts[position]))
            if len(data) != sizes[position]:
                raise ShardError(f"{file.name}: cut short: it ends before byte {starts[position] + sizes[position]}")
            if self._crcs:
                self._crcs.check(row, position, data, where=file.name)
            payloads.append(data)
        return payloads

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Return the frames of a video of a raw series where they lie in the shard file.

        The file is mapped into memory: nothing is copied, and only pages that are used are read.
        Safe in threads.

        Returns:
            [n, h, w, 3] uint8, read-only.

        Raises:
            ShardError: the series is not raw, its frames differ in size from the index, or the
                shard was cut.
        """
        mapped, views = self._map(row)
        if mapped.size() != len(mapped):  # to read beyond the end of the file would kill the process (SIGBUS)
            path = shard_path(self._folder, self.name, int(self._shard[row]))
            raise ShardError(f"{path}: cut short or replaced while it was open; copy it again")
        if row not in views:
            views[row] = self._view(mapped, row)
        return views[row]

    def check_pixels(self, row: int, positions: Iterable[int]) -> None:
        """Refuse frames of `pixels(row)` whose bytes were changed, if opened with `check`.

        Raises:
            ShardError: naming shard and member.
        """
        if self._crcs:
            video, where = self.pixels(row), str(shard_path(self._folder, self.name, int(self._shard[row])))
            for position in positions:
                self._crcs.check(row, position, video[position].data, where=where)

    def fetch(self, rows: NDArray[np.int64]) -> None:
        """Fetch videos of a set at a URL to its cache, many at once, before they are read."""
        if self._videos is not None:
            self._videos.fetch(rows.tolist())

    def close(self) -> None:
        """Close its files; arrays from `pixels` stay valid."""
        if self._videos is not None:
            self._videos.close()
        self._maps.clear()  # unmapped when the last view of them is gone
        for file in self._files.clear():
            file.close()

    def _view(self, mapped: mmap.mmap, row: int) -> NDArray[np.uint8]:
        first, last = int(self._first[row]), int(self._first[row + 1])
        height, width = self.sizes[row].tolist()
        size = height * width * 3
        start, stride = self._begin(row) + BLOCK, BLOCK + padded(size)
        fits = self._begin(row) + (last - first) * stride <= len(mapped)
        if self.codec != "raw" or not fits or (self._size[first:last] != size).any():
            raise ShardError(f"{self._folder}: the {self.name} members of video {row} are no raw {height}x{width}")
        # Raw frames of a video are equally long: they lie at equal distances, headers between.
        shape, strides = (last - first, height, width, 3), (stride, width * 3, 3, 1)
        return np.ndarray(shape, np.uint8, mapped, start, strides)  # keeps the map alive

    def _map(self, row: int) -> Mapped:
        """Return the mapped file of a video, and the views that were made of it so far."""
        number = int(self._shard[row]) if self._videos is None else row
        return self._maps.get(number, lambda: (mmap.mmap(self._open(row).fileno(), 0, access=mmap.ACCESS_READ), {}))

    def _begin(self, row: int) -> int:
        """Return where a video begins in the file that `_open` returns.

        That file is its shard; of a set at a URL, a file of this video only.
        """
        return int(self._offset[row]) if self._videos is None else 0

    def _open(self, row: int) -> BinaryIO:
        number = int(self._shard[row])
        if number < 0:
            raise ShardError(f"{self._folder}: video {row} failed in preprocessing; see failures.jsonl")
        if self._videos is not None:
            return self._videos.open(row)
        return self._files.get(number, lambda: shard_path(self._folder, self.name, number).open("rb"))
