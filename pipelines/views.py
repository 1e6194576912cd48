"""Random views of videos that do not depend on the episode: R of each are made once, and episodes choose among them.

View v of a video is a pure function of its catalogue row and v; the views that episode n takes are one of (seed, n).
Odd views are mirrored where the rules mirror queries: these serve as queries alone, since support never is mirrored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipelines.draw import PhiloxDraw
from pipelines.reads import ReadLists
from shards_spec.errors import ConfigError

if TYPE_CHECKING:
    import numpy.typing as npt

    from pipelines.plan import EpisodePlan, EpisodeStream, View
    from pipelines.reads import Reads

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


def choose_views(plan: EpisodePlan, views: int, *, seed: int, flips: bool) -> tuple[Ints, Ints, Ints]:
    """Which of its views each support, query and unlabelled video of an episode is seen in; flips: odd ones mirror."""
    draw, last = PhiloxDraw(seed, plan.n ^ _OF_EPISODE), max(views, 1) - 1

    def choose(rows: Ints, step: int) -> Ints:
        return np.array([step * draw.randint(0, last // step) for _ in rows], dtype=np.int64)

    upright = 2 if flips else 1
    return choose(plan.support_rows, upright), choose(plan.query_rows, 1), choose(plan.unlabelled_rows, upright)


def places_of(plan: EpisodePlan, videos: Ints, views: int, *, seed: int, flips: bool) -> tuple[Ints, Ints, Ints]:
    """Where support, query and unlabelled videos of an episode stand among all views of `videos` (ascending rows)."""
    rows = (plan.support_rows, plan.query_rows, plan.unlabelled_rows)
    support, query, unlabelled = (
        np.searchsorted(videos, own) * max(views, 1) + view
        for own, view in zip(rows, choose_views(plan, views, seed=seed, flips=flips), strict=True)
    )
    return support, query, unlabelled
