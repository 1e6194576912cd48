"""Check that a shard set is whole and that its index is consistent with itself and with its shards.

An index may come from others, and a few bytes of it can announce any amount of memory.  So nothing
is read before its announcement is checked, in this order:

1. folder and attributes: `check_folder`, `read_attributes`;
2. metadata of all columns: `check_layout`;
3. values of each column, when it is loaded: `check_values`, `check_texts`;
4. columns against each other: `check_videos`, `check_series`;
5. the shards: `check_shards`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shards_spec.errors import ShardError
from shards_spec.files import read_json
from shards_spec.index.layout import (
    COLUMN_PATH,
    INDEX,
    Layout,
    attributes_sha256,
    check_announced,
    columns_of,
    list_shards,
    pinned_hashes,
    shard_path,
    stored_bytes,
)
from shards_spec.schema import BLOCK, FORMAT, archive_size, path_fault, quoted, row_of_key, sample_key, text_fault
from shards_spec.tar import parse_header

MOST_SHARDS = 1_000_000  # six digits
ROWS_AT_ONCE = 1 << 14
# Parts of a name that can do harm: in a path, and the UTF-8 of the controls U+0080 to U+009F
CLIMBING, CONTROL = (b"../", b"/.."), re.compile(rb"\xc2[\x80-\x9f]")
_THREADS, _AT_ONCE = 8, 64
_CHECKSUM = slice(148, 156)  # the field of a tar header; it counts as blanks in its own sum


class Table(Protocol):
    """Columns by name."""

    def __getitem__(self, name: str, /) -> NDArray[Any]:
        """Return the column of that name."""


def check_folder(path: Path) -> None:
    """Refuse a folder that is no finished shard set.

    Raises:
        ShardError: with the command that makes or finishes one.
    """
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


def read_attributes(files: Path, path: Path) -> dict[str, Any]:
    """Read the attributes of an index: format, hashes of columns and of the small files.

    Args:
        files: Folder of the small files.
        path: Names the set in messages.

    Raises:
        ShardError: the index is damaged or of another format, or the small files changed.
    """
    where = path / INDEX
    raw = read_json(files / INDEX / "zarr.json")
    attributes = raw.get("attributes") if isinstance(raw, dict) else None
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise ShardError(f"{where} is not of format {FORMAT}; run fsar-shards reindex {path}")
    whole = {"columns", "files", "sha256"} <= set(attributes) and isinstance(attributes["columns"], dict)
    if not whole or attributes["sha256"] != attributes_sha256(attributes):
        raise ShardError(f"{where} is damaged; run fsar-shards reindex {path}")
    if pinned_hashes(files) != attributes["files"]:
        raise ShardError(f"{path}: dataset.json, plan.json or failures.jsonl changed; run fsar-shards reindex {path}")
    return attributes


def check_layout(
    index: Path, columns: Mapping[str, Any], bytes_of: Callable[[Path, Layout], int] = stored_bytes
) -> None:
    """Check the columns of an index by their metadata only: no content is read.

    Args:
        index: The folder `index.zarr`.
        columns: Path in the index -> hash, as its attributes have them.
        bytes_of: Return the stored bytes of a column, from its folder and layout.

    Raises:
        ShardError: a column is missing, of another type or shape, or too large for its bytes.
    """
    groups: dict[str, dict[str, Layout]] = {"videos": {}, "series/rgb": {}}
    stored = 0
    for path in columns:
        match = COLUMN_PATH.fullmatch(path)
        if match is None:
            raise ShardError(f'{index} names the column "{path[:80]!a}", which is none of ours')
        layout = Layout.load(index / path)
        groups.setdefault(match["group"], {})[match["name"]] = layout
        stored += bytes_of(index / path, layout)
    # Compare all columns together: frame numbers, which begin anew with each video, shrink
    # thousandfold, but CRC-32 do not shrink.
    check_announced(sum(each.nbytes for held in groups.values() for each in held.values()), stored, index)
    rows: dict[str, int] = {}
    for group, held in groups.items():
        sides = _check_group(index, group, held, rows)
        rows = {"V": sides["V"]}


def _check_group(index: Path, group: str, held: Mapping[str, Layout], sides: dict[str, int]) -> dict[str, int]:
    """Compare the layouts of one group with our columns.

    Args:
        index: The folder `index.zarr`.
        group: Name of the group.
        held: Layouts by the names of the columns.
        sides: Letters of shapes that other groups have fixed -> their numbers.

    Returns:
        All letters of the group.
    """
    for name, column in columns_of(group).items():
        layout = held.get(name)
        if layout is None:
            if not column.optional:
                raise ShardError(f"{index}/{group} lacks the column {name}; run fsar-shards reindex")
            continue
        shape = column.shape
        if len(layout.shape) == len(shape):
            pairs = zip(shape, layout.shape, strict=True)
            shape = tuple(sides.setdefault(side, found) if isinstance(side, str) else side for side, found in pairs)
        if (layout.dtype, layout.shape) != (column.dtype, shape):
            raise ShardError(
                f"{index}/{group}/{name} announces {layout.dtype} {list(layout.shape)} where {column.dtype} "
                f"{list(shape)} is needed; run fsar-shards reindex"
            )
    if sides.get("V + 1", sides["V"] + 1) != sides["V"] + 1:
        raise ShardError(
            f"{index}/{group}/first announces {sides['V + 1']} rows of {sides['V']} videos; run fsar-shards reindex"
        )
    return sides


def check_values(path: Path | str, name: str, values: NDArray[Any]) -> None:
    """Check the values of a column against its own limits.

    Args:
        path: Names the column in messages.
        name: Its path in the index.
        values: Its content.

    Raises:
        ShardError: a value lies outside.
    """
    group, _, last = name.rpartition("/")
    column = columns_of(group).get(last)
    if column is not None and _outside(values, *column.limits, nan=column.nan):
        low, high = column.limits
        allowed = f"outside {low} to {high}" if values.dtype.kind in "iu" else "that cannot be"
        raise ShardError(f"{path} holds numbers {allowed}; run fsar-shards reindex")


def _outside(values: NDArray[Any], low: float, high: float, *, nan: bool = False) -> bool:
    """Tell whether a value lies outside [low, high]; NaN counts as outside unless `nan`."""
    if not values.size or (low, high) == (-np.inf, np.inf):
        return False
    if nan:
        return bool((values < low).any() or (values > high).any())  # NaN is neither
    # No temporary array: there may be 32 million values.  NaN is the least of its column, and
    # compares false.
    return not bool(low <= values.min() and values.max() <= high)


def check_texts(path: str, data: NDArray[np.uint8], ends: NDArray[np.int64], *, paths: bool) -> None:
    """Check a column of strings: where each ends, and that no string can do harm as a name.

    Args:
        path: Names the column in messages.
        data: [n] UTF-8 bytes of all strings, end to end.
        ends: Where each string ends.
        paths: The strings are names of videos, not of groups.

    Raises:
        ShardError: ends that do not rise, or such a name.
    """
    bounds = np.concatenate([[0], ends])
    _require(bool((np.diff(bounds) >= 0).all()) and bounds[-1] == len(data), path, "has strings that overlap")
    # Check all bytes at once, without a Python string for each name.  Honest columns pass here.
    # A column that does not may still be honest (`a/..x.avi`): then check each of its strings.
    raw = data.tobytes()
    suspect = bool(((data < 32) | (data == 127)).any()) or CONTROL.search(raw) is not None
    if paths and not suspect:
        starts = bounds[:-1][np.diff(bounds) > 0]
        suspect = bool((data[starts] == ord("/")).any()) or any(part in raw for part in CLIMBING)
    if suspect:
        _check_each(path, raw, bounds.tolist(), paths=paths)


def _check_each(path: str, raw: bytes, bounds: list[int], *, paths: bool) -> None:
    """Check every string by itself."""
    for start, end in pairwise(bounds):
        text = raw[start:end].decode("utf-8", "surrogateescape")
        fault = path_fault(text) if paths and text else text_fault(text)
        if fault:
            raise ShardError(f"{path} has the name {quoted(text)}, which {fault}")


def check_videos(index: Path, columns: Table, classes: int) -> None:
    """Check the class and group of each video; there are `classes` classes.

    Raises:
        ShardError: a number stands for none.
    """
    for name, count in (("label", classes), ("group", len(columns["group_name_ends"]))):
        if _outside(columns[name], -1, count - 1):
            raise ShardError(f"{index}/videos/{name} holds numbers outside -1 to {count - 1}; run fsar-shards reindex")


def check_series(where: str, columns: Table, frames: NDArray[np.int32]) -> None:
    """Check that the samples of a series follow each other without gaps and fill their shards.

    Args:
        where: Names the series in messages.
        columns: Its columns.
        frames: [V] frames of each video, 0 where it failed.

    Raises:
        ShardError: places that overlap, lie outside a shard or belong to no video.
    """
    shard, offset, first = columns["shard"], columns["offset"], columns["first"]
    numbers, sizes = columns["shard_number"], columns["shard_bytes"]
    _require(np.array_equal(shard >= 0, frames > 0), where, "does not hold the videos that the index has")
    _require(_rising(numbers, 0, MOST_SHARDS), where, "has shards of impossible numbers")
    rising = first[0] == 0 and bool((first[1:] >= first[:-1]).all()) and first[-1] == len(columns["size"])
    _require(rising, where, "has members that belong to no video or to several")
    rows = np.flatnonzero(shard >= 0)
    _require(not (first[1:] - first[:-1])[shard < 0].any(), where, "has members of videos that failed")
    held = shard[rows]  # [n] shard of each stored video
    starts = np.flatnonzero(np.diff(held, prepend=-1))  # [S] first stored video of each shard
    _require(np.array_equal(held[starts], numbers), where, "has videos in shards that it does not list")
    # A video begins where the one before it ends, or at byte 0 of its shard.  Each end follows
    # from the sizes of the members: an offset cannot lie unless its sizes do, and they cannot
    # unless the size of the shard does, which `check_shards` compares with the file.
    ends = offset[rows] + _extents(columns["size"], first, columns["tail"])[rows]
    begins = np.concatenate([[0], ends[:-1]])[: len(rows)]
    begins[starts] = 0
    _require(np.array_equal(offset[rows], begins), where, "has videos that overlap or do not follow each other")
    last = ends[np.append(starts[1:], len(rows))[: len(starts)] - 1].tolist()
    whole = [archive_size(end) for end in last] == sizes.tolist()
    _require(whole, where, "has shards of another size than their videos")


def _require(good: bool, where: str, fault: str) -> None:
    if not good:
        raise ShardError(f"{where} {fault}; run fsar-shards reindex")


def _rising(values: NDArray[Any], low: int, end: int) -> bool:
    """Tell whether values rise strictly within [low, end)."""
    inside = not len(values) or (values[0] >= low and values[-1] < end)
    return bool(inside and (values[1:] > values[:-1]).all())


def _extents(sizes: NDArray[np.uint32], first: NDArray[np.int64], tail: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the bytes from the first header of each video to the end of its last member's padding.

    Args:
        sizes: [M] bytes of the pictures.
        first: [V + 1] first picture of each video.
        tail: [V, 2] bytes of `cls` and `json`.

    Returns:
        [V] bytes.
    """
    blocks: NDArray[np.int64] = _blocks(tail).sum(axis=1, dtype=np.int64)  # [V]
    # `reduceat` adds up the pictures of each video.  It would give an empty range the value at its
    # start, so videos without pictures are left out; the ranges of the others lie end to end.
    # A million videos have 32 million pictures: blocks of rows keep temporary arrays in the cache.
    filled = np.flatnonzero(first[1:] > first[:-1])
    for rows in np.array_split(filled, len(filled) // ROWS_AT_ONCE + 1):
        if len(rows):
            start = first[rows[0]]
            members = _blocks(sizes[start : first[rows[-1] + 1]])
            blocks[rows] += np.add.reduceat(members, first[rows] - start, dtype=np.int64)
    return blocks * BLOCK


def _blocks(sizes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the tar blocks of members, each with its header; in four bytes, as sizes have them."""
    blocks: NDArray[np.uint32] = sizes // np.uint32(BLOCK)
    blocks += (sizes & np.uint32(BLOCK - 1)) > 0
    blocks += np.uint32(1)
    return blocks


def check_shards(
    folder: Path, series: str, *, numbers: NDArray[np.int32], sizes: NDArray[np.int64], shard: NDArray[np.int32]
) -> None:
    """Compare each tar's size and first header with the index; 512 bytes are read of each.

    Args:
        folder: The shard set.
        series: Name of the series.
        numbers: [S] shards of the series.
        sizes: [S] their bytes.
        shard: [V] number of the shard that holds each video, -1 where it failed.

    Raises:
        ShardError: one is missing, cut short, replaced, swapped, or its first header is damaged.
    """
    stored, firsts = np.unique(shard, return_index=True)
    first = dict(zip(stored.tolist(), firsts.tolist(), strict=True))
    # As `shard_path` has them: to make a path costs as much as to open the file.
    paths = [f"{folder}/{series}-{number:06d}.tar" for number in numbers.tolist()]
    beginnings = zip(paths, numbers.tolist(), sizes.tolist(), _read_beginnings(paths), strict=True)
    for path, number, size, (found, block, total) in beginnings:
        if found != size:
            _refuse_size(shard_path(folder, series, number), found, size)
        row = first.get(number, -1)
        if not _begins(block, row, total):
            held = row_of_key(parse_header(block, 0, shard_path(folder, series, number)).key)
            if held != row:
                raise ShardError(f"{path} begins with video {held} where the index has {row}: it was swapped")


def _read_beginnings(paths: list[str]) -> Iterator[tuple[int, bytes, int]]:
    """Yield size, first header and the sum of its bytes for each file.

    Several files are read at once, as each read may wait for a disk or a network.
    """
    parts = [paths[start : start + _AT_ONCE] for start in range(0, len(paths), _AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for beginnings in pool.map(_read_some, parts):
            yield from beginnings


def _read_some(paths: list[str]) -> list[tuple[int, bytes, int]]:
    """Return size (-1: missing), first header and the sum of its bytes for some files."""
    sizes, blocks = zip(*(_read_beginning(path) for path in paths), strict=True)
    whole = b"".join(block.ljust(BLOCK, b"\0") for block in blocks)  # one call adds up all headers
    sums = np.frombuffer(whole, np.uint8).reshape(-1, BLOCK).sum(axis=1)
    return list(zip(sizes, blocks, sums.tolist(), strict=True))


def _read_beginning(path: str) -> tuple[int, bytes]:
    """Return size and first header of a file; -1 for a file that is missing."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    except FileNotFoundError:
        return -1, b""
    try:
        return os.fstat(handle).st_size, os.read(handle, BLOCK)
    finally:
        os.close(handle)


def _begins(block: bytes, row: int, total: int) -> bool:
    """Tell whether a header is of the video `row` and agrees with its checksum.

    Args:
        block: The header.
        row: Catalogue row of the video; -1 where no video begins the shard.
        total: Sum of the bytes of the header.
    """
    if row < 0 or not block.startswith(f"{sample_key(row)}.".encode()):
        return False
    field = block[_CHECKSUM]
    return b"%06o\0 " % (total - sum(field) + 8 * ord(" ")) == field


def _refuse_size(path: Path, found: int, size: int) -> None:
    if found < 0:
        raise ShardError(f"{path} is missing; copy it again or type the fsar-preprocess command again")
    raise ShardError(
        f"{path} has {found} bytes where the index has {size}: it was cut short or replaced; "
        "copy it again, or run fsar-shards reindex if it was made again on purpose"
    )
