"""`index.zarr`: everything that is needed to read any frame of any video, as columns."""

from __future__ import annotations

import hashlib
import re
import shutil
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
from shards_spec.index.index_columns import Columns, SeriesColumns, VideoColumns
from shards_spec.schema import FORMAT, Dataset, Failure
from shards_spec.summary import load_or_make

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
