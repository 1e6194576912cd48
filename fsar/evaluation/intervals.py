"""Answers to episodes, and the 95 % intervals of what is computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z95 = 1.96  # half width of a 95 % interval, in standard deviations of a normal distribution


@dataclass(frozen=True)
class Answers:
    """A model's answers to N episodes of Q queries, as catalogue rows and class numbers.

    Attributes:
        classes: [N, way] classes of each episode.
        support: [N, way * shot] rows of the support videos, grouped by class.
        query: [N, Q] rows of the query videos.
        truth: [N, Q] classes of the queries.
        said: [N, Q] classes that the model chose; a tie counts as wrong.
    """

    classes: NDArray[np.int64]
    support: NDArray[np.int64]
    query: NDArray[np.int64]
    truth: NDArray[np.int64]
    said: NDArray[np.int64]


@dataclass(frozen=True)
class StreamAnswers(Answers):
    """The answers of a model that reads two streams.

    Attributes:
        of_streams: [N, Q] classes that each stream says by itself, by its name.
        weights: [N] share of motion in each episode's answers.
    """

    of_streams: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    weights: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def of_stream(self, name: str) -> Answers:
        """Return the answers of one stream by itself."""
        return Answers(self.classes, self.support, self.query, self.truth, self.of_streams[name])


def spare_videos(answers: Answers) -> bool:
    """Tell whether every class has more videos than an episode takes of it."""
    taken = (answers.support.shape[1] + answers.query.shape[1]) // answers.classes.shape[1]
    _, label = _places(answers)
    return bool((np.unique(label, return_counts=True)[1] > taken).all())


def episode_interval(values: NDArray[Any]) -> float | None:
    """Return half the width of the 95 % interval of the mean of values [N, Q] over N episodes.

    None for a single episode.
    """
    by_episode = values.mean(axis=1)
    return Z95 * float(by_episode.std(ddof=1)) / math.sqrt(len(by_episode)) if len(by_episode) > 1 else None


def video_interval(answers: Answers, values: NDArray[Any] | None = None) -> float:
    """Return half the width of the 95 % interval over videos.

    A bootstrap draws the videos of each class anew.  A replicate weights every answer by how often
    each of its videos was drawn.  Taken to first order (Efron's infinitesimal jackknife), the
    bootstrap's variance has a closed form: the variance of the videos' influences. The influence of
    a video is the sum of (value - mean) over the answers that it took part in, divided by the
    number of all answers.  That sum holds much noise where few videos meet in many episodes.  The
    influence of the queries without the support has little of it, and is the least that is claimed.
    The noise of the episodes is added.

    Args:
        answers: The answers; `spare_videos` must hold for them.
        values: [N, Q], whose mean the interval is of: by default 1 for a right answer, so that the
            mean is the accuracy; for two models on the same episodes, the difference of the two.
    """
    values = (answers.truth == answers.said) if values is None else values
    residual = (values - values.mean()) / values.size  # [N, Q]
    by_episode = residual.sum(axis=1)  # [N]
    videos, way = answers.support.shape[1], answers.classes.shape[1]
    asked = np.concatenate([np.zeros(answers.support.size), residual.ravel()])  # as _places: support, then queries
    shared = np.concatenate([np.repeat(by_episode, videos), residual.ravel()])
    place, label = _places(answers)
    spread = max(
        _spread(shared, place, label, taken=(videos + values.shape[1]) // way),
        _spread(asked, place, label, taken=1),
        0.0,
    )
    return Z95 * math.sqrt(spread + float(np.square(by_episode).sum()))


def _places(answers: Answers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the videos in all places of the answers, support before queries.

    Returns:
        [N * way * shot + N * Q] number of each place's video, and the class of each video.
    """
    rows, place = np.unique(np.concatenate([answers.support.ravel(), answers.query.ravel()]), return_inverse=True)
    shots = answers.support.shape[1] // answers.classes.shape[1]
    label = np.zeros(len(rows), np.int64)
    label[place] = np.concatenate([np.repeat(answers.classes, shots, axis=1).ravel(), answers.truth.ravel()])
    return place, label


def _spread(parts: NDArray[np.float64], place: NDArray[np.int64], label: NDArray[np.int64], *, taken: int) -> float:
    """Compute the variance over videos, within class, of influences; it may come out below 0.

    An influence is a sum of `parts`.  Their squares are noise of the episodes and are taken out.
    An episode takes several of a class's n videos without replacement: a video in the support
    cannot be the query.  n (n - 1) / (n - taken)^2 corrects for that (Wager and Athey 2018, the
    infinitesimal jackknife of subsamples).
    """
    influence, noise = np.bincount(place, parts), np.bincount(place, np.square(parts))
    total = 0.0
    for c in np.unique(label):
        own, n = influence[label == c], int((label == c).sum())
        signal = n * own.var() - (1 - 1 / n) * noise[label == c].sum()
        total += float(signal) * n * (n - 1) / (n - taken) ** 2
    return total
