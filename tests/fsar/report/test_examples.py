"""Examples in a report: the queries and frames of the evaluation itself, half of them wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fsar.cli.train import resolve
from fsar.evaluation.accuracy import Answers, answer, summarise
from fsar.evaluation.embeddings import embed_rows, places_in_embedding
from fsar.evaluation.logits import EpisodeVideos, episode_logits
from fsar.loader import EpisodeLoader
from fsar.methods import FewShotMethod
from fsar.report.examples import choose_queries, collect_examples
from fsar.report.pictures import motion_pictures, visible
from fsar.run.build import build_model, open_episodes
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


@torch.no_grad()
def scores(model: FewShotMethod, loader: EpisodeLoader, *, shuffled: bool) -> torch.Tensor:
    """Compute logits [6, Q, way] as the evaluation does: of embedded videos, or of episodes."""
    model.eval()
    if loader.draws_each_time:
        return torch.stack([model(episode).logits for episode in loader.episodes(0, 6)])
    rows = EpisodeVideos.of([loader.stream.choose(n) for n in range(6)], unlabelled="unlabelled" in model.reads)
    videos = rows.videos()
    embedding = embed_rows(loader, model, videos, shuffled=shuffled)
    return torch.cat(list(episode_logits(model, embedding, places_in_embedding(loader, rows, videos))))


@pytest.mark.parametrize(
    ("method", "changes", "shuffled"),
    [
        ("molo", {}, False),
        ("molo", {"test_frames": "random", "views": 3, "test_shot": 2}, True),
        ("otam", {"test_frames": "random", "test_shot": 2}, False),
        ("hyrsm", {"test_shot": 2}, True),
        ("hyrsm++", {"unlabelled_per_class": 1}, False),
        ("otam", {"trunk": "tiny3d", "frame_rule": "segment_clips", "clip_frames": 3, "clip_stride": 1}, False),
        ("ctx", {"test_shot": 2}, False),
        ("trx", {}, False),
    ],
)
def test_what_is_shown_is_what_the_evaluation_saw(
    tiny_shards: ShardSet, method: str, changes: dict, shuffled: bool
) -> None:
    config = replace(resolve("synthetic", method, "demo", None, SMALL | {"groups": "any"}), **changes)
    model = build_model(config)
    device = torch.device("cpu")
    with open_episodes(tiny_shards, "test", config, trunk=model.trunk, device=device, training=False) as loader:
        answers, expected = answer(model, loader, 6, shuffled=shuffled), scores(model, loader, shuffled=shuffled)
        model.train()
        examples = collect_examples(model, loader, answers, shuffled=shuffled, seed=3)
        again = collect_examples(model, loader, answers, shuffled=shuffled, seed=3)
    assert model.training
    assert examples == again
    assert 2 <= len(examples.queries) <= 6
    chosen = choose_queries(answers, len(examples.queries), seed=3)
    for one, (n, query, predicted) in zip(examples.queries, chosen, strict=True):
        score = float(expected[n, query, predicted])  # of the very same frames
        assert one.predicted.score == pytest.approx(score, abs=1e-4)
        assert one.predicted.score >= one.other.score
        assert one.right == (one.query.label == one.predicted.clip.label)
        assert one.other.clip.label != one.predicted.clip.label
        assert one.right or one.other.clip.label == one.query.label
        assert (len(one.query.frames), len(one.query.motion)) == (4, 3)
        assert (one.decoded is not None) == (method == "molo")
        if one.decoded is not None:
            assert one.decoded.target == one.query.motion  # what the decoder was to make, on the same scale
            assert len(one.decoded.decoded) == 3
        assert one.predicted.of_mean == (config.test_shot > 1 and method in {"molo", "hyrsm"})
        lines = {"molo": {"frames", "motion"}, "trx": set()}.get(method, {"frames"})
        assert set(one.predicted.pairs) == lines
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
