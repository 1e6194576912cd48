"""Plan an episode as data: which pixels are read, and which clips are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from pipelines.draw import Draw, PhiloxDraw
from pipelines.episodes.clip_views import ClipList, ClipPlanner, View
from pipelines.episodes.motion import MotionView
from pipelines.episodes.pools import Labels, Pools, make_pools, too_few
from pipelines.episodes.rules import EpisodeRules
from pipelines.reads import Reads
from pipelines.sampling import check_frame_rule, distinct
from shards_spec import ShardSet
from shards_spec.errors import ConfigError

Ints = npt.NDArray[np.int64]

# Flipped in an episode's number, so that its unlabelled videos and its motion have draws of their own
_UNLABELLED, _MOTION = 1 << 63, 1 << 60


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
        motion_reads: Stored fields, each read once.
        motion: The motion of all clips, in the order of `views`; none where none is read.
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
    motion_reads: tuple[Reads, ...] = ()
    motion: tuple[MotionView, ...] = ()

    @property
    def views(self) -> tuple[View, ...]:
        """Return all clips of frames: support, queries, unlabelled; none where none are read."""
        return self.support + self.query + self.unlabelled

    @property
    def videos(self) -> tuple[int, int, int]:
        """Numbers of support, query and unlabelled videos."""
        return len(self.support_rows), len(self.query_rows), len(self.unlabelled_rows)


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
        planner: Plans the clips of the videos.
        short_videos: As of the planner.
        still_videos: The same.
        dropped: Names of the classes that were left out, having too few videos.

    Raises:
        ShardError: the split, the frames or the motion do not exist.
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
        self.dropped: tuple[str, ...] = ()
        if given is None:
            self._pools = self._checked(make_pools(labels, shards.groups, rules, seed=seed))
        check_frame_rule(shards, rows, rule=rules.frame_rule, split=split)
        self.planner = ClipPlanner(shards, rules, rows)
        self.short_videos, self.still_videos = self.planner.short_videos, self.planner.still_videos

    def plan(self, n: int) -> EpisodePlan:
        """Plan episode n, touching no stored frame.

        The draws come in the order of the reference code.

        Raises:
            ConfigError: the stream has a list of episodes, and it is shorter.
        """
        draw = PhiloxDraw(self.seed, n)
        chosen = self._chosen(draw, n)
        way, support, query = len(chosen.classes), chosen.support, chosen.query
        query_rows = np.array([row for row, _ in query], dtype=np.int64)
        support_rows, unlabelled_rows = (np.array(rows, dtype=np.int64) for rows in (support, chosen.unlabelled))
        shown, motion_draw = ClipList(self.rules.motion_series), PhiloxDraw(self.seed, n ^ _MOTION)
        for rows in (support_rows, query_rows, unlabelled_rows):
            self.planner.add(shown, rows, draw, motion_draw, query=rows is query_rows)
        clips = shown.clips()
        first, last = len(support_rows), len(support_rows) + len(query_rows)
        return EpisodePlan(
            n=n,
            way=way,
            shot=len(support) // way,
            class_ids=np.array(chosen.classes, dtype=np.int64),
            reads=clips.reads,
            support=clips.views[:first],
            query=clips.views[first:last],
            query_labels=np.array([label for _, label in query], dtype=np.int64),
            support_rows=support_rows,
            query_rows=query_rows,
            unlabelled=clips.views[last:],
            unlabelled_rows=unlabelled_rows,
            motion_reads=clips.motion_reads,
            motion=clips.motion,
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
