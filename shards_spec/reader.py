"""Random access to a shard set: any frame of any video, by its catalogue row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from shards_spec.errors import ShardError, suggest
from shards_spec.files import is_url
from shards_spec.index.checks import check_folder, check_layout, check_series, check_videos, read_attributes
from shards_spec.index.columns import Columns
from shards_spec.index.layout import INDEX
from shards_spec.remote.shards import RemoteSet, RemoteShards
from shards_spec.schema import Dataset, adding_command
from shards_spec.series import Series


class ShardSet:
    """A folder of shards, opened for random access; a context manager.

    Attributes:
        path: The folder, or the URL of the set as a path.
        files: The folder of its small files; a copy of them where the set is at a URL.
        dataset: Name, classes and splits.
        labels: [V] class number of each catalogue row.
        groups: [V] group number, -1 where the group is not known.
        frames: [V] decoded source frames, 0 where the video failed.
        fps: [V] source frames a second.
    """

    def __init__(
        self,
        path: Path,
        dataset: Dataset,
        hashes: dict[str, str],
        *,
        remote: RemoteSet | None = None,
        check: bool = False,
    ) -> None:
        self.path, self.dataset, self._hashes, self._remote, self._check = path, dataset, hashes, remote, check
        self.files = remote.files if remote else path
        self._series: dict[str, Series] = {}
        self._videos = self._columns("videos")
        self.labels: NDArray[np.int32] = self._videos["label"]
        self.groups: NDArray[np.int32] = self._videos["group"]
        self.frames: NDArray[np.int32] = self._videos["frames"]
        self.fps: NDArray[np.float32] = self._videos["fps"]
        self.num_videos = len(self.labels)

    @staticmethod
    def open(path: str | Path | RemoteShards, *, series: Iterable[str] = ("rgb",), check: bool = False) -> ShardSet:
        """Open a shard set and check the shards of the named series.

        Args:
            path: A folder or a URL; `RemoteShards` names the cache of a URL too.
            series: Names of the series to check now; others are checked on first use.
            check: Compare the CRC-32 of every picture that is read.

        Raises:
            ShardError: it is missing, unfinished, truncated, swapped, damaged or of another format.
            RemoteError: it is at a URL that refuses us or does not answer.
        """
        if not isinstance(path, RemoteShards) and is_url(str(path)):
            path = RemoteShards(str(path))
        remote = RemoteSet(path) if isinstance(path, RemoteShards) else None
        try:
            shards = ShardSet._checked(remote.path if remote else Path(str(path)), remote, check=check)
            for name in series:
                shards.series(name)
        except BaseException:
            if remote:
                remote.close()
            raise
        return shards

    @staticmethod
    def _checked(path: Path, remote: RemoteSet | None, *, check: bool) -> ShardSet:
        """Open a shard set and check its index, but no series yet; `path` names it in messages."""
        if remote is None:
            check_folder(path)
        files = remote.files if remote else path
        attributes = read_attributes(files, path)
        dataset, hashes = Dataset.load(files / "dataset.json"), attributes["columns"]
        if remote is None:
            check_layout(path / INDEX, hashes)
        else:
            remote.check_layout(hashes)
        shards = ShardSet(path, dataset, hashes, remote=remote, check=check)
        check_videos(path / INDEX, shards._videos, len(dataset.classes))
        return shards

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
        """Return one modality; check its shards on first use.

        Raises:
            ShardError: it was not made, or a shard is damaged.
        """
        if name not in self._series:
            if name not in self.series_names:
                raise ShardError(
                    f'{self.path} holds no "{name}" ({suggest(name, self.series_names)}); motion is added by '
                    + adding_command(name, self.path)
                )
            columns = self.columns(name)
            check_series(f"{self.path / INDEX}/series/{name}", columns, self.frames)
            self._series[name] = Series(self.path, name, columns, remote=self._remote, check=self._check)
        return self._series[name]

    def columns(self, name: str) -> Columns:
        """Return the index columns of a series; its shards are not checked."""
        return self._columns(f"series/{name}")

    def _columns(self, group: str) -> Columns:
        return Columns(self.path / INDEX, group, self._hashes, self._remote.column if self._remote else None)

    def damaged_columns(self) -> Iterator[str]:
        """Yield one line for each damaged column of the index."""
        for group in sorted({path.rpartition("/")[0] for path in self._hashes}):
            yield from self._columns(group).damaged()

    def name(self, row: int) -> str:
        """Return the original name of a video."""
        return self._videos.text("name", row)

    def names(self, rows: NDArray[np.int64]) -> Iterator[str]:
        """Yield the original names of many videos, much faster than one by one."""
        return self._videos.texts("name", rows)

    def group_name(self, row: int) -> str | None:
        """Return the name of the group of a video; None where it is not known."""
        group = int(self.groups[row])
        return None if group < 0 else self._videos.text("group_name", group)

    def split_rows(self, split: str) -> NDArray[np.int64]:
        """Return the catalogue rows of a split that were stored, ascending.

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
