"""Unlabelled videos of an episode: which are drawn, how they reach the method, who refuses them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from fake_shards import FakeShards
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import call, words

from fsar import EpisodeLoader, create_method
from fsar.cli.evaluate import cli as evaluate_cli
from fsar.cli.train import cli as train_cli
from fsar.evaluation.accuracy import collect, collect_embedded, shuffle_frames
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import EpisodeStream
from shards_spec.errors import ConfigError

TRAIN = EpisodeRules(
    way=3, resize=64, crop=48, random_frames=True, random_crop=True, query_flip=True, query_jitter=True
)
FRACTION = 0.5


@given(
    shot=st.integers(1, 2),
    queries=st.integers(1, 2),
    unlabelled=st.integers(0, 2),
    distractors=st.integers(1, 2),
    distractor_classes=st.integers(0, 3),
    labelled_fraction=st.sampled_from([1.0, FRACTION]),
    groups=st.sampled_from(["disjoint", "any"]),
    n=st.integers(0, 2**63),
)
@settings(max_examples=150, deadline=None)
def test_rules_of_unlabelled_videos(n, **values):
    shards = FakeShards(24, groups=[row // 2 for row in range(144)])
    unlabelled = values.pop("unlabelled")
    without = dataclasses.replace(
        TRAIN, **{key: v for key, v in values.items() if key in ("shot", "queries", "groups", "labelled_fraction")}
    )
    rules = dataclasses.replace(
        without,
        unlabelled_per_class=unlabelled,
        distractor_classes=values["distractor_classes"],
        distractors_per_class=values["distractors"],
    )
    plan = EpisodeStream(shards, "all", rules, seed=5).plan(n)
    other = EpisodeStream(shards, "all", without, seed=5).plan(n)
    for name in ("class_ids", "support_rows", "query_rows", "query_labels"):
        assert getattr(plan, name).tolist() == getattr(other, name).tolist()
    assert (plan.support, plan.query) == (other.support, other.query)  # the same clips of them, too
    assert len(other.unlabelled) == len(other.unlabelled_rows) == 0

    labelled, extra = [*plan.support_rows, *plan.query_rows], plan.unlabelled_rows
    assert len({*labelled, *extra}) == len(labelled) + len(extra)
    counts = np.bincount(shards.labels[extra], minlength=6)
    assert counts[plan.class_ids].tolist() == [unlabelled] * 3
    foreign = np.delete(counts, plan.class_ids)
    assert sorted(foreign[foreign > 0].tolist()) == [values["distractors"]] * values["distractor_classes"]
    if rules.groups == "disjoint":
        assert not set(shards.groups[labelled]) & set(shards.groups[extra])
    assert len(plan.unlabelled) == len(extra) == rules.unlabelled
    for row, view in zip(extra, plan.unlabelled, strict=True):
        assert (plan.reads[view.reads].rows[list(view.indices)] == row).all()
        assert not view.flip
        assert view.jitter is None


def test_the_labelled_part_is_a_share_of_each_class_and_the_same_in_every_episode():
    shards = FakeShards(10)
    rules = dataclasses.replace(TRAIN, unlabelled_per_class=3, labelled_fraction=0.3)
    plans = [EpisodeStream(shards, "all", rules, seed=1).plan(n) for n in range(200)]
    labelled = {int(row) for plan in plans for row in [*plan.support_rows, *plan.query_rows]}
    extra = {int(row) for plan in plans for row in plan.unlabelled_rows}
    assert np.bincount(shards.labels[list(labelled)]).tolist() == [3] * 6
    assert np.bincount(shards.labels[list(extra)]).tolist() == [7] * 6
    assert not labelled & extra
    elsewhere = EpisodeStream(shards, "test", rules, seed=1).plan(0)  # a class's part depends only on its name
    assert {*elsewhere.support_rows, *elsewhere.query_rows} <= labelled


def test_the_place_of_an_unlabelled_video_says_nothing():
    rules = dataclasses.replace(TRAIN, unlabelled_per_class=1)
    shards, stream = FakeShards(), EpisodeStream(FakeShards(), "all", rules, seed=0)
    first = [
        plan.class_ids.tolist().index(shards.labels[plan.unlabelled_rows[0]]) for plan in map(stream.plan, range(90))
    ]
    assert min(np.bincount(first, minlength=3)) > 15


def test_classes_that_cannot_give_unlabelled_videos():
    rules = dataclasses.replace(TRAIN, unlabelled_per_class=2)
    shards = FakeShards([8, 3, 8, 8], groups=[*range(8), *range(8, 11), *[11] * 4, *[12] * 4, *range(13, 21)])
    with pytest.raises(ConfigError, match=r'"class1" of split "all" has 3 videos that may be unlabelled'):
        EpisodeStream(shards, "all", rules, seed=0)
    with pytest.raises(ConfigError, match="left out, having too few videos: class1, class2"):  # all groups are taken
        EpisodeStream(shards, "all", dataclasses.replace(rules, small_classes="drop"), seed=0)
    EpisodeStream(FakeShards([4, 4, 4]), "all", rules, seed=0).plan(0)
    with pytest.raises(ConfigError, match="3-way episode with 1 distractor classes needs 4"):
        EpisodeStream(FakeShards([8] * 3), "all", dataclasses.replace(rules, distractor_classes=1), seed=0)
    with pytest.raises(ConfigError, match="give distractors_per_class"):
        EpisodeRules(distractor_classes=1)
    with pytest.raises(ConfigError, match="labelled_fraction is 0"):
        EpisodeRules(labelled_fraction=0)


RULES = EpisodeRules(way=2, frames=4, resize=72, crop=56, groups="any", unlabelled_per_class=2, distractor_classes=1)


@pytest.mark.parametrize("shuffled", [False, True])
def test_unlabelled_videos_take_part_in_evaluation_both_ways(tiny_shards, shuffled):
    torch.manual_seed(0)
    model = create_method("hyrsm++", trunk="tiny", num_classes=3, frames=4, semi_threshold=0.0)
    with EpisodeLoader(tiny_shards, "train", RULES, seed=3, prefetch=1) as loader:
        episode = next(loader.episodes())
        assert episode.unlabelled.shape == (6, 4, 3, 56, 56)
        change = shuffle_frames if shuffled else lambda _, episode: episode
        direct = collect(model, ((plan, change(plan, episode)) for plan, episode, _ in loader.planned(0, 8)))
        embedded = collect_embedded(model, loader, 8, shuffled=shuffled)
        given = model.eval()(episode).logits
        without = model(dataclasses.replace(episode, unlabelled=None)).logits
    assert np.array_equal(direct.said, embedded.said)
    assert not torch.allclose(given, without)


def test_an_unlabelled_video_looks_the_same_as_support_and_as_unlabelled(tiny_shards):
    with EpisodeLoader(tiny_shards, "train", RULES, seed=3, prefetch=1) as loader:
        seen = {}
        for plan, episode, _ in loader.planned(0, 20):
            clips = [*episode.support.flatten(0, 1), *episode.query, *episode.unlabelled]
            rows = [*plan.support_rows, *plan.query_rows, *plan.unlabelled_rows]
            for row, clip in zip(rows, clips, strict=True):
                assert torch.equal(seen.setdefault(int(row), clip.clone()), clip)


def test_unlabelled_videos_of_another_shape_are_refused(tiny_shards):
    with EpisodeLoader(tiny_shards, "train", RULES, prefetch=1) as loader:
        episode = next(loader.episodes())
    with pytest.raises(ConfigError, match=r"unlabelled is \[6, 3, 3, 56, 56\] and query \[2, 4, 3, 56, 56\]"):
        dataclasses.replace(episode, unlabelled=episode.unlabelled[:, :3])


SEMI = {"groups": "any", "unlabelled_per_class": 1, "distractor_classes": 1, "select_on": "last", "episodes": 4}
SEMI |= {"val_every": 4}


def test_training_and_evaluation_with_unlabelled_videos(tiny_path, tmp_path, capsys):
    run = tmp_path / "run"
    given = words(tiny_path, run, **(SEMI | {"distractor_classes": 0}))
    assert call(train_cli, *given, "--method", "hyrsm++") == 0
    again = ["--weights", str(run), "--shards", str(tiny_path)]
    out = tmp_path / "result.json"
    assert call(evaluate_cli, *again, "--unlabelled-per-class", "2", "--out", str(out)) == 0
    assert json.loads(out.read_text())["unlabelled_per_class"] == 2
    assert json.loads((run / "result.json").read_text())["unlabelled_per_class"] == 1
    assert call(evaluate_cli, *again, "--distractor-classes", "1", "--split", "train", "--allow-overlap") == 0
    capsys.readouterr()
    assert call(evaluate_cli, *again, "--distractor-classes", "1") == 2
    assert "2-way episode with 1 distractor classes needs 3" in capsys.readouterr().err


def test_methods_that_read_none_are_refused_at_the_start(tiny_path, tmp_path, capsys):
    assert call(train_cli, *words(tiny_path, tmp_path / "run", **SEMI), "--method", "otam") == 2
    assert "otam reads no unlabelled videos" in capsys.readouterr().err
    words_ = ["--method", "prototype", "--trunk", "tiny", "--trunk-weights", "random", "--shards", str(tiny_path)]
    assert call(evaluate_cli, *words_, "--way", "2", "--unlabelled-per-class", "1") == 2
    assert "a method that does (hyrsm++)" in capsys.readouterr().err
