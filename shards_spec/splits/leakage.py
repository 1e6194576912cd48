"""Whether what one split trains on is tested by another: shared videos and shared classes, counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from shards_spec.errors import ShardError
from shards_spec.splits.sets import Part, SplitSet, video_key
from shards_spec.splits.shipped import class_key

SEEN = ("train", "val")  # what training sees, and what chooses its checkpoint


@dataclass(frozen=True)
class Overlap:
    """What a split of one source shares with a split of the same or of the other.

    Attributes:
        seen: Source and split that training or selection sees.
        tested: Source and split that is tested on it.
        what: "videos" or "classes".
        names: What both hold, sorted, spelled as the tested side spells it; None where one side does not tell.
        total: Number on the tested side.
    """

    seen: tuple[str, str]
    tested: tuple[str, str]
    what: str
    names: tuple[str, ...] | None
    total: int

    @property
    def share(self) -> float:
        """Share of the tested side."""
        return len(self.names or ()) / self.total if self.total else 0.0


def leakage(a: SplitSet, b: SplitSet) -> list[Overlap]:
    """Overlaps inside `a` and `b`, and of what each trains or selects on with what the other tests.

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
    for split in SEEN:
        if split in a.parts and "test" in b.parts:
            yield from _compare(a, split, b, "test")


def _compare(a: SplitSet, first: str, b: SplitSet, second: str) -> Iterator[Overlap]:
    seen, tested = a.parts[first], b.parts[second]
    sides = (a.name, first), (b.name, second)
    within = not (a.unique_stems and b.unique_stems)
    videos = _shared(_videos(seen, within=within), _videos(tested, within=within))
    yield Overlap(*sides, "videos", videos, tested.num_videos or 0)
    yield Overlap(*sides, "classes", _shared(seen.class_keys, tested.class_keys), tested.num_classes or 0)


def _videos(part: Part, *, within: bool) -> dict[str, str] | None:
    """Stem of each video's key; with its class where stems repeat from class to class."""
    if part.videos is None or (within and part.labels is None):
        return None
    return {(f"{class_key(label)}/" if within and label else "") + video_key(stem): stem for label, stem in part.videos}


def _shared(seen: dict[str, str] | None, tested: dict[str, str] | None) -> tuple[str, ...] | None:
    return None if seen is None or tested is None else tuple(sorted(tested[key] for key in seen.keys() & tested.keys()))
