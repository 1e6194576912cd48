"""Read and write label files: CSV of `video,cluster` (or `video,label`).

Their labels stand in for the classes of a split.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipelines.episodes.pools import Labels
from shards_spec import ShardSet
from shards_spec.errors import ConfigError
from shards_spec.files import write_whole
from shards_spec.schema import quoted

HEADERS = (["video", "cluster"], ["video", "label"])


def write_labels(path: Path, labels: Mapping[str, int]) -> None:
    """Write the number of each video's cluster by its original name, in order of the names.

    Raises:
        DiskError: the disk is full or cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADERS[0])
    writer.writerows(sorted(labels.items()))
    write_whole(path, text.getvalue().encode(errors="surrogateescape"))


def read_labels(path: Path, shards: ShardSet, split: str) -> Labels:
    """Read the labels of a split's videos; videos that the file does not name are in no episode.

    Raises:
        ConfigError: the file is missing, is no such CSV, names a video twice, or one that the split
            does not have.
        ShardError: there is no such split.
    """
    named = _named(path)
    stored = shards.split_rows(split)
    rows = dict(zip(shards.names(stored), stored.tolist(), strict=True))
    foreign = [video for video in named if video not in rows]
    if foreign:
        raise ConfigError(
            f'{path}: {quoted(foreign[0])} is no stored video of split "{split}" of {shards.path} ({len(foreign)} such '
            f"lines): videos of other splits must stay unseen in training; make the file again from this split"
        )
    names = sorted(set(named.values()))
    number = {name: i for i, name in enumerate(names)}
    labelled = sorted((rows[video], number[name]) for video, name in named.items())
    pairs = np.array(labelled, dtype=np.int64).reshape(-1, 2)  # [n, 2]
    return Labels(tuple(names), tuple(range(len(names))), pairs[:, 0], pairs[:, 1])


def _named(path: Path) -> dict[str, str]:
    """Read the label of each video, as text."""
    try:
        text = _read(path).decode("utf-8-sig", "surrogateescape")  # as the names of videos are read
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ConfigError(f"{path} is no CSV ({error}); give a file that fsar-cluster wrote") from error
    if not lines or lines[0] not in HEADERS:
        raise ConfigError(f"{path} does not begin with the line video,cluster or video,label; add it")
    named: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != 2 or not all(line):
            raise ConfigError(f"{path}, line {number}: expected a video and its label with a comma between them")
        if line[0] in named:
            raise ConfigError(f"{path}, line {number}: {quoted(line[0])} is there twice; keep one of its lines")
        named[line[0]] = line[1]
    if not named:
        raise ConfigError(f"{path} names no video; give a file that fsar-cluster wrote")
    return named


def labels_sha256(path: Path) -> str:
    """Return the SHA-256 of a label file; ConfigError when it is missing."""
    return hashlib.sha256(_read(path)).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the labels {path} ({error.strerror}); make them with fsar-cluster") from error
