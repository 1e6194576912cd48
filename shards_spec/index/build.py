"""Build `index.zarr`: the columns by which any frame of any video is read.

Columns are filled shard by shard, in arrays of four to eight bytes a value: as Python's own numbers
millions of pictures would fill the memory.  `layout` has their names, types and shapes.
"""

from __future__ import annotations

import math
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from shards_spec.errors import ShardError
from shards_spec.files import disk_errors, sync_folder, sync_tree, temporary
from shards_spec.index.layout import (
    INDEX,
    SERIES,
    VIDEOS,
    Column,
    attributes_sha256,
    column_sha256,
    list_shards,
    pinned_hashes,
    shard_path,
)
from shards_spec.schema import FORMAT, PER_PICTURE, Dataset, Failure
from shards_spec.summary import Sample, Summary, load_or_make

Arrays: TypeAlias = "dict[str, array[Any]]"  # `array` takes no brackets at run time
Columns = dict[str, NDArray[Any]]

MOST_GAPS = 1 << 20  # rows that neither tars nor failures name: an impossible row would fill the memory
CHUNK = 1 << 20  # rows; columns are read whole: few, large chunks
CODEC = ("codec_bytes", "codec_ends")  # written where the pictures are raw


def _empty(columns: Mapping[str, Column]) -> Arrays:
    """Make an empty array of the type of each column."""
    return {name: array(np.dtype(column.dtype).char) for name, column in columns.items()}


def _add_text(arrays: Arrays, name: str, text: str) -> None:
    """Add one string to a text column: its bytes, and where they end."""
    arrays[f"{name}_bytes"].frombytes(text.encode("utf-8", "surrogateescape"))
    arrays[f"{name}_ends"].append(len(arrays[f"{name}_bytes"]))


def _texts(name: str, texts: Iterable[str]) -> Arrays:
    """Make the arrays of a text column."""
    arrays: Arrays = {f"{name}_bytes": array("B"), f"{name}_ends": array("q")}
    for text in texts:
        _add_text(arrays, name, text)
    return arrays


def _view(values: array[Any], column: Column) -> NDArray[Any]:
    """View the values as a column; they are not copied."""
    sides = [side for side in column.shape[1:] if isinstance(side, int)]
    return np.frombuffer(values, column.dtype).reshape(-1, *sides)


class VideoColumns:
    """The columns of `videos`, filled row by row; failed videos and gaps are filled in between."""

    def __init__(self, dataset: Dataset, failures: Mapping[int, Failure]) -> None:
        self._class_number = {label: i for i, label in enumerate(dataset.classes)}
        self._failed = [failures[row] for row in sorted(failures, reverse=True)]  # the next one last
        self._arrays = _empty(VIDEOS)
        self._group_number = {"": -1}  # groups in the order of their first videos
        self._gaps = 0

    def add(self, summary: Summary) -> None:
        """Add the videos of the next shard of rgb."""
        for sample in summary.samples:
            self._fail_below(sample.row)
            info = sample.info
            self._add_names(info["name"], info["label"], info["group"])
            self._add_numbers(info["frames"], info["fps"], info["source_size"])

    def columns(self) -> Columns:
        """Return the columns, when all is added."""
        self._fail_below(1 + max((failure.row for failure in self._failed), default=-1))
        names = sorted(self._group_number.keys() - {""})
        arrays = self._arrays | _texts("group_name", names)
        columns = {name: _view(arrays[name], column) for name, column in VIDEOS.items()}
        # Groups were counted in the order of their first videos: number them in sorted order.
        number = np.empty(len(self._group_number), np.int32)
        number[[self._group_number[name] for name in ("", *names)]] = np.arange(-1, len(names))
        return columns | {"group": number[columns["group"]]}

    def _fail_below(self, row: int) -> None:
        """Fill the rows up to `row` with failed videos, and with nothing where nothing is known."""
        while len(self._arrays["label"]) < row:
            while self._failed and self._failed[-1].row < len(self._arrays["label"]):
                self._failed.pop()  # stored since
            if self._failed and self._failed[-1].row == len(self._arrays["label"]):
                failure = self._failed.pop()
                self._add_names(failure.name, failure.label, failure.group)
            else:
                self._add_gap(row)
            self._add_numbers(0, 0.0, (0, 0))

    def _add_gap(self, row: int) -> None:
        self._gaps += 1
        if self._gaps > MOST_GAPS:
            raise ShardError(
                f"nothing is known of over {MOST_GAPS:,} videos before row {row}: copy failures.jsonl and all tars"
            )
        self._add_names("", None, None)

    def _add_names(self, name: str, label: str | None, group: str | None) -> None:
        _add_text(self._arrays, "name", name)
        self._arrays["label"].append(-1 if label is None else self._class_number.get(label, -1))
        self._arrays["group"].append(self._group_number.setdefault(group or "", len(self._group_number) - 1))

    def _add_numbers(self, frames: int, fps: float, source_size: Iterable[int]) -> None:
        self._arrays["frames"].append(frames)
        self._arrays["fps"].append(fps)
        self._arrays["source_size"].extend(source_size)


class SeriesColumns:
    """The columns of one series: the places of its videos and of their pictures."""

    def __init__(self) -> None:
        # Columns of all rows have a value for each stored video, until `columns` spreads them.
        self._arrays = _empty({name: SERIES[name] for name in SERIES if name not in ("first", *CODEC)})
        self._row, self._kept = array("q"), array("q")  # of each stored video: row, number of pictures
        self._frames = array("q")  # frames that it had when it was decoded, stored or not
        self._codecs: set[str] = set()

    @property
    def rows(self) -> NDArray[np.int64]:
        """[n] rows of the stored videos, ascending."""
        return np.frombuffer(self._row, np.int64)

    @property
    def frames(self) -> NDArray[np.int64]:
        """[n] frames that each stored video had when it was decoded."""
        return np.frombuffer(self._frames, np.int64)

    def add(self, summary: Summary, number: int, *, path: Path) -> None:
        """Add the next shard.

        Raises:
            ShardError: it holds another codec, or a video that belongs into an earlier shard.
        """
        self._arrays["shard_number"].append(number)
        self._arrays["shard_bytes"].append(summary.size)
        self._arrays["shard_sha256"].frombytes(bytes.fromhex(summary.sha256))
        for sample in summary.samples:
            if self._row and sample.row <= self._row[-1]:
                raise ShardError(
                    f"{path} holds video {sample.row}, which belongs into a shard before it: was it renamed?"
                )
            try:
                self._add(sample, number)
            except (TypeError, ValueError, OverflowError) as error:
                raise ShardError(f"{path}: what is said of video {sample.row} cannot be ({error})") from error
        if len(self._codecs) > 1:
            raise ShardError(f"{path} holds pictures of another codec than those before it; make the series again")

    def _add(self, sample: Sample, number: int) -> None:
        arrays, info = self._arrays, sample.info
        self._row.append(sample.row)
        self._kept.append(len(sample.frames))
        self._frames.append(info["frames"])
        self._codecs.add(sample.codec)
        arrays["shard"].append(number)
        arrays["offset"].append(sample.offset)
        arrays["tail"].fromlist(sample.sizes[-2:])
        arrays["stored_size"].extend(info["size"])
        arrays["size"].fromlist(sample.sizes[:-2])
        arrays["frame"].fromlist(sample.frames)
        arrays["crc32"].fromlist(sample.crc32)
        for score in [score for score in PER_PICTURE if score in arrays]:
            if score in info:
                arrays[score].extend(math.nan if value is None else value for value in info[score])
            else:
                del arrays[score]  # a column is of all samples or of none

    def columns(self, count: int) -> Columns:
        """Return the columns of `count` catalogue rows."""
        arrays = self._arrays | (_texts("codec", ["raw"]) if self._codecs == {"raw"} else {})
        columns: Columns = {}
        for name, column in SERIES.items():
            if name == "first":
                kept = self._by_row(np.frombuffer(self._kept, np.int64), count, 0)
                columns[name] = np.concatenate([[0], np.cumsum(kept)])
            elif name in arrays and (self._row or not column.optional):
                values = _view(arrays[name], column)
                columns[name] = self._by_row(values, count, column.gap) if column.shape[0] == "V" else values
        return columns

    def _by_row(self, values: NDArray[Any], count: int, gap: int) -> NDArray[Any]:
        """Spread [n, ...] values of the stored videos over [count, ...] rows of the catalogue."""
        column = np.full((count, *values.shape[1:]), gap, values.dtype)
        column[self.rows] = values
        return column


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
    """Yield the groups of the index one by one: memory holds one series at a time."""
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
    """Read the summaries of the shards of a series; add their videos to `videos` too."""
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
    """Refuse a series of other videos than rgb, which has rows [n] and frames [n]."""
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


def drop_index(folder: Path) -> None:
    """Remove the index, durably.

    Called before anything that it describes changes.  Without it the set counts as unfinished.
    """
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
    # zarr writes a column to memory, and `_move` to the disk: the threads of zarr's own store for
    # disks go on writing after one of them has failed.
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
        del columns, values  # before the generator makes the next ones
    attributes: dict[str, Any] = {"format": FORMAT, "columns": hashes, "files": pinned_hashes(folder)}
    root.update_attributes(attributes | {"sha256": attributes_sha256(attributes)})
    _move(files, building, final)
    with disk_errors(final):
        sync_tree(building)
        drop_index(folder)
        building.replace(final)
        sync_folder(folder)


def _move(files: dict[str, Buffer], building: Path, final: Path) -> None:
    """Write files, by their paths in the index, to the unfinished index, and forget them."""
    with disk_errors(final):
        for name, content in files.items():
            path = building / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.to_bytes())
    files.clear()
