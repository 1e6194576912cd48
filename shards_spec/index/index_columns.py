"""The columns of the index, filled shard by shard: what is held are arrays, four to eight bytes a value."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards_spec.errors import ShardError
from shards_spec.schema import Dataset, Failure
from shards_spec.summary import Sample, Summary

Columns = dict[str, NDArray[Any]]

MOST_GAPS = 1 << 20  # rows of which neither tars nor failures say anything: an impossible row would fill the memory
SCORES = ("scale", "magnitude", "motion_score")  # of each picture, in the samples of some series


class Text:
    """A column of strings: UTF-8 bytes end to end, and where each ends."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("q")
        for value in values:
            self.append(value)

    def append(self, value: str) -> None:
        """Add one string."""
        self._bytes += value.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def columns(self, name: str) -> Columns:
        """The two columns."""
        return {f"{name}_bytes": np.frombuffer(self._bytes, np.uint8), f"{name}_ends": _column(self._ends, np.int64)}


class VideoColumns:
    """What is known of each video, row by row; those that failed and gaps are filled in between."""

    def __init__(self, dataset: Dataset, failures: Mapping[int, Failure]) -> None:
        self._class_number = {label: i for i, label in enumerate(dataset.classes)}
        self._failed = [failures[row] for row in sorted(failures, reverse=True)]  # the next one last
        self._names, self._group_number = Text(), {"": -1}  # groups in the order of their first videos
        self._label, self._frames, self._group = array("i"), array("i"), array("i")
        self._fps, self._source = array("f"), array("i")
        self._gaps = 0

    def add(self, summary: Summary) -> None:
        """Add the videos of the next shard of rgb."""
        for sample in summary.samples:
            self._fail_below(sample.row)
            info = sample.info
            self._append(info["name"], info["label"], info["group"])
            self._frames.append(info["frames"])
            self._fps.append(info["fps"])
            self._source.extend(info["source_size"])

    def columns(self) -> Columns:
        """The columns, when all is added."""
        self._fail_below(1 + max((failure.row for failure in self._failed), default=-1))
        names = sorted(self._group_number.keys() - {""})
        number = np.empty(len(self._group_number), np.int32)
        number[[self._group_number[name] for name in ("", *names)]] = np.arange(-1, len(names))
        return {
            "label": _column(self._label, np.int32),
            "frames": _column(self._frames, np.int32),
            "fps": _column(self._fps, np.float32),
            "source_size": _column(self._source, np.int32).reshape(-1, 2),
            "group": number[_column(self._group, np.int32)],
            **self._names.columns("name"),
            **Text(names).columns("group_name"),
        }

    def _fail_below(self, row: int) -> None:
        """Fill the rows up to `row` with failed videos and, where nothing is known, with nothing."""
        while len(self._label) < row:
            while self._failed and self._failed[-1].row < len(self._label):
                self._failed.pop()  # stored since
            if self._failed and self._failed[-1].row == len(self._label):
                failure = self._failed.pop()
                self._append(failure.name, failure.label, failure.group)
            else:
                self._add_gap(row)
            self._frames.append(0)
            self._fps.append(0.0)
            self._source.extend((0, 0))

    def _add_gap(self, row: int) -> None:
        self._gaps += 1
        if self._gaps > MOST_GAPS:
            raise ShardError(
                f"nothing is known of over {MOST_GAPS:,} videos before row {row}: copy failures.jsonl and all tars"
            )
        self._append("", None, None)

    def _append(self, name: str, label: str | None, group: str | None) -> None:
        self._names.append(name)
        self._label.append(-1 if label is None else self._class_number.get(label, -1))
        self._group.append(self._group_number.setdefault(group or "", len(self._group_number) - 1))


class SeriesColumns:
    """Where the videos of one series and their pictures are."""

    def __init__(self) -> None:
        self._row, self._shard, self._offset = array("q"), array("i"), array("q")
        self._kept, self._tail, self._stored_size = array("q"), array("I"), array("i")
        self._size, self._frame, self._crc32 = array("I"), array("i"), array("I")
        self._scores = {score: array("f") for score in SCORES}
        self._frames = array("q")  # of the video, whatever is stored of it
        self._numbers, self._bytes, self._sha256 = array("i"), array("q"), bytearray()
        self._codecs: set[str] = set()

    @property
    def rows(self) -> NDArray[np.int64]:
        """[n] rows of the stored videos, ascending."""
        return _column(self._row, np.int64)

    @property
    def frames(self) -> NDArray[np.int64]:
        """[n] frames that each stored video had when it was decoded."""
        return _column(self._frames, np.int64)

    def add(self, summary: Summary, number: int, *, path: Path) -> None:
        """Add the next shard.

        Raises:
            ShardError: it holds a video that belongs before those of the shards added already, or another codec.
        """
        self._numbers.append(number)
        self._bytes.append(summary.size)
        self._sha256 += bytes.fromhex(summary.sha256)
        for sample in summary.samples:
            if self._row and sample.row <= self._row[-1]:
                raise ShardError(
                    f"{path} holds video {sample.row}, which belongs into a shard before it: was it renamed?"
                )
            self._shard.append(number)
            try:
                self._add(sample)
            except (TypeError, ValueError, OverflowError) as error:
                raise ShardError(f"{path}: what is said of video {sample.row} cannot be ({error})") from error
        if len(self._codecs) > 1:
            raise ShardError(f"{path} holds pictures of another codec than those before it; make the series again")

    def _add(self, sample: Sample) -> None:
        self._row.append(sample.row)
        self._offset.append(sample.offset)
        self._kept.append(len(sample.frames))
        self._tail.fromlist(sample.sizes[-2:])
        self._size.fromlist(sample.sizes[:-2])
        self._frame.fromlist(sample.frames)
        self._crc32.fromlist(sample.crc32)
        self._stored_size.extend(sample.info["size"])
        self._frames.append(sample.info["frames"])
        self._codecs.add(sample.codec)
        for score in [score for score in self._scores if score not in sample.info]:
            del self._scores[score]  # a column is of all samples or of none
        for score, values in self._scores.items():
            values.extend(math.nan if value is None else value for value in sample.info[score])

    def columns(self, count: int) -> Columns:
        """The columns of `count` catalogue rows."""
        columns: Columns = {
            "shard": self._by_row(_column(self._shard, np.int32), count, -1),
            "offset": self._by_row(_column(self._offset, np.int64), count, 0),
            "first": np.concatenate([[0], np.cumsum(self._by_row(_column(self._kept, np.int64), count, 0))]),
            "tail": self._by_row(_column(self._tail, np.uint32).reshape(-1, 2), count, 0),
            "stored_size": self._by_row(_column(self._stored_size, np.int32).reshape(-1, 2), count, 0),
            "size": _column(self._size, np.uint32),
            "frame": _column(self._frame, np.int32),
            "crc32": _column(self._crc32, np.uint32),
            "shard_number": _column(self._numbers, np.int32),
            "shard_bytes": _column(self._bytes, np.int64),
            "shard_sha256": np.frombuffer(self._sha256, np.uint8).reshape(-1, 32),
        }
        if self._codecs == {"raw"}:
            columns |= Text(["raw"]).columns("codec")
        return columns | {score: _column(values, np.float32) for score, values in self._scores.items() if self._row}

    def _by_row(self, values: NDArray[Any], count: int, absent: int) -> NDArray[Any]:
        column = np.full((count, *values.shape[1:]), absent, values.dtype)
        column[self.rows] = values
        return column


def _column(values: array[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """A view of the values, not a copy."""
    return np.frombuffer(values, dtype)
