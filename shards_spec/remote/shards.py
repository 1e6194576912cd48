"""Read a shard set at a URL, video by video, through a checked cache on the disk."""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from shards_spec.errors import FsarError, ShardError
from shards_spec.files import OPEN_FILES, Recent, disk_errors, json_line
from shards_spec.index.checks import check_layout
from shards_spec.index.columns import Columns, crc_starts, payload_starts, read_column
from shards_spec.index.layout import CHUNK_FILE, COLUMN_PATH, INDEX, PINNED, Layout, column_sha256, shard_path
from shards_spec.remote.cache import Cache, parse_bytes
from shards_spec.remote.store import Remote, RemotePath
from shards_spec.schema import padded

CACHE_DIR, CACHE_SIZE = Path("~/.cache/fsar/shards"), "50GB"
AT_ONCE = 16  # requests: each waits for the store, not for us
SMALL = (f"{INDEX}/zarr.json", *PINNED)


@dataclass(frozen=True)
class RemoteShards:
    """The URL of a shard set, and folder and size in bytes of its cache."""

    url: str
    cache: Path = CACHE_DIR
    cache_bytes: int = field(default=parse_bytes(CACHE_SIZE))

    def __str__(self) -> str:
        """Return the URL."""
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
        with disk_errors(Path(tempfile.gettempdir())):
            self._folder = tempfile.TemporaryDirectory(prefix="fsar-index-")
        self.files = Path(self._folder.name)
        try:
            self._fetch({name: self.files / name for name in SMALL if name in self._sizes})
        except BaseException:
            self.close()
            raise

    def _fetch(self, targets: Mapping[str, Path]) -> None:
        """Copy files to this machine, several at once."""
        with disk_errors(Path(tempfile.gettempdir())), ThreadPoolExecutor(AT_ONCE) as pool:
            for target in targets.values():
                target.parent.mkdir(parents=True, exist_ok=True)
            for _ in pool.map(self._remote.fetch, targets, targets.values()):
                pass

    def check_layout(self, columns: Mapping[str, str]) -> None:
        """Fetch and check the metadata of all columns of the index.

        Raises:
            ShardError: a column is missing, of another type or shape, or too large for its bytes.
            RemoteError: the store refuses us or does not answer.
        """
        names = [f"{INDEX}/{path}/zarr.json" for path in columns if COLUMN_PATH.fullmatch(path)]
        self._fetch({name: self.files / name for name in names if name in self._sizes})
        try:
            check_layout(self.files / INDEX, columns, lambda path, _: self._stored_bytes(path))
        except FsarError as error:
            raise ShardError(str(error).replace(str(self.files), str(self.path))) from error

    def _stored_bytes(self, column: Path) -> int:
        return sum(self._sizes[name] for name in self._chunks(str(column.relative_to(self.files))))

    def _chunks(self, folder: str) -> list[str]:
        """Return the names of the chunks of a column.

        Other names in a store could lead anywhere on our disk.
        """
        start = f"{folder}/"
        return [name for name in self._sizes if name.startswith(start) and CHUNK_FILE.fullmatch(name[len(start) :])]

    def column(self, path: str, sha256: str) -> NDArray[Any]:
        """Return a column of the index through the cache; the caller checks its hash."""
        name, layout = f"columns/{sha256}", Layout.load(self.files / INDEX / path)
        file = self._cache.open(name)
        if file is not None:
            with file:
                column = _load(file)
            same = column is not None and (column.dtype.name, column.shape) == (layout.dtype, layout.shape)
            if column is not None and same and column_sha256(column) == sha256:
                return column
            self._cache.drop(name)
        column = self._download_column(path)
        if column_sha256(column) == sha256:
            kind = json_line([column.dtype.str, column.shape])
            self._cache.add(name, kind + b"\n" + column.tobytes()).close()
        return column

    def _download_column(self, path: str) -> NDArray[Any]:
        folder = f"{INDEX}/{path}"
        with (
            disk_errors(Path(tempfile.gettempdir())),
            tempfile.TemporaryDirectory(prefix="fsar-column-") as place,
        ):
            self._fetch({name: Path(place) / name for name in self._chunks(folder)})
            (Path(place) / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(self.files / folder / "zarr.json", Path(place) / folder)  # the one that was checked
            return read_column(Path(place) / folder, check_size=False)[0]

    def videos(self, series: str, columns: Columns) -> RemoteVideos:
        """Return the videos of a series.

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

    The cache holds videos, not shards: an episode reads tens of videos of as many shards.
    Pictures are checked against the index when they arrive, and when this process first opens them.
    """

    def __init__(self, path: Path, remote: Remote, cache: Cache, series: str, columns: Columns) -> None:
        self._path, self._remote, self._cache, self._series, self._columns = path, remote, cache, series, columns
        columns["crc32"]  # loaded here, once, and not by many threads
        self._starts = crc_starts(columns)
        # A name by content: sets of equal shards share the videos in the cache.
        self._folder = f"{series}-{columns.sha256('shard_sha256')[:16]}"
        self._files: Recent[int, BinaryIO] = Recent(OPEN_FILES)
        self._checked: set[int] = set()  # rows

    def open(self, row: int) -> BinaryIO:
        """Open the file of the pictures of a video: the bytes of its shard from `offset` on.

        Raises:
            ShardError: the pictures that arrive are not those of the index.
            RemoteError: the store refuses us or does not answer.
        """
        return self._files.get(row, lambda: self._cached(row) or self._download(row))

    def fetch(self, rows: Iterable[int]) -> None:
        """Fetch videos to the cache, many at once; errors as of `open`."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._files]
        if missing:
            with ThreadPoolExecutor(min(AT_ONCE, len(missing))) as pool:
                for _ in pool.map(self.open, missing):
                    pass

    def close(self) -> None:
        """Close its files."""
        for file in self._files.clear():
            file.close()

    def _cached(self, row: int) -> BinaryIO | None:
        file = self._cache.open(self._name(row))
        if file is None or row in self._checked:
            return file
        if self._fault(row, file.read()) is None:
            self._checked.add(row)
            return file
        file.close()
        self._cache.drop(self._name(row))
        return None

    def _download(self, row: int) -> BinaryIO:
        columns, number = self._columns, int(self._columns["shard"][row])
        start = int(columns["offset"][row])
        stop = start + max((position + padded(size) for position, size, _ in self._pictures(row)), default=0)
        path = shard_path(self._path, self._series, number)
        for _ in range(2):  # again, in case the first was changed on its way
            data = self._remote.read(path.name, start, stop)
            fault = self._fault(row, data)
            if fault is None:
                self._checked.add(row)
                return self._cache.add(self._name(row), data)
        raise ShardError(f"{path}: {fault}: not what the index has; copy it there again")

    def _fault(self, row: int, data: bytes) -> str | None:
        """Say why the pictures of a video are refused; None where all is well."""
        end, view = 0, memoryview(data)
        for position, size, crc in self._pictures(row):
            payload = view[position : position + size]
            if len(payload) != size or zlib.crc32(payload) != crc:
                return f"damaged in the {size} bytes from {int(self._columns['offset'][row]) + position} on"
            end = position + padded(size)
        return None if len(data) == end else "cut short"

    def _pictures(self, row: int) -> Iterator[tuple[int, int, int]]:
        """Yield place in the file, size and CRC-32 of each picture of a video."""
        columns = self._columns
        first, last = int(columns["first"][row]), int(columns["first"][row + 1])
        start = int(self._starts[row])
        sizes, crcs = columns["size"][first:last].astype(np.int64), columns["crc32"][start : start + last - first]
        yield from zip(payload_starts(sizes).tolist(), sizes.tolist(), crcs.tolist(), strict=True)

    def _name(self, row: int) -> str:
        return f"{self._folder}/{row // 1000:05d}/{row:08d}"


def _load(file: BinaryIO) -> NDArray[Any] | None:
    """Read a column from a file of the cache; return None where the file is no column."""
    try:
        kind, shape = json.loads(file.readline())
        return np.frombuffer(file.read(), np.dtype(kind)).reshape(shape)
    except (ValueError, TypeError):
        return None
