"""Random access to a shard set: any frame of any video, by its catalogue row."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import zarr

from shards_spec.errors import FsarError, ShardError, suggest
from shards_spec.index import INDEX, column_sha256, shard_path
from shards_spec.motion import adding_command
from shards_spec.opening import check_folder, read_attributes
from shards_spec.remote import is_url
from shards_spec.remote_set import RemoteSet, RemoteShards
from shards_spec.schema import Dataset
from shards_spec.shard_check import check_shards
from shards_spec.tar import BLOCK, padded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from numpy.typing import NDArray

    Mapped = tuple[mmap.mmap, dict[int, NDArray[np.uint8]]]

OPEN_FILES = 256  # shards kept open; well below the usual limit of 1,024 a process
_TEXTS = 1 << 16  # strings at once whose places are held as Python numbers


class Columns:
    """The columns of one group of `index.zarr`, each loaded whole and checked against its hash on first use."""

    def __init__(self, index: Path, group: str, hashes: dict[str, str], remote: RemoteSet | None = None) -> None:
        self._index, self._group, self._hashes, self._remote = index, group, hashes, remote
        self._loaded: dict[str, NDArray[Any]] = {}

    def __contains__(self, name: str) -> bool:
        return f"{self._group}/{name}" in self._hashes

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._loaded:
            self._loaded[name] = self._load(f"{self._group}/{name}")
        return self._loaded[name]

    def _load(self, path: str) -> NDArray[Any]:
        try:
            if self._remote is None:
                column = np.asarray(zarr.open_array(self._index / path, mode="r")[:])
            else:
                column = self._remote.column(path, self._hashes[path])
        except FsarError:
            raise
        except Exception as error:
            raise ShardError(f"{self._index}/{path} cannot be read ({error}); run fsar-shards reindex") from error
        if column_sha256(column) != self._hashes.get(path):
            raise ShardError(f"{self._index}/{path} is damaged; run fsar-shards reindex")
        return column

    def damaged(self) -> Iterator[str]:
        """One line for each column that cannot be read or is not what was written."""
        for path in self._hashes:
            group, _, name = path.rpartition("/")
            if group == self._group:
                try:
                    self[name]
                except ShardError as error:
                    yield str(error)

    def sha256(self, name: str) -> str:
        """Hash of a column."""
        return self._hashes[f"{self._group}/{name}"]

    @property
    def codec(self) -> str:
        """How the pictures of a series are stored: "jpeg" or "raw"."""
        return self.text("codec", 0) if "codec_ends" in self else "jpeg"

    def text(self, name: str, position: int) -> str:
        """One string of a text column."""
        ends = self[f"{name}_ends"]
        start = int(ends[position - 1]) if position else 0
        data: bytes = self[f"{name}_bytes"][start : int(ends[position])].tobytes()
        return data.decode("utf-8", "surrogateescape")

    def texts(self, name: str, positions: NDArray[np.int64]) -> Iterator[str]:
        """Strings of a text column at positions [n]."""
        ends, data = self[f"{name}_ends"], self[f"{name}_bytes"].data
        for part in np.array_split(positions, len(positions) // _TEXTS + 1):
            starts = np.where(part > 0, ends[part - 1], 0)
            for start, end in zip(starts.tolist(), ends[part].tolist(), strict=True):
                yield str(data[start:end], "utf-8", "surrogateescape")


class Series:
    """One modality of a shard set: `rgb`, `diff1`, `flow1`, `flow8g2`, ...; `columns` are those of the index."""

    def __init__(self, folder: Path, name: str, columns: Columns, remote: RemoteSet | None = None) -> None:
        self.name, self._folder, self.columns = name, folder, columns
        self._shard, self._offset = columns["shard"], columns["offset"]
        self._first, self._size = columns["first"], columns["size"]
        self.codec = columns.codec
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._maps: OrderedDict[int, Mapped] = OrderedDict()
        self._lock = threading.Lock()
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
        """[n] source frame numbers of the stored members of a video, ascending."""
        frames: NDArray[np.int32] = self.columns["frame"][self._first[row] : self._first[row + 1]]
        return frames

    def scale(self, row: int) -> NDArray[np.float32]:
        """[n] pixels of the stored field that code 127 stands for (flow series only).

        Raises:
            ShardError: this series has no scale.
        """
        if "scale" not in self.columns:
            raise ShardError(f"{self._folder}: {self.name} has no scale: it is no flow series")
        return self._of_members("scale", row)

    def scores(self, row: int) -> NDArray[np.float32]:
        """[n] motion-differential scores of a video's fields; NaN where they are too small to have any.

        Raises:
            ShardError: this series has no scores, with the command that makes one that has.
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
        """Encoded payloads of a video's members at `positions` of `kept(row)`; safe in threads.

        Raises:
            ShardError: no such member, or the shard ends before it.
        """
        first, last = int(self._first[row]), int(self._first[row + 1])
        sizes = self._size[first:last].astype(np.int64)
        starts = np.cumsum(BLOCK + -(-sizes // BLOCK) * BLOCK) - -(-sizes // BLOCK) * BLOCK + self._begin(row)
        file = self._open(row)
        payloads = []
        for position in positions:
            if not 0 <= position < last - first:
                raise ShardError(f"{self._folder}: video {row} has {last - first} {self.name} members, not {position}")
            data = os.pread(file.fileno(), int(sizes[position]), int(starts[position]))
            if len(data) != sizes[position]:
                raise ShardError(f"{file.name}: cut short: it ends before byte {starts[position] + sizes[position]}")
            payloads.append(data)
        return payloads

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """[n, h, w, 3] frames of a video of a raw series where they lie in the shard file: nothing is copied.

        The file is mapped into memory, so that only what is looked at is read; read-only; safe in threads.

        Raises:
            ShardError: the series is not raw, its frames are not of the size that the index has, or the shard was cut.
        """
        mapped, views = self._map(row)
        if mapped.size() != len(mapped):  # to look beyond the end of the file would kill the process
            path = shard_path(self._folder, self.name, int(self._shard[row]))
            raise ShardError(f"{path}: cut short or replaced while it was open; copy it again")
        if row not in views:
            views[row] = self._view(mapped, row)
        return views[row]

    def fetch(self, rows: NDArray[np.int64]) -> None:
        """Have these videos at hand before they are read: of a set at a URL in its cache, all on their way at once."""
        if self._videos is not None:
            self._videos.fetch(rows.tolist())

    def close(self) -> None:
        """Close its files; what `pixels` gave stays valid."""
        if self._videos is not None:
            self._videos.close()
        with self._lock:
            self._maps.clear()  # unmapped when the last view of them is gone
            while self._files:
                self._files.popitem()[1].close()

    def _view(self, mapped: mmap.mmap, row: int) -> NDArray[np.uint8]:
        first, last = int(self._first[row]), int(self._first[row + 1])
        height, width = self.sizes[row].tolist()
        size = height * width * 3
        start, stride = self._begin(row) + BLOCK, BLOCK + padded(size)
        fits = self._begin(row) + (last - first) * stride <= len(mapped)
        if self.codec != "raw" or not fits or (self._size[first:last] != size).any():
            raise ShardError(f"{self._folder}: the {self.name} members of video {row} are no raw {height}x{width}")
        shape, strides = (last - first, height, width, 3), (stride, width * 3, 3, 1)
        return np.ndarray(shape, np.uint8, mapped, start, strides)  # keeps the map alive

    def _map(self, row: int) -> Mapped:
        """The file of a video in memory, and the views that were made of it so far."""
        number = int(self._shard[row]) if self._videos is None else row
        found = self._maps.get(number)
        if found is None:
            found = mmap.mmap(self._open(row).fileno(), 0, access=mmap.ACCESS_READ), {}
        with self._lock:
            found = self._maps.setdefault(number, found)  # another thread may have been faster
            self._maps.move_to_end(number)
            if len(self._maps) > OPEN_FILES:
                self._maps.popitem(last=False)
        return found

    def _begin(self, row: int) -> int:
        """Where a video begins in the file that `_open` gives: its shard, or a file of its own."""
        return int(self._offset[row]) if self._videos is None else 0

    def _open(self, row: int) -> BinaryIO:
        number = int(self._shard[row])
        if number < 0:
            raise ShardError(f"{self._folder}: video {row} failed in preprocessing; see failures.jsonl")
        if self._videos is not None:
            return self._videos.open(row)
        with self._lock:
            file = self._files.pop(number, None) or shard_path(self._folder, self.name, number).open("rb")
            self._files[number] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)  # closed when the last thread that reads it lets go
            return file


class ShardSet:
    """A folder of shards, opened for random access; a context manager.

    Attributes:
        path: The folder; of a set at a URL, the URL as a path.
        files: The folder of its small files, which is another one where the set is at a URL.
        dataset: Name, classes and splits.
        labels: [V] class number of each catalogue row.
        groups: [V] group number, -1 where none is known.
        frames: [V] decoded source frames, 0 where the video failed.
        fps: [V] source frames a second.
    """

    def __init__(self, path: Path, dataset: Dataset, hashes: dict[str, str], remote: RemoteSet | None = None) -> None:
        self.path, self.dataset, self._hashes, self._remote = path, dataset, hashes, remote
        self.files = remote.files if remote else path
        self._series: dict[str, Series] = {}
        self._videos = self._columns("videos")
        self.labels: NDArray[np.int32] = self._videos["label"]
        self.groups: NDArray[np.int32] = self._videos["group"]
        self.frames: NDArray[np.int32] = self._videos["frames"]
        self.fps: NDArray[np.float32] = self._videos["fps"]
        self.num_videos = len(self.labels)

    @staticmethod
    def open(path: str | Path | RemoteShards, *, series: Iterable[str] = ("rgb",)) -> ShardSet:
        """Open a shard set, in a folder or at a URL, and check the shards of the named series.

        Raises:
            ShardError: it is missing, unfinished, truncated, swapped, damaged or of another format.
            RemoteError: it is at a URL which refuses us or does not answer.
        """
        if not isinstance(path, RemoteShards) and is_url(str(path)):
            path = RemoteShards(str(path))
        remote = RemoteSet(path) if isinstance(path, RemoteShards) else None
        try:
            shards = ShardSet._opened(remote.path if remote else Path(str(path)), remote)
            for name in series:
                shards.series(name)
        except BaseException:
            if remote:
                remote.close()
            raise
        return shards

    @staticmethod
    def _opened(path: Path, remote: RemoteSet | None) -> ShardSet:
        """A shard set of which no series is looked at yet; `path` is what messages call it."""
        if remote is None:
            check_folder(path)
        files = remote.files if remote else path
        attributes = read_attributes(files, path)
        return ShardSet(path, Dataset.load(files / "dataset.json"), attributes["columns"], remote)

    @property
    def series_names(self) -> list[str]:
        """Names of the stored series, `rgb` first."""
        names = {key.split("/")[1] for key in self._hashes if key.startswith("series/")}
        return sorted(names, key=lambda name: (name != "rgb", name))

    @property
    def sha256(self) -> str:
        """Hash of the stored frames."""
        return self.series("rgb").sha256

    def series(self, name: str) -> Series:
        """One modality.

        Raises:
            ShardError: it was not made, with the option that makes it; or one of its shards is damaged.
        """
        if name not in self._series:
            if name not in self.series_names:
                raise ShardError(
                    f'{self.path} holds no "{name}" ({suggest(name, self.series_names)}); motion is added by '
                    + adding_command(name, self.path)
                )
            self._series[name] = Series(self.path, name, self.columns(name), self._remote)
        return self._series[name]

    def columns(self, name: str) -> Columns:
        """The index columns of a series, its shards not looked at."""
        return self._columns(f"series/{name}")

    def _columns(self, group: str) -> Columns:
        return Columns(self.path / INDEX, group, self._hashes, self._remote)

    def damaged_columns(self) -> Iterator[str]:
        """One line for each damaged column of the index."""
        for group in sorted({path.rpartition("/")[0] for path in self._hashes}):
            yield from self._columns(group).damaged()

    def name(self, row: int) -> str:
        """Original name of a video."""
        return self._videos.text("name", row)

    def names(self, rows: NDArray[np.int64]) -> Iterator[str]:
        """Original names of many videos, much faster than one by one."""
        return self._videos.texts("name", rows)

    def group_name(self, row: int) -> str | None:
        """Name of a video's group; None where none is known."""
        group = int(self.groups[row])
        return None if group < 0 else self._videos.text("group_name", group)

    def split_rows(self, split: str) -> NDArray[np.int64]:
        """Catalogue rows of a split that were stored, ascending.

        Raises:
            ShardError: there is no such split.
        """
        if split not in self.dataset.splits:
            known = suggest(split, self.dataset.splits) if self.dataset.splits else "it has none"
            raise ShardError(
                f'{self.path} has no split "{split}" ({known}); see --splits, --holdout of fsar-preprocess'
            )
        wanted = self.dataset.splits[split]
        classes = set(wanted.classes)
        numbers = [i for i, name in enumerate(self.dataset.classes) if name in classes]
        rows = np.flatnonzero(np.isin(self.labels, numbers) & (self.frames > 0))
        if wanted.videos is not None:
            listed = set(wanted.videos)
            rows = rows[np.fromiter((name in listed for name in self.names(rows)), np.bool_, len(rows))]
        return rows

    def close(self) -> None:
        """Close its files."""
        for series in self._series.values():
            series.close()
        if self._remote is not None:
            self._remote.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
