"""A shard set at a URL: its index, and its videos one by one, through a cache on the disk that is checked."""

from __future__ import annotations

import json
import tempfile
import threading
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards_spec.cache import Cache, parse_bytes
from shards_spec.column_files import read_column
from shards_spec.errors import ShardError
from shards_spec.files import json_line
from shards_spec.index import INDEX, PINNED, column_sha256, shard_path
from shards_spec.remote import Remote, RemotePath
from shards_spec.tar import BLOCK, padded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from numpy.typing import NDArray

    from shards_spec.columns import Columns

CACHE_DIR, CACHE_SIZE = Path("~/.cache/fsar/shards"), "50GB"
AT_ONCE = 16  # requests: each waits for the store, not for us
OPEN_FILES = 256
SMALL = (f"{INDEX}/zarr.json", *PINNED)


@dataclass(frozen=True)
class RemoteShards:
    """Where a shard set at a URL lies, and the folder and size in bytes of the cache through which it is read."""

    url: str
    cache: Path = CACHE_DIR
    cache_bytes: int = field(default=parse_bytes(CACHE_SIZE))

    def __str__(self) -> str:
        """The URL."""
        return self.url


class RemoteSet:
    """The files of a shard set at a URL.

    Attributes:
        path: Its URL, as a path.
        files: A folder with copies of the small files, and of no shard; removed by `close`.
    """

    def __init__(self, place: RemoteShards) -> None:
        self.path = RemotePath(place.url)
        self._remote = Remote(place.url)
        self._cache = Cache(place.cache.expanduser(), place.cache_bytes)
        self._sizes = self._remote.sizes()
        if SMALL[0] not in self._sizes:
            raise ShardError(f"{place.url} has no {INDEX}: it is no shard set, or not all of it was copied there")
        self._folder = tempfile.TemporaryDirectory(prefix="fsar-index-")
        self.files = Path(self._folder.name)
        (self.files / INDEX).mkdir()
        for name in SMALL:
            if name in self._sizes:
                self._remote.fetch(name, self.files / name)

    def column(self, path: str, sha256: str) -> NDArray[Any]:
        """A column of the index: out of the cache, or copied there; what it holds is checked by the one who asks."""
        name = f"columns/{sha256}"
        file = self._cache.open(name)
        if file is not None:
            with file:
                column = _load(file)
            if column is not None and column_sha256(column) == sha256:
                return column
            self._cache.drop(name)
        column = self._download_column(path)
        if column_sha256(column) == sha256:
            kind = json_line([column.dtype.str, column.shape])
            self._cache.add(name, kind + b"\n" + column.tobytes()).close()
        return column

    def _download_column(self, path: str) -> NDArray[Any]:
        folder = f"{INDEX}/{path}/"
        names = [name for name in self._sizes if name.startswith(folder)]
        with tempfile.TemporaryDirectory(prefix="fsar-column-") as place, ThreadPoolExecutor(AT_ONCE) as pool:
            targets = [Path(place) / name for name in names]
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
            for _ in pool.map(self._remote.fetch, names, targets):
                pass
            return read_column(Path(place) / folder)[0]

    def videos(self, series: str, columns: Columns) -> RemoteVideos:
        """The videos of a series.

        Raises:
            ShardError: one of its shards is missing or not of the size that the index has.
        """
        sizes = zip(columns["shard_number"].tolist(), columns["shard_bytes"].tolist(), strict=True)
        for number, size in sizes:
            path = shard_path(self.path, series, number)
            found = self._sizes.get(path.name)
            if found != size:
                held = "is missing" if found is None else f"has {found} bytes where the index has {size}"
                raise ShardError(f"{path} {held}; copy it there again")
        return RemoteVideos(self.path, self._remote, self._cache, series, columns)

    def close(self) -> None:
        """Remove the copies of the small files."""
        self._folder.cleanup()


class RemoteVideos:
    """The pictures of single videos of a series, as files of a cache; safe in threads.

    A video is the unit, not a shard: an episode reads tens of videos of as many shards. Every picture is held against
    the CRC-32 that the index has, when it arrives and when this process opens its file for the first time.
    """

    def __init__(self, path: Path, remote: Remote, cache: Cache, series: str, columns: Columns) -> None:
        self._path, self._remote, self._cache, self._series, self._columns = path, remote, cache, series, columns
        columns["crc32"]  # loaded here, once, and not by many threads
        # sets of equal shards share what is kept of them
        self._folder = f"{series}-{columns.sha256('shard_sha256')[:16]}"
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._sound: set[int] = set()
        self._lock = threading.Lock()

    def open(self, row: int) -> BinaryIO:
        """The file that holds the pictures of a video, as its shard does from `offset` on.

        Raises:
            ShardError: what arrives is not what the index has.
            RemoteError: the store refuses us or does not answer.
        """
        with self._lock:
            file = self._files.pop(row, None)
        file = file or self._cached(row) or self._download(row)
        with self._lock:
            file = self._files.setdefault(row, file)
            self._files.move_to_end(row)
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)  # closed when the last thread that reads it lets go
        return file

    def fetch(self, rows: Iterable[int]) -> None:
        """Have these videos in the cache, as many of them on their way at once as a store likes; errors as `open`."""
        with self._lock:
            missing = [row for row in dict.fromkeys(rows) if row not in self._files]
        if missing:
            with ThreadPoolExecutor(min(AT_ONCE, len(missing))) as pool:
                for _ in pool.map(self.open, missing):
                    pass

    def close(self) -> None:
        """Close its files."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def _cached(self, row: int) -> BinaryIO | None:
        file = self._cache.open(self._name(row))
        if file is None or row in self._sound:
            return file
        if self._fault(row, file.read()) is None:
            self._sound.add(row)
            return file
        file.close()
        self._cache.drop(self._name(row))
        return None

    def _download(self, row: int) -> BinaryIO:
        columns, number = self._columns, int(self._columns["shard"][row])
        start = int(columns["offset"][row])
        stop = start + sum(BLOCK + padded(size) for _, size, _ in self._pictures(row))
        path = shard_path(self._path, self._series, number)
        for _ in range(2):  # a second time, should the first have been changed on its way
            data = self._remote.read(path.name, start, stop)
            fault = self._fault(row, data)
            if fault is None:
                self._sound.add(row)
                return self._cache.add(self._name(row), data)
        raise ShardError(f"{path}: {fault}: not what the index has; copy it there again")

    def _fault(self, row: int, data: bytes) -> str | None:
        """What is wrong with the pictures of a video; None where all is well."""
        end, view = 0, memoryview(data)
        for position, size, crc in self._pictures(row):
            payload = view[position : position + size]
            if len(payload) != size or zlib.crc32(payload) != crc:
                return f"damaged in the {size} bytes from {int(self._columns['offset'][row]) + position} on"
            end = position + padded(size)
        return None if len(data) == end else "cut short"

    def _pictures(self, row: int) -> Iterator[tuple[int, int, int]]:
        """Place in the file, size and CRC-32 of each picture of a video."""
        columns = self._columns
        first, last = int(columns["first"][row]), int(columns["first"][row + 1])
        before = 2 * int(self._stored[row])  # cls and json of the videos before it
        sizes, crcs = columns["size"][first:last].tolist(), columns["crc32"][first + before : last + before].tolist()
        position = BLOCK
        for size, crc in zip(sizes, crcs, strict=True):
            yield position, size, crc
            position += BLOCK + padded(size)

    @cached_property
    def _stored(self) -> NDArray[np.int64]:
        """[V + 1] stored videos before each row."""
        return np.concatenate([[0], np.cumsum(self._columns["shard"] >= 0)])

    def _name(self, row: int) -> str:
        return f"{self._folder}/{row // 1000:05d}/{row:08d}"


def _load(file: BinaryIO) -> NDArray[Any] | None:
    """A column out of the cache; None where the file is no column."""
    try:
        kind, shape = json.loads(file.readline())
        return np.frombuffer(file.read(), np.dtype(kind)).reshape(shape)
    except (ValueError, TypeError):
        return None
