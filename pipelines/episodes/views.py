"""Draw random views of videos: R of each are made once, and episodes choose among them.

View v of a video is a pure function of its catalogue row and v; the views that episode n takes are
one of (seed, n). Odd views are mirrored where the rules mirror queries. These serve only as
queries, since support is never mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipelines.draw import PhiloxDraw
from pipelines.episodes.clip_views import ClipList, Clips
from pipelines.episodes.stream import EpisodePlan, EpisodeStream
from shards_spec.errors import ConfigError

Ints = npt.NDArray[np.int64]

BITS = 16  # a view is numbered by its video's row and, in the last 16 bits, by its place among the views
MOST_VIEWS = 1 << BITS
# Bits in a draw's number that no episode's own draws have
_OF_VIDEO, _OF_EPISODE, _MOTION = 1 << 61, 1 << 62, 1 << 60


def number_views(rows: Ints, views: int) -> Ints:
    """Number all views of the videos `rows` [V]: [V * views], those of a video side by side.

    There is at least one of each.

    Raises:
        ConfigError: so many views of a video cannot be numbered.
    """
    if views > MOST_VIEWS:
        raise ConfigError(f"{views} views of a video are too many: give at most {MOST_VIEWS}")
    numbers: Ints = (rows[:, None] << BITS) + np.arange(max(views, 1))
    return numbers.reshape(-1)


def rows_of(numbers: Ints) -> Ints:
    """Return the catalogue rows of the videos whose views have these numbers."""
    rows: Ints = numbers >> BITS
    return rows


def draw_views(stream: EpisodeStream, numbers: Ints) -> Clips:
    """Draw one clip for each number [n], with frames and crops by the stream's rules; not jittered.

    Odd views are mirrored where the rules mirror queries.
    """
    clips, rules = ClipList(stream.rules.motion_series), stream.rules
    for number in numbers.tolist():
        draws = (PhiloxDraw(0, _OF_VIDEO | number), PhiloxDraw(0, _OF_VIDEO | _MOTION | number))
        mirrored = rules.query_flip and number % 2 == 1
        stream.planner.add(clips, np.array([number >> BITS]), *draws, query=False, flip=mirrored)
    return clips.clips()


def choose_views(n: int, counts: Sequence[int], views: int, *, seed: int, flips: bool) -> tuple[Ints, Ints, Ints]:
    """Draw which of its views each video of episode n takes.

    Args:
        n: Number of the episode.
        counts: Numbers of support, query and unlabelled videos.
        views: Views of each video.
        seed: Seed of the episodes.
        flips: Odd views are mirrored, so only queries take them.

    Returns:
        The numbers of the views of support, query and unlabelled videos.
    """
    draw, last = PhiloxDraw(seed, n ^ _OF_EPISODE), max(views, 1) - 1

    def choose(count: int, step: int) -> Ints:
        return np.array([step * draw.randint(0, last // step) for _ in range(count)], dtype=np.int64)

    upright = 2 if flips else 1
    support, query, unlabelled = counts
    return choose(support, upright), choose(query, 1), choose(unlabelled, upright)


def places_of(plan: EpisodePlan, videos: Ints, views: int, *, seed: int, flips: bool) -> tuple[Ints, Ints, Ints]:
    """Return the places of an episode's videos among all views of `videos`, by their part in it.

    `videos` are ascending rows; other arguments are those of `choose_views`.
    """
    rows = (plan.support_rows, plan.query_rows, plan.unlabelled_rows)
    chosen = choose_views(plan.n, [len(own) for own in rows], views, seed=seed, flips=flips)
    support, query, unlabelled = (
        np.searchsorted(videos, own) * max(views, 1) + view for own, view in zip(rows, chosen, strict=True)
    )
    return support, query, unlabelled
