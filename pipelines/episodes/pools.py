"""The classes that episodes draw from: those of a split, other labels, or single videos."""

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
    """Labels of videos; without names, every video is a class of its own.

    Attributes:
        names: Names of the labels by their numbers.
        used: Numbers of the labels that are drawn from, in order.
        rows: [n] catalogue rows, ascending.
        of_rows: [n] their labels.
    """

    names: tuple[str, ...]
    used: tuple[int, ...]
    rows: Ints
    of_rows: Ints

    @classmethod
    def of_split(cls, shards: ShardSet, split: str) -> Labels:
        """Take the classes of a split, those without videos too.

        Raises:
            ShardError: there is no such split.
        """
        rows = shards.split_rows(split)
        place = {name: label for label, name in enumerate(shards.dataset.classes)}
        used = tuple(place[name] for name in shards.dataset.splits[split].classes)
        return cls(shards.dataset.classes, used, rows, shards.labels[rows].astype(np.int64))

    @classmethod
    def of_single_videos(cls, shards: ShardSet, split: str) -> Labels:
        """Take every video of a split as a class of its own; the true classes are not read."""
        rows = shards.split_rows(split)
        return cls((), (), rows, np.full(len(rows), -1))


class Pool(Protocol):
    """One class as an episode uses it; `ClassPool` says what each member means."""

    @property
    def label(self) -> int:
        """Number of the class; -1 where it has no number."""

    @property
    def rows(self) -> Ints:
        """Return the rows of the videos that serve as support and queries."""

    def can_serve(self, shot: int, queries: int, unlabelled: int = 0) -> bool:
        """Tell whether an episode can be drawn."""

    def choose(self, draw: Draw, shot: int, queries: int) -> tuple[list[int], list[int]]:
        """Draw the rows of support and queries."""

    def choose_unlabelled(self, draw: Draw, taken: Collection[int], count: int) -> list[int]:
        """Draw rows of unlabelled videos."""


@dataclass(frozen=True, slots=True)
class VideoPool:
    """One video as a class: support and queries are views of it with other frames and colours.

    UMTRA (Khodadadeh et al., NeurIPS 2019); the only pool in which support and queries share a
    video.
    """

    row: int

    @property
    def label(self) -> int:
        """Return -1: the video has no class."""
        return -1

    @property
    def rows(self) -> Ints:
        """Return the one row."""
        return np.array([self.row])

    def can_serve(self, shot: int, queries: int, unlabelled: int = 0) -> bool:
        """Tell whether no unlabelled video is asked for."""
        del shot, queries
        return unlabelled == 0

    def choose(self, draw: Draw, shot: int, queries: int) -> tuple[list[int], list[int]]:
        """Return the video, once for each view; nothing is drawn."""
        del draw
        return [self.row] * shot, [self.row] * queries

    def choose_unlabelled(self, draw: Draw, taken: Collection[int], count: int) -> list[int]:
        """Return no row: the class has no further video."""
        del draw, taken, count
        return []


class Pools(Protocol):
    """The pools of all classes, in order; each is made when it is asked for."""

    def __len__(self) -> int:
        """Number of classes."""

    def __getitem__(self, place: int) -> Pool:
        """Return the pool of the class at a place."""

    def serve(self, shot: int, queries: int, unlabelled: int) -> Flags:
        """Tell which classes [C] `can_serve`."""

    def only(self, kept: Flags) -> Pools:
        """The pools of which `kept` [C] is true."""

    def videos(self) -> Ints:
        """Return the rows [n] of all videos that an episode may take, ascending."""


@dataclass(frozen=True)
class VideoPools:
    """Every video of `rows` [C] as a class of its own."""

    rows: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> VideoPool:
        return VideoPool(self.rows.item(place))

    def serve(self, shot: int, queries: int, unlabelled: int) -> Flags:
        """Tell which classes [C] can serve: all, or none where unlabelled videos are asked for."""
        return np.full(len(self), VideoPool(-1).can_serve(shot, queries, unlabelled))

    def only(self, kept: Flags) -> VideoPools:
        """The pools of which `kept` [C] is true."""
        return VideoPools(self.rows[kept])

    def videos(self) -> Ints:
        """Return all rows [C]."""
        return np.unique(self.rows)


@dataclass(frozen=True)
class ClassPools:
    """Pools of classes as columns of all their videos, by class and then by row.

    A million videos are sorted once, in NumPy; a pool is a slice of the columns, made when an
    episode draws its class.

    Attributes:
        labels: [C] numbers of the classes.
        rows: [n] catalogue rows.
        groups: [n] numbers of the videos' groups.
        sizes: [G] videos of each group.
        edges: [C, 2] begin and end of each class in rows and groups.
        group_edges: [C, 2] begin and end of each class in sizes.
        biggest: [C] size of each class's largest group.
        labelled: Tells which videos of a class serve as support and queries, from its label and
            their number; None: all of them.
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
        """Sort the videos of `labels`; groups [V] by catalogue row, None: no video has a group."""
        order = np.argsort(labels.of_rows, kind="stable")
        rows, of_rows = labels.rows[order], labels.of_rows[order]  # [n]
        used = np.array(labels.used, dtype=np.int64)
        edges = np.stack([np.searchsorted(of_rows, used, side) for side in ("left", "right")], axis=1)
        keys = group_keys(len(rows), None if groups is None else groups[rows])
        by_group = np.lexsort((keys, of_rows))  # [n] classes stay where they are
        first = np.ones(len(rows), dtype=np.bool_)  # [n] true where a group begins
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
        """Tell which classes [C] can serve.

        A pool is made only for one whose largest group is big.
        """
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
        """Return the rows [n] of all videos of the classes, ascending."""
        rows = np.sort(np.concatenate([self.rows[start:stop] for start, stop in self.edges.tolist()]))
        return rows[np.diff(rows, prepend=-1) > 0]  # each once; NumPy's `unique` takes ten times as long


def make_pools(labels: Labels, groups: npt.NDArray[np.int32], rules: EpisodeRules, *, seed: int) -> Pools:
    """Make one pool for each label that is used, in that order, or one for each video.

    With `labelled_fraction` < 1 a part of each class serves only as unlabelled videos. That part is
    a function of the seed and the name of the class, not of the episode.

    Args:
        labels: The labels of the videos.
        groups: [V] by catalogue row.
        rules: Rules of the episodes.
        seed: Seed of the stream.

    Raises:
        ConfigError: every video is a class of its own, and unlabelled ones are asked for.
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
    """Say why a class cannot fill an episode, and what to do; `what` names it."""
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
    """Tell which videos [videos] belong to the labelled part of their class."""
    # by the class's name, not its number: the part is the same whichever classes a split holds
    number = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8])
    places = list(range(videos))
    PhiloxDraw(seed, number).shuffle(places)
    labelled = np.zeros(videos, dtype=np.bool_)
    labelled[places[: round(fraction * videos)]] = True
    return labelled
