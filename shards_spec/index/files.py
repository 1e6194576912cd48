"""Columns on disk: zarr v3 arrays in the one form that we write, read without trust in what they announce."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Zstd
from numpy.typing import NDArray

from shards_spec.errors import ShardError
from shards_spec.files import read_json

TYPES = frozenset("bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split())  # noqa: SIM905
RAW = {"name": "bytes", "configuration": {"endian": "little"}}
CHUNK_NAME = re.compile(r"0|[1-9][0-9]{0,9}")
MOST_CHUNK = 1 << 28  # bytes of one decoded chunk
THREADS = 4  # that decode the chunks of a column
# What may be announced: columns of one value take next to nothing on disk, but those of a large index do not shrink.
FREE_BYTES, MOST_RATIO = 64 << 20, 16


@dataclass(frozen=True)
class Layout:
    """What the metadata of an array announces, checked: its type, its shape, rows a chunk, and whether it is zstd."""

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
            ShardError: it is none, or of another form than ours.
        """
        raw = read_json(path / "zarr.json")
        try:
            shape, grid, codecs = raw["shape"], raw["chunk_grid"], raw["codecs"]
            chunk, dtype = grid["configuration"]["chunk_shape"], raw["data_type"]
            attributes = raw.get("attributes", {})
            separator = raw["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
            ours = (raw["zarr_format"], raw["node_type"], grid["name"]) == (3, "array", "regular") and separator
            ours &= raw.get("storage_transformers", []) == [] and raw["fill_value"] in (0, False)
            ours &= isinstance(dtype, str) and dtype in TYPES and isinstance(attributes, dict)
            ours &= [type(side) for side in (*shape, *chunk)] == [int] * 2 * len(shape) and min(shape) >= 0
            ours &= chunk[1:] == shape[1:] and chunk[0] >= 1 and codecs[0] in (RAW, {"name": "bytes"})
            ours &= [codec["name"] for codec in codecs[1:]] in ([], ["zstd"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ShardError(f"{path}/zarr.json describes no column ({error!r})") from error
        layout = Layout(dtype, tuple(shape), chunk[0], len(codecs) > 1, attributes) if ours else None
        if layout is None or not 0 < layout.chunk * layout.row_bytes <= MOST_CHUNK:
            raise ShardError(f"{path}/zarr.json describes an array of another form than that of our columns")
        return layout


def chunk_files(path: Path, dimensions: int) -> dict[int, Path]:
    """The chunks of an array that are on disk, by number; those that hold zeros alone need not be there."""
    inner = "/".join(["0"] * (dimensions - 1))
    try:
        names = [entry.name for entry in os.scandir(path / "c")]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror})") from error
    found = {int(name): path / "c" / name / inner for name in names if CHUNK_NAME.fullmatch(name)}
    return {number: file for number, file in found.items() if file.is_file()}


def check_announced(announced: int, stored: int, what: Path | str) -> None:
    """Refuse content that would take far more memory than it takes on disk.

    Raises:
        ShardError: it would.
    """
    if announced > FREE_BYTES + MOST_RATIO * stored:
        raise ShardError(f"{what} announces {announced:,} bytes and holds {stored:,}: it is damaged or made to harm")


def stored_bytes(path: Path, layout: Layout) -> int:
    """Bytes of an array on disk."""
    return sum(file.stat().st_size for file in chunk_files(path, len(layout.shape)).values())


def read_column(path: Path, *, alone: bool = True) -> tuple[NDArray[Any], Mapping[str, Any]]:
    """Content of the array in a folder, and its attributes; what it announces is checked before it takes memory.

    Args:
        path: The folder.
        alone: Hold what it announces against what it holds; not for a column of an index, where only all of them
            together tell: frame numbers that begin anew with each video shrink thousandfold, their CRC-32 do not.

    Raises:
        ShardError: it is damaged, of another form, or announces far more than it holds.
    """
    layout = Layout.load(path)
    if alone:
        check_announced(layout.nbytes, stored_bytes(path, layout), path)
    column, files = np.zeros(layout.shape, layout.dtype), chunk_files(path, len(layout.shape))
    if len(files) == 1:  # as most columns: a thread would cost more than it gives
        _read_chunk(column, layout, *files.items())
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda item: _read_chunk(column, layout, item), files.items()))
    return column, layout.attributes


def _read_chunk(column: NDArray[Any], layout: Layout, item: tuple[int, Path]) -> None:
    number, file = item
    rows = column[number * layout.chunk : (number + 1) * layout.chunk]
    if not len(rows):  # beyond the last
        return
    try:
        _fill(rows, file.read_bytes(), layout)
    except OSError as error:
        raise ShardError(f"{file} cannot be read ({error.strerror})") from error
    except (RuntimeError, ValueError) as error:
        raise ShardError(f"{file} is damaged ({error})") from error


def _fill(rows: NDArray[Any], data: bytes, layout: Layout) -> None:
    """Put a chunk's content where its rows are; the last chunk has more than them."""
    size = layout.chunk * layout.row_bytes
    place = rows.reshape(-1).view(np.uint8)
    whole = place if len(place) == size else np.zeros(size, np.uint8)
    if layout.packed:
        Zstd().decode(data, out=whole)  # refuses more than fits
    elif len(data) == size:
        whole[:] = np.frombuffer(data, np.uint8)
    else:
        raise ValueError(f"{len(data)} bytes where {size} are needed")
    if whole is not place:
        place[:] = whole[: len(place)]
