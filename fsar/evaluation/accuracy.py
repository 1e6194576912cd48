"""Run a model on test episodes: accuracy with two intervals, by class, and the confusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fsar.episode import Episode
from fsar.evaluation.embeddings import EmbeddingStore, embed_rows, places_in_embedding, shuffle_clips
from fsar.evaluation.fusion import SUPPORT, calibrated, of_support
from fsar.evaluation.intervals import Answers, StreamAnswers, episode_interval, spare_videos, video_interval
from fsar.evaluation.logits import EpisodeVideos, decide, episode_logits
from fsar.loader import EpisodeLoader
from fsar.methods import Embedding, FewShotMethod, Fusion, Model, Output, TwoStreams, streams_of
from fsar.run import ranks
from fsar.run.device import autocast, keep_freed_memory
from fsar.trunks import Stream
from pipelines.episodes.stream import EpisodePlan
from pipelines.sampling import group_keys
from shards_spec.errors import ConfigError


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
    model: Model,
    loader: EpisodeLoader,
    episodes: int | None = None,
    *,
    precision: str = "fp32",
    shuffled: bool = False,
    label: str = "evaluate",
    store: EmbeddingStore | None = None,
    calibrate: bool = False,
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
        calibrate: Choose the share of motion in the answers of two streams on these episodes; they
            must not be those of a test.

    Raises:
        ConfigError: the loader has fewer fixed episodes than that.
    """
    if episodes is None:
        episodes = 1000 if loader.stream.given is None else len(loader.stream.given)
    options: dict[str, Any] = {"precision": precision, "shuffled": shuffled, "label": label, "store": store}
    answers = answer(model, loader, episodes, calibrate=calibrate, **options)
    return summarise(answers, loader.shards.dataset.classes)


def answer(
    model: Model,
    loader: EpisodeLoader,
    episodes: int,
    *,
    precision: str = "fp32",
    shuffled: bool = False,
    label: str = "evaluate",
    store: EmbeddingStore | None = None,
    calibrate: bool = False,
) -> Answers:
    """Ask a model the queries of episodes 0 to `episodes` of a loader.  See `evaluate`."""
    loader.stream.choose(episodes - 1)  # refuses, before anything is computed, where there are fewer fixed ones
    if loader.draws_each_time:
        if isinstance(model, TwoStreams) and model.rule == SUPPORT:
            raise ConfigError('stream_weight = "support" needs videos that look alike in all episodes: set views')
        return collect(model, _watched(loader, episodes, label, shuffled=shuffled), precision=precision)
    options: dict[str, Any] = {"precision": precision, "shuffled": shuffled, "label": label, "store": store}
    return collect_embedded(model, loader, episodes, calibrate=calibrate, **options)


def _watched(
    loader: EpisodeLoader, episodes: int, label: str, *, shuffled: bool
) -> Iterator[tuple[EpisodePlan, Episode]]:
    own = ranks.share(episodes)
    planned = loader.planned(own.start, own.stop)
    for plan, episode, _ in tqdm(planned, total=len(own), unit="episode", desc=label, leave=False):
        yield plan, shuffle_frames(plan, episode) if shuffled else episode


@torch.no_grad()
def collect(model: Model, episodes: Iterator[tuple[EpisodePlan, Episode]], *, precision: str = "fp32") -> Answers:
    """Run a model in eval mode over whole episodes of equal size; collect its answers."""
    was_training = model.training
    model.eval()
    rows = []
    try:
        for plan, episode in episodes:
            # No losses: the auxiliary classifier has rows only for the classes of training.
            episode = replace(episode, base_ids=torch.full_like(episode.base_ids, -1))
            with autocast(episode.query_labels.device, precision):
                rows.append(_row(plan, model(episode), episode.query_labels))
            if len(rows) == 1:
                keep_freed_memory(episode.query_labels.device)  # once an episode has taken its memory
    finally:
        model.train(was_training)
    flat = [row for part in ranks.gather_values(rows) for row in part]
    classes, support, query, truth, said, *alone = (np.stack(column) for column in zip(*flat, strict=True))
    if not isinstance(model, TwoStreams):
        return Answers(classes, support, query, truth, said)
    of_streams, weights = dict(zip(streams_of(model), alone, strict=True)), np.full(len(said), model.fusion.weight)
    return StreamAnswers(classes, support, query, truth, said, of_streams, weights)


def _row(plan: EpisodePlan, output: Output, labels: Tensor) -> tuple[NDArray[np.int64], ...]:
    """Make one row of the answers, those of single streams last."""
    logits = [output.logits, *(value for name, value in output.aux.items() if name.endswith("_logits"))]
    said = [plan.class_ids[decide(each, labels).cpu().numpy()] for each in logits]  # [Q] each
    truth = plan.class_ids[plan.query_labels]
    return plan.class_ids, plan.support_rows, plan.query_rows, truth, *said


@torch.no_grad()
def collect_embedded(
    model: Model,
    loader: EpisodeLoader,
    episodes: int,
    *,
    precision: str = "fp32",
    shuffled: bool = False,
    label: str = "evaluate",
    store: EmbeddingStore | None = None,
    calibrate: bool = False,
) -> Answers:
    """Collect the same answers from videos that are embedded once each, or once in each view.

    A model of two streams is embedded and compared stream by stream.  With `calibrate` the share of
    motion is chosen on these episodes.
    """
    chosen = [loader.stream.choose(n) for n in range(episodes)]
    rows = EpisodeVideos.of(chosen, unlabelled="unlabelled" in model.reads)
    labels, own, was_training = torch.from_numpy(rows.labels), ranks.share(episodes), model.training
    how: dict[str, Any] = {"precision": precision, "shuffled": shuffled, "label": label, "store": store}
    model.eval()
    try:
        compared = {name: _compared(one, loader, rows, own, **how) for name, one in streams_of(model).items()}
        if isinstance(model, TwoStreams):
            if calibrate:
                model.fusion = _calibrated(model, compared, labels)
            logits, weights = _mixed(model, loader, rows, own, compared, precision=precision)
        else:
            (logits,), weights = (each.logits for each in compared.values()), None
    finally:
        model.train(was_training)
    asked: dict[str, NDArray[np.int64]] = {
        "classes": rows.classes,
        "support": rows.support.reshape(episodes, -1),
        "query": rows.query,
        "truth": np.take_along_axis(rows.classes, rows.labels, axis=1),
        "said": _said(logits, labels, own, rows.classes),
    }
    if weights is None:
        return Answers(**asked)
    of_streams: dict[str, NDArray[np.int64]] = {
        name: _said(each.logits, labels, own, rows.classes) for name, each in compared.items()
    }
    return StreamAnswers(**asked, of_streams=of_streams, weights=weights)


class _Compared(NamedTuple):
    """A stream's logits [own, Q, way] on the host, its embedding, and the videos' places in it."""

    method: FewShotMethod
    logits: Tensor
    embedding: Embedding
    places: EpisodeVideos


def _compared(
    method: FewShotMethod,
    loader: EpisodeLoader,
    rows: EpisodeVideos,
    own: range,
    *,
    precision: str,
    shuffled: bool,
    label: str,
    store: EmbeddingStore | None,
) -> _Compared:
    """Embed the videos by one stream's method, and compare those of this process's episodes."""
    videos = rows.videos()
    embedding = embed_rows(loader, method, videos, precision=precision, shuffled=shuffled, store=store)
    places = places_in_embedding(loader, rows, videos)
    logits = torch.zeros(len(own), rows.query.shape[1], rows.classes.shape[1])
    texts = loader.texts if method.stream == "frames" else None  # texts of classes go with frames
    batches = episode_logits(method, embedding, places, own=own, texts=texts, precision=precision)
    done = 0
    with tqdm(total=len(own), unit="episode", desc=label, leave=False) as bar:
        for batch in batches:  # [B, Q, way]
            logits[done : done + len(batch)] = batch
            done += len(batch)
            bar.update(len(batch))
    return _Compared(method, logits, embedding, places)


def _calibrated(model: TwoStreams, compared: Mapping[Stream, _Compared], labels: Tensor) -> Fusion:
    """Choose the share of motion from the logits [own, Q, way] of all processes."""
    frames, motion = (torch.cat(ranks.gather_values(one.logits)) for one in (compared["frames"], compared["motion"]))
    return calibrated(model.rule, frames, motion, labels)[0]


def _mixed(
    model: TwoStreams,
    loader: EpisodeLoader,
    rows: EpisodeVideos,
    own: range,
    compared: Mapping[Stream, _Compared],
    *,
    precision: str,
) -> tuple[Tensor, NDArray[np.float64]]:
    """Mix both streams' logits [own, Q, way]; return them, and the share of motion [N]."""
    frames, motion = compared["frames"].logits, compared["motion"].logits
    if model.rule != SUPPORT:
        return model.fusion.logits(frames, motion), np.full(len(rows), model.fusion.weight)
    groups = group_keys(len(loader.shards.groups), loader.shards.groups)
    mixed, weights = torch.zeros_like(frames), np.zeros(len(rows))
    for number, n in enumerate(own):
        support = {name: _support(each, n) for name, each in compared.items()}
        with autocast(loader.device, precision):
            fusion = of_support({name: one.method for name, one in compared.items()}, support, groups[rows.support[n]])
        mixed[number], weights[n] = fusion.logits(frames[number], motion[number]), fusion.weight
    shared = torch.from_numpy(weights)
    ranks.add_up([shared])
    return mixed, weights


def _support(compared: _Compared, n: int) -> Embedding:
    """Return the embedding [way, shot, ...] of the support of episode n."""
    places = torch.from_numpy(compared.places.support[n])
    return compared.embedding.map(lambda x: x[places.to(x.device)])


def _said(logits: Tensor, labels: Tensor, own: range, classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the classes [N, Q] that logits [own, Q, way] say, of all processes."""
    said = torch.zeros_like(labels)
    said[own.start : own.stop] = decide(logits, labels[own.start : own.stop])
    ranks.add_up([said])
    return np.take_along_axis(classes, said.numpy(), axis=1)


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


def shuffle_frames(plan: EpisodePlan, episode: Episode) -> Episode:
    """Put frames and segments of each clip of an episode in another order, each video's own."""
    rows = {"support": plan.support_rows, "query": plan.query_rows, "unlabelled": plan.unlabelled_rows}
    changed: dict[str, Tensor] = {}
    for name in ("support", "query", "unlabelled", "support_motion", "query_motion", "unlabelled_motion"):
        part, values = name.partition("_")[0], getattr(episode, name)
        if values is not None:
            videos = values.flatten(0, 1) if part == "support" else values
            changed[name] = shuffle_clips(videos, rows[part].tolist()).view_as(values)
    return replace(episode, **changed)
