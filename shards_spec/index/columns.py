"""The columns of the index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards_spec.errors import FsarError, RemoteError, ShardError
from shards_spec.files import DiskError
from shards_spec.index.build import column_sha256
from shards_spec.index.checks import check_loaded, check_texts
from shards_spec.index.files import read_column

Fetch = Callable[[str, str], NDArray[Any]]
_TEXTS = 1 << 16  # strings at once whose places are held as Python numbers


class Columns:
    """The columns of one group of `index.zarr`, each loaded whole and checked against its hash on first use.

    Args:
        index: The folder `index.zarr`, as messages name it.
        group: `videos`, or `series/NAME`.
        hashes: Path of each column in the index -> SHA-256.
        fetch: Reads a column, from its path and hash, where the index is not on disk.
    """

    def __init__(self, index: Path, group: str, hashes: dict[str, str], fetch: Fetch | None = None) -> None:
        self._index, self._group, self._hashes, self._fetch = index, group, hashes, fetch
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
                column = read_column(self._index / path, alone=False)[0]
            else:
                column = self._fetch(path, self._hashes[path])
        except (RemoteError, DiskError):
            raise
        except FsarError as error:
            raise ShardError(f"{error}; run fsar-shards reindex") from error
        if column_sha256(column) != self._hashes.get(path):
            raise ShardError(f"{self._index}/{path} is damaged; run fsar-shards reindex")
        check_loaded(self._index / path, path.rpartition("/")[2], column)
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

    def _text(self, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The bytes of a text column and where each string ends, checked once."""
        data, ends = self[f"{name}_bytes"], self[f"{name}_ends"]
        if name not in self._checked:
            check_texts(f"{self._index}/{self._group}/{name}", data, ends, paths=name == "name")
            self._checked.add(name)
        return data, ends

    def text(self, name: str, position: int) -> str:
        """One string of a text column."""
        data, ends = self._text(name)
        start = int(ends[position - 1]) if position else 0
        return data[start : int(ends[position])].tobytes().decode("utf-8", "surrogateescape")

    def texts(self, name: str, positions: NDArray[np.int64]) -> Iterator[str]:
        """Strings of a text column at positions [n]."""
        column, ends = self._text(name)
        data = column.data
        for part in np.array_split(positions, len(positions) // _TEXTS + 1):
            starts = np.where(part > 0, ends[part - 1], 0)
            for start, end in zip(starts.tolist(), ends[part].tolist(), strict=True):
                yield str(data[start:end], "utf-8", "surrogateescape")


def sum_starts(columns: Columns) -> NDArray[np.int64]:
    """[V] where the sums of each video begin in `crc32`, which holds those of cls and json behind its pictures'."""
    stored = columns["shard"] >= 0  # [V]
    starts: NDArray[np.int64] = columns["first"][:-1] + 2 * (np.cumsum(stored) - stored)
    return starts
