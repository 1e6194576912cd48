"""Recognise published lists by their facts: sizes, class names, names of videos."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shards_spec.splits.sets import TIMED, Part, SplitSet
from shards_spec.splits.shipped import class_key, known_file, shipped

LIKE = 0.8  # a list with fewer of the published number of videos is not called a copy with gaps


@dataclass(frozen=True)
class Published:
    """A published list, by the facts that tell it from others.

    Attributes:
        name: Short name.
        dataset: The data set whose videos it lists.
        published: Its publication.
        sizes: Classes and videos of each split.
        videos_a_class: Least and most videos of a class of each split; empty where not known.
        labels: Class names of each split; empty where they are not known.
        stem: Pattern of every stem; None where it is not known.
        untimed: Number of names that are a bare YouTube id; None for other data sets.
        note: A remark for the user.
    """

    name: str
    dataset: str
    published: str
    sizes: dict[str, tuple[int, int]]
    videos_a_class: dict[str, tuple[int, int]]
    labels: dict[str, tuple[str, ...]]
    stem: str | None
    untimed: int | None
    note: str


@dataclass(frozen=True)
class Fit:
    """The comparison of a split with a published list: equal facts, and other facts."""

    name: str
    equal: tuple[str, ...]
    but: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """`ucf101-arn (equal: ...)` or `like ucf101-arn, but ...`."""
        return f"like {self.name}, but {'; '.join(self.but)}" if self.but else f"{self.name} ({', '.join(self.equal)})"


def published_lists() -> list[Published]:
    """Return the published lists that can be recognised."""
    return [_published(raw) for raw in known_file("published")["lists"]]


def recognise(splits: SplitSet) -> list[Fit]:
    """Return the published lists that a split fits; where it fits no list, those that it is like.

    Two sets of videos may agree in every compared fact: a fit is no proof.
    """
    fits = [_fit(splits, known) for known in published_lists() if _akin(splits, known)]
    exact = [fit for fit in fits if not fit.but]
    return exact or fits


def _published(raw: dict[str, Any]) -> Published:
    return Published(
        name=raw["name"],
        dataset=raw["dataset"],
        published=raw["published"],
        sizes={split: (pair[0], pair[1]) for split, pair in raw["sizes"].items()},
        videos_a_class={split: (pair[0], pair[1]) for split, pair in raw.get("videos_a_class", {}).items()},
        labels=shipped(raw["classes"]).splits if "classes" in raw else {},
        stem=raw.get("stem"),
        untimed=raw.get("untimed"),
        note=raw.get("note", ""),
    )


def _akin(splits: SplitSet, known: Published) -> bool:
    """Tell whether the classes and the form of the names agree, so that the rest is compared."""
    if not splits.parts.keys() <= known.sizes.keys():
        return False
    return all(_akin_part(part, known, split) for split, part in splits.parts.items())


def _akin_part(part: Part, known: Published, split: str) -> bool:
    classes, videos = known.sizes[split]
    if part.num_classes != classes:
        return False
    if known.stem and not all(re.fullmatch(known.stem, stem) for _, stem in part.videos or ()):
        return False
    if part.class_keys is not None and known.labels:
        return set(part.class_keys) == {class_key(label) for label in known.labels[split]}
    return part.videos is not None and LIKE * videos <= len(part.videos) <= videos / LIKE


def _fit(splits: SplitSet, known: Published) -> Fit:
    equal = ["number of classes"]
    if known.labels and splits.classes_sha256:
        equal.append("class names")
    if any(part.videos is None for part in splits.parts.values()):
        return Fit(known.name, (*equal, "videos not compared: classes alone are known"), ())
    but = [*_missing(splits, known), *_other_sizes(splits, known), *_other_marks(splits, known)]
    equal += ["number of videos", *(["videos a class"] if known.videos_a_class else [])]
    if known.untimed is not None:
        equal.append(f"{known.untimed} names without times")
    elif known.stem:
        equal.append("form of the names")
    return Fit(known.name, tuple(equal), tuple(but))


def _missing(splits: SplitSet, known: Published) -> Iterator[str]:
    for split in known.sizes.keys() - splits.parts.keys():
        yield f"without a list of {split}"


def _other_sizes(splits: SplitSet, known: Published) -> Iterator[str]:
    for split, part in splits.parts.items():
        videos, bounds = known.sizes[split][1], known.videos_a_class.get(split)
        if part.num_videos != videos:
            yield f"{part.num_videos:,} of {videos:,} videos in {split}"
        elif bounds and part.counts and (found := (part.counts[0], part.counts[-1])) != bounds:
            yield f"{found[0]} to {found[1]} videos a class in {split} where it has {bounds[0]} to {bounds[1]}"


def _other_marks(splits: SplitSet, known: Published) -> Iterator[str]:
    """Compare the number of names without times: it tells Kinetics' two families of lists apart."""
    stems = [stem for part in splits.parts.values() for _, stem in part.videos or ()]
    untimed = sum(not TIMED.fullmatch(stem) for stem in stems)
    if known.untimed not in {None, untimed}:
        yield f"{untimed} names without times where it has {known.untimed}"
