"""Motion differential sampling: which clips of a video move enough, and which two of them a sample is made of.

Everything counts in positions, the places of a video's flow fields in their order.  Source: Ni et al., "Motion
Sensitive Contrastive Learning for Self-supervised Video Representation", ECCV 2022 (arXiv 2208.06105), and its code
(megvii-research/MSCL); "released" is what that code does, "fixed" what it means to do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.draw import Draw
from shards_spec.errors import choice

Rule = Literal["fixed", "released"]

RULES = ("fixed", "released")
_TRIES = 11  # draws of the first clip in the released code


def clip_scores(scores: npt.ArrayLike, *, stride: int, length: int) -> npt.NDArray[np.float64]:
    """Scores [N] of the clips that start at each of N positions: mean score of their `length` fields.

    Fields beyond the end count as 0, so clips that leave the video score low.
    """
    each = np.asarray(scores, np.float64)
    padded = np.concatenate([each, np.zeros((length - 1) * stride)])
    shifted = [padded[j * stride : j * stride + len(each)] for j in range(length)]
    total: npt.NDArray[np.float64] = np.sum(shifted, axis=0)
    return total / length


def chosen_offsets(scores: npt.ArrayLike, *, stride: int, length: int, rule: Rule = "fixed") -> npt.NDArray[np.int64]:
    """Positions [M], ascending, whose clips score more than the median clip, from the frame scores [N].

    "fixed" looks at clips within the video alone, so `stride` must be that of the clips drawn later; "released"
    looks at all N starts.  M is at most half of the starts looked at, and 0 where all are alike.
    """
    choice("rule", rule, RULES)
    clips = clip_scores(scores, stride=stride, length=length)
    if rule == "fixed":
        clips = clips[: starts(len(clips), stride=stride, length=length)]
    return np.flatnonzero(clips > np.median(clips)) if len(clips) else np.zeros(0, np.int64)


def starts(positions: int, *, stride: int, length: int) -> int:
    """How many starts have their clip within the video; 1, whose clip is looped, where the video is too short."""
    return max(positions - stride * length + 1, 1)


def draw_clips(
    draw: Draw, chosen: Sequence[int], positions: int, *, stride: int, length: int, rule: Rule = "fixed"
) -> tuple[int, int]:
    """Starts of a sample's two clips, the second up to one clip's span before or after the first.

    "fixed": the first uniform among `chosen`, the second the chosen one nearest to its target; where none is
    chosen, any start and the target itself.  "released": up to 11 draws of any start until a chosen one comes, then
    the first chosen; the second as `released_second` says; 0 where none is chosen.  `chosen` is ascending.
    """
    choice("rule", rule, RULES)
    last = starts(positions, stride=stride, length=length) - 1
    span = stride * length
    if rule == "released":
        first = _released_first(draw, chosen, last)
        return first, released_second(chosen, first + draw.randint(-span, span))
    if not len(chosen):
        first = draw.randint(0, last)
        return first, min(max(first + draw.randint(-span, span), 0), last)
    first = int(chosen[draw.randint(0, len(chosen) - 1)])
    return first, nearest(chosen, first + draw.randint(-span, span))


def draw_clip(draw: Draw, chosen: Sequence[int], positions: int, *, stride: int, length: int) -> int:
    """Start of a single clip, as validation takes it: uniform among `chosen`, or any start where none is."""
    if len(chosen):
        return int(chosen[draw.randint(0, len(chosen) - 1)])
    return draw.randint(0, starts(positions, stride=stride, length=length) - 1)


def clip_positions(start: int, positions: int, *, stride: int, length: int) -> list[int]:
    """Positions [length] of a clip; one that is longer than the video goes on at its beginning."""
    return [(start + stride * step) % positions for step in range(length)]


def nearest(chosen: Sequence[int], target: int) -> int:
    """The member of `chosen` (ascending, not empty) nearest to the target, the earlier of two as near."""
    place = bisect_left(chosen, target)
    around = chosen[max(place - 1, 0) : place + 1]
    return int(min(around, key=lambda start: abs(start - target)))


def released_second(chosen: Sequence[int], target: int) -> int:
    """What the released code takes for the nearest: each member is compared with the last one that was taken.

    A target of 0 or less gives 0, chosen or not; another mostly the next chosen one after it, not the nearest.
    """
    second = 0
    for start in chosen:
        if abs(start - target) < abs(start - second):
            second = int(start)
    return second


def _released_first(draw: Draw, chosen: Sequence[int], last: int) -> int:
    members = set(chosen)
    for _ in range(_TRIES):
        first = draw.randint(0, last)
        if first in members:
            return first
    return int(chosen[0]) if len(chosen) else 0
