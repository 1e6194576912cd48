"""Compute a query of a test again: its scores, what was matched, and what was decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fsar.episode import Episode
from fsar.evaluation.accuracy import shuffle_frames
from fsar.evaluation.embeddings import clips_of
from fsar.evaluation.fusion import SUPPORT, of_support
from fsar.loader import EpisodeLoader
from fsar.matching import Alignment, full_precision
from fsar.methods import Embedding, FewShotMethod, Model, TwoStreams, streams_of
from fsar.methods.reconstruction import Reconstruction
from fsar.methods.streams import motion_only
from fsar.report.alignment import align, reconstruct
from fsar.run.device import autocast
from fsar.trunks import Stream
from pipelines.episodes.stream import EpisodePlan
from pipelines.episodes.views import choose_views, draw_views, number_views
from pipelines.sampling import group_keys

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Compared:
    """A query compared with the classes of its episode.

    Attributes:
        scores: Logits [way], of two streams as the test mixed them.
        alignments: What was matched, by the name of the pictures that it is of.
        decoded: What the model's decoder made of the query, if it has one.
    """

    scores: list[float]
    alignments: dict[str, Alignment]
    decoded: Reconstruction | None


@dataclass(frozen=True)
class _OfStream:
    """The same of one stream: logits [1, way] on the host, and the support [way, shot, ...]."""

    logits: Tensor
    support: Embedding
    alignments: dict[str, Alignment]
    decoded: Reconstruction | None


def evaluated_episode(loader: EpisodeLoader, n: int, *, shuffled: bool) -> tuple[EpisodePlan, Episode]:
    """Read episode n with the frames and the motion that an evaluation read."""
    ((plan, episode, _),) = loader.planned(n, n + 1)
    if loader.views:
        clips = draw_views(loader.stream, _views(loader, plan))
        frames = clips_of(loader, clips) if loader.rules.reads_frames else None
        motion = clips_of(loader, clips, "motion") if loader.rules.reads_motion else None
        episode = loader.assemble(plan, frames, motion=motion)
    return plan, shuffle_frames(plan, episode) if shuffled else episode


def _views(loader: EpisodeLoader, plan: EpisodePlan) -> Ints:
    """[V] numbers of the views that the episode takes of its videos."""
    rows = (plan.support_rows, plan.query_rows, plan.unlabelled_rows)
    counts = [len(own) for own in rows]
    chosen = choose_views(plan.n, counts, loader.views, seed=loader.stream.seed, flips=loader.rules.query_flip)
    return np.concatenate([number_views(own, 1) + view for own, view in zip(rows, chosen, strict=True)])


@contextmanager
def frames_beside(loader: EpisodeLoader) -> Iterator[EpisodeLoader]:
    """Open the frames of the same episodes where a loader reads motion alone; else give it back."""
    if loader.rules.reads_frames:
        yield loader
        return
    rules = replace(loader.rules, streams="frames")
    same: dict[str, Any] = {"seed": loader.stream.seed, "given": loader.stream.given, "views": loader.views}
    same |= {"mean": loader.mean, "std": loader.std, "device": "cpu", "executor": "portable"}
    with EpisodeLoader(loader.shards, loader.split, rules, **same) as frames:
        yield frames


@dataclass(frozen=True)
class AskedAgain:
    """A test whose queries are asked again.

    Attributes:
        model: In eval mode, on the loader's device.
        loader: Of the test's episodes.
        beside: Of their frames; see `frames_beside`.
        precision: fp32 or bf16 (autocast).
        shuffled: The test shuffled the frames of each clip.
    """

    model: Model
    loader: EpisodeLoader
    beside: EpisodeLoader
    precision: str
    shuffled: bool

    def episode(self, n: int) -> tuple[EpisodePlan, Episode]:
        """Read episode n as the model read it."""
        return evaluated_episode(self.loader, n, shuffled=self.shuffled)

    def shown(self, n: int, episode: Episode) -> Episode:
        """Make of episode n what a page shows: always frames, and motion if a stream reads it."""
        if "motion" not in streams_of(self.model):
            return replace(episode, support_motion=None, query_motion=None, unlabelled_motion=None)
        if episode.query is not None:
            return episode
        _, frames = evaluated_episode(self.beside, n, shuffled=self.shuffled)
        return replace(episode, support=frames.support, query=frames.query)

    @torch.no_grad()
    def compared(self, plan: EpisodePlan, episode: Episode, query: int) -> Compared:
        """Compare the query at a place of an episode with its classes."""
        one, shards = _with_one_query(episode, query), self.loader.shards
        groups = group_keys(len(shards.groups), shards.groups)[plan.support_rows]
        with autocast(self.loader.device, self.precision):
            found = {
                name: _of_stream(method, motion_only(one) if name == "motion" else one)
                for name, method in streams_of(self.model).items()
            }
            logits = _mixed(self.model, found, groups.reshape(plan.way, plan.shot))
        decoded = found["frames"].decoded if "frames" in found else None
        return Compared(logits[0].tolist(), _alignments(found), decoded)


def _of_stream(model: FewShotMethod, episode: Episode) -> _OfStream:
    """Compare the only query of an episode with its classes, by one method."""
    of_support_videos, of_query = model.read(episode)
    support, query = model.embed(of_support_videos).map(episode.group), model.embed(of_query)
    unlabelled = model.read_unlabelled(episode) if "unlabelled" in model.reads else None
    text = episode.class_text if "class_text" in model.reads else None
    more = None if unlabelled is None else model.embed(unlabelled)
    logits = full_precision(model.match(support, query, class_text=text, unlabelled=more)).cpu()
    return _OfStream(
        logits, support, align(model, query, support, class_text=text), reconstruct(model, of_query, episode)
    )


def _with_one_query(episode: Episode, query: int) -> Episode:
    """Leave out of an episode all queries but one."""
    one = slice(query, query + 1)
    frames, motion = (None if part is None else part[one] for part in (episode.query, episode.query_motion))
    return replace(episode, query=frames, query_labels=episode.query_labels[one], query_motion=motion)


def _mixed(model: Model, found: Mapping[Stream, _OfStream], groups: Ints) -> Tensor:
    """Mix the streams' logits [1, way]; `groups` [way, shot] are those of the support videos."""
    if not isinstance(model, TwoStreams):
        (only,) = found.values()
        return only.logits
    fusion = model.fusion
    if model.rule == SUPPORT:
        fusion = of_support(streams_of(model), {name: each.support for name, each in found.items()}, groups)
    return fusion.logits(found["frames"].logits, found["motion"].logits)


def _alignments(found: Mapping[Stream, _OfStream]) -> dict[str, Alignment]:
    """Name what was matched by the pictures that it is of.

    A method calls the steps of its stream "frames", also those of stored motion.  What it makes of
    the motion between these steps is shown only where no stored motion is.
    """
    if "motion" not in found:
        return found["frames"].alignments
    return {name: each.alignments["frames"] for name, each in found.items() if "frames" in each.alignments}
