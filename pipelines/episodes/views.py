"""Random views of videos that do not depend on the episode: R of each are made once, and episodes choose among them.

View v of a video is a pure function of its catalogue row and v; the views that episode n takes are one of (seed, n).
Odd views are mirrored where the rules mirror queries: these serve as queries alone, since support never is mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipelines.draw import PhiloxDraw
from pipelines.episodes.stream import EpisodePlan, EpisodeStream, View
from pipelines.reads import ReadLists, Reads
from shards_spec.errors import ConfigError

Ints = npt.NDArray[np.int64]

BITS = 16  # of a view's number beside its video's row
MOST_VIEWS = 1 << BITS
_OF_VIDEO, _OF_EPISODE = 1 << 61, 1 << 62  # bits in a draw's number that no episode's own draws have


def number_views(rows: Ints, views: int) -> Ints:
    """[V * views] numbers of all views of videos [V], those of a video side by side; at least one of each.

    ConfigError when that many views cannot be numbered.
    """
    if views > MOST_VIEWS:
        raise ConfigError(f"{views} views of a video are too many: give at most {MOST_VIEWS}")
    numbers: Ints = (rows[:, None] << BITS) + np.arange(max(views, 1))
    return numbers.reshape(-1)


def rows_of(numbers: Ints) -> Ints:
    """Catalogue rows of the videos whose views have these numbers."""
    rows: Ints = numbers >> BITS
    return rows


def draw_views(stream: EpisodeStream, numbers: Ints) -> tuple[tuple[Reads, ...], tuple[View, ...]]:
    """What to read, and one clip for each number, at random frames and crops as the stream's rules say; no jitter."""
    lists, views = ReadLists(), []
    for number in numbers.tolist():
        draw = PhiloxDraw(0, _OF_VIDEO | number)
        (view,) = stream.views(draw, np.array([number >> BITS]), lists, query=False)
        mirrored = stream.rules.query_flip and number % 2 == 1
        views.append(view._replace(flip=mirrored))
    return lists.reads("rgb"), tuple(views)


def choose_views(n: int, counts: Sequence[int], views: int, *, seed: int, flips: bool) -> tuple[Ints, Ints, Ints]:
    """Which of its views each support, query and unlabelled video of episode n is seen in; flips: odd ones mirror.

    counts: numbers of support, query and unlabelled videos.
    """
    draw, last = PhiloxDraw(seed, n ^ _OF_EPISODE), max(views, 1) - 1

    def choose(count: int, step: int) -> Ints:
        return np.array([step * draw.randint(0, last // step) for _ in range(count)], dtype=np.int64)

    upright = 2 if flips else 1
    support, query, unlabelled = counts
    return choose(support, upright), choose(query, 1), choose(unlabelled, upright)


def places_of(plan: EpisodePlan, videos: Ints, views: int, *, seed: int, flips: bool) -> tuple[Ints, Ints, Ints]:
    """Where support, query and unlabelled videos of an episode stand among all views of `videos` (ascending rows)."""
    rows = (plan.support_rows, plan.query_rows, plan.unlabelled_rows)
    chosen = choose_views(plan.n, [len(own) for own in rows], views, seed=seed, flips=flips)
    support, query, unlabelled = (
        np.searchsorted(videos, own) * max(views, 1) + view for own, view in zip(rows, chosen, strict=True)
    )
    return support, query, unlabelled
