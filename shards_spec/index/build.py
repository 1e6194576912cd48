"""Build `index.zarr`: the columns by which any frame of any video is read.

Columns are filled shard by shard; what is held are arrays of four to eight bytes a value.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from shards_spec.errors import ShardError
from shards_spec.files import disk_errors, json_line, sync_folder, sync_tree, temporary
from shards_spec.schema import FORMAT, Dataset, Failure
from shards_spec.summary import Sample, Summary, load_or_make

Columns = dict[str, NDArray[Any]]

MOST_GAPS = 1 << 20  # rows of which neither tars nor failures say anything: an impossible row would fill the memory
SCORES = ("scale", "magnitude", "motion_score")  # of each picture, in the samples of some series


class Text:
    """A column of strings: UTF-8 bytes end to end, and where each ends."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("q")
        for value in values:
            self.append(value)

    def append(self, value: str) -> None:
        """Add one string."""
        self._bytes += value.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def columns(self, name: str) -> Columns:
        """The two columns."""
        return {f"{name}_bytes": np.frombuffer(self._bytes, np.uint8), f"{name}_ends": _column(self._ends, np.int64)}


class VideoColumns:
    """What is known of each video, row by row; those that failed and gaps are filled in between."""

    def __init__(self, dataset: Dataset, failures: Mapping[int, Failure]) -> None:
        self._class_number = {label: i for i, label in enumerate(dataset.classes)}
        self._failed = [failures[row] for row in sorted(failures, reverse=True)]  # the next one last
        self._names, self._group_number = Text(), {"": -1}  # groups in the order of their first videos
        self._label, self._frames, self._group = array("i"), array("i"), array("i")
        self._fps, self._source = array("f"), array("i")
        self._gaps = 0

    def add(self, summary: Summary) -> None:
        """Add the videos of the next shard of rgb."""
        for sample in summary.samples:
            self._fail_below(sample.row)
            info = sample.info
            self._append(info["name"], info["label"], info["group"])
            self._frames.append(info["frames"])
            self._fps.append(info["fps"])
            self._source.extend(info["source_size"])

    def columns(self) -> Columns:
        """The columns, when all is added."""
        self._fail_below(1 + max((failure.row for failure in self._failed), default=-1))
        names = sorted(self._group_number.keys() - {""})
        number = np.empty(len(self._group_number), np.int32)
        number[[self._group_number[name] for name in ("", *names)]] = np.arange(-1, len(names))
        return {
            "label": _column(self._label, np.int32),
            "frames": _column(self._frames, np.int32),
            "fps": _column(self._fps, np.float32),
            "source_size": _column(self._source, np.int32).reshape(-1, 2),
            "group": number[_column(self._group, np.int32)],
            **self._names.columns("name"),
            **Text(names).columns("group_name"),
        }

    def _fail_below(self, row: int) -> None:
        """Fill the rows up to `row` with failed videos and, where nothing is known, with nothing."""
        while len(self._label) < row:
            while self._failed and self._failed[-1].row < len(self._label):
                self._failed.pop()  # stored since
            if self._failed and self._failed[-1].row == len(self._label):
                failure = self._failed.pop()
                self._append(failure.name, failure.label, failure.group)
            else:
                self._add_gap(row)
            self._frames.append(0)
            self._fps.append(0.0)
            self._source.extend((0, 0))

    def _add_gap(self, row: int) -> None:
        self._gaps += 1
        if self._gaps > MOST_GAPS:
            raise ShardError(
                f"nothing is known of over {MOST_GAPS:,} videos before row {row}: copy failures.jsonl and all tars"
            )
        self._append("", None, None)

    def _append(self, name: str, label: str | None, group: str | None) -> None:
        self._names.append(name)
        self._label.append(-1 if label is None else self._class_number.get(label, -1))
        self._group.append(self._group_number.setdefault(group or "", len(self._group_number) - 1))


class SeriesColumns:
    """Where the videos of one series and their pictures are."""

    def __init__(self) -> None:
        self._row, self._shard, self._offset = array("q"), array("i"), array("q")
        self._kept, self._tail, self._stored_size = array("q"), array("I"), array("i")
        self._size, self._frame, self._crc32 = array("I"), array("i"), array("I")
        self._scores = {score: array("f") for score in SCORES}
        self._frames = array("q")  # of the video, whatever is stored of it
        self._numbers, self._bytes, self._sha256 = array("i"), array("q"), bytearray()
        self._codecs: set[str] = set()

    @property
    def rows(self) -> NDArray[np.int64]:
        """[n] rows of the stored videos, ascending."""
        return _column(self._row, np.int64)

    @property
    def frames(self) -> NDArray[np.int64]:
        """[n] frames that each stored video had when it was decoded."""
        return _column(self._frames, np.int64)

    def add(self, summary: Summary, number: int, *, path: Path) -> None:
        """Add the next shard.

        Raises:
            ShardError: it holds a video that belongs before those of the shards added already, or another codec.
        """
        self._numbers.append(number)
        self._bytes.append(summary.size)
        self._sha256 += bytes.fromhex(summary.sha256)
        for sample in summary.samples:
            if self._row and sample.row <= self._row[-1]:
                raise ShardError(
                    f"{path} holds video {sample.row}, which belongs into a shard before it: was it renamed?"
                )
            self._shard.append(number)
            try:
                self._add(sample)
            except (TypeError, ValueError, OverflowError) as error:
                raise ShardError(f"{path}: what is said of video {sample.row} cannot be ({error})") from error
        if len(self._codecs) > 1:
            raise ShardError(f"{path} holds pictures of another codec than those before it; make the series again")

    def _add(self, sample: Sample) -> None:
        self._row.append(sample.row)
        self._offset.append(sample.offset)
        self._kept.append(len(sample.frames))
        self._tail.fromlist(sample.sizes[-2:])
        self._size.fromlist(sample.sizes[:-2])
        self._frame.fromlist(sample.frames)
        self._crc32.fromlist(sample.crc32)
        self._stored_size.extend(sample.info["size"])
        self._frames.append(sample.info["frames"])
        self._codecs.add(sample.codec)
        for score in [score for score in self._scores if score not in sample.info]:
            del self._scores[score]  # a column is of all samples or of none
        for score, values in self._scores.items():
            values.extend(math.nan if value is None else value for value in sample.info[score])

    def columns(self, count: int) -> Columns:
        """The columns of `count` catalogue rows."""
        columns: Columns = {
            "shard": self._by_row(_column(self._shard, np.int32), count, -1),
            "offset": self._by_row(_column(self._offset, np.int64), count, 0),
            "first": np.concatenate([[0], np.cumsum(self._by_row(_column(self._kept, np.int64), count, 0))]),
            "tail": self._by_row(_column(self._tail, np.uint32).reshape(-1, 2), count, 0),
            "stored_size": self._by_row(_column(self._stored_size, np.int32).reshape(-1, 2), count, 0),
            "size": _column(self._size, np.uint32),
            "frame": _column(self._frame, np.int32),
            "crc32": _column(self._crc32, np.uint32),
            "shard_number": _column(self._numbers, np.int32),
            "shard_bytes": _column(self._bytes, np.int64),
            "shard_sha256": np.frombuffer(self._sha256, np.uint8).reshape(-1, 32),
        }
        if self._codecs == {"raw"}:
            columns |= Text(["raw"]).columns("codec")
        return columns | {score: _column(values, np.float32) for score, values in self._scores.items() if self._row}

    def _by_row(self, values: NDArray[Any], count: int, absent: int) -> NDArray[Any]:
        column = np.full((count, *values.shape[1:]), absent, values.dtype)
        column[self.rows] = values
        return column


def _column(values: array[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """A view of the values, not a copy."""
    return np.frombuffer(values, dtype)


INDEX = "index.zarr"
CHUNK = 1 << 20  # columns are read whole: few, large chunks
SHARD_NAME = re.compile(r"(?P<series>[a-z0-9]+)-(?P<number>\d{6})\.tar")
PINNED = ("dataset.json", "failures.jsonl", "plan.json")  # files whose hash the index carries


def shard_path(folder: Path, series: str, number: int) -> Path:
    """Path of shard `number` of a series."""
    return folder / f"{series}-{number:06d}.tar"


def list_shards(folder: Path) -> dict[str, list[int]]:
    """Numbers of the shards in a folder, by series; `rgb` first, the others by name."""
    found: dict[str, list[int]] = {}
    for path in folder.glob("*.tar"):
        match = SHARD_NAME.fullmatch(path.name)
        if match:
            found.setdefault(match["series"], []).append(int(match["number"]))
    return {series: sorted(found[series]) for series in sorted(found, key=lambda s: (s != "rgb", s))}


def build_index(folder: Path) -> None:
    """Write `index.zarr` from the tars (their summaries are made again where needed).

    Raises:
        ShardError: no shards, a damaged tar, or series that do not hold the same videos.
        DiskError: the disk is full.
    """
    shards = list_shards(folder)
    if "rgb" not in shards:
        raise ShardError(f"{folder} holds no rgb-*.tar; make shards with fsar-preprocess")
    _write(folder, _column_groups(folder, shards))


def _column_groups(folder: Path, shards: Mapping[str, list[int]]) -> Iterator[tuple[str, Columns]]:
    """The groups of the index, one after the other: only one series at a time is held in memory."""
    videos = VideoColumns(Dataset.load(folder / "dataset.json"), Failure.load_all(folder / "failures.jsonl"))
    rgb = _read_series(folder, "rgb", shards["rgb"], videos)
    columns = videos.columns()
    count, rows, frames = len(columns["label"]), rgb.rows, rgb.frames
    yield "videos", columns
    del videos, columns
    yield "series/rgb", rgb.columns(count)
    del rgb
    for name in [name for name in shards if name != "rgb"]:
        series = _read_series(folder, name, shards[name])
        _check_rows(folder, name, series, rows=rows, frames=frames)
        yield f"series/{name}", series.columns(count)


def _read_series(folder: Path, name: str, numbers: list[int], videos: VideoColumns | None = None) -> SeriesColumns:
    """Read the summaries of a series' shards, for the columns of the videos too where these are given."""
    series = SeriesColumns()
    for number in numbers:
        path = shard_path(folder, name, number)
        summary = load_or_make(path)
        series.add(summary, number, path=path)
        if videos is not None:
            videos.add(summary)
    return series


def _check_rows(
    folder: Path, name: str, series: SeriesColumns, *, rows: NDArray[np.int64], frames: NDArray[np.int64]
) -> None:
    """Refuse a series that was not made from the same videos as rgb, whose rows [n] and frames [n] are given."""
    if not np.array_equal(series.rows, rows):
        raise ShardError(
            f"{folder}: {name} and rgb do not hold the same videos; preprocessing is unfinished: "
            "type the same fsar-preprocess command again"
        )
    changed = rows[series.frames != frames]
    if len(changed):
        raise ShardError(
            f"{folder}: {name} and rgb hold {len(changed)} videos of which the file changed between them "
            f"(the first: row {changed[0]}); delete {name}-*.tar and type the same fsar-preprocess command again"
        )


def column_sha256(column: NDArray[Any]) -> str:
    """Hash of one column: type, shape and content."""
    digest = hashlib.sha256(f"{column.dtype.str} {column.shape}\n".encode())
    digest.update(np.ascontiguousarray(column).view(np.uint8).data if column.size else b"")
    return digest.hexdigest()


def pinned_hashes(folder: Path) -> dict[str, str]:
    """Hashes of the small files beside the index."""
    found = [folder / name for name in PINNED if (folder / name).is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def attributes_sha256(attributes: Mapping[str, Any]) -> str:
    """Hash of what the index says of itself: with it and the columns' hashes no bit of the index can change unseen."""
    return hashlib.sha256(json_line({key: attributes[key] for key in ("format", "columns", "files")})).hexdigest()


def drop_index(folder: Path) -> None:
    """Remove the index, durably: called before anything that it describes changes; the set counts as unfinished."""
    final = folder / INDEX
    if final.exists():
        with disk_errors(final):
            old = temporary(folder / "old-index")
            shutil.rmtree(old, ignore_errors=True)
            final.replace(old)  # a folder cannot be removed in one step, but it can lose its name in one
            sync_folder(folder)
            shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, groups: Iterable[tuple[str, Columns]]) -> None:
    final = folder / INDEX
    building = temporary(final)
    hashes: dict[str, str] = {}
    # By way of memory, a column at a time: the threads of zarr's own store go on writing after one of them has failed.
    files: dict[str, Buffer] = {}
    root = zarr.open_group(MemoryStore(files), mode="w", zarr_format=3)
    with disk_errors(final):
        shutil.rmtree(building, ignore_errors=True)
    for name, columns in groups:
        hashes |= {f"{name}/{column}": column_sha256(values) for column, values in columns.items()}
        group = root.create_group(name)
        for column, values in columns.items():
            chunks = (min(max(len(values), 1), CHUNK), *values.shape[1:])
            group.create_array(column, data=values, chunks=chunks)
            _move(files, building, final)
        del columns, values  # before the next ones are made
    attributes: dict[str, Any] = {"format": FORMAT, "columns": hashes, "files": pinned_hashes(folder)}
    root.update_attributes(attributes | {"sha256": attributes_sha256(attributes)})
    _move(files, building, final)
    with disk_errors(final):
        sync_tree(building)
        drop_index(folder)
        building.replace(final)
        sync_folder(folder)


def _move(files: dict[str, Buffer], building: Path, final: Path) -> None:
    """Write files, named from the index's folder, to the unfinished index, and forget them."""
    with disk_errors(final):
        for name, content in files.items():
            path = building / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.to_bytes())
    files.clear()
