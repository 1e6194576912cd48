"""What episodes draw their classes from: the classes of a split, other labels of its videos, or single videos."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipelines.draw import PhiloxDraw
from pipelines.sampling import ClassPool
from shards_spec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

    import numpy.typing as npt

    from pipelines.draw import Draw
    from pipelines.plan import EpisodeRules
    from shards_spec import ShardSet

    Ints = npt.NDArray[np.int64]


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

    @property
    def videos(self) -> Ints:
        """Rows of all videos that an episode may take, also as unlabelled ones."""

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

    @property
    def videos(self) -> Ints:
        """The one row."""
        return self.rows

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


def make_pools(labels: Labels, groups: npt.NDArray[np.int32], rules: EpisodeRules, *, seed: int) -> list[Pool]:
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
        return [VideoPool(row) for row in labels.rows.tolist()]
    order = np.argsort(labels.of_rows, kind="stable")
    rows = labels.rows[order]
    edges = np.searchsorted(labels.of_rows[order], [[label, label + 1] for label in labels.used])  # [C, 2]
    pools: list[Pool] = []
    for label, (start, stop) in zip(labels.used, edges.tolist(), strict=True):
        own = rows[start:stop]
        apart = groups[own] if rules.groups == "disjoint" else None
        whole = rules.labelled_fraction == 1
        labelled = None if whole else _labelled(labels.names[label], len(own), rules.labelled_fraction, seed)
        pools.append(ClassPool.build(label, own, apart, labelled))
    return pools


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


def _labelled(name: str, videos: int, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """[videos] whether each is of the labelled part of its class."""
    number = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8])
    places = list(range(videos))
    PhiloxDraw(seed, number).shuffle(places)
    labelled = np.zeros(videos, dtype=np.bool_)
    labelled[places[: round(fraction * videos)]] = True
    return labelled
