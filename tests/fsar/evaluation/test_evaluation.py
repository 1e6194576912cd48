"""Accuracy and its two intervals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fsar import EpisodeLoader, EpisodeRules, create_method
from fsar.episode import Episode
from fsar.evaluation.accuracy import (
    Answers,
    collect,
    collect_embedded,
    evaluate,
    shuffle_frames,
    summarise,
    video_interval,
)
from fsar.evaluation.comparison import compare
from pipelines.episodes.stream import EpisodeStream
from shards_spec.errors import ConfigError


def answers_of(rng: np.random.Generator, episodes: int, ease: np.ndarray, *, way: int = 5, shot: int = 1) -> Answers:
    """Answers of an imagined model to which video v (of class v % classes) is right with probability ease[v]."""
    classes = len(ease) // 20
    columns: list[list] = [[], [], [], [], []]
    for _ in range(episodes):
        chosen = rng.choice(classes, way, replace=False)
        videos = np.stack([rng.choice(20, shot + 1, replace=False) * classes + c for c in chosen])  # [way, shot + 1]
        query, support = videos[:, -1], videos[:, :-1].ravel()
        right = rng.random(way) < ease[query]
        wrong = chosen[(np.arange(way) + 1) % way]
        for column, value in zip(
            columns, (chosen, support, query, chosen, np.where(right, chosen, wrong)), strict=True
        ):
            column.append(value)
    return Answers(*(np.stack(column) for column in columns))


def test_figures_of_a_small_case_by_hand() -> None:
    answers = Answers(
        classes=np.array([[0, 1], [1, 0]]),
        support=np.array([[10, 20], [21, 11]]),
        query=np.array([[12, 22], [23, 13]]),
        truth=np.array([[0, 1], [1, 0]]),
        said=np.array([[0, 0], [1, 0]]),
    )
    result = summarise(answers, ["a", "b"])
    assert result.accuracy == 0.75
    assert result.chance == 0.5
    assert result.interval_episodes == pytest.approx(1.96 * np.std([0.5, 1.0], ddof=1) / np.sqrt(2))
    assert result.per_class == {"a": 1.0, "b": 0.5}
    assert result.confusion == {"a": {"a": 2}, "b": {"a": 1, "b": 1}}
    assert (result.episodes, result.queries, result.videos) == (2, 4, 8)


def test_more_episodes_narrow_one_interval_and_not_the_other() -> None:
    rng = np.random.default_rng(0)
    ease = rng.choice([0.1, 0.95], 100)  # some videos are hard, whatever the support
    few, many = (summarise(answers_of(rng, n, ease), [str(c) for c in range(5)]) for n in (200, 5000))
    assert many.interval_episodes < few.interval_episodes / 4
    assert many.interval_videos > 2 * many.interval_episodes  # 5,000 episodes say nothing beyond 100 videos


def test_interval_over_videos_covers_the_truth() -> None:
    """Draw the videos anew many times: the interval must hold the mean over all videos about 95 times in 100."""
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(60):
        ease = rng.choice([0.2, 0.9], 100)
        answers = answers_of(rng, 1500, ease)
        accuracy = (answers.truth == answers.said).mean()
        hits.append(abs(accuracy - 0.55) <= video_interval(answers))
    assert np.mean(hits) >= 0.85


@pytest.mark.parametrize("shot", [1, 5])
def test_it_covers_the_truth_where_an_episode_takes_many_of_few_videos(shot: int) -> None:
    """24 videos a class, as in a small test set: support videos leave few others to be the query."""
    rng = np.random.default_rng(4)
    hits = []
    for _ in range(60):
        ease = rng.choice([0.2, 0.8], (5, 24))
        classes = np.tile(np.arange(5), (800, 1))  # [N, way]
        places = rng.random((800, 5, 24)).argsort(axis=2)[..., : shot + 1]  # [N, way, shot + 1]
        rows = places + 24 * classes[..., None]
        said = np.where(rng.random((800, 5)) < ease.ravel()[rows[..., -1]], classes, (classes + 1) % 5)
        answers = Answers(classes, rows[..., :-1].reshape(800, -1), rows[..., -1], classes, said)
        hits.append(abs((said == classes).mean() - 0.5) <= video_interval(answers))
    assert np.mean(hits) >= 0.9


def test_where_videos_do_not_matter_both_intervals_agree() -> None:
    answers = answers_of(np.random.default_rng(3), 400, np.full(100, 0.7))
    result = summarise(answers, [str(c) for c in range(5)])
    assert result.interval_videos < 2 * result.interval_episodes


def test_same_answers_give_the_same_interval() -> None:
    answers = answers_of(np.random.default_rng(2), 50, np.full(100, 0.7))
    assert video_interval(answers) == video_interval(answers)


def test_shuffled_frames_are_the_same_frames_of_the_same_clips() -> None:
    class Plan:
        support_rows, query_rows, unlabelled_rows = np.array([4, 9]), np.array([0, 4, 7]), np.array([], np.int64)

    support = torch.arange(2 * 1 * 8).reshape(2, 1, 8, 1, 1, 1).expand(2, 1, 8, 3, 2, 2).float()
    query = torch.arange(3 * 8).reshape(3, 8, 1, 1, 1).expand(3, 8, 3, 2, 2).float()
    ids = torch.arange(2)
    episode = Episode(support, query, torch.tensor([0, 1, 0]), ids, ids)
    shuffled = shuffle_frames(Plan(), episode)
    for before, after in ((support, shuffled.support), (query, shuffled.query)):
        assert not torch.equal(before, after)
        steps = before.ndim - 4
        assert torch.equal(before.sort(dim=steps).values, after.sort(dim=steps).values)
    order = [clip[:, 0, 0, 0] % 8 for clip in (shuffled.support[0, 0], shuffled.query[1])]
    assert torch.equal(*order)  # one video, one order, wherever it stands


def test_given_episodes_decide_way_and_number(tiny_shards) -> None:
    model = create_method("prototype", trunk="tiny")
    drawn = EpisodeRules(way=3, shot=2, frames=4, resize=72, crop=56, groups="any")
    chosen = [EpisodeStream(tiny_shards, "train", drawn, seed=3).choose(n) for n in range(6)]
    for random_frames in (False, True):
        rules = replace(drawn, way=5, shot=1, random_frames=random_frames)
        with EpisodeLoader(tiny_shards, "train", rules, given=chosen) as loader:
            result = evaluate(model, loader)
            with pytest.raises(ConfigError, match="episode 6 is asked for and 6 were given"):
                evaluate(model, loader, 7)
            with pytest.raises(ConfigError, match="ask for fewer"):
                list(loader)
        assert (result.chance, result.episodes, result.queries) == (1 / 3, 6, 18)
        assert result.interval_videos is not None


def test_one_episode_has_no_interval() -> None:
    answers = Answers(*(np.array([row]) for row in ([0, 1], [10, 20], [12, 22], [0, 1], [0, 0])))
    result = summarise(answers, ["a", "b"])
    assert result.interval_episodes is None
    assert "95 % intervals: unknown over 1 episode, over 4 videos unknown" in str(result)
    comparison = compare({"a": answers, "b": answers}, ["a", "b"], baseline="a")
    assert not comparison.differences["b"].excludes_zero
    assert "unknown" in comparison.to_markdown({"a": {}, "b": {}})
    json.dumps(comparison.to_json(), allow_nan=False)


@pytest.mark.parametrize("method", ["molo", "prototype"])
@pytest.mark.parametrize(("shot", "shuffled"), [(1, False), (2, False), (1, True)])
def test_embedding_each_video_once_gives_the_answers_of_the_direct_way(
    tiny_shards, method: str, shot: int, shuffled: bool
) -> None:
    torch.manual_seed(0)
    model = create_method(method, trunk="tiny", num_classes=3)
    rules = EpisodeRules(way=3, shot=shot, queries=2, frames=6, resize=72, crop=56, groups="any")
    with EpisodeLoader(tiny_shards, "train", rules, seed=3, prefetch=1) as loader:
        change = shuffle_frames if shuffled else lambda _, episode: episode
        direct = collect(model, ((plan, change(plan, episode)) for plan, episode, _ in loader.planned(0, 20)))
        embedded = collect_embedded(model, loader, 20, shuffled=shuffled)
        result = evaluate(model, loader, 20, shuffled=shuffled)
    assert model.training
    for column in ("classes", "support", "query", "truth", "said"):
        assert np.array_equal(getattr(direct, column), getattr(embedded, column)), column
    assert len(np.unique(direct.said)) > 1
    assert result.accuracy == (direct.truth == direct.said).mean()


def test_no_interval_over_videos_is_claimed_where_none_can_be_drawn() -> None:
    classes = np.array([[0, 1], [1, 0], [0, 1]])
    support, query = np.array([[0, 2], [3, 1], [1, 2]]), np.array([[1, 3], [2, 0], [0, 3]])
    two_videos = summarise(Answers(classes, support, query, classes, classes), ("a", "b"))
    assert two_videos.interval_videos is None
    assert "over 4 videos unknown" in str(two_videos)
    more = np.array([[1, 3], [2, 0], [4, 5]])
    assert summarise(Answers(classes, support, more, classes, classes), ("a", "b")).interval_videos is not None
