"""Examples in a report: the queries and frames of the evaluation itself, half of them wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fsar.cli.train import resolve
from fsar.evaluation import accuracy
from fsar.evaluation.accuracy import Answers, answer, summarise
from fsar.evaluation.logits import decide
from fsar.loader import EpisodeLoader
from fsar.methods import Fusion, Model, TwoStreams
from fsar.report.examples import choose_queries, collect_examples
from fsar.report.pictures import full_motion, motion_pictures, step_pictures, visible
from fsar.run.build import build_model, open_episodes
from fsar.run.config import RunConfig
from shards_spec import ShardSet

SMALL = {
    "test_way": 2, "test_episodes": 6, "resize": 64, "crop": 32, "frames": 4, "threads": 1, "executor": "portable",
    "num_classes": 3,
}  # fmt: skip


def random_answers(seed: int) -> Answers:
    """Answer 200 episodes of 3 of 5 classes, two queries each, 20 videos a class; 2 of 3 right."""
    rng = np.random.default_rng(seed)
    classes = np.stack([rng.permutation(5)[:3] for _ in range(200)])
    truth = np.repeat(classes, 2, axis=1)
    other = np.stack([rng.choice(row, 6) for row in classes])
    said = np.where(rng.random(truth.shape) < 0.5, truth, other)
    return Answers(classes, 20 * classes, 20 * truth + rng.integers(1, 20, truth.shape), truth, said)


@pytest.mark.parametrize("accuracy", ["some", "all", "none"])
def test_half_of_the_queries_shown_are_wrong_where_there_are_as_many(accuracy: str) -> None:
    answers = random_answers(0)
    wrong = answers.classes[:, [1, 1, 2, 2, 0, 0]]
    answers = replace(answers, said={"some": answers.said, "all": answers.truth, "none": wrong}[accuracy])
    chosen = choose_queries(answers, 6, seed=1)
    assert chosen == choose_queries(answers, 6, seed=1) != choose_queries(answers, 6, seed=2)
    assert len(chosen) == 6
    right = [answers.truth[n, q] == answers.said[n, q] for n, q, _ in chosen]
    assert right == {"some": [False] * 3 + [True] * 3, "all": [True] * 6, "none": [False] * 6}[accuracy]
    assert all(answers.classes[n, said] == answers.said[n, q] for n, q, said in chosen)
    assert len({int(answers.query[n, q]) for n, q, _ in chosen[:3]}) == 3
    assert len({int(answers.truth[n, q]) for n, q, _ in chosen[:3]}) == 3  # a class each


def answered(
    model: Model, loader: EpisodeLoader, monkeypatch: pytest.MonkeyPatch, *, shuffled: bool
) -> tuple[Answers, torch.Tensor]:
    """Answer 6 episodes; return the answers, and the logits [6, Q, way] that decided them."""
    decided: list[torch.Tensor] = []

    def watched(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        decided.append(logits)
        return decide(logits, labels)

    monkeypatch.setattr(accuracy, "decide", watched)
    answers = answer(model, loader, 6, shuffled=shuffled)
    mixed = decided[:: 3 if isinstance(model, TwoStreams) else 1]  # each of the streams is asked after their mix
    return answers, torch.stack(mixed).view(6, answers.query.shape[1], -1)


def configured(method: str, streams: str, changes: dict) -> RunConfig:
    config = resolve("synthetic", method, "demo", None, SMALL | {"groups": "any", "streams": streams})
    return replace(config, **changes)


SUPPORT = {"test_shot": 2, "stream_weight": "support"}
CLIPS = {"frame_rule": "segment_clips", "clip_frames": 3, "clip_stride": 1}
VIEWS = {"test_frames": "random", "views": 3}


@pytest.mark.parametrize(
    ("method", "streams", "changes", "shuffled"),
    [
        ("molo", "frames", {}, False),
        ("molo", "frames", VIEWS | {"test_shot": 2}, True),
        ("molo", "motion", {}, False),
        ("molo", "both", {}, False),
        ("molo", "both", SUPPORT, True),
        ("otam", "frames", {"test_frames": "random", "test_shot": 2}, False),
        ("otam", "motion", {"test_shot": 2}, True),
        ("otam", "both", {"test_frames": "random"}, False),
        ("otam", "both", VIEWS, True),
        ("otam", "both", SUPPORT, False),
        (
            "otam",
            "frames",
            {"trunk": "tiny3d", "frame_rule": "segment_clips", "clip_frames": 3, "clip_stride": 1},
            False,
        ),
        ("motion", "motion", {"crop": 64}, False),
        ("hyrsm", "frames", {"test_shot": 2}, True),
        ("hyrsm", "motion", VIEWS | {"motion_series": "diff1"}, False),
        ("hyrsm++", "frames", {"unlabelled_per_class": 1}, False),
        ("hyrsm++", "both", {"unlabelled_per_class": 1}, False),
        ("ctx", "frames", {"test_shot": 2}, False),
        ("trx", "both", {}, False),
    ],
)
def test_what_is_shown_is_what_the_evaluation_saw(
    tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch, method: str, streams: str, changes: dict, shuffled: bool
) -> None:
    config = configured(method, streams, changes)
    model = build_model(config)
    if isinstance(model, TwoStreams):
        model.fusion = Fusion(0.4, 2.0, 3.0)
    device = torch.device("cpu")
    with open_episodes(tiny_shards, "test", config, trunk=model.trunk, device=device, training=False) as loader:
        answers, expected = answered(model, loader, monkeypatch, shuffled=shuffled)
        model.train()
        examples = collect_examples(model, loader, answers, shuffled=shuffled, seed=3)
        again = collect_examples(model, loader, answers, shuffled=shuffled, seed=3)
    assert model.training
    assert examples == again
    assert 2 <= len(examples.queries) <= 6
    chosen = choose_queries(answers, len(examples.queries), seed=3)
    stored = streams != "frames"
    for one, (n, query, predicted) in zip(examples.queries, chosen, strict=True):
        # of the very same frames and motion
        assert one.predicted.score == pytest.approx(float(expected[n, query, predicted]), rel=1e-3, abs=1e-4)
        assert one.predicted.score >= one.other.score
        assert expected[n, query].argmax() == predicted
        assert one.predicted.clip.label == tiny_shards.dataset.classes[answers.said[n, query]]
        assert one.right == (one.query.label == one.predicted.clip.label)
        assert one.other.clip.label != one.predicted.clip.label
        assert one.right or one.other.clip.label == one.query.label
        assert (len(one.query.frames), len(one.query.motion)) == (4, 4 if stored else 3)
        assert one.sees_frames == (streams != "motion")
        assert one.motion == ({"flow1": "flow", "diff1": "difference"}[config.motion_series] if stored else "change")
        assert (one.decoded is not None) == (method == "molo" and one.sees_frames)
        if one.decoded is not None:
            # what the decoder was to make, on the same scale
            assert stored or one.decoded.target == one.query.motion
            assert len(one.decoded.decoded) == 3
        assert one.predicted.of_mean == (config.test_shot > 1 and method in {"molo", "hyrsm"})
        of_stream = {"frames", "motion"} if streams == "both" else {streams}
        lines = {"molo": of_stream if stored else {"frames", "motion"}, "trx": set(), "motion": set()}
        assert set(one.predicted.pairs) == lines.get(method, of_stream)
        assert all(one.predicted.pairs.values())
        assert one.unlabelled == (method == "hyrsm++")
        for pairs in one.predicted.pairs.values():
            assert {pair.query for pair in pairs} == set(range(max(p.query for p in pairs) + 1))
    result = summarise(answers, tiny_shards.dataset.classes)
    for pair in examples.confusions:
        assert result.confusion[pair.truth][pair.predicted] == pair.count
        assert sum(result.confusion[pair.truth].values()) == pair.queries


def test_pictures_of_motion_and_of_the_dark() -> None:
    change = torch.tensor([0.0, 0.5, -0.5, 2.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert motion_pictures(change, 1.0)[0][0, :, 0].tolist() == [128, 191, 64, 255]
    dark = np.full((8, 8, 3), 20, np.uint8)
    assert visible(dark).max() == 160  # at most 8 times
    assert np.array_equal(visible(dark + 120), dark + 120)


def test_colours_of_displacements_say_where_things_move() -> None:
    right, down, left, up = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)
    maps = 3 * torch.tensor([right, down, left, up, (0.0, 0.0)]).view(1, 5, 2).permute(0, 2, 1)[:, :, None]
    assert full_motion([maps, 0 * maps]) == pytest.approx(3.0)
    (picture,) = step_pictures(maps, 3.0)
    red, yellow, cyan, violet, white = picture[0].tolist()
    assert (red, white) == ([255, 0, 0], [255, 255, 255])
    assert yellow[0] > 200 < yellow[1] > yellow[2]
    assert cyan[1] > 150 < cyan[2] > cyan[0]
    assert violet[2] > 200 > violet[0] > violet[1]
    assert full_motion([maps[:0]]) == 1.0


def test_frames_beside_motion_are_those_that_a_model_of_frames_is_shown(tiny_shards: ShardSet) -> None:
    drawn = {}
    for streams in ("motion", "both"):
        config = configured("otam", streams, VIEWS)
        model, device = build_model(config), torch.device("cpu")
        with open_episodes(tiny_shards, "test", config, trunk=model.trunk, device=device, training=False) as loader:
            answers = answer(model, loader, 6)
            answers = replace(answers, said=answers.classes[:, [1, 0]])  # the same queries are drawn of both
            drawn[streams] = collect_examples(model, loader, answers, shuffled=True).queries
    for alone, both in zip(*drawn.values(), strict=True):
        assert (alone.query.name, alone.query.motion) == (both.query.name, both.query.motion)
        assert alone.query.frames == both.query.frames
