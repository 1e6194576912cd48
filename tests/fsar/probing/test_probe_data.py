"""Divisions of videos into training and test for probes, and the clips of each."""

from __future__ import annotations

import numpy as np
import pytest
from fake_shards import FakeShards
from hypothesis import given
from hypothesis import strategies as st

from pipelines.clips.labelled import ProbeRules, random_clips, uniform_clips
from shards_spec.errors import ConfigError, ShardError
from shards_spec.splits.divisions import held_out_division, listed_division


def test_official_lists_of_ucf101_are_found_by_class_and_stem(tmp_path):
    shards = FakeShards(4, classes=2)
    (tmp_path / "trainlist02.txt").write_text("Class0/0.avi 1\nclass0/1.avi 1\nclass1/4.avi 2\nclass1/0.avi 2\n")
    (tmp_path / "testlist02.txt").write_text("class0/3.avi\nclass1/7.avi\n")
    division = listed_division(shards, tmp_path, number=2)
    assert division.train.tolist() == [0, 1, 4]
    assert division.test.tolist() == [3, 7]
    assert division.absent == {"train": 1, "test": 0}  # class1 has no 0.avi
    with pytest.raises(ShardError, match=r"neither trainlist01\.txt"):
        listed_division(shards, tmp_path)
    (tmp_path / "testlist02.txt").write_text("class0/1.avi\n")
    with pytest.raises(ShardError, match=r'lists "videos/1\.avi" for training and for testing'):
        listed_division(shards, tmp_path, number=2)
    (tmp_path / "testlist02.txt").write_text("other/1.avi\n")
    with pytest.raises(ShardError, match=r"none of the 1 videos .* for test is stored"):
        listed_division(shards, tmp_path, number=2)


def test_official_lists_of_hmdb51_and_a_json_of_ones_own(tmp_path):
    shards = FakeShards(4, classes=2)
    (tmp_path / "class0_test_split1.txt").write_text("0.avi 1 \n1.avi 2 \n2.avi 0 \n")
    (tmp_path / "class1_test_split1.txt").write_text("4.avi 2 \n5.avi 1 \n")
    division = listed_division(shards, tmp_path)
    assert (division.train.tolist(), division.test.tolist()) == ([0, 5], [1, 4])
    (tmp_path / "class1_test_split1.txt").write_text("4.avi 3\n")
    with pytest.raises(ShardError, match="line 1: cannot read"):
        listed_division(shards, tmp_path)
    own = tmp_path / "own.json"
    own.write_text('{"train": ["6.avi", "0.avi"], "test": ["1.avi"]}')
    division = listed_division(shards, own)
    assert (division.name, division.train.tolist(), division.test.tolist()) == ("own.json", [0, 6], [1])


@given(seed=st.integers(0, 1000), share=st.floats(0.05, 0.9), groups=st.integers(2, 9))
def test_held_out_videos_share_no_group_and_leave_each_class_something(seed, share, groups):
    rng = np.random.default_rng(seed)
    shards = FakeShards(7, classes=3, groups=rng.integers(-1, groups, 21).tolist())
    try:
        division = held_out_division(shards, share=share, seed=seed)
    except ConfigError:
        return  # a group that lies over all videos of a class
    own = shards.groups
    assert not set(own[division.train]) & set(own[division.test]) - {-1}
    assert sorted([*division.train, *division.test]) == list(range(21))
    assert set(shards.labels[division.train]) == {0, 1, 2}


def test_nothing_can_be_held_out_of_a_class_that_is_one_group():
    with pytest.raises(ConfigError, match="no class of train has videos of two groups"):
        held_out_division(FakeShards(4, classes=2, groups=[0] * 4 + [1] * 4), split="train")


def frames_of(plan) -> list[list[int]]:
    """Frames of each clip, as the plan's reads have them."""
    return [plan.reads[view.reads].frames[list(view.indices)].tolist() for view in plan.views]


def test_uniform_clips_start_where_the_published_code_starts_them():
    shards = FakeShards(1, classes=2, frames=np.array([50, 9]), size=(64, 80))
    rules = ProbeRules(frames=4, stride=2, size=16, clips=10)
    stream = uniform_clips(shards, [0, 1], rules)
    plan = stream.plan(0)
    (reads,) = plan.reads
    frames = np.array(frames_of(plan))  # [10, 4]
    assert frames[:, 0].tolist() == [42 * n // 9 for n in range(10)]
    assert (np.diff(frames, axis=1) == 2).all()
    assert len(set(reads.frames.tolist())) == len(reads)  # each pixel once
    assert (reads.size, reads.tops[0], reads.lefts[0]) == ((56, 56), 4, 12)
    short = uniform_clips(shards, [1], ProbeRules(frames=8, stride=2, clips=2)).plan(0)
    assert frames_of(short) == [[0, 2, 4, 6, 8, 8, 8, 8]] * 2


def test_an_epoch_of_random_clips_has_each_video_once_and_any_batch_can_be_planned():
    shards, rules = FakeShards(5, classes=2), ProbeRules(frames=4, stride=2)
    stream = random_clips(shards, range(10), rules, batch=3, seed=1)
    assert stream.epoch_steps == 3
    epochs = [[row for n in range(3 * e, 3 * e + 3) for row in stream.plan(n).rows] for e in range(2)]
    assert all(len(set(rows)) == 9 for rows in epochs)
    assert epochs[0] != epochs[1]
    again, before = random_clips(shards, range(10), rules, batch=3, seed=1).plan(4), stream.plan(4)
    assert (again.rows.tolist(), again.flips.tolist()) == (before.rows.tolist(), before.flips.tolist())
    for ours, theirs in zip(again.reads, before.reads, strict=True):
        assert (ours.size, ours.tops[0], ours.frames.tolist()) == (theirs.size, theirs.tops[0], theirs.frames.tolist())
    assert random_clips(shards, [3, 4], rules, batch=256, seed=0).epoch_steps == 1
    with pytest.raises(ConfigError, match="no video to train on"):
        random_clips(shards, [], rules, batch=2, seed=0)


def test_segments_are_those_of_the_published_code():
    rules = ProbeRules(frames=4, clips=1, sampling="segments", centre=1.0, flip=False)
    assert rules.uniform(21) == [[2, 7, 13, 18]]  # int(21 / 4 * (n + 1 / 2))
    assert rules.window == 1
    twice = ProbeRules(frames=4, clips=2, sampling="segments").uniform(40)
    assert twice == [[2, 12, 22, 32], [7, 17, 27, 37]]
    shards = FakeShards(5, classes=2, frames=np.full(10, 21))
    plans = [random_clips(shards, range(10), rules, batch=5, seed=0).plan(n) for n in range(8)]
    drawn = np.array([frames for plan in plans for frames in frames_of(plan)])
    assert (drawn // 5 == np.arange(4)).all()  # each in its part of 5 frames
    assert all(len(set(column)) == 5 for column in drawn.T.tolist())
    assert not any(plan.flips.any() for plan in plans)
    (reads,) = uniform_clips(shards, [0], rules).plan(0).reads
    assert reads.size == (64, 64)
    with pytest.raises(ConfigError, match="centre=0"):
        ProbeRules(centre=0)
