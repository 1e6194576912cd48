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

from shards_spec.column_files import read_column
from shards_spec.errors import FsarError, ShardError, suggest
from shards_spec.files import read_json
from shards_spec.index import INDEX, attributes_sha256, column_sha256, list_shards, pinned_hashes, shard_path
from shards_spec.index_checks import check_layout, check_loaded, check_series, check_texts, check_videos
from shards_spec.motion import adding_command
from shards_spec.schema import FORMAT, Dataset
from shards_spec.shard_check import check_shards
from shards_spec.sums import PictureSums
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

    def __init__(self, index: Path, group: str, hashes: dict[str, str]) -> None:
        self._index, self._group, self._hashes = index, group, hashes
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
            column = read_column(self._index / path)[0]
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


class Series:
    """One modality of a shard set: `rgb`, `diff1`, `flow1`, `flow8g2`, ...; `columns` are those of the index.

    With `check`, no picture is handed out whose CRC-32 is not the one that was written.
    """

    def __init__(self, folder: Path, name: str, columns: Columns, *, check: bool = False) -> None:
        self.name, self._folder, self.columns = name, folder, columns
        self._shard, self._offset = columns["shard"], columns["offset"]
        self._first, self._size = columns["first"], columns["size"]
        self.codec = columns.codec
        self._sums = PictureSums(columns) if check else None
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._maps: OrderedDict[int, Mapped] = OrderedDict()
        self._lock = threading.Lock()
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
            ShardError: no such member, the shard ends before it, or (with check) its bytes are not those written.
        """
        first, last = int(self._first[row]), int(self._first[row + 1])
        sizes = self._size[first:last].astype(np.int64)
        starts = np.cumsum(BLOCK + -(-sizes // BLOCK) * BLOCK) - -(-sizes // BLOCK) * BLOCK + int(self._offset[row])
        file = self._open(int(self._shard[row]), row)
        payloads = []
        for position in positions:
            if not 0 <= position < last - first:
                raise ShardError(f"{self._folder}: video {row} has {last - first} {self.name} members, not {position}")
            data = os.pread(file.fileno(), int(sizes[position]), int(starts[position]))
            if len(data) != sizes[position]:
                raise ShardError(f"{file.name}: cut short: it ends before byte {starts[position] + sizes[position]}")
            if self._sums:
                self._sums.check(row, position, data, where=file.name)
            payloads.append(data)
        return payloads

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """[n, h, w, 3] frames of a video of a raw series where they lie in the shard file: nothing is copied.

        The file is mapped into memory, so that only what is looked at is read; read-only; safe in threads.

        Raises:
            ShardError: the series is not raw, its frames are not of the size that the index has, or the shard was cut.
        """
        mapped, views = self._map(int(self._shard[row]), row)
        if mapped.size() != len(mapped):  # to look beyond the end of the file would kill the process
            path = shard_path(self._folder, self.name, int(self._shard[row]))
            raise ShardError(f"{path}: cut short or replaced while it was open; copy it again")
        if row not in views:
            views[row] = self._view(mapped, row)
        return views[row]

    def check_pixels(self, row: int, positions: Iterable[int]) -> None:
        """With check, refuse frames of `pixels(row)` whose bytes are not those written: ShardError."""
        if self._sums:
            video, where = self.pixels(row), str(shard_path(self._folder, self.name, int(self._shard[row])))
            for position in positions:
                self._sums.check(row, position, video[position].data, where=where)

    def close(self) -> None:
        """Close its files; what `pixels` gave stays valid."""
        with self._lock:
            self._maps.clear()  # unmapped when the last view of them is gone
            while self._files:
                self._files.popitem()[1].close()

    def _view(self, mapped: mmap.mmap, row: int) -> NDArray[np.uint8]:
        first, last = int(self._first[row]), int(self._first[row + 1])
        height, width = self.sizes[row].tolist()
        size = height * width * 3
        start, stride = int(self._offset[row]) + BLOCK, BLOCK + padded(size)
        fits = start + (last - first) * stride <= len(mapped)
        if self.codec != "raw" or not fits or (self._size[first:last] != size).any():
            raise ShardError(f"{self._folder}: the {self.name} members of video {row} are no raw {height}x{width}")
        shape, strides = (last - first, height, width, 3), (stride, width * 3, 3, 1)
        return np.ndarray(shape, np.uint8, mapped, start, strides)  # keeps the map alive

    def _map(self, number: int, row: int) -> Mapped:
        """A shard in memory, and the views that were made of it so far."""
        found = self._maps.get(number)
        if found is None:
            found = mmap.mmap(self._open(number, row).fileno(), 0, access=mmap.ACCESS_READ), {}
        with self._lock:
            found = self._maps.setdefault(number, found)  # another thread may have been faster
            self._maps.move_to_end(number)
            if len(self._maps) > OPEN_FILES:
                self._maps.popitem(last=False)
        return found

    def _open(self, number: int, row: int) -> BinaryIO:
        if number < 0:
            raise ShardError(f"{self._folder}: video {row} failed in preprocessing; see failures.jsonl")
        with self._lock:
            file = self._files.pop(number, None) or shard_path(self._folder, self.name, number).open("rb")
            self._files[number] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)  # closed when the last thread that reads it lets go
            return file


class ShardSet:
    """A folder of shards, opened for random access; a context manager.

    Attributes:
        path: The folder.
        dataset: Name, classes and splits.
        labels: [V] class number of each catalogue row.
        groups: [V] group number, -1 where none is known.
        frames: [V] decoded source frames, 0 where the video failed.
        fps: [V] source frames a second.
    """

    def __init__(self, path: Path, dataset: Dataset, hashes: dict[str, str], *, check: bool = False) -> None:
        self.path, self.dataset, self._hashes, self._check = path, dataset, hashes, check
        self._series: dict[str, Series] = {}
        self._videos = Columns(path / INDEX, "videos", hashes)
        self.labels: NDArray[np.int32] = self._videos["label"]
        self.groups: NDArray[np.int32] = self._videos["group"]
        self.frames: NDArray[np.int32] = self._videos["frames"]
        self.fps: NDArray[np.float32] = self._videos["fps"]
        self.num_videos = len(self.labels)

    @staticmethod
    def open(path: str | Path, *, series: Iterable[str] = ("rgb",), check: bool = False) -> ShardSet:
        """Open a shard set and check the shards of the named series; with `check` every picture that is read, too.

        Raises:
            ShardError: it is missing, unfinished, truncated, swapped, damaged or of another format.
        """
        path = Path(path)
        if not path.is_dir():
            raise ShardError(f"{path} is no folder; make shards with: fsar-preprocess NAME --videos DIR --out {path}")
        if not (path / INDEX).is_dir():
            unfinished = bool(list_shards(path)) or (path / "plan.json").exists()
            hint = (
                "preprocessing is unfinished: type the same fsar-preprocess command again (or run fsar-shards reindex)"
                if unfinished
                else "it is no shard set: make one with fsar-preprocess"
            )
            raise ShardError(f"{path} has no {INDEX}; {hint}")
        attributes = _attributes(path)
        if pinned_hashes(path) != attributes["files"]:
            raise ShardError(
                f"{path}: dataset.json, plan.json or failures.jsonl changed; run fsar-shards reindex {path}"
            )
        dataset = Dataset.load(path / "dataset.json")
        check_layout(path / INDEX, attributes["columns"])
        shards = ShardSet(path, dataset, attributes["columns"], check=check)
        check_videos(path / INDEX, shards._videos, len(dataset.classes))
        for name in series:
            shards.series(name)
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
            columns = self.columns(name)
            check_series(f"{self.path / INDEX}/series/{name}", columns, self.frames)
            self._series[name] = Series(self.path, name, columns, check=self._check)
        return self._series[name]

    def columns(self, name: str) -> Columns:
        """The index columns of a series, its shards not looked at."""
        return Columns(self.path / INDEX, f"series/{name}", self._hashes)

    def damaged_columns(self) -> Iterator[str]:
        """One line for each damaged column of the index."""
        for group in sorted({path.rpartition("/")[0] for path in self._hashes}):
            yield from Columns(self.path / INDEX, group, self._hashes).damaged()

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _attributes(path: Path) -> dict[str, Any]:
    """What the index says of itself: format, the hashes of its columns and of the small files."""
    where = path / INDEX
    raw = read_json(where / "zarr.json")
    attributes = raw.get("attributes") if isinstance(raw, dict) else None
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise ShardError(f"{where} is not of format {FORMAT}; run fsar-shards reindex {path}")
    whole = {"columns", "files", "sha256"} <= set(attributes) and isinstance(attributes["columns"], dict)
    if not whole or attributes["sha256"] != attributes_sha256(attributes):
        raise ShardError(f"{where} is damaged; run fsar-shards reindex {path}")
    return attributes
