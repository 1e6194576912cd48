"""What a test looked like: some of its queries with what they were matched with, and the classes it mixed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fsar.episode import Episode
from fsar.evaluation.accuracy import Answers, shuffle_frames
from fsar.evaluation.embeddings import clips_of
from fsar.loader import EpisodeLoader
from fsar.matching import Alignment, Pair
from fsar.methods import FewShotMethod
from fsar.report.pictures import (
    brightened,
    brightening,
    data_uri,
    full_motion,
    middle_frame,
    middle_frames,
    motion_pictures,
    pictures_of,
    seeable,
)
from fsar.run.device import autocast
from pipelines.episodes.stream import EpisodePlan
from pipelines.episodes.views import choose_views, draw_views, number_views
from shards_spec import ShardSet

Ints = NDArray[np.int64]

MOST_QUERIES, LEAST_QUERIES, PICTURES = 6, 2, 400  # queries that are shown, and about how many pictures they have
MOST_PAIRS = 8  # of classes that were mixed up
MOST_LOOKED_THROUGH = 20_000  # answers of a kind
PAIR_SIDE = 160  # pixels of a picture of these


@dataclass(frozen=True)
class Clip:
    """A video as a model sees it: addresses of pictures of its T frames and of the T - 1 changes between them.

    Attributes:
        brighter: By how much the pictures of dark frames are brighter than what the model saw; 1 for others.
    """

    name: str
    label: str
    frames: list[str]
    motion: list[str]
    brighter: float


@dataclass(frozen=True)
class Member:
    """A class that a query was compared with, one of its support videos, and the pairs by what is matched."""

    clip: Clip
    score: float
    shots: int
    pairs: dict[str, list[Pair]]
    of_mean: bool  # whether the pairs are with the mean of the class's videos


@dataclass(frozen=True)
class Shown:
    """A query, the class that it was taken for, and another: the true one, or the next best where it was right.

    Attributes:
        decoded: Changes between the query's frames as the model's decoder makes them; none without a decoder.
        error: Its mean squared error, and that of no motion at all.
        unlabelled: Whether the scores are of unlabelled videos too, which the pairs are not.
    """

    episode: int
    query: Clip
    right: bool
    said: Member
    other: Member
    decoded: list[str]
    error: tuple[float, float] | None
    unlabelled: bool = False


@dataclass(frozen=True)
class Confused:
    """Two classes that were mixed up: how often, and a frame of a query and of the support that it was taken for."""

    truth: str
    said: str
    count: int
    queries: int
    query_frame: str
    said_frame: str


@dataclass(frozen=True)
class Sight:
    """What a report shows of a test besides its figures."""

    shown: list[Shown]
    confused: list[Confused]


def look(
    model: FewShotMethod,
    loader: EpisodeLoader,
    answers: Answers,
    *,
    precision: str = "fp32",
    shuffled: bool = False,
    seed: int = 0,
) -> Sight:
    """Look at some queries of a test again, half of them wrong where there are as many; the mode is left as it was.

    Args:
        model: The model that was tested, on the loader's device.
        loader: Where its episodes come from.
        answers: What it said.
        precision: fp32 or bf16 (autocast).
        shuffled: Whether the frames of each clip were shuffled.
        seed: Decides which queries are shown.

    Raises:
        ShardError: a frame cannot be read.
    """
    count = max(LEAST_QUERIES, min(MOST_QUERIES, PICTURES // (8 * loader.rules.frames)))
    was_training = model.training
    model.eval()
    try:
        shown = [
            _shown(model, loader, n, query, said=said, precision=precision, shuffled=shuffled)
            for n, query, said in choose_queries(answers, count, seed=seed)
        ]
    finally:
        model.train(was_training)
    return Sight(shown, confused_pairs(loader, answers, seed=seed))


def choose_queries(answers: Answers, count: int, *, seed: int) -> list[tuple[int, int, int]]:
    """(episode, place among its queries, place of the class said) of `count` answers: wrong ones first, then right.

    Half are wrong where there are as many; one of each class before a second of any.
    """
    right = answers.truth == answers.said  # [N, Q]
    generator = np.random.default_rng(seed)
    wrong, correct = (
        _spread(answers, generator.permutation(np.flatnonzero(kind))[:MOST_LOOKED_THROUGH]) for kind in (~right, right)
    )
    half = max(count // 2, count - len(correct))
    chosen = wrong[:half] + correct[: count - min(half, len(wrong))]
    places = (divmod(place, right.shape[1]) for place in chosen)
    return [(n, q, int(np.flatnonzero(answers.classes[n] == answers.said[n, q])[0])) for n, q in places]


def _spread(answers: Answers, places: Ints) -> list[int]:
    """The same places, one of each class before a second of any, and no video twice."""
    turns: Counter[int] = Counter()
    seen: set[int] = set()
    order = []
    for place, label, row in zip(
        places.tolist(), answers.truth.flat[places].tolist(), answers.query.flat[places].tolist(), strict=True
    ):
        if row not in seen:
            order.append((turns[label], place))
            turns[label] += 1
            seen.add(row)
    return [place for _, place in sorted(order, key=lambda each: each[0])]


def seen_episode(loader: EpisodeLoader, n: int, *, shuffled: bool) -> tuple[EpisodePlan, Episode]:
    """Episode n with the frames that an evaluation saw."""
    ((plan, episode, _),) = loader.planned(n, n + 1)
    if loader.views:
        episode = loader.assemble(plan, clips_of(loader, draw_views(loader.stream, _views(loader, plan))))
    return plan, shuffle_frames(plan, episode) if shuffled else episode


def _views(loader: EpisodeLoader, plan: EpisodePlan) -> Ints:
    """[V] numbers of the views that the episode takes of its videos."""
    rows = (plan.support_rows, plan.query_rows, plan.unlabelled_rows)
    counts = [len(own) for own in rows]
    chosen = choose_views(plan.n, counts, loader.views, seed=loader.stream.seed, flips=loader.rules.query_flip)
    return np.concatenate([number_views(own, 1) + view for own, view in zip(rows, chosen, strict=True)])


@torch.no_grad()
def _shown(
    model: FewShotMethod, loader: EpisodeLoader, n: int, query: int, *, said: int, precision: str, shuffled: bool
) -> Shown:
    """One query of episode n, taken for class `said` of its classes."""
    plan, episode = seen_episode(loader, n, shuffled=shuffled)
    truth = int(plan.query_labels[query])
    with autocast(loader.device, precision):
        logits, found, decoded = _compared(model, _alone(episode, query))
    others = sorted(set(range(plan.way)) - {said}, key=lambda place: -logits[place])
    places = [said, truth if truth != said else others[0]]
    shots = [(place, _shot(found, place, plan)) for place in places]
    figure = _Figure(loader.shards, model, plan, episode, query=query, shots=shots)
    made, error = figure.decoded(decoded)
    return Shown(
        n,
        query=figure.query(),
        right=truth == said,
        said=figure.member(0, logits[places[0]], found),
        other=figure.member(1, logits[places[1]], found),
        decoded=made,
        error=error,
        unlabelled=model.reads_unlabelled and len(plan.unlabelled_rows) > 0,
    )


def _compared(model: FewShotMethod, episode: Episode) -> tuple[list[float], dict[str, Alignment], Tensor | None]:
    """Logits [way] of the only query of an episode, what is matched, and its decoded changes [T - 1, 3, h, w]."""
    assert episode.query is not None
    size = (episode.query.shape[-2], episode.query.shape[-1])
    of_support, of_query = model.read(episode)
    support, query = model.embed(of_support).map(episode.group), model.embed(of_query)
    unlabelled = model.read_unlabelled(episode) if model.reads_unlabelled else None
    text = episode.class_text if model.reads_class_text else None
    more = None if unlabelled is None else model.embed(unlabelled)
    logits = model.match(support, query, class_text=text, unlabelled=more)
    decoded = model.reconstruct(of_query, size)
    found = model.alignment(query, support, class_text=text)
    return logits[0].tolist(), found, None if decoded is None else decoded[0]


def _alone(episode: Episode, query: int) -> Episode:
    """The episode with one of its queries."""
    assert episode.query is not None
    one = slice(query, query + 1)
    return replace(episode, query=episode.query[one], query_labels=episode.query_labels[one])


def _shot(found: dict[str, Alignment], place: int, plan: EpisodePlan) -> int:
    """Which support video of a class to show: the nearest where each was compared, else the first."""
    frames = found.get("frames")
    if frames is None or frames.similarity.shape[1] == plan.way:
        return 0
    total = frames.total[0].view(plan.way, plan.shot)
    return int(total[place].argmax())


class _Figure:
    """Pictures of a query and of one support video of each of some classes, motion on one scale throughout."""

    def __init__(
        self,
        shards: ShardSet,
        model: FewShotMethod,
        plan: EpisodePlan,
        episode: Episode,
        *,
        query: int,
        shots: Sequence[tuple[int, int]],
    ) -> None:
        assert model.trunk is not None
        assert episode.support is not None
        assert episode.query is not None
        self._shards, self._plan, self._shots = shards, plan, shots
        self._look = {"mean": model.trunk.mean, "std": model.trunk.std}
        clips = [episode.query[query], *(episode.support[place, shot] for place, shot in shots)]
        rows = [plan.query_rows[query], *(plan.support_rows[place * plan.shot + shot] for place, shot in shots)]
        self._clips = [middle_frames(clip) for clip in clips]
        self._rows = [int(row) for row in rows]
        self._changes = [clip[1:] - clip[:-1] for clip in self._clips]  # [T-1, 3, h, w] each
        self._full = full_motion(self._changes) if self._changes[0].numel() else 1.0

    def query(self) -> Clip:
        return self._clip(0)

    def _clip(self, number: int) -> Clip:
        shards, row = self._shards, self._rows[number]
        pictures = pictures_of(self._clips[number], **self._look)
        motion = motion_pictures(self._changes[number], self._full)
        label, brighter = shards.dataset.classes[int(shards.labels[row])], brightening(pictures)
        frames = brightened(pictures, brighter)
        return Clip(shards.name(row), label, _addresses(frames), _addresses(motion), brighter)

    def member(self, number: int, score: float, found: dict[str, Alignment]) -> Member:
        (place, shot), plan = self._shots[number], self._plan
        pairs, of_mean = {}, False
        for name, alignment in found.items():
            each = alignment.similarity.shape[1] != plan.way or plan.shot == 1
            of_mean = not each
            pairs[name] = alignment.pairs(0, place * plan.shot + shot if each else place)
        return Member(self._clip(number + 1), score, plan.shot, pairs, of_mean)

    def decoded(self, made: Tensor | None) -> tuple[list[str], tuple[float, float] | None]:
        if made is None:
            return [], None
        target = self._changes[0].float()
        error = float((made.float() - target).square().mean()), float(target.square().mean())
        return _addresses(motion_pictures(made, self._full)), error


def _addresses(pictures: Iterable[NDArray[np.uint8]]) -> list[str]:
    return [data_uri(picture) for picture in pictures]


def confused_pairs(loader: EpisodeLoader, answers: Answers, *, seed: int) -> list[Confused]:
    """The pairs of classes that were mixed up most often, by the share of the queries of the true one.

    Raises:
        ShardError: a frame cannot be read.
    """
    shards, total = loader.shards, np.bincount(answers.truth.ravel())
    number = len(total) + int(answers.said.max()) + 1
    wrong = answers.truth != answers.said
    mixed, counts = np.unique(answers.truth[wrong] * number + answers.said[wrong], return_counts=True)
    pairs = [(*divmod(int(pair), number), int(count)) for pair, count in zip(mixed, counts, strict=True)]
    pairs.sort(key=lambda each: -each[2] / total[each[0]])
    generator = np.random.default_rng(seed)
    found = []
    for truth, said, count in pairs[:MOST_PAIRS]:
        n, q = generator.choice(np.argwhere((answers.truth == truth) & (answers.said == said))).tolist()
        shot = answers.support.shape[1] // answers.classes.shape[1]
        place = int(np.flatnonzero(answers.classes[n] == said)[0])
        rows = int(answers.query[n, q]), int(answers.support[n, place * shot])
        frames = [data_uri(seeable(middle_frame(shards, row)), side=PAIR_SIDE) for row in rows]
        names = shards.dataset.classes[truth], shards.dataset.classes[said]
        found.append(Confused(*names, count, int(total[truth]), *frames))
    return found
