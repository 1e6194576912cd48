"""Find every flipped bit of a shard set and name its place."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from shards_spec.errors import ShardError
from shards_spec.index.columns import Columns, crc_starts
from shards_spec.index.layout import shard_path
from shards_spec.reader import ShardSet
from shards_spec.schema import BLOCK, archive_size, padded, picture_name, sample_key
from shards_spec.summary import dali_index, from_tar, sidecars
from shards_spec.tar import file_sha256, header


def verify(folder: Path, *, progress: Callable[[int], None] = lambda _: None) -> list[str]:
    """Check every byte of every shard, the index, and the two files that describe each tar.

    Args:
        folder: The shard set.
        progress: Called after each shard with its bytes.

    Returns:
        One line for each fault: shard, member and byte offset.  Empty where all is well.

    Raises:
        ShardError: the set cannot be opened at all.
    """
    with ShardSet.open(folder, series=()) as shards:
        faults = list(shards.damaged_columns())
        for name in shards.series_names:
            try:
                columns = shards.columns(name)
                for place, number in enumerate(columns["shard_number"].tolist()):
                    path = shard_path(folder, name, number)
                    faults += _check_shard(path, number, place, columns)
                    progress(path.stat().st_size if path.exists() else 0)
            except ShardError as error:
                faults.append(str(error))
    return list(dict.fromkeys(faults))


def _check_shard(path: Path, number: int, place: int, columns: Columns) -> list[str]:
    size = int(columns["shard_bytes"][place])
    if not path.exists() or path.stat().st_size != size:
        return [f"{path}: missing, cut short or replaced: the index has {size} bytes"]
    if file_sha256(path) != columns["shard_sha256"][place].tobytes().hex():
        return list(_locate(path, number, columns)) or [f"{path}: damaged after its last member"]
    summary = from_tar(path)
    contents = zip(sidecars(path), (dali_index(summary.samples), summary.to_json()), strict=True)
    return [
        f"{beside}: missing or not what {path.name} holds; run fsar-shards reindex"
        for beside, content in contents
        if not beside.is_file() or beside.read_bytes() != content
    ]


def _locate(path: Path, number: int, columns: Columns) -> Iterator[str]:
    """Yield one line for each member whose header, payload or padding differs from the index."""
    with path.open("rb") as file:
        position = 0
        for name, size, crc in _members(number, columns):
            if file.read(BLOCK) != header(name, size):
                yield f"{path}: {name}: header damaged at byte {position}"
            data = file.read(padded(size))
            if zlib.crc32(data[:size]) != crc:
                yield f"{path}: {name}: content damaged between bytes {position + BLOCK} and {position + BLOCK + size}"
            elif any(data[size:]):
                yield f"{path}: {name}: padding damaged after byte {position + BLOCK + size}"
            position += BLOCK + padded(size)
        rest = file.read()
        if any(rest) or position + len(rest) != archive_size(position):
            yield f"{path}: end of the archive damaged after byte {position}"


def _members(number: int, columns: Columns) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and CRC-32 of every member of a shard in stored order."""
    first, starts = columns["first"], crc_starts(columns)
    for row in (columns["shard"] == number).nonzero()[0].tolist():
        start, stop = int(first[row]), int(first[row + 1])
        place = int(starts[row])
        frames = columns["frame"][start:stop].tolist()
        names = [*(picture_name(frame, columns.codec) for frame in frames), "cls", "json"]
        sizes = columns["size"][start:stop].tolist() + columns["tail"][row].tolist()
        crcs = columns["crc32"][place : place + len(names)].tolist()
        for name, size, crc in zip(names, sizes, crcs, strict=True):
            yield f"{sample_key(row)}.{name}", size, crc
