"""Plan an episode as data: which pixels are read, and which clips are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.draw import Draw, Jitter, PhiloxDraw, draw_jitter
from pipelines.episodes.pools import Labels, Pools, make_pools, too_few
from pipelines.episodes.rules import EpisodeRules
from pipelines.reads import ReadLists, Reads
from pipelines.sampling import RULES_WITH_FPS, centre_frames, check_frame_rule, distinct, segment
from shards_spec import ShardSet
from shards_spec.errors import ConfigError

Ints = npt.NDArray[np.int64]

_UNLABELLED = 1 << 63  # flipped in an episode's number, so that its unlabelled videos have draws of their own


class View(NamedTuple):
    """One clip: frames `indices` [T] of the plan's reads number `reads`, flip, crop and jitter.

    `box` is the crop's (top, left) after flip and resize; None where the window that is read is the
    crop already.
    """

    reads: int
    indices: tuple[int, ...]
    flip: bool
    box: tuple[int, int] | None
    jitter: Jitter | None


@dataclass(frozen=True)
class EpisodePlan:
    """Everything that is random about episode n.

    Attributes:
        n: Number of the episode.
        way: Classes.
        shot: Support videos of each.
        class_ids: int64 [way], places in the data set's class table, or in the names of other
            labels (-1: no class).
        reads: Windows of pixels, each read once.
        support: way * shot views, grouped by class.
        query: Q views.
        query_labels: int64 [Q] in [0, way).
        support_rows: Catalogue rows of the support videos.
        query_rows: Those of the queries.
        unlabelled: U views, in an order that says nothing of their classes.
        unlabelled_rows: Their catalogue rows.
    """

    n: int
    way: int
    shot: int
    class_ids: Ints
    reads: tuple[Reads, ...]
    support: tuple[View, ...]
    query: tuple[View, ...]
    query_labels: Ints
    support_rows: Ints
    query_rows: Ints
    unlabelled: tuple[View, ...] = ()
    unlabelled_rows: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def views(self) -> tuple[View, ...]:
        """Return all clips: support, queries, unlabelled."""
        return self.support + self.query + self.unlabelled


@dataclass(frozen=True)
class Chosen:
    """The videos of an episode, whatever their frames.

    Attributes:
        classes: [way] places in the data set's class table.
        support: way * shot catalogue rows, grouped by class.
        query: Q pairs of a row and a label in [0, way).
        unlabelled: U rows.
    """

    classes: tuple[int, ...]
    support: tuple[int, ...]
    query: tuple[tuple[int, int], ...]
    unlabelled: tuple[int, ...] = ()


class EpisodeStream:
    """Episodes of one split: `plan(n)` is a pure function of (seed, n), so n is the whole state.

    Args:
        shards: The opened shard set.
        split: Name of its split.
        rules: Rules by which episodes are drawn.
        seed: Seed of all draws.
        labels: Labels that stand in for the split's own classes.
        given: The videos of episodes 0, 1, ... where they are not drawn, and there are no others.
            Frames and crops follow the rules as ever.

    Attributes:
        short_videos: Number of videos of fewer frames than are chosen; some of their frames are
            repeated.
        dropped: Names of the classes that were left out, having too few videos.

    Raises:
        ShardError: the split or the frames do not exist.
        ConfigError: an episode of these rules cannot be drawn from every class of the split.
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str,
        rules: EpisodeRules,
        *,
        seed: int,
        labels: Labels | None = None,
        given: Sequence[Chosen] | None = None,
    ) -> None:
        PhiloxDraw(seed, 0)  # refuses an impossible seed here and not at the first episode
        self.split, self.rules, self.seed, self.given = split, rules, seed, given
        labels = labels or Labels.of_split(shards, split)
        self._names = labels.names
        rows = labels.rows if given is None else _rows_of(given)  # [n]
        self._sizes = shards.series("rgb").sizes  # [V, 2]
        self._frames = shards.frames  # [V]
        self._fps = shards.fps if rules.frame_rule in RULES_WITH_FPS else None  # [V]
        self._rule = rules.chooser()
        self.dropped: tuple[str, ...] = ()
        if given is None:
            self._pools = self._checked(make_pools(labels, shards.groups, rules, seed=seed))
        check_frame_rule(shards, rows, rule=rules.frame_rule, split=split)
        self.short_videos = int((self._frames[rows] < rules.least_frames).sum())
        # Most evaluations draw nothing about frames and crops: all clips are then planned at once,
        # in NumPy.
        whole = bool((self._sizes[rows] == rules.resized).all())
        self._fixed = self._rule is segment and not rules.random_views and whole and not self.short_videos

    def plan(self, n: int) -> EpisodePlan:
        """Plan episode n, touching no stored frame.

        The draws come in the order of the reference code.

        Raises:
            ConfigError: the stream has a list of episodes, and it is shorter.
        """
        draw = PhiloxDraw(self.seed, n)
        chosen = self._chosen(draw, n)
        way, support, query = len(chosen.classes), chosen.support, chosen.query
        reads = ReadLists()
        query_rows = np.array([row for row, _ in query], dtype=np.int64)
        support_rows, unlabelled_rows = (np.array(rows, dtype=np.int64) for rows in (support, chosen.unlabelled))
        support_views = self.views(draw, support_rows, reads, query=False)
        query_views = self.views(draw, query_rows, reads, query=True)
        unlabelled_views = self.views(draw, unlabelled_rows, reads, query=False)
        return EpisodePlan(
            n=n,
            way=way,
            shot=len(support) // way,
            class_ids=np.array(chosen.classes, dtype=np.int64),
            reads=reads.reads("rgb"),
            support=support_views,
            query=query_views,
            query_labels=np.array([label for _, label in query], dtype=np.int64),
            support_rows=support_rows,
            query_rows=query_rows,
            unlabelled=unlabelled_views,
            unlabelled_rows=unlabelled_rows,
        )

    def choose(self, n: int) -> Chosen:
        """Return the videos of episode n; frames, crops and augmentation have no part in them.

        They are a function of the seed, the classes' videos and groups, and the rules that say
        which of them an episode takes.

        Raises:
            ConfigError: the stream has a list of episodes, and it is shorter.
        """
        return self._chosen(PhiloxDraw(self.seed, n), n)

    def videos(self) -> Ints:
        """Return the catalogue rows [n] that episodes may take, ascending."""
        if self.given is not None:
            return _rows_of(self.given)
        return self._pools.videos()

    def drawn_videos(self) -> Ints:
        """Return those of `videos` [n] that these rules can draw.

        They are the labelled ones, where no unlabelled video is taken.
        """
        if self.given is not None or self.rules.unlabelled or self.rules.labelled_fraction == 1:
            return self.videos()
        return np.sort(np.concatenate([self._pools[place].rows for place in range(len(self._pools))]))

    def _chosen(self, draw: Draw, n: int) -> Chosen:
        if self.given is None:
            return self._choose(draw, n)
        if n >= len(self.given):
            raise ConfigError(f"episode {n} is asked for and {len(self.given)} were given, from 0: ask for fewer")
        return self.given[n]

    def _choose(self, draw: Draw, n: int) -> Chosen:
        """Draw classes and videos: all that is drawn before what depends on frames.

        Unlabelled videos have draws of their own, so that the rest of the episode is the same
        without them. A class that is dropped, having too few of them, changes it nevertheless.
        """
        rules = self.rules
        places = list(islice(distinct(draw, len(self._pools)), rules.way))
        pools = [self._pools[place] for place in places]
        support: list[int] = []
        query: list[tuple[int, int]] = []
        for label, pool in enumerate(pools):
            ours, theirs = pool.choose(draw, rules.shot, rules.queries)
            support += ours
            query += [(row, label) for row in theirs]
        draw.shuffle(query)  # the place of a query must say nothing about its class
        unlabelled: list[int] = []
        if rules.unlabelled:
            taken = {*support, *(row for row, _ in query)}
            unlabelled = self._choose_unlabelled(PhiloxDraw(self.seed, n ^ _UNLABELLED), places, taken)
        return Chosen(tuple([pool.label for pool in pools]), tuple(support), tuple(query), tuple(unlabelled))

    def _choose_unlabelled(self, draw: Draw, places: list[int], taken: set[int]) -> list[int]:
        """Draw rows of unlabelled videos, of the classes at these places and of others."""
        rules, pools = self.rules, self._pools
        rows = [row for own in places for row in pools[own].choose_unlabelled(draw, taken, rules.unlabelled_per_class)]
        for other in islice(distinct(draw, len(pools) - len(places)), rules.distractor_classes):
            for own in sorted(places):  # ascending: a number among the other classes becomes a place among all
                other += own <= other
            rows += pools[other].choose_unlabelled(draw, taken, rules.distractors)
        draw.shuffle(rows)  # the place of a video must say nothing about its class
        return rows

    def views(self, draw: Draw, rows: Ints, reads: ReadLists, *, query: bool) -> tuple[View, ...]:
        """Draw a clip of each video, and add its windows to `reads`.

        The draws of a clip are frames, flip, crop x, crop y, jitter, in this order.
        """
        rules, rule, views = self.rules, self._rule, []
        if self._fixed and len(rows):
            return self._fixed_views(rows, reads)
        steps, random_frames, size = rules.frames, rules.random_frames, None
        whole, crop = rules.resized, (rules.crop, rules.crop)  # (height, width)
        down, right = whole[0] - rules.crop, whole[1] - rules.crop
        rates = [0.0] * len(rows) if self._fps is None else self._fps[rows].tolist()
        clips = zip(rows.tolist(), self._frames[rows].tolist(), self._sizes[rows].tolist(), rates, strict=True)
        for row, length, (height, width), fps in clips:
            frames = rule(draw, length, steps=steps, random_frames=random_frames, fps=fps)
            flip = query and rules.query_flip and draw.random() < 0.5
            top, left = _crop_corner(draw, down, right) if rules.random_crop else (down // 2, right // 2)
            jitter = draw_jitter(draw) if query and rules.query_jitter else None
            exact = (height, width) == whole
            if size != (read := crop if exact else (height, width)):  # mostly that of the clip before
                number, windows = reads.of_size(size := read)
            if exact:
                # the crop box lies on the flipped frame, the window on the stored one
                start = width - rules.crop - left if flip else left
                views.append(View(number, windows.add(row, frames, top, start), flip, None, jitter))
            else:
                views.append(View(number, windows.add(row, frames, 0, 0), flip, (top, left), jitter))
        return tuple(views)

    def _fixed_views(self, rows: Ints, reads: ReadLists) -> tuple[View, ...]:
        """Do as `views`, for all clips at once: nothing is drawn, no video is short or resized."""
        rules, (height, width) = self.rules, self.rules.resized
        number, windows = reads.of_size((rules.crop, rules.crop))
        frames = centre_frames(self._frames[rows], rules.frames)
        places = windows.add_clips(rows, frames, (height - rules.crop) // 2, (width - rules.crop) // 2)
        return tuple([View(number, indices, False, None, None) for indices in places])

    def _checked(self, pools: Pools) -> Pools:
        """Leave out the classes that cannot fill an episode, or refuse the first of them."""
        rules = self.rules
        able = pools.serve(rules.shot, rules.queries, rules.unlabelled_of_a_class)
        small = [pools[place] for place in np.flatnonzero(~able).tolist()]
        if rules.small_classes == "drop":
            self.dropped = tuple(self._names[pool.label] for pool in small)
            pools, small = pools.only(able), []
        needed = rules.way + rules.distractor_classes
        if len(pools) < needed:
            left_out = f" (left out, having too few videos: {', '.join(self.dropped)})" if self.dropped else ""
            distractors = f" with {rules.distractor_classes} distractor classes" if rules.distractor_classes else ""
            raise ConfigError(
                f'split "{self.split}" has {len(pools)} classes{left_out} and a {rules.way}-way '
                f"episode{distractors} needs {needed}: use a smaller way or another split"
            )
        if small:
            raise ConfigError(
                too_few(small[0], f'class "{self._names[small[0].label]}" of split "{self.split}"', rules)
            )
        return pools


def _rows_of(given: Sequence[Chosen]) -> Ints:
    """Return the rows [n] of the videos of some episodes, each once, ascending."""
    rows = {row for one in given for row in (*one.support, *(row for row, _ in one.query), *one.unlabelled)}
    return np.array(sorted(rows), dtype=np.int64)


def _crop_corner(draw: Draw, down: int, right: int) -> tuple[int, int]:
    """Draw top and left of a crop that has this room below it and to its right.

    The left one is drawn first.
    """
    left = int(draw.uniform(0, right))
    return int(draw.uniform(0, down)), left
