"""`index.zarr`: everything that is needed to read any frame of any video, as columns."""

from __future__ import annotations

import hashlib
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from shards_spec.errors import ShardError
from shards_spec.files import disk_errors, json_line, sync_file, sync_folder, temporary
from shards_spec.schema import FORMAT, Dataset, Failure
from shards_spec.summary import Summary, load_or_make

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Columns = dict[str, NDArray[Any]]

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
    loaded = {
        series: {number: load_or_make(shard_path(folder, series, number)) for number in numbers}
        for series, numbers in shards.items()
    }
    failures = Failure.load_all(folder / "failures.jsonl")
    dataset = Dataset.load(folder / "dataset.json")
    rows = _check_rows(folder, loaded)
    count = 1 + max([*rows, *failures], default=-1)
    columns = {"videos": _video_columns(count, loaded["rgb"].values(), failures, dataset)}
    for series, summaries in loaded.items():
        columns[f"series/{series}"] = _series_columns(count, summaries)
    _write(folder, columns)


def _check_rows(folder: Path, loaded: Mapping[str, Mapping[int, Summary]]) -> set[int]:
    """Refuse series that were not made from the same videos."""
    frames = {
        series: {s.row: s.info["frames"] for summary in shards.values() for s in summary.samples}
        for series, shards in loaded.items()
    }
    for series, held in frames.items():
        if held.keys() != frames["rgb"].keys():
            raise ShardError(
                f"{folder}: {series} and rgb do not hold the same videos; preprocessing is unfinished: "
                "type the same fsar-preprocess command again"
            )
        changed = [row for row in held if held[row] != frames["rgb"][row]]
        if changed:
            raise ShardError(
                f"{folder}: {series} and rgb hold {len(changed)} videos of which the file changed between them "
                f"(the first: row {changed[0]}); delete {series}-*.tar and type the same fsar-preprocess command again"
            )
    return set(frames["rgb"])


def _video_columns(count: int, rgb: Iterable[Summary], failures: dict[int, Failure], dataset: Dataset) -> Columns:
    names, groups = [""] * count, [""] * count
    labels = np.full(count, -1, np.int32)
    frames = np.zeros(count, np.int32)
    fps = np.zeros(count, np.float32)
    source = np.zeros((count, 2), np.int32)
    number = {label: i for i, label in enumerate(dataset.classes)}
    for summary in rgb:
        for sample in summary.samples:
            info, row = sample.info, sample.row
            names[row], groups[row] = info["name"], info["group"] or ""
            labels[row] = number.get(info["label"], -1)
            frames[row], fps[row], source[row] = info["frames"], info["fps"], info["source_size"]
    for row, failure in failures.items():
        names[row], groups[row] = failure.name, failure.group or ""
        labels[row] = number.get(failure.label, -1)
    group_names = sorted(set(groups) - {""})
    group_number = {name: i for i, name in enumerate(group_names)} | {"": -1}
    columns: Columns = {"label": labels, "frames": frames, "fps": fps, "source_size": source}
    columns["group"] = np.array([group_number[g] for g in groups], np.int32)
    return columns | text_columns("name", names) | text_columns("group_name", group_names)


def _series_columns(count: int, shards: Mapping[int, Summary]) -> Columns:
    samples = [(n, s) for n, summary in sorted(shards.items()) for s in summary.samples]
    shard, offset = np.full(count, -1, np.int32), np.zeros(count, np.int64)
    kept, tail = np.zeros(count, np.int64), np.zeros((count, 2), np.uint32)
    size = np.zeros((count, 2), np.int32)
    for number, s in samples:
        shard[s.row], offset[s.row], kept[s.row] = number, s.offset, len(s.frames)
        tail[s.row], size[s.row] = s.sizes[-2:], s.info["size"]
    columns: Columns = {
        "shard": shard,
        "offset": offset,
        "first": np.concatenate([[0], np.cumsum(kept)]),
        "tail": tail,
        "stored_size": size,
        "size": _flat((s.sizes[:-2] for _, s in samples), np.uint32),
        "frame": _flat((s.frames for _, s in samples), np.int32),
        "crc32": _flat((s.crc32 for _, s in samples), np.uint32),
        "shard_number": np.array(sorted(shards), np.int32),
        "shard_bytes": np.array([shards[n].size for n in sorted(shards)], np.int64),
        "shard_sha256": np.array([list(bytes.fromhex(shards[n].sha256)) for n in sorted(shards)], np.uint8),
    }
    codecs = {s.codec for _, s in samples}
    if len(codecs) > 1:
        raise ShardError(f"a series holds pictures of several codecs ({', '.join(sorted(codecs))}); make it again")
    if codecs == {"raw"}:
        columns |= text_columns("codec", ["raw"])
    for score in ("scale", "magnitude"):
        if samples and all(score in s.info for _, s in samples):
            columns[score] = _flat((s.info[score] for _, s in samples), np.float32)
    return columns


def _flat(parts: Iterable[list[Any]], dtype: type) -> NDArray[Any]:
    return np.array([value for part in parts for value in part], dtype)


def text_columns(name: str, values: list[str]) -> Columns:
    """A list of strings as two columns: UTF-8 bytes end to end, and where each ends."""
    encoded = [value.encode("utf-8", "surrogateescape") for value in values]
    ends = np.cumsum([len(e) for e in encoded], dtype=np.int64) if encoded else np.zeros(0, np.int64)
    return {f"{name}_bytes": np.frombuffer(b"".join(encoded), np.uint8), f"{name}_ends": ends}


def column_sha256(column: NDArray[Any]) -> str:
    """Hash of one column: type, shape and content."""
    digest = hashlib.sha256(f"{column.dtype.str} {column.shape}\n".encode())
    digest.update(np.ascontiguousarray(column).view(np.uint8).data if column.size else b"")
    return digest.hexdigest()


def pinned_hashes(folder: Path) -> dict[str, str]:
    """Hashes of the small files beside the index."""
    found = [folder / name for name in PINNED if (folder / name).exists()]
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


def _write(folder: Path, groups: Mapping[str, Columns]) -> None:
    final = folder / INDEX
    building = temporary(final)
    with disk_errors(final):
        shutil.rmtree(building, ignore_errors=True)
        hashes = {
            f"{group}/{name}": column_sha256(values)
            for group, columns in groups.items()
            for name, values in columns.items()
        }
        attributes: dict[str, Any] = {"format": FORMAT, "columns": hashes, "files": pinned_hashes(folder)}
        attributes["sha256"] = attributes_sha256(attributes)
        root = zarr.open_group(building, mode="w", zarr_format=3, attributes=attributes)
        for name, columns in groups.items():
            group = root.create_group(name)
            for column, values in columns.items():
                chunks = (min(max(len(values), 1), CHUNK), *values.shape[1:])
                group.create_array(column, data=values, chunks=chunks)
        _sync_tree(building)
        drop_index(folder)
        building.replace(final)
        sync_folder(folder)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)
    sync_folder(folder)
