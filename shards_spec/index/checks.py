"""Check that a shard set is whole and that its index is consistent with itself and with its shards."""

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

from shards_spec.errors import ShardError, path_fault, quoted, text_fault
from shards_spec.index.build import shard_path
from shards_spec.index.files import Layout, check_announced, stored_bytes
from shards_spec.schema import MOST_FRAMES, MOST_SIDE, row_of_key, sample_key
from shards_spec.tar import BLOCK, archive_size, parse_header

Shape = tuple[str | int, ...]

COLUMN = re.compile(r"(videos|series/[a-z0-9]{1,40})/([a-z0-9_]{1,40})")
# Type and shape of each column; a letter stands for one number in all columns of a group, V in all of the index.
VIDEOS: dict[str, tuple[str, Shape]] = {
    **dict.fromkeys(("label", "group", "frames"), ("int32", ("V",))),
    "fps": ("float32", ("V",)),
    "source_size": ("int32", ("V", 2)),
    "name_ends": ("int64", ("V",)),
    "group_name_ends": ("int64", ("G",)),
    "name_bytes": ("uint8", ("B",)),
    "group_name_bytes": ("uint8", ("C",)),
}
SERIES: dict[str, tuple[str, Shape]] = {
    "shard": ("int32", ("V",)),
    "offset": ("int64", ("V",)),
    "first": ("int64", ("F",)),
    "tail": ("uint32", ("V", 2)),
    "stored_size": ("int32", ("V", 2)),
    "size": ("uint32", ("M",)),
    "frame": ("int32", ("M",)),
    "crc32": ("uint32", ("A",)),
    "shard_number": ("int32", ("S",)),
    "shard_bytes": ("int64", ("S",)),
    "shard_sha256": ("uint8", ("S", 32)),
}
OPTIONAL: dict[str, tuple[str, Shape]] = {
    "codec_bytes": ("uint8", ("D",)),
    "codec_ends": ("int64", (1,)),
    **dict.fromkeys(("scale", "magnitude", "motion_score"), ("float32", ("M",))),
}
MOST_SHARDS = 1_000_000  # six digits
ROWS_AT_ONCE = 1 << 14
CLIMBING, CONTROL = (b"../", b"/.."), re.compile(rb"\xc2[\x80-\x9f]")  # what a name that can do harm may hold
_THREADS, _AT_ONCE = 8, 64
_CHECKSUM = slice(148, 156)  # the field of a tar header; it counts as blanks in its own sum


class Table(Protocol):
    """Columns by name."""

    def __getitem__(self, name: str, /) -> NDArray[Any]:
        """The column of that name."""


def check_layout(
    index: Path, columns: Mapping[str, Any], bytes_of: Callable[[Path, Layout], int] = stored_bytes
) -> None:
    """Check what the columns of an index announce, by their metadata alone: nothing is read of their content.

    Args:
        index: The folder `index.zarr`.
        columns: Path in the index -> hash, as its attributes have them.
        bytes_of: Bytes that a column takes where the index is stored, from its folder and layout.

    Raises:
        ShardError: a column that is missing, of another type or shape, or more content than is on disk.
    """
    groups: dict[str, dict[str, Layout]] = {"videos": {}, "series/rgb": {}}
    stored = 0
    for path in columns:
        match = COLUMN.fullmatch(path)
        if match is None:
            raise ShardError(f'{index} names the column "{path[:80]!a}", which is none of ours')
        layout = Layout.load(index / path)
        groups.setdefault(match[1], {})[match[2]] = layout
        stored += bytes_of(index / path, layout)
    check_announced(sum(each.nbytes for held in groups.values() for each in held.values()), stored, index)
    rows: dict[str, int] = {}
    for group, held in groups.items():
        sides = _check_group(f"{index}/{group}", held, rows)
        rows = {"V": sides["V"]}


def _check_group(where: str, held: Mapping[str, Layout], sides: dict[str, int]) -> dict[str, int]:
    """What the letters stand for in one group, where `sides` has those that others have fixed."""
    wanted = VIDEOS if where.endswith("/videos") else SERIES
    for name, (dtype, shape) in (wanted | (OPTIONAL if wanted is SERIES else {})).items():
        layout = held.get(name)
        if layout is None:
            if name in wanted:
                raise ShardError(f"{where} lacks the column {name}; run fsar-shards reindex")
            continue
        if len(layout.shape) == len(shape):
            pairs = zip(shape, layout.shape, strict=True)
            shape = tuple(sides.setdefault(side, found) if isinstance(side, str) else side for side, found in pairs)
        if (layout.dtype, layout.shape) != (dtype, shape):
            raise ShardError(
                f"{where}/{name} announces {layout.dtype} {list(layout.shape)} where {dtype} {list(shape)} is needed; "
                "run fsar-shards reindex"
            )
    if "F" in sides and sides["F"] != sides["V"] + 1:
        raise ShardError(f"{where}/first announces {sides['F']} rows of {sides['V']} videos; run fsar-shards reindex")
    return sides


def check_videos(index: Path, columns: Table, classes: int) -> None:
    """Check the numbers that are known of each video: labels below `classes`, counts, rates.

    Raises:
        ShardError: one that cannot be.
    """
    groups = len(columns["group_name_ends"])
    _within(index, "label", columns["label"], -1, classes - 1)
    _within(index, "group", columns["group"], -1, groups - 1)
    _within(index, "frames", columns["frames"], 0, MOST_FRAMES)
    if not (columns["fps"] >= 0).all() or np.isinf(columns["fps"]).any():
        raise ShardError(f"{index}/videos/fps holds what is no rate; run fsar-shards reindex")


def check_series(where: str, columns: Table, frames: NDArray[np.int32]) -> None:
    """Check that the samples of a series lie one behind the other and fill their shards.

    Args:
        where: Names the series in messages.
        columns: Its columns.
        frames: [V] frames of each video, 0 where it failed.

    Raises:
        ShardError: places that overlap, lie outside a shard or belong to no video.
    """
    shard, offset, first = columns["shard"], columns["offset"], columns["first"]
    numbers, sizes = columns["shard_number"], columns["shard_bytes"]
    _need(np.array_equal(shard >= 0, frames > 0), where, "does not hold the videos that the index has")
    _need(_rising(numbers, 0, MOST_SHARDS), where, "has shards of impossible numbers")
    rising = first[0] == 0 and bool((first[1:] >= first[:-1]).all()) and first[-1] == len(columns["size"])
    _need(rising, where, "has members that belong to no video or to several")
    rows = np.flatnonzero(shard >= 0)
    _need(not (first[1:] - first[:-1])[shard < 0].any(), where, "has members of videos that failed")
    held = shard[rows]  # [n] shard of each stored video
    starts = np.flatnonzero(np.diff(held, prepend=-1))  # where a shard begins
    _need(np.array_equal(held[starts], numbers), where, "has videos in shards that it does not list")
    ends = offset[rows] + _extents(columns["size"], first, columns["tail"])[rows]
    wanted = np.concatenate([[0], ends[:-1]])[: len(rows)]
    wanted[starts] = 0
    _need(np.array_equal(offset[rows], wanted), where, "has videos that overlap or do not follow each other")
    last = ends[np.append(starts[1:], len(rows))[: len(starts)] - 1].tolist()
    _need([archive_size(end) for end in last] == sizes.tolist(), where, "has shards of another size than their videos")


def _need(good: bool, where: str, fault: str) -> None:
    if not good:
        raise ShardError(f"{where} {fault}; run fsar-shards reindex")


def _rising(values: NDArray[Any], low: int, end: int) -> bool:
    """Whether values rise strictly within [low, end)."""
    inside = not len(values) or (values[0] >= low and values[-1] < end)
    return bool(inside and (values[1:] > values[:-1]).all())


def _extents(sizes: NDArray[np.uint32], first: NDArray[np.int64], tail: NDArray[np.uint32]) -> NDArray[np.int64]:
    """[V] bytes from the first header of a video to the end of its last member's padding."""
    blocks: NDArray[np.int64] = _blocks(tail).sum(axis=1, dtype=np.int64)  # [V]
    filled = np.flatnonzero(first[1:] > first[:-1])  # videos with pictures: their ranges lie end to end
    for rows in np.array_split(filled, len(filled) // ROWS_AT_ONCE + 1):
        if len(rows):
            start = first[rows[0]]
            members = _blocks(sizes[start : first[rows[-1] + 1]])
            blocks[rows] += np.add.reduceat(members, first[rows] - start, dtype=np.int64)
    return blocks * BLOCK


def _blocks(sizes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Tar blocks of members, each with its header."""
    blocks: NDArray[np.uint32] = sizes // np.uint32(BLOCK)
    blocks += (sizes & np.uint32(BLOCK - 1)) > 0
    blocks += np.uint32(1)
    return blocks


def _within(index: Path, name: str, values: NDArray[Any], low: int, high: int) -> None:
    if len(values) and not (low <= values.min() and values.max() <= high):
        raise ShardError(f"{index}/videos/{name} holds numbers outside {low} to {high}; run fsar-shards reindex")


def check_loaded(path: Path | str, name: str, column: NDArray[Any]) -> None:
    """Check the values of a column by its name, where they alone tell that they cannot be.

    Raises:
        ShardError: one that cannot be.
    """
    limits = {"frame": MOST_FRAMES, "stored_size": MOST_SIDE, "source_size": MOST_SIDE}
    bad = False
    if name in limits:
        bad = bool((column < 0).any() or (column > limits[name]).any())
    elif name in ("scale", "magnitude"):
        bad = not bool(np.isfinite(column).all())
    elif name == "motion_score":
        bad = bool(np.isinf(column).any())  # NaN: the field is too small for a score
    if bad:
        raise ShardError(f"{path} holds numbers that cannot be; run fsar-shards reindex")


def check_texts(path: str, data: NDArray[np.uint8], ends: NDArray[np.int64], *, paths: bool) -> None:
    """Check a column of strings: where each ends, and that none can do harm as a name (`paths`: of a video).

    Raises:
        ShardError: ends that do not rise, or such a name.
    """
    bounds = np.concatenate([[0], ends])
    _need(bool((np.diff(bounds) >= 0).all()) and bounds[-1] == len(data), path, "has strings that overlap")
    raw = data.tobytes()
    suspect = bool(((data < 32) | (data == 127)).any()) or CONTROL.search(raw) is not None
    if paths and not suspect:
        starts = bounds[:-1][np.diff(bounds) > 0]
        suspect = bool((data[starts] == ord("/")).any()) or any(part in raw for part in CLIMBING)
    if suspect:
        _check_each(path, raw, bounds.tolist(), paths=paths)


def _check_each(path: str, raw: bytes, bounds: list[int], *, paths: bool) -> None:
    """Look at every string, where some bytes may belong to one that can do harm."""
    for start, end in pairwise(bounds):
        text = raw[start:end].decode("utf-8", "surrogateescape")
        fault = path_fault(text) if paths and text else text_fault(text)
        if fault:
            raise ShardError(f"{path} has the name {quoted(text)}, which {fault}")


def check_shards(
    folder: Path, series: str, *, numbers: NDArray[np.int32], sizes: NDArray[np.int64], shard: NDArray[np.int32]
) -> None:
    """Compare each tar's size and first header with the index; 512 bytes are read of each.

    Args:
        folder: The shard set.
        series: Which of its series.
        numbers: [S] shards of the series.
        sizes: [S] their bytes.
        shard: [V] number of the shard that holds each video, -1: none.

    Raises:
        ShardError: one is missing, cut short, replaced, swapped, or its first header is damaged.
    """
    stored, firsts = np.unique(shard, return_index=True)
    first = dict(zip(stored.tolist(), firsts.tolist(), strict=True))
    # as `shard_path`, which costs as much as the look at the file
    paths = [f"{folder}/{series}-{number:06d}.tar" for number in numbers.tolist()]
    looks = zip(paths, numbers.tolist(), sizes.tolist(), _look_at_all(paths), strict=True)
    for path, number, size, (found, block, total) in looks:
        if found != size:
            _refuse_size(shard_path(folder, series, number), found, size)
        row = first.get(number, -1)
        if not _begins(block, row, total):
            held = row_of_key(parse_header(block, 0, shard_path(folder, series, number)).key)
            if held != row:
                raise ShardError(f"{path} begins with video {held} where the index has {row}: it was swapped")


def _look_at_all(paths: list[str]) -> Iterator[tuple[int, bytes, int]]:
    """Several at once: each waits for a disk or a network where the file is not in memory."""
    parts = [paths[start : start + _AT_ONCE] for start in range(0, len(paths), _AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for looks in pool.map(_look_at_some, parts):
            yield from looks


def _look_at_some(paths: list[str]) -> list[tuple[int, bytes, int]]:
    """Size (-1: missing) and first header of files, and the sum of its bytes."""
    sizes, blocks = zip(*(_look(path) for path in paths), strict=True)
    whole = b"".join(block.ljust(BLOCK, b"\0") for block in blocks)
    sums = np.frombuffer(whole, np.uint8).reshape(-1, BLOCK).sum(axis=1)
    return list(zip(sizes, blocks, sums.tolist(), strict=True))


def _look(path: str) -> tuple[int, bytes]:
    """Size and first header of a file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    except FileNotFoundError:
        return -1, b""
    try:
        return os.fstat(handle).st_size, os.read(handle, BLOCK)
    finally:
        os.close(handle)


def _begins(block: bytes, row: int, total: int) -> bool:
    """Whether a header, of bytes that sum up to `total`, is whole, by its checksum, and of the video `row`."""
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
