"""Define the index of a shard set: its columns, their form on disk, and the hashes that prove them.

The writer (`build`), the checks (`checks`) and the reader (`columns`) follow the tables `VIDEOS`
and `SERIES`.  SPEC.md, section 5, describes the same columns for people.

zarr writes the index, but does not read it.  A set may come from others and be made to harm:

* `zarr.open_array` also opens arrays of its version 2, where a codec may be pickle;
* it looks codecs up among all installed packages, by the name in the file;
* its zstd takes as much memory as a chunk unpacks to, and 32 KB can become 1 GB.

So `Layout.load` accepts the one form that we write, and `columns.read_column` decodes each chunk
into memory of the announced size.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards_spec.errors import ShardError
from shards_spec.files import json_line, read_json
from shards_spec.schema import MOST_FRAMES, MOST_SIDE, PER_PICTURE, SERIES_NAME

INDEX = "index.zarr"
SHARD_NAME = re.compile(r"(?P<series>[a-z0-9]+)-(?P<number>\d{6})\.tar")
PINNED = ("dataset.json", "failures.jsonl", "plan.json")  # files whose hash the index carries
COLUMN_PATH = re.compile(rf"(?P<group>videos|series/{SERIES_NAME.pattern})/(?P<name>[a-z0-9_]{{1,40}})")

# --- columns --------------------------------------------------------------------------------------

Shape = tuple[str | int, ...]
MOST_FLOAT = float(np.finfo(np.float32).max)
FINITE = (-MOST_FLOAT, MOST_FLOAT)


@dataclass(frozen=True)
class Column:
    """A column of the index.

    Attributes:
        dtype: Its type, by NumPy's name.
        shape: Its sides.  A letter stands for one number in all columns of a group: V rows of the
            catalogue (one number in the whole index), M pictures, S shards, others as they come.
        limits: Least and largest value; infinite where another check knows them, or none is needed.
        nan: NaN stands for a value that is not known.
        gap: Value in the rows of videos that failed.
        optional: Some series lack it.
    """

    dtype: str
    shape: Shape
    limits: tuple[float, float] = (-math.inf, math.inf)
    nan: bool = False
    gap: int = 0
    optional: bool = False


def _text(name: str, count: str | int, total: str, *, optional: bool = False) -> dict[str, Column]:
    """Define the two columns of `count` strings: UTF-8 bytes end to end, and where each ends."""
    return {
        f"{name}_bytes": Column("uint8", (total,), optional=optional),
        f"{name}_ends": Column("int64", (count,), optional=optional),
    }


# In the order in which they are written
VIDEOS: dict[str, Column] = {
    "label": Column("int32", ("V",)),  # limits: `checks.check_videos`, as for group
    "frames": Column("int32", ("V",), (0, MOST_FRAMES)),
    "fps": Column("float32", ("V",), (0, MOST_FLOAT)),
    "source_size": Column("int32", ("V", 2), (0, MOST_SIDE)),
    "group": Column("int32", ("V",)),
    **_text("name", "V", "bytes of names"),
    **_text("group_name", "groups", "bytes of groups"),
}
SERIES: dict[str, Column] = {
    "shard": Column("int32", ("V",), gap=-1),  # limits of places: `checks.check_series`
    "offset": Column("int64", ("V",)),
    "first": Column("int64", ("V + 1",)),
    "tail": Column("uint32", ("V", 2)),
    "stored_size": Column("int32", ("V", 2), (0, MOST_SIDE)),
    "size": Column("uint32", ("M",)),
    "frame": Column("int32", ("M",), (0, MOST_FRAMES)),
    "crc32": Column("uint32", ("M + 2 stored",)),
    "shard_number": Column("int32", ("S",)),
    "shard_bytes": Column("int64", ("S",)),
    "shard_sha256": Column("uint8", ("S", 32)),
    **_text("codec", 1, "bytes of codec", optional=True),
    # A field that is too small has no motion score: NaN
    **{name: Column("float32", ("M",), FINITE, nan=name == "motion_score", optional=True) for name in PER_PICTURE},
}


def columns_of(group: str) -> dict[str, Column]:
    """Return the columns of a group of the index, `videos` or `series/NAME`."""
    return VIDEOS if group == "videos" else SERIES


# --- files of a shard set -------------------------------------------------------------------------


def shard_path(folder: Path, series: str, number: int) -> Path:
    """Return the path of shard `number` of a series."""
    return folder / f"{series}-{number:06d}.tar"


def list_shards(folder: Path) -> dict[str, list[int]]:
    """Return the numbers of the shards in a folder, by series; `rgb` first, the others by name."""
    found: dict[str, list[int]] = {}
    for path in folder.glob("*.tar"):
        match = SHARD_NAME.fullmatch(path.name)
        if match:
            found.setdefault(match["series"], []).append(int(match["number"]))
    return {series: sorted(found[series]) for series in sorted(found, key=lambda s: (s != "rgb", s))}


# --- hashes ---------------------------------------------------------------------------------------


def column_sha256(column: NDArray[Any]) -> str:
    """Return the hash of one column: type, shape and content."""
    digest = hashlib.sha256(f"{column.dtype.str} {column.shape}\n".encode())
    digest.update(np.ascontiguousarray(column).view(np.uint8).data if column.size else b"")
    return digest.hexdigest()


def pinned_hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of the small files of a shard set."""
    found = [folder / name for name in PINNED if (folder / name).is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def attributes_sha256(attributes: Mapping[str, Any]) -> str:
    """Return the hash of the attributes of an index.

    It covers the hashes of all columns and small files: no bit of the index changes unnoticed.
    """
    return hashlib.sha256(json_line({key: attributes[key] for key in ("format", "columns", "files")})).hexdigest()


# --- arrays on disk -------------------------------------------------------------------------------

TYPES = frozenset("bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split())  # noqa: SIM905
FORM: dict[str, Any] = {  # of every array that we write
    "zarr_format": 3,
    "node_type": "array",
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
}
PLAIN = ({"name": "bytes", "configuration": {"endian": "little"}}, {"name": "bytes"})  # one byte has no order
# A chunk's file, in the folder of its array: chunks lie along the first axis only
CHUNK_FILE = re.compile(r"c/(?P<number>0|[1-9][0-9]{0,9})(/0){0,7}")
MOST_CHUNK = 1 << 28  # bytes of one decoded chunk
# Bytes that an index may announce.  Columns of one repeated value take next to nothing on disk, so
# the first bytes are free.  A large index holds sizes and CRC-32, which do not shrink so far.
FREE_BYTES, MOST_RATIO = 64 << 20, 16


@dataclass(frozen=True)
class Layout:
    """The checked metadata of an array on disk.

    Attributes:
        dtype: Its type, by NumPy's name.
        shape: Its sides.
        chunk: Rows of a chunk.
        packed: Chunks are zstd.
        attributes: Its attributes.
    """

    dtype: str
    shape: tuple[int, ...]
    chunk: int
    packed: bool
    attributes: Mapping[str, Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.shape[0] * self.row_bytes

    @staticmethod
    def load(path: Path) -> Layout:
        """Read the metadata of the array in a folder.

        Raises:
            ShardError: it is missing, or has another form than ours.
        """
        raw = read_json(path / "zarr.json")
        try:
            shape, grid, codecs = raw["shape"], raw["chunk_grid"], raw["codecs"]
            chunk, dtype, attributes = grid["configuration"]["chunk_shape"], raw["data_type"], raw.get("attributes", {})
            ours = all(raw[key] == value for key, value in FORM.items()) and grid["name"] == "regular"
            ours &= raw.get("storage_transformers", []) == [] and raw["fill_value"] in (0, False)
            ours &= isinstance(dtype, str) and dtype in TYPES and isinstance(attributes, dict)
            ours &= [type(side) for side in (*shape, *chunk)] == [int] * 2 * len(shape) and min(shape) >= 0
            ours &= chunk[1:] == shape[1:] and chunk[0] >= 1 and codecs[0] in PLAIN
            ours &= [codec["name"] for codec in codecs[1:]] in ([], ["zstd"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ShardError(f"{path}/zarr.json describes no column ({error!r})") from error
        layout = Layout(dtype, tuple(shape), chunk[0], len(codecs) > 1, attributes) if ours else None
        if layout is None or not 0 < layout.chunk * layout.row_bytes <= MOST_CHUNK:
            raise ShardError(f"{path}/zarr.json describes an array of another form than that of our columns")
        return layout


def chunk_files(path: Path, dimensions: int) -> dict[int, Path]:
    """Return the chunks of an array that are on disk, by number; chunks of zeros may be absent."""
    inner = "/0" * (dimensions - 1)
    try:
        names = [f"c/{entry.name}{inner}" for entry in os.scandir(path / "c")]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror})") from error
    found = {int(match["number"]): path / match[0] for name in names if (match := CHUNK_FILE.fullmatch(name))}
    return {number: file for number, file in found.items() if file.is_file()}


def check_announced(announced: int, stored: int, what: Path | str) -> None:
    """Refuse content that would take far more memory than it takes on disk.

    Args:
        announced: Bytes in memory, by the metadata.
        stored: Bytes on disk.
        what: Names the content in the message.

    Raises:
        ShardError: it announces more than `FREE_BYTES` and `MOST_RATIO` times its bytes on disk.
    """
    if announced > FREE_BYTES + MOST_RATIO * stored:
        raise ShardError(f"{what} announces {announced:,} bytes and holds {stored:,}: it is damaged or made to harm")


def stored_bytes(path: Path, layout: Layout) -> int:
    """Return the bytes of an array on disk."""
    return sum(file.stat().st_size for file in chunk_files(path, len(layout.shape)).values())
