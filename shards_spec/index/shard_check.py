"""Refuse truncated and swapped shards before anything is read of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards_spec.errors import ShardError
from shards_spec.index.build import shard_path
from shards_spec.schema import row_of_key, sample_key
from shards_spec.tar import BLOCK, parse_header

_THREADS, _AT_ONCE = 8, 64
_CHECKSUM = slice(148, 156)  # the field of a tar header; it counts as blanks in its own sum


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
