"""Read splits from lists, class lists that ship and shard sets; count what two splits share."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Literal

from shards_spec.errors import ShardError
from shards_spec.files import json_line
from shards_spec.reader import ShardSet
from shards_spec.splits.lists import Entry
from shards_spec.splits.shipped import class_key, read_lists, shipped, shipped_names

Kind = Literal["lists", "classes", "shards"]
# `id_start_end`: Kinetics cuts a clip of ten seconds from the YouTube video `id`
TIMED = re.compile(r"([A-Za-z0-9_-]{11})_\d{6}_\d{6}")
FITTED = ("train", "val")  # the splits that train a model and choose its checkpoint


@dataclass(frozen=True)
class Part:
    """One split of a set: train, val or test.

    Attributes:
        labels: Class names; None where the list has numbers only, or no classes.
        videos: (class text or None, stem) of each video; None where only classes are known.
        counts: Videos of each class, ascending; None where they are not known.
        num_classes: Number of classes; None where the list has no classes.
        num_videos: Number of videos; None where it is not known.
    """

    labels: tuple[str, ...] | None
    videos: tuple[tuple[str | None, str], ...] | None
    counts: tuple[int, ...] | None
    num_classes: int | None
    num_videos: int | None

    @cached_property
    def class_keys(self) -> dict[str, str] | None:
        """Class name of each class key."""
        return None if self.labels is None else {class_key(label): label for label in self.labels}

    @cached_property
    def videos_sha256(self) -> str | None:
        """Hash of the sorted stems: the same for any form of list, order, folder and extension."""
        return None if self.videos is None else _sha256(sorted(stem for _, stem in self.videos))

    @cached_property
    def classes_sha256(self) -> str | None:
        """Hash of the sorted class names, without case, spaces and underscores."""
        return None if self.class_keys is None else _sha256(sorted(self.class_keys))


@dataclass(frozen=True)
class SplitSet:
    """The splits of one source; `name` is as the user typed it."""

    name: str
    kind: Kind
    parts: dict[str, Part]

    @cached_property
    def videos_sha256(self) -> str | None:
        """Hash over the hashes of the videos of each split; None unless all are known."""
        return _together({name: part.videos_sha256 for name, part in self.parts.items()})

    @cached_property
    def classes_sha256(self) -> str | None:
        """Hash over the hashes of the classes of each split; None unless all are known."""
        return _together({name: part.classes_sha256 for name, part in self.parts.items()})

    @cached_property
    def unique_stems(self) -> bool:
        """Tell whether every stem is of one video only; `001` in every class is not."""
        stems = [stem for part in self.parts.values() for _, stem in part.videos or ()]
        return len(set(stems)) == len(stems)


def load_split_set(name: str) -> SplitSet:
    """Read a class list that ships, a shard set, or a folder (or file) of lists.

    Raises:
        ShardError: `name` is neither, or cannot be read.
    """
    path = Path(name)
    if name in shipped_names():
        return _from_shipped(name)
    if (path / "dataset.json").exists():
        return _from_shards(path)
    if path.exists():
        return SplitSet(name, "lists", {split: entries_part(lines) for split, lines in read_lists(path).items()})
    try:
        return _from_shipped(name)
    except ShardError as error:
        raise ShardError(f"{name} is no folder of lists and no shard set, and {error}") from error


def entries_part(entries: Iterable[Entry]) -> Part:
    """Make a split of some entries of a list."""
    entries = tuple(entries)
    classes = Counter(class_key(entry.label) if entry.label else entry.number for entry in entries)
    labels = tuple(sorted({entry.label for entry in entries if entry.label}))
    known = None not in classes
    return Part(
        labels=labels if all(entry.label for entry in entries) else None,
        videos=tuple((entry.label, entry.stem) for entry in entries),
        counts=tuple(sorted(classes.values())) if known else None,
        num_classes=len(classes) if known else None,
        num_videos=len(entries),
    )


def video_key(stem: str) -> str:
    """Return the key of a video across lists: its stem.

    For Kinetics it is the YouTube id, as some lists have times and some do not.
    """
    timed = TIMED.fullmatch(stem)
    return timed[1] if timed else stem


def _from_shipped(name: str) -> SplitSet:
    split = shipped(name)
    parts = {
        part: Part(labels, None, None, len(labels), split.videos.get(part)) for part, labels in split.splits.items()
    }
    return SplitSet(name, "classes", parts)


def _from_shards(folder: Path) -> SplitSet:
    with ShardSet.open(folder, series=()) as shards:
        if not shards.dataset.splits:
            raise ShardError(f"{folder} has no splits; see --splits and --holdout of fsar-preprocess")
        names = shards.dataset.classes
        parts = {
            split: entries_part(
                Entry(shards.name(row), names[shards.labels[row]], None) for row in shards.split_rows(split).tolist()
            )
            for split in shards.dataset.splits
        }
    return SplitSet(str(folder), "shards", parts)


def _sha256(content: object) -> str:
    return hashlib.sha256(json_line(content)).hexdigest()


def _together(hashes: dict[str, str | None]) -> str | None:
    return None if None in hashes.values() else _sha256(hashes)


@dataclass(frozen=True)
class Overlap:
    """The names that two splits share, of one source or of two.

    Attributes:
        fitted: Source and split that trains or selects a model.
        tested: Source and split that tests it.
        what: "videos" or "classes".
        names: Shared names, sorted, as the tested side spells them; None where a side has none.
        total: Number on the tested side.
    """

    fitted: tuple[str, str]
    tested: tuple[str, str]
    what: str
    names: tuple[str, ...] | None
    total: int

    @property
    def share(self) -> float:
        """Share of the tested side."""
        return len(self.names or ()) / self.total if self.total else 0.0


def leakage(a: SplitSet, b: SplitSet) -> list[Overlap]:
    """Compare the splits inside `a` and `b`, and those that fit a model with the test of the other.

    Raises:
        ShardError: nothing can be compared between `a` and `b`.
    """
    across = [*_across(a, b), *_across(b, a)]
    if all(overlap.names is None for overlap in across):
        raise ShardError(
            f"nothing of {a.name} and {b.name} can be compared: it takes train or val in one and test in the other, "
            "and videos or class names on both sides"
        )
    return [*_inside(a), *([] if b is a else _inside(b)), *across]


def _inside(splits: SplitSet) -> Iterator[Overlap]:
    for first, second in combinations(splits.parts, 2):
        yield from _compare(splits, first, splits, second)


def _across(a: SplitSet, b: SplitSet) -> Iterator[Overlap]:
    for split in FITTED:
        if split in a.parts and "test" in b.parts:
            yield from _compare(a, split, b, "test")


def _compare(a: SplitSet, first: str, b: SplitSet, second: str) -> Iterator[Overlap]:
    fitted, tested = a.parts[first], b.parts[second]
    sides = (a.name, first), (b.name, second)
    within = not (a.unique_stems and b.unique_stems)
    videos = _shared(_videos(fitted, within=within), _videos(tested, within=within))
    yield Overlap(*sides, "videos", videos, tested.num_videos or 0)
    yield Overlap(*sides, "classes", _shared(fitted.class_keys, tested.class_keys), tested.num_classes or 0)


def _videos(part: Part, *, within: bool) -> dict[str, str] | None:
    """Return the stem of each video by its key; `within` adds the class, as stems repeat."""
    if part.videos is None or (within and part.labels is None):
        return None
    return {(f"{class_key(label)}/" if within and label else "") + video_key(stem): stem for label, stem in part.videos}


def _shared(fitted: dict[str, str] | None, tested: dict[str, str] | None) -> tuple[str, ...] | None:
    if fitted is None or tested is None:
        return None
    return tuple(sorted(tested[key] for key in fitted.keys() & tested.keys()))
