"""Read the columns of an index, in the one form that we write (see `layout`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Zstd
from numpy.typing import NDArray

from shards_spec.errors import FsarError, RemoteError, ShardError
from shards_spec.files import DiskError
from shards_spec.index.checks import check_texts, check_values
from shards_spec.index.layout import Layout, check_announced, chunk_files, column_sha256, stored_bytes
from shards_spec.schema import BLOCK

Fetch = Callable[[str, str], NDArray[Any]]
THREADS = 4  # that decode the chunks of a column
_TEXTS = 1 << 16  # strings at once whose places are held as Python numbers


def read_column(path: Path, *, check_size: bool = True) -> tuple[NDArray[Any], Mapping[str, Any]]:
    """Read the array in a folder, and its attributes; check its metadata first.

    Args:
        path: The folder.
        check_size: Compare the bytes that it announces with those on disk.  For columns of an
            index this is off: `checks.check_layout` compares all of them together.

    Raises:
        ShardError: it is damaged, of another form, or announces far more than it holds.
    """
    layout = Layout.load(path)
    if check_size:
        check_announced(layout.nbytes, stored_bytes(path, layout), path)
    column, files = np.zeros(layout.shape, layout.dtype), chunk_files(path, len(layout.shape))
    if len(files) == 1:  # as most columns: a thread would cost more than it gives
        _read_chunk(column, layout, *files.items())
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda item: _read_chunk(column, layout, item), files.items()))
    return column, layout.attributes


def _read_chunk(column: NDArray[Any], layout: Layout, item: tuple[int, Path]) -> None:
    number, file = item
    rows = column[number * layout.chunk : (number + 1) * layout.chunk]
    if not len(rows):  # beyond the last
        return
    try:
        _fill(rows, file.read_bytes(), layout)
    except OSError as error:
        raise ShardError(f"{file} cannot be read ({error.strerror})") from error
    except (RuntimeError, ValueError) as error:
        raise ShardError(f"{file} is damaged ({error})") from error


def _fill(rows: NDArray[Any], data: bytes, layout: Layout) -> None:
    """Decode a chunk into its rows.

    The last chunk is longer than its rows, and goes through a buffer.
    """
    size = layout.chunk * layout.row_bytes
    place = rows.reshape(-1).view(np.uint8)
    whole = place if len(place) == size else np.zeros(size, np.uint8)
    if layout.packed:
        Zstd().decode(data, out=whole)  # into memory of the announced size: it refuses more than fits
    elif len(data) == size:
        whole[:] = np.frombuffer(data, np.uint8)
    else:
        raise ValueError(f"{len(data)} bytes where {size} are needed")
    if whole is not place:
        place[:] = whole[: len(place)]


class Columns:
    """The columns of one group of `index.zarr`; each is loaded whole and checked on first use.

    Args:
        index: The folder `index.zarr`, as messages name it.
        group: `videos`, or `series/NAME`.
        hashes: Path of each column in the index -> SHA-256.
        fetch: Read a column, from its path and hash, where the index is not on disk.
    """

    def __init__(self, index: Path, group: str, hashes: dict[str, str], fetch: Fetch | None = None) -> None:
        self._index, self._group, self._hashes, self._fetch = index, group, hashes, fetch
        self.where = f"{index}/{group}"  # for messages
        self._loaded: dict[str, NDArray[Any]] = {}
        self._checked: set[str] = set()  # text columns

    def __contains__(self, name: str) -> bool:
        return f"{self._group}/{name}" in self._hashes

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._loaded:
            self._loaded[name] = self._load(f"{self._group}/{name}")
        return self._loaded[name]

    def _load(self, path: str) -> NDArray[Any]:
        try:
            if self._fetch is None:
                column = read_column(self._index / path, check_size=False)[0]
            else:
                column = self._fetch(path, self._hashes[path])
        except (RemoteError, DiskError):
            raise
        except FsarError as error:
            raise ShardError(f"{error}; run fsar-shards reindex") from error
        if column_sha256(column) != self._hashes.get(path):
            raise ShardError(f"{self._index}/{path} is damaged; run fsar-shards reindex")
        check_values(self._index / path, path, column)
        return column

    def damaged(self) -> Iterator[str]:
        """Yield one line for each column that cannot be read or is not as it was written."""
        for path in self._hashes:
            group, _, name = path.rpartition("/")
            if group == self._group:
                try:
                    self[name]
                except ShardError as error:
                    yield str(error)

    def sha256(self, name: str) -> str:
        """Return the hash of a column."""
        return self._hashes[f"{self._group}/{name}"]

    @property
    def codec(self) -> str:
        """Codec of the pictures of a series: "jpeg" or "raw"."""
        return self.text("codec", 0) if "codec_ends" in self else "jpeg"

    def _text(self, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the bytes of a text column and where each string ends; check them once."""
        data, ends = self[f"{name}_bytes"], self[f"{name}_ends"]
        if name not in self._checked:
            check_texts(f"{self.where}/{name}", data, ends, paths=name == "name")
            self._checked.add(name)
        return data, ends

    def text(self, name: str, position: int) -> str:
        """Return one string of a text column."""
        data, ends = self._text(name)
        start = int(ends[position - 1]) if position else 0
        return data[start : int(ends[position])].tobytes().decode("utf-8", "surrogateescape")

    def texts(self, name: str, positions: NDArray[np.int64]) -> Iterator[str]:
        """Yield the strings of a text column at positions [n]."""
        column, ends = self._text(name)
        data = column.data  # a memoryview: slices of it make no arrays
        for part in np.array_split(positions, len(positions) // _TEXTS + 1):
            starts = np.where(part > 0, ends[part - 1], 0)
            for start, end in zip(starts.tolist(), ends[part].tolist(), strict=True):
                yield str(data[start:end], "utf-8", "surrogateescape")


def crc_starts(columns: Columns) -> NDArray[np.int64]:
    """Return [V] where the CRC-32 of each video begin in the column `crc32`.

    `crc32` has a number for each member, `first` counts pictures.  So each stored video before
    shifts the place by two, for its `cls` and `json`.

    Raises:
        ShardError: the column has not one number for each member.
    """
    stored = columns["shard"] >= 0  # [V]
    if len(columns["crc32"]) != len(columns["size"]) + 2 * stored.sum():
        raise ShardError(f"{columns.where}/crc32 has not one number for each member; run fsar-shards reindex")
    starts: NDArray[np.int64] = columns["first"][:-1] + 2 * (np.cumsum(stored) - stored)
    return starts


def payload_starts(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the payloads of consecutive members begin, from the first header.

    No offsets are stored: a header is one tar block, and each payload is padded to whole blocks.

    Args:
        sizes: [n] bytes of the payloads.

    Returns:
        [n] bytes before each.
    """
    lengths = -(-sizes // BLOCK) * BLOCK  # `schema.padded` of each
    starts: NDArray[np.int64] = np.cumsum(BLOCK + lengths) - lengths
    return starts
