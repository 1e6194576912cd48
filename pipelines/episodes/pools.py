"""What episodes draw their classes from: the classes of a split, other labels of its videos, or single videos."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipelines.draw import Draw, PhiloxDraw
from pipelines.episodes.rules import EpisodeRules
from pipelines.sampling import ClassPool, group_keys
from shards_spec import ShardSet
from shards_spec.errors import ConfigError

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Labels:
    """Labels of videos: names by number, the numbers that are drawn from in order, and the label of each row.

    rows: [n] catalogue rows, ascending. of_rows: [n] their labels. Where `names` is empty, every video is a class
    of its own: support and queries of an episode are views of one video.
    """

    names: tuple[str, ...]
    used: tuple[int, ...]
    rows: Ints
    of_rows: Ints

    @classmethod
    def of_split(cls, shards: ShardSet, split: str) -> Labels:
        """The classes of a split, those without videos too; ShardError when there is no such split."""
        rows = shards.split_rows(split)
        place = {name: label for label, name in enumerate(shards.dataset.classes)}
        used = tuple(place[name] for name in shards.dataset.splits[split].classes)
        return cls(shards.dataset.classes, used, rows, shards.labels[rows].astype(np.int64))

    @classmethod
    def of_single_videos(cls, shards: ShardSet, split: str) -> Labels:
        """Every video of a split as a class of its own, its true one unread."""
        rows = shards.split_rows(split)
        return cls((), (), rows, np.full(len(rows), -1))


class Pool(Protocol):
    """What an episode asks of one of its classes; `ClassPool` says what each means."""

    @property
    def label(self) -> int:
        """Number of the class, -1 where it has none."""

    @property
    def rows(self) -> Ints:
        """Rows of the videos that serve as support and queries."""

    def can_serve(self, shot: int, queries: int, unlabelled: int = 0) -> bool:
        """Tell whether an episode can be drawn."""

    def choose(self, draw: Draw, shot: int, queries: int) -> tuple[list[int], list[int]]:
        """Draw the rows of support and queries."""

    def choose_unlabelled(self, draw: Draw, taken: Collection[int], count: int) -> list[int]:
        """Draw rows of unlabelled videos."""


@dataclass(frozen=True, slots=True)
class VideoPool:
    """One video as a class: its support and queries are views of it that differ in frames and augmentation.

    UMTRA (Khodadadeh et al., NeurIPS 2019); the only pool in which support and queries share a video.
    """

    row: int

    @property
    def label(self) -> int:
        """No class has such a number."""
        return -1

    @property
    def rows(self) -> Ints:
        """The one row."""
        return np.array([self.row])

    def can_serve(self, shot: int, queries: int, unlabelled: int = 0) -> bool:
        """Tell whether no further video is asked for."""
        del shot, queries
        return unlabelled == 0

    def choose(self, draw: Draw, shot: int, queries: int) -> tuple[list[int], list[int]]:
        """The video, once for each view; nothing is drawn."""
        del draw
        return [self.row] * shot, [self.row] * queries

    def choose_unlabelled(self, draw: Draw, taken: Collection[int], count: int) -> list[int]:
        """None: there is no further video."""
        del draw, taken, count
        return []


class Pools(Protocol):
    """The pools of all classes in order. Many classes are columns, and a pool is made when it is asked for."""

    def __len__(self) -> int:
        """Number of classes."""

    def __getitem__(self, place: int) -> Pool:
        """The pool of the class at a place."""

    def serve(self, shot: int, queries: int, unlabelled: int) -> Flags:
        """[C] whether each `can_serve`."""

    def only(self, kept: Flags) -> Pools:
        """The pools of which `kept` [C] is true."""

    def videos(self) -> Ints:
        """[n] rows of all videos that an episode may take, also as unlabelled ones, ascending."""


@dataclass(frozen=True)
class VideoPools:
    """Every video of `rows` [C] as a class of its own."""

    rows: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> VideoPool:
        return VideoPool(self.rows.item(place))

    def serve(self, shot: int, queries: int, unlabelled: int) -> Flags:
        """[C] whether each can serve: all do, or none."""
        return np.full(len(self), VideoPool(-1).can_serve(shot, queries, unlabelled))

    def only(self, kept: Flags) -> VideoPools:
        """The pools of which `kept` [C] is true."""
        return VideoPools(self.rows[kept])

    def videos(self) -> Ints:
        """[C] all rows."""
        return np.unique(self.rows)


@dataclass(frozen=True)
class ClassPools:
    """Pools of classes as columns of all their videos, by class and then by row.

    labels: [C] numbers of the classes. edges: [C, 2] where each begins and ends in rows [n] and groups [n], numbers of
    the videos' groups. sizes: [G] videos of each group. group_edges: [C, 2] where the groups of each class begin and
    end. biggest: [C] the largest of them. labelled: tells which videos of a class serve as support and queries;
    None: all.
    """

    labels: Ints
    rows: Ints
    groups: Ints
    sizes: Ints
    edges: Ints
    group_edges: Ints
    biggest: Ints
    labelled: Callable[[int, int], Flags] | None = None
    _made: dict[int, ClassPool] = field(default_factory=dict)

    @classmethod
    def build(
        cls, labels: Labels, groups: npt.NDArray[np.int32] | None, labelled: Callable[[int, int], Flags] | None = None
    ) -> ClassPools:
        """Sort the videos of `labels`; groups [V] by catalogue row, None: no video has one."""
        order = np.argsort(labels.of_rows, kind="stable")
        rows, of_rows = labels.rows[order], labels.of_rows[order]  # [n]
        used = np.array(labels.used, dtype=np.int64)
        edges = np.stack([np.searchsorted(of_rows, used, side) for side in ("left", "right")], axis=1)
        keys = group_keys(len(rows), None if groups is None else groups[rows])
        by_group = np.lexsort((keys, of_rows))  # [n] classes stay where they are
        first = np.ones(len(rows), dtype=np.bool_)  # [n] whether a group begins
        first[1:] = (np.diff(of_rows) != 0) | (np.diff(keys[by_group]) != 0)
        starts = np.flatnonzero(first)  # [G]
        sizes = np.diff(starts, append=len(rows))
        numbers = np.empty_like(rows)
        numbers[by_group] = np.cumsum(first) - 1
        biggest = np.zeros(1 + max(of_rows.max(initial=-1), used.max(initial=-1)), dtype=np.int64)
        np.maximum.at(biggest, of_rows[starts], sizes)
        group_edges = np.searchsorted(starts, edges)
        return cls(used, rows, numbers, sizes, edges, group_edges, biggest[used], labelled)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> ClassPool:
        return self._made.get(place) or self._made.setdefault(place, self._make(place))

    def _make(self, place: int) -> ClassPool:
        label, biggest = self.labels.item(place), self.biggest.item(place)
        (start, stop), (low, high) = self.edges[place].tolist(), self.group_edges[place].tolist()
        rows, groups = self.rows[start:stop], self.groups[start:stop] - low
        pool = ClassPool(label, rows, groups, self.sizes[low:high], biggest, rows, groups)
        return pool if self.labelled is None else pool.with_labelled(self.labelled(label, len(rows)))

    def serve(self, shot: int, queries: int, unlabelled: int) -> Flags:
        """[C] whether each can serve: where its groups are small beside it, no pool is made to know that."""
        if unlabelled or self.labelled is not None:
            return np.array([self[place].can_serve(shot, queries, unlabelled) for place in range(len(self))], np.bool_)
        left = self.edges[:, 1] - self.edges[:, 0] - shot - queries  # [C]
        able = (left >= 0) & (left >= self.biggest - 1)
        for place in np.flatnonzero((left >= 0) & ~able).tolist():
            able[place] = self[place].can_serve(shot, queries)
        return able

    def only(self, kept: Flags) -> ClassPools:
        """The pools of which `kept` [C] is true."""
        parts = (self.labels, self.edges, self.group_edges, self.biggest)
        labels, edges, group_edges, biggest = (part[kept] for part in parts)
        return ClassPools(labels, self.rows, self.groups, self.sizes, edges, group_edges, biggest, self.labelled)

    def videos(self) -> Ints:
        """[n] rows of all videos of the classes, ascending."""
        rows = np.sort(np.concatenate([self.rows[start:stop] for start, stop in self.edges.tolist()]))
        return rows[np.diff(rows, prepend=-1) > 0]  # each once; NumPy's `unique` takes ten times as long


def make_pools(labels: Labels, groups: npt.NDArray[np.int32], rules: EpisodeRules, *, seed: int) -> Pools:
    """One pool a label that is used, in that order, or one a video; groups [V] by catalogue row.

    With `labelled_fraction` < 1 a part of each class serves as unlabelled videos only: a function of the seed and
    the name of the class, not of the episode.  ConfigError when single videos shall have unlabelled ones beside.
    """
    if not labels.names:
        if rules.unlabelled or rules.labelled_fraction < 1:
            raise ConfigError(
                "a video that is a class of its own has no unlabelled ones: "
                "set unlabelled_per_class and distractor_classes to 0, and labelled_fraction to 1"
            )
        return VideoPools(labels.rows)

    def labelled(label: int, videos: int) -> Flags:
        return _labelled(labels.names[label], videos, rules.labelled_fraction, seed)

    apart = groups if rules.groups == "disjoint" else None
    return ClassPools.build(labels, apart, labelled if rules.labelled_fraction < 1 else None)


def too_few(pool: Pool, what: str, rules: EpisodeRules) -> str:
    """Why a class cannot fill an episode, and what to do; `what` names it."""
    assert isinstance(pool, ClassPool)  # a single video always can
    have, need = len(pool.rows), rules.videos_per_class
    parts = f"{rules.shot} support and {rules.queries} query videos"
    videos = "labelled videos" if rules.labelled_fraction < 1 else "videos"
    if have < need:
        return (
            f"{what} has {have} {videos} and an episode needs {need} ({parts}): "
            "use fewer shots or queries, or small_classes = drop"
        )
    if not pool.can_serve(rules.shot, rules.queries):
        return (
            f"{what} has {have} {videos} in {np.count_nonzero(pool.sizes)} groups and an episode "
            f"needs {parts} that share no group, which these groups cannot give: use fewer shots or queries, "
            "groups = any, or small_classes = drop"
        )
    return (
        f"{what} has {len(pool.spare)} videos that may be unlabelled, and {parts} of an episode may not leave "
        f"{rules.unlabelled_of_a_class} of them (of other groups, unless groups = any): use fewer unlabelled videos, "
        "or small_classes = drop"
    )


def _labelled(name: str, videos: int, fraction: float, seed: int) -> Flags:
    """[videos] whether each is of the labelled part of its class."""
    number = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8])
    places = list(range(videos))
    PhiloxDraw(seed, number).shuffle(places)
    labelled = np.zeros(videos, dtype=np.bool_)
    labelled[places[: round(fraction * videos)]] = True
    return labelled
