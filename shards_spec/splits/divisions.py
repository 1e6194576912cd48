"""Divide the videos of a shard set into training and test videos of the same classes.

The splits of a shard set are those of few-shot learning, with other classes in each.  Probes of
pre-trained features follow official lists of UCF101 and HMDB51, or hold out videos of each class.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards_spec.errors import ConfigError, ShardError
from shards_spec.files import json_line
from shards_spec.reader import ShardSet
from shards_spec.splits.lists import Entry, Line, SplitName, read_csv, read_json_lists, read_text
from shards_spec.splits.shipped import class_key
from shards_spec.splits.stems import StemIndex

Ints = NDArray[np.int64]

PARTS: tuple[SplitName, SplitName] = ("train", "test")
HMDB_PARTS = {"1": "train", "2": "test"}  # code behind a name in HMDB51's lists; 0: in neither part


@dataclass(frozen=True)
class Division:
    """Catalogue rows of training and test videos of the same classes.

    Attributes:
        name: Name in results.
        train: [n] rows, ascending.
        test: [m] rows, ascending.
        absent: Listed videos that the shards do not hold, by part.
    """

    name: str
    train: Ints
    test: Ints
    absent: dict[str, int]

    def sha256(self, shards: ShardSet) -> str:
        """Return the hash of the names of its videos."""
        return hashlib.sha256(json_line([list(shards.names(self.train)), list(shards.names(self.test))])).hexdigest()


def listed_division(shards: ShardSet, lists: Path, *, number: int = 1, needed: Sequence[SplitName] = PARTS) -> Division:
    """Read a division from lists, and find its videos among those stored, by class and stem.

    Args:
        shards: The shard set.
        lists: A folder of official lists, or one .json or .csv file with the parts train and test.
            UCF101 calls its lists `trainlist01.txt`, HMDB51 `wave_test_split1.txt`.
        number: Number of the official lists.
        needed: Parts that must have a stored video.

    Raises:
        ShardError: the lists are missing or unreadable, a video is in both parts, or a part is
            not stored.
    """
    parts = _read(lists, number)
    stored = _StoredVideos(shards)
    found = {part: [stored.row(line) for line in parts.get(part, [])] for part in PARTS}
    rows = {part: np.unique([row for row in found[part] if row >= 0]).astype(np.int64) for part in PARTS}
    for part in needed:
        if not len(rows[part]):
            raise ShardError(
                f"none of the {len(found[part]):,} videos that {lists} lists for {part} is stored in {shards.path}: "
                "are these the lists of this data set?"
            )
    if len(both := np.intersect1d(rows["train"], rows["test"])):
        raise ShardError(f'{lists} lists "{shards.name(int(both[0]))}" for training and for testing; choose one')
    absent = {str(part): found[part].count(-1) for part in PARTS}
    name = f"{lists.name} {number}" if lists.is_dir() else lists.name
    return Division(name, rows["train"], rows["test"], absent)


def held_out_division(shards: ShardSet, *, split: str | None = None, share: float = 0.3, seed: int = 0) -> Division:
    """Hold videos of each class out by chance; a group is never in both parts.

    Args:
        shards: The shard set.
        split: The split to divide; None: all stored videos.
        share: Share of each class to hold out, as far as its groups allow.
        seed: Another seed holds out other videos.

    Raises:
        ConfigError: nothing can be held out, since no class has two groups.
        ShardError: there is no such split.
    """
    rows = np.flatnonzero(shards.frames > 0) if split is None else shards.split_rows(split)
    units: dict[tuple[bool, int], list[int]] = {}
    for row in rows.tolist():
        group = int(shards.groups[row])
        units.setdefault((group < 0, row if group < 0 else group), []).append(row)
    order = np.random.default_rng(seed).permutation(len(units)).tolist()
    held = _hold_out([list(units.values())[n] for n in order], shards, share)
    if not held:
        raise ConfigError(
            f"no class of {split or 'these shards'} has videos of two groups, so none can be held out; give --lists"
        )
    test = np.array(sorted(held), dtype=np.int64)
    name = f"{share:g} of {split or 'all'} held out, seed {seed}"
    return Division(name, np.setdiff1d(rows, test).astype(np.int64), test, {})


def _hold_out(units: Sequence[Sequence[int]], shards: ShardSet, share: float) -> list[int]:
    """Choose units in order, while all their classes lack rows for their share and keep one."""
    total = Counter(int(shards.labels[row]) for unit in units for row in unit)
    taken: Counter[int] = Counter()
    held: list[int] = []
    for unit in units:
        own = Counter(int(shards.labels[row]) for row in unit)
        if all(taken[c] < share * total[c] and taken[c] + own[c] < total[c] for c in own):
            taken += own
            held += unit
    return held


def _read(lists: Path, number: int) -> dict[SplitName, list[Line]]:
    if lists.is_file():
        reader = {".csv": read_csv, ".json": read_json_lists}.get(lists.suffix.lower())
        if reader is None:
            raise ShardError(f"{lists} is one file: expected a .csv or .json with the parts train and test")
        return reader(lists, None)
    paths = {part: lists / f"{part}list{number:02d}.txt" for part in PARTS}
    if all(path.is_file() for path in paths.values()):
        return {part: read_text(path, part) for part, path in paths.items()}
    found = sorted(lists.glob(f"*_test_split{number}.txt"))
    if not found:
        raise ShardError(
            f"{lists} holds neither trainlist{number:02d}.txt and testlist{number:02d}.txt, UCF101's official lists, "
            f"nor HMDB51's *_test_split{number}.txt"
        )
    parts: dict[SplitName, list[Line]] = {part: [] for part in PARTS}
    for path in found:
        for part, line in _hmdb_lines(path, path.name.removesuffix(f"_test_split{number}.txt")):
            parts[part].append(line)
    return parts


def _hmdb_lines(path: Path, label: str) -> Iterable[tuple[SplitName, Line]]:
    """Yield the lines of one class: name of a file, and 1 (train), 2 (test) or 0 (neither)."""
    for n, text in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), start=1):
        name, _, code = text.strip().rpartition(" ")
        if text.strip() and (not name or code not in {"0", *HMDB_PARTS}):
            raise ShardError(f'{path}, line {n}: cannot read "{text[:80]}"; expected a file name and 0, 1 or 2')
        for part in PARTS:
            if HMDB_PARTS.get(code) == part:
                yield part, Line(Entry(name.strip(), label, None), f"{path}, line {n}")


class _StoredVideos:
    """The stored videos, found by the lines of a list."""

    def __init__(self, shards: ShardSet) -> None:
        rows = np.flatnonzero(shards.frames > 0)
        classes = [class_key(name) for name in shards.dataset.classes]
        self._rows: list[int] = rows.tolist()
        stems = (Entry(name, None, None).stem.casefold() for name in shards.names(rows))
        self._index = StemIndex(zip(stems, (classes[label] for label in shards.labels[rows].tolist()), strict=True))

    def row(self, line: Line) -> int:
        """Return the row that a line means; -1 where it is not stored, or may be several."""
        label = None if line.entry.label is None else class_key(line.entry.label)
        found = self._index.find(line.entry.stem.casefold(), label)
        if not found or (label is None and len(found) > 1):
            return -1
        return self._rows[found[-1]]
