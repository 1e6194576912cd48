"""Examples of a test: queries with classes that they were compared with, and confused classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fsar.episode import Episode
from fsar.evaluation.intervals import Answers
from fsar.loader import EpisodeLoader
from fsar.matching import Alignment, Pair
from fsar.methods import Model, streams_of
from fsar.methods.reconstruction import Reconstruction
from fsar.report.pictures import (
    Picture,
    brightened,
    brightening,
    full_motion,
    jpeg_uri,
    middle_frame,
    middle_frames,
    pictures_of,
    step_pictures,
    visible,
)
from fsar.report.queries import AskedAgain, frames_beside
from pipelines.episodes.stream import EpisodePlan

Ints = NDArray[np.int64]
Shots = Sequence[tuple[int, int]]  # (class, support video) of an episode
Motion = Literal["change", "flow", "difference"]

MOST_QUERIES, LEAST_QUERIES = 6, 2
PICTURES = 400  # about as many in a page, however many frames a video has
MOST_CONFUSIONS = 8
MOST_ANSWERS = 20_000  # right or wrong answers that queries are chosen from
CONFUSION_SIDE = 160  # pixels of a picture of confused classes


@dataclass(frozen=True)
class Clip:
    """A video as the model read it: addresses of pictures.

    Attributes:
        frames: Of T frames; beside a model of motion alone, those that one of frames would read.
        motion: Of the stored motion of T segments, or of the T - 1 changes between the frames.
        brighter: Factor by which dark pictures are brighter than what the model read; else 1.
    """

    name: str
    label: str
    frames: list[str]
    motion: list[str]
    brighter: float


@dataclass(frozen=True)
class ComparedClass:
    """A class that a query was compared with, and one of its support videos.

    Attributes:
        score: Logit of the class.
        pairs: `frames` or `motion` -> matched steps of the query and of the class.
        of_mean: The pairs are with the mean of the class's videos.
    """

    clip: Clip
    score: float
    shots: int
    pairs: dict[str, list[Pair]]
    of_mean: bool


@dataclass(frozen=True)
class DecodedMotion:
    """What the model's decoder made of the steps between a query's frames, on one scale with them.

    Attributes:
        kind: What the decoder was trained to make: "difference", "frames" or "flow".
        target: Addresses of T - 1 pictures of it.
        decoded: Of what it made.
        error: Its mean squared error.
        still: That of no motion at all: of the earlier frames where it makes frames, else of zeros.
    """

    kind: str
    target: list[str]
    decoded: list[str]
    error: float
    still: float


@dataclass(frozen=True)
class QueryExample:
    """A query and two classes that it was compared with.

    Attributes:
        predicted: The class that the model chose.
        other: The true class, or the next best one where the model was right.
        decoded: What the model's decoder made of the query, if it has one.
        motion: What the pictures of motion show: "change" from frame to frame, or as the model
            read it stored "flow" or a stored "difference".
        sees_frames: The model read the frames.
        unlabelled: Unlabelled videos count in the scores, though not in the pairs.
    """

    episode: int
    query: Clip
    right: bool
    predicted: ComparedClass
    other: ComparedClass
    decoded: DecodedMotion | None
    motion: Motion = "change"
    sees_frames: bool = True
    unlabelled: bool = False


@dataclass(frozen=True)
class Confusion:
    """Two classes that the model confused: how often, and a frame of a query and of its support."""

    truth: str
    predicted: str
    count: int
    queries: int
    query_frame: str
    support_frame: str


@dataclass(frozen=True)
class Examples:
    """Pictures of a test, for its report."""

    queries: list[QueryExample]
    confusions: list[Confusion]


def collect_examples(
    model: Model,
    loader: EpisodeLoader,
    answers: Answers,
    *,
    precision: str = "fp32",
    shuffled: bool = False,
    seed: int = 0,
) -> Examples:
    """Compute some queries of a test again and draw them.

    Half of the queries are wrong where there are as many. The model is left in the mode it had.

    Args:
        model: The model that was tested, on the loader's device.
        loader: Source of the test's episodes.
        answers: The model's answers to them.
        precision: fp32 or bf16 (autocast).
        shuffled: The test shuffled the frames of each clip.
        seed: Decides which queries are shown.

    Raises:
        ShardError: a frame cannot be read.
    """
    count = max(LEAST_QUERIES, min(MOST_QUERIES, PICTURES // (8 * loader.rules.frames)))
    was_training = model.training
    model.eval()
    try:
        with frames_beside(loader) as beside:
            test = AskedAgain(model, loader, beside, precision, shuffled)
            queries = [_query_example(test, *chosen) for chosen in choose_queries(answers, count, seed=seed)]
    finally:
        model.train(was_training)
    return Examples(queries, find_confusions(loader, answers, seed=seed))


def choose_queries(answers: Answers, count: int, *, seed: int) -> list[tuple[int, int, int]]:
    """Choose `count` answers at random: wrong ones first, then right ones, of many classes.

    Half are wrong where there are as many. One of each class comes before a second of any.

    Returns:
        (episode, place among its queries, place of the predicted class) of each.
    """
    right = answers.truth == answers.said  # [N, Q]
    generator = np.random.default_rng(seed)
    wrong, correct = (
        _in_turns(answers, generator.permutation(np.flatnonzero(kind))[:MOST_ANSWERS]) for kind in (~right, right)
    )
    half = max(count // 2, count - len(correct))
    chosen = wrong[:half] + correct[: count - min(half, len(wrong))]
    places = (divmod(place, right.shape[1]) for place in chosen)
    return [(n, q, int(np.flatnonzero(answers.classes[n] == answers.said[n, q])[0])) for n, q in places]


def _in_turns(answers: Answers, places: Ints) -> list[int]:
    """Order answers: one of each class before a second of any; each video only once."""
    turns: Counter[int] = Counter()
    rows: set[int] = set()
    order = []
    for place, label, row in zip(
        places.tolist(), answers.truth.flat[places].tolist(), answers.query.flat[places].tolist(), strict=True
    ):
        if row not in rows:
            order.append((turns[label], place))
            turns[label] += 1
            rows.add(row)
    return [place for _, place in sorted(order, key=lambda each: each[0])]


def _query_example(test: AskedAgain, n: int, query: int, predicted: int) -> QueryExample:
    """Compute one query of episode n again; `predicted` is the place of a class in the episode."""
    plan, episode = test.episode(n)
    found = test.compared(plan, episode, query)
    truth, scores = int(plan.query_labels[query]), found.scores
    others = sorted(set(range(plan.way)) - {predicted}, key=lambda place: -scores[place])
    places = [predicted, truth if truth != predicted else others[0]]
    shots = [(place, _nearest_shot(found.alignments, place, plan)) for place in places]
    pictures = _ExamplePictures(test.loader, plan, test.shown(n, episode), query=query, shots=shots)
    return QueryExample(
        n,
        query=pictures.clip(0),
        right=truth == predicted,
        predicted=pictures.compared_class(0, scores[places[0]], found.alignments),
        other=pictures.compared_class(1, scores[places[1]], found.alignments),
        decoded=None if found.decoded is None else pictures.decoded(found.decoded),
        motion=pictures.kind,
        sees_frames="frames" in streams_of(test.model),
        unlabelled="unlabelled" in test.model.reads and len(plan.unlabelled_rows) > 0,
    )


def _nearest_shot(alignments: dict[str, Alignment], place: int, plan: EpisodePlan) -> int:
    """Choose a support video of a class: the nearest where each was compared, else the first."""
    first = next(iter(alignments.values()), None)
    if first is None or first.similarity.shape[1] == plan.way:
        return 0
    total = first.total[0].view(plan.way, plan.shot)
    return int(total[place].argmax())


class _ExamplePictures:
    """Pictures of a query and of one support video of some classes; motion is on one scale.

    Stored motion is shown if the episode has it, else the changes between frames.

    Attributes:
        kind: Which motion: "flow", "difference" or "change".
    """

    def __init__(
        self,
        loader: EpisodeLoader,
        plan: EpisodePlan,
        episode: Episode,
        *,
        query: int,
        shots: Shots,
    ) -> None:
        self._shards, self._plan, self._shots = loader.shards, plan, shots
        self._colours = {"mean": loader.mean, "std": loader.std}
        rows = [plan.query_rows[query], *(plan.support_rows[place * plan.shot + shot] for place, shot in shots)]
        self._rows = [int(row) for row in rows]
        self._frames = [middle_frames(clip) for clip in _clips(episode.query, episode.support, query, shots)]
        self._motion = changes = [clip[1:] - clip[:-1] for clip in self._frames]  # [T - 1, 3, h, w] each
        self._full_change = full_motion(changes)
        self.kind: Motion = "change"
        if episode.query_motion is not None:
            self._motion = _clips(episode.query_motion, episode.support_motion, query, shots)  # [T, c, h, w] each
            self.kind = "flow" if self._motion[0].shape[1] == 2 else "difference"
        self._full = full_motion(self._motion)

    def clip(self, number: int) -> Clip:
        """Draw the query (0) or the support video of one of the classes (from 1)."""
        shards, row = self._shards, self._rows[number]
        pictures = pictures_of(self._frames[number], **self._colours)
        motion = step_pictures(self._motion[number], self._full)
        label, brighter = shards.dataset.classes[int(shards.labels[row])], brightening(pictures)
        frames = brightened(pictures, brighter)
        return Clip(shards.name(row), label, _addresses(frames), _addresses(motion), brighter)

    def compared_class(self, number: int, score: float, alignments: dict[str, Alignment]) -> ComparedClass:
        """Draw the support video of class `number`, with what was matched."""
        (place, shot), plan = self._shots[number], self._plan
        pairs, of_mean = {}, False
        for name, alignment in alignments.items():
            # An alignment has a member for each class (its mean) or for each support video.
            each = alignment.similarity.shape[1] != plan.way or plan.shot == 1
            of_mean = not each
            pairs[name] = alignment.pairs(0, place * plan.shot + shot if each else place)
        return ComparedClass(self.clip(number + 1), score, plan.shot, pairs, of_mean)

    def decoded(self, one: Reconstruction) -> DecodedMotion:
        """Draw what was decoded of the query beside its target, on the scale of the target."""
        error, still = (float(each) for each in one.errors())
        target, decoded = (_addresses(self._drawn(one, each[0])) for each in (one.target, one.decoded))
        return DecodedMotion(one.kind, target, decoded, error, still)

    def _drawn(self, one: Reconstruction, steps: Tensor) -> list[Picture]:
        """Draw T - 1 steps [T - 1, c, h, w] of what a decoder makes, or is to make."""
        if one.kind == "frames":
            brighter = brightening(pictures_of(self._frames[0], **self._colours))  # as the query's frames are shown
            return brightened(pictures_of(steps, **self._colours), brighter)
        return step_pictures(steps, self._full_change if one.kind == "difference" else full_motion([one.target[0]]))


def _clips(of_query: Tensor | None, of_support: Tensor | None, query: int, shots: Shots) -> list[Tensor]:
    """Take a query of [Q, ...], and support videos of [way, shot, ...] at some places."""
    assert of_query is not None
    assert of_support is not None
    return [of_query[query], *(of_support[place, shot] for place, shot in shots)]


def _addresses(pictures: Iterable[NDArray[np.uint8]]) -> list[str]:
    return [jpeg_uri(picture) for picture in pictures]


def find_confusions(loader: EpisodeLoader, answers: Answers, *, seed: int) -> list[Confusion]:
    """Find the pairs of classes with the largest share of confused queries of the true class.

    Raises:
        ShardError: a frame cannot be read.
    """
    shards, total = loader.shards, np.bincount(answers.truth.ravel())
    number = len(total) + int(answers.said.max()) + 1
    wrong = answers.truth != answers.said
    # A pair of classes is one number, truth * number + said, so that np.unique counts pairs.
    confused, counts = np.unique(answers.truth[wrong] * number + answers.said[wrong], return_counts=True)
    pairs = [(*divmod(int(pair), number), int(count)) for pair, count in zip(confused, counts, strict=True)]
    pairs.sort(key=lambda each: -each[2] / total[each[0]])
    generator = np.random.default_rng(seed)
    shot = answers.support.shape[1] // answers.classes.shape[1]
    found = []
    for truth, predicted, count in pairs[:MOST_CONFUSIONS]:
        n, q = generator.choice(np.argwhere((answers.truth == truth) & (answers.said == predicted))).tolist()
        place = int(np.flatnonzero(answers.classes[n] == predicted)[0])
        rows = int(answers.query[n, q]), int(answers.support[n, place * shot])
        frames = [jpeg_uri(visible(middle_frame(shards, row)), side=CONFUSION_SIDE) for row in rows]
        names = shards.dataset.classes[truth], shards.dataset.classes[predicted]
        found.append(Confusion(*names, count, int(total[truth]), *frames))
    return found
