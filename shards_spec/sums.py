"""CRC-32 of stored pictures, compared while they are read."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from shards_spec.errors import ShardError
from shards_spec.schema import picture_name, sample_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shards_spec.index.columns import Columns


def sum_starts(columns: Columns) -> NDArray[np.int64]:
    """[V] where the sums of each video begin in `crc32`, which holds those of cls and json behind its pictures'."""
    stored = columns["shard"] >= 0  # [V]
    starts: NDArray[np.int64] = columns["first"][:-1] + 2 * (np.cumsum(stored) - stored)
    return starts


class PictureSums:
    """The sums of the pictures of a series, from its index columns."""

    def __init__(self, columns: Columns) -> None:
        self._start = sum_starts(columns)  # [V]
        self._sums, self._frame, self._first = columns["crc32"], columns["frame"], columns["first"]
        self._codec = columns.codec

    def check(self, row: int, position: int, data: bytes | memoryview, *, where: str) -> None:
        """Refuse a picture that is not what was written; `where` is its shard.

        Raises:
            ShardError: naming shard and member.
        """
        if zlib.crc32(data) != self._sums[self._start[row] + position]:
            name = picture_name(int(self._frame[self._first[row] + position]), self._codec)
            raise ShardError(
                f"{where}: {sample_key(row)}.{name}: content damaged; fsar-shards verify finds all damage: "
                "copy the shard again"
            )
