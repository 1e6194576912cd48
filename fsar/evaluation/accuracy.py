"""Run a model on test episodes: accuracy with two intervals, by class, and the confusion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fsar.episode import Episode
from fsar.evaluation.embeddings import EmbeddingStore, embed_rows, places_in_embedding, shuffle_clips
from fsar.evaluation.logits import EpisodeVideos, episode_logits
from fsar.loader import EpisodeLoader
from fsar.methods import FewShotMethod
from fsar.run import ranks
from fsar.run.device import autocast, keep_freed_memory
from pipelines.episodes.stream import EpisodePlan

Z95 = 1.96  # half width of a 95 % interval, in standard deviations of a normal distribution


@dataclass(frozen=True)
class Answers:
    """A model's answers to N episodes of Q queries, as catalogue rows and class numbers.

    Attributes:
        classes: [N, way] classes of each episode.
        support: [N, way * shot] rows of the support videos, grouped by class.
        query: [N, Q] rows of the query videos.
        truth: [N, Q] classes of the queries.
        said: [N, Q] classes that the model chose.
    """

    classes: NDArray[np.int64]
    support: NDArray[np.int64]
    query: NDArray[np.int64]
    truth: NDArray[np.int64]
    said: NDArray[np.int64]


@dataclass(frozen=True)
class Result:
    """Accuracy with its intervals (half widths, 95 %), all as shares of 1.

    Attributes:
        interval_episodes: 1.96 s / sqrt(episodes), over episodes drawn from these videos; papers
            print it. None for a single episode.
        interval_videos: From a bootstrap over the test videos within class; it may be claimed of
            new videos. None where a class has no more videos than an episode takes of it: nothing
            can then be drawn anew.
        chance: One over the classes of an episode.
        per_class: Accuracy of the queries of each class.
        confusion: Class -> answered class -> number of queries.
    """

    accuracy: float
    interval_episodes: float | None
    interval_videos: float | None
    chance: float
    episodes: int
    queries: int
    videos: int
    per_class: dict[str, float]
    confusion: dict[str, dict[str, int]]

    def __str__(self) -> str:
        over_episodes = "unknown over 1 episode"
        if self.interval_episodes is not None:
            over_episodes = f"+-{self.interval_episodes:.1%} over {self.episodes} episodes"
        over_videos = f"over {self.videos} videos"
        if self.interval_videos is None:
            over_videos += " unknown (a class has no more videos than an episode takes of it)"
        else:
            over_videos = f"+-{self.interval_videos:.1%} {over_videos}"
        return (
            f"{self.accuracy:.1%} (chance {self.chance:.0%}); 95 % intervals: {over_episodes}, "
            f"{over_videos}; {self.queries} queries"
        )

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return dict(vars(self))


def evaluate(
    model: FewShotMethod,
    loader: EpisodeLoader,
    episodes: int | None = None,
    *,
    precision: str = "fp32",
    shuffled: bool = False,
    label: str = "evaluate",
    store: EmbeddingStore | None = None,
) -> Result:
    """Compute the accuracy of a model on episodes 0 to `episodes` of a loader.

    A video that looks the same in every episode (no random frames or crops) is decoded and embedded
    once.  An episode then costs only its matching, and the answers stay the same.  The same holds
    for each of the views that the loader was made with.  A model that reads unlabelled videos gets
    those of an episode; neither the intervals nor the number of videos count them.

    All processes of a run must call this; each answers a part of the episodes, and all return the
    same.

    Args:
        model: The model, on the loader's device; it keeps its mode.
        loader: The episodes.
        episodes: Their number; by default all fixed episodes of the loader, or 1,000 of those that
            it draws.
        precision: fp32 or bf16 (autocast).
        shuffled: Put the frames of each clip in another order: the control for the use of time.
        label: Name of the progress bar.
        store: Store of embeddings from one evaluation to the next.

    Raises:
        ConfigError: the loader has fewer fixed episodes than that.
    """
    if episodes is None:
        episodes = 1000 if loader.stream.given is None else len(loader.stream.given)
    answers = answer(model, loader, episodes, precision=precision, shuffled=shuffled, label=label, store=store)
    return summarise(answers, loader.shards.dataset.classes)


def answer(
    model: FewShotMethod,
    loader: EpisodeLoader,
    episodes: int,
    *,
    precision: str = "fp32",
    shuffled: bool = False,
    label: str = "evaluate",
    store: EmbeddingStore | None = None,
) -> Answers:
    """Ask a model the queries of episodes 0 to `episodes` of a loader.  See `evaluate`."""
    loader.stream.choose(episodes - 1)  # refuses, before anything is computed, where there are fewer fixed ones
    if loader.draws_each_time:
        return collect(model, _watched(loader, episodes, label, shuffled=shuffled), precision=precision)
    options: dict[str, Any] = {"precision": precision, "shuffled": shuffled, "label": label, "store": store}
    return collect_embedded(model, loader, episodes, **options)


def _watched(
    loader: EpisodeLoader, episodes: int, label: str, *, shuffled: bool
) -> Iterator[tuple[EpisodePlan, Episode]]:
    own = ranks.share(episodes)
    planned = loader.planned(own.start, own.stop)
    for plan, episode, _ in tqdm(planned, total=len(own), unit="episode", desc=label, leave=False):
        yield plan, shuffle_frames(plan, episode) if shuffled else episode


@torch.no_grad()
def collect(
    model: FewShotMethod, episodes: Iterator[tuple[EpisodePlan, Episode]], *, precision: str = "fp32"
) -> Answers:
    """Run a model in eval mode over whole episodes of equal size; collect its answers."""
    was_training = model.training
    model.eval()
    rows = []
    try:
        for plan, episode in episodes:
            # No losses: the auxiliary classifier has rows only for the classes of training.
            episode = replace(episode, base_ids=torch.full_like(episode.base_ids, -1))
            with autocast(episode.query_labels.device, precision):
                rows.append(_row(plan, model(episode).logits))
            if len(rows) == 1:
                keep_freed_memory(episode.query_labels.device)  # once an episode has taken its memory
    finally:
        model.train(was_training)
    return _stack([row for part in ranks.gather_values(rows) for row in part])


@torch.no_grad()
def collect_embedded(
    model: FewShotMethod,
    loader: EpisodeLoader,
    episodes: int,
    *,
    precision: str = "fp32",
    shuffled: bool = False,
    label: str = "evaluate",
    store: EmbeddingStore | None = None,
) -> Answers:
    """Collect the same answers from videos that are embedded once each, or once in each view."""
    chosen = [loader.stream.choose(n) for n in range(episodes)]
    rows = EpisodeVideos.of(chosen, unlabelled="unlabelled" in model.reads)
    videos = rows.videos()
    embedding = embed_rows(
        loader, model, videos, precision=precision, shuffled=shuffled, store=store
    )  # [V * views, ...]
    own, was_training = ranks.share(episodes), model.training
    said = np.zeros(rows.query.shape, np.int64)
    model.eval()
    try:
        places = places_in_embedding(loader, rows, videos)
        batches = episode_logits(model, embedding, places, own=own, texts=loader.texts, precision=precision)
        done = own.start
        with tqdm(total=len(own), unit="episode", desc=label, leave=False) as bar:
            for logits in batches:  # [B, Q, way]
                said[done : done + len(logits)] = logits.argmax(dim=2).cpu().numpy()
                done += len(logits)
                bar.update(len(logits))
    finally:
        model.train(was_training)
    ranks.add_up([torch.from_numpy(said)])
    return Answers(
        classes=rows.classes,
        support=rows.support.reshape(episodes, -1),
        query=rows.query,
        truth=np.take_along_axis(rows.classes, rows.labels, axis=1),
        said=np.take_along_axis(rows.classes, said, axis=1),
    )


def _row(plan: EpisodePlan, logits: torch.Tensor) -> tuple[NDArray[np.int64], ...]:
    """Make one row of the answers from logits [Q, way]."""
    said = logits.argmax(dim=1).cpu().numpy()  # [Q] episode labels
    truth = plan.class_ids[plan.query_labels]
    return plan.class_ids, plan.support_rows, plan.query_rows, truth, plan.class_ids[said]


def _stack(rows: Sequence[tuple[NDArray[np.int64], ...]]) -> Answers:
    return Answers(*(np.stack(column) for column in zip(*rows, strict=True)))


def summarise(answers: Answers, classes: Sequence[str]) -> Result:
    """Compute all figures from the answers."""
    correct = answers.truth == answers.said  # [N, Q]
    present = np.unique(answers.truth)
    confusion = {
        classes[c]: {classes[k]: int(n) for k, n in zip(*_counts(answers.said[answers.truth == c]), strict=True)}
        for c in present
    }
    return Result(
        accuracy=float(correct.mean()),
        interval_episodes=episode_interval(correct),
        interval_videos=video_interval(answers) if spare_videos(answers) else None,
        chance=1 / answers.classes.shape[1],
        episodes=len(correct),
        queries=correct.size,
        videos=len(np.unique(np.concatenate([answers.support.ravel(), answers.query.ravel()]))),
        per_class={classes[c]: float(correct[answers.truth == c].mean()) for c in present},
        confusion=confusion,
    )


def _counts(values: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    numbers, counts = np.unique(values, return_counts=True)
    return numbers.tolist(), counts.tolist()


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


def shuffle_frames(plan: EpisodePlan, episode: Episode) -> Episode:
    """Put the frames of each clip of an episode in another order, which is each video's own."""
    assert episode.support is not None
    assert episode.query is not None
    unlabelled = episode.unlabelled
    if unlabelled is not None:
        unlabelled = shuffle_clips(unlabelled, plan.unlabelled_rows.tolist())
    return replace(
        episode,
        support=shuffle_clips(episode.support.flatten(0, 1), plan.support_rows.tolist()).view_as(episode.support),
        query=shuffle_clips(episode.query, plan.query_rows.tolist()),
        unlabelled=unlabelled,
    )
